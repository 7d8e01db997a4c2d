"""Tiny random models of every type that the installed transformers knows, and dummy inputs for them.

A configuration shrinks by its attributes' names, sub-configurations included: every width becomes 64, every head 16,
every stack 2 layers, so that what was divisible or equal still is. Where that gives no model that runs, only depth,
vocabulary and the like shrink. `FIXES` holds, as data, what a type needs beyond that. Inputs go by argument names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import torch
from torch import Tensor

MAX_PARAMETERS = 40_000_000
WIDTH, HEAD, HEADS, LAYERS, VOCAB, LENGTH, IMAGE, PATCH = 64, 16, 4, 2, 128, 16, 64, 8
FIRST_SPECIAL = 100  # ids from here on are special tokens; text has smaller ones


class CannotBuild(Exception):  # noqa: N818 - an outcome
    """The type has no tiny model here, and why. Says nothing about the compiler."""


def model_types() -> list[str]:
    """Every model type of the installed transformers, in its own order."""
    return list(importlib.import_module("transformers").CONFIG_MAPPING)


def build(model_type: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A tiny model in eval mode with reproducible weights, and keyword inputs that it runs on.

    Raises:
        CannotBuild: no small configuration, no class, too many parameters, or no inputs that it accepts.
    """
    try:
        return _build(model_type, keep_widths=False)
    except CannotBuild:
        with contextlib.suppress(Exception):
            return _build(model_type, keep_widths=True)
        raise


def _build(model_type: str, keep_widths: bool) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = tiny_config(model_type, keep_widths)
    model_class = _model_class(type(config))
    count = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # what cannot be built without memory is small
        count = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if count > MAX_PARAMETERS:
        raise CannotBuild(f"{count / 1e6:.0f} M parameters though shrunk")
    torch.manual_seed(0)
    try:
        model = model_class(config).eval().float()
    except Exception as error:
        raise CannotBuild(f"{model_class.__name__}(config): {first_line(error)}") from error
    _randomise(model)
    return model, runnable_inputs(model)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, without the folders of this machine."""
    lines = re.sub(r"(?<!\w)/(?:[\w.+-]+/)+", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _model_class(config_class: type) -> Any:
    from transformers import MODEL_MAPPING, PreTrainedModel

    if config_class in MODEL_MAPPING:
        found = MODEL_MAPPING[config_class]
        return found[0] if isinstance(found, tuple) else found
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise CannotBuild(first_line(error)) from error
    classes = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and getattr(c, "config_class", None) is config_class
        and c.__module__ == name and "forward" in vars(c)
    ]  # fmt: skip
    if not classes:
        raise CannotBuild(f"no model class takes {config_class.__name__}")
    return min(classes, key=lambda c: not c.__name__.endswith("Model"))


def _randomise(model: torch.nn.Module) -> None:
    """Weights of linears at unit gain, so that no output is close to zero and no layer is inert."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=max(module.in_features, 1) ** -0.5)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.isnan().any():  # never initialised
            torch.nn.init.normal_(parameter, std=0.02)


# --- configurations ------------------------------------------------------------------------------------------------

# name of an attribute -> its small value; the first pattern that matches the whole name decides, None leaves it alone.
RULES: tuple[tuple[str, int | None], ...] = (
    (r".*(dropout|prob|std|eps|factor|theta|ratio|kernel|stride|dilation|groups|_cost|coeff|index_n|scale).*", None),
    (r".*(in_channels|num_channels|audio_channels|in_chans|type_vocab_size|num_feat_extract_layers)", None),
    (r"(\w*_)?(num|n)?_?experts?_per_(tok|token)|moe_topk|moe_top_k|moe_k|num_selected_experts|top_k", 2),
    (r"n_group|num_expert_group|topk_group|n_groups|n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"(\w*_)?(num|n)_(\w*_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers", 1),
    (r"(\w*_)?(num_)?(key_value|kv)_heads|num_kv_heads|n_kv_heads|attention_groups|multi_query_group_num", 2),
    (r"(\w*_)?heads?", HEADS),
    (r"(\w*_)?(head_dim|head_size|d_kv|d_head|dim_head|dim_per_head|kv_channels)", HEAD),
    (r"d_ff|d_inner|n_inner|inner_dim", 2 * WIDTH),
    (r"qk_rope_head_dim|rotary_dim|d_rel|sliding_window(_size)?|attention_chunk_size|local_attention|index_topk", 8),
    (r"\w+_lora_rank|dt_rank|mamba_dt_rank|time_step_rank", 32),
    (r"num_kv_shared_layers|num_key_value_shared_layers", 0),
    (r"(\w*_)?(num|n)_(\w*_)?(layers?|blocks)|(\w*_)?(depth|layers)|n_layer", LAYERS),
    (r"(\w*_)?(intermediate|ffn|ff|mlp|feedforward|feed_forward)_?(size|dim|hidden_size|hidden_dim)(_\w+)?", 2 * WIDTH),
    (r"(\w*_)?vocab_size(_\w+)?|codebook_size|num_embeddings", VOCAB),
    (r"(\w*_)?(hidden|embed|embedding|projection|proj|output|model|decoder|encoder|latent)_?(size|dim)", WIDTH),
    (r"(\w*_)?(d_model|n_embd|hidden_size|hidden_dim|embed_dim|emb_dim|width|d_embed)(_\w+)?|dim|lru_width", WIDTH),
    (r"hidden_channels|conv_dim|upsample_initial_channel|lstm_width|d_attn|attention_dim", WIDTH),
    (r"(\w*_)?(max|n)_(\w*_)?positions?(_embeddings)?|max_seq_len\w*|context_length|block_size", 128),
    (r"(\w*_)?(image_size|img_size|pretrain_image_size)|image_height|image_width", IMAGE),
    (r"(\w*_)?patch_size", PATCH),
)
_NOT_WIDTHS = re.compile(
    r"layers|depth|n_layer|vocab|token|experts$|max_\w*positions?|position_embeddings|image_size|layer_types|_ind(ex|ic)"
)
# None stands for these in some default configurations, though the model needs a number.
FILL = {"head_dim": HEAD, "vocab_size": VOCAB, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}
_ALSO_DERIVED = ("_token_id", "rope_parameters", "rope_scaling", "layer_types", "layers_block_type", "mlp_layer_types")
_INDEX_LIST = re.compile(r"(out_indices|\w*_index(es)?|\w*indexes|\w*layer_indices|\w*block_index\w*|extract_layers)$")

# What a type needs beyond the rules: dotted attribute -> value.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
_VOCABULARY = {"vocab_size": VOCAB}
_FORECAST = {"prediction_length": 8, "context_length": 16}
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16},
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _FORECAST),
    **dict.fromkeys(("esmc", "fastspeech2_conformer", "vits"), _VOCABULARY),
    "esm": {"pad_token_id": 1, "mask_token_id": 2, "vocab_size": VOCAB},
    "fastspeech2_conformer_with_hifigan": {"model_config.vocab_size": VOCAB},
    "led": {"max_encoder_position_embeddings": 1040, "attention_window": 8},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "embedding_size": 32},
    "lilt": {"max_2d_position_embeddings": 128, "hidden_size": 96},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12, "max_2d_position_embeddings": 128},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (4, 4), "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "swin2sr": {"num_heads": [4], "depths": [1]},
}


def tiny_config(model_type: str, keep_widths: bool = False) -> Any:
    """The type's configuration, shrunk; with `keep_widths` only what `_NOT_WIDTHS` names.

    Raises:
        CannotBuild: its class refuses the values that the rules propose.
    """
    from transformers import CONFIG_MAPPING

    try:
        return _shrunk(CONFIG_MAPPING[model_type](), FIXES.get(model_type, {}), {}, keep_widths)
    except Exception as error:
        raise CannotBuild(f"its configuration: {first_line(error)}") from error


def _shrunk(config: Any, fixes: Mapping[str, Any], special: dict[str, int], keep_widths: bool) -> Any:
    """A new configuration of the same class. `special` numbers the special tokens alike in all sub-configurations."""
    fields = getattr(type(config), "__dataclass_fields__", {})
    layers = _layer_count(config)
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        derived = name in fields and fields[name].default is None  # the class computes it, unless told
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            inner = {k.split(".", 1)[1]: v for k, v in fixes.items() if k.startswith(name + ".")}
            changed[name] = _shrunk(value, inner, special, keep_widths)
            continue
        if name.startswith("_") or (keep_widths and not _NOT_WIDTHS.search(name)):
            continue
        if value is None and name in FILL and not keep_widths:
            changed[name] = FILL[name]
        elif (not derived or name.endswith(_ALSO_DERIVED)) and value != (
            new := small_value(name, value, layers, special)
        ):
            changed[name] = new
    if (groups := vars(config).get("num_key_value_heads")) and groups == vars(config).get("num_attention_heads"):
        changed["num_key_value_heads"] = HEADS
    kinds = len(dict.fromkeys(map(str, changed.get("layer_types") or ())))
    if kinds > LAYERS and "num_hidden_layers" in changed:
        changed["num_hidden_layers"] = kinds
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()) and not keep_widths:
        rope = changed.get("rope_parameters") or getattr(config, "rope_parameters", None) or {}
        sections = _sections(3, rope.get("partial_rotary_factor") or 1.0)
        changed["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **rope, "mrope_section": sections}
    changed.update({k: v for k, v in fixes.items() if "." not in k})
    return type(config)(**changed)


def _layer_count(config: Any) -> int:
    names = ("num_hidden_layers", "num_layers", "n_layer", "depth", "n_layers", "encoder_layers", "layers")
    values = (vars(config).get(name) for name in names)  # not getattr: some alias it to a number of stages
    return next((v for v in values if isinstance(v, int) and v > 0), 0)


def small_value(name: str, value: Any, layers: int = 0, special: dict[str, int] | None = None) -> Any:
    """What the rules make of one attribute.

    >>> small_value("hidden_size", 4096), small_value("num_heads", 8), small_value("layer_types", ["a"] * 9, 9)
    (64, 4, ['a', 'a'])
    >>> small_value("hidden_size", [64, 128]), small_value("out_indices", [3, 7], 12), small_value("depths", [3, 6])
    ([64, 128], [0, 1], [1, 1])
    """
    special = {} if special is None else special
    if isinstance(value, dict):
        return _small_rope(value)
    if isinstance(value, list | tuple):
        return type(value)(_small_list(name, list(value), layers))
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.search(r"token(_id|_index)?$|_id$", name) and value >= 0:
        return value if value < FIRST_SPECIAL else special.setdefault(name, FIRST_SPECIAL + len(special) % 27)
    small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), None)
    return value if small is None else min(value, small)


def _small_list(name: str, value: list[Any], layers: int) -> list[Any]:
    if layers and len(value) == layers and layers > LAYERS:
        firsts = [next(v for v in value if repr(v) == kind) for kind in dict.fromkeys(map(repr, value))]
        return firsts if len(firsts) >= LAYERS and isinstance(value[0], str) else (firsts + value)[:LAYERS]
    if _INDEX_LIST.match(name) and all(isinstance(v, int) for v in value):
        top = min(layers or LAYERS, LAYERS) - 1
        return list(range(max(0, top + 1 - len(value)), top + 1)) if value else value
    if name in ("depths", "stage_num_blocks", "num_block_repeats", "blocks_per_stage"):
        return [min(v, 1) for v in value]
    if name in ("num_heads", "num_attention_heads", "encoder_num_heads"):
        return [HEADS for _ in value]
    return value


def _small_rope(value: dict[str, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(new.get("mrope_section"), list | tuple):
        new["mrope_section"] = _sections(len(new["mrope_section"]), new.get("partial_rotary_factor") or 1.0)
    return new | {k: v[: HEAD // 2] for k, v in new.items() if k in ("short_factor", "long_factor") and v}


def _sections(count: int, part: float = 1.0) -> list[int]:
    """Rotary sections that fill the rotated part of the small head."""
    each = max(int(HEAD * part) // 2 // count, 1)
    return [max(int(HEAD * part) // 2 - each * (count - 1), 1)] + [each] * (count - 1)


# --- inputs --------------------------------------------------------------------------------------------------------


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(5, FIRST_SPECIAL - 1, (rows, length), generator=torch.Generator().manual_seed(1))


def _attribute(config: Any, *names: str, default: int) -> int:
    for holder in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        for name in names:
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _shaped(shape: tuple[int | str, ...] | Tensor, config: Any) -> list[Tensor]:
    if isinstance(shape, Tensor):
        return [shape]
    return [_noise(*(_attribute(config, n, default=80) if isinstance(n, str) else n for n in shape))]


def _series(config: Any) -> list[Tensor]:
    length = _attribute(config, "context_length", default=32)
    channels = _attribute(config, "num_input_channels", "input_size", default=1)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    return [_noise(2, length + lags, channels), _noise(2, length + lags), _noise(2, 32)]


def _image_shapes(config: Any) -> list[Tensor]:
    size = _attribute(config, "image_size", default=IMAGE)
    channels = _attribute(config, "num_channels", "in_channels", "in_chans", default=3)
    return [_noise(2, channels, size, size), _noise(2, 3, IMAGE, IMAGE), _noise(2, 3, 224, 224)]


def _mel_shapes(config: Any) -> list[Tensor]:
    bins = _attribute(
        config, "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_projection_input_dim",
        "input_feature_size", "input_dim", default=80,
    )  # fmt: skip
    frames = 2 * _attribute(config, "max_source_positions", default=50)
    return [_noise(2, bins, frames), _noise(2, 96, bins), _noise(2, bins, 64), _noise(2, 1, 64, bins)]


def _hidden(config: Any) -> list[Tensor]:
    width = _attribute(config, "hidden_size", "d_model", "embed_dim", default=WIDTH)
    side, channels = _attribute(config, "patch_size", default=PATCH), _attribute(config, "in_channels", default=3)
    frames = _attribute(config, "temporal_patch_size", default=1)
    patches = [_noise(64, side**2 * channels * n) for n in (frames, 1)]
    return [_noise(2, LENGTH, width), *patches, _noise(2, LENGTH, _attribute(config, "input_dim", default=80))]


def _video_shapes(config: Any) -> list[Tensor]:
    frames, side = (_attribute(config, n, default=d) for n, d in (("num_frames", 4), ("image_size", IMAGE)))
    return [_noise(2, frames, 3, side, side), _noise(2, 3, frames, side, side)]


_EMBEDDED = (
    "hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds", "context", "vision_features",
    "text_features", "vision_pos_encoding", "noise_embeds", "context_hidden_states", "patch_embeds",
)  # fmt: skip
# argument name -> shape, in which a string stands for an attribute of the configuration
_NOISE: dict[str, Any] = {
    "audio_mel": (2, 96, "input_feat_size"), "visual_feats": (2, 8, "visual_feat_dim"), "visual_pos": (2, 8, 4),
    "prompt_depth": (2, 1, IMAGE, IMAGE), "spectrogram": (2, 20, "model_in_dim"), "mel_spectrogram": (1, "mel_dim", 20),
    "states": (2, 6, "state_dim"), "actions": (2, 6, "act_dim"), "rewards": (2, 6, 1), "returns_to_go": (2, 6, 1),
}  # fmt: skip
_COUNTS = {
    "attention_mask": torch.ones(2, LENGTH, dtype=torch.long), "merge_sizes": torch.tensor([2]),
    "bbox": torch.arange(8 * LENGTH).reshape(2, LENGTH, 4) // 4,
    "grid_thw": torch.tensor([[1, 8, 8]]), "image_grid_thw": torch.tensor([[1, 8, 8]]),
    "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
    "past_values_padding": torch.zeros(2, 32, dtype=torch.long), "freq": torch.zeros(2, 1, dtype=torch.long),
    "audio_mel_mask": torch.zeros(2, 96, dtype=torch.bool), "timesteps": torch.arange(6).repeat(2, 1),
}  # fmt: skip
# argument name -> candidates, tried in order
ARGUMENTS: dict[str, Callable[[Any], list[Tensor]]] = {
    **{name: functools.partial(_shaped, shape) for name, shape in (_NOISE | _COUNTS).items()},
    **dict.fromkeys(_EMBEDDED, _hidden),
    **dict.fromkeys(("input_ids", "qformer_input_ids", "audio_input_ids"), lambda c: [_ids()]),
    **dict.fromkeys(("image", "prompt_pixel_values", "prompt_masks"), _image_shapes),
    "decoder_input_ids": lambda c: [_ids(2, 6)],
    "pixel_values": lambda c: [*_image_shapes(c), *_video_shapes(c), _image_shapes(c)[0][:, None], *_hidden(c)[1:3]],
    "pixel_values_videos": _video_shapes,
    "input_features": _mel_shapes,
    "input_features_mask": lambda c: [torch.ones(2, x.shape[1]) for x in _mel_shapes(c)[1:]],
    "input_values": lambda c: [_mel_shapes(c)[1]] * hasattr(c, "patch_size") + [_noise(2, 4000), _noise(2, 1, 4000)],
    "flattened_patches": lambda c: [torch.cat([torch.ones(2, LENGTH, 2), _noise(2, LENGTH, 3 * PATCH**2)], -1)],
    "past_values": _series,
    "past_observed_mask": lambda c: [torch.ones_like(x) for x in _series(c)],
    "past_time_features": lambda c: [_noise(*_series(c)[0].shape[:2], _attribute(c, "num_time_features", default=0))],
}
ALWAYS = ("attention_mask", "decoder_input_ids", "bbox")


def runnable_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """The first set of dummy inputs that the model runs on.

    Raises:
        CannotBuild: it runs on none; with the error of the first.
    """
    problem = "no dummy for an argument that it needs"
    for number, inputs in enumerate(itertools.islice(_proposals(model), 40)):
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:
            problem = problem if number else f"{', '.join(inputs)}: {first_line(error)}"
    raise CannotBuild(f"it runs on no dummy inputs: {problem}")


def _proposals(model: Any) -> Iterator[dict[str, Any]]:
    config = model.config
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = [model.main_input_name] if getattr(model, "main_input_name", None) in parameters else []
    always = [n for n in ALWAYS if n in parameters]
    known = [n for n in parameters if n in ARGUMENTS and n not in _EMBEDDED]
    sets = [[*main, *required, *always], [*main, *required], required, known, main]
    for names in dict.fromkeys(tuple(dict.fromkeys(s)) for s in sets):
        if not names or any(n not in ARGUMENTS for n in names):
            continue
        text = "input_ids" in names or "decoder_input_ids" in names
        names = tuple(n for n in names if n != "attention_mask" or text)
        for choice in itertools.product(*(ARGUMENTS[n](config) for n in names)):
            yield {n: copy.deepcopy(v) for n, v in zip(names, choice, strict=True)}
