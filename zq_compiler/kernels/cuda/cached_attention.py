"""Attention of few queries over a quantized cache, split over the tokens (flash-decoding), float32 online softmax.

A program takes the queries of all heads that share a key head, as the rows of one tile, and one part of the tokens: it
reads their codes once and dequantizes them in registers, rounding to the queries' dtype as the reference does. The
parts' sums, still unnormalised, are weighted and added by a second kernel, always in the same order.

    of part i:  top_i = max A,  total_i = sum exp(A - top_i),  sums_i = exp(A - top_i) V
    w_i = exp(top_i - max top),   O = (sum w_i sums_i) / (sum w_i total_i)

Tensor cores multiply 16-bit queries and keys as they are, probabilities in parts of 16 bits that together have the
places of a float32, and float32 as three products of TF32. Parts, of 4 * B * H * T * (Dv + 2) bytes each, are as many
as leave no streaming multiprocessor idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cached_attention import cached_attention as dialect_cached_attention
from .arithmetic import EXACT, exp
from .configs import Config, Problem, choose
from .matmul_configs import CHIPS, SMALLEST
from .registration import architecture, provides

TILES_A_SPLIT = 4  # at least: fewer would not pay for the second kernel
SPLITS_AT_ONCE = 16


@triton.jit
def _codes(row_ptrs, seen, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The first `BLOCK` codes of rows that `formats.pack` packed, `[BLOCK_N, BLOCK]` float32."""
    SIZE: tl.constexpr = (COUNT * BITS + 7) // 8
    if 8 % BITS == 0:
        byte = tl.arange(0, BLOCK * BITS // 8)[None, :]
        codes = tl.load(row_ptrs + byte, mask=seen & (byte < SIZE), other=0)
        for i in tl.static_range(3):  # bytes are pairs of nibbles, these of two bits
            if 4 >> i >= BITS:
                pairs = tl.join(codes & ((1 << (4 >> i)) - 1), codes >> (4 >> i))
                codes = tl.reshape(pairs, (codes.shape[0], codes.shape[1] * 2))
    else:
        bit = tl.arange(0, BLOCK)[None, :] * BITS
        low = tl.load(row_ptrs + bit // 8, mask=seen & (bit // 8 < SIZE), other=0)
        high = tl.load(row_ptrs + bit // 8 + 1, mask=seen & (bit // 8 + 1 < SIZE), other=0)
        codes = ((low.to(tl.int32) | (high.to(tl.int32) << 8)) >> (bit % 8)) & ((1 << BITS) - 1)
    return codes.to(tl.float32)


@triton.jit
def _dequantized(codes, scale, least):
    """In float32. A code times a float16 has 19 bits: it is exact, and `fma` what the product and the sum round to."""
    return tl.fma(codes, scale.to(tl.float32), least.to(tl.float32))


@triton.jit
def _keys(
    codes, scale_ptr, least_ptr, start, P, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the codes of the tokens from `start` on stand for; groups of tokens share a row of `[P / GROUP, D]`."""
    SHARED: tl.constexpr = BLOCK_N % GROUP == 0 and BLOCK_N > GROUP
    feature = tl.arange(0, BLOCK_D)[None, :]
    if GROUP % BLOCK_N == 0:
        group = tl.zeros((1, 1), tl.int32) + start // GROUP
    elif SHARED:
        group = (start // GROUP + tl.arange(0, BLOCK_N // GROUP))[:, None]
    else:
        group = (start + tl.arange(0, BLOCK_N))[:, None] // GROUP
    offsets, inside = group * D + feature, (group * GROUP < P) & (feature < D)
    scale, least = (
        tl.load(scale_ptr + offsets, mask=inside, other=0),
        tl.load(least_ptr + offsets, mask=inside, other=0),
    )
    if SHARED:
        scale = tl.reshape(tl.broadcast_to(scale[:, None, :], (BLOCK_N // GROUP, GROUP, BLOCK_D)), (BLOCK_N, BLOCK_D))
        least = tl.reshape(tl.broadcast_to(least[:, None, :], (BLOCK_N // GROUP, GROUP, BLOCK_D)), (BLOCK_N, BLOCK_D))
    return _dequantized(codes, scale, least)


@triton.jit
def _values(
    codes, scale_ptr, least_ptr, start, P, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the codes of the tokens from `start` on stand for; groups of channels share one of `[P, D / GROUP]`."""
    SHARED: tl.constexpr = BLOCK_D % GROUP == 0
    token = (start + tl.arange(0, BLOCK_N))[:, None]
    if SHARED:
        group = tl.arange(0, BLOCK_D // GROUP)[None, :]
    else:
        group = tl.arange(0, BLOCK_D)[None, :] // GROUP
    offsets, inside = token * (D // GROUP) + group, (token < P) & (group < D // GROUP)
    scale, least = (
        tl.load(scale_ptr + offsets, mask=inside, other=0),
        tl.load(least_ptr + offsets, mask=inside, other=0),
    )
    if SHARED:
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_D // GROUP, GROUP)), (BLOCK_N, BLOCK_D))
        least = tl.reshape(tl.broadcast_to(least[:, :, None], (BLOCK_N, BLOCK_D // GROUP, GROUP)), (BLOCK_N, BLOCK_D))
    return _dequantized(codes, scale, least)


@triton.jit
def _products(p, v):
    """p v to the last places of a float32; p float32 of at most 1, v of any dtype."""
    if v.dtype == tl.float32:
        sums = tl.dot(p, v, input_precision="tf32x3")
    else:
        first = p.to(v.dtype)
        rest = p - first.to(tl.float32)
        if v.dtype == tl.bfloat16:
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            sums = tl.dot(first, v) + (tl.dot(second, v) + tl.dot(third, v))
        else:  # the rest, out of float16's last places
            sums = tl.dot(first, v) + tl.dot((rest * 4096.0).to(tl.float16), v) * (1.0 / 4096.0)
    return sums


@triton.jit
def _attend(
    top, total, sums, q, k, v, mask_ptrs, tokens, end, row_token, score_scale, T, S, mask_s,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One more tile of tokens, those before `end`, in the running softmax."""
    scores = tl.dot(q, k.T, input_precision="tf32x3") * score_scale
    seen = tokens[None, :] < end
    if MASK is not None:
        mask = tl.load(mask_ptrs + tokens[None, :].to(tl.int64) * mask_s, mask=seen, other=0)
        if MASK == "bool":
            seen = seen & (mask != 0)
        else:
            scores += mask.to(tl.float32)
    if CAUSAL:
        seen = seen & (tokens[None, :] <= row_token[:, None] + (S - T))
    scores = tl.where(seen, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = exp(scores - shift[:, None])
    faded = exp(top - shift)
    return new_top, total * faded + tl.sum(p, axis=1), sums * faded[:, None] + _products(p, v)


@triton.jit
def _cached_attention(
    q_ptr, key_codes_ptr, key_scale_ptr, key_least_ptr, value_codes_ptr, value_scale_ptr, value_least_ptr,
    new_keys_ptr, new_values_ptr, mask_ptr, out_ptr, tops_ptr, totals_ptr, sums_ptr,
    SHARING, T, P, R, score_scale, mask_b, mask_h, mask_t, mask_s, H_KV, TILES_A_PART, PARTS,
    D: tl.constexpr, DV: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = SHARING * T
    blocks = tl.cdiv(rows, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # of keys, in the batch
    part = tl.program_id(1)
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_token = row % T
    feature, channel, within = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    q_offsets = (head * rows + row)[:, None] * D + feature[None, :]
    q = tl.load(q_ptr + q_offsets, mask=(row[:, None] < rows) & (feature[None, :] < D), other=0)
    mask_ptrs = None
    if MASK is not None:
        some_row = tl.minimum(row, rows - 1)
        query_head = head % H_KV * SHARING + some_row // T
        mask_rows = query_head * mask_h + (some_row % T).to(tl.int64) * mask_t
        mask_ptrs = mask_ptr + head // H_KV * mask_b + mask_rows[:, None]

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    packed_tiles, tiles = tl.cdiv(P, BLOCK_N), tl.cdiv(P, BLOCK_N) + tl.cdiv(R, BLOCK_N)
    first, last = part * TILES_A_PART, tl.minimum((part + 1) * TILES_A_PART, tiles)

    KEY_BYTES: tl.constexpr = (D * BITS + 7) // 8
    VALUE_BYTES: tl.constexpr = (DV * BITS + 7) // 8
    key_codes_ptr += head * P * KEY_BYTES
    value_codes_ptr += head * P * VALUE_BYTES
    key_groups, value_groups = head * (P // GROUP) * D, head * P * (DV // GROUP)
    for tile in range(first, tl.minimum(last, packed_tiles)):
        start = tile * BLOCK_N
        tokens = start + within
        inside = tokens[:, None] < P
        codes = _codes(key_codes_ptr + tokens[:, None].to(tl.int64) * KEY_BYTES, inside, D, BITS, BLOCK_D)
        scale_ptr, least_ptr = key_scale_ptr + key_groups, key_least_ptr + key_groups
        k = _keys(codes, scale_ptr, least_ptr, start, P, D, GROUP, BLOCK_N, BLOCK_D).to(q.dtype)
        codes = _codes(value_codes_ptr + tokens[:, None].to(tl.int64) * VALUE_BYTES, inside, DV, BITS, BLOCK_DV)
        scale_ptr, least_ptr = value_scale_ptr + value_groups, value_least_ptr + value_groups
        v = _values(codes, scale_ptr, least_ptr, start, P, DV, GROUP, BLOCK_N, BLOCK_DV).to(q.dtype)
        top, total, sums = _attend(
            top, total, sums, q, k, v, mask_ptrs, tokens, P, row_token, score_scale, T, P + R, mask_s, MASK, CAUSAL
        )

    new_keys_ptr += head * R * D
    new_values_ptr += head * R * DV
    for tile in range(tl.maximum(first, packed_tiles), last):
        new = (tile - packed_tiles) * BLOCK_N + within
        inside = new[:, None] < R
        k_ptrs = new_keys_ptr + new[:, None].to(tl.int64) * D + feature[None, :]
        v_ptrs = new_values_ptr + new[:, None].to(tl.int64) * DV + channel[None, :]
        k = tl.load(k_ptrs, mask=inside & (feature[None, :] < D), other=0)
        v = tl.load(v_ptrs, mask=inside & (channel[None, :] < DV), other=0)
        top, total, sums = _attend(
            top, total, sums, q, k, v, mask_ptrs, P + new, P + R, row_token, score_scale, T, P + R, mask_s, MASK, CAUSAL
        )

    row_of_all = head * rows + row
    out_mask = (row[:, None] < rows) & (channel[None, :] < DV)
    if WHOLE:
        out = sums * tl.div_rn(tl.full(total.shape, 1.0, tl.float32), tl.where(total == 0, 1.0, total))[:, None]
        out_ptrs = out_ptr + row_of_all[:, None] * DV + channel[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        offsets = row_of_all * PARTS + part
        tl.store(tops_ptr + offsets, top, mask=row < rows)
        tl.store(totals_ptr + offsets, total, mask=row < rows)
        tl.store(sums_ptr + offsets[:, None] * DV + channel[None, :], sums, mask=out_mask)


@triton.jit
def _combine(
    tops_ptr, totals_ptr, sums_ptr, out_ptr, PARTS, DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """One row's parts, `BLOCK` of them at once."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_DV)
    tops_ptr += row * PARTS
    totals_ptr += row * PARTS
    sums_ptr += row * PARTS * DV
    tops = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, PARTS, BLOCK):
        part = start + tl.arange(0, BLOCK)
        tops = tl.maximum(tops, tl.load(tops_ptr + part, mask=part < PARTS, other=-float("inf")))
    top = tl.max(tops, axis=0)
    top = tl.where(top == -float("inf"), 0.0, top)
    totals = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, BLOCK_DV), tl.float32)
    for start in range(0, PARTS, BLOCK):
        part = start + tl.arange(0, BLOCK)
        weight = exp(tl.load(tops_ptr + part, mask=part < PARTS, other=-float("inf")) - top)
        totals += weight * tl.load(totals_ptr + part, mask=part < PARTS, other=0.0)
        inside = (part[:, None] < PARTS) & (channel[None, :] < DV)
        x = tl.load(sums_ptr + part[:, None] * DV + channel[None, :], mask=inside, other=0.0)
        sums += weight[:, None] * x
    total = tl.sum(totals, axis=0)
    out = tl.sum(sums, axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * DV + channel, out.to(out_ptr.dtype.element_ty), mask=channel < DV)


def cached_config(problem: Problem, architecture: int) -> Config:
    """Tiles for `m` rows that share keys of `k` features and values of `n` channels: what registers hold.

    >>> cached_config(Problem("cached_attention", 4, 128, 128, "bfloat16"), 90)
    {'BLOCK_M': 16, 'BLOCK_N': 64, 'num_warps': 4, 'num_stages': 2}
    """
    wide, floats = max(problem.k, problem.n) > 128, problem.dtype == "float32"
    if floats or wide or problem.m <= 16:
        block_m, block_n, warps = 16, 64 >> wide >> floats, 8 if floats else 4
    else:
        block_m, block_n, warps = 32, 32, 8
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}


def parts_of(tiles: int, programs: int, processors: int) -> tuple[int, int]:
    """How many parts the tokens' tiles are split into, and tiles in each: for two programs a streaming multiprocessor.

    >>> parts_of(tiles=64, programs=8, processors=132)
    (16, 4)
    >>> parts_of(tiles=64, programs=512, processors=132)
    (1, 64)
    """
    parts = max(1, min(-(-2 * processors // programs), tiles // TILES_A_SPLIT))
    tiles_a_part = -(-tiles // parts)
    return max(1, -(-tiles // max(tiles_a_part, 1))), tiles_a_part


@provides(dialect_cached_attention)
def cached_attention(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_least: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_least: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    score_scale: float,
    bits: int,
    group: int,
) -> Tensor:
    """`zq::cached_attention`: `[B, H, T, D]` queries over P packed tokens and R in floats -> `[B, H, T, Dv]`."""
    (b, h, t, d), (_, h_kv, r, dv), p = query.shape, new_values.shape, key_codes.shape[2]
    out = torch.empty((b, h, t, dv), dtype=query.dtype, device=query.device)
    if not out.numel():
        return out
    kind: str | None = None
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind, mask_strides = "bool" if mask.dtype is torch.bool else "added", mask.expand(b, h, t, p + r).stride()
        mask = mask.view(torch.uint8) if kind == "bool" else mask
    rows = h // h_kv * t
    arch = architecture(query.device)
    dtype = str(query.dtype).removeprefix("torch.")
    variant = f"{bits} bits, groups of {group}, mask {kind}"
    config = choose(Problem("cached_attention", rows, dv, d, dtype, variant), arch, cached_config)
    row_blocks = triton.cdiv(rows, config["BLOCK_M"])
    tiles = triton.cdiv(p, config["BLOCK_N"]) + triton.cdiv(r, config["BLOCK_N"])
    parts, tiles_a_part = parts_of(tiles, row_blocks * b * h_kv, CHIPS.get(arch, SMALLEST).sms)
    tops = totals = sums = out
    if parts > 1:
        tops, totals = torch.empty((2, b, h, t, parts), dtype=torch.float32, device=query.device)
        sums = torch.empty((b, h, t, parts, dv), dtype=torch.float32, device=query.device)
    held = key_codes, key_scale, key_least, value_codes, value_scale, value_least, new_keys, new_values
    block_d, block_dv = (max(16, triton.next_power_of_2(width)) for width in (d, dv))
    _cached_attention[(b * h_kv * row_blocks, parts)](
        query.contiguous(), *(x.contiguous() for x in held), mask, out, tops, totals, sums,
        h // h_kv, t, p, r, score_scale, *mask_strides, h_kv, tiles_a_part, parts,
        d, dv, bits, group, kind, is_causal, parts == 1, BLOCK_D=block_d, BLOCK_DV=block_dv, **config, **EXACT,
    )  # fmt: skip
    if parts > 1:
        _combine[(b * h * t,)](tops, totals, sums, out, parts, dv, SPLITS_AT_ONCE, block_dv, num_warps=4, **EXACT)
    return out
