"""GPTQ beside an implementation that inverts the Hessian of what is left at every step, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, decoder, dialect, randn, run
from zq_compiler import QRule, QScheme, RecipeError
from zq_compiler.formats import FORMATS
from zq_compiler.methods import GPTQ
from zq_compiler.numerics import (
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_weight,
    rotate,
    scales_and_zeros,
    sqnr,
)
from zq_compiler.passes.gptq import gptq, output_error, second_moment
from zq_compiler.program import constants
from zq_compiler.weights import Grid

FORMATS_AND_GROUPS = [
    ("int4_asym", 16),
    ("int2_asym", 0),
    ("int8", 0),
    ("int4", 16),
    ("int4", 0),
    ("int3", 32),
    ("fp6_e3m2", 0),
    ("fp4_e2m1", 16),
]


def problem(n=12, k=40, rows=200, seed=0):
    """A weight and correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5 + torch.eye(k) / 2
    return torch.randn(n, k, generator=g), torch.randn(rows, k, generator=g) @ mix


def grid_of(w, format, group):
    scale, zero = scales_and_zeros(quantize_weight(w, format, group)[1].float(), format)
    return Grid(FORMATS[format], scale, group, False, zero)


def optimal_brain_quantizer(w, hessian, grid, damping, order):
    """Each column in turn: round it, and spread its error by the inverse of the Hessian of what is left."""
    w, h = w.double().numpy().copy(), hessian.numpy().copy()
    h[np.diag_indices_from(h)] += damping * np.diag(h).mean()
    result = np.zeros_like(w)
    left = list(order)
    while left:
        j = left[0]
        column = torch.from_numpy(w[:, j : j + 1]).float()
        result[:, j] = grid.nearest(column, torch.tensor([j]))[:, 0].numpy()
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        w[:, left] -= np.outer(w[:, j] - result[:, j], inverse[0] / inverse[0, 0])
        left = left[1:]
    return torch.from_numpy(result).float()


@pytest.mark.parametrize(("format", "group"), FORMATS_AND_GROUPS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_it_agrees_with_an_independent_implementation(format, group, act_order, block):
    w, x = problem()
    hessian, grid = second_moment(x), grid_of(w, format, group)
    values, damping = gptq(w, hessian, grid, GPTQ(damping=0.01, block=block, act_order=act_order))
    energy = hessian.diagonal()
    order = torch.argsort(energy, descending=True, stable=True).tolist() if act_order else range(w.shape[1])
    assert damping == 0.01
    assert torch.equal(values, optimal_brain_quantizer(w, hessian, grid, 0.01, order))
    assert torch.equal(values, grid.values(grid.codes(values)))  # on the grid


def test_the_second_moment_and_the_error_it_gives():
    w, x = problem()
    hessian = second_moment(x[:150].reshape(10, 15, -1)) + second_moment(x[150:])
    torch.testing.assert_close(hessian, x.double().t() @ x.double(), rtol=1e-5, atol=1e-3)
    want = (x.double() @ w.double().t()).square().sum()
    assert output_error(w, hessian) == pytest.approx(float(want), rel=1e-5)


def test_a_feature_that_is_always_zero_is_rounded_by_itself():
    w, x = problem()
    x[:, 3] = 0
    grid = grid_of(w, "int4", 0)
    values, damping = gptq(w, second_moment(x), grid, GPTQ())
    assert damping == 0.01
    assert torch.equal(values[:, 3:4], grid.nearest(w[:, 3:4], torch.tensor([3])))


def test_damping_grows_until_there_is_a_factor():
    w, _ = problem(k=4)
    grid = grid_of(w, "int4", 0)
    values, damping = gptq(w, torch.eye(4, dtype=torch.float64) - 1.001 * torch.ones(4, 4) / 4, grid, GPTQ(damping=0.0))
    assert values is not None and 0 < damping <= 1
    broken = -torch.eye(4, dtype=torch.float64)
    assert gptq(w, broken * 9, grid, GPTQ())[0] is None


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


RECIPES = ["w4a16-g64", "w3a16-g64", "fp6", "w8a8", "w8a8-plain", "fp8", "hero-m3", "w4a8", "w4a8-fp-m2", "w4a4"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_weight_does_less_harm_to_what_it_reads(recipe):
    x = randn(4, 24, 32)
    block = Block(decoder)
    program = after(captured(block, x, recipe=f"{recipe}+gptq"), check=True)
    assert [row.layer for row in program.refinements] == ["a", "b", "c", "out", "gate", "up", "down"]
    assert all(row.after < row.before < 0.1 for row in program.refinements)
    assert changes(program, "gptq") == 7
    assert dialect(program) == dialect(after(captured(block, x, recipe=recipe)))  # the fusions take it as they did


def test_scales_stay_and_codes_move():
    x = randn(6, 32)
    block = Block(lambda self, x: self.a(x))
    stored = [dict(constants(after(captured(block, x, recipe=f"w4a16-g64{suffix}")).gm)) for suffix in ("", "+gptq")]
    assert torch.equal(stored[0]["a.weight_scale"], stored[1]["a.weight_scale"])
    assert not torch.equal(stored[0]["a.weight_q"], stored[1]["a.weight_q"])


def test_the_grid_of_a_rotated_weight_is_that_of_the_rotated_weight():
    x = randn(200, 32)
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, x, recipe="w8a8+gptq"))
    w = rotate(block.a.weight.detach())
    q, scale = quantize_per_channel(w)
    grid = Grid(FORMATS["int8"], scale, 0, True)
    read = dequantize(*quantize_per_token(x, True))  # what the layer reads, where it is rotated
    values, _ = gptq(w, second_moment(read), grid, GPTQ())
    got = dict(constants(program.gm))["a.weight_q"]
    agree = (got == grid.codes(values).view(torch.int8)).float().mean()
    assert agree > 0.999 > (got == q).float().mean()  # the Hessian is rotated instead of the rows


def test_later_layers_read_what_earlier_ones_give_now():
    """The objective of the second layer is taken on the first one's quantized output."""
    x = randn(64, 32)
    block = Block(lambda self, x: self.b(self.a(x).relu()))
    program = after(captured(block, x, recipe="w3a16-g64+gptq"))
    stored = dict(constants(program.gm))
    a, b = (dequantize_weight(stored[f"{n}.weight_q"], stored[f"{n}.weight_scale"], "int3", 64, 32) for n in ("a", "b"))
    with torch.no_grad():
        read = nn.functional.linear(x, a, block.a.bias).relu()
        error = (read @ (b - block.b.weight).t()).square().sum() / (read @ block.b.weight.t()).square().sum()
    assert program.refinements[1].after == pytest.approx(float(error), rel=1e-4)


def test_a_weight_that_several_calls_read_is_chosen_for_all_of_them():
    x = randn(64, 32)
    block = Block(lambda self, x: self.a(self.a(x).relu()))
    program = after(captured(block, x, recipe="w4a16-g64+gptq"), check=True)
    assert [row.layer for row in program.refinements] == ["a"]
    stored = dict(constants(program.gm))
    assert {name for name in stored if name.startswith("a.weight")} == {"a.weight_q", "a.weight_scale"}


def test_views_of_one_weight_are_chosen_apart():
    def forward(self, x):
        w = self.a.weight
        return nn.functional.linear(x, w), nn.functional.linear(x, w[:16])

    program = after(captured(forward, randn(64, 32), recipe="w4a16-g64+gptq"), check=True)
    assert len(program.refinements) == 2
    names = {name for name, _ in constants(program.gm)}
    assert names == {f"a.weight{view}_{part}" for view in ("", "_view1") for part in ("q", "scale")}


def test_data_that_leaves_it_no_room_leaves_the_weight():
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, torch.zeros(4, 32), recipe="w4a16-g64+gptq"))
    plain = after(captured(block, torch.zeros(4, 32), recipe="w4a16-g64"))
    assert changes(program, "gptq") == 0
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(constants(program.gm), constants(plain.gm), strict=True))


def test_both_doors_choose_the_same_codes_and_a_second_graph_does_not_choose_again(monkeypatch):
    model = MLP().eval()
    data = [randn(8, 64, seed=i) for i in range(4)]
    q = zq.quantize(model, (data[0],), recipe="w4a16-g64+gptq", calibration=data)
    options = {"recipe": "w4a16-g64+gptq", "calibration": [{"x": x} for x in data], "lowering": "eager"}
    compiled = torch.compile(model, backend="zeroquant", options=options, dynamic=False)
    with torch.no_grad():
        assert sqnr(q(data[0]), compiled(data[0])) > 100
        calls = []
        monkeypatch.setattr("zq_compiler.passes.gptq.gptq", lambda *a: calls.append(a))
        compiled(randn(3, 64))  # another size, another graph
    assert not calls


def test_saved_and_reloaded_it_is_the_same(tmp_path):
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    x = randn(16, 64)
    q = zq.quantize(model, (x,), recipe="w4a16-g64+gptq", calibration=[x])
    q.save(tmp_path / "saved")
    assert torch.equal(zq.load(tmp_path / "saved")(x), q(x))


def test_recipes_name_it():
    recipe = zq.load_recipe("w4a16-g64+clip+gptq+lorc4")
    assert recipe.rules[0].methods == ("clip", "gptq") and recipe.rules[0].lorc_rank == 4 and recipe.needs_data
    assert zq.Recipe.from_dict(recipe.to_dict()) == recipe
    assert not zq.load_recipe("w4a16-g64+clip").needs_data
    int4 = QScheme("int4", "per_group", 16)
    for wrong in ({"methods": ("gtpq",)}, {"weight": None, "input": None, "methods": ("gptq",)}):
        with pytest.raises(RecipeError, match=r"gtpq|no quantized weight"):
            QRule("a", **{"weight": int4, "input": None, **wrong})
    for settings in ({"damping": -1}, {"block": 0}, {"block": 1.5}, {"act_order": 1}, {"bits": 4}):
        with pytest.raises(RecipeError, match=next(iter(settings))):
            GPTQ.from_dict(settings)
    with pytest.raises(RecipeError, match="quantizes no weight"):
        zq.load_recipe("float+gptq")


def projects_a_table(self, x):
    """As DeBERTa projects its table of relative positions."""
    positions = self.norm(self.matrix[:, :32])
    return self.out(torch.relu(self.a(x) @ self.b(positions).t() @ positions))


@pytest.mark.parametrize("recipe", ["w3a16-g64+gptq", "w3a16-g64+bias", "w3a16-g64+lkd", "w3a16-g64+gptq+lkd+bias"])
def test_layers_that_read_constants_are_improved_too(recipe):
    x = randn(24, 32)
    program = after(captured(projects_a_table, x, recipe=recipe), check=True)
    rows = {(row.layer, row.method): row for row in program.refinements}
    assert {layer for layer, _ in rows} >= {"a", "b", "out"}
    first = recipe.split("+")[1]
    assert all(row.after < row.before for (_, method), row in rows.items() if first in method.lower())
    assert all(row.after <= row.before for row in rows.values())
    want = run(captured(projects_a_table, x), x)[0]
    plain = run(after(captured(projects_a_table, x, recipe="w3a16-g64")), x)[0]
    if "bias" not in recipe:
        assert sqnr(want, run(program, x)[0]) > sqnr(want, plain)


def test_a_weight_called_with_data_and_with_a_constant_is_chosen_for_both():
    def forward(self, x):
        return self.a(x) @ self.a(self.matrix[:, :32]).t()

    x = randn(24, 32)
    for method in ("gptq", "lkd"):
        program = after(captured(forward, x, recipe=f"w3a16-g64+{method}"), check=True)
        assert program.refinements[0].after < program.refinements[0].before


def test_of_one_row_without_a_batch():
    program = after(captured(lambda self, x: self.a(x.mean(0)), randn(4, 32), recipe="w3a16-g64+gptq"), check=True)
    assert program.refinements[0].after < program.refinements[0].before


def test_each_layers_sensitivity_is_that_of_choosing_it_alone():
    """What GPTQ chooses for a layer follows from those in front of it: trials must not share it."""
    from zq_compiler.analysis.simulation import Simulation

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = [randn(32, 64)]
    simulation = Simulation(model, data, "w2a16-g64-asym+gptq")
    simulation.trial()
    alone = simulation.trial(only={"2"}).gm(*data)
    fresh = Simulation(model, data, "w2a16-g64-asym+gptq").trial(only={"2"}).gm(*data)
    assert torch.equal(alone[0], fresh[0])
