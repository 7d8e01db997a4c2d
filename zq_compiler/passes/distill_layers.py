"""Layer-by-layer knowledge distillation (LKD; ZeroQuant, 2206.01861, section 4.3).

    min |L_k(h) - Lq_k(h)|^2,   h = L_(k-1)(... L_1(x)) of the float model

Each transformer layer is fed what the float model feeds it, and its quantized weights are trained until it gives what
the float model's gives. Neither a second copy of the model nor labels are needed. Rounding has the derivative of what
it rounds (the straight-through estimator); scales are constants; what is trained is each element's place on its grid,
in steps of the grid.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..capture import layer_of
from ..errors import CalibrationError
from ..kernels import (
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
)
from ..methods import LKD
from ..numerics import rotate
from ..pipeline import Contract, Pass, refining
from ..program import Program, Stage, fake_value, from_weight, is_known
from ..replay import (
    Replay,
    Values,
    batches_of,
    constant_nodes,
    constant_values,
    evaluate,
    not_finite,
    straight_through,
)
from ..weights import Grid, QuantizedWeight, quantized_weights

aten = torch.ops.aten
OBJECTIVE = "mean squared error of the transformer layer's output on the float model's input, relative to the output"
_QUANTIZES = (
    *(quantize_per_token, quantize_per_token_fp8, quantize_per_token_int4),
    *(quantize_static, quantize_static_fp8),
)
Chosen = list[tuple[Tensor, Tensor]] | None  # codes and scales, as they are stored, of each weight of a layer


class DistillLayers(Pass):
    """See the module's docstring. Returns the number of weights whose codes it chose.

    Raises:
        CalibrationError: there are no batches, they do not fit the model or lead to NaN or Inf, or random tokens are
            asked for where the model takes none.
        WeightError: a weight holds NaN or Inf.
    """

    name = "lkd"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = list(quantized_weights(program, lambda plan: "lkd" in plan.methods))
        if not weights:
            return 0
        settings, batches = program.recipe.lkd, batches_of(program, "LKD")
        layers = list(transformer_layers(program, weights))
        names = {layer.name: layer.weights[0].constant(program) for layer in layers}
        keys = {layer.name: ("lkd", program.recipe, weakref.ref(batches), layer.key(program)) for layer in layers}
        known = all(is_known(program, names[layer.name], keys[layer.name]) for layer in layers)
        change = _random_tokens(program, settings.seed) if settings.data == "random" else None
        teacher = None if known else Replay(program, batches, as_float=True, change=change)
        changes = 0
        with refining(program, "LKD", OBJECTIVE, len(layers)) as finished:
            for layer in layers:

                def compute(layer: TransformerLayer = layer) -> tuple[Chosen, float, float]:
                    assert teacher is not None
                    return _distill(program, layer, teacher, settings)

                chosen, before, after = from_weight(program, names[layer.name], keys[layer.name], compute)
                for weight, parts in zip(layer.weights, chosen or (), strict=chosen is not None):
                    weight.choose(program, *parts)
                    changes += 1
                finished(layer.name, before, after)
        return changes


@dataclass(frozen=True)
class TransformerLayer:
    """A stretch of the graph, and the quantized weights that only it reads.

    Args:
        name: dotted name of the module.
        start, end: its first node, and the first one behind it.
    """

    name: str
    weights: tuple[QuantizedWeight, ...]
    start: fx.Node
    end: fx.Node

    def key(self, program: Program) -> tuple[Any, ...]:
        """What its weights' codes follow from, hashable."""
        return tuple(weight.key(program) for weight in self.weights)

    def nodes(self) -> list[fx.Node]:
        """In order."""
        nodes, node = [], self.start
        while node is not self.end:
            nodes.append(node)
            node = node.next
        return nodes


def transformer_layers(program: Program, weights: Sequence[QuantizedWeight]) -> list[TransformerLayer]:
    """The modules that weights belong to, by the first number in their names: `encoder.layer.3`.

    Modules whose stretches of the graph overlap are one.
    """
    groups: list[tuple[str, list[QuantizedWeight]]] = []
    for weight in weights:
        found = re.match(r"((.*?\.)?\d+)\.", weight.name)
        name = found[1] if found else weight.name
        if groups and (groups[-1][0] == name or weight.linears[0] < max(w.linears[-1] for w in groups[-1][1])):
            groups[-1][1].append(weight)
        else:
            groups.append((name, [weight]))
    constant = constant_nodes(program.graph)
    layers: list[TransformerLayer] = []
    position = next(iter(program.graph.nodes))
    for index, (name, members) in enumerate(groups):
        first, last = min(w.linears[0] for w in members), max(w.linears[-1] for w in members)
        start, end = position, last.next
        while start is not first and (start in constant or start.op != "call_function" or not _within(start, name)):
            start = start.next
        following = min((w.linears[0] for _, later in groups[index + 1 :] for w in later), default=None)
        while end.op != "output" and end is not following and (_within(end, name) or not layer_of(end)):
            end = end.next
        layers.append(TransformerLayer(name, tuple(members), start, end))
        position = end
    return layers


def _within(node: fx.Node, name: str) -> bool:
    layer = layer_of(node)
    return layer == name or layer.startswith(f"{name}.")


def _distill(program: Program, layer: TransformerLayer, teacher: Replay, settings: LKD) -> tuple[Chosen, float, float]:
    """Codes and scales of the layer's weights, or None where training did not help; the error before and after."""
    teacher.advance(layer.start)
    student = _Student(program, layer)
    for index in range(len(teacher)):
        outputs = student.wanted(teacher.values(index))
        if not all(value.isfinite().all() for value in outputs.values()):
            raise not_finite(layer.name, index)
        teacher.keep(index, outputs)
    generator = torch.Generator().manual_seed(settings.seed)
    before = _error(student, teacher)
    optimizer = torch.optim.AdamW(student.moves, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    order: list[int] = []
    for _ in range(settings.steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            weights = student.weights()
            # One way back for a step, whose batches' gradients are added up in float32.
            cut = {node: value.detach().float().requires_grad_() for node, value in weights.items()}
            for _ in range(settings.batch):
                order = order or torch.randperm(len(teacher), generator=generator).tolist()
                given_weights = {node: leaf.to(weights[node].dtype) for node, leaf in cut.items()}
                wanted, given = student(teacher.values(order.pop()), given_weights)
                squares = torch.stack([(w - g).square().sum() for w, g in zip(wanted, given, strict=True)]).sum()
                (squares / sum(float(w.square().sum()) for w in wanted) / settings.batch).backward()
        reached = {weights[n]: leaf.grad.to(weights[n].dtype) for n, leaf in cut.items() if leaf.grad is not None}
        torch.autograd.backward(list(reached), list(reached.values()))
        optimizer.step()
        decay.step()
    after = _error(student, teacher)
    return (student.chosen(), before, after) if after < before else (None, before, before)


def _error(student: _Student, teacher: Replay) -> float:
    """Of all batches, squared and relative."""
    errors, sizes = 0.0, 0.0
    with torch.no_grad():
        weights = student.weights()
        for index in range(len(teacher)):
            wanted, given = student(teacher.values(index), weights)
            errors += sum(float((w - g).square().sum()) for w, g in zip(wanted, given, strict=True))
            sizes += sum(float(w.square().sum()) for w in wanted)
    return errors / (sizes or 1.0)


class _Student:
    """A layer whose weights move on their grids.

    Attributes:
        moves: of each weight, how far its elements are from where they began, in steps of the grid as it is there, `[N,
            K]`: what is trained.
    """

    def __init__(self, program: Program, layer: TransformerLayer) -> None:
        self.layer = layer
        trained = _dependents(layer.nodes(), [linear for weight in layer.weights for linear in weight.linears])
        constant = constant_nodes(program.graph) - trained  # what follows from a trained weight and a constant is none
        self.calls = [node for node in layer.nodes() if node.op == "call_function" and node not in constant]
        inside = set(self.calls)
        left = [_float_value(node) for node in self.calls if any(user not in inside for user in node.users)]
        self.outputs = [node for node in dict.fromkeys(left) if node in trained and _is_float(node)]
        self.constants = constant_values(program, self.calls, constant)
        self.floats = constant_values(program, self.calls, constant, as_float=True)
        self.grids: list[Grid] = []
        self.scales: list[Tensor] = []
        self.begins: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.moves: list[Tensor] = []
        for weight in layer.weights:
            w, (grid, codes), (_, stored) = weight.floats(program), weight.grid(program), weight.stored(program)
            same = grid.codes(w) == codes  # another method's choice is where training starts
            begin = grid.places(torch.where(same, w, grid.values(codes)))
            self.grids.append(grid)
            self.scales.append(stored)
            self.begins.append(begin)
            self.steps.append(grid.format.spacing(begin))
            self.moves.append(torch.zeros_like(begin).requires_grad_())

    def wanted(self, values: Values) -> Values:
        """Outputs of the float layer."""
        floats: Any = ChainMap(dict(values), self.floats)
        with torch.no_grad():
            for node in self.calls:
                floats[node] = evaluate(node, floats.__getitem__, as_float=True)
        return {node: floats[node] for node in self.outputs}

    def __call__(self, values: Values, weights: Values) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the float layer, which are among the values, and of the quantized one."""
        mine: Any = ChainMap(dict(values), weights, self.constants)
        for node in self.calls:
            mine[node] = straight_through(node, mine.__getitem__)
        return [values[node] for node in self.outputs], [mine[node] for node in self.outputs]

    def weights(self) -> Values:
        """Of each weight, what it dequantizes to, rounded."""
        values: Values = {}
        for weight, grid, place in zip(self.layer.weights, self.grids, self._places(), strict=True):
            rounded = grid.format.decode(grid.format.encode(place.detach()))
            value = grid.at(place + (rounded - place).detach())
            dtype = fake_value(weight.dequantize).dtype
            values[weight.dequantize] = (rotate(value) if grid.rotated else value).to(dtype)
        return values

    def chosen(self) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of each weight, as they are stored."""
        parts = zip(self.layer.weights, self.grids, self._places(), strict=True)
        codes = [weight.pack(grid.format.encode(place.detach())) for weight, grid, place in parts]
        return list(zip(codes, self.scales, strict=True))

    def _places(self) -> list[Tensor]:
        """Of each weight, where its elements lie among its format's values."""
        parts = zip(self.begins, self.moves, self.steps, strict=True)
        return [begin + move * step for begin, move, step in parts]


def _dependents(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> set[fx.Node]:
    """The sources, and nodes that follow from them."""
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_float(node: fx.Node) -> bool:
    value = fake_value(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _float_value(node: fx.Node) -> fx.Node:
    """What a quantize's results stand for, which is compared in their place."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source.args[0] if source.target in _QUANTIZES else node  # type: ignore[return-value]


def _random_tokens(program: Program, seed: int) -> Any:
    """A function that puts random tokens in place of those that the model looks up."""
    vocabularies = {}
    placeholders = program.graph.find_nodes(op="placeholder")
    for index, node in enumerate(placeholders):
        sizes = [fake_value(u.args[0]).shape[0] for u in node.users if u.target is aten.embedding.default]
        if sizes:
            vocabularies[index] = int(min(sizes))
    if not vocabularies:
        fix = "set data='calibration'"
        raise CalibrationError("LKD(data='random') needs a model that looks up tokens", fix=fix)
    generator = torch.Generator().manual_seed(seed)

    def change(flat: Sequence[Any]) -> Sequence[Any]:
        return [
            torch.randint(vocabularies[i], x.shape, generator=generator, dtype=x.dtype).to(x.device)
            if i in vocabularies
            else x
            for i, x in enumerate(flat)
        ]

    return change
