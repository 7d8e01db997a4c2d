"""GELU^quant and SiLU-mul^quant, token-wise or static, one pass: reads the activation's input, writes integers.

    y = gelu(x)  or  silu(gate) * up;  (q, scale) = quantize_per_token(y, rotated)  or  q = quantize_static(y, scale)

silu(gate) and y are rounded to the inputs' dtype, as tensors between ops would be. The two halves of one projection are
read where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gelu_quantize import gelu_quantize as dialect_gelu_quantize
from ..gelu_quantize import gelu_quantize_static as dialect_gelu_quantize_static
from ..silu_mul_quantize import silu_mul_quantize as dialect_silu_mul_quantize
from ..silu_mul_quantize import silu_mul_quantize_static as dialect_silu_mul_quantize_static
from .arithmetic import EXACT, FLOATS, gelu, quantize_rows, quantize_static, rotate, rounded, silu
from .configs import choose_rows, row_config, tile_config
from .quantize_static import load_scale
from .registration import broadcast_rows, leading, provides, strided_rows


@triton.jit
def _activation(x_ptr, up_ptr, x_offsets, up_offsets, inside, TANH: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of gelu(x), or of silu(x) * up where up is given."""
    x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    if up_ptr is None:
        y = gelu(x, TANH)
    else:
        y = rounded(silu(x), DTYPE) * tl.load(up_ptr + up_offsets, mask=inside, other=0.0).to(tl.float32)
    return rounded(y, DTYPE)


@triton.jit
def _activation_quantize(
    x_ptr,
    up_ptr,
    q_ptr,
    scale_ptr,
    M,
    x_stride,
    up_stride,
    TANH: tl.constexpr,
    DTYPE: tl.constexpr,
    ROTATED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows[:, None] < M) & (features < K)
    long_rows = rows[:, None].to(tl.int64)
    y = _activation(
        x_ptr, up_ptr, long_rows * x_stride + features, long_rows * up_stride + features, inside, TANH, DTYPE
    )
    if ROTATED:
        y = rotate(y, BLOCK_M, BLOCK_K)
    q, scale = quantize_rows(y)
    tl.store(q_ptr + long_rows * K + features, q, mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit
def _activation_quantize_static(
    x_ptr,
    up_ptr,
    scale_ptr,
    q_ptr,
    M,
    K,
    x_stride,
    up_stride,
    repeat,
    count,
    TANH: tl.constexpr,
    DTYPE: tl.constexpr,
    A_ROW: tl.constexpr,
    A_FEATURE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles = tl.cdiv(K, BLOCK_K)  # of a row; along one axis, of which a grid has most
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (features < K)
    long_rows = rows.to(tl.int64)
    y = _activation(
        x_ptr, up_ptr, long_rows * x_stride + features, long_rows * up_stride + features, inside, TANH, DTYPE
    )
    scale = load_scale(scale_ptr, rows, features, M, repeat, count, K, A_ROW, A_FEATURE)
    q = quantize_static(y, scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    tl.store(q_ptr + long_rows * K + features, q, mask=inside)


def _token_wise(x: Tensor, up: Tensor | None, approximate: str, rotated: bool) -> tuple[Tensor, Tensor]:
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(leading(x, 1), dtype=torch.float32)
    rows, m, k, stride = strided_rows(x)
    others, _, _, up_stride = strided_rows(up) if up is not None else (None, m, k, k)
    if m:
        op = "gelu_quantize" if up is None else "silu_mul_quantize"
        config = choose_rows(op, x, m, k, row_config(m, k), "rotated" if rotated else "")
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        flags = {"TANH": approximate == "tanh", "DTYPE": FLOATS[x.dtype], "ROTATED": rotated, "K": k}
        _activation_quantize[grid](rows, others, q, scale, m, stride, up_stride, **flags, **config, **EXACT)
    return q, scale


def _static(x: Tensor, up: Tensor | None, approximate: str, scale: Tensor) -> Tensor:
    q = x.new_empty(x.shape, dtype=torch.int8)
    rows, m, k, stride = strided_rows(x)
    others, _, _, up_stride = strided_rows(up) if up is not None else (None, m, k, k)
    if m:
        scales, repeat = broadcast_rows(scale, x.shape)
        op = "gelu_quantize_static" if up is None else "silu_mul_quantize_static"
        config = choose_rows(op, x, m, k, tile_config(m, k))
        grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(k, config["BLOCK_K"]),)
        flags = {"TANH": approximate == "tanh", "DTYPE": FLOATS[x.dtype]}
        flags |= {"A_ROW": scales.shape[0] > 1, "A_FEATURE": scales.shape[1] > 1}
        arguments = rows, others, scales, q, m, k, stride, up_stride, repeat, scales.shape[0]
        _activation_quantize_static[grid](*arguments, **flags, **config, **EXACT)
    return q


@provides(dialect_gelu_quantize, contiguous=True)
def gelu_quantize(x: Tensor, approximate: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`zq::gelu_quantize`: `x [..., K]` float -> `q [..., K]` int8, `scale [..., 1]` float32."""
    return _token_wise(x, None, approximate, rotated)


@provides(dialect_gelu_quantize_static, contiguous=True)
def gelu_quantize_static(x: Tensor, approximate: str, scale: Tensor) -> Tensor:
    """`zq::gelu_quantize_static`: `x [..., K]` float, `scale` float32 that broadcasts -> `[..., K]` int8."""
    return _static(x, None, approximate, scale)


@provides(dialect_silu_mul_quantize, contiguous=True)
def silu_mul_quantize(gate: Tensor, up: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`zq::silu_mul_quantize`: `gate, up [..., K]` float -> `q [..., K]` int8, `scale [..., 1]` float32."""
    return _token_wise(gate, up, "none", rotated)


@provides(dialect_silu_mul_quantize_static, contiguous=True)
def silu_mul_quantize_static(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """`zq::silu_mul_quantize_static`: `gate, up [..., K]` float, `scale` float32 that broadcasts -> `[..., K]` int8."""
    return _static(gate, up, "none", scale)
