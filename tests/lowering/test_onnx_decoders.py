"""Decoders with a key-value cache: the file generates the tokens of the torch model, prefill and decoding alike."""

from __future__ import annotations

import gc
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

import zq_compiler as zq
from tests import onnx_runtime
from tests.lowering.test_onnx_models import MIN_SQNR_DB
from zq_compiler.methods import LKD
from zq_compiler.numerics import sqnr

pytest.importorskip("onnxruntime")
from examples.generate_onnx import generate, open_session

STEPS = 64
PROMPT = 7
CORE = ("gpt2", "llama")
DECODERS = ("gpt2", "llama", "qwen2", "gpt_neox", "opt", "mistral", "mixtral")
CASES = [
    *(pytest.param((family, "w8a8"), marks=[] if family in CORE else pytest.mark.slow) for family in DECODERS),
    *(pytest.param((family, "w8a8-plain"), marks=pytest.mark.slow) for family in CORE),
    pytest.param(("llama", "hero-decoder"), marks=pytest.mark.slow),
    pytest.param(("gpt2", "hero-m3"), marks=pytest.mark.slow),
]


@dataclass
class Decoder:
    """A float model, what it was quantized to, and its file."""

    model: Any
    quantized: zq.QuantizedModel
    report: Any
    path: Path


def passages() -> torch.Tensor:
    """Random tokens, three rows."""
    return torch.randint(3, 99, (3, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))


def language_model(family: str) -> Any:
    """A family's tiny model that has learnt `passages` by heart, so that its likeliest token is so by far.

    Random weights leave the two likeliest a rounding step of INT8 apart, and which one it is would be chance.
    """
    model, _ = tiny_models.build(family)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model(input_ids=passages()[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), passages()[:, 1:].flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False)


def call(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A call without a cache, at the positions of the tokens that are not padding."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def prompts(batch: int, length: int = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    """How each passage begins, and a mask: all rows but the first are shorter and padded on the left."""
    ids, mask = torch.zeros(2, batch, length, dtype=torch.int64)
    for row in range(batch):
        ids[row, 2 * row :] = passages()[row, : length - 2 * row]
        mask[row, 2 * row :] = 1
    return ids, mask


def greedy(forward: Any, model: Any, ids: torch.Tensor, mask: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """The likeliest tokens, every step reading all of them anew."""
    for _ in range(steps):
        with torch.no_grad():
            token = forward(**call(model, ids, mask)).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def decoder(request: Any, tmp_path_factory: Any) -> Decoder:
    family, recipe = request.param
    model = language_model(family)
    inputs = call(model, *prompts(2, 16))
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    quantized = zq.quantize(model, inputs, recipe=recipe, calibration=calibration)
    path = tmp_path_factory.mktemp("decoder") / f"{family}.onnx"
    return Decoder(model, quantized, quantized.export_onnx(path, with_past=True), path)


def test_inputs_and_outputs_are_named_by_convention(decoder: Decoder) -> None:
    config = decoder.model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = "FLOAT [batch,{},{},{}]".format(kv_heads, "{}", config.hidden_size // heads)
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    positions = "position_ids" in inspect.signature(decoder.model.forward).parameters
    assert decoder.report.inputs == {
        "input_ids": "INT64 [batch,sequence]",
        "attention_mask": "INT64 [batch,total]",
        **({"position_ids": "INT64 [batch,sequence]"} if positions else {}),
        **{f"past_key_values.{part}": cache.format("past_sequence") for part in parts},
    }
    assert decoder.report.outputs == {
        "logits": "FLOAT [batch,sequence,99]",
        **{f"present.{part}": cache.format("past_sequence + sequence") for part in parts},
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_the_oracle(decoder: Decoder, batch: int) -> None:
    """The past is empty at first, and rows padded on the left are those of the same tokens without padding."""
    ids, mask = prompts(batch)
    want = greedy(decoder.quantized, decoder.model, ids, mask).numpy()
    for row, passage in enumerate(passages()[:batch].numpy()):
        np.testing.assert_array_equal(want[row, 2 * row :], passage[: len(want[row]) - 2 * row])
    for level in onnx_runtime.LEVELS:
        session = onnx_runtime.session(decoder.path, level)
        np.testing.assert_array_equal(generate(session, ids.numpy(), mask.numpy(), STEPS), want)
    for row in range(batch):
        alone = ids[row : row + 1, mask[row] == 1]
        got = generate(session, alone.numpy(), np.ones_like(alone.numpy()), STEPS)
        np.testing.assert_array_equal(got[0], want[row][mask[row].argmax().item() :])


def test_logits_of_every_step(decoder: Decoder) -> None:
    """A prefill, a step of several tokens and steps of one, against one call of the oracle for all of them."""
    ids, mask = prompts(3, 12)
    want = decoder.quantized(**call(decoder.model, ids, mask)).logits
    positions = call(decoder.model, ids, mask).get("position_ids")
    for level in onnx_runtime.LEVELS:
        session = onnx_runtime.session(decoder.path, level)
        outputs = [o.name for o in session.get_outputs()]
        past = {
            i.name: np.zeros((3, i.shape[1], 0, i.shape[3]), np.float32)
            for i in session.get_inputs()
            if i.name.startswith("past")
        }
        for start, end in ((0, 7), (7, 10), (10, 11), (11, 12)):
            feeds = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            if positions is not None:
                feeds["position_ids"] = positions[:, start:end]
            given = {name: value.numpy() for name, value in feeds.items()} | past
            results = dict(zip(outputs, session.run(outputs, given), strict=True))
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            seen = mask[:, start:end].bool()
            assert sqnr(want[:, start:end][seen], torch.from_numpy(results["logits"])[seen]) >= MIN_SQNR_DB


@pytest.mark.slow
def test_the_compiled_model_generates_them_too() -> None:
    model = language_model("llama")
    ids, mask = prompts(3)
    quantized = zq.quantize(model, call(model, ids, mask))
    want = greedy(quantized, model, ids, mask)
    assert torch.equal(greedy(quantized.compile(dynamic=True), model, ids, mask), want)


def test_a_model_captured_with_a_cache_needs_no_float_model(tmp_path: Path) -> None:
    import transformers

    model = language_model("llama")
    ids, mask = prompts(2, 8)
    past = transformers.DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=past)
    positions = torch.arange(5, 8).expand(2, 3)
    inputs = {"input_ids": ids[:, 5:], "attention_mask": mask, "position_ids": positions, "past_key_values": past}
    zq.quantize(model, inputs).save(tmp_path / "saved")
    quantized = zq.quantize(model, call(model, ids, mask))
    want = greedy(quantized, model, ids, torch.ones_like(mask), 16)
    del model
    gc.collect()
    with pytest.raises(zq.ZQError, match=r"the float model, .* is gone.*zq_compiler.export_onnx"):
        quantized.export_onnx(tmp_path / "model.onnx", with_past=True)
    loaded = zq.load(tmp_path / "saved")
    assert past.get_seq_length() == 5, "the example's cache was written to"
    loaded.export_onnx(tmp_path / "model.onnx", with_past=True)
    got = generate(open_session(tmp_path / "model.onnx"), ids.numpy(), np.ones_like(ids.numpy()), 16)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("recipe", ["w4a16-g64+gptq", "w3a16-g64+gptq+lkd+lorc4+bias", "hero-decoder+smooth+gptq"])
def test_what_methods_chose_is_in_the_file_with_a_past(recipe: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = language_model("llama")
    ids, mask = prompts(2, 16)
    data = [call(model, *prompts(2, length)) for length in (16, 12)]
    quantized = zq.quantize(model, data[0], recipe=zq.load_recipe(recipe).replace(lkd=LKD(steps=2)), calibration=data)
    for method in ("gptq", "distill_layers", "correct_bias", "smooth_activations"):  # chosen once
        monkeypatch.setattr(f"zq_compiler.passes.{method}.Replay", None)
    quantized.export_onnx(tmp_path / "model.onnx", with_past=True)
    got = generate(open_session(tmp_path / "model.onnx"), ids.numpy(), np.ones_like(ids.numpy()), 16)
    want = greedy(quantized, model, ids, torch.ones_like(mask), 16)
    np.testing.assert_array_equal(got, want.numpy())


def test_a_model_without_such_a_past_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval()
    quantized = zq.quantize(model, torch.randn(2, 32))
    with pytest.raises(zq.ExportError, match=r"Sequential: .* takes no past_key_values.*leave with_past out"):
        quantized.export_onnx(tmp_path / "model.onnx", with_past=True)
    assert not (tmp_path / "model.onnx").exists()
