"""Layers ranked by what each alone does: against quantizing that one layer for real, with a planted culprit."""

import gc
import math

import pytest
import tiny_models
import torch

import zq_compiler as zq
from tests.programs import Block, randn
from zq_compiler.analysis.simulation import Noise, Simulation, first_floats
from zq_compiler.numerics import sqnr

X = randn(6, 5, 32)


def mlp(culprit=None):
    """Three linears with norms between them; the input of one of them has an outlier feature."""
    block = Block(lambda self, x: self.c(self.norm2(self.b(self.norm(self.a(x))))))
    if culprit == "b":
        with torch.no_grad():
            block.norm.weight[3] *= 300
            block.b.weight[:, 3] = 0
    return block.eval()


def test_the_planted_culprit_comes_first():
    rows = zq.sensitivity(mlp("b"), [X], "w8a8-plain")
    assert rows[0].layer == "b" and {row.layer for row in rows} == {"a", "b", "c"}
    assert rows[0].sqnr < rows[1].sqnr - 15
    assert zq.sensitivity(mlp(), [X], "w8a8-plain")[0].sqnr > rows[0].sqnr + 15
    assert "int8 per_channel static x int8 per_token dynamic" in str(rows[0])


@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_a_layers_sqnr_is_that_of_quantizing_it_alone(layer):
    model = mlp()
    others = "|".join({"a", "b", "c"} - {layer})
    q = zq.quantize(model, X, recipe=zq.load_recipe("w8a8").with_rules(zq.QRule.leave_float(f"({others})$")))
    with torch.no_grad():
        want = sqnr(model(X), q(X))
    (row,) = [row for row in zq.sensitivity(model, [X], "w8a8") if row.layer == layer]
    assert row.sqnr == pytest.approx(want, abs=0.01)


def test_noise_adds_up_over_batches():
    model = mlp()
    y, z = randn(2, 5, 32, seed=1), 10 * randn(4, 5, 32, seed=2)
    rows = {row.layer: row.sqnr for row in zq.sensitivity(model, (batch for batch in [y, z]), "w8a8")}
    simulation = Simulation(model, [y], "w8a8")
    trial = simulation.as_model(simulation.trial(only={"b"}))
    with torch.no_grad():
        pairs = [(model(x), trial(x)) for x in (y, z)]
    signal = sum(a.double().square().sum() for a, _ in pairs)
    noise = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    assert rows["b"] == pytest.approx(10 * math.log10(signal / noise), abs=0.01)


def test_work_is_multiply_accumulates():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.up, self.down = torch.nn.Embedding(9, 32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, ids):
            return self.down(self.up(self.table(ids)))

    recipe = zq.load_recipe("w8a8").replace(embedding="int8")
    ids = torch.randint(9, (2, 7))
    rows = {row.layer: row for row in zq.sensitivity(Model().eval(), [ids], recipe)}
    tokens, total = 14, 14 * (32 + 2 * 32 * 64)
    assert rows["up"].work == rows["down"].work == tokens * 32 * 64 / total
    assert rows["table"].work == tokens * 32 / total


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_trial_of_all_layers_is_the_quantized_model(family):
    model, inputs = tiny_models.build(family)
    simulation = Simulation(model, [inputs], "hero-m3")
    trial = simulation.as_model(simulation.trial())
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    index = "last_hidden_state" if family == "bert" else "logits"
    assert sqnr(q(**inputs)[index], trial(**inputs)[index]) > 60
    work = simulation.work()
    attention = next(name for name, plan in simulation.plan.items() if plan.kind == "attention")
    batch, tokens = inputs["input_ids"].shape
    heads, width = simulation.plan[attention].shape
    assert work[attention] == 2 * batch * heads * tokens * tokens * width


def test_a_quantized_model_asks_for_its_float_model():
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    rows = q.sensitivity([inputs])
    assert rows == zq.sensitivity(model, [inputs], "hero-m3", calibration=q.statistics)
    assert [row.sqnr for row in rows] == sorted(row.sqnr for row in rows)
    assert {row.layer for row in rows} == {row.name for row in q.report().layers}
    del model
    gc.collect()
    with pytest.raises(zq.ZQError, match=r"is gone.*zq_compiler\.sensitivity"):
        q.sensitivity([inputs])


def test_bad_data():
    model = mlp()
    for batches, message in (
        ([], "is empty"),
        (lambda model: model(X), "forward_loop gives no example"),
        ([X, X.double()], "batch 1"),
    ):
        with pytest.raises(zq.CalibrationError, match=message):
            zq.sensitivity(model, batches, "w8a8")
    with pytest.raises(zq.CaptureError, match="training mode"):
        zq.sensitivity(mlp().train(), [X], "w8a8")
    model, other = (Block(lambda self, x: self.down(torch.nn.functional.gelu(self.up(x)))).eval() for _ in range(2))
    with torch.no_grad():
        other.down.weight.add_(1)
    statistics = zq.quantize(other, X, recipe="hero-m3", calibration=[X]).statistics
    with pytest.raises(zq.CalibrationError, match="another model"):
        zq.sensitivity(model, [X], "hero-m3", calibration=statistics)


def test_noise():
    noise = Noise()
    assert Noise(1.0, 0.0).sqnr == math.inf
    noise.add(torch.tensor([3.0, -torch.inf, 4.0]), torch.tensor([3.0, 0.0, 3.5]))
    assert (noise.signal, noise.noise) == (25.0, 0.25) and noise.sqnr == pytest.approx(20.0)
    outputs = (torch.ones(2, dtype=torch.int64), torch.tensor(1.0), None, torch.ones(3))
    assert first_floats(outputs) == 3
    with pytest.raises(zq.ZQError, match="no output of floats"):
        first_floats(outputs[:3])


class Stateful(torch.nn.Module):
    """Writes a buffer, or its own input, at each call; `pure` computes what its first call does."""

    def __init__(self, writes):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.writes = writes
        self.register_buffer("state", torch.zeros(32))

    def forward(self, x):
        if self.writes == "state":
            self.state.add_(x.mean((0, 1)) * 3)
            return self.b(torch.relu(self.a(x + self.state)))
        if self.writes == "input":
            x.mul_(2)
            return self.b(torch.relu(self.a(x)))
        shifted = 2 * x if self.writes == "not input" else x + x.mean((0, 1)) * 3
        return self.b(torch.relu(self.a(shifted)))


@pytest.mark.parametrize("writes", ["state", "input"])
def test_what_a_model_writes_does_not_reach_the_next_trial(writes):
    model = Stateful(writes).eval()
    rows = zq.sensitivity(model, [X.clone()], "w8a8")
    pure = zq.sensitivity(Stateful(f"not {writes}").eval(), [X.clone()], "w8a8")
    assert [(r.layer, round(r.sqnr, 1)) for r in rows] == [(r.layer, round(r.sqnr, 1)) for r in pure]
    scores = []

    def metric(candidate):
        scores.append(candidate(X.clone()).abs().mean().item())
        return scores[-1]

    zq.search(model, [X.clone()], metric=metric, budget=100.0, recipe="w8a8")
    assert scores[0] == pytest.approx(scores[1], rel=0.05)  # the float model, and the first trial
    assert not model.state.any()


def test_statistics_may_be_a_file(tmp_path):
    model = Block(lambda self, x: self.down(torch.nn.functional.gelu(self.up(x)))).eval()
    q = zq.quantize(model, X, recipe="hero-m3", calibration=[X])
    q.statistics.save(tmp_path / "ranges.safetensors")
    rows = zq.sensitivity(model, [X], "hero-m3", calibration=tmp_path / "ranges.safetensors")
    assert rows == zq.sensitivity(model, [X], "hero-m3", calibration=q.statistics)


def test_noise_that_is_not_finite_is_the_worst():
    noise = Noise()
    noise.add(torch.ones(2), torch.tensor([1.0, torch.nan]))
    assert noise.sqnr == -math.inf and Noise(0.0, 1.0).sqnr == -math.inf
