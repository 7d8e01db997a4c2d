"""GeMM of INT4 weights and INT8 activations (W4A8; ZeroQuant, 2206.01861, ZeroQuant-V2's groups, 2303.08302).

    Y_ij = (sum_g float(sum_{k in g} Xq_ik Wq_jk) * s_w[j, g]) * s_x[i] + b[j]

Integer sums of a group are exact, the sum over groups is float32, in their order, each product rounded before it is
added. With one group it is `int8_linear`'s arithmetic. Reads M*K + N*K/2 bytes and the scales. A rotation of both
operands leaves the product as it is, and is not seen here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import format_of, unpack
from ..torch_private import int_mm
from .registry import dialect_op


@dialect_op
def w4a8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    format: str,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See the module's docstring.

    Args:
        x_q: `[..., K]` int8; of W4A4, the integers of four bits.
        x_scale: `[..., 1]` float32, real value per step of each row.
        w_packed: `[N, ceil(K * bits / 8)]` uint8; see `formats.pack`.
        w_scale: `[N, ceil(K / group)]` float16, or `[N, 1]` float32 where group is 0.
        bias: `[N]` float, or None.
        format: one of `formats.NIBBLES`.
        group: input features that share a scale, or 0 for all of a row.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[..., N]` of `out_dtype`; a NaN scale gives a row of NaN.
    """
    k = x_q.shape[-1]
    fmt, x = format_of(format), x_q.reshape(-1, k)
    w = fmt.decode(unpack(w_packed, fmt.bits, k)).to(torch.int8)
    pieces = zip(x.split(group or k, 1), w.split(group or k, 1), w_scale.float().t(), strict=True)
    y, *others = (int_mm(a.contiguous(), b.contiguous().t()).float() * scale for a, b, scale in pieces)
    for other in others:
        y = y + other
    y = y * x_scale.reshape(-1, 1)
    if bias is not None:
        y = y + bias.float()
    return y.reshape(*x_q.shape[:-1], w.shape[0]).to(out_dtype)
