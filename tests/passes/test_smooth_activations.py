"""SmoothQuant: the float model stays, outliers move, and only where that helps and can be done."""

import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, decoder, dialect, randn, reasons, run
from zq_compiler import QRule, RecipeError, numerics
from zq_compiler.kernels import dequantize_weight
from zq_compiler.numerics import sqnr
from zq_compiler.passes import PASSES
from zq_compiler.pipeline import PassPipeline
from zq_compiler.program import constants, get_constant
from zq_compiler.schemes import INT8_TENSOR, INT8_TOKEN, INT8_WEIGHT

X = randn(4, 24, 32)


def outliers(forward, norm="norm"):
    """A block with one feature of its norm a hundred times the others."""
    block = Block(forward)
    with torch.no_grad():
        getattr(block, norm).weight.fill_(1.0)
        getattr(block, norm).weight[5] = 100.0
    return block


def behind_a_norm(self, x):
    y = self.norm(x)
    return self.a(y), self.b(y)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_factors_are_the_papers(alpha):
    block = outliers(behind_a_norm)
    program = after(captured(block, X, recipe=f"w8a8-plain+smooth{alpha}"), "smooth")
    factors = get_constant(program.gm, "a.smooth")
    with torch.no_grad():
        largest = block.norm(X).flatten(0, -2).abs().amax(0)
        weights = torch.maximum(block.a.weight.abs().amax(0), block.b.weight.abs().amax(0))
    torch.testing.assert_close(factors, largest**alpha / weights ** (1 - alpha))
    torch.testing.assert_close(get_constant(program.gm, "norm.weight_smoothed"), (block.norm.weight / factors).detach())
    torch.testing.assert_close(get_constant(program.gm, "norm.bias_smoothed"), (block.norm.bias / factors).detach())


@pytest.mark.parametrize(
    "recipe", ["w8a8-plain+smooth0.5", "w8a8-plain+smooth", "w8a8+smooth", "fp8+smooth", "w4a8+smooth"]
)
@pytest.mark.parametrize("norm", ["norm", "rms"])
def test_outputs_of_the_float_graph_stay_and_those_of_the_quantized_one_come_closer(recipe, norm):
    def forward(self, x):
        y = getattr(self, norm)(x)
        return self.a(y), self.b(y)

    block = outliers(forward, norm)
    want = run(captured(block, X), X)
    smoothed = after(captured(block, X, recipe=recipe), "smooth", check=True)
    assert changes(smoothed, "smooth") == 1
    assert all(sqnr(w, y) > 100 for w, y in zip(want, run(smoothed, X), strict=True))
    plain = run(after(captured(block, X, recipe=recipe.partition("+")[0])), X)
    got = run(after(captured(block, X, recipe=recipe), check=True), X)
    gained = [sqnr(w, g) - sqnr(w, p) for w, g, p in zip(want, got, plain, strict=True)]
    assert min(gained) > (10 if recipe.startswith("w8a8-plain") else 0)


def test_search_finds_an_alpha_that_is_no_worse():
    block = outliers(behind_a_norm)
    rows = [
        after(captured(block, X, recipe=f"w8a8-plain+smooth{alpha}"), "smooth").refinements[0]
        for alpha in ("", "0.2", "0.5", "0.8")
    ]
    assert all(rows[0].after <= row.after * (1 + 1e-6) for row in rows) and rows[0].after < rows[0].before


def test_the_norm_still_fuses():
    program = after(captured(Block(decoder), X, recipe="w8a8-plain+smooth0.5"))
    assert dialect(program) == dialect(after(captured(Block(decoder), X, recipe="w8a8-plain")))


def test_where_it_would_not_pay_nothing_moves():
    """Integers have no error that factors could lessen."""
    block = outliers(behind_a_norm)
    with torch.no_grad():
        for linear in (block.a, block.b):
            linear.weight.copy_(torch.randint(-127, 128, (32, 32)).float())
            linear.weight[:, 0] = 127.0
    rule = QRule("[ab]", INT8_WEIGHT, None, smooth=0.5)
    program = after(captured(block, X, recipe=zq.load_recipe("float").with_rules(rule)), "smooth")
    row = program.refinements[0]
    assert changes(program, "smooth") == 0 and row.before == row.after == 0.0
    assert not any("smooth" in name for name, _ in constants(program.gm))


def add_reads_it(self, x):
    y = self.norm(x)
    return self.a(y) + y


def another_linear_reads_it(self, x):
    y = self.norm(x)
    return self.a(y), self.out(y)


def called_twice(self, x):
    return self.a(self.norm(x)), self.a(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (add_reads_it, "add reads the norm too, and is no linear"),
        (another_linear_reads_it, "out reads the norm too, and is not smoothed"),
        (called_twice, "a is called more than once"),
    ],
)
def test_it_says_why_not(forward, reason):
    recipe = zq.load_recipe("w8a8-plain+smooth0.5").with_rules(QRule("out", None, None, optional=True))
    program = after(captured(forward, X, recipe=recipe), "smooth")
    assert changes(program, "smooth") == 0
    assert f"a: no SmoothQuant: {reason}" in program.notes


def test_a_linear_that_reads_no_norm_is_a_near_miss():
    program = after(captured(lambda self, x: self.a(x), X, recipe="w8a8-plain+smooth0.5"), "smooth")
    assert ("SmoothQuant", "what it reads is no norm's to scale") in reasons(program)


def test_static_scales_are_of_the_smoothed_values():
    block = outliers(behind_a_norm)
    rules = [QRule(name, INT8_WEIGHT, INT8_TENSOR, smooth=0.5) for name in ("a", "b")]
    recipe = zq.load_recipe("float").with_rules(*rules)
    program = captured(block, X, recipe=recipe)
    data = program.calibration = zq.batches.Batches([(X,)])
    after(program, "smooth", check=True)
    factors = get_constant(program.gm, "a.smooth")
    PassPipeline(PASSES).run(program, since="cast_layers", check=True)
    with torch.no_grad():
        largest = (block.norm(X) / factors).abs().max()
    scale = dict(constants(program.gm))["a.input_scale"]
    torch.testing.assert_close(scale.flatten(), largest[None] / 127)
    want, plain = (
        run(captured(block, X), X),
        captured(
            block,
            X,
            recipe=zq.load_recipe("float").with_rules(*(QRule(name, INT8_WEIGHT, INT8_TENSOR) for name in ("a", "b"))),
        ),
    )
    plain.calibration = data  # the same batches, whose statistics are still those of the plain values
    assert sqnr(want[0], run(program, X)[0]) > sqnr(want[0], run(after(plain), X)[0]) + 10


def test_rules_of_different_alphas_are_told():
    rules = [QRule("a", INT8_WEIGHT, INT8_TOKEN, smooth=0.5), QRule("b", INT8_WEIGHT, INT8_TOKEN, smooth=0.6)]
    program = after(captured(behind_a_norm, X, recipe=zq.load_recipe("float").with_rules(*rules)), "smooth")
    assert "a: no SmoothQuant: rules give its linears different alphas" in program.notes


def test_recipes_name_it():
    assert zq.load_recipe("w8a8+smooth").rules[0].smooth == "search"
    recipe = zq.load_recipe("w8a8+smooth0.75+gptq")
    assert recipe.rules[0].smooth == 0.75 and zq.Recipe.from_dict(recipe.to_dict()) == recipe and recipe.needs_data
    for wrong in (-0.1, 1.5, "auto", True):
        with pytest.raises(RecipeError, match="smooth="):
            QRule("a", smooth=wrong)
    with pytest.raises(zq.CalibrationError, match="give calibration=batches"):
        zq.quantize(nn.Linear(32, 32).eval(), (X,), recipe="w8a8+smooth")


def test_each_call_of_a_norm_gets_factors_of_its_own():
    def forward(self, x):
        h = x + self.a(self.norm(x))
        return h + self.b(self.norm(h))

    block = outliers(forward)
    with torch.no_grad():
        block.b.weight.mul_(torch.linspace(0.1, 8, 32))
    want = run(captured(block, X), X)[0]
    smoothed = after(captured(block, X, recipe="w8a8-plain+smooth0.5"), "smooth", check=True)
    assert changes(smoothed, "smooth") == 2 and sqnr(want, run(smoothed, X)[0]) > 100
    plain, got = (run(after(captured(block, X, recipe=f"w8a8-plain{s}")), X)[0] for s in ("", "+smooth0.5"))
    assert sqnr(want, got) > sqnr(want, plain)


def test_norms_may_be_read_in_another_order_than_they_stand():
    def forward(self, x):
        first = self.norm(x)
        return self.b(self.norm2(x + 1)) * self.a(first)

    block = outliers(forward)
    program = after(captured(block, X, recipe="w8a8-plain+smooth0.5"), check=True)
    assert changes(program, "smooth") == 2


@pytest.mark.parametrize("norm", ["affine", "plain", "rms"])
@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_the_factors_costs_counts(seed, norm):
    """In bfloat16 the smoothed weights lose bits: the report's figure is what the graph then does."""
    torch.manual_seed(seed)
    block = Block(behind_a_norm)
    if norm == "plain":
        block.norm = nn.LayerNorm(32, elementwise_affine=False)
    if norm == "rms":
        block.norm = nn.RMSNorm(32, eps=10.0)  # which counts
    with torch.no_grad():
        block.a.weight[:, 7] = 0
    x = randn(4, 24, 32, seed=seed)
    x[..., 5] *= 30
    x, block = x.bfloat16(), block.bfloat16()
    recipe = zq.load_recipe("float").with_rules(QRule("[ab]", INT8_WEIGHT, None, smooth=0.5))
    program = after(captured(block, x, recipe=recipe), "insert_qdq")
    row = program.refinements[0]
    replayed = PassPipeline(PASSES[:1]).run(captured(block, x, recipe="float"))
    want = [y.float() for y in run_wide(replayed, x)]
    got = [y.float() for y in run_wide(program, x)]
    error = sum(float((w - g).square().sum()) for w, g in zip(want, got, strict=True))
    assert row.after <= row.before
    assert row.after == pytest.approx(error / sum(float(w.square().sum()) for w in want), rel=0.02)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32, eps=10.0), nn.RMSNorm(32, eps=10.0)])
def test_factors_are_judged_by_the_norm_itself(norm):
    """Its epsilon, which counts here, included: what is reported is what the graph then does."""
    block = outliers(behind_a_norm)
    block.norm = norm
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.weight[5] = 100.0
    program = after(captured(block, X, recipe="w8a8-plain+smooth0.5"), "insert_qdq")
    row = program.refinements[0]
    want, got = (run_wide(p, X) for p in (captured(block, X, recipe="float"), program))
    error = sum(float((w - g).square().sum()) for w, g in zip(want, got, strict=True))
    assert changes(program, "smooth") == 1 and row.after < row.before / 2
    assert row.after == pytest.approx(error / sum(float(w.square().sum()) for w in want), rel=1e-3)


def run_wide(program, x):
    """Outputs of the linears, computed in float32 from what the graph gives them."""
    values = {}

    class Products(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target is torch.ops.aten.linear.default:
                read, weight = (self.env[node] for node in n.args[:2])
                if n.args[1].target is dequantize_weight:  # not rounded to bfloat16, as in kernels
                    q, scale = (self.env[node] for node in n.args[1].args[:2])
                    weight = numerics.dequantize_weight(q, scale, "int8", 0, 32)
                values[n] = read.float() @ weight.float().t()
            return result

    with torch.no_grad():
        Products(program.gm, garbage_collect_values=False).run(x.clone())
    return list(values.values())


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: x + self.a(self.norm(self.matrix[:, :32])).sum(), "what the norm reads is a constant"),
        (lambda self, x: self.a(nn.functional.layer_norm(x, (24, 32))), "the norm is over more than features"),
    ],
)
def test_norms_of_other_kinds_are_left_alone(forward, reason):
    program = after(captured(forward, X, recipe="w8a8-plain+smooth0.5"))
    assert f"a: no SmoothQuant: {reason}" in program.notes


def test_data_that_is_not_finite_is_named():
    bad = X.clone()
    bad[1, 2, 3] = torch.inf
    program = captured(outliers(behind_a_norm), X, recipe="w8a8-plain+smooth")
    program.calibration = [X, bad]
    with pytest.raises(zq.CalibrationError, match=r"a: batch 1 of the calibration data leads to NaN or Inf"):
        after(program)
