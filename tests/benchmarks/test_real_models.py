"""The real models load, know something, and the text is what the docstrings say."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")
import onnx
import torch

from benchmarks import ctranslate2_weights, onnx_weights, real_models


def _embed(tokenizer, model, sentences: list[str]) -> torch.Tensor:
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_minilm_places_related_sentences_together():
    tokenizer, model = real_models.minilm()
    assert not model.training and model.config._attn_implementation == "sdpa"
    cat, kitten, bank = _embed(
        tokenizer,
        model,
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The central bank raised interest rates."],
    )
    assert cat @ kitten > 0.6 > 0.2 > cat @ bank


def test_bert_tiny_predicts_in_context():
    """Even the smallest model must prefer the real word to a chance one; random weights score ln(30522) = 10.3."""
    tokenizer, model = real_models.bert_tiny()
    batch = tokenizer(real_models.news_sentences(64), padding=True, return_tensors="pt")
    labels = batch.input_ids.where(batch.attention_mask.bool(), -100)
    with torch.inference_mode():
        assert model(**batch, labels=labels).loss < 6


def _run_onnx(path: Path, output: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One output of an ONNX file, its first by default; an inner value where it is named."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="compares with ONNX Runtime")
    model = onnx.load(path)
    if output is None:
        output = model.graph.output[0].name
    else:
        model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run([output], {name: x.numpy() for name, x in inputs.items()})[0])


def _output_of(path: Path, weight: str) -> str:
    """The value that the node with this weight computes."""
    return next(node.output[0] for node in onnx.load(path).graph.node if weight in node.input)


def test_paraphrase_is_what_its_onnx_file_computes():
    tokenizer, model = real_models.paraphrase()
    assert not model.training and model.config._attn_implementation == "sdpa"
    batch = dict(tokenizer(real_models.news_sentences(8), padding=True, return_tensors="pt"))
    path = real_models.fetched("paraphrase", real_models.PARAPHRASE_ONNX)
    last_norm = _output_of(path, "model.0.auto_model.encoder.layer.2.output.LayerNorm.bias")
    with torch.inference_mode():
        found = model(**batch).last_hidden_state
    del batch["token_type_ids"]
    torch.testing.assert_close(found, _run_onnx(path, last_norm, batch), atol=1e-4, rtol=1e-4)


def test_dinov2_is_what_its_onnx_file_computes():
    model = real_models.dinov2()
    assert not model.training and model.config._attn_implementation == "sdpa"
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    path = real_models.fetched("dinov2", real_models.DINOV2_ONNX)
    expected = _run_onnx(path, _output_of(path, "backbone.layernorm.bias"), {"input_image": images})
    with torch.inference_mode():
        found = model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["missing", "unused", "shape"])
def test_weights_that_do_not_fill_a_module_are_named(change: str):
    module = torch.nn.Linear(4, 2)
    weights = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    if change == "missing":
        del weights["bias"]
    elif change == "unused":
        weights["gain"] = torch.ones(2)
    else:
        weights["weight"] = torch.ones(4, 2)
    named = {"missing": "in the file: bias;", "unused": "in the module: gain;", "shape": "another shape: weight"}
    with pytest.raises(onnx_weights.WeightsDiffer, match=named[change]):
        onnx_weights.load_weights(module, weights)


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_fashion_mnist(split: str, count: int):
    try:
        images, labels = real_models.fashion_mnist(split)
    except real_models.ModelNotFetched as reason:
        pytest.skip(str(reason))
    assert images.shape == (count, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [count // 10] * 10
    trousers, sandals = images[labels == 1].float().mean(), images[labels == 5].float().mean()
    assert trousers > 1.5 * sandals  # a sandal leaves most of its image black


def test_whisper_writes_down_what_is_said():
    from benchmarks.accuracy import Listener

    try:
        speeches = real_models.read_speech()
    except real_models.ModelNotFetched as reason:
        pytest.skip(str(reason))
    assert [len(s.samples) for s in speeches] == [113600, 47840, 84800, 96800, 52640]  # of 16 kHz: 25 seconds
    tokenizer, model = real_models.whisper()
    listen = Listener(tokenizer, model)
    for speech in speeches[1:]:
        heard = tokenizer.decode(listen.guessed(speech)["decoder_input_ids"][0], skip_special_tokens=True)
        words, wanted = (re.findall(r"[a-z]+", text.lower()) for text in (heard, speech.transcript))
        assert len(set(wanted) - set(words)) <= 2, f"{heard} is not {speech.transcript}"


def test_only_whispers_files_are_read(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<IH16sII", 6, 16, b"TransformerSpec\0", 1, 0))
    with pytest.raises(ValueError, match="holds a TransformerSpec"):
        ctranslate2_weights.read_variables(path)


@pytest.mark.slow
def test_smollm2_perplexity_on_news():
    tokenizer, model = real_models.smollm2()
    text = "\n\n".join(article.text for article in real_models.news_articles()[:2])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert 10 < loss.exp() < 60  # 27.9 on the first 40 articles


def test_news_articles():
    articles = real_models.news_articles()
    assert len(articles) == 3788
    assert articles[0].title.startswith("Betsy DeVos Confirmed") and articles[0].text.startswith("Michigan billionaire")


def test_news_sentences_are_deterministic_different_and_sensible():
    sentences = real_models.news_sentences(5000)
    assert sentences[:100] == real_models.news_sentences(100)
    assert len(set(sentences)) == 5000
    assert all(5 <= len(sentence.split()) <= 40 and sentence[-1] in ".!?" for sentence in sentences)


def test_asking_for_too_many_sentences_says_how_many_there_are():
    with pytest.raises(ValueError, match="the articles hold"):
        real_models.news_sentences(10**7)


_LOADERS = [getattr(real_models, name) for name in ("minilm", "bert_tiny", "smollm2", "paraphrase", "dinov2")]


@pytest.mark.parametrize("load", _LOADERS)
def test_missing_files_name_the_make_target(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZQ_CACHE_DIR", str(tmp_path))
    with pytest.raises(real_models.ModelNotFetched, match=f"make models-{load.__name__.replace('_', '-')}"):
        load()


def test_missing_images_name_the_make_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZQ_CACHE_DIR", str(tmp_path))
    with pytest.raises(real_models.ModelNotFetched, match="make models-fashion-mnist"):
        real_models.fashion_mnist("test")


def test_every_model_has_its_requirement():
    folder = Path(__file__).parents[2] / "requirements"
    pinned = {path.stem.removeprefix("models-"): path.read_text() for path in folder.glob("models-*.txt")}
    assert pinned.keys() == real_models._WHEELS.keys()
    assert all(f"\n{wheel}==" in pinned[name] for name, wheel in real_models._WHEELS.items())
