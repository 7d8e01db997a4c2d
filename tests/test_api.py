"""`quantize` from the outside: inputs of every form, outputs of the model's own type, notes, strictness, memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.programs import Block, randn
from tests.tiny_models import build
from tests.tolerances import ROUNDING_DB, W8A8_DB
from zq_compiler import QRule, RecipeError, StrictError, WeightError, load, load_recipe, quantize
from zq_compiler.numerics import sqnr

ROOT = Path(__file__).parents[1]
X = randn(3, 32)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x, mask=None):
        return self.layer(x) if mask is None else self.layer(x) * mask


@pytest.mark.parametrize(
    ("inputs", "kwargs"),
    [(X, None), ((X,), {}), ([X], None), ({"x": X}, None), ((), {"x": X}), (X, {"mask": X}), ({"x": X}, {"mask": X})],
)
def test_inputs_of_every_form(inputs, kwargs):
    model = Masked().eval()
    q = quantize(model, inputs, kwargs)
    with_mask = {"mask": X} if kwargs and "mask" in kwargs else {}
    assert sqnr(model(X, **with_mask), q(X, **with_mask)) > W8A8_DB
    assert q.report().counts == {"int8": 1}


def test_other_sizes_than_the_example_run():
    model, q = mlp(), quantize(mlp(), X)
    for rows in (0, 1, 9):
        x = randn(rows, 32, seed=rows)
        assert q(x).shape == (rows, 32)
        assert rows == 0 or sqnr(model(x), q(x)) > W8A8_DB


def test_outputs_are_of_the_models_own_type():
    model, inputs = build("bert")
    q = quantize(model, inputs)
    with torch.no_grad():
        want, got = model(**inputs), q(**inputs)
    assert type(got) is type(want) and got.keys() == want.keys()
    assert sqnr(want.last_hidden_state, got.last_hidden_state) > 20
    assert not got.last_hidden_state.requires_grad


def test_an_exported_program_is_accepted_with_its_own_inputs():
    model = mlp()
    q = quantize(torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), check=True)
    assert torch.equal(q(randn(5, 32)), quantize(model, X)(randn(5, 32)))


def test_compiled_models_agree_with_the_oracle_and_notice_changed_weights():
    model = Block(lambda self, x: self.a(self.norm(x)))
    q = quantize(model.eval(), X)
    fast = q.compile()
    assert sqnr(q(X), fast(X)) > ROUNDING_DB
    assert {choice["op"] for choice in q.report().providers} == {"int8_linear", "layer_norm_quantize"}
    q.program.gm.norm.weight.mul_(2)
    with pytest.raises(WeightError, match=r"norm\.weight: the weight changed"):
        fast(X)


def test_a_compiled_model_may_change_its_own_state():
    def counting(self, x):
        self.state.add_(1)
        return self.a(x) + self.state

    fast = quantize(Block(counting).eval(), X).compile()
    assert torch.allclose(fast(X) + 1, fast(X), atol=1e-5)


def test_calibration_data_is_noted_as_not_needed():
    notes = quantize(mlp(), X, calibration=[X]).report().notes
    assert any("calibration data was not needed" in note and "w8a8" in note for note in notes)
    assert not any("calibration" in note for note in quantize(mlp(), X).report().notes)


def test_strict():
    class RunTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Linear(32, 32).double()

        def forward(self, x):
            return self.wide(x.double())

    quantize(mlp(), X, strict=True)
    with pytest.raises(StrictError, match=r"^wide: 1 of the layers .*float64"):
        quantize(RunTime().eval(), X, strict=True)
    assert quantize(RunTime().eval(), X).report().counts == {"float": 1}
    quantize(RunTime().eval(), X, strict=True, recipe="float")


def test_recipes_choose_layers_and_typos_are_errors():
    recipe = load_recipe("w8a8").with_rules(QRule.leave_float("0", "the first is sensitive"))
    report = quantize(mlp(), X, recipe=recipe).report()
    assert [(r.name, r.got, r.reason) for r in report.layers] == [
        ("0", "float", "the first is sensitive"),
        ("2", "int8", ""),
    ]
    with pytest.raises(RecipeError, match=r"'encodr' matches no layer.*layers here: 0, 2"):
        quantize(mlp(), X, recipe=load_recipe("w8a8").with_rules(QRule.leave_float("encodr")))


def test_check_and_dump(tmp_path):
    q = quantize(mlp(), X, check=True, dump=str(tmp_path))
    assert {p.name: p.sqnr is not None for p in q.program.history}.keys() == {p.name for p in q.program.history}
    assert all(p.sqnr is not None for p in q.program.history)
    assert len(list(tmp_path.iterdir())) == len(q.program.history) + 1


def test_saved_models_come_back(tmp_path):
    q = quantize(mlp(), X)
    q.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(X), q(X))


MEMORY = """
import ctypes, gc, os, torch, zq_compiler
from torch import nn

def resident():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is nobody's
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

zq_compiler.quantize(nn.Linear(32, 32).eval(), torch.randn(2, 32))  # what is imported late is not the model's
sizes = [(2048, 1024), (1024, 2048)]
layers = [nn.Linear(k, n) for n, k in sizes for _ in range(12)]
layers = [x for pair in zip(layers[:12], layers[12:]) for x in pair]
model = nn.Sequential(*layers).eval()
floats = sum(p.numel() * 4 for p in model.parameters())
before = resident()
q = zq_compiler.quantize(model, torch.randn(2, 1024))
del model, layers
gc.collect()
freed = before - resident()
left = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.is_floating_point()
        and t.device.type == "cpu" and t.untyped_storage().size() >= 2048 * 1024 * 4]
assert len(q.program.plan) == 24 and q.report().counts == {"int8": 24}
assert not left, [t.shape for t in left]
assert 190e6 < floats < 210e6, floats
assert freed > 0.6 * floats, (freed, floats)  # a quarter stays, as integers
"""


def test_no_float_copy_of_the_weights_stays_alive():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
