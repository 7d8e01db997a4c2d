"""Triton decides when it is imported whether it interprets or compiles, so each half has a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ELSEWHERE = {
    "interpreter": None if INTERPRETED else "runs in a process of its own, with TRITON_INTERPRET=1",
    "codegen": "compiles, which takes a process without TRITON_INTERPRET=1" if INTERPRETED else None,
}


class Elsewhere(pytest.Dir):
    """A folder whose tests another process runs."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(f"{self.path.name}: {ELSEWHERE[self.path.name]}")


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return Elsewhere.from_parent(parent, path=path) if ELSEWHERE.get(path.name) else None
