"""In-place operations in a captured graph: no pass may share, move or fuse a read across them. Through both doors."""

import pytest
import torch
from torch.nn import functional as F

from tests.programs import Block, dialect, randn
from tests.tolerances import W8A8_DB
from zq_compiler import quantize
from zq_compiler.numerics import sqnr

X = randn(6, 32)


def add_between_two_layers(self, x):
    h = x * 2
    a = self.a(h)
    h.add_(1)
    return a, self.b(h)


def augmented_assignment(self, x):
    h = self.a(x)
    first = self.b(h)
    h += x
    return first, self.b(h), self.c(h)


def relu_between(self, x):
    h = self.a(x)
    b = self.b(h)
    return b, self.c(h.relu_())


def view_of_a_changed_value(self, x):
    h = x * 2
    v = h.view(-1, 2, 32)
    a = self.a(v)
    h.mul_(3)
    return a, self.b(v), self.c(h)


def copy_of_a_changed_value(self, x):
    h = (x * self.scale).view(3, 2, 32)
    rows = h.transpose(0, 1).reshape(-1, 32)
    h.neg_()
    h.add_(1)
    return self.a(rows), self.b(h)


def index_put_between(self, x):
    h = x * 1
    a = self.a(h)
    h[0] = 5.0
    return a, self.b(h)


def buffer_written(self, x):
    a = self.a(self.state + x)
    self.state.copy_(x[0])
    return a, self.a(self.state + x), self.b(self.state)


def input_written(self, x):
    a = self.a(x)
    x.add_(1)
    return a, self.b(x), x * 1


def norm_then_change_its_input(self, x):
    h = x * self.scale
    y = self.norm(h)
    h.add_(5)
    return self.a(y.view(-1, 2, 32)), h * 1


def summand_changed(self, x):
    left, right = x * self.scale, x * 3
    h = left + right
    y = self.norm(h)
    left.add_(5)
    return self.a(y.view(-1, 2, 32)), h * 1, left * 1


def sum_changed(self, x):
    h = x + x * 2
    v = h.view(-1)
    a = self.a(self.norm(h))
    h.add_(1)
    return a, h * 1, v * 1


def norm_result_changed(self, x):
    y = self.norm(x * 2)
    v = y.view(-1)
    a = self.a(y)
    y.add_(1)
    return a, y * 1, v * 1, self.b(y)


def gelu_result_changed(self, x):
    y = F.gelu(x)
    y.add_(1)
    return self.a(y)


def gate_changed(self, x):
    gate = x * 2
    y = F.silu(gate) * x
    gate.mul_(-1)
    return self.a(y), self.b(gate)


def dropout_is_an_alias(self, x):
    h = x * 2
    v = self.drop(h)
    a = self.a(v)
    h.add_(1)
    return a, self.b(v)


def residual_in_place(self, x):
    h = x * self.scale
    h += self.a(h)
    return h + self.b(self.norm(h))


CASES = [f for f in list(globals().values()) if callable(f) and getattr(f, "__module__", "") == __name__]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()


def assert_same(forward, run):
    want = Block(forward).eval()(X.clone())
    got = run(Block(forward).eval())
    for w, g in zip(*(r if isinstance(r, tuple) else (r,) for r in (want, got)), strict=True):
        assert sqnr(w.detach(), g) > W8A8_DB


@pytest.mark.parametrize("forward", CASES)
def test_quantize(forward):
    quantized = []

    def run(model):
        quantized.append(quantize(model, X.clone(), check=True))
        with torch.no_grad():
            return quantized[0](X.clone())

    assert_same(forward, run)
    assert quantized[0].report().counts.keys() == {"int8"}  # still quantized, at its own place


@pytest.mark.parametrize("forward", CASES)
def test_torch_compile(forward):
    def run(model):
        fast = torch.compile(model, backend="zeroquant", options={"lowering": "eager"})
        with torch.no_grad():
            return fast(X.clone())

    assert_same(forward, run)


def test_callers_see_their_input_changed_as_the_model_changes_it():
    x = X.clone()
    quantize(Block(input_written).eval(), X.clone())(x)
    assert torch.equal(x, X + 1)


def test_in_place_residuals_do_not_cost_the_fusions_behind_them():
    assert dialect(quantize(Block(residual_in_place).eval(), X).program) == {
        "quantize_per_token": 1,
        "layer_norm_quantize": 1,
        "int8_linear": 2,
    }
