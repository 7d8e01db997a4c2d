"""Residual add, LayerNorm or RMSNorm, and token-wise quantize, one pass: a row is read once and stays in registers.

    h = x + residual;  y = norm(h);  (q, scale) = quantize_per_token(y, rotated)

x may be integers with a scale a feature, the residual integers with a scale a row, perhaps rotated (ZeroQuant-HERO's
LN^quant). h and y are rounded to the floats' dtype as tensors between ops would be, and written where they are wanted;
statistics are float32, the variance summed over differences to the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EXACT, FLOATS, quantize_rows, rotate, rounded
from .configs import LONG, Config, choose_rows, row_config
from .registration import cuda_op, leading, strided_rows


@triton.jit
def norm(h, inside, features, weight_ptr, bias_ptr, eps, K: tl.constexpr, RMS: tl.constexpr):
    """LayerNorm, or RMSNorm, of a tile `[M, K]` whose rows are whole; zeros where there is no feature."""
    count = tl.full((h.shape[0],), K, tl.float32)
    if not RMS:
        mean = tl.div_rn(tl.sum(h, axis=1), count)
        h = tl.where(inside, h - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(h * h, axis=1), count)
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    y = h * inverse[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + features, mask=features < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + features, mask=features < K, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_quantize(
    x_ptr,
    x_scale_ptr,
    residual_ptr,
    residual_scale_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    y_ptr,
    h_ptr,
    M,
    x_stride,
    residual_stride,
    eps,
    ONE_X_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    RMS: tl.constexpr,
    ROTATED: tl.constexpr,
    RESIDUAL_ROTATED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows[:, None] < M) & (features < K)
    long_rows = rows[:, None].to(tl.int64)
    offsets = long_rows * K + features
    h = tl.load(x_ptr + long_rows * x_stride + features, mask=inside, other=0).to(tl.float32)
    if x_scale_ptr is not None:
        if ONE_X_SCALE:
            h *= tl.load(x_scale_ptr)
        else:
            h *= tl.load(x_scale_ptr + features, mask=features < K, other=0.0)
        h = rounded(h, DTYPE)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + long_rows * residual_stride + features, mask=inside, other=0).to(tl.float32)
        if residual_scale_ptr is not None:
            r *= tl.load(residual_scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
            if RESIDUAL_ROTATED:
                r = rotate(r, BLOCK_M, BLOCK_K)
            r = rounded(r, DTYPE)
        h = rounded(h + r, DTYPE)
    if h_ptr is not None:
        tl.store(h_ptr + offsets, h.to(DTYPE), mask=inside)
    y = rounded(norm(h, inside, features, weight_ptr, bias_ptr, eps, K, RMS), DTYPE)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, y.to(DTYPE), mask=inside)
    if ROTATED:
        y = rotate(y, BLOCK_M, BLOCK_K)
    q, scale = quantize_rows(y)
    tl.store(q_ptr + offsets, q, mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


def norm_config(m: int, k: int) -> Config:
    """Parameters need registers beside the elements': of the longest rows fewer threads have more of them."""
    return {"maxnreg": 128, **row_config(m, k, elements=64 if k > LONG // 2 else 32)}


def _empty(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    want_y: bool,
    want_h: bool,
    rotated: bool = False,
    x_scale: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_rotated: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, h = (x.new_empty(x.shape if wanted else (0,), dtype=dtype or x.dtype) for wanted in (want_y, want_h))
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(leading(x, 1), dtype=torch.float32), y, h


@cuda_op(_empty)
def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    want_y: bool,
    want_h: bool,
    rotated: bool = False,
    x_scale: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_rotated: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All of the dialect's norms that quantize; the signature is that of `zq_cpu::norm_quantize`.

    Args:
        x: `[..., K]` float, or int8 with `x_scale` float32 of K elements or one.
        residual: `[..., K]` float, or int8 with `residual_scale [..., 1]` float32, or None.
        weight, bias: `[K]` or None.
        eps: added to the variance.
        rms: RMSNorm, else LayerNorm.
        want_y, want_h: whether y and h are written; else they are empty.
        rotated: the integers are those of `numerics.rotate(y)`.
        residual_rotated: the residual's integers are those of rotated features.
        dtype: of the floats in between; None is x's.

    Returns:
        `q [..., K]` int8, `scale [..., 1]` float32, `y` and `h` `[..., K]` of `dtype`.
    """
    q, scale, y, h = _empty(x, residual, weight, bias, eps, rms, want_y, want_h, dtype=dtype)
    rows, m, k, stride = strided_rows(x)
    others, _, _, residual_stride = strided_rows(residual) if residual is not None else (None, m, k, k)
    if m:
        variant = "rotated" if rotated or residual_rotated else ""
        config = choose_rows("norm_quantize", y, m, k, norm_config(m, k), variant)
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        _norm_quantize[grid](
            rows,
            x_scale.contiguous() if x_scale is not None else None,
            others,
            residual_scale.contiguous() if residual_scale is not None else None,
            weight.contiguous() if weight is not None else None,
            bias.contiguous() if bias is not None else None,
            q,
            scale,
            y if want_y else None,
            h if want_h else None,
            m,
            stride,
            residual_stride,
            eps,
            ONE_X_SCALE=x_scale is not None and x_scale.numel() == 1,
            DTYPE=FLOATS[y.dtype],
            RMS=rms,
            ROTATED=rotated,
            RESIDUAL_ROTATED=residual_rotated,
            K=k,
            **config,
            **EXACT,
        )
    return q, scale, y, h
