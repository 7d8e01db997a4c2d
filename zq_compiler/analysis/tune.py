"""Times tiles of a model's CUDA kernels and keeps the fastest (`zq tune`), for `kernels/cuda/configs.py` to read.

The lowered model runs once, op by op. A kernel that asks for tiles of a problem not yet timed is tried there, on its
own operands: from what it would run with, one parameter at a time is halved or doubled for as long as that is faster. A
candidate that does not fit the GPU, or whose result is another one, is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import ZQError
from ..kernels.cuda import configs, registration
from ..kernels.cuda.configs import Config, Problem
from ..torch_private import OpOverload, pytree

Clock = Callable[[Callable[[], Any]], float]
LEAST = {"SPLIT_K": 1, "GROUP_M": 1, "num_warps": 1, "num_stages": 1}  # of other parameters 16
MOST = {"num_warps": 16, "num_stages": 8, "SPLIT_K": 32, "GROUP_M": 32}  # of others 256
GAIN = 0.98  # of the time so far, which a candidate must stay below


@dataclass(frozen=True)
class Tuned:
    """One problem's tiles, as files have them.

    Args:
        m: its bucket.
        milliseconds, before: with these tiles and with those that it started from.
        tried, refused: candidates; of the latter, those that did not run or gave another result.
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str
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
        known: problems to leave alone, as (op, m's bucket, n, k, dtype).
    """

    def __init__(self, gm: fx.GraphModule, clock: Clock, known: set[tuple[Any, ...]] | None = None) -> None:
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
                key = problem.op, problem.bucket, problem.n, problem.k, problem.dtype
                if key not in self.known:
                    self.known.add(key)
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
        row = problem.op, problem.bucket, problem.n, problem.k, problem.dtype
        return Tuned(*row, best, fastest, before, tried, refused)

    def _time(self, config: Config, run: Callable[[Config], Any], expected: Any) -> float | None:
        """None where it does not run, or not rightly."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            result = run(config)
        except (OutOfResources, PTXASError, CompilationError):
            return None
        return self.clock(lambda: run(config)) if same(result, expected) else None


def neighbours(config: Config) -> Iterator[Config]:
    """Tiles of which one parameter is half or twice as large; of stages one less or more.

    >>> list(neighbours({"BLOCK_M": 16, "num_stages": 2}))
    [{'BLOCK_M': 32, 'num_stages': 2}, {'BLOCK_M': 16, 'num_stages': 1}, {'BLOCK_M': 16, 'num_stages': 3}]
    """
    for name, value in config.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if LEAST.get(name, 16) <= step <= MOST.get(name, 256):
                yield {**config, name: step}


def same(result: Any, expected: Any) -> bool:
    """Whether results are equal: integers but for a step, floats but for their rounding."""
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True)
    return all(
        torch.allclose(a.float(), b.float(), rtol=1e-2, atol=0 if a.is_floating_point() else 1, equal_nan=True)
        or (a.is_floating_point() and (a.float() - b.float()).norm() <= 1e-3 * b.float().norm())
        for a, b in pairs
    )


def save(tuned: list[Tuned], path: Path, gpu: str) -> None:
    """Adds rows to a file; a problem's new row takes its old one's place.

    Raises:
        ZQError: the file holds something else.
    """
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
        old = {(row["op"], row["m"], row["n"], row["k"], row["dtype"]): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ZQError(f"is no file of `zq tune`: {error}", where=str(path), fix="give another, or delete it") from error
    new = {(t.op, t.m, t.n, t.k, t.dtype): {**asdict(t), "gpu": gpu} for t in tuned}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list({**old, **new}.values()), indent=1) + "\n")
    configs.timed.cache_clear()
