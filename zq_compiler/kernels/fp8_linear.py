"""Linear of FP8 E4M3 activations, token-wise or with one scale, and FP8 or FP4 weights (ZeroQuant-FP, 2307.09782).

    Y_ij = (sum_k Xq_ik Wq_jk) * s_w[j] * s_x[i] + b[j]
    Y_ij = (sum_k Xq_ik (Wq_jk s_w[j, k // group])) * s_x[i] + b[j]      where scales are of groups

As `int8_linear`, with values of E4M3 in place of integers: the same bytes, a larger range in the same eight bits.
Products of values are exact in float32, their sum is not, so its order shows in the last places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..formats import format_of, unpack
from .registry import dialect_op


@dialect_op
def fp8_linear(
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
        x_q: `[..., K]` float8_e4m3fn.
        x_scale: `[..., 1]` or `[1, ..., 1]` float32.
        w_packed: `[N, ceil(K * bits / 8)]` uint8; see `formats.pack`.
        w_scale: `[N, ceil(K / group)]` float16, or `[N, 1]` float32 where group is 0.
        bias: `[N]` float, or None.
        format: one of `formats.WITHIN_E4M3`.
        group: input features that share a scale, or 0 for all of a row.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[..., N]` of `out_dtype`; a NaN scale gives a row of NaN.
    """
    x, k = x_q.float(), x_q.shape[-1]
    if group:
        y = torch.nn.functional.linear(x, numerics.dequantize_weight(w_packed, w_scale, format, group, k))
    else:
        fmt = format_of(format)
        y = torch.nn.functional.linear(x, fmt.decode(unpack(w_packed, fmt.bits, k))) * w_scale.reshape(-1)
    y = y * x_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)
