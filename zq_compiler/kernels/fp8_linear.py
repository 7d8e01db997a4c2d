"""Linear of FP8 E4M3 operands, token-wise activations (ZeroQuant-FP, 2307.09782).

    Y_ij = (sum_k Xq_ik Wq_jk) * s_w[j] * s_x[i] + b[j]

As `int8_linear`, with values of E4M3 in place of integers: the same bytes, a larger range in the same eight bits.
Products are exact in float32, their sum is not, so its order shows in the last places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import dialect_op


@dialect_op
def fp8_linear(
    x_q: Tensor, x_scale: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """See the module's docstring.

    Args:
        x_q: `[..., K]` float8_e4m3fn.
        x_scale: `[..., 1]` float32.
        w_packed: `[N, K]` uint8, codes of E4M3.
        w_scale: `[N, 1]` float32.
        bias: `[N]` float, or None.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[..., N]` of `out_dtype`; a NaN scale gives a row of NaN.
    """
    w = w_packed.view(torch.float8_e4m3fn).float()
    y = torch.nn.functional.linear(x_q.float(), w) * w_scale.reshape(-1) * x_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)
