"""Linears between dequantizes become integer ops, table lookups too; biases, dtypes and leftovers."""

import pytest
import torch
from torch import nn

from tests.programs import Block, after, attend, captured, changes, decoder, dialect, encoder, ops, randn, reasons, run
from tests.tolerances import BF16_DB, ROUNDING_DB
from zq_compiler import QRule, QScheme, load_recipe
from zq_compiler.analysis.report import make_report
from zq_compiler.formats import FORMATS, packed_size
from zq_compiler.kernels import int8_linear, int8_linear_quantize, w4a8_linear, weight_only_linear
from zq_compiler.numerics import (
    WHOLE,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_weight,
    sqnr,
)
from zq_compiler.passes.fuse_linear import FuseLinear
from zq_compiler.program import Stage, constants
from zq_compiler.schemes import FP8_TOKEN, INT8_FEATURE, INT8_TOKEN, INT8_WEIGHT

X = randn(3, 32)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linears(bias, dtype, recipe):
    torch.manual_seed(0)
    program = captured(nn.Sequential(nn.Linear(32, 48, bias=bias)).to(dtype), X.to(dtype), recipe=recipe)
    after(program, "move_quantize")
    explicit = run(program, X.to(dtype))[0]
    FuseLinear()(program)
    program.stage = Stage.FUSED
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    assert dialect(program) == {"quantize_per_token": 1, "int8_linear": 1}
    assert "aten.linear" not in ops(program)
    (linear,) = program.graph.find_nodes(op="call_function", target=int8_linear)
    assert (linear.args[4] is not None) == bias and linear.args[5] is dtype
    fused = run(program, X.to(dtype))[0]
    assert fused.dtype is dtype
    assert sqnr(explicit, fused) > (ROUNDING_DB if dtype is torch.float32 else BF16_DB)
    assert FuseLinear()(program) == 0


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g64", "w3a16-g64", "w4a16-g64-asym", "w2a16-g64-asym", "fp6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_alone_is_read_packed(recipe, dtype, bias):
    layer = nn.Linear(72, 48, bias=bias).to(dtype)  # 72: a ragged group, and rows of codes that end inside a word
    x = randn(3, 72).to(dtype)
    program = after(captured(nn.Sequential(layer), x, recipe=recipe), check=True)
    assert dialect(program) == {"weight_only_linear": 1} and "aten.linear" not in ops(program)
    (node,) = program.graph.find_nodes(op="call_function", target=weight_only_linear)
    *_, format, group = node.args
    scheme = load_recipe(recipe).rule_for("0").weight
    assert (format, group) == (scheme.format, scheme.group) and (node.args[3] is not None) == bias
    packed, scale = quantize_weight(layer.weight.detach(), format, group)
    weight = dequantize_weight(packed, scale, format, group, 72, dtype)
    assert torch.equal(run(program, x)[0], nn.functional.linear(x, weight, layer.bias))
    stored = dict(constants(program.gm))
    assert torch.equal(stored["0.weight_q"], packed) and "0.weight" not in stored
    assert stored["0.weight_q"].numel() == 48 * packed_size(72, FORMATS[format].bits)


@pytest.mark.parametrize(
    ("weight", "input", "op"),
    [
        (QScheme("int4", "per_tensor"), None, "weight_only_linear"),
        (QScheme("int2_asym", "per_tensor"), None, "weight_only_linear"),
        (QScheme("int4", "per_tensor"), INT8_TOKEN, "w4a8_linear"),
        (QScheme("fp8_e4m3", "per_tensor"), FP8_TOKEN, "fp8_linear"),
    ],
)
def test_a_weight_may_have_one_scale(weight, input, op):
    layer, x = nn.Linear(72, 48), randn(3, 72)
    recipe = load_recipe("float").with_rules(QRule(".*", weight, input))
    program = after(captured(nn.Sequential(layer), x, recipe=recipe), check=True)
    assert dialect(program)[op] == 1
    stored = dict(constants(program.gm))
    packed, scale = quantize_weight(layer.weight.detach(), weight.format, WHOLE)
    assert torch.equal(stored["0.weight_q"], packed) and torch.equal(stored["0.weight_scale"], scale)
    if input is None:
        values = dequantize_weight(packed, scale, weight.format, 0, 72)
        assert torch.equal(run(program, x)[0], nn.functional.linear(x, values, layer.bias))


def test_one_recipe_may_mix_formats_and_leave_layers_out():
    int4, fp6 = QScheme("int4", "per_group", 16), QScheme("fp6_e3m2")
    rules = QRule("a", int4, None), QRule("b", fp6, None), QRule("c"), QRule.leave_float("out")
    program = captured(
        lambda self, x: self.out(self.a(x) + self.b(x) + self.c(x)), X, recipe=load_recipe("float").with_rules(*rules)
    )
    after(program, check=True)
    assert dialect(program) == {"weight_only_linear": 2, "quantize_per_token": 1, "int8_linear": 1}
    assert {row.name: row.got for row in make_report(program).layers} == {
        "a": "int4",
        "b": "fp6_e3m2",
        "c": "int8",
        "out": "float",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_operands_share_one_quantize(dtype):
    block = Block(lambda self, x: (self.a(x), self.b(x))).to(dtype)
    program = after(captured(block, X.to(dtype), recipe="fp8"), check=True)
    assert dialect(program) == {"quantize_per_token_fp8": 1, "fp8_linear": 2}
    y = run(program, X.to(dtype))[0]
    (q, scale), (w, w_scale) = quantize_per_token_fp8(X.to(dtype)), quantize_weight(block.a.weight.detach(), "fp8_e4m3")
    exact = (q.double() * scale) @ (w.view(torch.float8_e4m3fn).double() * w_scale).t() + block.a.bias.double()
    assert y.dtype is dtype and sqnr(exact, y) > (ROUNDING_DB if dtype is torch.float32 else BF16_DB)


@pytest.mark.parametrize("recipe", ["w4a8", "w4a8-g128", "w4a4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_meets_integers(recipe, dtype, bias):
    layer = nn.Linear(144, 48, bias=bias).to(dtype)  # a ragged group of 128
    x = randn(3, 144).to(dtype)
    program = after(captured(nn.Sequential(layer), x, recipe=recipe), check=True)
    rule = load_recipe(recipe).rule_for("0")
    quantize = quantize_per_token_int4 if recipe == "w4a4" else quantize_per_token
    assert dialect(program) == {quantize.__name__: 1, "w4a8_linear": 1} and "aten.linear" not in ops(program)
    (node,) = program.graph.find_nodes(op="call_function", target=w4a8_linear)
    assert node.args[5:] == ("int4", rule.weight.group, dtype) and (node.args[4] is not None) == bias
    packed, scale = quantize_weight(layer.weight.detach(), "int4", rule.weight.group, rule.weight.rotated)
    expected = w4a8_linear(*quantize(x, rule.input.rotated), packed, scale, layer.bias, *node.args[5:])
    assert torch.equal(run(program, x)[0], expected) and not program.near_misses
    stored = dict(constants(program.gm))
    assert torch.equal(stored["0.weight_q"], packed) and "0.weight" not in stored
    assert stored["0.weight_q"].numel() == 48 * 72  # four bits each
    (row,) = make_report(program).layers
    assert row.got == "int4" and row.bytes_after == 48 * 72 + scale.nbytes and row.fused_into == quantize.__name__


def test_features_that_do_not_divide_by_16_are_not_rotated():
    rotated = QScheme("int4", rotated=True), QScheme(granularity="per_token", dynamic=True, rotated=True)
    recipe = load_recipe("float").with_rules(QRule(".*", *rotated))
    for features in (41, 48):
        layer, x = nn.Linear(features, 48), randn(3, features)
        program = after(captured(nn.Sequential(layer), x, recipe=recipe), check=True)
        (quantize,) = program.graph.find_nodes(op="call_function", target=torch.ops.zq.quantize_per_token.default)
        assert quantize.args[1] == (features == 48)
        assert sqnr(layer(x).detach(), run(program, x)[0]) > 12


@pytest.mark.parametrize(("forward", "in_mlp"), [(encoder, {"up", "down"}), (decoder, {"gate", "up", "down"})])
def test_int4_weights_in_the_mlp_and_int8_elsewhere(forward, in_mlp):
    """ZeroQuant's W4/8A8, by what a layer does."""
    program = after(captured(forward, randn(2, 5, 32), recipe="w48a8"), check=True)
    got = {row.name: row.got for row in make_report(program).layers if row.kind == "linear"}
    assert got == {name: "int4" if name in in_mlp else "int8" for name in ("a", "b", "c", "out", *in_mlp)}


@pytest.mark.parametrize(
    ("recipe", "constraint"), [("w4a8-fp", "none"), ("w4a8-fp-m1", "pow2"), ("w4a8-fp-m2", "group_pow2")]
)
def test_fp4_weights_meet_fp8_activations(recipe, constraint):
    layer, x = nn.Linear(272, 48), randn(3, 272)
    program = after(captured(nn.Sequential(layer), x, recipe=recipe), check=True)
    assert dialect(program) == {"quantize_per_token_fp8": 1, "fp8_linear": 1}
    packed, scale = quantize_weight(layer.weight.detach(), "fp4_e2m1", 128, False, constraint)
    stored = dict(constants(program.gm))
    assert torch.equal(stored["0.weight_q"], packed) and torch.equal(stored["0.weight_scale"], scale)
    (q, x_scale), w = quantize_per_token_fp8(x), dequantize_weight(packed, scale, "fp4_e2m1", 128, 272)
    exact = (q.double() * x_scale) @ w.double().t() + layer.bias.double()
    assert sqnr(exact, run(program, x)[0]) > ROUNDING_DB
    assert [row.got for row in make_report(program).layers] == ["fp4_e2m1"]


def test_float_linears_stay():
    program = after(captured(lambda self, x: self.a(x) + x @ x.t() @ x, X, recipe="float"))
    assert ops(program)["aten.linear"] == 1 and dialect(program) == {}


def test_tables():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 32, padding_idx=3)

        def forward(self, ids):
            return self.table(ids)

    model, ids = Model(), torch.tensor([[1, 3], [39, 0]])
    program = after(captured(model, ids, recipe=load_recipe("w8a8").replace(embedding="int8")))
    assert dialect(program) == {"int8_embedding": 1} and changes(program, "fuse_linear") == 1
    rows = model(ids).detach()
    error = (program.gm(ids)[0] - rows).abs()
    assert (error <= rows.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    assert torch.equal(program.gm(ids)[0][0, 1], torch.zeros(32))


# --- static scales -------------------------------------------------------------------------------------------------

STATIC = load_recipe("w8a8").replace(rules=(QRule(".*", INT8_WEIGHT, INT8_FEATURE),))
GEMM_QUANT = STATIC.replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE),))
READERS = "its float output has other readers, so fusing would compute it twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_wise_input_has_no_scale_left(dtype):
    block = Block(lambda self, x: self.a(x)).to(dtype)
    program = after(captured(block, X.to(dtype), recipe=STATIC), "fuse_linear", check=True)
    assert dialect(program) == {"quantize_static": 1, "int8_linear": 1}
    assert {"aten.linear", "aten.to.dtype"}.isdisjoint(ops(program))
    (linear,) = program.graph.find_nodes(op="call_function", target=int8_linear)
    assert linear.args[1] is None and linear.args[5] is dtype
    assert [n.target for n in linear.args[2:5]] == ["a.weight_q", "a.weight_scale", "a.bias"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_scale_is_divided_out(bias):
    block = Block(lambda self, x: self.a(x))
    if not bias:
        block.a.bias = None
    program = after(captured(block, X, recipe=GEMM_QUANT), "fuse_linear", check=True)
    assert dialect(program) == {"quantize_static": 1, "int8_linear_quantize": 1, "dequantize": 1}
    assert FuseLinear()(program) == 0
    (node,) = program.graph.find_nodes(op="call_function", target=int8_linear_quantize)
    x_q, x_scale, *operands = node.args
    assert x_q.target.name() == "zq::quantize_static" and x_scale is None
    step_in, step_out = (program.stats[f"a:{side}"].scale(granularity="per_feature") for side in ("input", "output"))
    q, scale = quantize_per_channel(block.a.weight.detach() * step_in)
    got_q, got_scale, got_bias = (n and program.gm.get_buffer(n.target) for n in operands)
    assert torch.equal(got_q, q) and torch.equal(got_scale, scale / step_out[:, None])
    assert (got_bias is None) != bias
    if bias:
        assert torch.equal(got_bias, block.a.bias.detach() / step_out)
    (back,) = node.users  # who reads floats has them from the integers
    assert torch.equal(program.gm.get_buffer(back.args[1].target).flatten(), step_out)


def test_queries_keys_and_values_have_one_step_and_rows_keep_their_scales():
    block = Block(lambda self, x: attend(self.a(x), self.b(x), self.c(x)))
    x = X[None]
    program = after(captured(block, x, recipe="hero-m2"), "fuse_linear", check=True)
    nodes = program.graph.find_nodes(op="call_function", target=int8_linear_quantize)
    layers = {node.args[2].target.removesuffix(".weight_q"): node for node in nodes}
    assert layers.keys() == {"a", "b", "c"}
    assert len({node.args[:2] for node in nodes}) == 1 and nodes[0].args[1] is not None
    with torch.no_grad():
        for layer, node in layers.items():
            linear = getattr(block, layer)
            step = linear(x).abs().max() / 127
            _, scale = quantize_per_channel(linear.weight, True)
            folded, bias = (program.gm.get_buffer(n.target) for n in node.args[3:])
            torch.testing.assert_close(folded, scale / step)
            torch.testing.assert_close(bias, linear.bias / step)


def test_not_when_others_read_the_floats():
    def forward(self, x):
        y = self.a(x)
        return attend(y, self.b(x), self.c(x)), y.sin()

    program = after(captured(forward, X[None], recipe="hero-m2"), "fuse_linear", check=True)
    assert dialect(program)["int8_linear_quantize"] == 2
    (kept,) = program.graph.find_nodes(op="call_function", target=int8_linear)
    assert kept.args[2].target == "a.weight_q"
    assert ("QuantizeOutput", READERS) in reasons(program)


def test_not_when_the_bias_is_computed():
    def forward(self, x):
        return nn.functional.linear(x, self.a.weight, x.sum(0))

    program = after(captured(forward, X, recipe=GEMM_QUANT), "fuse_linear", check=True)
    assert dialect(program) == {"quantize_static": 2, "int8_linear": 1, "dequantize": 1}
    assert ("QuantizeOutput", "its bias is computed at run time") in reasons(program)


def test_two_steps_in_a_row():
    """What one writes the next reads: no floats in between."""

    def forward(self, x):
        return self.b(self.a(x))

    recipe = STATIC.replace(rules=(QRule("[ab]", INT8_WEIGHT, INT8_FEATURE),))
    program = captured(forward, X, recipe=recipe)
    want = run(program, X)[0]
    after(program, "fuse_linear", check=True)
    assert dialect(program) == {"quantize_static": 1, "int8_linear_quantize": 1, "int8_linear": 1}
    assert sqnr(want, run(program, X)[0]) > 25.0


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp4_e2m1"])
def test_fp8_with_one_scale_a_tensor(format):
    """What TensorRT calls FP8: a calibrated scale of the activations, one of each of the weight's rows."""
    group = 0 if format == "fp8_e4m3" else 16
    weight = QScheme(format, "per_group" if group else "per_channel", group)
    rule = QRule(".*", weight, QScheme("fp8_e4m3", "per_tensor"), optional=True)
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, X, recipe=load_recipe("float").with_rules(rule)), check=True)
    assert dialect(program) == {"quantize_static_fp8": 1, "fp8_linear": 1}
    scale = X.abs().max() / 448
    q = (X / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    packed, w_scale = quantize_weight(block.a.weight.detach(), format, group)
    w = dequantize_weight(packed, w_scale, format, group, 32)
    want = (q * scale).double() @ w.double().t() + block.a.bias.detach().double()
    assert sqnr(want, run(program, X)[0]) > 100
