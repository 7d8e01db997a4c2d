"""A quantized cache of keys and values for transformers' `generate()` (as in KIVI, 2402.02750; MiniKV, 2411.18077).

    `kernels.cached_attention` says how they are stored.

The newest tokens stay as they are, at least `residual` of them; older ones are quantized once, when `group` of them
have left that window, and never again. Heads that share keys share their cache: nothing is repeated beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError
from .kernels.cached_attention import (
    Packed,
    cached_attention,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from .kernels.cuda import registration
from .torch_private import subclass_functions_off

BITS = {"int8": 8, "int4": 4, "int2": 2}
IMPLEMENTATION = "zeroquant"  # of attention, among transformers' own
_WITHOUT_MODEL = 'call model.set_attn_implementation("sdpa"), and leave model out'


def kv_cache(format: str = "int8", *, group: int = 32, residual: int = 128, model: Any = None) -> Any:
    """A cache for `model.generate(..., past_key_values=kv_cache("int4"))`; one for each call.

    An encoder-decoder takes `transformers.EncoderDecoderCache(kv_cache("int4"), transformers.DynamicCache())`: what it
    keeps of the encoder's outputs is a cache of its own, of either kind.

    Args:
        format: `"int8"`, `"int4"` or `"int2"`.
        group: tokens that share a key channel's scale, and channels that share a value's; the heads' width must be a
            multiple of it.
        residual: newest tokens that stay in the model's dtype.
        model: whose attentions over itself are to read the codes, by the op `cached_attention`, one token at a time;
            a prompt is read in floats. Its attention implementation must be `"sdpa"` and becomes `"zeroquant"`, which
            for other caches is the same. Without it the model is left as it is, and each layer's cache is turned into
            floats for it.

    Returns:
        A `transformers.Cache`; its `nbytes` is what it holds, its `float_nbytes` what it would in the model's dtype.

    Raises:
        RecipeError: an unknown format, a size below 1, or a model without attentions that can be exchanged.
        ImportError: transformers is not installed.
    """
    from transformers.cache_utils import Cache, DynamicLayer  # imported late: only this needs it

    if format not in BITS:
        raise RecipeError(f"no KV cache in {format!r}", fix=f"use one of {', '.join(BITS)}")
    for name, value in (("group", group), ("residual", residual)):
        if type(value) is not int or value < 1:
            raise RecipeError(f"KV cache: {name}={value!r}", fix="use an int of 1 or more")
    bits = BITS[format]
    if model is not None:
        _exchange_attentions(model)

    class QuantizedLayer(DynamicLayer):
        """Keys and values of one attention: packed ones, and the newest in floats."""

        is_croppable = False  # codes of a group of tokens cannot be parted

        @property
        def keys(self) -> Tensor | None:
            """All tokens' keys in the model's dtype, for whoever reads them past `update`."""
            return self._everything()[0] if self.is_initialized else None

        @keys.setter
        def keys(self, value: None) -> None:
            _only_forget(value)

        @property
        def values(self) -> Tensor | None:
            """All tokens' values."""
            return self._everything()[1] if self.is_initialized else None

        @values.setter
        def values(self, value: None) -> None:
            _only_forget(value)

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            width = key_states.shape[-1], value_states.shape[-1]
            if width[1] % group:
                fix = f"use group={_divisor(width[1], group)}"
                raise RecipeError(f"KV cache: heads of {width[1]} channels do not divide by group={group}", fix=fix)
            self.width = width
            self.new_keys, self.new_values = (x[:, :, :0] for x in (key_states, value_states))
            self.packed_keys = quantize_keys(self.new_keys, bits, group)
            self.packed_values = quantize_values(self.new_values, bits, group)
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Take in new tokens' `[B, H, T, D]`; returns all tokens', in the model's dtype."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            with torch.autocast(key_states.device.type, enabled=False):
                self.new_keys = torch.cat([self.new_keys, key_states.to(self.dtype)], 2)
                self.new_values = torch.cat([self.new_values, value_states.to(self.dtype)], 2)
                packed = self.packed_keys[0].shape[2]
                if model is not None and packed and key_states.shape[2] == 1:
                    held = self.packed_keys, self.packed_values, self.new_keys, self.new_values, bits, group
                    tokens = self.get_seq_length()
                    everything = _stand_in(key_states, tokens, held), _stand_in(value_states, tokens, held)
                else:
                    everything = self._everything()
                self._pack()
            return everything

        def _everything(self) -> tuple[Tensor, Tensor]:
            keys = dequantize_keys(self.packed_keys, bits, group, self.width[0], self.dtype)
            values = dequantize_values(self.packed_values, bits, group, self.width[1], self.dtype)
            return torch.cat([keys, self.new_keys], 2), torch.cat([values, self.new_values], 2)

        def _pack(self) -> None:
            """Quantize what has left the window, in whole groups."""
            old = (self.new_keys.shape[2] - residual) // group * group
            if old > 0:
                new = quantize_keys(self.new_keys[:, :, :old], bits, group)
                _refuse_overflow(new)
                self.packed_keys = tuple(torch.cat(pair, 2) for pair in zip(self.packed_keys, new, strict=True))
                new = quantize_values(self.new_values[:, :, :old], bits, group)
                _refuse_overflow(new)
                self.packed_values = tuple(torch.cat(pair, 2) for pair in zip(self.packed_values, new, strict=True))
                self.new_keys, self.new_values = (x[:, :, old:].clone() for x in (self.new_keys, self.new_values))

        @property
        def tensors(self) -> tuple[Tensor, ...]:
            """All that is held."""
            if not self.is_initialized:
                return ()
            return *self.packed_keys, *self.packed_values, self.new_keys, self.new_values

        def get_seq_length(self) -> int:
            """Tokens, packed or not."""
            return self.packed_keys[0].shape[2] + self.new_keys.shape[2] if self.is_initialized else 0

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
                self.new_keys, self.new_values = change(self.new_keys), change(self.new_values)

    class KVCache(Cache):
        """See `kv_cache`."""

        def __init__(self) -> None:
            super().__init__(layer_class_to_replicate=QuantizedLayer)
            self._last_layer: int | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            """What `QuantizedLayer.update` says, of one layer.

            Raises:
                RecipeError: a layer's attention over itself and its cross-attention both write here.
            """
            if layer_idx == self._last_layer and len(self.layers) > 1:
                what = f"two attentions of layer {layer_idx} write to it, as an encoder-decoder's do"
                fix = "give generate() transformers.EncoderDecoderCache(kv_cache(...), DynamicCache())"
                raise RecipeError(f"KV cache: {what}", fix=fix)
            self._last_layer = layer_idx
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

        @property
        def nbytes(self) -> int:
            """Held by all layers."""
            return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors)

        @property
        def float_nbytes(self) -> int:
            """What all layers would hold of all tokens in the model's dtype; of a sliding window, the model's own cache
            holds less."""
            sizes = (
                layer.get_seq_length()
                * layer.new_keys.shape[0]
                * layer.new_keys.shape[1]
                * sum(layer.width)
                * layer.dtype.itemsize
                for layer in self.layers
                if layer.is_initialized
            )
            return sum(sizes)

    return KVCache()


Held = tuple[Packed, Packed, Tensor, Tensor, int, int]  # packed keys and values, the newest in floats, bits, group


def _only_forget(value: Any) -> None:
    if value is not None:
        what = "its keys and values are packed, and cannot be set, or taken back as assisted decoding does"
        raise RecipeError(f"KV cache: {what}", fix="call update or reset, or leave assisted decoding out")


def _refuse_overflow(packed: Packed) -> None:
    if not all(part.isfinite().all() for part in packed[1:]):
        what = "keys or values are NaN, or beyond what float16 holds, in which their scales are stored"
        raise RecipeError(f"KV cache: {what}", fix="generate with the model's own cache")


class _StandIn(Tensor):
    """All tokens' keys or values as the model hands them on to its attention. Nobody else can compute with them."""

    held: Held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with subclass_functions_off():
            result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not any(result is arg for arg in args):
            what = "the model changes keys or values between its cache and its attention, which then cannot read codes"
            raise RecipeError(f"KV cache: {what}", fix=_WITHOUT_MODEL)
        return result


def _stand_in(like: Tensor, tokens: int, held: Held) -> Tensor:
    nan = like.new_full((), torch.nan).expand(*like.shape[:2], tokens, like.shape[3]).as_subclass(_StandIn)
    nan.held = held
    return nan


def _exchange_attentions(model: Any) -> None:
    """Raises a RecipeError, and changes nothing, where not all of a model's attentions follow."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name, fix = type(model).__name__, "leave model out"
    configs = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m, "set_attn_implementation")]
    given = {getattr(config, "_attn_implementation", None) for config in configs}
    if not configs:
        raise RecipeError(f"KV cache: {name} is no model of transformers", fix=fix)
    if not given <= {"sdpa", IMPLEMENTATION}:
        what = f"attention of {name} is {', '.join(sorted(map(str, given)))}, and must be sdpa"
        raise RecipeError(
            f"KV cache: {what}", fix=f'call model.set_attn_implementation("sdpa") first if it has that, or {fix}'
        )
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    if any(getattr(config, "_attn_implementation", None) != IMPLEMENTATION for config in configs):
        model.set_attn_implementation("sdpa")
        raise RecipeError(f"KV cache: the attentions of {name} cannot be exchanged", fix=fix)


# What transformers' models hand to an attention that does not change what it computes, or is heeded below.
_HEEDED = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "cache_position", "use_cache"}
_HEEDED |= {"output_attentions", "output_hidden_states", "return_dict", "cu_seq_lens_q", "cu_seq_lens_k"}
_HEEDED |= {"max_length_q", "max_length_k", "num_items_in_batch", "logits_to_keep", "output_router_logits"}


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """transformers' interface; `[B, H, T, D] -> [B, T, H, D]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    held: Held | None = getattr(key, "held", None)
    if held is None and not isinstance(value, _StandIn):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if unknown := [name for name, given in how.items() if given is not None and name not in _HEEDED]:
        what = f"no attention over codes knows {unknown[0]}, which {type(module).__name__} asks for"
        raise RecipeError(f"KV cache: {what}", fix=_WITHOUT_MODEL)
    if getattr(value, "held", None) is not held or held is None:
        what = f"{type(module).__name__} attends to other keys or values than its cache gave"
        raise RecipeError(f"KV cache: {what}", fix=_WITHOUT_MODEL)
    scale = how.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    packed_keys, packed_values, keys, values, bits, group = held
    operands = query, *packed_keys, *packed_values, keys, values, attention_mask
    out = _op(query.device)(*operands, False, scale, bits, group)  # one query: it may see all
    return out.transpose(1, 2).contiguous(), None


def _op(device: torch.device) -> Any:
    """The Triton kernel on CUDA, elsewhere the reference.

    Raises:
        KernelBuildError: on CUDA, where Triton is not installed.
    """
    if device.type != "cuda":
        return cached_attention
    registration.load()
    return getattr(torch.ops, registration.NAMESPACE).cached_attention.default


def _divisor(width: int, group: int) -> int:
    return next(g for g in range(min(group, width), 0, -1) if width % g == 0)
