"""A quantized cache of keys and values for transformers' `generate()` (as in KIVI, 2402.02750; MiniKV, 2411.18077).

    keys:    a scale and a least value for each channel of `group` tokens     (channels differ, and keep differing)
    values:  a scale and a least value for each token, in `group` channels

    code = round((x - least) / scale),   scale = (largest - least) / (2^bits - 1),   in float16

The newest tokens stay as they are, at least `residual` of them; older ones are quantized once, when `group` of them
have left that window, and never again. Heads that share keys share their cache: nothing is repeated beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError
from .formats import pack, unpack

BITS = {"int8": 8, "int4": 4, "int2": 2}
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
    scale = ((largest - least.float()) / (2**bits - 1)).clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16)
    codes = ((x - least.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, least


def kv_cache(format: str = "int8", *, group: int = 32, residual: int = 128) -> Any:
    """A cache for `model.generate(..., past_key_values=kv_cache("int4"))`; one for each call.

    Args:
        format: `"int8"`, `"int4"` or `"int2"`.
        group: tokens that share a key channel's scale, and channels that share a value's; the heads' width must be a
            multiple of it.
        residual: newest tokens that stay in the model's dtype.

    Returns:
        A `transformers.Cache`; its `nbytes` is what it holds, its `float_nbytes` what it would in the model's dtype.

    Raises:
        RecipeError: an unknown format, or a size below 1.
        ImportError: transformers is not installed.
    """
    from transformers.cache_utils import Cache, DynamicLayer  # imported late: only this needs it

    if format not in BITS:
        raise RecipeError(f"no KV cache in {format!r}", fix=f"use one of {', '.join(BITS)}")
    for name, value in (("group", group), ("residual", residual)):
        if type(value) is not int or value < 1:
            raise RecipeError(f"KV cache: {name}={value!r}", fix="use an int of 1 or more")
    bits = BITS[format]

    class QuantizedLayer(DynamicLayer):
        """Keys and values of one attention: packed ones, and the newest in floats."""

        is_croppable = False  # codes of a group of tokens cannot be parted

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            width = key_states.shape[-1], value_states.shape[-1]
            if width[1] % group:
                fix = f"use group={_divisor(width[1], group)}"
                raise RecipeError(f"KV cache: heads of {width[1]} channels do not divide by group={group}", fix=fix)
            self.width = width
            self.keys, self.values = (x[:, :, :0] for x in (key_states, value_states))
            self.packed_keys = quantize_keys(self.keys, bits, group)
            self.packed_values = quantize_values(self.values, bits, group)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Take in new tokens' `[B, H, T, D]`; returns all tokens', in the model's dtype."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
            keys = dequantize_keys(self.packed_keys, bits, group, self.width[0], self.dtype)
            values = dequantize_values(self.packed_values, bits, group, self.width[1], self.dtype)
            everything = torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)
            self._pack()
            return everything

        def _pack(self) -> None:
            """Quantize what has left the window, in whole groups."""
            old = (self.keys.shape[2] - residual) // group * group
            if old > 0:
                new = quantize_keys(self.keys[:, :, :old], bits, group)
                self.packed_keys = tuple(torch.cat(pair, 2) for pair in zip(self.packed_keys, new, strict=True))
                new = quantize_values(self.values[:, :, :old], bits, group)
                self.packed_values = tuple(torch.cat(pair, 2) for pair in zip(self.packed_values, new, strict=True))
                self.keys, self.values = self.keys[:, :, old:].clone(), self.values[:, :, old:].clone()

        @property
        def tensors(self) -> tuple[Tensor, ...]:
            """All that is held."""
            return (*self.packed_keys, *self.packed_values, self.keys, self.values) if self.is_initialized else ()

        def get_seq_length(self) -> int:
            """Tokens, packed or not."""
            return self.packed_keys[0].shape[2] + self.keys.shape[2] if self.is_initialized else 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            """Rows in another order (beam search)."""
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            """Some rows of the batch."""
            self._each(lambda x: x[indices.to(x.device)])

        def batch_repeat_interleave(self, repeats: int) -> None:
            """Each row as often as `repeats` says."""
            self._each(lambda x: x.repeat_interleave(repeats, 0))

        def _each(self, change: Any) -> None:
            if self.is_initialized:
                self.packed_keys = tuple(map(change, self.packed_keys))
                self.packed_values = tuple(map(change, self.packed_values))
                self.keys, self.values = change(self.keys), change(self.values)

    class KVCache(Cache):
        """See `kv_cache`."""

        def __init__(self) -> None:
            super().__init__(layer_class_to_replicate=QuantizedLayer)

        @property
        def nbytes(self) -> int:
            """Held by all layers."""
            return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors)

        @property
        def float_nbytes(self) -> int:
            """What all layers would hold in the model's dtype."""
            sizes = (
                layer.get_seq_length()
                * layer.keys.shape[0]
                * layer.keys.shape[1]
                * sum(layer.width)
                * layer.dtype.itemsize
                for layer in self.layers
                if layer.is_initialized
            )
            return sum(sizes)

    return KVCache()


def _divisor(width: int, group: int) -> int:
    return next(g for g in range(min(group, width), 0, -1) if width % g == 0)
