"""SmoothQuant (2211.10438): outliers of a norm's features move into the weights of the linears behind it.

    norm(h) / s,   W diag(s),   s_j = max|x_j|^a / max|W_j|^(1 - a)

The product is what it was, so the float model's outputs stay; what changes is how hard either operand is to quantize.
Only where linears are all that reads a norm can its weight and bias take the factors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..numerics import (
    AMAX_FLOOR,
    FP8_STEP,
    INT8_MAX,
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    quantize_weight,
)
from ..pipeline import Contract, Pass, refining
from ..program import LayerPlan, NearMiss, Program, Stage, fake_value, from_weight, is_known
from ..replay import Replay, batches_of, constant_nodes, not_finite
from ..rewrite import Builder, arguments, constant_of, evaluate_constant
from ..schemes import Granularity, QScheme
from ..statistics import Statistics, ValueStatistics

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
OBJECTIVE = "squared error of the linears' outputs, relative to the outputs"
LEAST_FACTOR = 1e-5
ALPHAS = tuple(step / 20 for step in range(21))  # tried by "search"
ROWS = 512  # of calibration data that an alpha is judged by


class SmoothActivations(Pass):
    """See the module's docstring. Returns the number of norms whose factors moved.

    Where quantizing afterwards would be no more accurate on the calibration data, a norm stays as it is.

    Raises:
        CalibrationError: there are no batches to take ranges from, or they do not fit the model or lead to NaN or Inf.
    """

    name = "smooth"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract = Contract.CLOSE

    def __call__(self, program: Program) -> int:
        groups = list(_groups(program))
        grouped = {linear for group in groups for linear in group.linears}
        for linear in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            plan = program.plan.get(linear.meta.get("layer", ""))
            if plan is not None and plan.smooth is not None and linear not in grouped:
                program.near_misses.append(NearMiss("SmoothQuant", linear.name, "what it reads is no norm's to scale"))
        if not groups:
            return 0
        batches = batches_of(program, "SmoothQuant")
        keys = [("smooth", program.recipe, weakref.ref(batches), group.key) for group in groups]
        names = [str(group.constants[0].target) for group in groups]
        known = all(is_known(program, name, key) for name, key in zip(names, keys, strict=True))
        replay = None if known else Replay(program, batches)
        found: list[_Smoothing] = []
        with refining(program, "SmoothQuant", OBJECTIVE, len(groups)) as finished:
            for group, name, key in zip(
                groups, names, keys, strict=True
            ):  # the graph stays as it is until all are known

                def compute(group: _Group = group) -> _Smoothing:
                    assert replay is not None
                    return _smoothing(program, group, replay)

                found.append(from_weight(program, name, key, compute))
                finished(group.plans[0].name, found[-1].before, found[-1].after)
        for group, smoothing in zip(groups, found, strict=False):
            if smoothing.factors is not None:
                _apply(program, group, smoothing)
        return sum(smoothing.factors is not None for smoothing in found)


@dataclass(frozen=True)
class _Group:
    """A norm and the linears that read it, which are all that does, in the graph's order."""

    norm: fx.Node
    linears: tuple[fx.Node, ...]
    plans: tuple[LayerPlan, ...]
    constants: tuple[fx.Node, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """What its factors follow from beside the data, hashable."""
        return tuple((plan.name, plan.smooth, plan.weight, plan.input) for plan in self.plans)


@dataclass(frozen=True)
class _Smoothing:
    """Factors `[K]`, or None where they would not pay, and the ranges that static scales are then chosen from."""

    factors: Tensor | None
    alpha: float
    before: float
    after: float
    ranges: ValueStatistics | None = None


def _groups(program: Program) -> Iterator[_Group]:
    for norm in program.graph.nodes:
        if norm.target not in NORMS:
            continue
        users = sorted(norm.users)
        plans = [program.plan.get(user.meta.get("layer", "")) for user in users]
        asked = [plan for plan in plans if plan is not None and plan.smooth is not None]
        if not asked:
            continue
        if reason := _refusal(program, norm, users, plans):
            program.notes.append(f"{asked[0].name}: no SmoothQuant: {reason}")
            continue
        constants = [constant_of(program.gm, user.args[1]) for user in users]
        yield _Group(norm, tuple(users), tuple(asked), tuple(c for c in constants if c is not None))


def _refusal(program: Program, norm: fx.Node, users: list[fx.Node], plans: list[LayerPlan | None]) -> str:
    """Why its features cannot be scaled; empty where they can."""
    for user, plan in zip(users, plans, strict=True):
        if user.target is not aten.linear.default or user.args[0] is not norm:
            return f"{user.name} reads the norm too, and is no linear"
        if plan is None or plan.smooth is None:
            return f"{user.meta.get('layer', user.name)} reads the norm too, and is not smoothed"
        if plan.calls > 1:
            return f"{plan.name} is called more than once"
    if len({plan.smooth for plan in plans if plan is not None}) > 1:
        return "rules give its linears different alphas"
    if len(arguments(norm)[1]) > 1:
        return "the norm is over more than features"
    if norm in constant_nodes(program.graph):
        return "what the norm reads is a constant"
    parameters = [x for x in arguments(norm)[2:4] if isinstance(x, fx.Node)]
    if any(constant_of(program.gm, x) is None for x in parameters):
        return "the norm's weight is computed at run time"
    return ""


def _smoothing(program: Program, group: _Group, replay: Replay) -> _Smoothing:
    norm = group.norm
    replay.advance(norm)
    read = _first_rows(replay, norm.args[0])  # type: ignore[arg-type]
    replay.advance(norm.next)
    largest = torch.stack([_rows(x).float().abs().amax(0) for x in replay.inputs(norm)]).amax(0)
    if not largest.isfinite().all():
        bad = next(i for i, x in enumerate(replay.inputs(norm)) if not x.isfinite().all())
        raise not_finite(group.plans[0].name, bad)
    rows = _first_rows(replay, norm).float()
    weights = [evaluate_constant(program.gm, linear.args[1]).detach() for linear in group.linears]  # type: ignore[arg-type]
    in_weights = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)
    wanted = [rows @ w.float().t() for w in weights]
    size = sum(float(y.square().sum()) for y in wanted) or 1.0

    def error(factors: Tensor | None) -> float:
        """With all that takes the factors rounded to its dtype, as it will be."""
        total, smoothed, ranges = 0.0, rows, largest
        if factors is not None:
            values, parameters = arguments(norm), _parameters(program, norm, factors)
            rest = values[2 + len(parameters) :]
            smoothed = norm.target(read, values[1], *parameters, *rest).float()  # type: ignore[operator]
            ranges = largest / factors
        for w, y, plan in zip(weights, wanted, group.plans, strict=True):
            w = w.float() if factors is None else (w * factors.to(w.dtype)).float()
            x = _quantized(smoothed, ranges, plan.input)
            total += float((x @ _quantized_weight(w, plan).t() - y).square().sum())
        return total / size

    plain = error(None)
    best = _Smoothing(None, 0.0, plain, plain)
    smooth = group.plans[0].smooth
    for alpha in ALPHAS if smooth == "search" else (smooth,):
        assert isinstance(alpha, int | float)
        factors = largest.clamp(min=LEAST_FACTOR) ** alpha / in_weights.clamp(min=LEAST_FACTOR) ** (1 - alpha)
        factors = factors.clamp(min=LEAST_FACTOR)
        found = error(factors)
        if found < best.after:
            best = _Smoothing(factors, float(alpha), best.before, found)
    if best.factors is None or not any(plan.input is not None and plan.input.calibrated for plan in group.plans):
        return best
    known = program.stats
    assert known is not None  # calibrate has been here
    old = known[f"{group.plans[0].name}:input"]
    ranges = ValueStatistics(old.name, dim=old.dim, bins=old.histogram.bins, feature_bins=old.feature_bins)
    for x in replay.inputs(group.norm):
        ranges.observe(x.float() / best.factors)
    return replace(best, ranges=ranges)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _first_rows(replay: Replay, node: fx.Node) -> Tensor:
    """Some rows of each batch, `ROWS` at most."""
    share = max(1, ROWS // len(replay))
    return torch.cat([_rows(x)[:share] for x in replay.inputs(node)])[:ROWS]


def _parameters(program: Program, norm: fx.Node, factors: Tensor) -> list[Tensor | None]:
    """A norm's weight and bias divided by the factors; RMSNorm has no bias."""
    values: list[Tensor | None] = []
    for parameter in arguments(norm)[2 : 4 if norm.target is aten.layer_norm.default else 3]:
        value = None if parameter is None else evaluate_constant(program.gm, parameter).detach()
        if value is None and not values:  # a norm without a weight gets one
            value = torch.ones_like(factors, dtype=fake_value(norm).dtype)
        values.append(None if value is None else (value.float() / factors).to(value.dtype))
    return values


def _quantized(x: Tensor, largest: Tensor, scheme: QScheme | None) -> Tensor:
    """Activations `[T, K]` as the quantized model has them; `largest [K]` magnitudes are for static scales."""
    if scheme is None:
        return x
    if scheme.calibrated:
        if scheme.format == "fp8_e4m3":
            scale = largest.amax().clamp(min=AMAX_FLOOR) * FP8_STEP
            return quantize_static_fp8(x, scale).float() * scale
        largest = largest if scheme.granularity is Granularity.PER_FEATURE else largest.amax()
        scale = largest.clamp(min=AMAX_FLOOR) / INT8_MAX
        return quantize_static(x, scale).float() * scale
    if scheme.format != "fp8_e4m3":
        quantize = quantize_per_token if scheme.format == "int8" else quantize_per_token_int4
        return dequantize(*quantize(x, scheme.rotated), torch.float32, scheme.rotated)
    return dequantize(*quantize_per_token_fp8(x), torch.float32)


def _quantized_weight(w: Tensor, plan: LayerPlan) -> Tensor:
    scheme = plan.weight
    assert scheme is not None
    if scheme.format == "int8" and plan.input is not None:
        return dequantize(*quantize_per_channel(w, scheme.rotated), torch.float32, scheme.rotated)
    how = scheme.rotated, scheme.scale_constraint, scheme.scale_rounding
    packed, scale = quantize_weight(w, scheme.format, scheme.shared_by, *how)
    return dequantize_weight(packed, scale, scheme.format, scheme.group, w.shape[1], rotated=scheme.rotated)


def _apply(program: Program, group: _Group, smoothing: _Smoothing) -> None:
    factors, norm = smoothing.factors, group.norm
    assert factors is not None
    name = f"{group.plans[0].name}.smooth"
    build, values = Builder(program, norm), arguments(norm)
    taken = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    for index, value in enumerate(_parameters(program, norm, factors), start=2):
        if value is not None:
            source = constant_of(program.gm, values[index])
            target = f"{name}_{'weight' if index == 2 else 'bias'}"
            if source is not None and f"{source.target}_smoothed" not in taken:  # else the norm has several calls
                target = f"{source.target}_smoothed"
            values[index] = build.constant(target, value)
    norm.args, norm.kwargs = tuple(values), {}
    for linear in group.linears:
        at = Builder(program, linear)
        weight = linear.args[1]
        assert isinstance(weight, fx.Node)
        dtype = fake_value(weight).dtype
        linear.update_arg(1, at.call(aten.mul.Tensor, weight, at.constant(name, factors.to(dtype))))
    if smoothing.ranges is not None and program.stats is not None:
        ranges = {f"{plan.name}:input": smoothing.ranges for plan in group.plans}
        program.stats = Statistics({**program.stats, **ranges}, program.stats.key, program.stats.batches)
