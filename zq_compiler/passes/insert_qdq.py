"""Make quantization explicit: a quantize and a dequantize on every operand and result that the plan names.

One quantize per value: Q, K and V that read one tensor share it, unless it changes in place in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..errors import CalibrationError
from ..formats import format_of
from ..kernels import (
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    quantize_weight,
    quantized_softmax_attention,
)
from ..mutation import Mutations
from ..numerics import INT8_MAX
from ..pipeline import Contract, Pass
from ..program import LayerPlan, Program, Stage, fake_value, scale_name, size
from ..rewrite import Builder, arguments
from ..roles import ATTENTION
from ..schemes import Granularity, QScheme

aten = torch.ops.aten
_OPERANDS = {aten.linear.default: (0, 1), aten.embedding.default: (None, 0)}  # (activation, weight) argument
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class InsertQDQ(Pass):
    """See the module's docstring. Returns the number of quantized layers' calls.

    Raises:
        CalibrationError: the plan needs a static scale, and there are no statistics to choose it from.
    """

    name = "insert_qdq"
    requires = Stage.FLOAT
    produces = Stage.QDQ
    contract = Contract.LOSSY

    def __call__(self, program: Program) -> int:
        insertion = _Insertion(program)
        changes = 0
        for node in list(program.graph.nodes):
            plan = program.plan.get(node.meta.get("layer", ""))
            if plan is None or not plan.quantized:
                continue
            if node.target is ATTENTION:
                insertion.attention(node, plan)
                changes += 1
            elif node.target in _OPERANDS:
                insertion.layer(node, plan)
                changes += 1
        if program.recipe.residual == "int8":
            insertion.residuals()
        return changes


class _Insertion:
    """One run of the pass: the quantized values so far, and what changes in place."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mutations = Mutations(program.graph)
        self.shared: dict[tuple[fx.Node, str, tuple[Any, ...]], fx.Node] = {}  # value, quantize op, how -> dequantize
        self.ndims: dict[str, int] = {}  # of a scale's first constant
        self.steps: dict[tuple[str, QScheme, bool], Tensor] = {}

    def layer(self, node: fx.Node, plan: LayerPlan) -> None:
        assert plan.weight is not None
        activation, weight = _OPERANDS[node.target]  # type: ignore[index]
        if activation is not None and plan.input is not None:
            node.update_arg(activation, self.activation(node, node.args[activation], plan.input, f"{plan.name}:input"))
        node.update_arg(weight, self.weight(node.args[weight], plan))
        if plan.output is not None:
            self.output(node, plan.output, f"{plan.name}:output")

    def attention(self, node: fx.Node, plan: LayerPlan) -> None:
        assert plan.input is not None
        query, key, value, mask, _, is_causal, scale, *_ = arguments(node)
        parts = {"query": query, "key": key, "value": value}
        operands = [self.activation(node, x, plan.input, f"{plan.name}:{part}") for part, x in parts.items()]
        build = Builder(self.program, node)
        probability_scale, signed = None, self.program.recipe.softmax == "static_signed"
        if self.program.recipe.softmax != "token":
            scheme = QScheme(granularity=Granularity.PER_TENSOR)
            probability_scale = self.scale(build, scheme, f"{plan.name}:probabilities", query, unsigned=not signed)
        softmax = (probability_scale, signed) if signed else (probability_scale,)
        quantized = build.call(quantized_softmax_attention, *operands, mask, is_causal, scale, *softmax)
        quantized.meta["layer"] = plan.name
        node.replace_all_uses_with(quantized)
        self.program.graph.erase_node(node)

    def residuals(self) -> None:
        """The next sublayer's result is added to the integers of a norm's, so that its floats need not be kept."""
        token_wise = [(key[0], known) for key, known in self.shared.items() if key[1] == str(quantize_per_token)]
        for value, known in token_wise:
            if value.target in _NORMS and not self._left_in_float(value):
                added = [user for user in value.users if user.target is aten.add.Tensor]
                for user in added:
                    if known < user and self.mutations.between(value, user, [value]) is None:
                        user.replace_input_with(value, known)

    def activation(self, node: fx.Node, value: Any, scheme: QScheme, name: str) -> fx.Node:
        """The dequantize that takes the place of `value`, as `node` reads it."""
        assert isinstance(value, fx.Node)
        stable = self.mutations.between(value, node, [value]) is None
        if not scheme.calibrated:
            alone = node if not stable else None
            if scheme.format == "fp8_e4m3":
                return self._shared(value, quantize_per_token_fp8, (), alone)
            if scheme.format == "int4":
                return self._shared(value, quantize_per_token_int4, (scheme.rotated,), alone)
            return self._shared(value, quantize_per_token, (scheme.rotated,), alone)
        # Layers that read one value share its quantize, unless statistics of another call make their scales differ.
        key = value, scheme.describe(), tuple(self.step(scheme, name).tolist())
        if key not in self.shared or not stable:
            build = Builder(self.program, _first_after(value) if stable else node)
            self.shared[key] = self._static_pair(build, value, scheme, name)
        return self.shared[key]

    def weight(self, value: Any, plan: LayerPlan) -> fx.Node:
        scheme = plan.weight
        assert isinstance(value, fx.Node) and scheme is not None
        if scheme.format == "int8" and (plan.input is not None or plan.kind == "embedding"):
            return self._shared(value, quantize_per_channel, (scheme.rotated,), None)
        how: tuple[Any, ...] = (scheme.format, scheme.shared_by)
        if scheme.rotated or scheme.scale_constraint != "none":
            how = (*how, scheme.rotated, scheme.scale_constraint, scheme.scale_rounding)
        return self._shared(value, quantize_weight, how, None)

    def output(self, node: fx.Node, scheme: QScheme, name: str) -> None:
        while len(node.users) == 1 and next(iter(node.users)).target in _RESHAPES:  # next to who reads the floats
            if size(fake_value(next(iter(node.users))).shape[-1]) != size(fake_value(node).shape[-1]):
                break
            node = next(iter(node.users))
        users = list(node.users)
        known = self._static_pair(Builder(self.program, node.next), node, scheme, name)
        for user in users:
            user.replace_input_with(node, known)

    def scale(self, build: Builder, scheme: QScheme, name: str, like: fx.Node, unsigned: bool = False) -> fx.Node:
        """A calibrated scale as a constant on the device of the value `like`, with as many dimensions: `[1, ..., 1]`,
        or `[1, ..., K]` where it differs between features."""
        scale = self.step(scheme, name, unsigned)
        ndim = fake_value(like).ndim
        shape = [1] * (ndim - 1) + [scale.numel()]
        target = f"{name.replace(':', '.')}_scale"
        if self.ndims.setdefault(target, ndim) != ndim:  # another call of the layer, on rows in another shape
            target = scale_name(target, "x".join(map(str, shape)))
        return build.constant(target, scale.reshape(shape).to(fake_value(like).device))

    def step(self, scheme: QScheme, name: str, unsigned: bool = False) -> Tensor:
        """The scale that calibration data gives a value: `[1]`, or one for each feature."""
        key = name, scheme, unsigned
        if key not in self.steps:
            self.steps[key] = self._step(*key)
        return self.steps[key]

    def _step(self, name: str, scheme: QScheme, unsigned: bool) -> Tensor:
        statistics = self.program.stats
        if statistics is None or name not in statistics:
            raise CalibrationError(
                f"recipe {self.program.recipe.name} needs the range of this value, and no calibration data gave it",
                where=name,
                fix="give calibration=batches to quantize(), or use a recipe without static scales (hero-m1, w8a8)",
            )
        recipe = self.program.recipe
        scale: Tensor = statistics[name].scale(recipe.range_method, scheme.granularity, unsigned=unsigned)
        if scheme.format == "fp8_e4m3":
            scale = scale * (INT8_MAX / format_of(scheme.format).range[1])  # the same range on another grid
        return scale

    def _shared(self, value: fx.Node, quantize: Any, how: tuple[Any, ...], alone: fx.Node | None) -> fx.Node:
        key = value, str(quantize), how
        known = self.shared.get(key) if alone is None else None
        if known is None:
            build, dtype = (
                Builder(self.program, _first_after(value) if alone is None else alone),
                fake_value(value).dtype,
            )
            pair = build.call(quantize, value, *how)
            operands = build.item(pair, 0), build.item(pair, 1)
            if quantize is quantize_weight:
                format, group, *rotated = how[:3]
                features = fake_value(value).shape[1]
                known = build.call(dequantize_weight, *operands, format, max(group, 0), features, dtype, *rotated)
            else:
                known = build.call(dequantize, *operands, dtype, *(how or (False,)))
            if alone is None:
                self.shared[key] = known
        return known

    def _static_pair(self, build: Builder, value: fx.Node, scheme: QScheme, name: str) -> fx.Node:
        scale = self.scale(build, scheme, name, value)
        quantize = quantize_static if scheme.format == "int8" else quantize_static_fp8
        return build.call(dequantize, build.call(quantize, value, scale), scale, fake_value(value).dtype, False)

    def _left_in_float(self, norm: fx.Node) -> bool:
        """Whether a rule names this norm."""
        names = [str(n.target).removesuffix(".weight") for n in norm.all_input_nodes if n.op == "get_attr"]
        rules = [self.program.recipe.rule_for(name) for name in names]
        return any(rule is not None and rule.leaves_float for rule in rules)


def _first_after(value: fx.Node) -> fx.Node:
    """Where a shared quantize goes: right behind its value, before every user."""
    node = value.next
    while node.op in ("placeholder", "get_attr"):
        node = node.next
    return node
