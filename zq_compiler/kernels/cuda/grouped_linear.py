"""INT8 linears of experts in one launch: each has some of the rows, as many as the router gave it.

    Y[rows of e] = int8_linear(X[rows of e], W[e])       rows of expert e: offsets[e - 1] up to offsets[e]

How many rows an expert has stays on the device: the grid is as large as it can ever get, T / BLOCK_M tiles of rows and
one more for each expert, and a program finds out there whose tile it has, or that it has none.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EXACT
from .configs import Problem, choose
from .int8_linear import int8_product, scale_stride
from .linear_tiles import finish, tile_of
from .low_rank_linear import contiguous
from .matmul_configs import matmul_config
from .registration import architecture, cuda_op, leading, rows_of


@triton.jit(do_not_specialize=["TILES"])
def _grouped_int8_linear(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, offsets_ptr, out_ptr, TILES, N, K, E,
    X_SCALE_STRIDE: tl.constexpr, BLOCK_E: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), TILES * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    experts = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_ptr + experts, mask=experts < E, other=0)
    start = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts < E), other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    end_tile = tl.cumsum(tiles, 0)
    expert = tl.sum((end_tile <= tile_m).to(tl.int32), 0)
    if expert >= E:
        return
    mine = experts == expert
    first_row = tl.sum(tl.where(mine, start + (tile_m - end_tile + tiles) * BLOCK_M, 0), 0)
    last_row = tl.sum(tl.where(mine, end, 0), 0)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptr += expert.to(tl.int64) * N * K
    acc = int8_product(x_ptr, w_ptr, rows, columns, last_row, N, K, 0, K, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    y = finish(
        acc.to(tl.float32), tl.minimum(rows, last_row - 1)[:, None], columns[None, :], (columns < N)[None, :],
        w_scale_ptr + expert * N, x_scale_ptr, X_SCALE_STRIDE, None, 1.0,
    )  # fmt: skip
    inside = (rows[:, None] < last_row) & (columns[None, :] < N)
    out_ptrs = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)


def _fake(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return x_q.new_empty(*x_q.shape[:-1], w_q.shape[1], dtype=out_dtype)


@cuda_op(_fake)
def grouped_int8_linear(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """See the module's docstring; equal bits to `int8_linear` of each expert.

    Args:
        x_q: `[T, K]` int8, rows in the order of their experts.
        x_scale: `[T, 1]` float32, one element, or None.
        w_q: `[E, N, K]` int8.
        w_scale: `[E, N]` or `[E, N, 1]` float32.
        offsets: `[E]` int32, where each expert's rows end, as `torch._grouped_mm` takes them.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[T, N]` of `out_dtype`. Rows behind the last expert's are not written.
    """
    x, t, k = rows_of(x_q)
    experts, n, _ = w_q.shape
    out = torch.empty(leading(x_q, n), dtype=out_dtype, device=x_q.device)
    if not t:
        return out
    formula = partial(matmul_config, split=False, products=experts, largest_tile=128 * 128)  # few rows are left over
    problem = Problem("grouped_int8_linear", triton.cdiv(t, experts), n, k, str(out_dtype).removeprefix("torch."))
    config = choose(problem, architecture(x.device), formula)
    del config["SPLIT_K"]
    tiles = t // config["BLOCK_M"] + min(experts, t)
    _grouped_int8_linear[(tiles * triton.cdiv(n, config["BLOCK_N"]),)](
        x, *contiguous(x_scale, w_q, w_scale, offsets), out, tiles, n, k, experts,
        scale_stride(x_scale), max(2, triton.next_power_of_2(experts)),  # a scan is of two at least
        k % config["BLOCK_K"] == 0, **config, **EXACT,
    )  # fmt: skip
    return out
