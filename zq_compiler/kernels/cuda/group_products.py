"""Products of activations of 8 bits with weights of at most 8, of which groups of features have scales.

    sum_g (sum_{k in g} x_ik w_jk) * s[j, g]       in this order, each product rounded before it is added

Integers are summed in 32 bits, E4M3 values in float32. Weights become INT8 or E4M3 in registers, on their way to the
tensor cores: integers stand in a byte's upper bits, multiplied by a power of two; minifloats where E4M3 has its sign
and magnitude, divided by one. FACTOR takes it back from the scale. Tensor cores of sm_80 have no E4M3: there words have
16 bits, and values become float16 in the same way.

The product is `W x^T`: a tile of weights is its first operand, which tensor cores of sm_90 too take from registers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import format_of
from .arithmetic import EXACT
from .configs import Problem, choose
from .linear_tiles import (
    Branch,
    add_parts,
    epilogue_of,
    low_bit_config,
    parts_of,
    ranks_of,
    store_tile,
    tile_of,
    weight_variant,
)
from .low_rank_linear import block_of_ranks
from .registration import architecture, leading, rows_of
from .weight_layouts import layout_of, take, widen


@triton.jit
def _operand(
    low, high, PART: tl.constexpr, TILE: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr
):
    """The PART-th codes of words as INT8 (M < 0), E4M3 or, of words of 16 bits, float16, times a constant."""
    if M < 0:
        return take(low, PLANE * (PART + 1) - 8, 256 - (1 << (8 - PLANE))).to(tl.int8, bitcast=True)
    elif low.dtype == tl.float8e4nv:
        return low
    else:
        WIDE: tl.constexpr = tl.float8e4nv if low.dtype == tl.uint8 else tl.float16
        return widen(low, high, PART, TILE, PLANE, BITS, M).to(WIDE, bitcast=True)


@triton.jit
def _words(at):
    """Words as unsigned integers, which torch has not of 16 bits, or E4M3."""
    words = tl.load(at)
    return words.to(tl.uint16, bitcast=True) if words.dtype == tl.int16 else words


@triton.jit
def _scales(scale_ptr, unit, groups, N, GROUP: tl.constexpr, UNIT: tl.constexpr, FACTOR: tl.constexpr):
    """Scales of a unit's groups, FACTOR times; of whole rows none."""
    scales = ()
    if GROUP:
        for i in tl.static_range(tl.cdiv(UNIT, GROUP)):
            group = tl.minimum(unit * UNIT // GROUP + i, groups - 1)
            scales += (tl.load(scale_ptr + group * N).to(tl.float32) * FACTOR,)  # type: ignore[assignment]
    return scales


@triton.jit(do_not_specialize=["M"])
def _group_products(
    x_ptr, w_ptr, y_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr, M, N, K, R, UNITS,
    X_SCALE_STRIDE: tl.constexpr, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PLANE: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = TILES * SPAN
    PARTS: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // PLANE
    LOW: tl.constexpr = TILES // PARTS
    WORDS: tl.constexpr = LOW + (1 if BITS > PLANE else 0)
    SUM: tl.constexpr = tl.int32 if MANTISSA < 0 else tl.float32
    # Features that are summed at once. Tensor cores of E4M3 keep fewer bits than float32 has: no more than a unit.
    AT_ONCE: tl.constexpr = min(GROUP or UNIT, UNIT) if x_ptr.dtype.element_ty == tl.float8e4nv else GROUP
    INNER: tl.constexpr = min(GROUP or SPAN, SPAN)  # features of a span that share a scale

    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, output, k = tl.minimum(m, M - 1), tl.minimum(n, N - 1), tl.arange(0, SPAN)
    xs = x_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    ws = w_ptr + output[:, None].to(tl.int64) * (UNITS * WORDS * SPAN) + k[None, :]
    scale_at = w_scale_ptr + output
    groups = tl.cdiv(K, GROUP or K)

    split = tl.program_id(1)
    steps = tl.cdiv(UNITS, SPLIT_K)
    last = tl.minimum((split + 1) * steps, UNITS)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    within = tl.zeros((BLOCK_N, BLOCK_M), SUM)  # a group
    scales = _scales(scale_at, split * steps, groups, N, GROUP, UNIT, FACTOR)
    for unit in range(split * steps, last):
        next_scales = _scales(scale_at, unit + 1, groups, N, GROUP, UNIT, FACTOR)
        at = ws + unit * (WORDS * SPAN)
        high = _words(at + LOW * SPAN) if BITS > PLANE else None
        for tile in tl.static_range(TILES):
            if tile % PARTS == 0:
                low = _words(at + (tile // PARTS) * SPAN)
            w = _operand(low, high, tile % PARTS, tile, PLANE, BITS, MANTISSA)
            start = unit * UNIT + tile * SPAN
            if EVEN_K:
                x = tl.load(xs + start)
            else:
                x = tl.load(xs + start, mask=(start + k)[None, :] < K, other=0.0)
            for inner in tl.static_range(SPAN // INNER):
                part = tl.where((k // INNER == inner)[None, :], x, 0.0).to(x.dtype) if INNER < SPAN else x
                within = tl.dot(w, part.T, within, out_dtype=SUM)
                if (
                    AT_ONCE
                    and (tile * SPAN + (inner + 1) * INNER) % min(AT_ONCE, UNIT) == 0
                    and (AT_ONCE <= UNIT or (unit + 1) % (AT_ONCE // UNIT) == 0 or unit + 1 == last)
                ):
                    scaled = within.to(tl.float32)
                    if GROUP:
                        scaled *= scales[(tile * SPAN + inner * INNER) // GROUP][:, None]
                    sums += scaled
                    within = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        scales = next_scales
    store_tile(
        sums if AT_ONCE else within, y_ptr, split, m, n, M, N, R,
        None if GROUP else w_scale_ptr, x_scale_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
        X_SCALE_STRIDE, FACTOR, BLOCK_R, SPLIT_K,
    )  # fmt: skip


def group_products(
    op: str,
    x_q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    group: int,
    out_dtype: torch.dtype,
    branch: Branch,
) -> Tensor:
    """The dialect op `op`, of what `pack` made of the weight's codes and of its scales transposed, `[G, N]`; and a
    low-rank branch added, where there is one."""
    half, shape = codes.dtype is torch.int16, format_of(format).minifloat
    layout = layout_of(format, group, 16 if half else 8)
    bits = sum(layout.planes)
    if shape is None:
        factor = 2.0 ** (bits - 8)
    else:
        factor = 2.0 ** ((15 if half else 7) - (2 ** (shape[0] - 1) - 1))
        x_q = x_q.half() if half else x_q
        codes = codes.view(torch.float8_e4m3fn) if bits == 8 and not half else codes
    rows, m, k = rows_of(x_q)
    n = codes.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=x_q.device)
    in_order = group and shape is None  # the order of integers' groups is the reference's
    if m:
        formula = functools.partial(
            low_bit_config,
            x_bytes=x_q.element_size(),
            w_bytes=bits / 8,
            layout=layout,
            integers=shape is None,
            split=not in_order,
            branch=branch[0] is not None,
            most_sums=1024 if half and group else 4096,  # a group's sums too, beside operands of 16 bits
        )
        dtype, variant = str(out_dtype).removeprefix("torch."), weight_variant(format, group, branch)
        config = choose(Problem(op, m, n, k, dtype, variant), architecture(x_q.device), formula)
        config.pop("BLOCK_K", None)
        split = config["SPLIT_K"] = 1 if in_order else config["SPLIT_K"]
        parts = parts_of(y, split, torch.int32 if shape is None else torch.float32)
        grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]), split)
        stride = int(x_scale.numel() > 1)
        epilogue = epilogue_of(scale, x_scale, bias, branch)
        r = ranks_of(epilogue)
        _group_products[grid](
            rows, codes, parts, *epilogue, m, n, k, r, triton.cdiv(k, layout.unit),
            stride, factor, block_of_ranks(r),
            group, shape[1] if shape else -1, bits, layout.planes[0], layout.tiles, layout.span,
            k % layout.unit == 0, **config, **EXACT,
        )  # fmt: skip
        if split > 1:
            add_parts(parts, y, (None if group else epilogue[0], *epilogue[1:]), stride, factor)
    return y.view(leading(x_q, n))
