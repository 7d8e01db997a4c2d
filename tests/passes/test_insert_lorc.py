"""Low-rank compensation: numpy's decomposition, beside every kind of layer, and what it must not keep alive."""

import numpy as np
import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.onnx_runtime import session
from tests.programs import Block, after, captured, changes, dialect, encoder, randn, run
from tests.tolerances import ROUNDING_DB
from zq_compiler import QRule, QScheme, RecipeError, WeightError, load_recipe
from zq_compiler.analysis.report import make_report
from zq_compiler.methods import LoRC
from zq_compiler.numerics import (
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_weight,
    rotate,
    sqnr,
)
from zq_compiler.passes import insert_lorc
from zq_compiler.passes.insert_lorc import low_rank_factors
from zq_compiler.program import constants

X = randn(3, 32)


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_factors_are_numpys_best_approximation(rank):
    error = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * 1e-2
    u, v = low_rank_factors(error, rank)
    assert u.shape == (48, rank) and v.shape == (rank, 32) and u.dtype is v.dtype is torch.float16
    p, s, q = np.linalg.svd(error.double().numpy(), full_matrices=False)
    best = (p[:, :rank] * s[:rank]) @ q[:rank]
    assert sqnr(torch.from_numpy(best), u.double() @ v.double()) > 60  # eleven bits of float16, twice
    np.testing.assert_allclose(u.double().norm(dim=0), np.sqrt(s[:rank]), rtol=1e-3)  # split evenly
    np.testing.assert_allclose(v.double().norm(dim=1), np.sqrt(s[:rank]), rtol=1e-3)


def test_a_large_error_is_decomposed_at_random_and_always_alike(monkeypatch):
    monkeypatch.setattr(insert_lorc, "EXACT_SIZE", 16)
    g = torch.Generator().manual_seed(1)
    error = torch.randn(96, 6, generator=g) @ torch.randn(6, 80, generator=g) + torch.randn(96, 80, generator=g) / 10
    state = torch.get_rng_state()
    factors = low_rank_factors(error, 6)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(factors, low_rank_factors(error, 6), strict=True))
    s = np.linalg.svd(error.double().numpy(), compute_uv=False)
    least = np.sqrt((s[6:] ** 2).sum())
    assert (error - factors[0].float() @ factors[1].float()).norm() < 1.02 * least


@pytest.mark.parametrize("error", [torch.zeros(8, 8), torch.full((8, 8), 1e30), torch.full((8, 8), torch.nan)])
def test_what_it_would_not_lessen_gets_none(error):
    assert low_rank_factors(error, 4) is None


def values_of(weight, recipe):
    """The weight's quantized values, by `numerics`."""
    scheme = load_recipe(recipe).rules[0].weight
    if recipe.startswith("w8a8"):
        return dequantize(*quantize_per_channel(weight, scheme.rotated), torch.float32, scheme.rotated)
    packed, scale = quantize_weight(weight, scheme.format, scheme.group, scheme.rotated)
    features, dtype = weight.shape[1], torch.float32
    return dequantize_weight(packed, scale, scheme.format, scheme.group, features, dtype, scheme.rotated)


@pytest.mark.parametrize(
    "recipe", ["w8a8", "w8a8-plain", "w4a16-g64", "w4a16-g64-asym", "w3a16-g64", "fp6", "fp8", "w4a8", "w4a8-fp"]
)
def test_the_layer_gains_the_products_of_the_factors(recipe):
    block = Block(lambda self, x: self.a(x))
    plain = run(after(captured(block, X, recipe=recipe)), X)[0].double()
    program = after(captured(block, X, recipe=f"{recipe}+lorc4"), check=True)
    assert changes(program, "insert_lorc") == 1 and dialect(program)["low_rank_linear"] == 1
    stored = dict(constants(program.gm))
    assert stored["a.weight_lorc_u"].shape == (32, 4) and stored["a.weight_lorc_v"].shape == (4, 32)
    assert stored["a.weight_lorc_u"].dtype is torch.float16
    weight = block.a.weight.detach()
    error = (weight - values_of(weight, recipe)).double()
    p, s, q = np.linalg.svd(error.numpy(), full_matrices=False)
    best = torch.from_numpy((p[:, :4] * s[:4]) @ q[:4])
    gained = run(program, X)[0].double() - plain
    x = X.double() if recipe.endswith(("g64", "fp6")) else None
    if x is not None:  # of a quantized activation the branch reads the quantized values, which are not X
        assert sqnr(x @ best.t(), gained) > 40
    assert sqnr(X.double() @ best.t(), gained) > 20


def test_it_lessens_the_error_of_a_layer():
    block = Block(lambda self, x: self.a(x))
    want = run(captured(block, X), X)[0]
    errors = [
        (run(after(captured(block, X, recipe=f"w3a16-g64{lorc}")), X)[0] - want).norm()
        for lorc in ("", "+lorc4", "+lorc16", "+lorc32")
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 * errors[0]


@pytest.mark.parametrize("recipe", ["w8a8+lorc", "w8a8-plain+lorc"])
def test_a_norm_still_fuses_with_its_quantize(recipe):
    """The branch reads the integers, so the norm's floats are read by nobody."""
    program = after(
        captured(lambda self, x: (self.a(self.norm(x)), self.b(self.norm(x))), X, recipe=recipe), check=True
    )
    assert dialect(program)["layer_norm_quantize"] and "quantize_per_token" not in dialect(program)
    for norm in (n for n in program.graph.nodes if "layer_norm_quantize" in str(n.target)):
        assert all(user.args[1] < 2 or not user.users for user in norm.users)


def test_a_rotation_goes_into_the_factor():
    """And layers of one input read it dequantized once."""
    program = after(captured(lambda self, x: (self.a(x), self.b(x)), X, recipe="w8a8+lorc"), check=True)
    assert changes(program, "insert_lorc") == 2
    reads = [n for n in program.graph.nodes if str(n.target).startswith("zq.dequantize")]
    assert len(reads) == 1 and reads[0].args[3] is False and len(reads[0].users) == 2


def test_only_rules_that_ask_for_it_and_reports_that_count_it():
    int4 = QScheme("int4", "per_group", 16)
    rules = QRule("a", int4, None, lorc_rank=2), QRule("b", int4, None)
    recipe = load_recipe("float").with_rules(*rules)
    program = after(captured(lambda self, x: self.b(self.a(x)), X, recipe=recipe))
    assert changes(program, "insert_lorc") == 1
    report = make_report(program)
    packed = 32 * 16 + 32 * 2 * 2
    assert report.layer("b").bytes_after == packed and report.layer("a").bytes_after == packed + 2 * 2 * 64
    assert report.layer("a").asked == "int4 per_group(16) static + LoRC of rank 2"


def test_views_of_one_weight_have_their_own_factors():
    def forward(self, x):
        w = self.a.weight
        return nn.functional.linear(x, w), nn.functional.linear(x, w[:16])

    program = after(captured(forward, X, recipe="w4a16-g64+lorc2"), check=True)
    names = {name for name, _ in constants(program.gm) if "lorc" in name}
    assert names == {f"a.weight{view}_lorc_{part}" for view in ("", "_view1") for part in "uv"}


def test_a_weight_without_an_error_is_left_as_it_is():
    block = Block(lambda self, x: self.a(x))
    with torch.no_grad():
        block.a.weight.copy_(torch.randint(-7, 8, (32, 32)).float())
        block.a.weight[:, 0] = 7.5
        block.a.weight[:, 0] = 0
    program = after(
        captured(block, X, recipe=load_recipe("float").with_rules(QRule("a", QScheme(), None, lorc_rank=2)))
    )
    exact = run(program, X)[0]
    assert sqnr(nn.functional.linear(X, block.a.weight, block.a.bias).detach(), exact) > 40


def test_poison_is_named_by_its_layer():
    block = Block(lambda self, x: self.a(x))
    with torch.no_grad():
        block.a.weight[1, 1] = torch.nan
    with pytest.raises(WeightError, match=r"^a\.weight: the weight holds NaN"):
        after(captured(block, X, recipe="w4a16-g64+lorc"))


def test_recipes_name_it():
    assert load_recipe("w4a16-g64+lorc").rules[0].lorc_rank == 8
    recipe = load_recipe("hero-m3+lorc32")
    assert recipe.name == "hero-m3+lorc32"
    assert {rule.lorc_rank for rule in recipe.rules} == {0, 32}  # an attention has no weight
    assert zq.Recipe.from_dict(recipe.to_dict()) == recipe
    for wrong, message in (("w8a8+gptq3", "unknown method 'gptq3'"), ("w8a8+lorc0", "lorc, lorc<rank> or lorc-auto")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(wrong)
    for wrong in ({"lorc_rank": -1}, {"lorc_rank": True}, {"weight": None, "input": None, "lorc_rank": 4}):
        with pytest.raises(RecipeError, match="lorc_rank"):
            QRule("a", **wrong)


def test_it_is_saved_exported_and_compiled(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    x = randn(4, 64)
    q = zq.quantize(model, (x,), recipe="w4a16-g64+lorc4")
    want = q(x)
    q.save(tmp_path / "saved")
    assert torch.equal(zq.load(tmp_path / "saved")(x), want)
    for target in ("onnxruntime", "tensorrt"):
        report = q.export_onnx(tmp_path / "m.onnx", target=target)
        assert report.nodes["Gemm"] == 4 and report.nodes.get("MatMul", 0) == (2 if target == "tensorrt" else 0)
        session = ort.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert sqnr(want, torch.from_numpy(y)) > (ROUNDING_DB if target == "onnxruntime" else 35)
    assert sqnr(want, q.compile()(x)) > ROUNDING_DB


def with_settings(recipe, **settings):
    return load_recipe(recipe).replace(lorc=LoRC(**settings))


def test_rank_auto_is_the_smallest_that_reaches_the_share_of_the_energy():
    block = Block(lambda self, x: self.a(x))
    weight = block.a.weight.detach()
    s = np.linalg.svd((weight - values_of(weight, "w3a16-g64")).double().numpy(), compute_uv=False)
    shares = (s**2).cumsum() / (s**2).sum()
    for energy in (0.2, 0.5, 0.9):
        recipe = with_settings("w3a16-g64+lorc-auto", energy=energy, budget=100.0)
        stored = dict(constants(after(captured(block, X, recipe=recipe)).gm))
        rank = stored["a.weight_lorc_u"].shape[1]
        assert shares[rank - 1] >= energy > (shares[rank - 2] if rank > 1 else 0)


@pytest.mark.parametrize(("factors", "bytes_each"), [("float16", 2), ("int8", 1)])
def test_rank_auto_stays_within_its_budget(factors, bytes_each):
    block = Block(lambda self, x: self.a(x), width=64)
    recipe = with_settings("w4a16-g64+lorc-auto", energy=1.0, budget=0.3, factors=factors)
    program = after(captured(block, randn(3, 64), recipe=recipe))
    stored = dict(constants(program.gm))
    weight = stored["a.weight_q"].nbytes + stored["a.weight_scale"].nbytes
    rank = stored["a.weight_lorc_u"].shape[1]
    assert rank * 128 * bytes_each <= 0.3 * weight < (rank + 1) * 128 * bytes_each
    program = after(captured(block, randn(3, 64), recipe=recipe.replace(lorc=LoRC(budget=0.01))))
    assert changes(program, "insert_lorc") == 0 and "exceed the budget" in program.notes[0]


@pytest.mark.parametrize("recipe", ["w3a16-g64", "w8a8", "w8a8-plain"])
def test_factors_in_int8_do_nearly_as_much(recipe):
    block = Block(lambda self, x: self.a(x))
    after_ = {}
    for factors in ("float16", "int8"):
        program = after(captured(block, X, recipe=with_settings(f"{recipe}+lorc8", factors=factors)), check=True)
        stored = dict(constants(program.gm))
        assert stored["a.weight_lorc_u"].shape == (32, 8)
        after_[factors] = program.refinements[0].after
    assert stored["a.weight_lorc_u"].dtype is stored["a.weight_lorc_v"].dtype is torch.int8
    assert stored["a.weight_lorc_u_scale"].shape == (1, 8) and stored["a.weight_lorc_v_scale"].shape == (8, 1)
    before = program.refinements[0].before
    assert after_["float16"] < after_["int8"] * (1 + 1e-6) and before - after_["int8"] > 0.97 * (
        before - after_["float16"]
    )
    used = sum(
        stored[f"a.weight{part}"].nbytes
        for part in ("_q", "_scale", *(f"_lorc_{x}" for x in ("u", "v", "u_scale", "v_scale")))
    )
    assert make_report(program).layer("a").bytes_after == used


def test_weighted_it_is_numpys_best_approximation_of_what_the_error_does_to_the_inputs():
    x = randn(256, 32) * torch.logspace(-1, 1, 32)
    block = Block(lambda self, x: self.a(x))
    weight = block.a.weight.detach()
    error = (weight - values_of(weight, "w3a16-g64")).double()
    importance = x.double().square().sum(0).sqrt()
    p, s, q = np.linalg.svd((error * importance).numpy(), full_matrices=False)
    best = torch.from_numpy((p[:, :4] * s[:4]) @ q[:4]) / importance
    got = []
    for weighted in (False, True):
        program = after(captured(block, x, recipe=with_settings("w3a16-g64+lorc4", weighted=weighted)), check=True)
        stored = dict(constants(program.gm))
        product = stored["a.weight_lorc_u"].double() @ stored["a.weight_lorc_v"].double()
        got.append(((error - product) @ x.double().t()).square().sum())
    assert sqnr(best, product) > 50 and got[1] < got[0]
    with pytest.raises(zq.CalibrationError, match="give calibration=batches"):
        zq.quantize(nn.Linear(32, 32).eval(), (x,), recipe=with_settings("w3a16-g64+lorc4", weighted=True))


def test_a_rotated_weight_is_weighted_by_rotated_inputs():
    x = randn(256, 32) * torch.logspace(-1, 1, 32)
    block = Block(lambda self, x: self.a(x))
    w = rotate(block.a.weight.detach())
    error = (w - dequantize(*quantize_per_channel(w))).double()
    read = dequantize(*quantize_per_token(x, True))
    importance = read.double().square().sum(0).sqrt()
    p, s, q = np.linalg.svd((error * importance).numpy(), full_matrices=False)
    best = torch.from_numpy((p[:, :4] * s[:4]) @ q[:4]) / importance
    stored = dict(constants(after(captured(block, x, recipe=with_settings("w8a8+lorc4", weighted=True))).gm))
    assert sqnr(best, stored["a.weight_lorc_u"].double() @ stored["a.weight_lorc_v"].double()) > 40


def test_refinements_round_the_rest_anew_and_only_help():
    block = Block(lambda self, x: self.a(x))
    errors, scales = [], []
    for refinements in (0, 1, 8):
        program = after(
            captured(block, X, recipe=with_settings("w3a16-g64+lorc4", refinements=refinements)), check=True
        )
        stored = dict(constants(program.gm))
        values = dequantize_weight(stored["a.weight_q"], stored["a.weight_scale"], "int3", 64, 32)
        product = stored["a.weight_lorc_u"].float() @ stored["a.weight_lorc_v"].float()
        weight = block.a.weight.detach()
        errors.append(float((weight - values - product).square().sum() / weight.square().sum()))
        scales.append(stored["a.weight_scale"])
        assert program.refinements[0].after == pytest.approx(errors[-1], rel=1e-3)
    assert errors[0] > errors[1] >= errors[2] and all(torch.equal(scales[0], scale) for scale in scales)
    with pytest.raises(RecipeError, match="undoes gptq"):
        with_settings("w4a16-g64+gptq+lorc", refinements=1)


def test_layers_with_a_scale_for_each_feature_have_a_branch_too():
    """Their scales are absorbed into the weight, whose error it is."""
    x = randn(2, 8, 32)
    program = after(captured(Block(encoder), x, recipe="hero-m3+lorc4"), check=True)
    assert {row.layer for row in program.refinements} == {"a", "b", "c", "out", "up", "down"}
    assert changes(program, "insert_lorc") == 6


def test_settings():
    for wrong in ({"energy": 1.5}, {"budget": -1}, {"factors": "int4"}, {"weighted": 1}, {"refinements": -1}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            LoRC.from_dict(wrong)


@pytest.mark.parametrize("recipe", ["w4a16-g64+gptq+lorc4+bias", "w8a8+smooth0.5+gptq+lorc4+bias"])
def test_all_methods_together_are_saved_exported_and_compiled(recipe, tmp_path):
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    x = randn(24, 64)
    chosen = load_recipe(recipe).replace(lorc=LoRC(factors="int8", weighted=True))
    q = zq.quantize(model, (x,), recipe=chosen, calibration=[x], check=True)
    want = q(x)
    q.save(tmp_path / "saved")
    assert torch.equal(zq.load(tmp_path / "saved")(x), want)
    for target in ("onnxruntime", "onnxruntime-cuda", "tensorrt"):
        report = q.export_onnx(tmp_path / f"{target}.onnx", target=target)
        runner = session(report.path)
        y = runner.run(None, {runner.get_inputs()[0].name: x.numpy()})[0]
        assert sqnr(want, torch.from_numpy(y)) > (35 if target == "tensorrt" else 40)
    assert sqnr(want, q.compile()(x)) > 40
