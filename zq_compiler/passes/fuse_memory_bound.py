"""Quantize joins the memory-bound op that produces its value: norm (with the residual add), GELU, SiLU-mul."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels import (
    add_layer_norm_quantize,
    add_rms_norm_quantize,
    dequantize,
    embedding_layer_norm_quantize,
    gelu_quantize,
    gelu_quantize_static,
    int8_add_layer_norm_quantize,
    int8_add_rms_norm_quantize,
    int8_embedding,
    int8_linear,
    int8_linear_gelu_quantize,
    layer_norm_quantize,
    quantize_per_token,
    quantize_static,
    rms_norm_quantize,
    silu_mul_quantize,
    silu_mul_quantize_static,
)
from ..mutation import Mutations
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value
from ..rewrite import ROOT, AnyOf, Builder, Match, NoMatch, Op, RewriteRule, apply_rules, match

aten = torch.ops.aten


class _FuseProducer(RewriteRule):
    """`quantize(producer(...))`: one op gives `q` and `scale`, and the producer's own results to its other users."""

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        fused = build.call(*self.fused_call(found))
        for original, index in self.other_results(found).items():
            _hand_over(original, build.item(fused, index))
        return fused  # q and scale are its items 0 and 1, as they are quantize's

    def fused_call(self, found: Match) -> tuple[Any, ...]:
        raise NotImplementedError

    def other_results(self, found: Match) -> dict[fx.Node, int]:
        """Nodes whose value the fused op gives too, and at which index."""
        return {}


def _hand_over(original: fx.Node, replacement: fx.Node) -> None:
    """Users behind the fused op read its result; those before it, if any, keep the original."""
    later = {n for n in original.users if replacement < n}
    original.replace_all_uses_with(replacement, delete_user_cb=lambda user: user in later)


class FuseNorm(_FuseProducer):
    """LayerNorm or RMSNorm, with the residual add before it when there is one."""

    def __init__(self, norm: Any, fused: tuple[Any, Any, Any], parameters: tuple[str, ...], mutations: Mutations):
        self.fused, self.fused_with_add, self.fused_with_integers = fused
        self.parameters, self.mutations = parameters, mutations
        # cudnn_enable, the last argument of layer_norm, has no meaning here
        extra = ("cudnn",) if "bias" in parameters else ()
        self.pattern = Op(quantize_per_token, Op(norm, "x", "shape", *parameters, *extra), "rotated")

    def check(self, found: Match) -> None:
        if len(found["shape"]) != 1:
            raise NoMatch(f"it normalises over {len(found['shape'])} dimensions")
        if writer := self.mutations.of(found[ROOT].args[0]):
            raise NoMatch(f"{writer.name} changes the norm's result in place")

    def fused_call(self, found: Match) -> tuple[Any, ...]:
        if found["eps"] is None:
            found["eps"] = torch.finfo(fake_value(found["x"]).dtype).eps
        parameters = [*(found[p] for p in self.parameters), found["rotated"]]
        add = self._residual_add(found)
        if add is None:
            return (self.fused, found["x"], *parameters)
        if integers := _integer_summands(add):
            return (self.fused_with_integers, *integers, *parameters, fake_value(found["x"]).dtype)
        return (self.fused_with_add, *add, *parameters)

    def other_results(self, found: Match) -> dict[fx.Node, int]:
        norm = found[ROOT].args[0]
        return {norm: 2} if self._residual_add(found) is None else {norm: 2, found["x"]: 3}

    def _residual_add(self, found: Match) -> list[fx.Node] | None:
        """The two summands, when the norm's input is a plain sum of two tensors of one shape and dtype."""
        x = found["x"]
        if x.target is not aten.add.Tensor or x.kwargs or len(x.args) != 2:
            return None
        if not all(isinstance(a, fx.Node) and isinstance(fake_value(a), torch.Tensor) for a in x.args):
            return None
        values = [fake_value(a) for a in x.args]
        alike = all(v.shape == fake_value(x).shape and v.dtype == fake_value(x).dtype for v in values)
        changed = self.mutations.of(x) or self.mutations.between(x, found[ROOT], x.args)
        return list(x.args) if alike and not changed else None


def _sum(a: Any, b: Any) -> Op:
    return Op(aten.add.Tensor, a, b, commutes=True)


_DEQUANTIZE = Op(dequantize, "q", "scale", "dtype", "rotated")


def _integer_summands(summands: list[fx.Node]) -> list[Any] | None:
    """`x, x_scale, residual, residual_scale, residual_rotated` of a sum of integers; None where both are floats.

    The sublayer's result has static scales, the residual token-wise ones; either may be floats.
    """
    static, token_wise, floats = [], [], []
    for summand in summands:
        integers = match(_DEQUANTIZE, summand)
        if integers is None:
            floats.append(summand)
        elif integers["scale"].op == "get_attr":
            static.append(integers)
        else:
            token_wise.append(integers)
    if len(floats) == 2 or max(len(static), len(token_wise)) == 2:
        return None
    x = [static[0]["q"], static[0]["scale"]] if static else [floats[0], None]
    if token_wise:
        residual = token_wise[0]
        return [*x, residual["q"], residual["scale"], residual["rotated"]]
    return [*x, floats[-1], None, False]


class FuseEmbedding(_FuseProducer):
    """The first norm of an encoder, over the sum of token, position and type embeddings."""

    pattern = Op(
        quantize_per_token,
        Op(
            aten.layer_norm.default,
            AnyOf(
                _sum(_sum(Op(int8_embedding, "ids", "table", "scale", "dtype"), "first"), "second"),
                _sum(_sum("first", Op(int8_embedding, "ids", "table", "scale", "dtype")), "second"),
                _sum(Op(int8_embedding, "ids", "table", "scale", "dtype"), "first"),
            ),
            "shape",
            "weight",
            "bias",
            "eps",
            "cudnn",
        ),
        "rotated",
    )

    def check(self, found: Match) -> None:
        if len(found["shape"]) != 1:
            raise NoMatch(f"it normalises over {len(found['shape'])} dimensions")
        if fake_value(found[ROOT].args[0].args[0]).shape[-1] != fake_value(found["table"]).shape[-1]:
            raise NoMatch("the sum is wider than the table")
        total = found[ROOT].args[0].args[0]
        if any(len(n.users) > 1 for n in (total, *total.all_input_nodes) if n.target is aten.add.Tensor):
            raise NoMatch("the sum is a residual stream: it has other readers")

    def fused_call(self, found: Match) -> tuple[Any, ...]:
        return embedding_layer_norm_quantize, *(
            found[k] for k in ("ids", "table", "scale", "others", "weight", "bias", "eps", "rotated")
        )

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        others = found["first"]
        if "second" in found:
            others = build.call(aten.add.Tensor, others, found["second"])
        return super().rewrite({**found, "others": others}, build)

    def other_results(self, found: Match) -> dict[fx.Node, int]:
        return {found[ROOT].args[0]: 2}


class FuseGeluStatic(RewriteRule):
    """Both GELUs, feature-wise."""

    pattern = Op(quantize_static, Op(aten.gelu.default, "x", "approximate"), "scale")

    def check(self, found: Match) -> None:
        _only_quantized(found[ROOT].args[0], quantize_static)

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return build.call(gelu_quantize_static, found["x"], found["approximate"], found["scale"])


class FuseLinearGelu(RewriteRule):
    """FC1 with the GELU behind it: the widest value of a block is never written."""

    pattern = Op(
        quantize_static,
        Op(aten.gelu.default, Op(int8_linear, "x_q", "x_scale", "w_q", "w_scale", "bias", "dtype"), "approximate"),
        "out_scale",
    )

    def check(self, found: Match) -> None:
        gelu = found[ROOT].args[0]
        _only_quantized(gelu, quantize_static)
        if len(gelu.args[0].users) > 1:
            raise NoMatch("the linear's output has other readers, so fusing would compute it twice")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        names = ("x_q", "x_scale", "w_q", "w_scale", "bias", "dtype", "approximate", "out_scale")
        return build.call(int8_linear_gelu_quantize, *(found[name] for name in names))


class FuseGelu(_FuseProducer):
    """Both GELUs."""

    pattern = Op(quantize_per_token, Op(aten.gelu.default, "x", "approximate"), "rotated")

    def check(self, found: Match) -> None:
        _only_quantized(found[ROOT].args[0])

    def fused_call(self, found: Match) -> tuple[Any, ...]:
        return gelu_quantize, found["x"], found["approximate"], found["rotated"]


class FuseSiluMul(_FuseProducer):
    """The gate of SwiGLU."""

    pattern = Op(quantize_per_token, Op(aten.mul.Tensor, Op(aten.silu.default, "gate"), "up", commutes=True), "rotated")
    quantize = quantize_per_token

    def check(self, found: Match) -> None:
        gate, up = found["gate"], found["up"]
        if not isinstance(up, fx.Node) or fake_value(up).shape != fake_value(gate).shape:
            raise NoMatch("gate and up differ in shape")
        if fake_value(up).dtype != fake_value(gate).dtype:
            raise NoMatch("gate and up differ in dtype")
        _only_quantized(found[ROOT].args[0], self.quantize)

    def fused_call(self, found: Match) -> tuple[Any, ...]:
        return silu_mul_quantize, found["gate"], found["up"], found["rotated"]


class FuseSiluMulStatic(FuseSiluMul):
    """The gate of SwiGLU, feature-wise."""

    pattern = Op(quantize_static, Op(aten.mul.Tensor, Op(aten.silu.default, "gate"), "up", commutes=True), "scale")
    quantize = quantize_static

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return build.call(silu_mul_quantize_static, found["gate"], found["up"], found["scale"])


def _only_quantized(producer: fx.Node, quantize: Any = quantize_per_token) -> None:
    if any(user.target is not quantize for user in producer.users):
        raise NoMatch("its float output has other readers, so fusing would compute it twice")


class FuseMemoryBound(Pass):
    """See the module's docstring."""

    name = "fuse_memory_bound"
    requires = Stage.FUSED
    produces = Stage.FUSED
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        with_bias, without_bias = ("weight", "bias", "eps"), ("weight", "eps")
        mutations = Mutations(program.graph)
        layer_norms = layer_norm_quantize, add_layer_norm_quantize, int8_add_layer_norm_quantize
        rms_norms = rms_norm_quantize, add_rms_norm_quantize, int8_add_rms_norm_quantize
        rules = [
            FuseEmbedding(),
            FuseNorm(aten.layer_norm.default, layer_norms, with_bias, mutations),
            FuseNorm(aten.rms_norm.default, rms_norms, without_bias, mutations),
            FuseGelu(),
            FuseLinearGelu(),
            FuseGeluStatic(),
            FuseSiluMul(),
            FuseSiluMulStatic(),
        ]
        return apply_rules(program, rules)
