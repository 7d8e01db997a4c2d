"""GeMM of ZeroQuant: a linear between dequantizes becomes one integer op; a table lookup likewise."""

from __future__ import annotations

import torch
from torch import fx

from ..formats import NIBBLES, WITHIN_E4M3
from ..kernels import (
    dequantize,
    dequantize_weight,
    fp8_linear,
    int8_embedding,
    int8_linear,
    int8_linear_quantize,
    quantize_static,
    w4a8_linear,
    weight_only_linear,
)
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value, get_constant, scale_name
from ..rewrite import (
    ROOT,
    Builder,
    Match,
    NoMatch,
    Op,
    RewriteRule,
    apply_rules,
    arguments,
    constant_of,
    evaluate_constant,
    match,
)

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


_PACKED_WEIGHT = (dequantize_weight, "w_packed", "w_scale", "format", "group", "features", "w_dtype")


class LinearToPacked(RewriteRule):
    """`linear(dq(x), dq(w), b)` of a packed weight is `w4a8_linear` of integers, `fp8_linear` of E4M3 activations."""

    pattern = Op(
        aten.linear.default,
        Op(dequantize, "x_q", "x_scale", "dtype", "rotated"),
        Op(*_PACKED_WEIGHT, "rotated"),
        "bias",
    )

    def check(self, found: Match) -> None:
        x = fake_value(found["x_q"]).dtype
        if found["format"] not in (WITHIN_E4M3 if x is torch.float8_e4m3fn else NIBBLES):
            raise NoMatch(f"no product of {str(x).removeprefix('torch.')} and {found['format']}")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        op = fp8_linear if fake_value(found["x_q"]).dtype is torch.float8_e4m3fn else w4a8_linear
        operands = [found[key] for key in ("x_q", "x_scale", "w_packed", "w_scale", "bias", "format", "group")]
        return build.call(op, *operands, found["dtype"])


class LinearToWeightOnly(RewriteRule):
    """`linear(x, dq(w), b)` is `weight_only_linear`: the weight stays packed."""

    pattern = Op(aten.linear.default, "x", Op(*_PACKED_WEIGHT), "bias")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        operands = [found[key] for key in ("x", "w_packed", "w_scale", "bias", "format", "group")]
        return build.call(weight_only_linear, *operands)


class StepsToInt8(RewriteRule):
    """`linear(float(x_q), dq(w), b)`, whose input scale went into the weight."""

    pattern = Op(
        aten.linear.default,
        Op(aten.to.dtype, "x_q", "dtype"),
        Op(dequantize, "w_q", "w_scale", "w_dtype", False),
        "bias",
    )

    def check(self, found: Match) -> None:
        if fake_value(found["x_q"]).dtype is not torch.int8:
            raise NoMatch("its input was no integer")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        operands = [found[key] for key in ("w_q", "w_scale", "bias")]
        return build.call(int8_linear, found["x_q"], None, *operands, found["dtype"])


class QuantizeOutput(RewriteRule):
    """`quantize_static(int8_linear(...), f)`: the output's scale is divided out of the weight's and the bias."""

    pattern = Op(quantize_static, Op(int8_linear, "x_q", "x_scale", "w_q", "w_scale", "bias", "dtype"), "out_scale")

    def __init__(self, program: Program) -> None:
        self.program = program

    def check(self, found: Match) -> None:
        if len(found[ROOT].args[0].users) > 1:
            raise NoMatch("its float output has other readers, so fusing would compute it twice")
        if found["bias"] is not None and constant_of(self.program.gm, found["bias"]) is None:
            raise NoMatch("its bias is computed at run time")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        gm = self.program.gm
        step = get_constant(gm, found["out_scale"].target).reshape(-1)
        w_scale = get_constant(gm, found["w_scale"].target)
        name = str(found["out_scale"].target)
        folded = build.constant(scale_name(name, "weight"), w_scale / step[:, None])
        bias = found["bias"]
        if bias is not None:
            bias = build.constant(scale_name(name, "bias"), evaluate_constant(gm, bias).float() / step)
        return build.call(int8_linear_quantize, found["x_q"], found["x_scale"], found["w_q"], folded, bias)


class FuseLinear(Pass):
    """See the module's docstring."""

    name = "fuse_linear"
    requires = Stage.QDQ
    produces = Stage.FUSED
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        changes = apply_rules(program, [LinearToInt8(), StepsToInt8(), LinearToPacked(), LinearToWeightOnly()])
        return changes + apply_rules(program, [QuantizeOutput(program)]) + _fuse_embeddings(program)


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
