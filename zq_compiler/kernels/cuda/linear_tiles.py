"""What products with weights of a few bits share: which tile a program has, and what becomes of its sums.

    Y_ij = sum_ij * s_w[j] * s_x[i] + b[j]      each of the three where there is one

With SPLIT_K programs sum parts of K, `[SPLIT_K, M, N]`, which a second kernel adds in their order: always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EXACT
from .configs import Config, Problem
from .matmul_configs import CHIPS, MOST_STAGES, SMALLEST, matmul_config

_BLOCK = 1024  # outputs of a program that adds parts


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
def store_tile(
    sums, y_ptr, part, m, n, M, N, w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE: tl.constexpr, bias_ptr,
    FACTOR: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """A tile `[BLOCK_N, BLOCK_M]` finished, or a part of its sums as it is."""
    rows, outputs = m[:, None], n[None, :]
    y = sums.T
    if SPLIT_K == 1:
        valid_rows = tl.minimum(rows, M - 1)
        y = finish(
            y.to(tl.float32),
            valid_rows,
            outputs,
            outputs < N,
            w_scale_ptr,
            x_scale_ptr,
            X_SCALE_STRIDE,
            bias_ptr,
            FACTOR,
        )
    offsets = (part.to(tl.int64) * M + rows) * N + outputs
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=(rows < M) & (outputs < N))


@triton.jit(do_not_specialize=["M"])
def _add_parts(
    parts_ptr, y_ptr, M, N, w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE: tl.constexpr, bias_ptr,
    FACTOR: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(M, tl.int64) * N
    inside = offsets < size
    total = tl.load(parts_ptr + offsets, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(parts_ptr + part * size + offsets, mask=inside, other=0)
    rows = tl.minimum(offsets // N, M - 1)
    y = finish(
        total.to(tl.float32), rows, offsets % N, inside, w_scale_ptr, x_scale_ptr, X_SCALE_STRIDE, bias_ptr, FACTOR
    )
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


def low_bit_config(
    problem: Problem,
    architecture: int,
    *,
    x_bytes: float,
    w_bytes: float,
    unit: int,
    split: bool = True,
) -> Config:
    """A formula for `configs.choose`: `matmul_config`'s tiles, with as many stages of units as shared memory holds."""
    chip = CHIPS.get(architecture, SMALLEST)
    config = matmul_config(
        problem,
        architecture,
        x_bytes=x_bytes,
        w_bytes=w_bytes,
        most_k=unit,
        largest_tile=128 * (256 if chip.wgmma and x_bytes > 1 else 128),  # of sums and values, in registers
        split=split,
    )
    del config["BLOCK_K"]
    shared = chip.shared // (2 if config["BLOCK_M"] * config["BLOCK_N"] <= 64 * 128 else 1)
    stage = unit * (config["BLOCK_M"] * x_bytes + config["BLOCK_N"] * w_bytes)
    return config | {"num_stages": max(2, min(int(shared // stage), MOST_STAGES))}


def add_parts(
    parts: Tensor,
    y: Tensor,
    w_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_scale_stride: int = 0,
    bias: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """Sums `[SPLIT_K, M, N]` added, scaled and written to `y [M, N]`."""
    split, m, n = parts.shape
    scales = w_scale, x_scale, x_scale_stride
    _add_parts[triton.cdiv(m * n, _BLOCK),](parts, y, m, n, *scales, bias, factor, split, _BLOCK, num_warps=4, **EXACT)


def parts_of(y: Tensor, split: int, dtype: torch.dtype) -> Tensor:
    """Where `split` programs write their sums of `y [M, N]`: y itself where it is one."""
    return y if split == 1 else y.new_empty((split, *y.shape), dtype=dtype)
