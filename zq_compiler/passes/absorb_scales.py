"""Feature-wise scales leave the activations: `dq(q, f) W` is `q (diag(f) W)`, and the product is what is quantized.

A scale that varies along the contraction cannot leave an integer sum, so it goes into the weight while that is float
(ZeroQuant-HERO, `W~ = diag(f_in) W`).
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..kernels import dequantize, quantize_per_channel
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value
from ..rewrite import ROOT, Builder, Match, NoMatch, Op, RewriteRule, apply_rules

aten = torch.ops.aten
_PAIR = Op(quantize_per_channel, "weight", False)


class AbsorbInputScale(RewriteRule):
    """`linear(dq(x_q, f), dq(q(W)))` with a feature-wise constant f."""

    pattern = Op(
        aten.linear.default,
        Op(dequantize, "x_q", "scale", "dtype", False),
        Op(dequantize, Op(operator.getitem, _PAIR, 0), Op(operator.getitem, _PAIR, 1), "w_dtype", False),
        "bias",
    )

    def check(self, found: Match) -> None:
        scale = found["scale"]
        if scale.op != "get_attr":
            raise NoMatch("its scales are taken at run time")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        features = fake_value(found["weight"]).shape[1]
        row = build.call(aten.expand.default, build.call(aten.reshape.default, found["scale"], [-1]), [features])
        pair = build.call(quantize_per_channel, build.call(aten.mul.Tensor, found["weight"], row), False)
        weight = build.call(dequantize, build.item(pair, 0), build.item(pair, 1), found["w_dtype"], False)
        steps = build.call(aten.to.dtype, found["x_q"], found["dtype"])
        linear = build.call(aten.linear.default, steps, weight, found["bias"])
        linear.meta["layer"] = found[ROOT].meta["layer"]  # insert_qdq made this pair for a planned layer
        return linear


class AbsorbScales(Pass):
    """See the module's docstring."""

    name = "absorb_scales"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.LOSSY

    def __call__(self, program: Program) -> int:
        return apply_rules(program, [AbsorbInputScale()])
