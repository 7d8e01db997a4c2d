"""Clip search: each scale is shrunk as far as that lessens the squared error of its group (as in AWQ, 2306.00978).

A smaller scale puts the largest elements outside the grid and all others on a finer one. Needs no data.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..numerics import WHOLE, scales_and_zeros
from ..pipeline import Contract, Pass, refining
from ..program import Program, Stage, from_weight
from ..weights import QuantizedWeight, quantized_weights

OBJECTIVE = "squared error of the weight, relative to the weight"
LEAST, STEPS = 0.5, 20  # shares of the range that are tried: 1, ... LEAST


class ClipScales(Pass):
    """See the module's docstring. Returns the number of weights with a scale that changed.

    Raises:
        WeightError: a weight holds NaN or Inf.
    """

    name = "clip"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = list(quantized_weights(program, lambda plan: "clip" in plan.methods))
        if not weights:
            return 0
        changes = 0
        with refining(program, "clip search", OBJECTIVE, len(weights)) as finished:
            for weight in weights:

                def compute(weight: QuantizedWeight = weight) -> tuple[Tensor, Tensor, float, float]:
                    return _clip(program, weight)

                key = "clip", weight.key(program)
                q, scale, before, after = from_weight(program, weight.constant(program), key, compute)
                if after < before:
                    weight.choose(program, q, scale)
                    changes += 1
                finished(weight.name, before, after)
        return changes


def _clip(program: Program, weight: QuantizedWeight) -> tuple[Tensor, Tensor, float, float]:
    """Codes and scales of least error, as they are stored, and the error before and after."""
    w, (grid, _), (_, stored) = weight.floats(program), weight.grid(program), weight.stored(program)
    group = grid.group or w.shape[1]
    shared = weight.plan.weight is not None and weight.plan.weight.shared_by == WHOLE
    columns = torch.arange(w.shape[1], device=w.device)

    def errors(scale: Tensor) -> Tensor:
        """Of each group, or of all that share a scale: `[N, G]`."""
        squares = (replace(grid, scale=scale).nearest(w, columns) - w).square()
        padded = torch.nn.functional.pad(squares, (0, -w.shape[1] % group))
        of_groups = padded.unflatten(1, (-1, group)).sum(-1)
        return of_groups.sum().expand_as(of_groups) / of_groups.numel() if shared else of_groups

    whole, zero = scales_and_zeros(stored, grid.format.name)
    best, least = whole, errors(whole.float())
    before = float(least.sum())
    for step in range(1, STEPS + 1):
        scale = (whole.float() * (1 - (1 - LEAST) * step / STEPS)).to(stored.dtype)
        found = errors(scale.float())
        better = (found < least) & (scale > 0)
        best, least = torch.where(better, scale, best), torch.where(better, found, least)
    size = float(w.square().sum()) or 1.0
    chosen = best if zero is None else torch.cat([best, zero], 1)
    q = weight.pack(replace(grid, scale=best.float()).codes(w))
    return q, chosen, before / size, float(least.sum()) / size
