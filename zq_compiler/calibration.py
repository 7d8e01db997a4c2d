"""Calibration: batches go through a float graph, and an interpreter looks while it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .batches import Batches
from .calling import CallingConvention, GraphInputs
from .errors import CalibrationError, CaptureError, WeightError
from .mutation import Mutations, state_kept
from .program import Program, get_constant
from .progress import progress
from .statistics import Statistics, ValueStatistics

aten = torch.ops.aten


@dataclass(frozen=True)
class Watch:
    """A value whose statistics are wanted.

    Args:
        name: dotted name, the same in every capture of the model: `encoder.layer.0.output.dense:input`. Watches of one
            name (a layer that is called twice) share their statistics.
        node: its result is looked at.
        compute: given the node's own arguments before it runs, gives the tensor that is looked at instead.
        dim, feature_bins: as for `ValueStatistics`.
    """

    name: str
    node: fx.Node
    compute: Callable[..., Tensor] | None = None
    dim: int | None = -1
    feature_bins: int | None = None


class Collector:
    """A Program's graph that takes statistics while it runs. Nothing of a batch is kept but those.

    Args:
        program: runs as it is; its FLOAT stage is meant.
        watches: what to look at.
        key: of the statistics; computed from the Program where it is not known yet.
        batches: whether calls are batches of calibration data, whose number errors then give. Where they are the
            model's own, what it raises itself passes as it is.

    Attributes:
        statistics: of all calls so far.
    """

    def __init__(
        self, program: Program, watches: Iterable[Watch], key: str | None = None, *, batches: bool = True
    ) -> None:
        watches = tuple(watches)
        values: dict[str, ValueStatistics] = {}
        for watch in watches:
            value = ValueStatistics(watch.name, dim=watch.dim, feature_bins=watch.feature_bins)
            values.setdefault(watch.name, value).require_like(value)
        self.statistics = Statistics(values, structure_key(program) if key is None else key)
        self._interpreter = _Observer(program.gm, watches, self.statistics, batches)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the flat inputs of one call; returns the flat outputs.

        Raises:
            CalibrationError: a watched value holds NaN or Inf, or the graph cannot compute this batch.
        """
        with torch.no_grad():
            outputs = self._interpreter.run(*inputs)
        self.statistics.batches += 1
        return outputs


class _Observer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watches: Iterable[Watch], statistics: Statistics, batches: bool) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # messages are complete
        self.statistics, self.batches = statistics, batches
        self.watches: dict[fx.Node, list[Watch]] = {}
        for watch in watches:
            self.watches.setdefault(watch.node, []).append(watch)

    def run_node(self, n: fx.Node) -> Any:
        watches = self.watches.get(n, ())
        for watch in watches:
            if watch.compute is not None:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                self._observe(watch, watch.compute(*args, **kwargs))
        try:
            result = super().run_node(n)
        except (RuntimeError, IndexError) as error:
            if not self.batches:
                raise
            reason = str(error).strip().partition("\n")[0]
            what = f"batch {self.statistics.batches} cannot be computed: {reason}"
            raise CalibrationError(what, where=n.name, fix="give batches that the model itself runs") from error
        for watch in watches:
            if watch.compute is None:
                self._observe(watch, result)
        return result

    def _observe(self, watch: Watch, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise CalibrationError(f"is a {type(value).__name__}, and only tensors have statistics", where=watch.name)
        self.statistics[watch.name].observe(value, self.statistics.batches if self.batches else None)


def collect(
    program: Program,
    convention: CallingConvention | GraphInputs,
    batches: Any,
    watches: Iterable[Watch],
    key: str | None = None,
) -> Statistics:
    """Statistics of watched values over all batches, with a progress bar where stderr is a terminal.

    Args:
        program: at stage FLOAT. What its graph changes in place (a running state) is put back.
        convention: how the model was called.
        batches: `Batches`, or what they are made from.
        watches, key: as for `Collector`.

    Raises:
        CalibrationError: no batch, one that differs from the inputs the model was captured with, or one that leads to
            NaN or Inf; named by its number, the first being 0.
    """
    collector = Collector(program, watches, key)
    run_batches(program, convention, batches, collector)
    return collector.statistics


def run_batches(
    program: Program,
    convention: CallingConvention | GraphInputs,
    batches: Any,
    run: Callable[..., Sequence[Any] | None],
    doing: str = "calibrating",
) -> int:
    """Call `run` with the flat inputs of every batch; returns how many there were.

    Args:
        program: whose inputs these are. What its graph changes in place (a running state) is put back.
        convention: how the model was called.
        batches: `Batches`, or what they are made from.
        run: takes flat inputs and returns the Program's flat outputs, which a forward_loop may look at.
        doing: what the progress bar calls it.

    Raises:
        CalibrationError: no batch, or one that differs from the inputs the model was captured with.
    """
    batches = batches if isinstance(batches, Batches) else Batches(batches)
    mutations = Mutations(program.graph)
    written = [mutations.of(node) is not None for node in program.graph.find_nodes(op="placeholder")]
    number = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        flat = _flatten(convention, args, kwargs, number)
        inputs = [x.clone() if copy and isinstance(x, Tensor) else x for x, copy in zip(flat, written, strict=True)]
        outputs = run(*inputs)
        number += 1
        advance("")
        return convention.unflatten(outputs) if outputs is not None else None

    with state_kept(program), progress(batches.count, doing) as advance:
        return batches.feed(call)


def _flatten(
    convention: CallingConvention | GraphInputs, args: Any, kwargs: Mapping[str, Any], number: int
) -> list[Any]:
    if isinstance(convention, CallingConvention):
        _refuse_extra(convention, kwargs, number)
    try:
        return convention.flatten(args, kwargs)
    except CaptureError as error:
        what = f"batch {number}: {error.what}"
        raise CalibrationError(
            what, where=error.where, fix=error.fix or "give batches as the model is called"
        ) from error


def _refuse_extra(convention: CallingConvention, kwargs: Mapping[str, Any], number: int) -> None:
    positional, keyword = convention.in_spec.children()
    captured = [*convention.parameter_names[: positional.num_children], *(keyword.context or ())]
    if extra := [name for name, value in kwargs.items() if name not in captured and value is not None]:
        raise CalibrationError(
            f"batch {number} has {', '.join(extra)}, which the model was captured without",
            fix=f"leave it out: ({{k: batch[k] for k in {captured}}} for batch in batches)",
        )


# --- which graph statistics belong to ------------------------------------------------------------------------------

_READ_VECTORS = {
    *(aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default),
    *(aten.layer_norm.default, aten.rms_norm.default),
}


def structure_key(program: Program) -> str:
    """Hash of a float graph: its weights by name, shape, dtype and every byte, and which op's input comes from which.

    It is the same whether the graph came through `torch.export` or Dynamo. These agree on weights, but neither on
    buffers (Dynamo has them as inputs) nor on the ops that make masks and sizes. So it covers float constants of two or
    more dimensions, the vectors that linears, convolutions and norms read, and for each op that reads one of these the
    nearest such ops upstream. A tied weight, table and matrix, counts without its name, because it has two.

    Take it behind `canonicalize`, which makes RMSNorms out of products. It takes about a second per GB of weights whose
    digest `program.weight_cache` does not hold yet.

    Raises:
        WeightError: a weight was released, and its digest is not known.
    """
    origins: dict[fx.Node, str] = {}  # constants and views of them -> name
    reads: dict[fx.Node, list[str]] = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            origins[node] = node.target
        elif len(inputs) == 1 and inputs[0] in origins:
            origins[node] = origins[inputs[0]]
        else:
            names = [origins[x] for x in inputs if x in origins]
            reads[node] = [name for name in names if _is_weight(get_constant(program.gm, name), node)]
    tables = {name for node, names in reads.items() if node.target is aten.embedding.default for name in names}
    matrices = {name for node, names in reads.items() if node.target is not aten.embedding.default for name in names}
    weights = {name: _digest(program, name, named=name not in tables & matrices) for name in tables | matrices}
    upstream: dict[fx.Node, frozenset[str]] = {}
    readers: list[str] = []
    for node, names in reads.items():
        nearest = frozenset().union(*(upstream.get(x, ()) for x in node.all_input_nodes))
        if names:
            nearest = frozenset([_hash(json.dumps([[weights[name] for name in names], sorted(nearest)]).encode())])
            readers += nearest
        upstream[node] = nearest
    return _hash("".join(sorted(readers)).encode())


def _is_weight(constant: Any, reader: fx.Node) -> bool:
    if not isinstance(constant, Tensor) or not constant.is_floating_point():
        return False
    return constant.dim() >= 2 or (constant.dim() == 1 and reader.target in _READ_VECTORS)


def _digest(program: Program, name: str, named: bool) -> str:
    """Of a weight; kept with its integers, as the floats may be released before another graph is captured."""
    weight, of = get_constant(program.gm, name), name if named else ""
    known: MutableMapping[Any, Any] = program.weight_cache(name) if program.weight_cache else {}
    if ("digest", of) not in known:
        if weight.untyped_storage().size() == 0 and weight.numel() > 0:
            raise WeightError("the float weight was released", where=name, fix="load the model again")
        content = weight.detach().cpu().clone(memory_format=torch.contiguous_format)  # NumPy pins what it is shown
        described = f"{of} {weight.dtype} {list(weight.shape)}".encode()
        known["digest", of] = _hash(described, content.reshape(-1).view(torch.uint8).numpy().data)
    return known["digest", of]


def _hash(*parts: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
