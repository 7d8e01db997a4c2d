"""Ranges that static scales are chosen from: what is looked at, and that it is what the model computes."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.programs import Block, after, captured, changes, decoder, encoder, randn
from zq_compiler import Batches, CalibrationError, QRule, load_recipe
from zq_compiler.passes.calibrate import FEATURE_BINS, watched
from zq_compiler.roles import ATTENTION
from zq_compiler.schemes import INT8_FEATURE, INT8_WEIGHT
from zq_compiler.statistics import Statistics, ValueStatistics

X = randn(2, 4, 32)
M3 = load_recipe("hero-m3")
PARTS = ("query", "key", "value")


def calibrated(forward=encoder, recipe=M3, calibration=None):
    program = captured(forward, X, recipe=recipe)
    if calibration is not None:
        program.calibration = calibration
    return after(program, "calibrate", check=True)


@pytest.fixture(scope="module")
def m3():
    return calibrated()


def attention_of(program):
    return next(name for name, plan in program.plan.items() if plan.kind == "attention")


def test_inputs_and_outputs_behind_attention_and_activation_and_what_attentions_read(m3):
    linears = {f"{layer}:{side}" for layer in ("out", "down") for side in ("input", "output")}
    assert set(m3.stats) == linears | {f"{attention_of(m3)}:{part}" for part in PARTS}
    assert changes(m3, "calibrate") == 7 and m3.stats.batches == 1
    assert all(m3.stats[name].dim == -1 and m3.stats[name].features == 32 for name in linears)
    assert all(m3.stats[name].features == 1 for name in set(m3.stats) - linears)  # sizes change between batches


def test_what_is_seen_is_what_the_model_computes(m3):
    block = Block(encoder).eval()
    seen = {}
    for name in ("a", "b", "c", "out", "down"):
        getattr(block, name).register_forward_hook(
            lambda _, args, y, name=name: seen.update({f"{name}:input": args[0], f"{name}:output": y})
        )
    with torch.no_grad():
        block(X)
    for name in ("out:input", "out:output", "down:input", "down:output"):
        rows = seen[name].reshape(-1, 32)
        torch.testing.assert_close(m3.stats[name].minimum, rows.amin(0))
        torch.testing.assert_close(m3.stats[name].maximum, rows.amax(0))
    for layer, part in zip("abc", PARTS, strict=True):
        want = seen[f"{layer}:output"].abs().max()
        torch.testing.assert_close(m3.stats[f"{attention_of(m3)}:{part}"].max_abs, want[None])


def test_one_files_values_serve_all_modes(m3):
    assert set(calibrated(recipe="hero-m2").stats) == set(m3.stats)


@pytest.mark.parametrize("recipe", ["float", "w8a8", "hero-m1"])
def test_nothing_is_collected_when_the_recipe_needs_none(recipe):
    unread = Batches(iter([]))  # an error if it was read
    program = calibrated(recipe=recipe, calibration=unread)
    assert program.stats is None and changes(program, "calibrate") == 0


def test_a_static_scheme_is_watched_in_any_role():
    rules = (QRule("a", INT8_WEIGHT, INT8_FEATURE), QRule("b", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE))
    recipe = load_recipe("w8a8").replace(rules=rules)
    program = calibrated(lambda self, x: self.c(self.b(self.a(x))), recipe)
    assert set(program.stats) == {"a:input", "b:input", "b:output"}


def test_a_layer_called_twice_has_one_range():
    recipe = load_recipe("w8a8").replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE),))
    program = calibrated(lambda self, x: self.a(self.a(x) * 3), recipe)
    with torch.no_grad():
        second = Block(None).a(X) * 3
    want = torch.maximum(X.abs().amax((0, 1)), second.abs().amax((0, 1)))
    torch.testing.assert_close(program.stats["a:input"].max_abs, want)


def test_all_batches_count(m3):
    program = calibrated(calibration=[X, (X * 5,)])
    assert program.stats.batches == 2
    assert program.stats["out:input"].rows == 2 * m3.stats["out:input"].rows
    assert program.stats["out:input"].max_abs.max() > m3.stats["out:input"].max_abs.max()


def test_statistics_of_an_earlier_run_are_used_as_they_are(m3):
    program = calibrated(calibration=m3.stats)
    assert program.stats is m3.stats and changes(program, "calibrate") == len(m3.stats)


def test_statistics_of_another_model_are_refused(m3):
    with pytest.raises(CalibrationError, match="another model"):
        calibrated(decoder, calibration=m3.stats)
    values = {name: ValueStatistics(name) for name in m3.stats}
    with pytest.raises(CalibrationError, match="another model"):
        calibrated(calibration=Statistics(values, key="0" * 32))


def test_batches_are_run_once_for_graphs_of_one_model_and_again_for_more_values():
    reads = []

    class Data:
        def __iter__(self):
            reads.append(1)
            return iter([X])

    batches = Batches(Data())
    first, again = (calibrated(calibration=batches) for _ in range(2))
    assert again.stats is first.stats and len(reads) == 1
    more = calibrated(recipe=M3.replace(softmax="static"), calibration=batches)
    assert set(more.stats) - set(first.stats) == {f"{attention_of(more)}:probabilities"} and len(reads) == 2


@pytest.mark.parametrize("method", ["max_abs", "percentile", "mse", "entropy"])
def test_histograms_of_features_only_where_a_range_is_chosen_from_them(method):
    program = calibrated(recipe=M3.replace(range_method=method))
    features = None if method == "max_abs" else FEATURE_BINS
    assert {value.feature_bins for name, value in program.stats.items() if value.dim is not None} == {features}
    assert {value.feature_bins for value in program.stats.values() if value.dim is None} == {None}
    for value in program.stats.values():  # every range that this recipe asks for can be chosen
        granularity = "per_tensor" if value.dim is None else "per_feature"
        assert value.scale(method, granularity).gt(0).all()


# --- probabilities -------------------------------------------------------------------------------------------------


def softmax64(q, k, mask=None, is_causal=False, scale=None):
    """Independent: torch's own softmax in float64, heads paired one by one."""
    k = k[:, [head * k.shape[1] // q.shape[1] for head in range(q.shape[1])]]
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double())
    scores = scores * scale if scale is not None else scores / math.sqrt(q.shape[-1])
    if is_causal:
        t, s = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(k.shape[2]), indexing="ij")
        scores[..., s > t] = -math.inf
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype is torch.bool else scores + mask.double()
    return torch.softmax(scores, -1).nan_to_num(0.0)  # a row that is wholly masked has no probabilities


Q, K = randn(2, 4, 5, 8, seed=1), randn(2, 2, 7, 8, seed=2)
BOOL = randn(2, 1, 5, 7, seed=3) > 0
BOOL[1, 0, 2] = False
ATTENTIONS = {
    "plain": (K.repeat(1, 2, 1, 1), {}),
    "one key head for two": (K, {}),
    "bool mask, a row wholly masked": (K, {"mask": BOOL}),
    "additive mask": (K, {"mask": randn(1, 4, 5, 7, seed=4)}),
    "additive mask of -Inf": (K, {"mask": torch.zeros(5, 7).masked_fill(BOOL[0, 0].logical_not(), -math.inf)}),
    "causal": (K, {"is_causal": True}),
    "scale": (K, {"scale": 0.7}),
    "large scores": (K * 1e3, {}),
}


@pytest.fixture(scope="module")
def probabilities():
    program = after(captured(encoder, X, recipe=M3.replace(softmax="static")), "annotate")
    (watch,) = (w for w in watched(program) if w.name.endswith(":probabilities"))
    assert watch.node.target is ATTENTION and watch.dim is None
    return watch.compute


@pytest.mark.parametrize("case", ATTENTIONS)
def test_probabilities_are_those_of_softmax(probabilities, case):
    k, options = ATTENTIONS[case]
    call = {"mask": None, "is_causal": False, "scale": None, **options}
    got = probabilities(Q, k, k, call["mask"], 0.0, call["is_causal"], scale=call["scale"], enable_gqa=True)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), softmax64(Q, k, **options), rtol=1e-4, atol=1e-6)


def test_probabilities_are_watched_for_a_static_softmax_only(m3):
    assert not any(name.endswith(":probabilities") for name in m3.stats)
    program = calibrated(recipe=M3.replace(softmax="static"))
    block = Block(encoder).eval()
    with torch.no_grad():
        q, k = (F.linear(X, m.weight, m.bias).view(2, 4, 4, 8).transpose(1, 2) for m in (block.a, block.b))
    seen = program.stats[f"{attention_of(program)}:probabilities"]
    want = softmax64(q, k)
    torch.testing.assert_close(seen.maximum.double(), want.max()[None], rtol=1e-5, atol=0)
    assert seen.elements == want.numel() and seen.minimum >= 0


def test_parts_of_one_weight_with_a_static_input():
    """Nothing asks for the range of the outputs, whose numbers of features differ."""
    linear = torch.nn.functional.linear
    recipe = load_recipe("w8a8").replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE),))
    program = calibrated(lambda self, x: (linear(x, self.a.weight[:16]), self.a(x)), recipe)
    assert set(program.stats) == {"a:input"}
