"""What products with weights of a few bits share: which tile a program has, and what becomes of its sums.

    Y_ij = sum_ij * s_w[j] * s_x[i] + b[j] + sum_r H_ir U_jr      each of the four where there is one

With SPLIT_K programs sum parts of K, `[SPLIT_K, M, N]`, which a second kernel adds in their order: always the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EXACT
from .configs import Config, Problem
from .low_rank_linear import block_of_ranks, contiguous, low_rank_tile
from .matmul_configs import CHIPS, FILL, LAUNCH, MOST_STAGES, SMALLEST, SPLITS, TILES
from .weight_layouts import Layout

Branch = tuple[Tensor | None, Tensor | None, Tensor | None]  # what a low-rank branch's ranks see of x, u and u's scale
DECODING = 0.011  # clocks of an SM for a weight's byte, from the instructions of the kernels' loops


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """A program's tile: GROUP_M tiles of rows take turns, so that weights are read from the cache for all of them."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * across) * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    within = pid % (GROUP_M * across)
    return first + within % height, within // height


@triton.jit
def finish(
    y, rows, outputs, inside, w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE: tl.constexpr, bias_ptr, FACTOR: tl.constexpr
):
    """Sums in float32 times both scales, plus bias. The weight's scale is taken FACTOR times; all of them broadcast."""
    if w_scale_ptr is not None:
        y = y * (tl.load(w_scale_ptr + outputs, mask=inside, other=0.0).to(tl.float32) * FACTOR)
    if x_scale_ptr is not None:
        y = y * tl.load(x_scale_ptr + rows * X_SCALE_STRIDE)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _finished(
    y, m, n, M, N, R, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
    X_SCALE_STRIDE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile `[BLOCK_M, BLOCK_N]` of whole sums, rounded to DTYPE."""
    rows, outputs = tl.minimum(m, M - 1)[:, None], n[None, :]
    y = finish(y.to(tl.float32), rows, outputs, outputs < N, w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE, bias_ptr, FACTOR)
    if hidden_ptr is not None:
        BLOCK_M: tl.constexpr = y.shape[0]
        BLOCK_N: tl.constexpr = y.shape[1]
        branch = low_rank_tile(hidden_ptr, u_ptr, u_scale_ptr, m, n, M, N, R, DTYPE, BLOCK_M, BLOCK_N, BLOCK_R)
        y = y.to(DTYPE).to(tl.float32) + branch
    return y.to(DTYPE)


@triton.jit
def store_tile(
    sums, y_ptr, part, m, n, M, N, R, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
    X_SCALE_STRIDE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """A tile `[BLOCK_N, BLOCK_M]` finished, or a part of its sums as it is."""
    y = sums.T
    if SPLIT_K == 1:
        y = _finished(
            y, m, n, M, N, R, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
            X_SCALE_STRIDE, FACTOR, BLOCK_R, y_ptr.dtype.element_ty,
        )  # fmt: skip
    offsets = (part.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    parts_ptr, y_ptr, M, N, R, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
    X_SCALE_STRIDE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    offsets = m[:, None].to(tl.int64) * N + n[None, :]
    total = tl.load(parts_ptr + offsets, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(parts_ptr + (tl.cast(M, tl.int64) * N * part + offsets), mask=inside, other=0)
    y = _finished(
        total, m, n, M, N, R, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
        X_SCALE_STRIDE, FACTOR, BLOCK_R, y_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(y_ptr + offsets, y, mask=inside)


def low_bit_config(
    problem: Problem,
    architecture: int,
    *,
    x_bytes: int,
    w_bytes: float,
    layout: Layout,
    integers: bool,
    split: bool,
    branch: bool,
    most_sums: int = 4096,
) -> Config:
    """A formula for `configs.choose`, of kernels that go through K in units of a layout.

    As `matmul_config` it ranks tiles by a roofline: for each K, a program takes what its tensor cores, its share of the
    cache or its decoding of weights takes, whichever is the most. Nothing was timed.

    Args:
        x_bytes: of an element of what is multiplied: 1, 2 or 4.
        w_bytes: of a code.
        integers: whether INT8 is multiplied.
        split: whether the kernel can split K.
        branch: whether a low-rank branch is added, whose sums need registers too.
        most_sums: that a warp can keep in registers.

    Returns:
        BLOCK_M, BLOCK_N, GROUP_M, SPLIT_K, num_warps and num_stages.
    """
    shape = problem.bucket, problem.n, problem.k
    if branch:  # sums of wgmma and tcgen05 need the fewest registers beside them; integers have no tcgen05
        most_sums = min(most_sums, 2048 if architecture == 90 or (architecture == 100 and not integers) else 1024)
    return dict(_low_bit_choice(*shape, architecture, x_bytes, w_bytes, layout, integers, split, most_sums))


@functools.cache
def _low_bit_choice(
    m: int,
    n: int,
    k: int,
    architecture: int,
    x_bytes: int,
    w_bytes: float,
    layout: Layout,
    integers: bool,
    split: bool,
    most_sums: int,
) -> Config:
    chip = CHIPS.get(architecture, SMALLEST)
    least = (m * k * x_bytes + n * k * w_bytes) / (chip.memory * chip.sms)
    ranked: list[tuple[float, float, int, Config]] = []
    for block_m, block_n, warps in ((16, 32, 2), *TILES, (64, 128, 8)):
        if (
            block_n < 16 * warps
            or block_m * block_n > min(128 * _largest(architecture, x_bytes), most_sums * warps)
            or (block_m >= 2 * m and block_m > 16)
        ):
            continue  # a warp decodes 16 outputs, which no other one has
        if not integers and x_bytes < 4 and not _fits_tensor_cores(architecture, block_m, block_n, x_bytes, layout):
            continue
        buffer = layout.unit * (block_m * x_bytes + block_n * w_bytes)
        stages = max(2, min(int(chip.shared / (2 if block_m * block_n <= 64 * 128 else 1) / buffer), MOST_STAGES))
        multiplies = block_m * block_n * x_bytes / chip.macs
        operands = (min(block_m, m) * x_bytes + block_n * w_bytes) / chip.cache
        decoding = block_n * x_bytes * DECODING
        resident = min(8 // (warps // 2), max(1, int(chip.shared / (stages * buffer))))  # programs on an SM at a time
        for split_k in SPLITS if split else (1,):
            steps = math.ceil(math.ceil(k / layout.unit) / split_k)
            if split_k > 1 and steps < stages:
                continue
            waves = math.ceil(math.ceil(m / block_m) * math.ceil(n / block_n) * split_k / chip.sms)
            products = waves * steps * layout.unit * max(multiplies, operands, decoding)
            clocks = products + math.ceil(waves / resident) * FILL
            adding = LAUNCH + 8 * split_k * m * n / (chip.cache * chip.sms) if split_k > 1 else 0
            config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_M": 8, "SPLIT_K": split_k}
            config |= {"num_warps": warps, "num_stages": stages}
            ranked.append((max(clocks, least) + adding, waves * (operands + decoding), len(ranked), config))
    return min(ranked)[-1]


def _largest(architecture: int, x_bytes: int) -> int:
    """Rows of 128 sums that registers hold beside the operands: of wgmma one is in shared memory, float32 has none."""
    if x_bytes == 4:
        return 32
    return 256 if architecture == 90 and x_bytes == 2 else 128


def _fits_tensor_cores(architecture: int, block_m: int, block_n: int, x_bytes: int, layout: Layout) -> bool:
    """wgmma and tcgen05 take 64 outputs at a time, and E4M3 has no other instruction there. tcgen05 has a memory of 512
    columns, of which Triton takes some for each tile's sums and values."""
    if architecture not in (90, 100):
        return True
    return (x_bytes == 2 or block_n >= 64) and (architecture == 90 or block_m * layout.tiles <= 256)


def add_parts(
    parts: Tensor,
    y: Tensor,
    epilogue: Sequence[Tensor | None],
    x_scale_stride: int = 0,
    factor: float = 1.0,
) -> None:
    """Sums `[SPLIT_K, M, N]` added, finished and written to `y [M, N]`.

    Args:
        epilogue: what `epilogue_of` gives.
    """
    split, m, n = parts.shape
    r = ranks_of(epilogue)
    block_m, block_n = (16, 64) if r else (1, 1024)  # a product has 16 rows
    grid = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    flags = x_scale_stride, factor, block_of_ranks(r), split, block_m, block_n
    _add_parts[grid](parts, y, m, n, r, *epilogue, *flags, num_warps=4, **EXACT)


def epilogue_of(
    w_scale: Tensor | None, x_scale: Tensor | None, bias: Tensor | None, branch: Branch
) -> tuple[Tensor | None, ...]:
    """What follows the sums, as `store_tile` reads it."""
    return contiguous(w_scale, x_scale, bias, *branch)


def weight_variant(format: str, group: int, branch: Branch) -> str:
    """What a linear's problem says of it beside its sizes."""
    return f"{format}, groups of {group}{', low rank' if branch[0] is not None else ''}"


def ranks_of(epilogue: Sequence[Tensor | None]) -> int:
    """Of its low-rank branch, 0 without one."""
    u = epilogue[4]
    return 0 if u is None else u.shape[1]


def parts_of(y: Tensor, split: int, dtype: torch.dtype) -> Tensor:
    """Where `split` programs write their sums of `y [M, N]`: y itself where it is one."""
    return y if split == 1 else y.new_empty((split, *y.shape), dtype=dtype)
