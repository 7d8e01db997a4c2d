"""Low-rank compensation of a weight's quantization error (LoRC; ZeroQuant-V2, 2303.08302, section 4).

    y = linear(x, Wq) + linear(linear(x, V), U),   U V = the best approximation of W - Wq of some rank

    W - Wq = P S Q^T,   U = P_r S_r^(1/2),   V = S_r^(1/2) Q_r^T

The branch reads the activation as the layer does: dequantized, where it is quantized, so that nothing else keeps the
float activation alive. A rotation of it goes into V instead. Factors are stored in float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..kernels import dequantize, reference_of
from ..numerics import rotate
from ..pipeline import Contract, Pass
from ..program import LayerPlan, Program, Stage, fake_value, from_weight, integer_name
from ..rewrite import Builder, constant_of, evaluate_constant, view_key

aten = torch.ops.aten
EXACT_SIZE = (
    1024  # of the smaller side, up to which the decomposition is exact; randomized above (Halko et al., 0909.4061)
)
OVERSAMPLING, POWER_ITERATIONS = 16, 4


class InsertLoRC(Pass):
    """See the module's docstring. Returns the number of branches. A weight without an error gets none."""

    name = "insert_lorc"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        changes, views = 0, dict[str, list[object]]()
        unrotated: dict[fx.Node, fx.Node] = {}  # a rotated dequantize -> the same without rotating back
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            plan = program.plan.get(node.meta.get("layer", ""))
            if plan is not None and plan.quantized and plan.lorc_rank:
                changes += _compensate(program, node, plan, views, unrotated)
        return changes


def _compensate(
    program: Program,
    node: fx.Node,
    plan: LayerPlan,
    views: dict[str, list[object]],
    unrotated: dict[fx.Node, fx.Node],
) -> int:
    values: fx.Node = node.args[1]  # type: ignore[assignment]
    quantize: fx.Node = values.args[0].args[0]  # type: ignore[union-attr, assignment]
    weight: fx.Node = quantize.args[0]  # type: ignore[assignment]
    source = constant_of(program.gm, weight)
    assert source is not None  # annotate planned constants only
    name, how = str(source.target), (str(quantize.target), *quantize.args[1:])
    key = view_key(program.gm, weight), how
    known = views.setdefault(name, [])
    if key not in known:
        known.append(key)

    def compute() -> tuple[Tensor, Tensor] | None:
        return low_rank_factors(_error(program, values, quantize, weight), plan.lorc_rank)

    factors = from_weight(program, name, ("lorc", plan.lorc_rank, *key), compute)
    if factors is None:
        program.notes.append(f"{plan.name}: no low-rank compensation: it would not lessen the weight's error")
        return 0
    build, dtype, x = Builder(program, node), fake_value(node).dtype, node.args[0]
    u, v = factors
    if isinstance(x, fx.Node) and x.target is dequantize and x.args[3]:
        if x not in unrotated:
            unrotated[x] = Builder(program, x.next).call(dequantize, *x.args[:3], False)
        x, v = unrotated[x], rotate(v).to(v.dtype)  # (H a) v = a (H v)
    index = known.index(key)
    names = [integer_name(name, index, f"lorc_{part}") for part in ("u", "v")]
    u, v = (build.call(aten.to.dtype, build.constant(*pair), dtype) for pair in zip(names, (u, v), strict=True))
    behind = Builder(program, node.next)
    users = list(node.users)
    branch = behind.call(aten.linear.default, behind.call(aten.linear.default, x, v), u)
    total = behind.call(aten.add.Tensor, node, branch)
    for user in users:
        user.replace_input_with(node, total)
    return 1


def _error(program: Program, values: fx.Node, quantize: fx.Node, weight: fx.Node) -> Tensor:
    """`W - Wq` in float32, `[N, K]`."""
    wanted = evaluate_constant(program.gm, weight)
    stored = reference_of(quantize.target)(wanted, *quantize.args[1:])  # type: ignore[misc]
    dequantized = reference_of(values.target)(*stored, *values.args[2:])  # type: ignore[misc]
    return wanted.float() - dequantized.float()


def low_rank_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """`U [N, r]` and `V [r, K]` in float16 with `U V` the best approximation of `error [N, K]`, r at most `rank`.

    None where they would not lessen its Frobenius norm, or float16 cannot hold them.
    """
    rank = min(rank, *error.shape)
    if not torch.isfinite(error).all():  # a weight that holds NaN or Inf: whoever quantizes it will say so
        return None
    if min(error.shape) <= EXACT_SIZE:
        p, s, q = torch.linalg.svd(error, full_matrices=False)
        p, s, q = p[:, :rank], s[:rank], q[:rank]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            p, s, q = torch.svd_lowrank(error, min(rank + OVERSAMPLING, *error.shape), POWER_ITERATIONS)
        p, s, q = p[:, :rank], s[:rank], q[:, :rank].t()
    u, v = (p * s.sqrt()).to(torch.float16), (s.sqrt()[:, None] * q).to(torch.float16)
    left = error - u.float() @ v.float()
    return (u.contiguous(), v.contiguous()) if left.norm() < error.norm() else None
