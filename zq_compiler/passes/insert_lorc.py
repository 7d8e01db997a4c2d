"""Low-rank compensation of a weight's quantization error (LoRC; ZeroQuant-V2, 2303.08302, section 4).

    y = linear(x, Wq) + linear(linear(x, V), U),   U V = the best approximation of W - Wq of some rank

    W - Wq = P S Q^T,   U = P_r S_r^(1/2),   V = S_r^(1/2) Q_r^T

The branch reads the activation as the layer does: dequantized, where it is quantized, so that nothing else keeps the
float activation alive. Of a rotated one it reads the rotated values, and the error is that of the rotated weight.
Weighted by the inputs (as in LQER, 2402.02446), it is `(W - Wq) D` that is approximated, D the root mean square of each
input feature.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..kernels import dequantize, low_rank_linear
from ..methods import LoRC
from ..numerics import ROTATION, quantize_per_channel, rotate
from ..pipeline import Contract, Pass, refining
from ..program import Program, Stage, from_weight, integer_name, is_known
from ..replay import Replay, batches_of, sums_over_inputs
from ..rewrite import Builder
from ..weights import QuantizedWeight, quantized_weights

EXACT_SIZE = (
    1024  # of the smaller side, up to which the decomposition is exact; randomized above (Halko et al., 0909.4061)
)
OVERSAMPLING, POWER_ITERATIONS = 16, 4
RANDOMIZED_RANK = 256  # the largest that rank "auto" looks at above that size
OBJECTIVE = "squared error of the weight, relative to the weight"
WEIGHTED_OBJECTIVE = "squared error of the weight times its inputs, relative to the weight's"


class InsertLoRC(Pass):
    """See the module's docstring. Returns the number of branches. A weight whose error it would not lessen gets none.

    Raises:
        CalibrationError: the recipe weights errors by the inputs, and there is no data to take them from.
        WeightError: a weight holds NaN or Inf.
    """

    name = "insert_lorc"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = list(quantized_weights(program, lambda plan: bool(plan.lorc_rank)))
        if not weights:
            return 0
        settings = program.recipe.lorc
        data = (program.recipe, weakref.ref(batches_of(program, "the weighted LoRC"))) if settings.weighted else ()
        keys = [("lorc", w.plan.lorc_rank, settings, *data, w.key(program)) for w in weights]
        known = all(is_known(program, w.constant(program), key) for w, key in zip(weights, keys, strict=True))
        energies = _energies(program, weights) if settings.weighted and not known else {}
        views: dict[str, list[object]] = {}
        unrotated: dict[fx.Node, fx.Node] = {}  # a rotated dequantize -> the same without rotating back
        changes = 0
        with refining(
            program, "LoRC", WEIGHTED_OBJECTIVE if settings.weighted else OBJECTIVE, len(weights)
        ) as finished:
            for weight, key in zip(weights, keys, strict=True):
                name, energy = weight.constant(program), energies.get(weight.linears[-1])

                def compute(weight: QuantizedWeight = weight, energy: Tensor | None = energy) -> Compensation:
                    return _compensate(program, weight, energy, settings)

                found = from_weight(program, name, key, compute)
                finished(weight.name, found.before, found.after)
                if found.factors is None:
                    program.notes.append(f"{weight.name}: no low-rank compensation: {found.reason}")
                    continue
                if found.chosen is not None:
                    weight.choose(program, *found.chosen)
                known_views = views.setdefault(name, [])
                if key not in known_views:
                    known_views.append(key)
                for linear in weight.linears:
                    _insert(program, linear, name, known_views.index(key), found.factors, unrotated)
                    changes += 1
        return changes


@dataclass(frozen=True)
class Compensation:
    """What is made of one weight.

    Args:
        factors: what U and V are stored as, scales behind integers, or None where they would not lessen the error.
        chosen: codes and scales of the weight, as they are stored, where they were rounded anew.
        before, after: the objective's value.
        reason: why there are no factors.
    """

    factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None
    chosen: tuple[Tensor, Tensor] | None = None
    before: float = 0.0
    after: float = 0.0
    reason: str = ""


def _energies(program: Program, weights: Iterable[QuantizedWeight]) -> dict[fx.Node, Tensor]:
    """Sum of squares of each input feature, in the coordinates of the grid: `[K]`."""

    def squares(x: Tensor) -> Tensor:
        rows = x.float().reshape(-1, x.shape[-1])
        both = [rows, rotate(rows)] if x.shape[-1] % ROTATION == 0 else [rows]
        return torch.stack([each.square().sum(0) for each in both])

    sums = sums_over_inputs(Replay(program, batches_of(program, "LoRC")), list(weights), squares)
    return {weight.linears[-1]: total[int(weight.rotated)] for weight, total in sums}


def _compensate(program: Program, weight: QuantizedWeight, energy: Tensor | None, settings: LoRC) -> Compensation:
    w, (grid, codes), (stored, scale) = weight.floats(program), weight.grid(program), weight.stored(program)
    importance = torch.ones(w.shape[1], device=w.device) if energy is None else energy.sqrt()
    importance = (importance / importance.mean().clamp(min=1e-12)).clamp(min=1e-3)  # a dead feature is not free
    size = float((w * importance).square().sum()) or 1.0
    before = float(((w - grid.values(codes)) * importance).square().sum()) / size
    bytes_each = {"float16": 2, "int8": 1}[settings.factors]
    affordable = int(settings.budget * (stored.nbytes + scale.nbytes) / (bytes_each * sum(w.shape)))
    found = Compensation(None, None, before, before, "it would not lessen the weight's error")
    for refinement in range(1 + settings.refinements):
        error = w - grid.values(codes)
        rank = weight.plan.lorc_rank
        if rank == "auto":
            rank = min(rank_for_energy(error * importance, settings.energy), affordable)
        assert isinstance(rank, int)
        if rank == 0:
            reason = "its bytes would exceed the budget" if affordable == 0 else "the weight has no error"
            return Compensation(None, None, before, before, reason)
        factors = low_rank_factors(error * importance, rank)
        if factors is None:
            break
        u, v = factors[0], (factors[1].float() / importance).to(torch.float16)
        kept = _stored(u, 1, settings.factors), _stored(v, 0, settings.factors)
        product = _value(kept[0]) @ _value(kept[1])
        after = float(((error - product) * importance).square().sum()) / size
        if not after < found.after:
            break
        found = Compensation(kept, (weight.pack(codes), scale) if refinement else None, before, after)
        codes = grid.codes(w - product)
    return found


def _stored(factor: Tensor, ranks: int, dtype: str) -> tuple[Tensor, ...]:
    """A factor as it is stored: floats, or integers with a scale for each rank, which dimension `ranks` counts."""
    if dtype != "int8":
        return (factor,)
    return tuple(part.movedim(0, ranks).contiguous() for part in quantize_per_channel(factor.movedim(ranks, 0)))


def _value(stored: tuple[Tensor, ...]) -> Tensor:
    """The factor that a stored one stands for, in float32."""
    return stored[0].float() * stored[1] if len(stored) == 2 else stored[0].float()


def _insert(
    program: Program,
    linear: fx.Node,
    name: str,
    index: int,
    factors: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    unrotated: dict[fx.Node, fx.Node],
) -> None:
    x = linear.args[0]
    if isinstance(x, fx.Node) and x.target is dequantize and x.args[3]:
        if x not in unrotated:
            unrotated[x] = Builder(program, x.next).call(dequantize, *x.args[:3], False)
        x = unrotated[x]
    behind, users, operands = Builder(program, linear.next, of=linear), list(linear.users), list[list[fx.Node]]()
    for part, stored in zip("uv", factors, strict=True):
        target = integer_name(name, index, f"lorc_{part}")
        targets = target, f"{target}_scale"
        operands.append([behind.constant(*pair) for pair in zip(targets, stored, strict=False)])
    u, v = operands
    total = behind.call(low_rank_linear, linear, x, v[0], u[0], *v[1:], *u[1:])
    total.meta["compensates"] = linear
    for user in users:
        user.replace_input_with(linear, total)


def rank_for_energy(error: Tensor, share: float) -> int:
    """The smallest rank whose approximation of `error [N, K]` has this share of its squared norm; 0 of zeros.

    Above `EXACT_SIZE`, at most `RANDOMIZED_RANK`.
    """
    if min(error.shape) <= EXACT_SIZE:
        s = torch.linalg.svdvals(error.float())
    else:
        s = _randomized(error, RANDOMIZED_RANK)[1]
    total = float(error.double().square().sum())
    reached = s.double().square().cumsum(0) >= share * total
    return 0 if total == 0 else int(reached.int().argmax()) + 1 if bool(reached.any()) else len(s)


def low_rank_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """`U [N, r]` and `V [r, K]` in float16 with `U V` the best approximation of `error [N, K]`, r at most `rank`.

    None where they would not lessen its Frobenius norm, or float16 cannot hold them.
    """
    rank = min(rank, *error.shape)
    if not torch.isfinite(error).all():
        return None
    if min(error.shape) <= EXACT_SIZE:
        p, s, q = torch.linalg.svd(error, full_matrices=False)
        p, s, q = p[:, :rank], s[:rank], q[:rank]
    else:
        p, s, q = _randomized(error, rank)
    u, v = (p * s.sqrt()).to(torch.float16), (s.sqrt()[:, None] * q).to(torch.float16)
    left = error - u.float() @ v.float()
    return (u.contiguous(), v.contiguous()) if left.norm() < error.norm() else None


def _randomized(error: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values and their vectors, `[N, r], [r], [r, K]`; always alike."""
    with torch.random.fork_rng(devices=[] if error.is_cpu else [error.device]):
        torch.manual_seed(0)
        p, s, q = torch.svd_lowrank(error, min(rank + OVERSAMPLING, *error.shape), POWER_ITERATIONS)
    return p[:, :rank], s[:rank], q[:, :rank].t()
