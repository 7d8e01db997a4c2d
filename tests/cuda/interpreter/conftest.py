"""All kernels here run in Triton's interpreter, repaired and watched: see `sanitizer`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda.conftest import INTERPRETED

if INTERPRETED:
    from tests.cuda.interpreter import sanitizer

    sanitizer.install()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN, or integers that no kernel computes."""
    with sanitizer.poisoned():
        yield
