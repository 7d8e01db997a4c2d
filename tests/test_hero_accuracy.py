"""ZeroQuant-HERO's modes on the real all-MiniLM-L6-v2: embeddings of labelled texts, and what a probe says of them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")
import torch
from torch import Tensor

from benchmarks.hero_accuracy import Encoded, bootstrap, encode, probe_of, text_task
from benchmarks.real_models import minilm

LEAST = {  # cosine to float32: mean, worst; share of texts in the class that the float32 embedding is in
    "hero-m1": (0.999, 0.998, 0.96),
    "hero-m2": (0.998, 0.995, 0.96),
    "hero-m3": (0.995, 0.980, 0.96),
}


@pytest.fixture(scope="module")
def case() -> tuple[dict[str, Encoded], tuple[Tensor, Tensor]]:
    task = text_task("all-MiniLM-L6-v2", *minilm(), train=192, test=64)
    task = replace(task, calibration=task.calibration[:4])
    return encode(task, list(LEAST)), probe_of(task)


@pytest.mark.slow
@pytest.mark.parametrize("mode", LEAST)
def test_embeddings_and_predictions_stay(case, mode: str):
    encoded, (w, b) = case
    reference, found = encoded["float32"].embeddings, encoded[mode].embeddings
    cosine = (reference * found).sum(1)
    same = ((reference @ w + b).argmax(1) == (found @ w + b).argmax(1)).float().mean()
    print(f"cosine mean {cosine.mean():.5f}, worst {cosine.min():.5f}, same prediction {same:.4f}")
    mean, worst, agreement = LEAST[mode]
    assert cosine.mean() >= mean and cosine.min() >= worst and same >= agreement


@pytest.mark.slow
def test_each_mode_costs_more_than_the_one_before_it(case):
    encoded, _ = case
    assert encoded["float32"].sqnr == [math.inf] * 7
    last = [encoded[mode].sqnr[-1] for mode in LEAST]
    assert last == sorted(last, reverse=True) and last[-1] > 15


def test_bootstrap_holds_the_mean():
    lost = torch.tensor([1.0] * 30 + [0.0] * 960 + [-1.0] * 10)
    low, high = bootstrap(lost)
    assert 0 < low < 2 < high < 4  # a mean of two points, whose standard error is 0.63


def test_embeddings_and_sqnr_leave_padding_out():
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    reference = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]])
    other = torch.tensor([[[3.0, 0.3], [3.0, 8.0], [0.0, 0.0]]])
    result = Encoded()
    result.add(*(SimpleNamespace(last_hidden_state=x, hidden_states=(x, x)) for x in (other, reference)), batch)
    torch.testing.assert_close(result.embeddings, torch.nn.functional.normalize(torch.tensor([[6.0, 8.3]])))
    assert result.sqnr == pytest.approx([10 * math.log10(82 / 0.09)] * 2, rel=1e-5)
