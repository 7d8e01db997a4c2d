"""Take the ranges of the values that the plan gives static scales, from calibration data, before anything is quantized.

What is looked at follows from roles, not from the recipe alone, so that one file of statistics serves all of
ZeroQuant-HERO's modes: input and output of the linears behind attention and activation functions, and what attentions
read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..batches import Batches
from ..calibration import Watch, collect, structure_key
from ..calling import convention_of
from ..kernels.quantized_softmax_attention import softmax_numerators
from ..pipeline import Contract, Pass
from ..program import LayerPlan, Program, Stage
from ..recipe import Recipe, Role
from ..roles import ATTENTION
from ..statistics import Statistics

aten = torch.ops.aten
FEATURE_BINS = 256
_WATCHED_ROLES = (Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_OUT)


class Calibrate(Pass):
    """Fills `program.stats` from `program.calibration`: batches to run, or Statistics of an earlier run.

    Returns the number of values looked at.

    Raises:
        CalibrationError: malformed batches, NaN in a value, or statistics of another model.
    """

    name = "calibrate"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract = Contract.EXACT

    def __call__(self, program: Program) -> int:
        calibration = program.calibration
        if calibration is None or not program.recipe.calibrated:
            return 0
        key, watches = structure_key(program), list(watched(program))
        if isinstance(calibration, Statistics):
            calibration.require(key)
            program.stats = calibration
            return len(calibration)
        batches = calibration if isinstance(calibration, Batches) else Batches(calibration)
        known = batches.collected.get(key)
        if known is None or not {watch.name for watch in watches} <= set(known):
            known = batches.collected[key] = collect(program, convention_of(program), batches, watches, key)
        program.stats = known
        return len(known)


def watched(program: Program) -> Iterator[Watch]:
    """What calibration looks at."""
    recipe = program.recipe
    bins = FEATURE_BINS if recipe.range_method != "max_abs" else None
    for node in program.graph.nodes:
        plan = program.plan.get(node.meta.get("layer", ""))
        if plan is None:
            continue
        if node.target is ATTENTION:
            yield from _attention(node, plan, recipe)
        elif node.target is aten.linear.default:
            of_role = plan.role in _WATCHED_ROLES
            if of_role or (plan.input is not None and plan.input.calibrated):
                yield Watch(f"{plan.name}:input", node, _input, feature_bins=bins)
            if of_role or plan.output is not None:
                yield Watch(f"{plan.name}:output", node, feature_bins=bins)


def _attention(node: fx.Node, plan: LayerPlan, recipe: Recipe) -> Iterator[Watch]:
    for index, part in enumerate(("query", "key", "value")):
        yield Watch(f"{plan.name}:{part}", node, lambda *args, index=index, **kwargs: args[index], dim=None)
    if recipe.softmax != "token":
        yield Watch(f"{plan.name}:probabilities", node, _probabilities, dim=None)


def _input(x: Tensor, *_: Any) -> Tensor:
    return x


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """What the softmax of an attention gives, `[B, H, T, S]` float32."""
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, 1).float().transpose(-2, -1)
    scores = query.float() @ keys * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    numerators = softmax_numerators(scores, mask, is_causal)
    return numerators / numerators.sum(-1, keepdim=True).clamp(min=1.0)
