"""Move each quantize up, next to the op that produces its value, so that the two can fuse.

A token-wise quantize works row by row, so it passes through everything that moves whole rows: reshapes that keep the
last dimension, transposes of the others. A static one works element by element and passes through every move, as long
as its scales can be laid out alike. What they leave behind are the same moves on a quarter of the bytes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from ..kernels import quantize_per_token, quantize_static
from ..mutation import Mutations
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value, get_constant, scale_name, size
from ..rewrite import Builder

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class MoveQuantize(Pass):
    """See the module's docstring."""

    name = "move_quantize"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.EXACT

    def __call__(self, program: Program) -> int:
        changes = 0
        mutations = Mutations(program.graph)
        while moved := _sweep(program, mutations) + _sweep_static(program, mutations):
            changes += moved
        return changes + _merge_equal(program, mutations)


def _sweep(program: Program, mutations: Mutations) -> int:
    moved = 0
    for node in program.graph.find_nodes(op="call_function", target=quantize_per_token):
        step = node.args[0]
        if not isinstance(step, fx.Node) or not _moves_whole_rows(step):
            continue
        if not mutations.between(step, node, step.all_input_nodes):
            _hoist(program, node, step)
            moved += 1
    return moved


def _moves_whole_rows(step: fx.Node) -> bool:
    if step.op != "call_function":
        return False
    if step.target in _RESHAPES:
        before, after = fake_value(step.args[0]).shape, fake_value(step).shape  # type: ignore[arg-type]
        known = [size(shape[-1]) for shape in (before, after) if len(shape)]
        return len(known) == 2 and known[0] == known[1] and isinstance(known[0], int)
    if step.target is aten.unsqueeze.default:
        return step.args[1] not in (-1, fake_value(step).ndim - 1)
    if step.target is aten.transpose.int:
        last = fake_value(step).ndim - 1
        return all(d % (last + 1) != last for d in step.args[1:])
    return False


def _hoist(program: Program, node: fx.Node, step: fx.Node) -> None:
    pair = Builder(program, node).call(quantize_per_token, step.args[0], *node.args[1:])
    build = Builder(program, node, of=step)
    moved = []
    for index in (0, 1):
        item = build.item(pair, index)
        if step.target in _RESHAPES:  # the scale's last dimension is 1
            shape: Sequence[object] = step.args[1]  # type: ignore[assignment]
            moved.append(build.call(aten.reshape.default, item, [*shape[:-1], 1] if index else list(shape)))
        else:
            moved.append(build.call(step.target, item, *step.args[1:]))  # type: ignore[arg-type]
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(moved[user.args[1]])  # type: ignore[index]
        program.graph.erase_node(user)
    program.graph.erase_node(node)


_MOVES = {
    *_RESHAPES,
    *(aten.transpose.int, aten.permute.default, aten.expand.default, aten.clone.default, aten.contiguous.default),
    *(aten.unsqueeze.default, aten.flatten.using_ints, aten.unflatten.int),
}


def _sweep_static(program: Program, mutations: Mutations) -> int:
    moved = 0
    for node in program.graph.find_nodes(op="call_function", target=quantize_static):
        step, scale = node.args
        if not (isinstance(step, fx.Node) and step.op == "call_function" and step.target in _MOVES):
            continue
        laid_out = _scale_before(program, step, scale)
        if laid_out is None or mutations.between(step, node, step.all_input_nodes):
            continue
        build = Builder(program, node)
        if laid_out.shape != fake_value(scale).shape:
            layout = "x".join(map(str, laid_out.shape))
            scale = build.constant(scale_name(str(scale.target), layout), laid_out)
        source = build.call(quantize_static, step.args[0], scale)
        node.replace_all_uses_with(Builder(program, node, of=step).call(step.target, source, *step.args[1:]))
        program.graph.erase_node(node)
        moved += 1
    return moved


def _scale_before(program: Program, step: fx.Node, scale: fx.Node) -> torch.Tensor | None:
    """The scales of `step`'s result laid out as its input is; None where they cannot be."""
    value = get_constant(program.gm, str(scale.target))
    before = fake_value(step.args[0]).shape  # type: ignore[arg-type]
    if value.numel() == 1:
        return value.reshape([1] * len(before))
    if step.target in (aten.clone.default, aten.contiguous.default):
        return value
    if step.target is aten.transpose.int:
        return _other_shape(value, value.transpose(*step.args[1:]))  # type: ignore[arg-type]
    if step.target is aten.permute.default:
        order: list[int] = step.args[1]  # type: ignore[assignment]
        inverse = sorted(range(len(order)), key=lambda i: order[i] % len(order))
        return _other_shape(value, value.permute(inverse))
    if step.target in (*_RESHAPES, aten.flatten.using_ints) and value.shape[-1] == value.numel():
        trailing: list[int] = []  # dimensions that hold one feature vector between them
        for dim in reversed(before):
            if math.prod(trailing) == value.numel() or not isinstance(size(dim), int):
                break
            trailing.insert(0, int(dim))
        if math.prod(trailing) == value.numel():
            return value.reshape([1] * (len(before) - len(trailing)) + trailing)
    return None


def _other_shape(value: torch.Tensor, moved: torch.Tensor) -> torch.Tensor | None:
    """The moved scales, unless they differ from the others in order only: constants are named by their shape."""
    return moved if moved.shape != value.shape or torch.equal(moved, value) else None


def _merge_equal(program: Program, mutations: Mutations) -> int:
    """One quantize per value: hoisting can bring two together."""
    seen: dict[object, fx.Node] = {}
    merged = 0
    quantizes = [n for n in program.graph.nodes if n.target in (quantize_per_token, quantize_static)]
    for node in quantizes:
        arguments = [a.target if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args]
        first = seen.setdefault((node.target, *arguments), node)
        if first is not node and not mutations.between(first, node, node.all_input_nodes):
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
            merged += 1
    return merged
