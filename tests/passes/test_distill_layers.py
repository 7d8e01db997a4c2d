"""LKD: every transformer layer gets closer to the float one on the float model's own activations, or stays."""

import itertools

import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, dialect, encoder, randn
from zq_compiler import CalibrationError, RecipeError
from zq_compiler.capture import capture_module
from zq_compiler.methods import LKD
from zq_compiler.numerics import dequantize_weight, sqnr
from zq_compiler.passes.distill_layers import transformer_layers
from zq_compiler.program import constants
from zq_compiler.weights import quantized_weights


class Model(nn.Module):
    """Two transformer layers over a table of 50 tokens, and a head that is in none."""

    def __init__(self, norm_first=True):
        super().__init__()
        torch.manual_seed(0)
        options = {"batch_first": True, "norm_first": norm_first, "activation": "gelu"}
        self.embedding = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64, **options) for _ in range(2))
        self.head = nn.Linear(32, 16)

    def forward(self, tokens):
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


DATA = [torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def recipe(name, **settings):
    return zq.load_recipe(name).replace(lkd=LKD(**{"steps": 100, "learning_rate": 0.003, **settings}))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", ["w3a16-g64", "w4a16-g64", "w4a16-g64-asym", "w8a8", "fp8", "hero-m2"])
def test_each_layers_error_falls(name, norm_first):
    model = Model(norm_first).eval()
    q = zq.quantize(model, (DATA[0],), recipe=recipe(f"{name}+lkd"), calibration=DATA)
    assert [row.layer for row in q.program.refinements] == ["layers.0", "layers.1", "head"]
    assert all(row.after < row.before for row in q.program.refinements)
    plain = zq.quantize(model, (DATA[0],), recipe=name, calibration=DATA)
    if "a16" in name:  # weights alone: their error is all there is, and it falls
        with torch.no_grad():
            want = torch.cat([model(x) for x in DATA])
            assert sqnr(want, torch.cat([q(x) for x in DATA])) > sqnr(want, torch.cat([plain(x) for x in DATA]))
    assert dialect(q.program) == dialect(plain.program)
    scales = [{n: t for n, t in constants(p.gm) if n.endswith("weight_scale")} for p in (q.program, plain.program)]
    assert scales[0].keys() == scales[1].keys() and all(torch.equal(scales[0][n], scales[1][n]) for n in scales[0])


class Residual(nn.Module):
    """An MLP whose activation and residual add may write in place, as many models' do."""

    def __init__(self, in_place):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.in_place = in_place

    def forward(self, x):
        h = self.up(self.norm(x))
        if not self.in_place:
            return x + self.down(h.relu())
        x += self.down(h.relu_())
        return x


class Residuals(Model):
    def __init__(self, in_place):
        super().__init__()
        self.layers = nn.ModuleList(Residual(in_place) for _ in range(2))


@pytest.mark.parametrize("name", ["w3a16-g64", "w8a8"])
def test_writing_in_place_changes_nothing(name):
    inputs, outputs, rows = DATA, [], []
    for in_place in (False, True):
        model = Residuals(in_place).eval()
        q = zq.quantize(model, (inputs[0],), recipe=recipe(f"{name}+lkd", steps=20), calibration=inputs)
        rows.append([(row.layer, row.before, row.after) for row in q.program.refinements])
        outputs.append(q(inputs[0]))
    assert rows[0] == rows[1] and torch.equal(*outputs)
    assert all(after < before for _, before, after in rows[0])


def test_batches_of_a_step_are_added_up_in_float32(monkeypatch):
    """Sixteen parts of one gradient are that gradient; bfloat16 cannot hold fifteen of them."""
    gradients = []
    step = torch.optim.AdamW.step

    def recorded(optimizer):
        gradients[-1].extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    model, same = Model().eval().bfloat16(), [DATA[0]] * 16
    for batch in (1, 16):
        gradients.append([])
        name = recipe("w3a16-g64+lkd", batch=batch, steps=1)
        zq.quantize(model, (same[0],), recipe=name, calibration=same)
    assert len(gradients[0]) > 4 and all(map(torch.equal, *gradients))


def test_the_objective_is_the_layers_own_error_on_the_float_models_input():
    model = Model().eval()
    q = zq.quantize(model, (DATA[0],), recipe=recipe("w3a16-g64+lkd"), calibration=DATA)
    captured_model = Model().eval()
    with torch.no_grad():
        for name, constant in constants(q.program.gm):
            if name.startswith("layers.1.") and name.endswith("weight_q"):
                weight = captured_model.get_parameter(name.removesuffix("_q"))
                scale = dict(constants(q.program.gm))[name.replace("_q", "_scale")]
                weight.copy_(dequantize_weight(constant, scale, "int3", 64, weight.shape[1]))
        errors = sizes = 0.0
        for x in DATA:
            h = model.layers[0](model.embedding(x))
            want, given = model.layers[1](h), captured_model.layers[1](h)
            errors, sizes = errors + (want - given).square().sum(), sizes + want.square().sum()
    row = q.program.refinements[1]
    assert row.layer == "layers.1" and row.after == pytest.approx(float(errors / sizes), rel=1e-3)


def test_a_layer_that_training_would_leave_worse_is_left_alone():
    model = Model().eval()
    q = zq.quantize(model, (DATA[0],), recipe=recipe("w4a16-g64+lkd", learning_rate=30.0, steps=2), calibration=DATA)
    plain = zq.quantize(model, (DATA[0],), recipe="w4a16-g64")
    assert changes(q.program, "lkd") == 0
    assert all(row.after == row.before for row in q.program.refinements)
    assert torch.equal(q(DATA[0]), plain(DATA[0]))


def test_a_seed_makes_it_deterministic():
    model = Model().eval()
    first, again, other = (
        zq.quantize(model, (DATA[0],), recipe=recipe("w3a16-g64+lkd", seed=seed), calibration=DATA)(DATA[0])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_random_tokens_teach_too():
    model = Model().eval()
    q = zq.quantize(model, (DATA[0],), recipe=recipe("w3a16-g64+lkd", data="random"), calibration=DATA)
    taught = zq.quantize(model, (DATA[0],), recipe=recipe("w3a16-g64+lkd"), calibration=DATA)
    plain = zq.quantize(model, (DATA[0],), recipe="w3a16-g64")
    with torch.no_grad():
        want = torch.cat([model(x) for x in DATA])
        by_random, by_data, by_none = (sqnr(want, torch.cat([m(x) for x in DATA])) for m in (q, taught, plain))
    assert by_data > by_random > by_none
    with pytest.raises(CalibrationError, match="needs a model that looks up tokens"):
        zq.quantize(
            nn.Linear(32, 32).eval(),
            (randn(2, 32),),
            recipe=recipe("w8a8+lkd", data="random"),
            calibration=[randn(2, 32)],
        )


def test_layers_are_stretches_of_the_graph():
    program = capture_module(Model().eval(), (DATA[0],), {}, zq.load_recipe("w4a16-g64+lkd"), None)
    program.calibration = DATA
    after(program, "insert_qdq")
    layers = transformer_layers(program, list(quantized_weights(program, lambda plan: True)))
    assert [layer.name for layer in layers] == ["layers.0", "layers.1", "head"]
    assert [len(layer.weights) for layer in layers] == [4, 4, 1]
    for layer in layers:
        nodes = layer.nodes()
        assert all(linear in nodes for weight in layer.weights for linear in weight.linears)
    for before, behind in itertools.pairwise(layers):
        assert not set(before.nodes()) & set(behind.nodes())
    final = [n for n in layers[0].nodes() if n.target is torch.ops.aten.add.Tensor][-1]
    assert any(user in layers[1].nodes() for user in final.users)  # the residual's sum is the first layer's output


def test_a_weight_shared_by_all_layers_is_trained_for_all():
    block = Block(lambda self, x: encoder(self, encoder(self, x)))
    program = captured(block, randn(2, 8, 32), recipe=recipe("w3a16-g64+lkd"))
    after(program, check=True)
    assert len(program.refinements) == 1 and program.refinements[0].after < program.refinements[0].before


def test_settings():
    for wrong in ({"steps": 0}, {"batch": 0}, {"learning_rate": -1}, {"data": "noise"}, {"seed": -1}, {"epochs": 1}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            LKD.from_dict(wrong)
    with pytest.raises(RecipeError, match="lkd=5"):
        zq.load_recipe("w8a8").replace(lkd=5)
    chosen = zq.load_recipe("w8a8+lkd").replace(lkd=LKD(steps=7))
    assert zq.Recipe.from_dict(chosen.to_dict()).lkd.steps == 7
