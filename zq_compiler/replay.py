"""Calibration batches on their way through a graph, a few nodes at a time.

Methods that choose a weight by what its layer reads need the inputs of one layer after another, the later ones computed
with what was chosen for the earlier. All batches stand at one node; of each only what a later node reads is kept, in
memory or, beyond a limit, in files. However deep the model is, that is one layer's activations.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .batches import Batches
from .calibration import run_batches
from .calling import convention_of
from .errors import CalibrationError
from .kernels import (
    chosen_weight,
    dequantize_weight,
    low_rank_linear,
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    quantize_weight,
    quantized_softmax_attention,
    reference_of,
)
from .mutation import Mutations
from .numerics import rotate
from .program import Program, get_constant
from .statistics import Statistics
from .weights import QuantizedWeight

HELD_LIMIT = 2 * 2**30  # bytes of activations in memory; more go to files
Values = dict[fx.Node, Any]
aten = torch.ops.aten


class Replay:
    """All batches at one node of a graph, moving on.

    Args:
        program: at stage FLOAT or QDQ. What a caller changes in it ahead of the position counts.
        batches: calibration data.
        as_float: compute as if nothing were rounded: the float model, through the same nodes.
        change: what is made of the flat inputs of each batch.
        limit: bytes of activations held in memory.

    Attributes:
        position: the node that is computed next.

    Raises:
        CalibrationError: no batch, one that does not fit the model, or a graph that changes its own state, which
            cannot be computed piece by piece.
    """

    def __init__(
        self,
        program: Program,
        batches: Batches,
        *,
        as_float: bool = False,
        change: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
        limit: float = HELD_LIMIT,
    ) -> None:
        mutations = Mutations(program.graph)
        if writer := next((w for n in program.graph.find_nodes(op="get_attr") if (w := mutations.of(n))), None):
            what = "the graph changes its own state here, so calibration data cannot go through it layer by layer"
            raise CalibrationError(what, where=writer.name, fix="use a recipe whose methods need no data")
        self.program, self.as_float = program, as_float
        self.position: fx.Node = next(iter(program.graph.nodes))
        self._in_place = mutations.any  # values that share memory must go on sharing it
        self._held = _Held(math.inf if self._in_place else limit)
        placeholders = program.graph.find_nodes(op="placeholder")

        def take(*flat: Any) -> Sequence[Any] | None:
            self._held.append(dict(zip(placeholders, change(flat) if change is not None else flat, strict=True)))
            return program.gm(*flat) if batches.has_own_loop else None  # only such a loop may look at outputs

        run_batches(program, convention_of(program), batches, take, "reading")

    def __len__(self) -> int:
        return len(self._held)

    def advance(self, stop: fx.Node) -> None:
        """Compute everything in front of `stop`, which is not behind the position, for all batches.

        Raises:
            CalibrationError: the graph cannot compute a batch.
        """
        assert self.position <= stop, f"{stop.name} has been computed"
        constant = constant_nodes(self.program.graph)
        while self.position is not stop:
            nodes = self._next(stop)
            self.position = nodes[-1].next
            constants = constant_values(self.program, nodes, constant, self.as_float)
            calls = [node for node in nodes if node.op == "call_function" and node not in constant]
            for index in range(len(self._held)):
                values = self._held[index]
                self._run(calls, values, constants, index)
                live = {n: v for n, v in values.items() if any(user >= self.position for user in n.users)}
                self._held[index] = live

    def inputs(self, node: fx.Node) -> Iterator[Tensor]:
        """A value that the position or a later node reads, batch by batch; a constant is that of each."""
        known: Values = {}
        for index in range(len(self._held)):
            held = self._held[index]
            yield held[node] if node in held else constant_value(self.program, node, self.as_float, known)

    def values(self, index: int) -> Values:
        """All that is held of one batch: what has been computed, is no constant, and is still read."""
        held = self._held[index]
        return dict(zip(held, copy.deepcopy(list(held.values())), strict=True)) if self._in_place else held

    def keep(self, index: int, values: Values) -> None:
        """Hold more of one batch: what the caller computed ahead of the position."""
        self._held[index] = {**self._held[index], **values}

    def _next(self, stop: fx.Node) -> list[fx.Node]:
        """Nodes up to the next product, so that one weight at a time is in floats."""
        nodes, node = [], self.position
        while node is not stop:
            nodes.append(node)
            if node.target is aten.linear.default:
                break
            node = node.next
        return nodes

    def _run(self, nodes: Sequence[fx.Node], values: Values, constants: Values, index: int) -> None:
        with torch.no_grad():
            for node in nodes:
                try:
                    known = ChainMap(values, constants)
                    values[node] = evaluate(node, known.__getitem__, self.as_float)
                except (RuntimeError, IndexError) as error:
                    reason = str(error).strip().partition("\n")[0]
                    what = f"batch {index} cannot be computed: {reason}"
                    fix = "give batches that the model itself runs"
                    raise CalibrationError(what, where=node.name, fix=fix) from error


def batches_of(program: Program, method: str) -> Batches:
    """The calibration data that a method reads.

    Raises:
        CalibrationError: there is none, or it is statistics only.
    """
    data = program.calibration
    if data is None or isinstance(data, Statistics):
        what = "no calibration data was given" if data is None else "statistics of activations are not enough"
        raise CalibrationError(f"{method} reads the inputs of layers, and {what}", fix="give calibration=batches")
    if not isinstance(data, Batches):
        data = program.calibration = Batches(data)
    return data


def sums_over_inputs(
    replay: Replay, weights: Sequence[QuantizedWeight], measure: Callable[[Tensor], Tensor]
) -> Iterator[tuple[QuantizedWeight, Tensor]]:
    """Each weight with the sum of `measure(x)` over all `x [..., K]` that its linears read.

    Weights come in the order of their last linears, which are computed after the caller had its turn: with what it
    chose.

    Raises:
        CalibrationError: a batch gives a layer NaN or Inf.
    """
    owner = {linear: weight for weight in weights for linear in weight.linears}
    sums: dict[fx.Node, Tensor] = {}  # by the last linear that reads a weight
    read, measured = None, torch.empty(0)
    for linear in sorted(owner):
        weight, x = owner[linear], linear.args[0]
        assert isinstance(x, fx.Node)
        replay.advance(linear)
        if x is not read:  # Q, K and V read the same
            parts = (_finite(measure(values), weight, index) for index, values in enumerate(replay.inputs(x)))
            read, measured = x, functools.reduce(operator.add, parts)
        last = weight.linears[-1]
        sums[last] = measured if last not in sums else sums[last] + measured
        if linear is last:
            yield weight, sums.pop(last)


def _finite(measured: Tensor, weight: QuantizedWeight, batch: int) -> Tensor:
    if not measured.isfinite().all():
        raise not_finite(weight.name, batch)
    return measured


def not_finite(layer: str, batch: int) -> CalibrationError:
    """What is raised where a batch gives a layer NaN or Inf."""
    fix = "leave that batch out, or run the model in a wider dtype"
    return CalibrationError(f"batch {batch} of the calibration data leads to NaN or Inf here", where=layer, fix=fix)


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Constants, and calls that read nothing else."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def constant_values(
    program: Program, nodes: Sequence[fx.Node], constant: set[fx.Node], as_float: bool = False
) -> Values:
    """Values of the constants that the other nodes read."""
    read = {x: None for node in nodes if node not in constant for x in node.all_input_nodes if x in constant}
    known: Values = {}
    return {node: constant_value(program, node, as_float, known) for node in read}


def constant_value(program: Program, node: fx.Node, as_float: bool = False, known: Values | None = None) -> Any:
    """Value of a node that reads nothing but constants; `known` holds what has been computed."""
    values: Values = {} if known is None else known

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            is_stored = node.op == "get_attr"
            values[node] = (
                get_constant(program.gm, str(node.target)) if is_stored else evaluate(node, value_of, as_float)
            )
        return values[node]

    with torch.no_grad():
        return value_of(node)


def evaluate(node: fx.Node, value_of: Callable[[fx.Node], Any], as_float: bool = False) -> Any:
    """A call's result; with `as_float`, of the model before it was quantized."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    target = AS_FLOAT.get(node.target, node.target) if as_float else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def _unrounded(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    return rotate(x) if rotated else x.float(), torch.ones((), device=x.device)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, *_: Any
) -> Tensor:
    """Of floats."""
    grouped = query.shape[1] != key.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


# Each quantize without its rounding, so that what dequantizes behind it gives back what went in.
AS_FLOAT: dict[Any, Callable[..., Any]] = {
    quantize_per_token: _unrounded,
    quantize_per_channel: _unrounded,
    quantize_per_token_fp8: _unrounded,
    quantize_per_token_int4: _unrounded,
    quantize_static: lambda x, scale: x.float() / scale,
    quantize_static_fp8: lambda x, scale: x.float() / scale,
    quantize_weight: lambda w, *_: (w, None),
    chosen_weight: lambda w, q, scale, packed, rotated: (w, None) if packed else _unrounded(w, rotated),
    dequantize_weight: lambda w, scale, format, group, features, dtype, rotated=False: w.to(dtype),
    quantized_softmax_attention: _attention,
    low_rank_linear: lambda y, *_: y,  # it makes up for an error that is not there
}


_TOKEN_WISE = (quantize_per_token, quantize_per_token_int4)


def straight_through(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """`evaluate`, differentiable: a rounding has the derivative of what it rounds (the straight-through estimator).

    Weights are the caller's: their quantize and dequantize are not evaluated here.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    reference = reference_of(node.target)
    if reference is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.target not in AS_FLOAT:
        return reference(*args, **kwargs)
    if node.target in _TOKEN_WISE and args[1:] == (True,):
        x: Any = args[0]
        args = (rotate(x), False)  # once, and not for each of the two
    with torch.no_grad():
        rounded = reference(*args, **kwargs)
    smooth = AS_FLOAT[node.target](*args, **kwargs)
    if not isinstance(rounded, tuple):
        return smooth + (rounded.to(smooth.dtype) - smooth).detach()
    q, scale = rounded
    steps = smooth[0] / scale
    return steps + (q.to(steps.dtype) - steps).detach(), scale


class _Held:
    """Values of each batch: in memory up to a limit, the rest in files of a temporary folder."""

    def __init__(self, limit: float) -> None:
        self._limit, self._sizes = limit, list[int]()
        self._nodes: list[tuple[fx.Node, ...]] = []
        self._memory: list[list[Any] | None] = []  # None where a file holds them
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._memory)

    def append(self, values: Values) -> None:
        self._sizes.append(0)
        self._nodes.append(())
        self._memory.append(None)
        self[len(self) - 1] = values

    def __getitem__(self, index: int) -> Values:
        held = self._memory[index]
        if held is None:
            held = torch.load(self._file(index), weights_only=True)
        return dict(zip(self._nodes[index], held, strict=True))

    def __setitem__(self, index: int, values: Values) -> None:
        held = list(values.values())
        size = sum(value.nbytes for value in held if isinstance(value, Tensor))
        fits = sum(self._sizes) - self._sizes[index] + size <= self._limit
        self._nodes[index], self._sizes[index] = tuple(values), size if fits else 0
        self._memory[index] = held if fits else None
        if not fits:
            torch.save([v.clone() if isinstance(v, Tensor) else v for v in held], self._file(index))

    def _file(self, index: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="zq_replay_")
        return Path(self._folder.name) / f"{index}.pt"
