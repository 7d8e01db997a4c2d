"""The branch of low-rank compensation (LoRC; ZeroQuant-V2, 2303.08302), added to what a quantized linear gives.

    Y'_ij = Y_ij + sum_r H_ir U_jr,   H_ir = sum_k x_ik V_rk

Two thin products: (N + K) r multiplications a row, where the linear has N K. Factors are stored in float16, or in INT8
with a scale for each rank, and are rounded to the activations' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import dialect_op


@dialect_op
def low_rank_linear(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, v_scale: Tensor | None = None, u_scale: Tensor | None = None
) -> Tensor:
    """See the module's docstring.

    Args:
        y: `[..., N]` float, the linear's result.
        x: `[..., K]` of y's dtype, what the linear reads.
        v: `[r, K]` float16, or int8 with `v_scale [r, 1]` float32.
        u: `[N, r]` float16, or int8 with `u_scale [1, r]` float32.

    Returns:
        `[..., N]` of y's dtype.
    """
    hidden = torch.nn.functional.linear(x, factor(v, v_scale, x.dtype))
    return y + torch.nn.functional.linear(hidden, factor(u, u_scale, x.dtype))


def factor(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a stored factor stands for, in a float dtype."""
    return stored.to(dtype) if scale is None else stored.to(dtype) * scale.to(dtype)
