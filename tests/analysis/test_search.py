"""The most INT8 within a budget: a planted culprit goes, the rest stays, and the recipe replays what was found."""

import pytest
import tiny_models
import torch

import zq_compiler as zq
from tests.analysis.test_sensitivity import X, mlp
from tests.programs import Block, randn
from zq_compiler.numerics import sqnr


def test_a_budget_that_holds_changes_nothing():
    found = zq.search(mlp(), [X], budget=10, recipe="w8a8")
    assert found.recipe == zq.load_recipe("w8a8") and found.int8 == 1.0
    assert [trial.fits for trial in found.trials] == [True] and found.trials[0].score == found.score


def test_the_culprit_alone_goes_to_float(tmp_path):
    model = mlp("b")
    found = zq.search(model, [X], budget=30, recipe="w8a8-plain")
    assert found.score >= 30 and found.int8 == pytest.approx(2 / 3)
    assert not found.trials[0].fits and found.trials[0].int8 == 1.0
    found.recipe.save(tmp_path / "found.json")
    q = zq.quantize(model, X, recipe=tmp_path / "found.json")
    assert {row.name: row.got for row in q.report().layers} == {"a": "int8", "b": "float", "c": "int8"}
    assert q.report().layer("b").reason == "a search for the accuracy budget left it in float"
    with torch.no_grad():
        assert sqnr(model(X), q(X)) == pytest.approx(found.score, abs=0.01)
    assert "found: score" in str(found) and "misses" in str(found)


def test_static_scales_become_token_wise_before_anything_leaves_int8():
    """Calibrated on small values, measured on large ones: the static scale saturates, a token-wise one follows."""
    model = Block(lambda self, x: self.down(torch.nn.functional.gelu(self.up(x)))).eval()
    found = zq.search(model, [4 * X], budget=30, recipe="hero-m3", calibration=[X])
    assert found.int8 == 1.0 and found.score >= 30 and not found.trials[0].fits
    plan = zq.quantize(model, X, recipe=found.recipe, calibration=[X]).program.plan
    assert plan["down"].input.dynamic and plan["down"].output is None
    assert any(trial.token_wise == 1 and trial.fits for trial in found.trials)


@pytest.mark.parametrize("budget", [45.0, 60.0])
def test_what_it_finds_on_a_whole_model_replays(budget):
    model, inputs = tiny_models.build("bert")
    found = zq.search(model, [inputs], budget=budget, recipe="hero-m3")
    assert found.score >= budget and not found.trials[0].fits
    best = max((trial for trial in found.trials if trial.fits), key=lambda trial: trial.int8)
    assert found.int8 == best.int8 > 0.5
    q = zq.quantize(model, inputs, recipe=found.recipe, calibration=[inputs], strict=True)
    with torch.no_grad():
        assert sqnr(model(**inputs)[0], q(**inputs)[0]) >= budget - 0.1


def test_a_metric_of_the_users_own():
    """A score of the model's output, higher for better; the budget is what may be lost of it."""
    model = mlp("b")
    with torch.no_grad():
        wanted = model(X)
    calls = []

    def metric(candidate):
        calls.append(candidate)
        return -(candidate(X) - wanted).abs().max().item()

    found = zq.search(model, [X], metric=metric, budget=0.1, recipe="w8a8-plain")
    assert found.float_score == pytest.approx(0.0, abs=1e-5)
    assert found.score >= found.float_score - 0.1 > found.trials[0].score
    assert len(calls) == len(found.trials) + 1
    assert found.int8 == pytest.approx(2 / 3)


def test_nothing_of_it_may_be_int8():
    found = zq.search(mlp(), [X], budget=200, recipe="w8a8")
    assert found.int8 == 0 and found.score == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1.0}, "not below 0"),
        ({"budget": float("nan")}, "not below 0"),
        ({"budget": 1.0, "metric": "accuracy"}, 'use "sqnr", or a function'),
        ({"budget": 1.0, "recipe": "w9a9"}, "unknown recipe"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(zq.RecipeError, match=message):
        zq.search(mlp(), [randn(2, 32)], **options)


def test_layers_in_another_dtype_can_be_moved_too():
    model = mlp()
    recipe = zq.load_recipe("w8a8").with_rules(zq.QRule("b$", dtype="bfloat16"))
    found = zq.search(model, [X], budget=90, recipe=recipe)
    assert found.score >= 90 and found.int8 == 0


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "0.9"])
def test_a_metric_must_give_a_number(score):
    with pytest.raises(zq.RecipeError, match="the metric gave"):
        zq.search(mlp(), [X], metric=lambda model: score, budget=1, recipe="w8a8")


def test_a_budget_that_nothing_keeps_is_an_error():
    scores = iter([1.0] + [0.0] * 100)  # worse at every later call, whatever runs
    with pytest.raises(zq.ZQError, match=r"w8a8: nothing keeps the budget of 0\.5"):
        zq.search(mlp(), [X], metric=lambda model: next(scores), budget=0.5, recipe="w8a8")
