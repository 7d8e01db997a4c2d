"""Linear whose weight alone is quantized: codes become values in registers, on their way to the tensor cores.

A code's bits are those of a float16 but for a shift: an integer's lie behind 1024, whose last place is 1, a minifloat's
sign and magnitude where float16 has its own. The values, less the zero point, times the scale are rounded to the
activations' dtype as the reference does. The product is `W x^T`: a tile of weights is its first operand, which tensor
cores of sm_90 too take from registers.

Reads N*K*bits/8 bytes (of one bit 2, of three 4), scales and M*K activations. Few rows are a matter of those bytes
alone: parts of K are summed by programs of their own where N does not give enough of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import format_of, unpack
from ...numerics import scales_and_zeros
from .arithmetic import EXACT
from .configs import Problem, choose
from .linear_tiles import (
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
from .registration import architecture, cuda_op, leading, rows_of
from .weight_layouts import layout_of, pack, signed_codes, take, widen

WORD = 16


def pack_weight_only(
    w_packed: Tensor, w_scale: Tensor, format: str, group: int, features: int
) -> tuple[Tensor, Tensor]:
    """A weight of the dialect op in the kernel's layout.

    Returns:
        Codes, of integers less the least one, `[N, ...]`, and scales. Of groups they are `[G, N]` int32, the bits of
        the scale as float16 and above them of its zero point: asynchronous copies have at least four bytes. Of rows
        they are float32 `[1, N]`, or `[2, N]` with the zero points.
    """
    fmt, layout = format_of(format), layout_of(format, group, WORD)
    if fmt.minifloat:
        codes = unpack(w_packed, fmt.bits, features)
    else:
        codes = signed_codes(w_packed, format, features) ^ (1 << sum(layout.planes) - 1)
    if not group:
        return pack(codes, layout), w_scale.t().contiguous()
    scale, zero = scales_and_zeros(w_scale, format)
    words = scale.view(torch.int16).int() & 0xFFFF
    if zero is not None:
        words |= zero.view(torch.int16).int() << 16
    return pack(codes, layout), words.t().contiguous()


@triton.jit
def _values(
    low, high, PART: tl.constexpr, TILE: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    """The PART-th codes of words as float16: minifloats, or 1024 plus the integer that is stored."""
    if EXPONENT == 0:
        return take(low, PLANE * PART, (1 << PLANE) - 1, 0x6400).to(tl.float16, bitcast=True)
    else:
        value = widen(low, high, PART, TILE, PLANE, BITS, MANTISSA).to(tl.float16, bitcast=True)
        return value * (1 << (16 - (1 << (EXPONENT - 1)))) if EXPONENT < 5 else value


@triton.jit
def _scaled(value, zero, scale, EXPONENT: tl.constexpr, DTYPE: tl.constexpr):
    """`(value - zero) * scale` in float32, rounded to DTYPE. Of scales of float16 it is exact until then, and may be
    computed in another way."""
    if scale.dtype == tl.float16 and value.dtype == DTYPE:
        return (value - zero[:, None] if EXPONENT == 0 else value) * scale[:, None]
    elif EXPONENT == 0 and scale.dtype == tl.float16:
        wide = scale.to(tl.float32)
        return tl.fma(value.to(tl.float32), wide[:, None], -(zero.to(tl.float32) * wide)[:, None]).to(DTYPE)
    else:
        less = value - zero[:, None] if EXPONENT == 0 else value
        return (less.to(tl.float32) * scale.to(tl.float32)[:, None]).to(DTYPE)


@triton.jit(do_not_specialize=["M"])
def _weight_only_linear(
    x_ptr, w_ptr, scale_ptr, y_ptr, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr, M, N, K, R, UNITS,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr,
    BITS: tl.constexpr, PLANE: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = TILES * SPAN
    PARTS: tl.constexpr = 16 // PLANE
    LOW: tl.constexpr = TILES // PARTS
    WORDS: tl.constexpr = LOW + (1 if BITS > PLANE else 0)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, output, k = tl.minimum(m, M - 1), tl.minimum(n, N - 1), tl.arange(0, SPAN)
    xs = x_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    ws = w_ptr + output[:, None].to(tl.int64) * (UNITS * WORDS * SPAN) + k[None, :]
    scales = scale_ptr + output
    groups = tl.cdiv(K, GROUP or K)
    zero = tl.full((BLOCK_N,), 1024 + (1 << (PLANE - 1)), tl.float16)

    split = tl.program_id(1)
    steps = tl.cdiv(UNITS, SPLIT_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if not GROUP:
        scale = tl.load(scales)
        less = zero + tl.load(scales + N).to(tl.float16) if ASYMMETRIC else zero
    for unit in range(split * steps, tl.minimum((split + 1) * steps, UNITS)):
        at = ws + unit * (WORDS * SPAN)
        high = tl.load(at + LOW * SPAN).to(tl.uint16, bitcast=True) if BITS > PLANE else None
        for tile in tl.static_range(TILES):
            if tile % PARTS == 0:
                low = tl.load(at + (tile // PARTS) * SPAN).to(tl.uint16, bitcast=True)
            if GROUP and tile * SPAN % min(GROUP, UNIT) == 0:
                word = tl.load(scales + tl.minimum((unit * UNIT + tile * SPAN) // GROUP, groups - 1) * N)
                scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
                less = zero + (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True) if ASYMMETRIC else zero
            w = _values(low, high, tile % PARTS, tile, PLANE, BITS, EXPONENT, MANTISSA)
            w = _scaled(w, less, scale, EXPONENT, DTYPE)
            start = unit * UNIT + tile * SPAN
            if EVEN_K:
                x = tl.load(xs + start)
            else:
                x = tl.load(xs + start, mask=(start + k)[None, :] < K, other=0.0)
            sums = tl.dot(w, x.T, sums, input_precision="ieee")
    store_tile(
        sums, y_ptr, split, m, n, M, N, R, None, None, bias_ptr, hidden_ptr, u_ptr, u_scale_ptr,
        0, 1.0, BLOCK_R, SPLIT_K,
    )  # fmt: skip


def _fake(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, group: int, *branch: Tensor | None
) -> Tensor:
    return x.new_empty(leading(x, codes.shape[0]))


@cuda_op(_fake)
def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    group: int,
    hidden: Tensor | None = None,
    u: Tensor | None = None,
    u_scale: Tensor | None = None,
) -> Tensor:
    """`zq::weight_only_linear` of what `pack_weight_only` made of the weight, and a low-rank branch added.

    Args:
        x: `[..., K]` float16, bfloat16 or float32.
        codes, scale: see `pack_weight_only`.
        bias: `[N]` float, or None.
        format, group: of the weight.
        hidden: `[..., r]` of x's dtype, what the branch's ranks see of x (see `low_rank_hidden`); None for no branch.
        u, u_scale: as `low_rank_linear` takes them.

    Returns:
        `[..., N]` of x's dtype.
    """
    fmt, layout = format_of(format), layout_of(format, group, WORD)
    exponent, mantissa = fmt.minifloat or (0, 0)
    rows, m, k = rows_of(x)
    n = codes.shape[0]
    y = x.new_empty((m, n))
    if m:
        branch = hidden, u, u_scale
        epilogue = epilogue_of(None, None, bias, branch)
        r = ranks_of(epilogue)
        dtype = str(x.dtype).removeprefix("torch.")
        formula = functools.partial(
            low_bit_config,
            x_bytes=x.element_size(),
            w_bytes=sum(layout.planes) / 8,
            layout=layout,
            integers=False,
            split=True,
            branch=hidden is not None,
        )
        problem = Problem("weight_only_linear", m, n, k, dtype, weight_variant(format, group, branch))
        config = choose(problem, architecture(x.device), formula)
        config.pop("BLOCK_K", None)
        split = config["SPLIT_K"]
        parts = parts_of(y, split, torch.float32)
        grid = (triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]), split)
        _weight_only_linear[grid](
            rows, codes, scale, parts, *epilogue[2:], m, n, k, r, triton.cdiv(k, layout.unit),
            block_of_ranks(r), group, fmt.asymmetric, exponent, mantissa,
            sum(layout.planes), layout.planes[0], layout.tiles, layout.span,
            k % layout.unit == 0, **config, **EXACT,
        )  # fmt: skip
        if split > 1:
            add_parts(parts, y, epilogue)
    return y.view(leading(x, n))
