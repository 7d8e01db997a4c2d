"""Quantization made explicit: what is shared, what is not, and that values are quantized where they are read."""

import pytest
import torch
from torch import nn

from tests.programs import after, captured, changes, dialect, ops, randn, run
from tests.tolerances import W8A8_DB
from zq_compiler import load_recipe
from zq_compiler.kernels import dequantize, quantize_per_token
from zq_compiler.numerics import sqnr
from zq_compiler.program import Stage

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
