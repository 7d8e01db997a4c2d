"""The report is read off the final graph."""

import json

import pytest
import torch
from torch import nn

from tests.programs import after, captured, randn
from zq_compiler import QRule, StrictError, load_recipe
from zq_compiler.analysis.report import make_report, op_histogram, require_all
from zq_compiler.passes import PASSES

X = randn(3, 32)
W8A8 = load_recipe("w8a8")


def report(forward=None, *inputs, recipe=W8A8):
    return make_report(after(captured(forward, *(inputs or (X,)), recipe=recipe)))


def block(self, x):
    return self.c(nn.functional.gelu(self.b(self.norm(self.a(self.a(x))))))


def test_rows():
    found = report(block, recipe=W8A8.with_rules(QRule.leave_float("c", "sensitive")))
    assert [row.name for row in found.layers] == ["a", "b", "c"]
    a, b, c = found.layers
    assert (a.kind, a.shape, a.got, a.calls, a.fused_into) == ("linear", (32, 32), "int8", 2, "quantize_per_token")
    assert (b.calls, b.fused_into, b.reason) == (1, "layer_norm_quantize", "")
    assert (c.asked, c.got, c.fused_into, c.reason) == ("float", "float", "", "sensitive")
    assert "per_channel" in a.asked and "per_token" in a.asked
    assert found.counts == {"int8": 2, "float": 1}
    assert found.layer("b") is b
    with pytest.raises(KeyError):
        found.layer("z")


def test_bytes_are_those_of_the_constants():
    found = report(lambda self, x: self.b(self.a(x)))
    floats, integers = 32 * 32 * 4, 32 * 32 + 32 * 4
    assert [(r.bytes_before, r.bytes_after) for r in found.layers] == [(floats, integers)] * 2
    assert found.bytes_before == 2 * (floats + 32 * 4)
    assert found.bytes_after == 2 * (integers + 32 * 4)


def test_the_quantizer_is_found_behind_moves_of_rows():
    def forward(self, x):
        return self.a(nn.functional.gelu(x * self.scale).transpose(0, 1).reshape(-1, 32))

    assert report(forward, randn(2, 3, 32)).layer("a").fused_into == "gelu_quantize"


def test_parts_of_one_weight_are_one_layer_with_all_its_bytes():
    def forward(self, x):
        w = self.a.weight
        return nn.functional.linear(x, w[:16]), nn.functional.linear(x, w[16:])

    (row,) = report(forward).layers
    assert (row.name, row.got, row.calls, row.bytes_after) == ("a", "int8", 2, 32 * 32 + 32 * 4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.table.weight

    def forward(self, ids):
        return self.lm_head(self.table(ids))


@pytest.mark.parametrize(("embedding", "head"), [("int8", "float"), ("float", "int8"), ("int8", "int8")])
def test_a_tied_weight_serves_two_layers_that_are_reported_apart(embedding, head):
    recipe = W8A8.replace(embedding=embedding, lm_head=head)
    program = after(captured(Tied(), torch.arange(5), recipe=recipe))
    found = make_report(program)
    assert {row.name: row.got for row in found.layers} == {"table": embedding, "lm_head": head}
    require_all(program)


def test_notes():
    assert any("nothing was quantized" in n for n in report(block, recipe="float").notes)

    def attention(self, x):
        q = self.a(x).unsqueeze(0)
        return nn.functional.scaled_dot_product_attention(q, q, q)

    assert any(n.startswith("1 attentions or other products of two activations stay") for n in report(attention).notes)
    assert report(block).notes == []


def test_histogram_passes_and_near_misses():
    found = report(lambda self, x: (lambda y: (self.a(y), y * 2))(nn.functional.gelu(x)))
    assert found.operators == {"aten.gelu": 1, "zq.quantize_per_token": 1, "zq.int8_linear": 1, "aten.mul.Tensor": 1}
    assert found.passes[0]["name"] == "canonicalize" and len(found.passes) == len(PASSES)
    assert {m["rule"] for m in found.near_misses} == {"FuseGelu"}
    assert op_histogram(captured(lambda self, x: x + 1, X)) == {"aten.add.Tensor": 1}


def test_json_and_text():
    found = report(block, recipe=W8A8.with_rules(QRule.leave_float("c", "sensitive, see [/1]")))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["counts"] == {"int8": 2, "float": 1} and len(data["layers"]) == 3
    text = str(found)
    assert "w8a8: 2 int8, 1 float" in text and "a (2 calls)" in text and "sensitive, see [/1]" in text
    integers, floats, norm = 32 * 32 + 2 * 32 * 4, 32 * 32 * 4 + 32 * 4, 2 * 32 * 4
    assert f"weights {3 * floats + norm} bytes -> {2 * integers + floats + norm} bytes" in text


def test_require_all_names_the_first_and_its_reason():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32).double()

        def forward(self, x):
            return self.layer(x)

    program = after(captured(Wide(), X.double()))
    with pytest.raises(StrictError, match=r"^layer: 1 of the layers that recipe w8a8 names .*float64.*leave_float"):
        require_all(program)
