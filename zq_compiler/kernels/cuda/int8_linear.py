"""INT8 linear: sums of products on tensor cores, exact, and everything that follows a linear in its epilogue.

    y = ((sum_k Xq_ik Wq_jk) * s_w[j]) * s_x[i] + b[j]       float32, in the reference's order, so that bits are equal

then, of y: rounded to a float dtype; to INT8; GELU and INT8; a residual added; or a low-rank branch added. Reads
M*K + N*K bytes and writes M*N elements once. Weights lie as they are stored: `[N, K]` is what tensor cores read.

Where M and N make too few tiles, programs sum parts of K into slices of a workspace, which a second kernel adds up:
8 * SPLIT_K * M * N bytes through the cache. Atomic sums would take less above two slices, but one word at a time,
and a third launch, to clear them. Integers are exact in any order.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int8_linear import int8_linear as dialect_int8_linear
from ..int8_linear import int8_linear_gelu_quantize as dialect_int8_linear_gelu_quantize
from ..int8_linear import int8_linear_quantize as dialect_int8_linear_quantize
from .arithmetic import EXACT, gelu, quantize_static, saturate_to_int8
from .configs import Problem, choose
from .linear_tiles import finish, tile_of
from .low_rank_linear import block_of_ranks, contiguous, low_rank_tile
from .matmul_configs import matmul_config
from .registration import architecture, cuda_op, leading, provides, rows_of

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def int8_product(
    x_ptr, w_ptr, rows, columns, last_row, N, K, first_k, last_k,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`x[rows, first_k:last_k] @ w[columns, first_k:last_k]^T` as int32 `[BLOCK_M, BLOCK_N]`."""
    features = first_k + tl.arange(0, BLOCK_K)
    columns = tl.minimum(columns, N - 1)  # instead of a mask: what they give is not stored
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + features[None, :]
    w_ptrs = w_ptr + columns[:, None].to(tl.int64) * K + features[None, :]
    inside = rows[:, None] < last_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(first_k, last_k, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=inside, other=0)
            w = tl.load(w_ptrs)
        else:
            within = k + tl.arange(0, BLOCK_K)[None, :] < last_k
            x = tl.load(x_ptrs, mask=inside & within, other=0)
            w = tl.load(w_ptrs, mask=within, other=0)
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def _epilogue(
    acc, rows, columns, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    hidden_ptr, u_ptr, u_scale_ptr, M, N, R,
    X_SCALE_STRIDE: tl.constexpr, DTYPE: tl.constexpr, TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The epilogue: what is None is left out."""
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    valid_rows, valid_columns = tl.minimum(rows, M - 1)[:, None], (columns < N)[None, :]
    y = finish(
        acc.to(tl.float32), valid_rows, columns[None, :], valid_columns,
        w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE, bias_ptr, 1.0,
    )  # fmt: skip
    if out_scale_ptr is not None:
        scale = tl.load(out_scale_ptr + columns, mask=columns < N, other=1.0)
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        y = gelu(y.to(DTYPE).to(tl.float32), TANH).to(DTYPE).to(tl.float32)
        tl.store(out_ptr + offsets, quantize_static(y, scale[None, :], reciprocal[None, :]), mask=inside)
    elif out_ptr.dtype.element_ty == tl.int8:
        tl.store(out_ptr + offsets, saturate_to_int8(y), mask=inside)
    else:
        if residual_ptr is not None:
            y = y.to(DTYPE).to(tl.float32) + tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if hidden_ptr is not None:
            y = y.to(DTYPE).to(tl.float32) + low_rank_tile(
                hidden_ptr, u_ptr, u_scale_ptr, rows, columns, M, N, R, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R
            )
        tl.store(out_ptr + offsets, y.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _int8_linear(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    hidden_ptr, u_ptr, u_scale_ptr, M, N, K, R,
    X_SCALE_STRIDE: tl.constexpr, DTYPE: tl.constexpr, TANH: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = int8_product(x_ptr, w_ptr, rows, columns, M, N, K, 0, K, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    _epilogue(
        acc, rows, columns, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
        hidden_ptr, u_ptr, u_scale_ptr, M, N, R, X_SCALE_STRIDE, DTYPE, TANH, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _int8_partial_sums(
    x_ptr, w_ptr, sums_ptr, M, N, K,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Slice s of `[SPLIT_K, M, N]`: the sums over the s-th part of K."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.cdiv(K, BLOCK_K * SPLIT_K) * BLOCK_K
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, K)
    acc = int8_product(x_ptr, w_ptr, rows, columns, M, N, K, first, last, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K)
    sums_ptr += tl.program_id(1).to(tl.int64) * M * N
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(sums_ptr + rows[:, None].to(tl.int64) * N + columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _int8_finish(
    sums_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    hidden_ptr, u_ptr, u_scale_ptr, M, N, R,
    X_SCALE_STRIDE: tl.constexpr, DTYPE: tl.constexpr, TANH: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = rows[:, None].to(tl.int64) * N + columns[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(sums_ptr + (tl.cast(M, tl.int64) * N * part + offsets), mask=inside, other=0)
    _epilogue(
        acc, rows, columns, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
        hidden_ptr, u_ptr, u_scale_ptr, M, N, R, X_SCALE_STRIDE, DTYPE, TANH, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


def _linear(
    op: str,
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    tanh: bool = False,
    out_scale: Tensor | None = None,
    hidden: Tensor | None = None,
    u: Tensor | None = None,
    u_scale: Tensor | None = None,
) -> Tensor:
    """One launch, or two with K split. `dtype` is what the linear rounds to, `out_dtype` what is written."""
    x, m, k = rows_of(x_q)
    n, r = w_q.shape[0], 0 if u is None else u.shape[1]
    out = torch.empty(leading(x_q, n), dtype=out_dtype, device=x_q.device)
    if not m:
        return out
    if out_scale is not None:
        out_scale = out_scale.expand(*out_scale.shape[:-1], n)
    epilogue = (out, *contiguous(x_scale, w_scale, bias, residual, out_scale, hidden, u, u_scale))
    flags = {"X_SCALE_STRIDE": scale_stride(x_scale), "DTYPE": TRITON_DTYPE[dtype], "TANH": tanh}
    flags["BLOCK_R"] = block_of_ranks(r)
    w, largest = w_q.contiguous(), 128 * 256
    if out_scale is not None or hidden is not None or out_dtype is torch.float32 or n % 16:
        largest = 128 * 128  # registers: a GELU's, a second sum's, those of wide results or of their addresses
    if hidden is not None and out_dtype is torch.float32:
        largest = 64 * 64
    formula = partial(matmul_config, largest_tile=largest, most_k=32 if k % 16 else 256)
    config = choose(Problem(op, m, n, k, str(dtype).removeprefix("torch.")), architecture(x.device), formula)
    splits = config.pop("SPLIT_K")
    tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
    config["EVEN_K"] = k % (config["BLOCK_K"] * splits) == 0
    if splits == 1:
        _int8_linear[(tiles,)](x, w, *epilogue, m, n, k, r, **flags, **config, **EXACT)
        return out
    sums = torch.empty(splits, m, n, dtype=torch.int32, device=x.device)
    _int8_partial_sums[(tiles, splits)](x, w, sums, m, n, k, SPLIT_K=splits, **config, **EXACT)
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 64))
    _int8_finish[grid](sums, *epilogue, m, n, r, **flags, BLOCK_M=16, BLOCK_N=64, SPLIT_K=splits, num_warps=4, **EXACT)
    return out


def scale_stride(x_scale: Tensor | None) -> int:
    """How far apart two rows' scales lie: 0 where there is one."""
    return 0 if x_scale is None or x_scale.numel() == 1 else 1


@provides(dialect_int8_linear)
def int8_linear(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`zq::int8_linear`: equal bits."""
    return _linear("int8_linear", x_q, x_scale, w_q, w_scale, bias, out_dtype, out_dtype)


@provides(dialect_int8_linear_quantize)
def int8_linear_quantize(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`zq::int8_linear_quantize`: equal bits."""
    return _linear("int8_linear_quantize", x_q, x_scale, w_q, w_scale, bias, torch.float32, torch.int8)


@provides(dialect_int8_linear_gelu_quantize)
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
    """`zq::int8_linear_gelu_quantize`: at most one step off, where a device's erf or exp is."""
    tanh = approximate == "tanh"
    return _linear(
        "int8_linear_gelu_quantize", x_q, x_scale, w_q, w_scale, bias, dtype, torch.int8, tanh=tanh, out_scale=out_scale
    )


def _fake(
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *rest: object,
) -> Tensor:
    dtype = rest[-1]
    assert isinstance(dtype, torch.dtype)
    return x_q.new_empty(*x_q.shape[:-1], w_q.shape[0], dtype=dtype)


@cuda_op(_fake)
def int8_linear_add(
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`int8_linear(...) + residual`: equal bits.

    Args:
        residual: `[..., N]` of `out_dtype`.
    """
    return _linear("int8_linear_add", x_q, x_scale, w_q, w_scale, bias, out_dtype, out_dtype, residual=residual)


@cuda_op(_fake)
def int8_linear_low_rank(
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    u: Tensor,
    u_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`low_rank_linear(int8_linear(...), x, v, u, ...)`, given what its ranks see of x.

    Args:
        hidden: `[..., r]` of `out_dtype`; see `low_rank_hidden`.
        u, u_scale: as `low_rank_linear` takes them.
    """
    return _linear(
        "int8_linear_low_rank",
        x_q,
        x_scale,
        w_q,
        w_scale,
        bias,
        out_dtype,
        out_dtype,
        hidden=hidden,
        u=u,
        u_scale=u_scale,
    )
