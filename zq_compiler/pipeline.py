"""The driver: runs passes in order, and does for all of them what no pass does itself: verify, time, check, dump."""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch

from .errors import VerificationError
from .mutation import state_kept
from .numerics import sqnr
from .program import PassRecord, Program, Refinement, Stage, describe, fake_value
from .progress import progress
from .torch_private import OpOverload
from .traffic import count_traffic, model_dtype
from .verify import verify


class Contract(Enum):
    """What a pass promises about the program's outputs; the driver holds it to that."""

    EXACT = "bit-identical outputs"
    CLOSE = "the same mathematics, rounded elsewhere"
    IMPROVING = "closer to the float model, layer by layer: a layer whose own objective would rise is left as it was"
    LOSSY = "quantization happens here: the SQNR is recorded"


# dB below which a CLOSE pass has broken something. A last-place difference ahead of a quantize flips single integers,
# each worth one step of 1/127, so the floor lies well under float precision.
CLOSE_FLOOR_DB = {torch.float32: 40.0, torch.float16: 30.0, torch.bfloat16: 24.0}


class Pass(ABC):
    """One transformation of a Program, in place.

    A pass never prints, logs or verifies. It returns how many changes it made, and leaves dead nodes to the driver.
    """

    name: ClassVar[str]
    requires: ClassVar[Stage]
    produces: ClassVar[Stage]
    contract: ClassVar[Contract]

    @abstractmethod
    def __call__(self, program: Program) -> int:
        """Transform `program`; returns the number of changes."""


class PassPipeline:
    """An ordered list of passes whose stages fit together.

    Raises:
        ValueError: a pass requires a stage that the one before it does not produce.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        for before, after in pairwise(passes):
            if after.requires != before.produces:
                raise ValueError(
                    f"{after.name} requires {after.requires.name} but {before.name} produces {before.produces.name}"
                )
        self.passes = tuple(passes)

    def run(
        self,
        program: Program,
        *,
        since: str | None = None,
        until: str | None = None,
        check: bool = False,
        dump: str | PathLike[str] | None = None,
    ) -> Program:
        """Run the passes on `program`, in place.

        Args:
            since, until: names of passes: run from the first, and stop ahead of the second. A run `until` a pass and
                one `since` it are together one whole run, however much later the second is.
            check: run the graph on the example inputs before and after each pass and hold it to its contract.
            dump: directory that receives the readable graph before the first and after each pass.

        Raises:
            VerificationError: a pass left an illegal graph, or broke its contract.
            ValueError: there is no pass of this name.
        """
        first = 0 if since is None else self._index(since)
        last = len(self.passes) if until is None else self._index(until)
        outputs = _outputs(program) if check else None
        if since is None:
            _dump(program, dump, 0, "captured")
        for index, step in enumerate(self.passes[first:last], start=first + 1):
            if program.stage != step.requires:
                what = f"requires stage {step.requires.name}, got {program.stage.name}"
                raise VerificationError(what, where=step.name)
            if step.contract is Contract.LOSSY and program.float_dtype is None:  # what follows is no longer the model
                program.float_dtype = model_dtype(program)
                program.float_traffic = count_traffic(program)
            started = time.perf_counter()
            changes = step(program)
            program.graph.eliminate_dead_code()
            program.gm.recompile()
            program.stage = step.produces
            record = PassRecord(step.name, changes, time.perf_counter() - started)
            program.history.append(record)
            _dump(program, dump, index, step.name)
            verify(program, step.name)
            if outputs is not None:
                before, outputs = outputs, _outputs(program)
                record.sqnr = _hold_to_contract(step, before, outputs)
        return program

    def _index(self, name: str) -> int:
        names = [step.name for step in self.passes]
        if name not in names:
            raise ValueError(f"there is no pass {name!r}, only {', '.join(names)}")
        return names.index(name)


@contextlib.contextmanager
def refining(
    program: Program, method: str, objective: str, total: int
) -> Iterator[Callable[[str, float, float], None]]:
    """What a pass that improves weights one after another runs in: progress, times, and what Ctrl-C leaves.

    Yields what is called for each layer when it is finished, with its dotted name and the objective before and after.
    A KeyboardInterrupt ends the pass: finished layers stay as they are, and the report names those that were not
    reached by saying how many there are. A second one ends the program.

    Args:
        method, objective: as `Refinement` has them.
        total: layers.
    """
    done, started = 0, time.perf_counter()
    with progress(total, method) as advance:

        def finished(layer: str, before: float, after: float) -> None:
            nonlocal done, started
            done, now = done + 1, time.perf_counter()
            program.refinements.append(Refinement(layer, method, objective, before, after, now - started))
            started = now
            advance(f"{layer}: {before:.3g} -> {after:.3g}")

        try:
            yield finished
        except KeyboardInterrupt:
            program.notes.append(
                f"{method} was interrupted: {total - done} of {total} layers are as they were before it"
            )


def _outputs(program: Program) -> list[torch.Tensor]:
    if program.example_inputs is None:
        raise VerificationError("check=True needs example inputs", fix="give real tensors, or leave check off")
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in program.example_inputs]
    with torch.no_grad(), state_kept(program):
        # A result may share memory with a constant that is put back, or with another result: hence the copies.
        outputs = [y.clone() for y in program.gm(*inputs) if isinstance(y, torch.Tensor)]
    return outputs


def _hold_to_contract(step: Pass, before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    if len(before) != len(after):
        raise VerificationError(f"{len(before)} outputs became {len(after)}", where=step.name)
    for index, (b, a) in enumerate(zip(before, after, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise VerificationError(
                f"output {index} was {b.dtype} {tuple(b.shape)}, is {a.dtype} {tuple(a.shape)}", where=step.name
            )
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.is_floating_point() and b.numel()]
    worst = min((_sqnr_where_finite(b, a) for b, a in pairs), default=math.inf)
    floor = min((CLOSE_FLOOR_DB.get(b.dtype, 0.0) for b, _ in pairs), default=0.0)
    exact = all(((b == a) | ((b != b) & (a != a))).all() for b, a in zip(before, after, strict=True))
    if step.contract is Contract.EXACT and not exact:
        raise VerificationError(f"must not change the outputs; the SQNR is {worst:.1f} dB", where=step.name)
    if step.contract is Contract.CLOSE and worst < floor:
        raise VerificationError(f"SQNR {worst:.1f} dB is below its floor of {floor:.0f} dB", where=step.name)
    return worst


def _sqnr_where_finite(before: torch.Tensor, after: torch.Tensor) -> float:
    """The SQNR of the finite elements (masks leave infinities in outputs); none are allowed to come or go."""
    finite = before.isfinite()
    return sqnr(before[finite], after[finite]) if torch.equal(finite, after.isfinite()) else -math.inf


def _dump(program: Program, directory: str | PathLike[str] | None, index: int, name: str) -> None:
    if directory is None:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:02d}_{name}.txt").write_text(readable(program))


def readable(program: Program) -> str:
    """The graph as text: one line a node, with dtype and shape, operations by their short names."""
    lines = [f"# stage {program.stage.name}, recipe {program.recipe.name}, {len(program.graph.nodes)} nodes"]
    for node in program.graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        call = f"{_short(node.target)}{_call(node)}" if node.op == "call_function" else f"{node.op} {node.target}"
        lines.append(f"{node.name}: {describe(fake_value(node))} = {call}")
    return "\n".join(lines) + "\n"


def _short(target: Any) -> str:
    return str(target).removesuffix(".default") if isinstance(target, OpOverload) else target.__name__


def _call(node: torch.fx.Node) -> str:
    parts = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
    return f"({', '.join(parts)})"
