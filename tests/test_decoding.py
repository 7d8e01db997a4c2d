"""Example inputs of a decoding step: what a model's forward takes, with a cache that the model filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import zq_compiler as zq
from zq_compiler.capture import capture
from zq_compiler.decoding import cache_leaves, inputs_with_past, takes_past
from zq_compiler.recipe import preset

hf = pytest.importorskip("transformers")
import tiny_models  # noqa: E402


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_inputs_fit_the_model(family: str) -> None:
    model, _ = tiny_models.build(family)
    inputs = inputs_with_past(model)
    assert {name: tuple(x.shape) for name, x in inputs.items() if name != "past_key_values"} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 8),
        "position_ids": (2, 3),
    }
    assert inputs["position_ids"].tolist() == [[5, 6, 7]] * 2
    layers = inputs["past_key_values"].layers
    heads = getattr(model.config, "num_key_value_heads", 4)
    assert [tuple(x.shape) for layer in layers for x in (layer.keys, layer.values)] == [(2, heads, 5, 16)] * 4
    with torch.no_grad():
        assert model(**inputs).past_key_values.get_seq_length() == 8


def test_leaves_of_a_cache_are_named() -> None:
    model, _ = tiny_models.build("llama")
    program = capture(model, (), inputs_with_past(model), preset("w8a8"))
    names = ["0.key", "0.value", "1.key", "1.value"]
    assert cache_leaves(program.in_spec) == dict(enumerate(names, start=3))
    assert cache_leaves(program.out_spec) == dict(enumerate(names, start=1))
    assert takes_past(program.in_spec) and not takes_past(None)
    without = capture(model, (), tiny_models.text(), preset("w8a8"))
    assert not takes_past(without.in_spec)


def mamba() -> Any:
    config = hf.MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=1)
    return hf.MambaForCausalLM(config).eval()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (tiny_models.t5, "it is an encoder-decoder"),
    "whisper": (tiny_models.whisper, "it is an encoder-decoder"),
    "bert": (tiny_models.bert, "it returns no past_key_values"),
    "vit": (tiny_models.vit, "it takes no past_key_values"),
    "mamba": (mamba, "it takes no past_key_values"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_keeps_no_such_past_is_refused(family: str) -> None:
    make, reason = REFUSED[family]
    with pytest.raises(zq.ExportError, match=rf"{reason}.*leave with_past out"):
        inputs_with_past(make().eval())


def test_a_past_of_another_kind_is_refused() -> None:
    """Qwen3-Next keeps a running state in most of its layers."""
    config = hf.Qwen3NextConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        num_experts=0,
        layer_types=["linear_attention", "full_attention"],
    )
    with pytest.raises(zq.ExportError, match=r"keeps its past as \w+, not as one key and one value a layer"):
        inputs_with_past(hf.Qwen3NextForCausalLM(config).eval())
