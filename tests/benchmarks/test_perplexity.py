"""The sums behind the table of perplexities."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")
import torch

from benchmarks.perplexity import Score, windows


def test_uniform_logits_are_as_perplexing_as_the_vocabulary_is_large():
    score, logits = Score(), torch.zeros(5, 7)
    for _ in range(2):
        score.add(logits.log_softmax(-1), logits + 3, torch.arange(5))
    assert score.tokens == 10 and score.same == 10
    assert score.perplexity == pytest.approx(7) and score.divergence == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_of_the_recipe_from_float32():
    float32, recipe = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    score = Score()
    score.add(float32.log(), recipe.log(), torch.tensor([1]))
    assert score.divergence == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert score.perplexity == pytest.approx(10)


class _Characters:
    def __call__(self, text: str, return_tensors: str) -> _Characters:
        self.input_ids = torch.tensor([list(text.encode())])
        return self


def test_windows_hold_every_token_once():
    parts = windows(_Characters(), ["a" * 600, "b" * 600], 1100)
    assert [part["input_ids"].shape for part in parts] == [(1, 512), (1, 512), (1, 76)]
    assert bytes(torch.cat([part["input_ids"] for part in parts], 1)[0].tolist()) == b"a" * 600 + b"\n\n" + b"b" * 498
