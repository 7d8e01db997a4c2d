"""Low-rank compensation: numpy's decomposition, beside every kind of layer, and what it must not keep alive."""

import numpy as np
import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, dialect, ops, randn, run
from tests.tolerances import ROUNDING_DB
from zq_compiler import QRule, QScheme, RecipeError, WeightError, load_recipe
from zq_compiler.analysis.report import make_report
from zq_compiler.numerics import dequantize, dequantize_weight, quantize_per_channel, quantize_weight, sqnr
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


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain", "w4a16-g64", "w3a16-g64", "fp6", "fp8", "w4a8", "w4a8-fp"])
def test_the_layer_gains_the_products_of_the_factors(recipe):
    block = Block(lambda self, x: self.a(x))
    plain = run(after(captured(block, X, recipe=recipe)), X)[0].double()
    program = after(captured(block, X, recipe=f"{recipe}+lorc4"), check=True)
    assert changes(program, "insert_lorc") == 1 and ops(program)["aten.linear"] == 2
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
    for wrong, message in (("w8a8+gptq3", "unknown method 'gptq3'"), ("w8a8+lorc0", "use lorc, or lorc<rank>")):
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
