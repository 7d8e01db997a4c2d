"""LN^quant and its RMSNorm twin (ZeroQuant-HERO): normalise and quantize token-wise in one pass over the row.

    h = x + residual;  y = norm(h);  (q, scale) = quantize_per_token(y, rotated)

The norm already reduces over the row, so the row's range costs no pass over memory. `y` and `h` are outputs too:
a post-norm block adds `y` to the next residual, a pre-norm block adds `h`. Who does not use one does not pay for it:
the inlined form drops it as dead code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension, then token-wise quantize.

    Args:
        x: `[..., K]` float.
        weight, bias: `[K]` or None.
        eps: added to the variance.
        rotated: the integers are those of `numerics.rotate(y)`; y itself is not rotated.

    Returns:
        `q [..., K]` int8, `scale [..., 1]` float32, `y [..., K]` of x's dtype.
    """
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return (*numerics.quantize_per_token(y, rotated), y)


@dialect_op
def add_layer_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`layer_norm_quantize` of `h = x + residual`, which is the fourth output."""
    h = x + residual
    y = torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return (*numerics.quantize_per_token(y, rotated), y, h)


@dialect_op
def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm over the last dimension, then token-wise quantize; shapes as `layer_norm_quantize`."""
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)
    return (*numerics.quantize_per_token(y, rotated), y)


@dialect_op
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_quantize` of `h = x + residual`, which is the fourth output."""
    h = x + residual
    y = torch.nn.functional.rms_norm(h, h.shape[-1:], weight, eps)
    return (*numerics.quantize_per_token(y, rotated), y, h)


@dialect_op
def int8_add_layer_norm_quantize(
    x: Tensor,
    x_scale: Tensor | None,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_rotated: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_layer_norm_quantize` whose summands may be integers, dequantized in registers (ZeroQuant-HERO's LN^quant).

    Args:
        x: `[..., K]` int8 with `x_scale [1, ..., K]` float32 (feature-wise), or float with None.
        residual: `[..., K]` int8 with `residual_scale [..., 1]` float32 (token-wise), or float with None.
        residual_rotated: the residual's integers are those of rotated features.
        weight, bias: `[K]` or None.
        eps: added to the variance.
        rotated: as in `layer_norm_quantize`.
        dtype: of the floats in between.

    Returns:
        As `add_layer_norm_quantize`; `y` and `h` of `dtype`.
    """
    h = _float(x, x_scale, dtype) + _float(residual, residual_scale, dtype, residual_rotated)
    y = torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return (*numerics.quantize_per_token(y, rotated), y, h)


@dialect_op
def int8_add_rms_norm_quantize(
    x: Tensor,
    x_scale: Tensor | None,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_rotated: bool,
    weight: Tensor | None,
    eps: float,
    rotated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The RMSNorm twin of `int8_add_layer_norm_quantize`; shapes as there: `[..., K]`."""
    h = _float(x, x_scale, dtype) + _float(residual, residual_scale, dtype, residual_rotated)
    y = torch.nn.functional.rms_norm(h, h.shape[-1:], weight, eps)
    return (*numerics.quantize_per_token(y, rotated), y, h)


def _float(x: Tensor, scale: Tensor | None, dtype: torch.dtype, rotated: bool = False) -> Tensor:
    return x if scale is None else numerics.dequantize(x, scale, dtype, rotated)
