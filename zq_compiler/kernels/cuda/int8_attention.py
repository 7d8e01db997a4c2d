"""INT8 attention in two sweeps over the keys: what the softmax takes off and divides by, then the products.

The reference quantizes exponentials by their row's last maximum, and in the static form by its last sum, so a running
maximum will not do: the second sweep multiplies queries and keys again, quantizes, and adds up in int32, exactly and
without rescaling. Where the order of a sum or the last place of an exponential crosses a tie, an integer is off by one.

Tensor cores multiply signed bytes. Probabilities p of 0 to 255 are 127 - p there, and

    P V = -((127 - P) V - 127 * (column sums of V))

where the column sums are the product of a constant, in the same sums: it reuses the values' registers, and costs a
twentieth of the instructions where adding bytes up costs two fifths.

Reads queries once, values as often as there are tiles of rows, and keys twice as often.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..int8_attention import int8_attention as dialect_int8_attention
from .arithmetic import EXACT, divide, exp, round_to_int8, saturate_to_int8
from .configs import Config, Problem, choose
from .matmul_configs import CHIPS, SMALLEST
from .registration import architecture, provides

_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _load(ptr, start, stride, tile, keys, features, S, D: tl.constexpr, EDGE: tl.constexpr):
    """Keys or values `[BLOCK_N, BLOCK_D]` from `start` on, zeros where there are none."""
    ptrs = ptr + tl.cast(start, tl.int64) * stride + tile
    if EDGE:
        return tl.load(ptrs, mask=(keys[:, None] < S) & (features[None, :] < D), other=0)
    if features.shape[0] > D:
        return tl.load(ptrs, mask=features[None, :] < D, other=0)
    return tl.load(ptrs)


@triton.jit
def _load_mask(ptrs, stride, keys, S, EDGE: tl.constexpr):
    ptrs += keys[None, :].to(tl.int64) * stride
    if EDGE:
        return tl.load(ptrs, mask=keys[None, :] < S, other=0)
    return tl.load(ptrs)


@triton.jit
def _seen(mask, rows, keys, S, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys take part, as far as a mask of bools, the causal one and the number of keys say."""
    seen = keys[None, :] < S
    if MASK == "bool":
        seen = seen & (mask != 0)
    if CAUSAL:
        seen = seen & (keys[None, :] <= rows[:, None])
    return seen


@triton.jit
def _scores(
    q, k, mask, scale, rows, keys, S,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Float32 scores `[BLOCK_M, BLOCK_N]`; -Inf where a key takes no part."""
    scores = tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32) * scale
    if MASK == "added":
        scores += mask.to(tl.float32)
    if EDGE or MASK == "bool":
        scores = tl.where(_seen(mask, rows, keys, S, MASK, CAUSAL and EDGE), scores, -float("inf"))
    return scores


@triton.jit
def _finite(top):
    """What to take off a row's scores: nothing where none takes part."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _first_sweep(
    top, total, q, k_ptr, k_tile, mask_ptrs, scale, rows, features, first, last, S, k_s, mask_s,
    D: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, STATIC: tl.constexpr, EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows' largest scores, and in the static form the sums of their exponentials.

    Where sums and scores have the same order, `top` is the largest of the int32 sums: nothing is converted. With a
    negative scale, whose order is the reverse, it is the largest of the sums' complements.
    """
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, start, k_s, k_tile, keys, features, S, D, EDGE)
        mask = None
        if MASK is not None:
            mask = _load_mask(mask_ptrs, mask_s, keys, S, EDGE)
        if STATIC or MASK == "added":
            scores = _scores(q, k, mask, scale, rows, keys, S, MASK, CAUSAL, EDGE)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            if STATIC:
                shift = _finite(new_top)
                total = total * exp(top - shift) + tl.sum(exp(scores - shift[:, None]), axis=1)
            top = new_top
        else:
            sums = tl.dot(q, k.T, out_dtype=tl.int32) ^ tl.where(scale < 0, -1, 0)
            if EDGE or MASK == "bool":
                sums = tl.where(_seen(mask, rows, keys, S, MASK, CAUSAL and EDGE), sums, _LEAST)
            top = tl.maximum(top, tl.max(sums, axis=1))
    return top, total


@triton.jit
def _second_sweep(
    products, total, q, top, step, k_ptr, v_ptr, k_tile, v_tile, mask_ptrs, scale, rows, features, first, last, S,
    k_s, v_s, mask_s,
    D: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, STATIC: tl.constexpr, MOST: tl.constexpr,
    EDGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Products of quantized probabilities and values; in the token-wise form also the sums of exponentials."""
    if STATIC:
        one = tl.full(total.shape, 1.0, tl.float32)
        by_total, by_step = tl.div_rn(one, total), tl.div_rn(one, step)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, start, k_s, k_tile, keys, features, S, D, EDGE)
        v = _load(v_ptr, start, v_s, v_tile, keys, features, S, D, EDGE)
        mask = None
        if MASK is not None:
            mask = _load_mask(mask_ptrs, mask_s, keys, S, EDGE)
        p = exp(_scores(q, k, mask, scale, rows, keys, S, MASK, CAUSAL, EDGE) - top[:, None])
        if STATIC:
            p = divide(p, total[:, None], by_total[:, None])
            p = tl.minimum(divide(p, step[:, None], by_step[:, None]), MOST)
        else:
            total += tl.sum(p, axis=1)
            p = p * MOST
        p = round_to_int8(p)
        if MOST == 255:
            products = tl.dot(p ^ 127, v, products, out_dtype=tl.int32)
            products = tl.dot(tl.full(p.shape, -127, tl.int8), v, products, out_dtype=tl.int32)
        else:
            products = tl.dot(p, v, products, out_dtype=tl.int32)
    return products, total


@triton.jit
def _int8_attention(
    q_ptr, k_ptr, v_ptr, score_scale_ptr, mask_ptr, probability_scale_ptr, out_scale_ptr, out_ptr, H, T, S, GROUP,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, mask_b, mask_h, mask_t, mask_s,
    score_scale_h, probability_scale_h, out_scale_h, out_scale_d,
    D: tl.constexpr, MASK: tl.constexpr, MASK_OF_KEYS: tl.constexpr, CAUSAL: tl.constexpr, STATIC: tl.constexpr,
    MOST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M  # those that see most keys come first
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows, features, within = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < T) & (features[None, :] < D)
    q_ptr += b * q_b + h * q_h + tl.cast(first_row, tl.int64) * q_t
    q = tl.load(q_ptr + tl.arange(0, BLOCK_M)[:, None] * q_t + features[None, :] * q_d, mask=inside, other=0)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    k_tile = within[:, None] * k_s + features[None, :] * k_d
    v_tile = within[:, None] * v_s + features[None, :] * v_d
    mask_ptrs = None
    if MASK is not None:
        mask_rows = tl.zeros((1, 1), tl.int64)
        if not MASK_OF_KEYS:
            mask_rows = tl.minimum(rows, T - 1)[:, None].to(tl.int64) * mask_t
        mask_ptrs = mask_ptr + b * mask_b + h * mask_h + mask_rows
    scale = tl.load(score_scale_ptr + h * score_scale_h)

    whole, last = S // BLOCK_N * BLOCK_N, S  # keys in tiles that need no check, and the last that any row sees
    if CAUSAL:
        whole, last = tl.minimum(whole, first_row // BLOCK_N * BLOCK_N), tl.minimum(S, first_row + BLOCK_M)
    AS_INTEGERS: tl.constexpr = not STATIC and MASK != "added"
    total = tl.zeros((BLOCK_M,), tl.float32)
    if AS_INTEGERS:
        top = tl.full((BLOCK_M,), _LEAST, tl.int32)
    else:
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for EDGE in tl.static_range(2):
        first, end = (whole, last) if EDGE else (0, whole)
        top, total = _first_sweep(
            top, total, q, k_ptr, k_tile, mask_ptrs, scale, rows, features, first, end, S, k_s, mask_s,
            D, MASK, CAUSAL, STATIC, EDGE, BLOCK_N,
        )  # fmt: skip
    if AS_INTEGERS:
        largest = (top ^ tl.where(scale < 0, -1, 0)).to(tl.float32) * scale
        top = tl.where(top == _LEAST, -float("inf"), largest)
    top = _finite(top)
    step = tl.full((BLOCK_M,), 1.0, tl.float32)
    if STATIC:
        total = tl.where(total < 1.0, 1.0, total)
        step *= tl.load(probability_scale_ptr + h * probability_scale_h)

    products = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    for EDGE in tl.static_range(2):
        first, end = (whole, last) if EDGE else (0, whole)
        products, total = _second_sweep(
            products, total, q, top, step, k_ptr, v_ptr, k_tile, v_tile, mask_ptrs, scale, rows, features, first, end,
            S, k_s, v_s, mask_s, D, MASK, CAUSAL, STATIC, MOST, EDGE, BLOCK_N,
        )  # fmt: skip
    if MOST == 255:
        products = -products
    out_scale = tl.load(out_scale_ptr + h * out_scale_h + features * out_scale_d, mask=features < D, other=0.0)
    out = products.to(tl.float32) * out_scale[None, :]
    if not STATIC:
        total = tl.where(total < 1.0, 1.0, total)
        out *= tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), 255.0 * total)[:, None]
    out = tl.where(((total == total) & (step == step))[:, None], out, float("nan"))
    if out_ptr.dtype.element_ty == tl.int8:
        out = saturate_to_int8(out)
    out_rows = (b * T + rows) * H + h
    out_ptrs = out_ptr + out_rows[:, None] * D + features[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)


def attention_config(problem: Problem, architecture: int) -> Config:
    """The largest tiles that the static form, with a mask of floats, has the registers for; `k` features, `m` rows.

    >>> attention_config(Problem("int8_attention", 512, 64, 64, "int8"), 80)
    {'BLOCK_M': 128, 'BLOCK_N': 32, 'num_warps': 4, 'num_stages': 3}
    """
    wgmma, rows = CHIPS.get(architecture, SMALLEST).wgmma, max(16, triton.next_power_of_2(problem.m))
    if problem.k <= 32 and not wgmma:
        block_m, block_n, warps, stages = 64, 64, 4, 3
    elif problem.k <= 64:
        block_m, block_n, warps, stages = (128, 64, 8, 3) if wgmma else (128, 32, 4, 3)
    elif problem.k <= 128:
        block_m, block_n, warps, stages = (128, 64, 8, 2) if wgmma else (64, 32, 4, 3)
    else:
        block_m, block_n, warps, stages = (128, 32, 8, 2) if wgmma else (64, 64, 8, 2)
    if rows < block_m:
        block_m, warps = rows, 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


@provides(dialect_int8_attention)
def int8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_scale: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
    out_scale: Tensor,
    out_dtype: torch.dtype,
    signed_probabilities: bool = False,
) -> Tensor:
    """`zq::int8_attention`: `[B, H, T, D]` int8 queries, `[B, Hkv, S, D]` int8 keys and values, through any strides."""
    (b, h, t, d), s = query.shape, key.shape[2]
    out = torch.empty((b, t, h, d), dtype=out_dtype, device=query.device).transpose(1, 2)
    if not out.numel():
        return out
    static = probability_scale is not None
    kind: str | None = None
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind, mask_strides = "bool" if mask.dtype is torch.bool else "added", mask.expand(b, h, t, s).stride()
        mask = mask.view(torch.uint8) if kind == "bool" else mask
    variant = f"{'static' if static else 'token-wise'}, mask {kind}, causal {is_causal}"
    problem = Problem("int8_attention", t, d, d, "int8", variant)
    config = choose(problem, architecture(query.device), attention_config)
    _int8_attention[(triton.cdiv(t, config["BLOCK_M"]) * b * h,)](
        query, key, value, score_scale, mask, probability_scale, out_scale, out, h, t, s, h // key.shape[1],
        *query.stride(), *key.stride(), *value.stride(), *mask_strides,
        score_scale.expand(1, h, 1, 1).stride(1),
        probability_scale.expand(1, h, 1, 1).stride(1) if probability_scale is not None else 0,
        *out_scale.expand(1, h, 1, d).stride()[1::2],
        d, kind, mask_strides[2] == 0, is_causal, static, 127 if static and signed_probabilities else 255,
        BLOCK_D=max(32, triton.next_power_of_2(d)), **config, **EXACT,
    )  # fmt: skip
    return out
