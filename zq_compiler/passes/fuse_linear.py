"""GeMM of ZeroQuant: a linear between dequantizes becomes one integer op; a table lookup likewise."""

from __future__ import annotations

import torch
from torch import fx

from ..kernels import dequantize, int8_embedding, int8_linear
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value
from ..rewrite import Builder, Match, Op, RewriteRule, apply_rules, arguments, match

aten = torch.ops.aten


class LinearToInt8(RewriteRule):
    """`linear(dq(x), dq(w), b)` is `int8_linear`: the scales leave the sum, and so does a rotation of both."""

    pattern = Op(
        aten.linear.default,
        Op(dequantize, "x_q", "x_scale", "dtype", "rotated"),
        Op(dequantize, "w_q", "w_scale", "w_dtype", "rotated"),
        "bias",
    )

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        operands = [found[key] for key in ("x_q", "x_scale", "w_q", "w_scale", "bias")]
        return build.call(int8_linear, *operands, found["dtype"])


class FuseLinear(Pass):
    """See the module's docstring."""

    name = "fuse_linear"
    requires = Stage.QDQ
    produces = Stage.FUSED
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        return apply_rules(program, [LinearToInt8()]) + _fuse_embeddings(program)


def _fuse_embeddings(program: Program) -> int:
    """`embedding(dq(table), ids)`; padding_idx and the like matter to gradients only."""
    changes = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, ids = arguments(node)[:2]
        found = match(Op(dequantize, "q", "scale", "dtype", False), table)
        if found is not None:
            build = Builder(program, node)
            lookup = build.call(int8_embedding, ids, found["q"], found["scale"], fake_value(node).dtype)
            node.replace_all_uses_with(lookup)
            program.graph.erase_node(node)
            changes += 1
    return changes
