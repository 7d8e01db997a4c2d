"""Attention whose softmax is rounded to unsigned 8 bit: the explicit form of what `int8_attention` computes.

    A = Q K^T * scale + mask;  P = dq(q(softmax(A)));  O = P V        (ZeroQuant-HERO's Softmax^quant, static)

Operands and result are floats. It stands in the graph between `insert_qdq` and `fuse_attention` only, because torch's
own attention has no place for a quantize between its two products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def quantized_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    probability_scale: Tensor | None,
    signed_probabilities: bool = False,
) -> Tensor:
    """Scaled dot-product attention with quantized probabilities.

    Args:
        query: `[B, H, T, D]` float.
        key, value: `[B, Hkv, S, D]` float, H a multiple of Hkv.
        mask: bool (True takes part) or float (added), broadcastable to `[B, H, T, S]`, or None.
        is_causal: the lower triangle takes part.
        scale: of the scores; None for `1 / sqrt(D)`.
        probability_scale: `[1, H or 1, 1, 1]` float32, static; None quantizes `exp(A - max)` in steps of 1/255.
        signed_probabilities: with a static scale, in [0, 127] instead of [0, 255].

    Returns:
        `[B, H, T, D]` of the query's dtype. A row that is wholly masked gives zeros.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (
        query.float() @ key.float().transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    )
    exponentials = softmax_numerators(scores, mask, is_causal)
    total = exponentials.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if probability_scale is None:
        steps = numerics.quantize_static(exponentials, torch.full((), 1 / 255, device=query.device), unsigned=True)
        probabilities = steps.float() / (255 * total)
    else:
        steps = numerics.quantize_static(exponentials / total, probability_scale, unsigned=not signed_probabilities)
        probabilities = steps.float() * probability_scale
    return (probabilities @ value.float()).to(query.dtype)


def softmax_numerators(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """`exp(A - max)` of masked scores `[B, H, T, S]` float32; zeros where a row is wholly masked."""
    if is_causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril().logical_not(), -torch.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.float()
    top = scores.amax(-1, keepdim=True)
    return (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
