"""GPTQ (2210.17323): a weight is rounded one input feature after another, and those behind make up for each error.

    min |W x - Wq x|^2 over calibration data,   H = X^T X,   H^-1 = U^T U, U upper triangular

    for each column j:  q = nearest(w_j),  w_k -= (w_j - q) U_jk / U_jj  for all k > j

x is what the layer reads in the quantized model: layers before it have their final codes, and where activations are
quantized it is the quantized activation. Scales are those that were there before, also of groups.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import GPTQ
from ..numerics import rotate
from ..pipeline import Contract, Pass, refining
from ..program import Program, Stage, from_weight, is_known
from ..replay import Replay, batches_of, sums_over_inputs
from ..weights import Grid, QuantizedWeight, quantized_weights

OBJECTIVE = "mean squared error of the layer's output, relative to the output"
MAX_DAMPING = 1.0  # of the mean diagonal: past it, codes would be those of rounding to the nearest


class ApplyGPTQ(Pass):
    """See the module's docstring. Returns the number of weights whose codes it chose.

    Raises:
        CalibrationError: there are no batches to take the inputs of layers from, or they do not fit the model or lead
            to NaN or Inf.
        WeightError: a weight holds NaN or Inf.
    """

    name = "gptq"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = list(quantized_weights(program, lambda plan: "gptq" in plan.methods))
        if not weights:
            return 0
        batches, settings = batches_of(program, "gptq"), program.recipe.gptq
        keys = {w.linears[-1]: ("gptq", program.recipe, weakref.ref(batches), w.key(program)) for w in weights}
        if all(is_known(program, w.constant(program), keys[w.linears[-1]]) for w in weights):
            inputs: Iterable[tuple[QuantizedWeight, Tensor]] = ((w, torch.empty(0)) for w in weights)
        else:
            inputs = sums_over_inputs(Replay(program, batches), weights, second_moment)
        changes = 0
        with refining(program, "GPTQ", OBJECTIVE, len(weights)) as finished:
            for weight, hessian in inputs:

                def compute(weight: QuantizedWeight = weight, hessian: Tensor = hessian) -> Rounded:
                    return _round(program, weight, hessian, settings)

                rounded = from_weight(program, weight.constant(program), keys[weight.linears[-1]], compute)
                if rounded.q is not None:
                    weight.choose(program, rounded.q, rounded.scale)
                    changes += 1
                program.notes += rounded.notes
                finished(weight.name, rounded.before, rounded.after)
        return changes


@dataclass(frozen=True)
class Rounded:
    """What became of a weight: its codes and scales as they are stored, None where rounding to the nearest was no
    worse; the objective before and after."""

    q: Tensor | None
    scale: Tensor
    before: float
    after: float
    notes: tuple[str, ...]


def _round(program: Program, weight: QuantizedWeight, hessian: Tensor, settings: GPTQ) -> Rounded:
    w = weight.floats(program)
    (grid, codes), scale = weight.grid(program), weight.stored(program)[1]
    if weight.rotated:
        hessian = rotate(rotate(hessian).t()).double()  # of R x, and R is its own transpose
    size = output_error(w, hessian) or 1.0
    before = output_error(w - grid.values(codes), hessian) / size
    values, damping = gptq(w, hessian, grid, settings)
    notes = []
    if damping != settings.damping:
        what = f"the Hessian was not positive definite, so its damping is {damping:g} in place of {settings.damping:g}"
        notes.append(f"{weight.name}: GPTQ: {what}")
    after = math.inf if values is None else output_error(w - values, hessian) / size
    if values is None or not after < before:
        return Rounded(None, scale, before, before, tuple(notes))
    return Rounded(weight.pack(grid.codes(values)), scale, before, after, tuple(notes))


def gptq(w: Tensor, hessian: Tensor, grid: Grid, settings: GPTQ) -> tuple[Tensor | None, float]:
    """The weight's rounded values, and the damping that was needed.

    Args:
        w: `[N, K]` float32, in the grid's coordinates.
        hessian: `[K, K]` float64, the second moment of the inputs. A feature that is always zero is rounded to the
            nearest by itself.

    Returns:
        `[N, K]` float32 on the grid, or None where no damping up to `MAX_DAMPING` makes the Hessian positive definite.
    """
    energy = hessian.diagonal().clone()
    order = torch.arange(len(energy), device=energy.device)
    if settings.act_order:
        order = torch.argsort(energy, descending=True, stable=True)
    dead = energy == 0
    hessian = hessian + torch.diag(dead.double())
    upper, damping = _inverse_factor(hessian[order][:, order], float(energy.mean()) or 1.0, settings.damping)
    if upper is None:
        return None, damping
    left, rounded = w.double()[:, order], torch.empty_like(w)
    for start in range(0, w.shape[1], settings.block):
        columns = slice(start, min(start + settings.block, w.shape[1]))
        factor, errors = upper[columns, columns], torch.empty_like(left[:, columns])
        block = left[:, columns]
        for j in range(block.shape[1]):
            column = order[start + j : start + j + 1]
            rounded[:, column] = grid.nearest(block[:, j : j + 1].float(), column)
            errors[:, j] = (block[:, j] - rounded[:, column[0]]) / factor[j, j]
            block[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
        left[:, columns.stop :] -= errors @ upper[columns, columns.stop :]
    return rounded, damping


def _inverse_factor(hessian: Tensor, mean: float, damping: float) -> tuple[Tensor | None, float]:
    """U with `H^-1 = U^T U`, upper triangular, of the damped Hessian; the damping grows until there is one."""
    while True:
        damped = hessian + torch.eye(len(hessian), dtype=torch.float64, device=hessian.device) * (mean * damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, damping
        if damping >= MAX_DAMPING:
            return None, damping
        damping = max(10 * damping, 1e-4)


def second_moment(x: Tensor) -> Tensor:
    """`X^T X` of `x [..., K]`, float64 `[K, K]`."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    return (rows.t() @ rows).double()


def output_error(error: Tensor, hessian: Tensor) -> float:
    """`|E x|^2` summed over the data that the Hessian `X^T X` is of, for a weight's error `[N, K]`."""
    return float((error.double() @ hessian * error.double()).sum())
