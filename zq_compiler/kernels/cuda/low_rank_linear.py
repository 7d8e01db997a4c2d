"""The low-rank branch (LoRC) as two thin products: what the ranks see of x, and that added to a linear's result.

    H = x V^T  (`low_rank_hidden`)        Y' = Y + H U^T  (`low_rank_linear`, or the epilogue of `int8_linear_low_rank`)

Sums are float32; H, H U^T and the whole are rounded to the activations' dtype, as the reference does. A product of
float32 is three of TF32, which leave out two of its last places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..low_rank_linear import low_rank_linear as dialect_low_rank_linear
from .arithmetic import EXACT
from .registration import cuda_op, leading, provides, rows_of

MOST_RANKS = 32  # at a time


@triton.jit
def factor_tile(pointers, inside, scale, DTYPE: tl.constexpr):
    """`kernels.low_rank_linear.factor` of a tile, given its ranks' scales or None."""
    stored = tl.load(pointers, mask=inside, other=0)
    if scale is not None:
        stored = stored.to(tl.float32) * scale.to(DTYPE).to(tl.float32)
    return stored.to(DTYPE)


@triton.jit
def low_rank_tile(
    hidden_ptr, u_ptr, u_scale_ptr, rows, columns, M, N, R,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H U^T of a tile, rounded to DTYPE, as float32 `[BLOCK_M, BLOCK_N]`."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        hidden = tl.load(hidden_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :], mask=inside, other=0.0)
        scale = None
        if u_scale_ptr is not None:
            scale = tl.load(u_scale_ptr + ranks, mask=ranks < R, other=0.0)[None, :]
        inside = (columns[:, None] < N) & (ranks[None, :] < R)
        u = factor_tile(u_ptr + columns[:, None] * R + ranks[None, :], inside, scale, DTYPE)
        acc = tl.dot(hidden, u.T, acc, input_precision="tf32x3")
    return acc.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _low_rank_hidden(
    x_ptr, v_ptr, v_scale_ptr, hidden_ptr, M, K, R,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    features = tl.arange(0, BLOCK_K)
    scale = None
    if v_scale_ptr is not None:
        scale = tl.load(v_scale_ptr + ranks, mask=ranks < R, other=0.0)[:, None]
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + features[None, :]
    v_ptrs = v_ptr + ranks[:, None] * K + features[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, K, BLOCK_K):
        x_inside, v_inside = rows[:, None] < M, ranks[:, None] < R
        if not EVEN_K:
            x_inside &= first + features[None, :] < K
            v_inside &= first + features[None, :] < K
        x = tl.load(x_ptrs, mask=x_inside, other=0.0)
        v = factor_tile(v_ptrs, v_inside, scale, x.dtype)
        acc = tl.dot(x, v.T, acc, input_precision="tf32x3")
        x_ptrs += BLOCK_K
        v_ptrs += BLOCK_K
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    hidden = acc.to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :], hidden, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _add_low_rank(
    y_ptr, hidden_ptr, u_ptr, u_scale_ptr, out_ptr, M, N, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y += low_rank_tile(hidden_ptr, u_ptr, u_scale_ptr, rows, columns, M, N, R, dtype, BLOCK_M, BLOCK_N, BLOCK_R)
    tl.store(out_ptr + offsets, y.to(dtype), mask=inside)


def block_of_ranks(r: int) -> int:
    """How many ranks a product takes at a time: what tensor cores need at least, or all of them."""
    return max(16, min(triton.next_power_of_2(r), MOST_RANKS))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each of them as kernels read it."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _hidden_fake(x: Tensor, v: Tensor, v_scale: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], v.shape[0])


@cuda_op(_hidden_fake)
def low_rank_hidden(x: Tensor, v: Tensor, v_scale: Tensor | None = None) -> Tensor:
    """What the ranks see of x: `linear(x, v)`.

    Args:
        x, v, v_scale: as `low_rank_linear` takes them.

    Returns:
        `[..., r]` of x's dtype.
    """
    rows, m, k = rows_of(x)
    r = v.shape[0]
    hidden = torch.empty(leading(x, r), dtype=x.dtype, device=x.device)
    if m:
        block_m, row_bytes = (16, 256) if m <= 1024 else (64, 128)
        block_k, block_r = row_bytes // x.element_size(), block_of_ranks(r)
        grid = (triton.cdiv(m, block_m), triton.cdiv(r, block_r))
        _low_rank_hidden[grid](
            rows, *contiguous(v, v_scale), hidden, m, k, r, k % block_k == 0, block_m, block_r, block_k,
            num_warps=4, num_stages=4, **EXACT,
        )  # fmt: skip
    return hidden


@provides(dialect_low_rank_linear, contiguous=True)
def low_rank_linear(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, v_scale: Tensor | None = None, u_scale: Tensor | None = None
) -> Tensor:
    """`zq::low_rank_linear`, for a linear that has no such epilogue: two launches."""
    rows, m, n = rows_of(y)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if m:
        r, block_n = u.shape[1], 128
        block_m = 16 if m <= 16 or y.dtype is torch.float32 else 64
        hidden = low_rank_hidden(x, v, v_scale)
        grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
        _add_low_rank[grid](
            rows, hidden, *contiguous(u, u_scale), out, m, n, r, block_m, block_n, block_of_ranks(r),
            num_warps=4, **EXACT,
        )  # fmt: skip
    return out
