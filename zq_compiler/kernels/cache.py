"""The user's folder for what is made once a machine: compiled kernels, timed tiles."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ZQ_CACHE_DIR`, or `zq_compiler` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if path := os.environ.get("ZQ_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zq_compiler"
