"""Quantize joins norms, residual adds, GELU and SwiGLU, and its other readers are served."""

import pytest
import torch
from torch.nn import functional as F

from tests.programs import after, captured, dialect, ops, randn, reasons, run
from tests.tolerances import ROUNDING_DB
from zq_compiler.kernels import OPS
from zq_compiler.numerics import sqnr
from zq_compiler.passes.fuse_memory_bound import FuseMemoryBound

X = randn(2, 3, 32)


def fused(forward, *inputs):
    """The Program after the pass; it computes what the graph before it computed."""
    inputs = inputs or (X,)
    program = after(captured(forward, *inputs), "fuse_linear")
    before = run(program, *inputs)
    FuseMemoryBound()(program)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.gm.recompile()
    for b, a in zip(before, run(program, *inputs), strict=True):
        assert sqnr(b, a) > ROUNDING_DB
    assert FuseMemoryBound()(program) == 0
    return program


def call(program, name):
    (node,) = program.graph.find_nodes(op="call_function", target=OPS[name].overload)
    return node


def test_layer_norm_keeps_its_parameters_and_eps():
    program = fused(lambda self, x: self.a(self.norm(x)))
    assert dialect(program) == {"layer_norm_quantize": 1, "int8_linear": 1}
    _, weight, bias, eps, rotated = call(program, "layer_norm_quantize").args
    assert (weight.target, bias.target, eps, rotated) == ("norm.weight", "norm.bias", 0.1, True)


def test_rms_norm_keeps_its_eps_and_its_default_is_the_dtypes():
    program = fused(lambda self, x: self.a(self.rms(x)))
    assert call(program, "rms_norm_quantize").args[1].target == "rms.weight"
    assert call(program, "rms_norm_quantize").args[2] == 1e-3
    program = fused(lambda self, x: self.a(F.rms_norm(x * 1e-4, (32,))))
    assert call(program, "rms_norm_quantize").args[1:3] == (None, torch.finfo(torch.float32).eps)


def pre_norm(self, x):
    h = x + self.c(x)
    return h + self.a(self.norm(h))


def post_norm(self, x):
    y = self.norm(x + self.c(x))
    return self.norm2(y + self.a(y))


def pre_rms(self, x):
    h = x + self.c(x)
    return h + self.a(self.rms(h))


@pytest.mark.parametrize(
    ("block", "op", "index"),
    [
        (pre_norm, "add_layer_norm_quantize", 3),
        (post_norm, "add_layer_norm_quantize", 2),
        (pre_rms, "add_rms_norm_quantize", 3),
    ],
)
def test_residual_blocks_read_the_sum_or_the_norm_from_the_fused_op(block, op, index):
    program = fused(block)
    assert dialect(program) == {"quantize_per_token": 1, op: 1, "int8_linear": 2}
    assert index in {user.args[1] for user in call(program, op).users}
    assert ops(program)["aten.add.Tensor"] == 1  # the second residual; the first is inside


def test_the_add_joins_only_for_equal_shapes_and_dtypes():
    broadcast = fused(lambda self, x: self.a(self.norm(x + self.scale)))
    assert dialect(broadcast) == {"layer_norm_quantize": 1, "int8_linear": 1}
    scaled = fused(lambda self, x: self.a(self.norm(torch.add(x, x * 2, alpha=3))))
    assert dialect(scaled) == {"layer_norm_quantize": 1, "int8_linear": 1}
    number = fused(lambda self, x: self.a(self.norm(x + 1)))
    assert dialect(number) == {"layer_norm_quantize": 1, "int8_linear": 1}
    mixed = fused(lambda self, x: self.a(self.norm(x + x.bfloat16())))
    assert dialect(mixed) == {"layer_norm_quantize": 1, "int8_linear": 1}


def test_readers_before_the_fused_op_keep_the_original():
    def forward(self, x):
        h = x + x.sin()
        early = h.cos()
        y = self.norm(h)
        return self.a(y), early, h.tan(), y.tan()

    program = fused(forward)
    assert dialect(program) == {"add_layer_norm_quantize": 1, "int8_linear": 1}
    assert {u.args[1] for u in call(program, "add_layer_norm_quantize").users} == {0, 1, 2, 3}


def test_two_norms_of_one_value_are_not_confused():
    def forward(self, x):
        first, second = self.norm(x), self.norm2(x)
        # the second is quantized first, because the first is read through a view that comes later
        a = self.a(second)
        return a, self.b(first.sin() + first), first.tan(), second.tan()

    def late(self, x):
        x = x * self.scale
        first, second = self.norm(x), self.norm2(x)
        a = self.a(second.view(-1, 32))
        return a, self.b(first.view(-1, 32)), first.tan(), second.tan()

    fused(forward)
    assert dialect(fused(late)) == {"layer_norm_quantize": 2, "int8_linear": 2}


def test_norms_over_several_dimensions_are_refused():
    def forward(self, x):
        return self.a(F.layer_norm(x, (3, 32)))

    program = after(captured(forward, X, recipe="w8a8"), "fuse_linear")
    assert FuseMemoryBound()(program) == 0
    assert ("FuseNorm", "it normalises over 2 dimensions") in reasons(program)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    program = fused(lambda self, x: self.a(F.gelu(x, approximate=approximate)))
    assert dialect(program) == {"gelu_quantize": 1, "int8_linear": 1}
    assert call(program, "gelu_quantize").args[1:] == (approximate, True)


def test_gelu_with_another_float_reader_is_refused():
    def forward(self, x):
        y = F.gelu(x)
        return self.a(y), y.sin()

    program = fused(forward)
    assert dialect(program) == {"quantize_per_token": 1, "int8_linear": 1}
    assert ("FuseGelu", "its float output has other readers, so fusing would compute it twice") in reasons(program)


def test_gelus_of_one_value_are_judged_apart():
    def forward(self, x):
        erf, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
        return self.a(erf), self.b(tanh), tanh.sin()

    assert dialect(fused(forward)) == {"gelu_quantize": 1, "quantize_per_token": 1, "int8_linear": 2}


@pytest.mark.parametrize(
    "gated", [lambda g, u: F.silu(g) * u, lambda g, u: u * F.silu(g)], ids=["gate first", "gate second"]
)
def test_swiglu_in_both_orders(gated):
    program = fused(lambda self, x: self.c(gated(self.a(x), self.b(x))))
    assert dialect(program) == {"quantize_per_token": 1, "silu_mul_quantize": 1, "int8_linear": 3}
    gate, up, _ = call(program, "silu_mul_quantize").args
    assert [n.args[2].target for n in (gate, up)] == ["a.weight_q", "b.weight_q"]


@pytest.mark.parametrize(
    ("gated", "reason"),
    [
        (lambda self, g, u: F.silu(g) * self.scale, "gate and up differ in shape"),
        (lambda self, g, u: F.silu(g) * 2.0, "gate and up differ in shape"),
    ],
)
def test_other_products_of_silu_are_refused(gated, reason):
    program = fused(lambda self, x: self.c(gated(self, self.a(x), x)))
    assert "silu_mul_quantize" not in dialect(program)
    assert ("FuseSiluMul", reason) in reasons(program)


def test_a_product_with_another_float_reader_is_refused():
    def forward(self, x):
        y = F.silu(x) * x
        return self.a(y), y.sin()

    assert dialect(fused(forward)) == {"quantize_per_token": 1, "int8_linear": 1}
