"""Softmax^quant: scores to quantized probabilities, one pass, for attention that does not fit one kernel.

    A = scores + mask                                -Inf where a key takes no part
    E = exp(A - max A),  l = max(sum E, 1)           E = 0 in a row that is wholly masked
    P_q = round(E / l / probability_scale)           static: unsigned 8 bit, or signed, at most 127
    E_q = round(E * 255)                             token-wise

as kernels/int8_attention.py has it. What follows multiplies P_q's sums by probability_scale, E_q's by 1 / (255 * l).
Where attention is causal, keys 16 and more behind the token are not read. A row with NaN becomes zeros, and its l NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import EXACT, divide, exp, round_to_uint8, static_steps
from .configs import choose_rows, row_config
from .registration import cuda_op, leading, strided_rows


@triton.jit
def _softmax_quantize(
    scores_ptr,
    mask_ptr,
    probability_scale_ptr,
    q_ptr,
    total_ptr,
    M,
    T,
    S,
    heads,
    stride,
    mask_stride_b,
    mask_stride_h,
    mask_stride_t,
    mask_stride_s,
    scale_stride,
    CAUSAL: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    keys = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (keys < S)
    head = rows // T % heads
    seen = inside & (keys // 16 * 16 <= rows % T) if CAUSAL else inside  # wide loads have one mask for 16 keys
    scores = tl.load(scores_ptr + rows.to(tl.int64) * stride + keys, mask=seen, other=-float("inf")).to(tl.float32)
    if mask_ptr is not None:
        batch = (rows // T // heads).to(tl.int64)
        places = batch * mask_stride_b + head * mask_stride_h + rows % T * mask_stride_t + keys * mask_stride_s
        mask = tl.load(mask_ptr + places, mask=seen, other=0)
        if mask_ptr.dtype.element_ty.is_floating():
            scores += mask.to(tl.float32)
        else:
            scores = tl.where(mask != 0, scores, -float("inf"))
    if CAUSAL:
        scores = tl.where(keys <= rows % T, scores, -float("inf"))
    top = tl.max(scores, axis=1, keep_dims=True)
    exponentials = exp(scores - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(exponentials, axis=1, keep_dims=True)
    total = tl.where(total < 1.0, 1.0, total)  # NaN stays
    one = tl.full(total.shape, 1.0, tl.float32)
    if probability_scale_ptr is None:
        steps = exponentials * 255.0
    else:
        probabilities = divide(exponentials, total, tl.div_rn(one, total))
        scale = tl.load(probability_scale_ptr + head * scale_stride)
        steps = static_steps(probabilities, scale, tl.div_rn(one, scale))
    steps = tl.where((total == total) & (steps == steps), tl.minimum(steps, MOST), 0.0)
    tl.store(q_ptr + rows.to(tl.int64) * S + keys, round_to_uint8(steps).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(total_ptr + rows, total, mask=rows < M)


def _empty(
    scores: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
    signed_probabilities: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = torch.int8 if signed_probabilities and probability_scale is not None else torch.uint8
    return scores.new_empty(scores.shape, dtype=dtype), scores.new_empty(leading(scores, 1), dtype=torch.float32)


@cuda_op(_empty)
def softmax_quantize(
    scores: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
    signed_probabilities: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantized probabilities of attention.

    Args:
        scores: `[B, H, T, S]` float.
        mask: bool (True takes part) or float (added), broadcastable to `[B, H, T, S]`, or None.
        is_causal: token t sees the keys up to t.
        probability_scale: `[1, H or 1, 1, 1]` float32, positive; None for the token-wise form.
        signed_probabilities: in the static form, int8 of at most 127 instead of uint8 of at most 255.

    Returns:
        `q [B, H, T, S]` uint8 or int8, and `l [B, H, T, 1]` float32.
    """
    q, total = _empty(scores, mask, is_causal, probability_scale, signed_probabilities)
    if q.numel():
        rows, m, s, stride = strided_rows(scores)
        config = choose_rows("softmax_quantize", scores, m, s, row_config(m, s))
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        if mask is not None:
            mask = mask.expand(scores.shape)
        mask_strides = mask.stride() if mask is not None else (0, 0, 0, 0)
        per_head = int(probability_scale is not None and probability_scale.numel() > 1)
        _softmax_quantize[grid](
            rows,
            mask,
            probability_scale.contiguous() if probability_scale is not None else None,
            q,
            total,
            m,
            scores.shape[2],
            s,
            scores.shape[1],
            stride,
            *mask_strides,
            per_head,
            CAUSAL=is_causal,
            MOST=127.0 if q.dtype is torch.int8 else 255.0,
            **config,
            **EXACT,
        )
    return q, total
