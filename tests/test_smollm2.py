"""What the papers say of recipes and methods, on a real language model: SmolLM2-135M, news text, few tokens.

`python -m benchmarks.accuracy` measures more tokens. What is asserted here are relations, which the few tokens show.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")

import zq_compiler
from benchmarks import perplexity
from benchmarks.real_models import smollm2
from zq_compiler.batches import Batches

pytestmark = pytest.mark.slow

TOKENS, WINDOWS = 1024, 4
RECIPES = (
    *("w8a8-plain", "w8a8-plain+smooth", "fp8", "fp6"),
    *("w4a16-g64", "w4a16-g64+lorc", "w3a16-g64", "w3a16-g64+lorc"),
    *("w4a8", "w4a8+lorc", "w4a8-g128", "w4a8-fp", "w4a8-fp+gptq", "w4a8-fp-m2"),
)


@pytest.fixture(scope="module")
def loss():
    """What each recipe adds to the perplexity of float32, relative to it."""
    tokenizer, model = smollm2()
    scored, calibration = perplexity.news_windows(tokenizer, TOKENS, WINDOWS)
    batches = Batches(calibration)
    models = {name: zq_compiler.quantize(model, calibration[0], recipe=name, calibration=batches) for name in RECIPES}
    scores = perplexity.measure(model, models, scored)
    return {name: scores[name].perplexity / scores["float32"].perplexity - 1 for name in RECIPES}


def test_token_wise_w8a8_is_within_four_percent():
    """Over more tokens: of 1,024, on whose float sums processors differ, it may be 4.04 %."""
    tokenizer, model = smollm2()
    scored, calibration = perplexity.news_windows(tokenizer, 8192, 1)
    fast = zq_compiler.quantize(model, calibration[0], recipe="w8a8-plain").compile()
    scores = perplexity.measure(model, {"w8a8-plain": fast}, scored)
    assert scores["w8a8-plain"].perplexity < 1.04 * scores["float32"].perplexity


def test_smoothquant_loses_at_most_half_of_what_the_plain_form_does(loss):
    assert loss["w8a8-plain+smooth"] <= loss["w8a8-plain"] / 2


@pytest.mark.parametrize("recipe", ["w4a16-g64", "w3a16-g64", "w4a8"])
def test_lorc_lowers_what_four_and_three_bits_cost(loss, recipe):
    assert loss[f"{recipe}+lorc"] < loss[recipe]


def test_gptq_is_better_than_rounding_to_the_nearest(loss):
    assert loss["w4a8-fp+gptq"] < loss["w4a8-fp"]


def test_fp6_loses_at_most_a_third_of_what_int4_does(loss):
    assert loss["fp6"] <= loss["w4a16-g64"] / 3


@pytest.mark.parametrize(("floats", "integers"), [("fp8", "w8a8-plain"), ("w4a8-fp", "w4a8-g128")])
def test_floats_lose_less_than_integers_of_as_many_bits(loss, floats, integers):
    """This model's activations have outliers, which ranges of integers pay for (ZeroQuant-FP)."""
    assert loss[floats] < loss[integers]


@pytest.mark.xfail(strict=True, reason="does not hold on this small model, rounded to the nearest; docs/weights.md")
def test_powers_of_two_cost_fp4_little(loss):
    """ZeroQuant-FP's finding, with GPTQ and on models of 1.3 billion weights and more; docs/weights.md has more."""
    assert loss["w4a8-fp-m2"] <= 1.25 * loss["w4a8-fp"]
