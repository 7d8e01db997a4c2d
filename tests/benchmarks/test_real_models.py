"""The real models load, know something, and the text is what the docstrings say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")
import torch

from benchmarks import real_models


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


@pytest.mark.parametrize("load", [real_models.minilm, real_models.bert_tiny, real_models.smollm2])
def test_missing_files_name_the_make_target(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZQ_CACHE_DIR", str(tmp_path))
    with pytest.raises(real_models.ModelNotFetched, match=f"make models-{load.__name__.replace('_', '-')}"):
        load()


def test_every_model_has_its_requirement():
    folder = Path(__file__).parents[2] / "requirements"
    pinned = {path.stem.removeprefix("models-"): path.read_text() for path in folder.glob("models-*.txt")}
    assert pinned.keys() == real_models._WHEELS.keys()
    assert all(f"\n{wheel}==" in pinned[name] for name, wheel in real_models._WHEELS.items())
