"""Small random models of the families that must work: name -> (model in eval mode, keyword inputs)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf

Inputs = dict[str, torch.Tensor]
SMALL: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
)
GATED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
NO_SPECIAL: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def text(batch: int = 2, length: int = 16) -> Inputs:
    """Token ids of ragged rows, padded on the right."""
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, length - length // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(size: int, channels: int = 3) -> torch.Tensor:
    """Two images of noise."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def bert() -> hf.PreTrainedModel:
    return hf.BertModel(hf.BertConfig(**SMALL))


def roberta() -> hf.PreTrainedModel:
    return hf.RobertaModel(hf.RobertaConfig(**SMALL, max_position_embeddings=40))


def distilbert() -> hf.PreTrainedModel:
    return hf.DistilBertModel(hf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=99))


def albert() -> hf.PreTrainedModel:
    return hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=32))


def modernbert() -> hf.PreTrainedModel:
    return hf.ModernBertModel(hf.ModernBertConfig(**SMALL, **NO_SPECIAL, cls_token_id=1, sep_token_id=2))


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=128, **NO_SPECIAL)
    )


def opt() -> hf.PreTrainedModel:
    config = hf.OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, vocab_size=99, word_embed_proj_dim=64
    )
    return hf.OPTForCausalLM(config)


def gpt_neox() -> hf.PreTrainedModel:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **NO_SPECIAL))


def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GATED))


def qwen2() -> hf.PreTrainedModel:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**GATED))


def mistral() -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**GATED, sliding_window=8))


def mixtral() -> hf.PreTrainedModel:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**GATED, num_local_experts=4))


def t5() -> hf.PreTrainedModel:
    config = hf.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config)


def vit() -> hf.PreTrainedModel:
    return hf.ViTModel(
        hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=32, patch_size=8)
    )


def clip() -> hf.PreTrainedModel:
    text_config = {**SMALL, "max_position_embeddings": 32, **NO_SPECIAL}
    vision = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text_config, vision_config=vision, projection_dim=32))


def whisper() -> hf.PreTrainedModel:
    config = hf.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=99, num_mel_bins=16, max_source_positions=50,
        max_target_positions=40, **NO_SPECIAL, decoder_start_token_id=1,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], hf.PreTrainedModel], Callable[[], Inputs]]] = {
    **{f.__name__: (f, text) for f in (bert, roberta, distilbert, albert, modernbert)},
    **{f.__name__: (f, text) for f in (gpt2, opt, gpt_neox, llama, qwen2, mistral, mixtral)},
    "t5": (t5, lambda: {**text(), "decoder_input_ids": text(2, 5)["input_ids"]}),
    "vit": (vit, lambda: {"pixel_values": images(32)}),
    "clip": (clip, lambda: {**text(2, 12), "pixel_values": images(32)}),
    "whisper": (
        whisper,
        lambda: {"input_features": images(100, 1)[:, 0, :16], "decoder_input_ids": text(2, 5)["input_ids"]},
    ),
}


def build(name: str) -> tuple[hf.PreTrainedModel, Inputs]:
    """The model of a family with reproducible weights, and inputs for it.

    The seed is one that gives CLIP logits away from zero, where a ratio to them would mean nothing.
    """
    torch.manual_seed(1)
    make, inputs = FAMILIES[name]
    return make().eval(), inputs()
