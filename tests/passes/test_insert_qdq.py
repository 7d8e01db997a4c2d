"""Quantization made explicit: what is shared, what is not, and that values are quantized where they are read."""

import pytest
import torch
from torch import nn

from tests.programs import after, attend, captured, changes, decoder, dialect, encoder, ops, randn, run
from tests.tolerances import W8A8_DB
from zq_compiler import CalibrationError, QRule, load_recipe
from zq_compiler.kernels import dequantize, quantize_per_token, quantize_static, quantized_softmax_attention
from zq_compiler.numerics import sqnr
from zq_compiler.program import Stage, constants
from zq_compiler.schemes import INT8_FEATURE, INT8_WEIGHT

aten = torch.ops.aten
X = randn(3, 32)


def test_both_operands_of_every_planned_linear():
    program = after(captured(lambda self, x: self.b(self.a(x)), X), "insert_qdq")
    assert program.stage is Stage.QDQ
    assert dialect(program) == {"quantize_per_token": 2, "quantize_per_channel": 2, "dequantize": 4}
    assert changes(program, "insert_qdq") == 2
    for linear in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        assert linear.args[0].target is linear.args[1].target is dequantize
        assert linear.args[2].op == "get_attr"  # biases stay in float


def test_q_k_and_v_share_one_quantize_and_the_plan_decides():
    program = captured(lambda self, x: (self.a(x), self.b(x), self.c(x)), X)
    assert dialect(after(program, "insert_qdq")) == {
        "quantize_per_token": 1,
        "quantize_per_channel": 3,
        "dequantize": 4,
    }
    recipe = load_recipe("w8a8").to_dict()
    recipe["rules"].append({"pattern": "[bc]", "weight": None, "input": None})
    program = captured(lambda self, x: (self.a(x), self.b(x), self.c(x)), X, recipe=recipe)
    assert dialect(after(program, "insert_qdq"))["quantize_per_token"] == 1
    assert changes(program, "insert_qdq") == 1


def test_a_shared_layer_quantizes_its_weight_once():
    program = after(captured(lambda self, x: self.a(self.a(x)), X), "insert_qdq")
    assert dialect(program) == {"quantize_per_token": 2, "quantize_per_channel": 1, "dequantize": 3}


def test_nothing_is_inserted_for_float():
    program = after(captured(lambda self, x: self.a(x), X, recipe="float"), "insert_qdq")
    assert dialect(program) == {} and changes(program, "insert_qdq") == 0


def test_tables():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 32)

        def forward(self, ids):
            return self.table(ids)

    recipe = load_recipe("w8a8").replace(embedding="int8")
    program = after(captured(Model(), torch.arange(3), recipe=recipe), "insert_qdq")
    assert dialect(program) == {"quantize_per_channel": 1, "dequantize": 1}


def test_half_precision_comes_back_as_half():
    program = after(captured(nn.Sequential(nn.Linear(32, 32)).bfloat16(), X.bfloat16()), "insert_qdq")
    values = [n.meta["val"].dtype for n in program.graph.find_nodes(op="call_function", target=dequantize)]
    assert values == [torch.bfloat16, torch.bfloat16]


def changed_between(self, x):
    h = x * 2
    first = self.a(h)
    h.mul_(-3)
    return first, self.b(h), self.c(h)


def test_a_value_that_changes_between_two_layers_is_quantized_for_each():
    program = captured(changed_between, X)
    want = run(program, X)
    after(program, "insert_qdq")
    quantizes = program.graph.find_nodes(op="call_function", target=quantize_per_token)
    (change,) = program.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)
    assert sorted(q < change for q in quantizes) in ([False, False, True], [False, True])
    for w, y in zip(want, run(program, X), strict=True):
        assert sqnr(w, y) > W8A8_DB


@pytest.mark.parametrize("op", ["aten.mul_.Tensor"])
def test_in_place_operations_are_kept(op):
    program = after(captured(changed_between, X), "insert_qdq")
    assert ops(program)[op] == 1


# --- static scales -------------------------------------------------------------------------------------------------

TOKENS = randn(2, 4, 32)
M3 = load_recipe("hero-m3")
STATIC = load_recipe("w8a8").replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE),))


def inserted(forward, x=TOKENS, recipe=M3):
    return after(captured(forward, x, recipe=recipe), "insert_qdq", check=True)


@pytest.fixture(scope="module")
def layer():
    return inserted(encoder)


def test_every_planned_value_of_a_layer(layer):
    assert dialect(layer) == {
        "quantize_per_token": 2,  # what Q, K and V read, and what FC1 reads
        "quantize_static": 7,  # Q, K, V; inputs and outputs of the projection and of FC2
        "quantize_per_channel": 6,
        "dequantize": 2 + 7 + 6,
        "quantized_softmax_attention": 1,
    }
    assert changes(layer, "insert_qdq") == 7
    assert "aten.scaled_dot_product_attention" not in ops(layer)


def test_scales_are_constants_named_after_their_values(layer):
    attention = next(name for name, plan in layer.plan.items() if plan.kind == "attention")
    scales = {name: value for name, value in constants(layer.gm) if name.endswith("_scale")}
    features = {f"{name}.{side}_scale": f"{name}:{side}" for name in ("out", "down") for side in ("input", "output")}
    parts = {f"{attention}.{part}_scale": f"{attention}:{part}" for part in ("query", "key", "value")}
    assert scales.keys() == features.keys() | parts.keys()
    for name, value in features.items():
        top = layer.stats[value].max_abs
        assert torch.equal(scales[name], (top.clamp(min=1e-2 * top.median()) / 127)[None, None])
    for name, value in parts.items():
        assert torch.equal(scales[name], (layer.stats[value].max_abs / 127)[None, None, None])


def test_a_static_pair_has_one_scale_and_stands_at_its_value(layer):
    for node in layer.graph.find_nodes(op="call_function", target=quantize_static):
        (user,) = node.users
        assert user.target is dequantize and user.args[1] is node.args[1]
        assert user.args[2:] == (torch.float32, False)
        assert node.args[0].users.keys() == {node}  # nobody else reads the floats
    (attention,) = layer.graph.find_nodes(op="call_function", target=quantized_softmax_attention)
    names = [operand.args[1].target.rsplit(".", 1)[1] for operand in attention.args[:3]]
    assert names == ["query_scale", "key_scale", "value_scale"]


@pytest.mark.parametrize("value", ["out:input", "out:output", "down:input", "down:output", "query", "value"])
def test_a_missing_range_is_named(layer, value):
    program = captured(encoder, TOKENS, recipe="hero-m3")
    program.calibration = type(layer.stats)(
        {k: v for k, v in layer.stats.items() if not k.endswith(value)}, layer.stats.key
    )
    with pytest.raises(CalibrationError, match=rf"{value}: recipe hero-m3 needs the range.*give calibration=batches"):
        after(program, "insert_qdq")


def test_no_calibration_at_all():
    program = captured(encoder, TOKENS, recipe="hero-m2")
    program.calibration = None
    with pytest.raises(CalibrationError, match=r"needs the range of this value.*hero-m1"):
        after(program, "insert_qdq")


def test_static_probabilities():
    program = inserted(encoder, recipe=M3.replace(softmax="static"))
    (attention,) = program.graph.find_nodes(op="call_function", target=quantized_softmax_attention)
    (largest,) = (v.maximum for name, v in program.stats.items() if name.endswith(":probabilities"))
    scale = program.gm.get_buffer(attention.args[6].target)
    assert attention.args[6].target.endswith(".probabilities_scale")
    assert torch.equal(scale, (largest / 255).reshape(1, 1, 1, 1))  # never negative: 255 steps


def test_masks_causality_and_softmax_scale_are_kept():
    mask = randn(2, 1, 4, 4) > -1

    def forward(self, x, mask):
        return attend(self.a(x), self.b(x), self.c(x), attn_mask=mask, scale=0.3)

    program = after(captured(forward, TOKENS, mask, recipe=M3), "insert_qdq", check=True)
    (attention,) = program.graph.find_nodes(op="call_function", target=quantized_softmax_attention)
    assert attention.args[3].op == "placeholder" and attention.args[4:] == (False, 0.3, None)
    (attention,) = inserted(decoder).graph.find_nodes(op="call_function", target=quantized_softmax_attention)
    assert attention.args[3:] == (None, True, None, None)


def test_ranges_are_chosen_as_the_recipe_says():
    program = inserted(lambda self, x: self.a(x), recipe=STATIC.replace(range_method="percentile"))
    scale = dict(constants(program.gm))["a.input_scale"].flatten()
    assert torch.equal(scale, program.stats["a:input"].scale("percentile", "per_feature"))


def test_a_static_value_that_changes_between_two_reads_is_quantized_for_each():
    def forward(self, x):
        h = x * 2
        first = self.a(h)
        h.mul_(-3)
        return first, self.a(h)

    program = captured(forward, TOKENS, recipe=STATIC)
    want = run(program, TOKENS)
    after(program, "insert_qdq")
    first, second = program.graph.find_nodes(op="call_function", target=quantize_static)
    (change,) = program.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)
    assert first < change < second
    for w, y in zip(want, run(program, TOKENS), strict=True):
        assert sqnr(w, y) > W8A8_DB


def test_calls_on_rows_in_other_shapes_have_the_same_scales():
    def forward(self, x):
        return self.a(x), self.a(x.sin().view(-1, 32))

    program = inserted(forward, recipe=STATIC)
    scales = {name: value for name, value in constants(program.gm) if name.startswith("a.input_scale")}
    assert {tuple(value.shape) for value in scales.values()} == {(1, 1, 32), (1, 32)}
    assert torch.equal(*(value.flatten() for value in scales.values()))


# --- the residual --------------------------------------------------------------------------------------------------


def summands(program):
    """Of the sums that norms read: which op gives each."""
    norms = program.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    adds = [norm.args[0] for norm in norms if norm.args[0].target is aten.add.Tensor]
    return [{operand.target for operand in add.args} for add in adds]


def test_a_norms_integers_are_what_is_added():
    first, second = summands(inserted(encoder))
    assert dequantize in first and first != {dequantize}  # x itself comes from no norm
    assert second == {dequantize}


def test_a_float_residual_stays():
    first, second = summands(inserted(encoder, recipe=M3.replace(residual="float")))
    assert first != {dequantize} and aten.layer_norm.default in second


def test_a_norm_that_a_rule_leaves_in_float_gives_its_floats():
    rule = QRule.leave_float("norm$")
    _, second = summands(inserted(encoder, recipe=M3.with_rules(rule)))
    assert aten.layer_norm.default in second
    other = QRule.leave_float("norm2$")
    _, second = summands(inserted(encoder, recipe=M3.with_rules(other)))
    assert second == {dequantize}


def test_of_two_quantizes_of_a_norms_result_the_token_wise_is_added():
    rules = (*M3.rules, QRule("c$", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE))
    recipe = M3.replace(rules=rules)

    def block(self, x):
        y = self.norm(x)
        return self.norm2(self.c(y) + y) * self.a(y)

    program = inserted(block, recipe=recipe)
    (add,) = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert sorted(operand.args[1].op for operand in add.args) == ["call_function", "get_attr"]  # one scale at run time


def test_only_what_a_norm_gives_is_replaced():
    """A pre-norm block adds the stream, which no norm wrote."""
    program = inserted(decoder)
    adds = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert [sum(operand.target is dequantize for operand in add.args) for add in adds] == [1, 1]  # sublayers' results
