"""Static quantize, INT8 and FP8, and dequantize: element by element, one pass.

    q = round(x / scale)  or  e4m3(x / scale);  x = q * scale, rotated back where it was rotated

A scale broadcasts: one element, one a feature, one a row, or along other dimensions. Reciprocals are taken once a tile.
Tensors are gone through in the order that they lie in memory, so that a transposed one is read and written in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import dequantize as dialect_dequantize
from ..quantize import quantize_static as dialect_quantize_static
from ..quantize import quantize_static_fp8 as dialect_quantize_static_fp8
from .arithmetic import EXACT, rotate, saturate_to_fp8, saturate_to_int8, static_steps
from .configs import choose_rows, tile_config
from .registration import broadcast_rows, provides, strided_rows


@triton.jit
def load_scale(ptr, rows, features, M, repeat, count, K, A_ROW: tl.constexpr, A_FEATURE: tl.constexpr):
    """The scales of a tile, `[M or 1, K or 1]`: row i has the scales of row `i // repeat % count` of ptr's."""
    offsets = tl.zeros((1, 1), tl.int32)
    known = tl.full((1, 1), True, tl.int1)
    if A_ROW:
        offsets += rows // repeat % count * (K if A_FEATURE else 1)
        known &= rows < M
    if A_FEATURE:
        offsets += features
        known &= features < K
    return tl.load(ptr + offsets, mask=known, other=1.0)


@triton.jit
def _quantize_static(
    x_ptr,
    scale_ptr,
    q_ptr,
    M,
    K,
    stride,
    repeat,
    count,
    FP8: tl.constexpr,
    A_ROW: tl.constexpr,
    A_FEATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(K, BLOCK_K)  # of a row; along one axis, of which a grid has most
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (features < K)
    x = tl.load(x_ptr + rows.to(tl.int64) * stride + features, mask=inside, other=0.0).to(tl.float32)
    scale = load_scale(scale_ptr, rows, features, M, repeat, count, K, A_ROW, A_FEATURE)
    steps = static_steps(x, scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    q = saturate_to_fp8(steps) if FP8 else saturate_to_int8(steps)
    tl.store(q_ptr + rows.to(tl.int64) * K + features, q, mask=inside)


@triton.jit
def _dequantize(
    q_ptr,
    scale_ptr,
    x_ptr,
    M,
    K,
    stride,
    repeat,
    count,
    ROTATED: tl.constexpr,
    A_ROW: tl.constexpr,
    A_FEATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(K, BLOCK_K)  # of a row; along one axis, of which a grid has most
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (features < K)
    q = tl.load(q_ptr + rows.to(tl.int64) * stride + features, mask=inside, other=0.0).to(tl.float32)
    x = q * load_scale(scale_ptr, rows, features, M, repeat, count, K, A_ROW, A_FEATURE)
    if ROTATED:
        x = rotate(x, BLOCK_M, BLOCK_K)
    tl.store(x_ptr + rows.to(tl.int64) * K + features, x.to(x_ptr.dtype.element_ty), mask=inside)


def _each_element(op: str, kernel, x: Tensor, scale: Tensor, out: Tensor, **flags: bool) -> Tensor:
    """Launch a kernel of tiles over x and out, in the order of out's memory."""
    if not x.dim():
        _each_element(op, kernel, x.unsqueeze(0), scale, out.unsqueeze(0), **flags)
        return out
    order = sorted(range(x.dim()), key=lambda d: out.stride()[d], reverse=True)
    scale = scale.reshape((1,) * (x.dim() - scale.dim()) + scale.shape).permute(order)
    if x.numel():
        rows, m, k, stride = strided_rows(x.permute(order))
        scales, repeat = broadcast_rows(scale, [x.shape[d] for d in order])
        config = choose_rows(op, x, m, k, tile_config(m, k))
        grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(k, config["BLOCK_K"]),)
        sizes = {"A_ROW": scales.shape[0] > 1, "A_FEATURE": scales.shape[1] > 1}
        kernel[grid](rows, scales, out, m, k, stride, repeat, scales.shape[0], **flags, **sizes, **config, **EXACT)
    return out


@provides(dialect_quantize_static)
def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """`zq::quantize_static`: x float, `scale` float32 that broadcasts -> int8 of x's shape."""
    return _each_element(
        "quantize_static", _quantize_static, x, scale, torch.empty_like(x, dtype=torch.int8), FP8=False
    )


@provides(dialect_quantize_static_fp8)
def quantize_static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """`zq::quantize_static_fp8`: x float, `scale` float32 that broadcasts -> float8_e4m3fn; from sm_89 on."""
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return _each_element("quantize_static_fp8", _quantize_static, x, scale, q, FP8=True)


@provides(dialect_dequantize)
def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
    """`zq::dequantize`: `q [..., K]` int8 or float8_e4m3fn, `scale` float32 that broadcasts -> `dtype`, q's shape."""
    layout = torch.contiguous_format if rotated else torch.preserve_format
    out = torch.empty_like(q, dtype=dtype, memory_format=layout)
    return _each_element("dequantize", _dequantize, q, scale, out, ROTATED=rotated)
