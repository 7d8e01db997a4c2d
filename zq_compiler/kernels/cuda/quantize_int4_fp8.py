"""Token-wise quantize to INT4 and to FP8 E4M3, one pass, as the INT8 form in quantize.py.

a = max(|row|);  q = round((x / a) / (1/7.5))  or  e4m3((x / a) / (1/448));  scale = a * (1/7.5)  or  a * (1/448)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import quantize_per_token_fp8 as dialect_quantize_per_token_fp8
from ..quantize import quantize_per_token_int4 as dialect_quantize_per_token_int4
from .arithmetic import EXACT, quantize_rows_fp8, quantize_rows_int4, rotate
from .configs import LONG, choose_rows, row_config
from .registration import leading, provides, strided_rows


@triton.jit
def _quantize_per_token(
    x_ptr,
    q_ptr,
    scale_ptr,
    M,
    stride,
    FP8: tl.constexpr,
    ROTATED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows[:, None] < M) & (features < K)
    long_rows = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + long_rows * stride + features, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        x = rotate(x, BLOCK_M, BLOCK_K)
    if FP8:
        q, scale = quantize_rows_fp8(x)
    else:
        q, scale = quantize_rows_int4(x)
    tl.store(q_ptr + long_rows * K + features, q, mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


def _quantize(x: Tensor, dtype: torch.dtype, rotated: bool) -> tuple[Tensor, Tensor]:
    q, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty(leading(x, 1), dtype=torch.float32)
    rows, m, k, stride = strided_rows(x)
    if m:
        # A rotation and a cast need registers beside the elements': see quantize.py.
        config = row_config(m, k, elements=64) if k > LONG // 2 else row_config(m, k)
        name = "quantize_per_token_int4" if dtype is torch.int8 else "quantize_per_token_fp8"
        config = choose_rows(name, x, m, k, config, "rotated" if rotated else "")
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        flags = {"FP8": dtype is torch.float8_e4m3fn, "ROTATED": rotated, "K": k}
        _quantize_per_token[grid](rows, q, scale, m, stride, **flags, **config, **EXACT)
    return q, scale


@provides(dialect_quantize_per_token_int4, contiguous=True)
def quantize_per_token_int4(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`zq::quantize_per_token_int4`: `x [..., K]` float -> `q [..., K]` int8 in [-7, 7], `scale [..., 1]` float32."""
    return _quantize(x, torch.int8, rotated)


@provides(dialect_quantize_per_token_fp8, contiguous=True)
def quantize_per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`zq::quantize_per_token_fp8`: `x [..., K]` float -> `q [..., K]` float8_e4m3fn, `scale [..., 1]` float32; from
    sm_89 on."""
    return _quantize(x, torch.float8_e4m3fn, False)
