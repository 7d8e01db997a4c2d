"""Attention between quantizes becomes one integer op: Q K^T and P V in INT8, the softmax in float (ZeroQuant-HERO)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from ..kernels import dequantize, int8_attention, quantize_static, quantized_softmax_attention
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value, get_constant
from ..rewrite import ROOT, Builder, Match, NoMatch, Op, RewriteRule, apply_rules

_ATTENTION = Op(
    quantized_softmax_attention,
    Op(dequantize, "query", "query_scale", "dtype", False),
    Op(dequantize, "key", "key_scale", "dtype", False),
    Op(dequantize, "value", "value_scale", "dtype", False),
    "mask",
    "is_causal",
    "scale",
    "probability_scale",
    "signed",
)


class AttentionToInt8(RewriteRule):
    """Attention that writes floats: the scales of its operands and probabilities are one factor a feature."""

    pattern = _ATTENTION

    def __init__(self, program: Program) -> None:
        self.program = program

    def check(self, found: Match) -> None:
        if any(found[part].op != "get_attr" for part in ("query_scale", "key_scale", "value_scale")):
            raise NoMatch("its scales are taken at run time")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return self.fused(found, build, None, found["dtype"])

    def fused(self, found: Match, build: Builder, step: Tensor | None, dtype: torch.dtype) -> fx.Node:
        query_scale, key_scale, value_scale = (self.value(found[f"{part}_scale"]) for part in ("query", "key", "value"))
        softmax_scale = found["scale"] or 1 / math.sqrt(fake_value(found["query"]).shape[-1])
        out_scale = value_scale
        if found["probability_scale"] is not None:
            out_scale = out_scale * self.value(found["probability_scale"])
        if step is not None:
            out_scale = out_scale / step
        layer = found[ROOT].meta.get("layer") or found[ROOT].args[0].meta["layer"]
        attention = build.call(
            int8_attention,
            *(found[part] for part in ("query", "key", "value")),
            build.constant(f"{layer}.score_scale", query_scale * key_scale * softmax_scale),
            found["mask"],
            found["is_causal"],
            found["probability_scale"],
            build.constant(f"{layer}.out_scale", out_scale),
            dtype,
            *([True] if found["signed"] else []),
        )
        attention.meta["layer"] = layer
        return attention

    def value(self, constant: fx.Node) -> Tensor:
        return get_constant(self.program.gm, str(constant.target))


class AttentionToInt8Quantize(AttentionToInt8):
    """Attention that writes integers, feature-wise or with one scale."""

    pattern = Op(quantize_static, _ATTENTION, "step")

    def check(self, found: Match) -> None:
        super().check(found)
        if len(found[ROOT].args[0].users) > 1:
            raise NoMatch("its float output has other readers, so fusing would compute it twice")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return self.fused(found, build, self.value(found["step"]), torch.int8)


class FuseAttention(Pass):
    """See the module's docstring."""

    name = "fuse_attention"
    requires = Stage.FUSED
    produces = Stage.FUSED
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        changes = apply_rules(program, [AttentionToInt8Quantize(program)])
        return changes + apply_rules(program, [AttentionToInt8(program)])
