"""Attention in INT8, as ZeroQuant-HERO quantizes its attention module (2310.17723): the softmax alone is float32.

    S = Q K^T                                        int32, exact
    A = S * score_scale + mask                       float32; -Inf where a key takes no part
    E = exp(A - max A),  l = max(sum E, 1)           float32; E = 0 in a row that is wholly masked
    P_q = round(E / l / probability_scale)           static Softmax^quant: unsigned 8 bit, at most 255
    O = (P_q V) * out_scale
    E_q = round(E * 255)                             token-wise, without calibration
    O = (E_q V) * out_scale * (1 / (255 * l))

in this order, rounded half to even. A static step loses the probabilities of long rows, which are all below half of it;
the token-wise form has the whole range for every row. INT8 outputs are round(O), saturated to [-128, 127]: FWQ, when
out_scale carries one factor a feature.

Reads B*H*T*D + 2*B*Hkv*S*D bytes and writes B*H*T*D elements; a kernel keeps scores and probabilities in the cache. The
int32 sums are exact for S and D up to 2^31 / (255 * 128).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .registry import dialect_op


@dialect_op
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
    """INT8 attention with static scales; query head h reads key head `h // (H / Hkv)`.

    Args:
        query: `[B, H, T, D]` int8.
        key, value: `[B, Hkv, S, D]` int8, H a multiple of Hkv.
        score_scale: `[1, H or 1, 1, 1]` float32: query scale * key scale * softmax scale.
        mask: bool (True takes part) or float (added), broadcastable to `[B, H, T, S]`, or None.
        is_causal: token t sees the keys up to t, as in torch's attention.
        probability_scale: `[1, H or 1, 1, 1]` float32, positive; None for the token-wise form.
        out_scale: `[1, H or 1, 1, D or 1]` float32: value scale, times probability_scale in the static form, divided
            by the output's step when that is int8.
        out_dtype: int8, float32, bfloat16 or float16.
        signed_probabilities: in the static form, P_q is at most 127 instead of 255.

    Returns:
        `[B, H, T, D]` of `out_dtype`, the transpose of a contiguous `[B, T, H, D]`. A row that is wholly masked gives
        zeros. NaN in the mask or a scale gives NaN, but 0 in int8, which cannot carry it.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = _product(query, key.transpose(-2, -1)) * score_scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.float()
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    # One more key that takes no part: amax needs one where S is 0. (torch's pad would make a dynamic S constant.)
    none = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    top = torch.cat([scores, none], -1).amax(-1, keepdim=True)
    exponentials = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    total = exponentials.sum(-1, keepdim=True).clamp(min=1)
    if probability_scale is None:
        out = _product((exponentials * 255).round(), value) * out_scale * (1 / (255 * total))
    else:
        most = 127 if signed_probabilities else 255
        out = _product((exponentials / total / probability_scale).round().clamp(max=most), value) * out_scale
    if out_dtype is torch.int8:
        out = torch.nan_to_num(out.round(), nan=0.0).clamp(-128, 127)
    return out.to(out_dtype).transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The int32 sums of a batched matrix product, as float32; torch has no int8 `bmm`.

    float64 holds them exactly, and so does float32 where there are few summands, each below 2^15, and no autocast.
    """
    k = a.shape[-1]  # a size that is known at run time only must not be compared: that would be a guard on it
    device = a.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # meta has none, and asking raises
    if isinstance(k, int) and k * 2**15 <= 2**24 and not autocast:
        return a.float() @ b.float()
    return (a.double() @ b.double()).float()
