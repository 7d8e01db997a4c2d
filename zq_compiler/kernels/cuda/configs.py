"""Tiles: which ones an op runs with, on an architecture and for a shape.

    configs/sm_<architecture>.json    what was timed: rows of op, n, k, dtype, and for buckets of m the meta-parameters

What no row speaks of is chosen by an op's own formula. Nothing is timed at import or at a first call; `zq tune` times
the candidates on a GPU and writes these files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Config = dict[str, int]  # a kernel's BLOCK sizes, num_warps, num_stages
FOLDER = Path(__file__).with_name("configs")
MOST_ROWS = 8192  # from which on a shape counts as this
ELEMENTS_A_THREAD = 32  # that a kernel of rows keeps in registers
MAX_WARPS = 32


@dataclass(frozen=True)
class Problem:
    """A product `[m, k] x [k, n]`, or m rows of k.

    >>> Problem("int8_linear", 100, 768, 768, "float16").bucket
    128
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str

    @property
    def bucket(self) -> int:
        """m as files have it: the next power of two."""
        return min(1 << max(self.m - 1, 0).bit_length(), MOST_ROWS)


def choose(problem: Problem, architecture: int, formula: Callable[[Problem, int], Config]) -> Config:
    """The tiles of a problem: a file's, else the formula's."""
    known = _table(architecture).get((problem.op, problem.n, problem.k, problem.dtype, problem.bucket))
    return dict(known or formula(problem, architecture))


@functools.cache
def _table(architecture: int) -> dict[tuple[str, int, int, str, int], Config]:
    path = FOLDER / f"sm_{architecture}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["op"], row["n"], row["k"], row["dtype"], row["m"]): row["config"] for row in rows}


def row_config(m: int, k: int) -> Config:
    """For kernels that keep whole rows in registers: one in a program, or several short ones.

    One row: parameters of features then lie as its elements do, and no tile passes through shared memory for them.

    >>> row_config(512, 768)
    {'BLOCK_M': 1, 'BLOCK_K': 1024, 'num_warps': 1}
    >>> row_config(512, 12288)  # 64 registers, so that two programs of 512 threads fit a multiprocessor
    {'BLOCK_M': 1, 'BLOCK_K': 16384, 'num_warps': 16, 'maxnreg': 64}
    """
    block_k = 1 << max(k - 1, 15).bit_length()
    block_m = max(1, min(32 * ELEMENTS_A_THREAD // block_k, 1 << max(m - 1, 0).bit_length()))
    warps = max(1, min(MAX_WARPS, block_k // (32 * ELEMENTS_A_THREAD)))
    config = {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps}
    return config if warps < 16 else {**config, "maxnreg": 64}


def tile_config(m: int, k: int) -> Config:
    """For kernels of elements: tiles whose rows share the features' scales.

    >>> tile_config(512, 768)
    {'BLOCK_M': 8, 'BLOCK_K': 512, 'num_warps': 4}
    """
    block_k = min(512, 1 << max(k - 1, 15).bit_length())
    block_m = min(128 * ELEMENTS_A_THREAD // block_k, 1 << max(m - 1, 0).bit_length())
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": 4}
