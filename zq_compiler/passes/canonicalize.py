"""One spelling for each thing: what models write in many ways becomes the one form that later passes look for.

Linears are `aten.linear(x, weight [N, K], bias)`, RMSNorm is `aten.rms_norm`, GELU is `aten.gelu`; inactive dropout
and casts that change nothing are gone. Nothing else in the package knows another spelling.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..capture import is_op
from ..mutation import Mutations
from ..pipeline import Contract, Pass
from ..program import Program, Stage, fake_value, size
from ..rewrite import ROOT, AnyOf, Builder, Match, NoMatch, Op, RewriteRule, apply_rules, arguments, constant_of

aten = torch.ops.aten
INT64_MAX = 2**63 - 1


class Canonicalize(Pass):
    """See the module's docstring."""

    name = "canonicalize"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        changes = _drop_identities(program) + _free_layouts(program)
        rules = [rule(program) for rule in (AddmmToLinear, MatmulToLinear)]
        changes += apply_rules(program, rules)
        changes += apply_rules(program, [AddBiasToLinear(program)])
        return changes + apply_rules(program, [RmsNormWithCast(), RmsNorm(), TanhGelu(), FastTanhGelu(), ErfGelu()])


def _drop_identities(program: Program) -> int:
    changes = 0
    for node in list(program.graph.nodes):
        if node.op == "call_function" and _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
            changes += 1
    return changes


def _free_layouts(program: Program) -> int:
    """`view` of a result becomes `reshape`: an op that takes the place of others may lay its result out differently."""
    mutations = Mutations(program.graph)
    views = program.graph.find_nodes(op="call_function", target=aten.view.default)
    computed = [node for node in views if node.args[0].op == "call_function"]
    computed = [node for node in computed if mutations.of(node) is None]  # what is written through must stay a view
    for node in computed:
        node.target = aten.reshape.default
    return len(computed)


def _is_identity(node: fx.Node) -> bool:
    """An op whose result is its first argument, value and layout alike."""
    if node.target in (aten.dropout.default, aten.feature_dropout.default):
        return node.args[2] is False or node.args[1] in (0, 0.0)
    if node.target in (aten.alias.default, aten.detach.default):
        return True
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device):
        x, y = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
        options = [*node.args[2:], *node.kwargs.values()]
        copies = any(o is True or isinstance(o, torch.memory_format) for o in options)
        return not copies and (x.dtype, x.device) == (y.dtype, y.device)
    if node.target in (aten.view.default, aten.reshape.default):
        before, after = fake_value(node.args[0]), fake_value(node)  # type: ignore[arg-type]
        return list(map(size, before.shape)) == list(map(size, after.shape))
    if node.target is aten.slice.Tensor:
        _, _, start, end, step = arguments(node)
        return start in (0, None) and end in (INT64_MAX, None) and step == 1
    return False


class _ToLinear(RewriteRule):
    """Shared by the spellings of a matrix product with a constant `[K, N]` matrix."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def check(self, found: Match) -> None:
        weight = found["weight"]
        if not isinstance(weight, fx.Node) or not isinstance(fake_value(weight), torch.Tensor):
            raise NoMatch("the second operand is no tensor")
        if constant_of(self.program.gm, weight) is None:
            raise NoMatch("the second operand is computed at run time")
        if fake_value(weight).ndim != 2:
            raise NoMatch(f"the constant operand has {fake_value(weight).ndim} dimensions")
        bias = found.get("bias")
        if bias is not None and fake_value(bias).shape != fake_value(weight).shape[1:]:
            raise NoMatch("the added term is no bias vector")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        weight = found["weight"]
        transposed = weight.args[0] if weight.target is aten.t.default else build.call(aten.t.default, weight)
        return build.call(aten.linear.default, found["x"], transposed, found.get("bias"))


class AddmmToLinear(_ToLinear):
    """`addmm(bias, x, W)`, the form of GPT-2's Conv1D."""

    pattern = Op(aten.addmm.default, "bias", "x", "weight")


class MatmulToLinear(_ToLinear):
    """`x @ W`, also `mm(x, t(W))`."""

    pattern = Op((aten.mm.default, aten.matmul.default), "x", "weight")


class AddBiasToLinear(RewriteRule):
    """`linear(x, W) + b` with a constant vector b."""

    pattern = Op(aten.add.Tensor, Op(aten.linear.default, "x", "weight"), "bias", commutes=True)

    def __init__(self, program: Program) -> None:
        self.program = program

    def check(self, found: Match) -> None:
        bias, weight = found["bias"], fake_value(found["weight"])
        if constant_of(self.program.gm, bias) is None or constant_of(self.program.gm, found["weight"]) is None:
            raise NoMatch("not a constant bias on a constant weight")
        if fake_value(bias).shape != weight.shape[:1] or fake_value(bias).dtype != weight.dtype:
            raise NoMatch("the added constant is no bias vector of the layer")
        if any(len(n.users) > 1 for n in found[ROOT].all_input_nodes if is_op(n, aten.linear.default)):
            raise NoMatch("the sum without the bias has other readers, so fusing would compute it twice")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return build.call(aten.linear.default, found["x"], found["weight"], found["bias"])


def _rms(x: Any, squared: Any = None) -> Op:
    """`x * rsqrt(mean(x^2) + eps)`."""
    s = x if squared is None else squared
    square = AnyOf(Op(aten.pow.Tensor_Scalar, s, 2), Op(aten.mul.Tensor, s, s), Op(aten.square.default, s))
    mean = Op(aten.mean.dim, square, [-1], True)
    return Op(aten.mul.Tensor, x, Op(aten.rsqrt.default, Op(aten.add.Tensor, mean, "eps")), commutes=True)


class RmsNorm(RewriteRule):
    """RMSNorm written out, with its weight (`weight`, or Gemma's `1 + weight`)."""

    pattern = Op(aten.mul.Tensor, "weight", _rms("x"), commutes=True)

    def check(self, found: Match) -> None:
        weight, x = found["weight"], fake_value(found["x"])
        if not isinstance(found["eps"], float) or not isinstance(weight, fx.Node):
            raise NoMatch("eps or the weight is not what RMSNorm has")
        if tuple(fake_value(weight).shape) != tuple(x.shape[-1:]):
            raise NoMatch("the factor is no weight vector over the last dimension")
        if fake_value(weight).dtype != x.dtype:
            raise NoMatch(f"the weight is {fake_value(weight).dtype}, the input {x.dtype}")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        shape = list(fake_value(found["weight"]).shape)
        return build.call(aten.rms_norm.default, found["x"], shape, found["weight"], found["eps"])


_X32 = Op(aten.to.dtype, "x", torch.float32)


class RmsNormWithCast(RmsNorm):
    """The half-precision forms of Llama and T5: normalised in float32, cast back, then times the weight."""

    pattern = Op(
        aten.mul.Tensor, "weight", Op(aten.to.dtype, AnyOf(_rms(_X32), _rms("x", _X32)), "dtype"), commutes=True
    )

    def check(self, found: Match) -> None:
        super().check(found)
        if found["dtype"] != fake_value(found["x"]).dtype:
            raise NoMatch("the norm does not return to its input's dtype")


def _about(found: Match, name: str, value: float) -> None:
    if not isinstance(found[name], float) or not math.isclose(found[name], value, rel_tol=1e-5):
        raise NoMatch(f"{name} is {found[name]}, not {value}")


class TanhGelu(RewriteRule):
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, as GPT-2 writes it."""

    pattern = Op(
        aten.mul.Tensor,
        Op(aten.mul.Tensor, "x", 0.5),
        Op(
            aten.add.Tensor,
            Op(
                aten.tanh.default,
                Op(
                    aten.mul.Tensor,
                    Op(
                        aten.add.Tensor,
                        "x",
                        Op(aten.mul.Tensor, Op(aten.pow.Tensor_Scalar, "x", 3.0), "cubic"),
                        commutes=True,
                    ),
                    "slope",
                ),
            ),
            1.0,
        ),
        commutes=True,
    )

    def check(self, found: Match) -> None:
        _about(found, "cubic", 0.044715)
        _about(found, "slope", math.sqrt(2 / math.pi))

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        gelu = build.call(aten.gelu.default, found["x"])
        gelu.kwargs = {"approximate": "tanh"}
        return gelu


class FastTanhGelu(TanhGelu):
    """`0.5 x (1 + tanh(x sqrt(2/pi) (1 + 0.044715 x x)))`, the factored spelling."""

    pattern = Op(
        aten.mul.Tensor,
        Op(aten.mul.Tensor, "x", 0.5),
        Op(
            aten.add.Tensor,
            Op(
                aten.tanh.default,
                Op(
                    aten.mul.Tensor,
                    Op(aten.mul.Tensor, "x", "slope"),
                    Op(
                        aten.add.Tensor,
                        Op(aten.mul.Tensor, Op(aten.mul.Tensor, "x", "cubic"), "x"),
                        1.0,
                    ),
                    commutes=True,
                ),
            ),
            1.0,
        ),
        commutes=True,
    )


class ErfGelu(RewriteRule):
    """`0.5 x (1 + erf(x / sqrt(2)))`."""

    pattern = Op(
        aten.mul.Tensor,
        Op(aten.mul.Tensor, "x", 0.5),
        Op(aten.add.Tensor, Op(aten.erf.default, Op(aten.div.Tensor, "x", "root")), 1.0),
        commutes=True,
    )

    def check(self, found: Match) -> None:
        _about(found, "root", math.sqrt(2))

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return build.call(aten.gelu.default, found["x"])
