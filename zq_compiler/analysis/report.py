"""The report: one row a layer, read off the final graph rather than off what was intended."""

from __future__ import annotations

import io
import math
import operator
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import StrictError
from ..formats import FORMATS
from ..kernels import (
    embedding_layer_norm_quantize,
    fp8_linear,
    int8_attention,
    int8_embedding,
    int8_linear,
    int8_linear_gelu_quantize,
    int8_linear_quantize,
    reference_of,
    w4a8_linear,
    weight_only_linear,
)
from ..program import LayerPlan, OpTraffic, Program, Stage, constant_bytes, fake_value, get_constant, weight_name
from ..rewrite import layer_name
from ..traffic import count_traffic, model_dtype, node_traffic

if TYPE_CHECKING:
    from rich.console import Group

aten = torch.ops.aten
_PACKED: dict[Any, int] = {
    weight_only_linear: 4,
    w4a8_linear: 5,
    fp8_linear: 5,
}  # and which argument names the weight's format
_LINEARS = (int8_linear, int8_linear_quantize, int8_linear_gelu_quantize, *_PACKED)
_TABLES = (int8_embedding, embedding_layer_norm_quantize)
_WEIGHT_ARGUMENT = {**dict.fromkeys(_LINEARS, 2), weight_only_linear: 1, **dict.fromkeys(_TABLES, 1)}
_ATTENTION = (aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.baddbmm.default)


@dataclass
class LayerReport:
    """One layer: what was asked, what it got, and why not more.

    Args:
        asked: the recipe's schemes in words, a float dtype, or `float`.
        got: the format of its weight (of an attention, of its operands), `float`, or another float dtype than the
            model's; from the final graph.
        calls: how often the graph calls it (shared layers more than once).
        fused_into: the op that quantizes its input, in the same pass over memory.
        reason: why it stayed in float.
        bytes_before, bytes_after: of the weight, scales counted.
        moved_before, moved_after: bytes of activations that it reads and writes, on the example inputs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    asked: str
    got: str
    calls: int
    fused_into: str
    reason: str
    bytes_before: int
    bytes_after: int
    moved_before: int = 0
    moved_after: int = 0


@dataclass
class Moved:
    """Bytes of activations that operations read and write on the example inputs; `traffic.py` says how they count.

    Args:
        op_by_op: the float graph, each operation by itself.
        fused_alike: the quantized graph, were all its values floats of the model's dtype.
        now: the quantized graph.
    """

    op_by_op: int
    fused_alike: int
    now: int


@dataclass
class Report:
    """What became of a model.

    `bytes_before` and `bytes_after` count all constants of the graph, tied ones once. `refinements` has a row for each
    weight, or transformer layer, that a method tried to improve. `traffic_before` and `traffic`
    have a row for each operation of the float and of the quantized graph.
    """

    recipe: str
    layers: list[LayerReport]
    bytes_before: int
    bytes_after: int
    operators: dict[str, int]
    passes: list[dict[str, Any]]
    providers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    near_misses: list[dict[str, str]] = field(default_factory=list)
    refinements: list[dict[str, Any]] = field(default_factory=list)
    dtype: str = "float32"
    traffic_before: list[dict[str, Any]] = field(default_factory=list)
    traffic: list[dict[str, Any]] = field(default_factory=list)

    def moved(self, layer: str = "") -> Moved:
        """Bytes of activations that move in the modules whose dotted name starts with `layer`; all by default."""
        before, after = (
            [row for row in rows if row["layer"].startswith(layer)] for rows in (self.traffic_before, self.traffic)
        )
        return Moved(
            sum(row["read"] + row["written"] for row in before),
            sum(row["as_float"] for row in after),
            sum(row["read"] + row["written"] for row in after),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Layers by what they got, for example `{"int8": 36, "float": 4}`."""
        return dict(Counter(layer.got for layer in self.layers))

    def layer(self, name: str) -> LayerReport:
        """The row of a layer; KeyError when there is none."""
        for row in self.layers:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        from rich.console import Console  # imported late: it is slow to import, and most callers print nothing

        buffer = io.StringIO()
        Console(file=buffer, width=140, force_terminal=False).print(self.__rich__())
        return buffer.getvalue().rstrip()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        counts = ", ".join(f"{n} {got}" for got, n in sorted(self.counts.items(), reverse=True)) or "no layers"
        title = f"{self.recipe}: {counts}; weights {_megabytes(self.bytes_before)} -> {_megabytes(self.bytes_after)}"
        table = Table(title=Text(title), title_justify="left", expand=False)
        for column in ("layer", "kind", "shape", "got", "moves", "input quantized in", "why in float"):
            table.add_column(column, overflow="fold")
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            name = row.name if row.calls == 1 else f"{row.name} ({row.calls} calls)"
            moves = f"{_megabytes(row.moved_before)} -> {_megabytes(row.moved_after)}"
            cells = (name, row.kind, shape, row.got, moves, row.fused_into, row.reason)
            table.add_row(*map(Text, cells))  # as text: names and reasons may hold what rich takes for markup
        moved = self.moved()
        lines = [
            Text(
                f"activations read and written, in {self.dtype}: {_megabytes(moved.op_by_op)} op by op, "
                f"{_megabytes(moved.fused_alike)} fused alike; now {_megabytes(moved.now)}"
            )
        ]
        lines += [Text(line) for line in _summaries(self.refinements)]
        lines += [Text(f"note: {note}") for note in self.notes]
        for choice in self.providers:
            because = f" ({choice['reason']})" if choice["reason"] else ""
            lines.append(Text(f"{choice['count']:4} x {choice['op']}: {choice['provider']}{because}"))
        return Group(table, *lines)


def _summaries(refinements: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each method that improved weights: how many, and the objective's median before and after."""
    for method in dict.fromkeys(row["method"] for row in refinements):
        rows = [row for row in refinements if row["method"] == method]
        before, after = (statistics.median(row[key] for row in rows) for key in ("before", "after"))
        better, seconds = sum(row["after"] < row["before"] for row in rows), sum(row["seconds"] for row in rows)
        yield (
            f"{method}: {better} of {len(rows)} improved, median {before:.3g} -> {after:.3g} ({rows[0]['objective']}),"
            f" {seconds:.1f} s"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


def make_report(program: Program, providers: Sequence[Any] = ()) -> Report:
    """Read the report off a Program that has been through the pipeline, or is on its way."""
    uses = _integer_uses(program)
    layers = [_row(program, plan, _of_layer(plan, uses)) for plan in program.plan.values()]
    attention = sum(n.op == "call_function" and n.target in _ATTENTION for n in program.graph.nodes)
    notes = list(program.notes)
    if program.stage is not Stage.FUSED:
        pass  # what it will get is not known yet
    elif not any(row.got in FORMATS for row in layers):
        cast = sum(row.got != "float" for row in layers)
        runs = f"{cast} layers run in another float dtype" if cast else "the graph runs as torch.compile would run it"
        notes.append(f"nothing was quantized: {runs}")
    elif attention:
        what = "attentions or other products of two activations stay in float"
        notes.append(f"{attention} {what}: recipe {program.recipe.name} leaves them")
    return Report(
        recipe=program.recipe.name,
        layers=layers,
        bytes_before=program.float_bytes,
        bytes_after=constant_bytes(program.gm),
        operators=op_histogram(program),
        passes=[asdict(record) for record in program.history],
        providers=[asdict(choice) for choice in providers],
        notes=notes,
        near_misses=[asdict(miss) for miss in program.near_misses],
        refinements=[asdict(row) for row in program.refinements],
        dtype=str(model_dtype(program)).removeprefix("torch."),
        traffic_before=[asdict(row) for row in _float_traffic(program)],
        traffic=[asdict(row) for row in count_traffic(program)],
    )


def op_histogram(program: Program) -> dict[str, int]:
    """How often each op stands in the graph, dialect ops as `zq.<name>`."""
    names = (str(n.target).removesuffix(".default") for n in program.graph.nodes if n.op == "call_function")
    return dict(Counter(name for name in names if not name.startswith("<")))


def require_all(program: Program) -> None:
    """Raises StrictError when a layer that the recipe names was not quantized."""
    uses = _integer_uses(program)
    missed = [plan for plan in program.plan.values() if plan.requested and not _of_layer(plan, uses)]
    if missed:
        first = missed[0]
        what = f"{len(missed)} of the layers that recipe {program.recipe.name} names stayed in float"
        raise StrictError(
            f"{what}; here: {first.reason}",
            where=first.name,
            fix="add QRule.leave_float(...) for what may stay in float, or drop strict=True",
        )


def _integer_uses(program: Program) -> dict[str, list[fx.Node]]:
    """Weight constant (of an attention, which has none, its name) -> the integer ops that read it."""
    uses: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        index = _WEIGHT_ARGUMENT.get(node.target) if node.op == "call_function" else None
        if index is not None:
            uses.setdefault(weight_name(str(node.args[index].target)), []).append(node)
        elif node.target is int8_attention:
            layer = str(node.args[3].target).removesuffix(".score_scale")
            uses.setdefault(layer, []).append(node)
    return uses


def _of_layer(plan: LayerPlan, uses: dict[str, list[fx.Node]]) -> list[fx.Node]:
    """The integer ops of a layer; a table that is tied to the output serves two layers."""
    wanted = {"embedding": _TABLES, "attention": (int8_attention,)}.get(plan.kind, _LINEARS)
    return [node for node in uses.get(plan.constant or plan.name, []) if node.target in wanted]


def _row(program: Program, plan: LayerPlan, uses: list[fx.Node]) -> LayerReport:
    quantized = bool(uses)
    after = plan.float_bytes
    if quantized and plan.kind != "attention":
        index = _WEIGHT_ARGUMENT[uses[0].target]
        operands = {str(a.target) for node in uses for a in node.args[index : index + 2]}  # type: ignore[union-attr]
        operands |= _low_rank_factors(program, operands)
        after = sum(t.numel() * t.element_size() for t in (get_constant(program.gm, name) for name in operands))
    cast = plan.dtype is not None and not quantized and plan.dtype in _dtypes_of(program, plan)
    if cast and plan.constant:
        after = plan.float_bytes * getattr(torch, plan.dtype or "").itemsize // _weight_width(plan)
    moved = sum(row.moved for row in _float_traffic(program) if row.layer == plan.name)
    still_moved = moved
    if quantized:
        still_moved = node_traffic(program, uses)
    elif cast:  # and with what its casts move
        still_moved = sum(row.moved for row in count_traffic(program) if row.layer == plan.name)
    return LayerReport(
        name=plan.name,
        kind=plan.kind,
        shape=plan.shape,
        asked=plan.describe_schemes(),
        got=_format(uses[0]) if quantized else plan.dtype if cast and plan.dtype else "float",
        calls=plan.calls,
        fused_into=_quantizer(uses[0]) if quantized and plan.input is not None and plan.kind != "attention" else "",
        reason="" if quantized else plan.reason,
        bytes_before=plan.float_bytes,
        bytes_after=after,
        moved_before=moved,
        moved_after=still_moved,
    )


_FACTORS = ("u", "v", "u_scale", "v_scale")


def _low_rank_factors(program: Program, operands: set[str]) -> set[str]:
    """Constants that compensate the error of these integers."""
    wanted = {f"{name.removesuffix('_q')}_lorc_{part}" for name in operands if name.endswith("_q") for part in _FACTORS}
    return wanted & {str(node.target) for node in program.graph.find_nodes(op="get_attr")}


def _format(node: fx.Node) -> str:
    """Of the weight that an op of a layer reads, or of an attention's operands."""
    argument = _PACKED.get(node.target)
    return "int8" if argument is None else str(node.args[argument])


def _float_traffic(program: Program) -> list[OpTraffic]:
    """Of the model as it was; of a graph that still is float, its own."""
    return program.float_traffic if program.float_dtype is not None else count_traffic(program)


def _dtypes_of(program: Program, plan: LayerPlan) -> set[str]:
    """Float dtypes that the calls of a layer compute in."""
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n.target is not aten.to.dtype]
    values = [fake_value(n) for n in calls if layer_name(program, n) == plan.name]
    return {str(v.dtype).removeprefix("torch.") for v in values if isinstance(v, torch.Tensor)}


def _weight_width(plan: LayerPlan) -> int:
    """Bytes of one element of the float weight."""
    return max(plan.float_bytes // max(math.prod(plan.shape), 1), 1)


def _quantizer(linear: fx.Node) -> str:
    """The op that made a linear's integers, behind the moves of whole rows."""
    node: Any = linear.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function" and reference_of(node.target) is None:
        if node.target is not operator.getitem and not str(node.target).startswith("aten."):
            break
        node = node.args[0]
    reference = reference_of(node.target) if isinstance(node, fx.Node) else None
    return reference.__name__ if reference else ""
