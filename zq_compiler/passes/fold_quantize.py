"""Weights become integers or packed codes: every quantize of a constant is computed now.

They are stored as `<weight>_q` and `<weight>_scale`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import WeightError
from ..kernels import chosen_weight, quantize_per_channel, quantize_weight, reference_of
from ..pipeline import Contract, Pass
from ..program import Program, Stage, from_weight, integer_name
from ..rewrite import Builder, constant_of, evaluate_constant, view_key


class FoldQuantize(Pass):
    """See the module's docstring.

    Raises:
        WeightError: a weight holds NaN or Inf, or was released before it could be quantized.
    """

    name = "fold_quantize"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.EXACT

    def __call__(self, program: Program) -> int:
        find = program.graph.find_nodes
        kinds = quantize_per_channel, quantize_weight, chosen_weight
        nodes = [n for op in kinds for n in find(op="call_function", target=op)]
        views: dict[str, list[Any]] = {}  # weight -> what is done to it before it is quantized, each one another array
        for node in nodes:
            _fold(program, node, views)
        return len(nodes)


def _fold(program: Program, node: fx.Node, views: dict[str, list[Any]]) -> None:
    weight, *how = node.args
    source = constant_of(program.gm, weight)
    assert isinstance(weight, fx.Node) and source is not None  # annotate planned constants only
    name = str(source.target)
    key, known = (view_key(program.gm, weight), str(node.target), *how), views.setdefault(name, [])
    if key not in known:
        known.append(key)
    if node.target is chosen_weight:
        values = tuple(evaluate_constant(program.gm, part) for part in how[:2])  # type: ignore[arg-type]
    else:
        values = _quantized(program, node, key, name)
    build = Builder(program, node)
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        constant = build.constant(integer_name(name, known.index(key), ("q", "scale")[index]), values[index])
        user.replace_all_uses_with(constant)
        program.graph.erase_node(user)
    program.graph.erase_node(node)


def _quantized(program: Program, node: fx.Node, key: Any, name: str) -> tuple[Tensor, Tensor]:
    """What a quantize makes of a weight."""

    def compute() -> tuple[Tensor, Tensor]:
        weight, *how = node.args
        value = evaluate_constant(program.gm, weight)  # type: ignore[arg-type]
        if not torch.isfinite(value).all():
            fix = "repair the checkpoint, or leave it in float"
            raise WeightError("the weight holds NaN or Inf", where=name, fix=fix)
        q, scale = reference_of(node.target)(value, *how)  # type: ignore[misc]
        if not torch.isfinite(scale).all():
            if scale.dtype is torch.float16:
                what = "a group's scale exceeds float16, in which scales of groups are stored"
                raise WeightError(what, where=name, fix="quantize it per channel, or leave it in float")
            raise WeightError("a scale exceeds float32", where=name, fix="leave it in float")
        return q.contiguous(), scale

    return from_weight(program, name, key, compute)
