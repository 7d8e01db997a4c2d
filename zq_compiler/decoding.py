"""One step of decoding as example inputs: new tokens behind a key-value cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .errors import ExportError
from .torch_private import pytree

_BATCH, _PAST, _NEW = 2, 5, 3  # sizes that differ, so that the capture cannot take one for another


def inputs_with_past(model: Any) -> dict[str, Any]:
    """Keyword arguments of a call that continues a cache, for a causal language model of transformers.

    Returns:
        `input_ids [B, T]`, `attention_mask [B, S + T]` and `position_ids [B, T]`, int64, the last two where the model
        takes them, and `past_key_values`, a `DynamicCache` of `[B, kv_heads, S, head_dim]` a layer, which the model
        filled. Whatever the sizes, a capture of the call serves prefill (`S = 0`) and decoding (`T = 1`).

    Raises:
        ExportError: the model is no causal language model, or does not keep its past as one key and one value a layer.
    """
    parameters = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(model, "it is an encoder-decoder, whose cache holds keys of the encoder's outputs too")
    if config is None or not {"input_ids", "past_key_values"} <= parameters.keys():
        raise _refused(model, "it takes no past_key_values")
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (_BATCH, _PAST + _NEW), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    given = {"attention_mask": mask, "position_ids": mask.cumsum(-1) - 1}
    inputs: dict[str, Any] = {"input_ids": ids[:, _PAST:]}
    inputs |= {name: value for name, value in given.items() if name in parameters}
    if "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"][:, _PAST:]
    return {**inputs, "past_key_values": _past(model, ids[:, :_PAST])}


def _past(model: Any, ids: Tensor) -> Any:
    """What the model keeps of these tokens."""
    from transformers import DynamicCache

    with torch.no_grad():
        kept = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    if kept is None:
        raise _refused(model, "it returns no past_key_values")
    layers = getattr(kept, "layers", [])
    if not layers or not all(_is_key_value(layer, ids.shape) for layer in layers):
        what = f"it keeps its past as {type(kept).__name__}, not as one key and one value a layer"
        raise _refused(model, what)
    past = DynamicCache()  # of plain layers, which hold tensors only; a layer of a sliding window counts tokens too
    for number, layer in enumerate(layers):
        past.update(layer.keys, layer.values, number)
    return past


def _is_key_value(layer: Any, ids: torch.Size) -> bool:
    """Whether all that a layer holds of tokens `[B, T]` is a key and a value of each."""
    held = [value for value in vars(layer).values() if isinstance(value, Tensor) and value.ndim > 0]
    return len(held) == 2 and all(x.ndim == 4 and (x.shape[0], x.shape[2]) == tuple(ids) for x in held)


def takes_past(spec: pytree.TreeSpec | None) -> bool:
    """Whether a structure of inputs holds a key-value cache."""
    return bool(cache_leaves(spec))


def cache_leaves(spec: pytree.TreeSpec | None) -> dict[int, str]:
    """Which leaves of a structure a key-value cache holds: position -> `0.key`."""
    if spec is None:
        return {}
    tree = pytree.tree_unflatten(range(spec.num_leaves), spec)
    caches = [x for x in pytree.tree_leaves(tree, is_leaf=_is_cache) if _is_cache(x)]
    layers = [layer for cache in caches for layer in cache.layers]
    parts = (("keys", "key"), ("values", "value"))
    return {getattr(layer, held): f"{i}.{name}" for i, layer in enumerate(layers) for held, name in parts}


def _is_cache(value: Any) -> bool:
    return all(hasattr(layer, "keys") and hasattr(layer, "values") for layer in getattr(value, "layers", (None,)))


def _refused(model: Any, why: str) -> ExportError:
    return ExportError(
        f"no key-value cache can go in and out of its graph: {why}",
        where=type(model).__name__,
        fix="leave with_past out: a graph without a cache reads all tokens at every step",
    )
