"""The command line: what it writes, what it prints, and one line for every error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import zq_compiler as zq
from tests import onnx_runtime
from zq_compiler.cli import app, example_inputs

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}


def _zq(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(a) for a in arguments])


def _fails(message: str, *arguments: object) -> None:
    result = _zq(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder, its tokenizer included."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=30)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    result = _zq("quantize", bert, folder)
    assert result.exit_code == 0, result.output
    assert "7 int8" in result.stdout and f"saved: {folder}" in result.stdout.replace("\n", "")
    return folder


def test_recipes_and_version():
    assert "ZeroQuant W8A8" in _zq("recipes").stdout
    assert _zq("--version").stdout == f"{zq.__version__}\n"


def test_quantize_writes_a_model_that_loads(saved: Path):
    ids = torch.ones(3, 5, dtype=torch.int64)
    assert zq.load(saved)(input_ids=ids, attention_mask=ids).logits.shape == (3, 5, 30)


def test_options_reach_the_recipe(bert: Path, tmp_path: Path):
    out = tmp_path / "model"
    options = ["--leave-float", r".*query", "--leave-float", r".*key", "--embedding", "int8", "--lm-head", "int8"]
    result = _zq("quantize", bert, out, *options, "--check", "--dump", tmp_path / "graphs", "--batch", 1)
    assert result.exit_code == 0, result.output
    report = zq.load(out).report()
    floats = {row.name.rpartition(".")[2]: row.reason for row in report.layers if row.got == "float"}
    assert floats == {"query": "--leave-float .*query", "key": "--leave-float .*key"}
    assert all(record["sqnr"] is not None for record in report.passes)
    assert (tmp_path / "graphs" / "00_captured.txt").exists()


def test_text_goes_through_the_tokenizer(bert: Path, tmp_path: Path):
    result = _zq("quantize", bert, tmp_path / "model", "--text", "hello world", "--text", "hello")
    assert result.exit_code == 0, result.output


def test_calibration_from_texts_and_from_their_statistics(bert: Path, tmp_path: Path):
    texts, ranges = tmp_path / "texts.txt", tmp_path / "ranges.safetensors"
    texts.write_text("hello world\n\nhello hello world\n" * 9)
    _fails("give calibration=batches", "quantize", bert, tmp_path / "m3", "--recipe", "hero-m3")
    _fails("cannot be read", "quantize", bert, tmp_path / "m3", "--calibration", tmp_path / "none.txt")
    given = ["--recipe", "hero-m3", "--calibration", texts, "--statistics", ranges]
    result = _zq("quantize", bert, tmp_path / "m3", *given)
    assert result.exit_code == 0, result.output
    assert zq.Statistics.load(ranges).batches == 2
    assert zq.load(tmp_path / "m3").report().operators["zq.int8_linear_gelu_quantize"] == 1
    result = _zq("quantize", bert, tmp_path / "m2", "--recipe", "hero-m2", "--calibration", ranges)
    assert result.exit_code == 0, result.output
    assert zq.load(tmp_path / "m2").report().operators["zq.int8_attention"] == 1


def test_an_exported_program(tmp_path: Path):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 32),)), tmp_path / "model.pt2")
    assert _zq("quantize", tmp_path / "model.pt2", tmp_path / "out").exit_code == 0
    assert zq.load(tmp_path / "out").report().counts == {"int8": 1}
    _fails("--text is for folders", "quantize", tmp_path / "model.pt2", tmp_path / "out", "--text", "hello")


def test_report(saved: Path):
    assert "w8a8: 7 int8, 4 float" in _zq("report", saved).stdout
    printed = json.loads(_zq("report", saved, "--json").stdout)
    assert "bert.encoder.layer.0.attention.self.query" in {layer["name"] for layer in printed["layers"]}
    assert printed["counts"]["int8"] == 7 and printed["recipe"] == "w8a8"


@pytest.mark.slow
def test_export(saved: Path, bert: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    for source in (saved, bert):
        result = _zq("export", source, tmp_path / "model.onnx")
        assert result.exit_code == 0, result.output
        session = onnx_runtime.session(tmp_path / "model.onnx")
        ids = torch.randint(5, 30, (3, 7))
        (logits,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
        expected = zq.load(saved)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-2)
        certified = _zq("certify", source, tmp_path / "model.onnx", "--out", tmp_path / "certificate.json")
        assert certified.exit_code == 0, certified.output
        assert "recipe w8a8: passed" in certified.stdout
        assert json.loads((tmp_path / "certificate.json").read_text())["passed"]
    shared = _zq("export", saved, saved.parent / "shared.onnx", "--share")
    assert shared.exit_code == 0 and "read from the saved model's weights" in shared.stdout, shared.output
    _fails("is not below", "export", saved, tmp_path / "shared.onnx", "--share")
    _fails("is no saved model", "export", bert, tmp_path / "shared.onnx", "--share")
    _fails("is of recipe w8a8", "certify", bert, tmp_path / "model.onnx", "--recipe", "w8a8-plain")
    _fails("is quantized already", "export", saved, tmp_path / "model.onnx", "--recipe", "w8a8")
    _fails("unknown target 'abacus'", "export", saved, tmp_path / "model.onnx", "--target", "abacus")


@pytest.mark.slow
def test_export_with_a_cache(bert: Path, saved: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    config = transformers.LlamaConfig(**SIZES, vocab_size=30)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    transformers.BertTokenizer(vocab=str(bert / "vocab.txt")).save_pretrained(tmp_path / "llama")
    (tmp_path / "texts.txt").write_text("hello world\n" * 4)
    options = ["--with-past", "--recipe", "hero-decoder", "--calibration", tmp_path / "texts.txt"]
    result = _zq("export", tmp_path / "llama", tmp_path / "model.onnx", *options)
    assert result.exit_code == 0, result.output
    assert "past_key_values.0.key: FLOAT [batch,2,past_sequence,32]" in result.stdout
    _fails("leave --calibration out", "export", saved, tmp_path / "m.onnx", "--calibration", tmp_path / "texts.txt")
    _fails("the float model, from which", "export", saved, tmp_path / "m.onnx", "--with-past")


def test_errors_are_one_line(bert: Path, tmp_path: Path):
    out = tmp_path / "out"
    _fails("is neither a folder of a transformers model nor a .pt2", "quantize", "bert-base-uncased", out)
    _fails("unknown recipe 'w2a2'", "quantize", bert, out, "--recipe", "w2a2")
    _fails("matches no layer", "quantize", bert, out, "--leave-float", "nothing")
    _fails("no regular expression", "quantize", bert, out, "--leave-float", "(")
    _fails("there is no such folder", "report", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    _fails("transformers cannot load it", "quantize", tmp_path, out)
    assert not out.exists()


def test_a_traceback_on_request(tmp_path: Path):
    result = _zq("--traceback", "report", tmp_path)
    assert isinstance(result.exception, zq.ZQError)


def test_wrong_choices_are_usage_errors(bert: Path, tmp_path: Path):
    result = _zq("quantize", bert, tmp_path / "out", "--lm-head", "int4")
    assert result.exit_code == 2 and "int4" in result.stderr


def test_the_package_does_not_import_typer():
    code = "import sys, zq_compiler; sys.exit('typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# --- example inputs ------------------------------------------------------------------------------------------------

BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "vocab_size": 40, "pad_token_id": 0}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, ...]]]] = {
    "vision": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)),
        {"pixel_values": (2, 3, 32, 32)},
    ),
    "audio": (
        lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
        {"input_features": (2, 8, 40), "decoder_input_ids": (2, 16)},
    ),
    "encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART, vocab_size=40)),
        {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 16)},
    ),
    "image and text": (
        lambda: transformers.CLIPModel(transformers.CLIPConfig()),
        {"input_ids": (2, 16), "attention_mask": (2, 16), "pixel_values": (2, 3, 224, 224)},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_example_inputs_fit_the_model(kind: str):
    make, shapes = MODELS[kind]
    with torch.device("meta"):
        model = make().eval()
    inputs = example_inputs(model)
    assert {name: tuple(x.shape) for name, x in inputs.items()} == shapes
    if kind != "image and text":  # the model runs on them
        with torch.no_grad():
            make().eval()(**inputs)


def test_inputs_that_cannot_be_made_up():
    class Odd(nn.Module):
        main_input_name = "smells"
        config = transformers.BertConfig()
        dtype = torch.float32

        def forward(self, smells: torch.Tensor) -> torch.Tensor:
            return smells

    with pytest.raises(zq.CaptureError, match="no example inputs can be made up: its main input is smells"):
        example_inputs(Odd())
    with pytest.raises(zq.CaptureError, match="its config has no num_mel_bins"):
        Odd.main_input_name = "input_features"
        Odd.forward = lambda self, input_features: input_features  # type: ignore[method-assign]
        example_inputs(Odd())


def test_sensitivity_and_search(bert: Path, tmp_path: Path):
    texts = tmp_path / "texts.txt"
    texts.write_text("hello world\nworld hello hello\n" * 20)
    shown = _zq("sensitivity", bert, texts, "--batches", "1")
    assert shown.exit_code == 0, shown.output
    assert "feed_forward_out" in shown.stdout and "SQNR, dB" in shown.stdout
    recipe = tmp_path / "found.json"
    found = _zq("search", bert, texts, recipe, "--budget", "38")
    assert found.exit_code == 0, found.output
    assert "found: score" in found.stdout and "misses score" in found.stdout
    made = _zq("quantize", bert, tmp_path / "model", "--recipe", recipe, "--calibration", texts)
    assert made.exit_code == 0, made.output
    _fails("give a number that is not below 0", "search", bert, texts, recipe, "--budget=-1")
