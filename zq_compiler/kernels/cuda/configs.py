"""Tiles: which ones an op runs with, on an architecture and for a shape.

    configs/sm_<architecture>.json          what was timed: rows of op, n, k, dtype, and for buckets of m the tiles
    <cache>/tuned/sm_<architecture>.json    the same, by the user, which goes first

What no row speaks of is chosen by an op's own formula. Nothing is timed at import or at a first call; `zq tune` times
candidates on a GPU and writes such a file.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ZQError
from ..cache import cache_folder
from .registration import architecture

Config = dict[str, int]  # a kernel's BLOCK sizes, num_warps, num_stages
Key = tuple[str, int, int, int, str, str]
FOLDER = Path(__file__).with_name("configs")
MOST_ROWS = 8192  # from which on a shape counts as this
ELEMENTS_A_THREAD = 32  # that a kernel of rows keeps in registers
MAX_WARPS = 32
REGISTERS = 65536  # of a multiprocessor
LONG = 16384  # elements of a row that takes half of them


@dataclass(frozen=True)
class Problem:
    """A product `[m, k] x [k, n]`, or m rows of k.

    Args:
        dtype: of the result; of rows that are quantized, of what is read.
        variant: what else tiles depend on, such as a weight's format and group.

    >>> Problem("int8_linear", 100, 768, 768, "float16").key
    ('int8_linear', 128, 768, 768, 'float16', '')
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str
    variant: str = ""

    @property
    def bucket(self) -> int:
        """m as files have it: the next power of two."""
        return min(1 << max(self.m - 1, 0).bit_length(), MOST_ROWS)

    @property
    def key(self) -> Key:
        """What problems that run with the same tiles have in common."""
        return self.op, self.bucket, self.n, self.k, self.dtype, self.variant


Formula = Callable[[Problem, int], Config]
_passes_through: list[Callable[[Problem, Config], Config]] = []


def choose(problem: Problem, target: int, formula: Formula) -> Config:
    """The tiles of a problem on an architecture: a file's, else the formula's."""
    known = timed(target).get(problem.key)
    config = known or formula(problem, target)
    for change in reversed(_passes_through):
        config = change(problem, config)
    return dict(config)  # the caller's own


def choose_rows(op: str, x: torch.Tensor, m: int, k: int, config: Config, variant: str = "") -> Config:
    """The tiles of a kernel that goes through m rows of k features: a file's, else `config`.

    Args:
        x: what the kernel reads, or a result of that device and dtype.
        config: what `row_config` or `tile_config` gives. A whole row's length is no choice, and stays.
    """
    whole = {"BLOCK_K": config["BLOCK_K"]} if config["BLOCK_K"] >= k else {}
    free = {name: value for name, value in config.items() if name not in whole}
    problem = Problem(op, m, k, k, str(x.dtype).removeprefix("torch."), variant)
    return {**choose(problem, architecture(x.device), lambda *_: free), **whole}


@contextmanager
def trying(change: Callable[[Problem, Config], Config]) -> Iterator[None]:
    """Within, what `choose` gives passes through a function, the innermost first: for `zq tune`."""
    _passes_through.append(change)
    try:
        yield
    finally:
        _passes_through.pop()


def tuned_file(target: int) -> Path:
    """Where `zq tune` writes."""
    return cache_folder() / "tuned" / f"sm_{target}.json"


@functools.cache
def timed(target: int) -> dict[Key, Config]:
    """What the files of an architecture say; read once.

    Raises:
        ZQError: a file is damaged.
    """
    return {**read_rows(FOLDER / f"sm_{target}.json"), **read_rows(tuned_file(target))}


def read_rows(path: Path) -> dict[Key, Config]:
    """A file's tiles; none where there is no file.

    Raises:
        ZQError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())
        return {
            (r["op"], r["m"], r["n"], r["k"], r["dtype"], r["variant"]): {k: int(v) for k, v in r["config"].items()}
            for r in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZQError(f"is no file of `zq tune`: {error}", where=str(path), fix="delete it and tune again") from error


def row_config(m: int, k: int, elements: int = ELEMENTS_A_THREAD) -> Config:
    """For kernels that keep whole rows in registers: one in a program, or several short ones.

    One row: parameters of features then lie as its elements do, and no tile passes through shared memory for them.

    >>> row_config(512, 768)
    {'BLOCK_M': 1, 'BLOCK_K': 1024, 'num_warps': 1}
    >>> row_config(512, 12288)  # 64 registers, so that two programs of 512 threads fit a multiprocessor
    {'BLOCK_M': 1, 'BLOCK_K': 16384, 'num_warps': 16, 'maxnreg': 64}
    """
    block_k = 1 << max(k - 1, 15).bit_length()
    block_m = max(1, min(32 * elements // block_k, 1 << max(m - 1, 0).bit_length()))
    warps = max(1, min(MAX_WARPS, block_k // (32 * elements)))
    config = {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps}
    return config if block_k < LONG else {**config, "maxnreg": min(2 * block_k, REGISTERS) // (32 * warps)}


def tile_config(m: int, k: int) -> Config:
    """For kernels of elements: tiles whose rows share the features' scales.

    >>> tile_config(512, 768)
    {'BLOCK_M': 8, 'BLOCK_K': 512, 'num_warps': 4}
    """
    block_k = min(512, 1 << max(k - 1, 15).bit_length())
    block_m = min(128 * ELEMENTS_A_THREAD // block_k, 1 << max(m - 1, 0).bit_length())
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": 4}
