"""Token-wise quantize, one pass: reads a row, keeps it in registers, writes its integers and its scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantize import quantize_per_token as dialect_quantize_per_token
from .arithmetic import EXACT, quantize_rows, rotate
from .configs import LONG, choose_rows, row_config
from .registration import leading, provides, strided_rows


@triton.jit
def _quantize_per_token(
    x_ptr, q_ptr, scale_ptr, M, K, X_STRIDE, ROTATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < M) & (features[None, :] < K)
    row = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + row * X_STRIDE + features[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        x = rotate(x, BLOCK_M, BLOCK_K)
    q, scale = quantize_rows(x)
    tl.store(q_ptr + row * K + features[None, :], q, mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@provides(dialect_quantize_per_token, contiguous=True)
def quantize_per_token(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`zq::quantize_per_token`: `x [..., K]` float -> `q [..., K]` int8, `scale [..., 1]` float32."""
    rows, m, k, stride = strided_rows(x)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(leading(x, 1), dtype=torch.float32, device=x.device)
    if m:
        # A rotation needs registers beside its elements': of the longest rows half as many threads have twice as many.
        config = row_config(m, k, elements=64) if rotated and k > LONG // 2 else row_config(m, k)
        config = choose_rows("quantize_per_token", x, m, k, config, "rotated" if rotated else "")
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        _quantize_per_token[grid](rows, q, scale, m, k, stride, rotated, **config, **EXACT)
    return q, scale
