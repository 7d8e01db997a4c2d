"""Attention over a quantized cache of keys and values (as in KIVI, 2402.02750; MiniKV, 2411.18077).

    keys:    a scale and a least value for each channel of `group` tokens     (channels differ, and keep differing)
    values:  a scale and a least value for each token, in `group` channels

    code = round((x - least) / scale),   scale = (largest - least) / (2^bits - 1),   in float16

    O = softmax(Q K^T * score_scale + mask) V,   K and V what the codes stand for, and behind them the newest in floats

The cache is 2 * B * Hkv * S * D * bits / 8 bytes and the scales. Query heads that share keys read them once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..formats import pack, unpack
from .registry import dialect_op

Packed = tuple[Tensor, ...]  # codes, scales, least values


def quantize_keys(x: Tensor, bits: int, group: int) -> Packed:
    """Keys, each channel of `group` tokens by a scale of its own.

    Args:
        x: `[B, H, T, D]` of any float dtype, T a multiple of `group`.
        bits: 1 to 8.

    Returns:
        Codes `[B, H, T, ceil(D * bits / 8)]` uint8, scales and least values `[B, H, T / group, D]` float16.
    """
    codes, scale, least = _quantize(x.unflatten(2, (-1, group)), 3, bits)
    return pack(codes.flatten(2, 3), bits), scale.squeeze(3), least.squeeze(3)


def quantize_values(x: Tensor, bits: int, group: int) -> Packed:
    """Values, each token's `group` channels by a scale of their own.

    Args:
        x: `[B, H, T, D]` of any float dtype, D a multiple of `group`.
        bits: 1 to 8.

    Returns:
        Codes `[B, H, T, ceil(D * bits / 8)]` uint8, scales and least values `[B, H, T, D / group]` float16.
    """
    codes, scale, least = _quantize(x.unflatten(3, (-1, group)), 4, bits)
    return pack(codes.flatten(3), bits), scale.squeeze(4), least.squeeze(4)


def dequantize_keys(packed: Packed, bits: int, group: int, features: int, dtype: torch.dtype) -> Tensor:
    """What `quantize_keys` stored: `[B, H, T, features]`."""
    codes, scale, least = packed
    grouped = unpack(codes, bits, features).unflatten(2, (-1, group))
    return (grouped * scale.float().unsqueeze(3) + least.float().unsqueeze(3)).flatten(2, 3).to(dtype)


def dequantize_values(packed: Packed, bits: int, group: int, features: int, dtype: torch.dtype) -> Tensor:
    """What `quantize_values` stored: `[B, H, T, features]`."""
    codes, scale, least = packed
    grouped = unpack(codes, bits, features).unflatten(3, (-1, group))
    return (grouped * scale.float().unsqueeze(4) + least.float().unsqueeze(4)).flatten(3).to(dtype)


def _quantize(x: Tensor, dim: int, bits: int) -> Packed:
    """Codes of x's shape, and scales and least values with one element along `dim`."""
    x = x.float()
    least, largest = x.amin(dim, keepdim=True).to(torch.float16), x.amax(dim, keepdim=True)
    scale = (largest - least.float()) / (2**bits - 1)
    # Below its normal numbers float16 has few digits: rounded up there, so that no code lies past the last one.
    few = 2.0**-24  # the smallest of all
    scale = torch.where(scale < torch.finfo(torch.float16).tiny, (scale / few).ceil().clamp(min=1) * few, scale)
    scale = scale.to(torch.float16)
    codes = ((x - least.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, least


@dialect_op
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
    """See the module's docstring; query head h reads key head `h // (H / Hkv)`.

    Args:
        query: `[B, H, T, D]`, any float dtype.
        key_codes, key_scale, key_least: of P tokens, as `quantize_keys` gives them.
        value_codes, value_scale, value_least: as `quantize_values` gives them.
        new_keys: `[B, Hkv, R, D]` of query's dtype: the tokens behind those, S = P + R of them together.
        new_values: `[B, Hkv, R, Dv]`.
        mask: bool (True takes part) or float (added), broadcastable to `[B, H, T, S]`, or None.
        is_causal: the last query sees all keys, the one before it all but the last, and so on.
        score_scale: of the products of queries and keys.
        bits: of a code.
        group: tokens that share a key's scale, channels that share a value's.

    Returns:
        `[B, H, T, Dv]` of query's dtype, computed in float32. A row that is wholly masked gives zeros, as torch's does.
    """
    dtype, (tokens, width), heads = query.dtype, query.shape[2:], new_keys.shape[1]
    keys = dequantize_keys((key_codes, key_scale, key_least), bits, group, width, dtype)
    values = dequantize_values((value_codes, value_scale, value_least), bits, group, new_values.shape[-1], dtype)
    keys, values = torch.cat([keys, new_keys], 2).float(), torch.cat([values, new_values], 2).float()
    shared = query.float().unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, H / Hkv * T, D]
    scores = (shared @ keys.transpose(-2, -1) * score_scale).unflatten(2, (-1, tokens)).flatten(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask.float()
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~seen.tril(scores.shape[-1] - tokens), -math.inf)
    wholly_masked = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = scores.softmax(-1).masked_fill(wholly_masked, 0.0).unflatten(1, (heads, -1)).flatten(2, 3)
    return (probabilities @ values).unflatten(2, (-1, tokens)).flatten(1, 2).to(dtype)
