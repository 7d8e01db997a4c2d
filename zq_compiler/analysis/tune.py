"""Times tiles of a model's CUDA kernels and keeps the fastest (`zq tune`), for `kernels/cuda/configs.py` to read.

The lowered model runs once, op by op. A kernel that asks for tiles of a problem not yet timed is tried there, on its
own operands: from what it would run with, one parameter at a time is halved or doubled for as long as that is faster. A
candidate that does not fit the GPU, or whose result is another one, is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.cuda import configs, registration
from ..kernels.cuda.configs import Config, Key, Problem
from ..torch_private import OpOverload, pytree

Clock = Callable[[Callable[[], Any]], float]
LEAST = {"SPLIT_K": 1, "GROUP_M": 1, "num_warps": 1, "num_stages": 1}  # of other parameters 16, or 1 of no product
MOST = {"num_warps": 32, "num_stages": 8, "SPLIT_K": 32, "GROUP_M": 32}  # of others 256
KEY = ("op", "m", "n", "k", "dtype", "variant")
GAIN = 0.98  # of the time so far, which a candidate must stay below


@dataclass(frozen=True)
class Tuned:
    """One problem's tiles, as files have them.

    Args:
        m: its bucket.
        variant: see `configs.Problem`.
        milliseconds, before: with these tiles and with those that it started from.
        tried, refused: candidates; of the latter, those that did not run or gave another result.
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str
    variant: str
    config: Config
    milliseconds: float
    before: float
    tried: int
    refused: int


class Tuner(fx.Interpreter):
    """Runs a graph lowered for CUDA, and tunes what its kernels ask for.

    Args:
        gm: of `lowering.inductor.lower`.
        clock: milliseconds of a call.
        known: problems to leave alone, by their keys.
    """

    def __init__(self, gm: fx.GraphModule, clock: Clock, known: set[Key] | None = None) -> None:
        super().__init__(gm)
        self.clock, self.known, self.tuned = clock, known if known is not None else set(), list[Tuned]()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, OpOverload) and target.namespace == registration.NAMESPACE:
            asked: list[tuple[Problem, Config]] = []

            def note(problem: Problem, config: Config) -> Config:
                asked.append((problem, config))
                return config

            with configs.trying(note):
                super().call_function(target, args, kwargs)
            for problem, config in asked:
                if problem.key not in self.known:
                    self.known.add(problem.key)
                    self.tuned.append(self._tune(problem, config, lambda: target(*args, **kwargs)))
        return super().call_function(target, args, kwargs)

    def _tune(self, problem: Problem, start: Config, call: Callable[[], Any]) -> Tuned:
        def run(config: Config) -> Any:
            with configs.trying(lambda asked, given: dict(config) if asked == problem else given):
                return call()

        expected = run(start)
        best, fastest = start, self.clock(lambda: run(start))
        before, tried, seen = fastest, 0, [start]
        refused = 0
        while candidates := [c for c in neighbours(best) if c not in seen]:
            found = best
            for candidate in candidates:
                seen.append(candidate)
                tried += 1
                milliseconds = self._time(candidate, run, expected)
                if milliseconds is None:
                    refused += 1
                elif milliseconds < GAIN * fastest:
                    found, fastest = candidate, milliseconds
            if found is best:
                break
            best = found
        return Tuned(*problem.key, best, fastest, before, tried, refused)

    def _time(self, config: Config, run: Callable[[Config], Any], expected: Any) -> float | None:
        """None where it does not run, or not rightly."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            result = run(config)
        except (OutOfResources, PTXASError, CompilationError, RuntimeError):  # the compiler's passes raise the last
            return None
        return self.clock(lambda: run(config)) if same(result, expected) else None


def neighbours(config: Config) -> Iterator[Config]:
    """Tiles of which one parameter is half or twice as large; of stages one less or more.

    >>> list(neighbours({"BLOCK_M": 1, "num_stages": 2}))
    [{'BLOCK_M': 2, 'num_stages': 2}, {'BLOCK_M': 1, 'num_stages': 1}, {'BLOCK_M': 1, 'num_stages': 3}]
    """
    least = 16 if "BLOCK_N" in config else 1  # tensor cores take 16 rows
    for name, value in config.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if LEAST.get(name, least) <= step <= MOST.get(name, 256):
                yield {**config, name: step}


def same(result: Any, expected: Any) -> bool:
    """Whether results are equal: integers but for a step, floats but for their rounding."""
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True)
    return all(_close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return bool(((a.int() - b.int()).abs() <= 1).all())
    nan = b.isnan()
    difference, size = ((x.float().masked_fill(nan, 0.0)) for x in (a - b, b))
    rows_agree = difference.norm(dim=-1) <= 1e-2 * size.norm(dim=-1)
    return bool(torch.equal(a.isnan(), nan) and rows_agree.all())


def save(tuned: list[Tuned], path: Path, gpu: str) -> None:
    """Adds rows to a file; a problem's new row takes its old one's place.

    Raises:
        ZQError: the file holds something else.
    """
    rows = json.loads(path.read_text()) if configs.read_rows(path) else []
    rows += [{**asdict(t), "gpu": gpu} for t in tuned]
    latest = {tuple(row[name] for name in KEY): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")  # who reads at this moment finds the old file or the new one
    partial.write_text(json.dumps(list(latest.values()), indent=1) + "\n")
    os.replace(partial, path)
    configs.timed.cache_clear()
