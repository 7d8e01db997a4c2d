"""Make quantization explicit: a quantize and a dequantize on both operands of every planned layer.

One quantize per value: Q, K and V that read one tensor share it, unless it changes in place in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..kernels import dequantize, quantize_per_channel, quantize_per_token
from ..mutation import Mutations
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value
from ..rewrite import Builder

aten = torch.ops.aten
_OPERANDS = {aten.linear.default: (0, 1), aten.embedding.default: (None, 0)}  # (activation, weight) argument


class InsertQDQ(Pass):
    """See the module's docstring. Returns the number of quantized layers' calls."""

    name = "insert_qdq"
    requires = Stage.FLOAT
    produces = Stage.QDQ
    contract = Contract.LOSSY

    def __call__(self, program: Program) -> int:
        shared: dict[tuple[fx.Node, bool], fx.Node] = {}
        mutations = Mutations(program.graph)
        changes = 0
        for node in list(program.graph.nodes):
            plan = program.plan.get(node.meta.get("layer", ""))
            if plan is None or plan.weight is None or node.target not in _OPERANDS:
                continue
            activation, weight = _OPERANDS[node.target]
            rotated = plan.weight.rotated
            if activation is not None:
                value = node.args[activation]
                assert isinstance(value, fx.Node)
                stable = mutations.between(value, node, [value]) is None
                _replace(program, node, activation, quantize_per_token, rotated, shared if stable else None)
            _replace(program, node, weight, quantize_per_channel, rotated, shared)
            changes += 1
        return changes


def _replace(
    program: Program,
    node: fx.Node,
    index: int,
    quantize: Callable[..., Any],
    rotated: bool,
    shared: dict[tuple[fx.Node, bool], fx.Node] | None,
) -> None:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    known = shared.get((value, rotated)) if shared is not None else None
    if known is None:
        build = Builder(program, _first_after(value) if shared is not None else node)
        pair = build.call(quantize, value, rotated)
        known = build.call(dequantize, build.item(pair, 0), build.item(pair, 1), fake_value(value).dtype, rotated)
        if shared is not None:
            shared[value, rotated] = known
    node.update_arg(index, known)


def _first_after(value: fx.Node) -> fx.Node:
    """Where a shared quantize goes: right behind its value, before every user."""
    node = value.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node
