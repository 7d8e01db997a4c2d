"""The plan: which layer is what, what becomes of it, and why not."""

import pytest
import torch
from torch import nn

from tests.programs import after, captured, randn
from zq_compiler import QRule, RecipeError, load_recipe
from zq_compiler.kernels.int8_linear import MAX_K
from zq_compiler.schemes import INT8_WEIGHT, ROTATED_TOKEN, ROTATED_WEIGHT

W8A8 = load_recipe("w8a8")


def plan(model, *inputs, recipe=W8A8):
    return after(captured(model, *(inputs or (randn(3, 32),)), recipe=recipe), "annotate").plan


class Language(nn.Module):
    def __init__(self, tied=True, head="lm_head"):
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.block = nn.Linear(32, 32)
        self.head = head
        setattr(self, head, nn.Linear(32, 40, bias=False))
        if tied:
            getattr(self, head).weight = self.table.weight

    def forward(self, ids):
        return getattr(self, self.head)(self.block(self.block(self.table(ids))))


IDS = torch.arange(6).reshape(2, 3)


def test_a_linear_that_can_be_quantized():
    found = plan(lambda self, x: self.b(self.a(self.a(x))))
    assert set(found) == {"a", "b"}
    a = found["a"]
    assert (a.kind, a.shape, a.constant, a.calls) == ("linear", (32, 32), "a.weight", 2)
    assert (a.weight, a.input, a.reason, a.requested) == (ROTATED_WEIGHT, ROTATED_TOKEN, "", True)
    assert a.float_bytes == 32 * 32 * 4
    assert found["b"].calls == 1


@pytest.mark.parametrize("head", ["lm_head", "embed_out", "anything"])
@pytest.mark.parametrize("tied", [True, False])
def test_projections_onto_the_vocabulary(tied, head):
    found = plan(Language(tied, head).eval(), IDS)
    is_head = tied or head != "anything"
    assert found[head].kind == ("lm_head" if is_head else "linear")
    assert (found[head].weight is None) == is_head
    assert found[head].requested == (not is_head)
    if is_head:
        assert "lm_head='float'" in found[head].reason
    chosen = plan(Language(tied, head).eval(), IDS, recipe=W8A8.replace(lm_head="int8"))
    assert chosen[head].weight == (INT8_WEIGHT if is_head else ROTATED_WEIGHT)  # tables and their ties are not rotated


def test_a_layer_whose_features_do_not_divide_into_blocks_is_not_rotated():
    found = plan(nn.Sequential(nn.Linear(40, 48), nn.Linear(48, 40)), randn(3, 40))
    assert [(p.weight.rotated, p.input.rotated) for p in found.values()] == [(False, False), (True, True)]


def test_embeddings():
    found = plan(Language().eval(), IDS)
    assert found["table"].kind == "embedding" and found["table"].weight is None
    assert "embedding='float'" in found["table"].reason
    chosen = plan(Language().eval(), IDS, recipe=W8A8.replace(embedding="int8"))["table"]
    assert (chosen.weight, chosen.input, chosen.requested) == (INT8_WEIGHT, None, True)
    left = W8A8.replace(embedding="int8").with_rules(QRule.leave_float("table", "small"))
    kept = plan(Language().eval(), IDS, recipe=left)["table"]
    assert (kept.weight, kept.reason, kept.requested) == (None, "small", False)


class One(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.written = forward

    def forward(self, *xs):
        return self.written(self, *xs)


LEFT = {
    "a convolution": (One(lambda s, x: s.conv(x), conv=nn.Conv1d(3, 3, 3)), "conv", "conv", "convolutions", False),
    "few features": (nn.Sequential(nn.Linear(32, 8)), "0", "linear", "INT8 does not pay under 16", False),
    "float64": (One(lambda s, x: s.l(x.double()), l=nn.Linear(32, 32).double()), "l", "linear", "float64", True),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_stays_in_float_says_why(case):
    model, name, kind, reason, requested = LEFT[case]
    layer = plan(model)[name]
    assert layer.kind == kind and layer.weight is None and reason in layer.reason
    assert layer.requested == requested


def test_weights_at_run_time_and_constants_of_other_shapes():
    found = plan(lambda self, x: nn.functional.linear(x, x * 2))
    assert [(p.kind, p.reason) for p in found.values()] == [("linear", "the weight is computed at run time")]
    found = plan(lambda self, x: torch.bmm(x.view(1, 3, 32), self.matrix.view(1, 32, 64)))
    assert found["matrix"].kind == "matmul" and found["matrix"].reason == "expert weights in bmm: no INT8 form here"


def test_too_many_features_for_an_int32_sum():
    wide = nn.Linear(MAX_K + 1, 16, bias=False)
    layer = plan(nn.Sequential(wide), torch.ones(1, MAX_K + 1))["0"]
    assert layer.weight is None and "overflow" in layer.reason and layer.requested


def test_rules_decide_and_layers_without_a_rule_stay():
    recipe = W8A8.replace(rules=(QRule("a"),))
    found = plan(lambda self, x: self.b(self.a(x)), recipe=recipe)
    assert found["a"].weight is not None
    assert found["b"].weight is None and found["b"].reason == "no rule of recipe w8a8 names it"
    assert not found["b"].requested
    with pytest.raises(RecipeError, match=r"'z' matches no layer.*optional=True.*layers here: a, b"):
        plan(lambda self, x: self.b(self.a(x)), recipe=W8A8.replace(rules=(QRule("z"),)))


def test_one_call_that_cannot_keeps_the_shared_layer_in_float():
    def forward(self, x):
        return self.a(x), nn.functional.linear(x.double(), self.a.weight.double())

    assert plan(forward)["a"].weight is not None

    def mixed(self, x):
        return self.a(x) + nn.functional.linear(self.a(x), self.a.weight)

    assert plan(mixed)["a"].calls == 3


@pytest.mark.parametrize("change", [lambda w: w.mul_(2), lambda w: w.t().add_(1), lambda w: w[0].zero_()])
def test_a_weight_that_the_graph_changes_stays_in_float(change):
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", randn(32, 32))

        def forward(self, x):
            y = nn.functional.linear(x, self.weight)
            change(self.weight)
            return y

    (layer,) = plan(Drifting().eval()).values()
    assert layer.weight is None and layer.reason == "the graph changes its weight in place"
