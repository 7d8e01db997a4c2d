"""GeMM of ZeroQuant: INT8 x INT8 -> INT32, and the scales applied to the sum.

    Y_ij = (sum_k Xq_ik Wq_jk) * s_w[j] * s_x[i] + b[j]          (ZeroQuant, section 4: row scale times column scale)

Reads M*K + N*K bytes, writes M*N elements. The integer sum is exact for K <= 2^31 / 127^2; the epilogue is float32,
multiplied in the order written above so that lowerings can agree bit for bit.

ZeroQuant-HERO's feature-wise input (FWQ) has no row scale: its scales are in the weight, `W~ = diag(f_in) W`, before
that is quantized. Its GeMM^quant writes INT8: the output's scale is in `s_w` and `b`, so the epilogue only rounds. FC1
followed by GELU^quant is one op too: the paper's X1, four times as wide as the rest of the layer, is never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..torch_private import int_mm
from .registry import dialect_op

MAX_K = 2**31 // (255 * 128)  # kernels shift activations to unsigned, so the sum is bounded by 255 * 128 * K


@dialect_op
def int8_linear(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """INT8 linear that writes floats.

    Args:
        x_q: `[..., K]` int8.
        x_scale: `[..., 1]` float32, real value per step of each row; None for a feature-wise input.
        w_q: `[N, K]` int8 in [-127, 127].
        w_scale: `[N, 1]` float32.
        bias: `[N]` float, or None.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[..., N]` of `out_dtype`; a NaN scale gives a row of NaN.
    """
    return _product(x_q, x_scale, w_q, w_scale, bias).to(out_dtype)


@dialect_op
def int8_linear_quantize(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """GeMM^quant: `int8_linear` that writes integers, with its output's scale divided out of `w_scale` and `bias`.

    Args:
        x_q, x_scale, w_q, w_scale, bias: as `int8_linear` takes them.

    Returns:
        `[..., N]` int8 in [-128, 127], rounded half to even, saturated; a NaN scale gives zeros.
    """
    y = _product(x_q, x_scale, w_q, w_scale, bias)
    return torch.nan_to_num(y.round(), nan=0.0).clamp(-128, 127).to(torch.int8)


@dialect_op
def int8_linear_gelu_quantize(
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    out_scale: Tensor,
) -> Tensor:
    """`gelu_quantize_static(int8_linear(..., dtype), approximate, out_scale)`: FC1 and GELU^quant in one pass.

    Args:
        x_q, x_scale, w_q, w_scale, bias: as `int8_linear` takes them.
        dtype: what a linear and a GELU of their own would round to in between.
        approximate: `"none"` (erf) or `"tanh"`.
        out_scale: `[1, ..., N]` float32.

    Returns:
        `[..., N]` int8; a NaN scale gives zeros.
    """
    y = _product(x_q, x_scale, w_q, w_scale, bias).to(dtype)
    return numerics.quantize_static(torch.nn.functional.gelu(y, approximate=approximate), out_scale)


def _product(x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    y = int_mm(x_q.reshape(-1, x_q.shape[-1]), w_q.t()).float() * w_scale.reshape(1, -1)
    if x_scale is not None:
        y = y * x_scale.reshape(-1, 1)
    if bias is not None:
        y = y + bias.float()
    return y.reshape(*x_q.shape[:-1], w_q.shape[0])
