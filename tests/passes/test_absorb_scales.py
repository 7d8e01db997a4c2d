"""Feature-wise scales go into the weight while it is float; the integers are those of the product."""

import pytest
import torch
from torch import nn

from tests.programs import Block, after, captured, changes, dialect, randn, run
from tests.tolerances import W8A8_DB
from zq_compiler import QRule, load_recipe
from zq_compiler.kernels import quantize_static
from zq_compiler.numerics import quantize_per_channel, sqnr
from zq_compiler.passes.absorb_scales import AbsorbScales
from zq_compiler.program import constants
from zq_compiler.schemes import INT8_FEATURE, INT8_WEIGHT

X = randn(2, 3, 32) * torch.logspace(-2, 2, 32)  # ranges of features that are four decades apart
A = load_recipe("w8a8").replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE),))


def absorbed(forward, x=X, recipe=A):
    return after(captured(forward, x, recipe=recipe), "absorb_scales", check=True)


def range_of(x):
    """The scale of each feature, its range floored at a hundredth of the median's."""
    top = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
    return top.clamp(min=1e-2 * top.median()) / 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_integers_are_those_of_the_scaled_weight(bias, dtype):
    model = nn.Sequential(nn.Linear(32, 48, bias=bias)).to(dtype)
    recipe = A.replace(rules=(QRule("0", INT8_WEIGHT, INT8_FEATURE),))
    x = X.to(dtype)
    program = absorbed(model, x, recipe)
    (steps,) = program.graph.find_nodes(op="call_function", target=quantize_static)
    f = program.gm.get_buffer(steps.args[1].target)
    torch.testing.assert_close(f, range_of(x)[None, None], rtol=1e-6, atol=0)
    after_fold = after(captured(model, x, recipe=recipe), "fold_quantize", check=True)
    stored = dict(constants(after_fold.gm))
    q, scale = quantize_per_channel(model[0].weight.detach().float() * f.reshape(1, -1))
    assert torch.equal(stored["0.weight_q"], q) and torch.equal(stored["0.weight_scale"], scale)
    x_q = (x.float() / f).round().clamp(-128, 127).double()
    want = x_q @ (q.double() * scale.double()).t() + (model[0].bias.double() if bias else 0)
    assert sqnr(want, run(after_fold, x)[0]) > (100.0 if dtype is torch.float32 else 40.0)


def test_outputs_stay_close():
    program = captured(lambda self, x: self.a(x), X, recipe=A)
    want = run(program, X)[0]
    after(program, "absorb_scales")
    assert sqnr(want, run(program, X)[0]) > W8A8_DB
    assert changes(program, "absorb_scales") == 1 and AbsorbScales()(program) == 0


def test_scales_of_tokens_cannot_leave_the_sum():
    for recipe in ("w8a8", "w8a8-plain", "hero-m1"):
        program = absorbed(lambda self, x: self.b(self.a(x)), recipe=recipe)
        assert changes(program, "absorb_scales") == 0
        assert dialect(program) == {"quantize_per_token": 2, "quantize_per_channel": 2, "dequantize": 4}


def test_only_the_layers_that_have_them():
    recipe = A.replace(rules=(*load_recipe("w8a8").rules, *A.rules))
    program = absorbed(lambda self, x: (self.a(x), self.b(x)), recipe=recipe)
    assert changes(program, "absorb_scales") == 1
    # the input of a is read as its integers: no dequantize of them is left
    assert dialect(program) == {
        "quantize_static": 1,
        "quantize_per_token": 1,
        "quantize_per_channel": 2,
        "dequantize": 3,
    }


def test_a_layer_called_twice_has_its_integers_once():
    program = captured(lambda self, x: self.a(self.a(x)), X, recipe=A)
    after(program, "fold_quantize", check=True)
    assert changes(program, "absorb_scales") == 2
    names = {name for name, _ in constants(program.gm) if name.startswith("a.weight")}
    assert names == {"a.weight_q", "a.weight_scale"}


def test_a_weight_and_its_transpose_have_integers_each():
    def forward(self, x):
        return self.a(x), x @ self.a.weight

    program = after(captured(forward, X, recipe=A), "fold_quantize", check=True)
    stored = dict(constants(program.gm))
    weight, f = Block(forward).a.weight.detach(), stored["a.input_scale"].reshape(1, -1)
    for name, view in (("a.weight", weight), ("a.weight_view1", weight.t())):
        q, scale = quantize_per_channel(view * f)
        assert torch.equal(stored[f"{name}_q"], q) and torch.equal(stored[f"{name}_scale"], scale)
