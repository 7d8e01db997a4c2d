"""Linear whose weight alone is quantized: W4A16, W6A16 and the like.

    Y_ij = sum_k x_ik * w_jk + b[j],  w_jk = (value(code_jk) - z[j, k // group]) * s[j, k // group]

For decoding, which reads every weight for one row of activations: N*K*bits/8 bytes and the scales instead of N*K
floats. The weight's values are rounded to the activations' dtype, and the product is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def weight_only_linear(
    x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, format: str, group: int
) -> Tensor:
    """See the module's docstring.

    Args:
        x: `[..., K]` float.
        w_packed: `[N, ceil(K * bits / 8)]` uint8; see `formats.pack`.
        w_scale: `[N, ceil(K / group)]` float16, or `[N, 1]` float32 where group is 0; of asymmetric formats as many
            zero points z behind them, which others have not.
        bias: `[N]` of x's dtype, or None.
        format: one of `formats.FORMATS`.
        group: input features that share a scale, or 0 for all of a row.

    Returns:
        `[..., N]` of x's dtype.
    """
    w = numerics.dequantize_weight(w_packed, w_scale, format, group, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, w, bias)
