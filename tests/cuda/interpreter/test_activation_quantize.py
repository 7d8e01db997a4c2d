"""GELU^quant and SiLU-mul^quant: at most a step from their references, rounding between ops where those round."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.cuda.interpreter.rows import DTYPES, assert_at_most_a_step, assert_each_byte_once, assert_like_its_fake
from tests.cuda.interpreter.sanitizer import counted
from zq_compiler import kernels
from zq_compiler.kernels.cuda.activation_quantize import (
    gelu_quantize,
    gelu_quantize_static,
    silu_mul_quantize,
    silu_mul_quantize_static,
)
from zq_compiler.kernels.cuda.arithmetic import gelu

SHAPES = [(5, 100), (2, 3, 48), (2, 1100), (1, 1)]


def operands(shape, dtype):
    torch.manual_seed(0)
    x, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    return x, up, torch.rand([1] * (len(shape) - 1) + [shape[-1]]) / 30 + 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_token_wise(shape, dtype):
    x, up, _ = operands(shape, dtype)
    for rotated in (False, True)[: 1 + (shape[-1] % 16 == 0)]:
        for name, actual, expected in (
            *((a, gelu_quantize(x, a, rotated), kernels.gelu_quantize(x, a, rotated)) for a in ("none", "tanh")),
            ("silu", silu_mul_quantize(x, up, rotated), kernels.silu_mul_quantize(x, up, rotated)),
        ):
            assert_at_most_a_step(actual[0], expected[0], f"{name} {dtype} rotated={rotated}")
            torch.testing.assert_close(actual[1], expected[1], rtol=torch.finfo(dtype).eps, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_static(shape, dtype):
    x, up, scale = operands(shape, dtype)
    for scales in (scale, scale[..., :1], scale.flatten()):
        for name, actual, expected in (
            ("none", gelu_quantize_static(x, "none", scales), kernels.gelu_quantize_static(x, "none", scales)),
            ("tanh", gelu_quantize_static(x, "tanh", scales), kernels.gelu_quantize_static(x, "tanh", scales)),
            ("silu", silu_mul_quantize_static(x, up, scales), kernels.silu_mul_quantize_static(x, up, scales)),
        ):
            assert_at_most_a_step(actual, expected, f"{name} {dtype}")


def test_each_byte_moves_once():
    """Also those of the two halves of one projection, which are read where they are."""
    both = torch.randn(2, 3, 2 * 1100).to(torch.float16)
    gate, up = both.chunk(2, -1)
    scale = torch.rand(1, 1, 1100) / 30
    with counted() as traffic:
        q, row_scale = silu_mul_quantize(gate, up)
    assert_each_byte_once(traffic, {"x_ptr": gate, "up_ptr": up}, {"q_ptr": q, "scale_ptr": row_scale})
    with counted() as traffic:
        q = silu_mul_quantize_static(gate, up, scale)
    assert_each_byte_once(traffic, {"x_ptr": gate, "up_ptr": up}, {"q_ptr": q}, cached=(scale,))
    with counted() as traffic:
        q, row_scale = gelu_quantize(gate, "none")
    assert_each_byte_once(traffic, {"x_ptr": gate}, {"q_ptr": q, "scale_ptr": row_scale})
    with counted() as traffic:
        q = gelu_quantize_static(gate, "tanh", scale)
    assert_each_byte_once(traffic, {"x_ptr": gate}, {"q_ptr": q}, cached=(scale,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype):
    x, up, scale = operands((6, 37), dtype)
    x[1, 36], x[2, 0], x[3, 5], up[4, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
    for actual, expected in (
        *((gelu_quantize(x, a), kernels.gelu_quantize(x, a)) for a in ("none", "tanh")),
        (silu_mul_quantize(x, up), kernels.silu_mul_quantize(x, up)),
    ):
        assert torch.equal(actual[1].isnan(), expected[1].isnan()) and actual[1][1:4].isnan().all()
        assert_at_most_a_step(actual[0], expected[0])
    assert gelu_quantize_static(x, "none", scale)[2, 0] == 127  # torch's error function of Inf is NaN on some CPUs
    x[2, 0] = 1.0
    for actual, expected in (
        *((gelu_quantize_static(x, a, scale), kernels.gelu_quantize_static(x, a, scale)) for a in ("none", "tanh")),
        (silu_mul_quantize_static(x, up, scale), kernels.silu_mul_quantize_static(x, up, scale)),
    ):
        assert_at_most_a_step(actual, expected)


def test_far_from_zero():
    """Where exp overflows, and where the activation is the identity or nothing."""
    x = torch.tensor([[-3e4, -200.0, -90.0, 90.0, 200.0, 3e4]])
    for approximate in ("none", "tanh"):
        assert torch.equal(gelu_quantize(x, approximate)[0], kernels.gelu_quantize(x, approximate)[0])
    assert torch.equal(silu_mul_quantize(x, x)[0], kernels.silu_mul_quantize(x, x)[0])


def test_no_rows_and_other_strides():
    x, up, scale = operands((4, 3, 32), torch.float32)
    assert gelu_quantize(x[:0], "none")[0].shape == gelu_quantize_static(x[:0], "none", scale).shape == (0, 3, 32)
    moved = x.transpose(0, 1)
    assert torch.equal(gelu_quantize(moved, "none")[0], gelu_quantize(moved.contiguous(), "none")[0])
    for inputs in ((x, up), (moved, up.transpose(0, 1))):
        assert_like_its_fake(torch.ops.zq_cuda.silu_mul_quantize.default, *inputs)
        assert_like_its_fake(torch.ops.zq_cuda.silu_mul_quantize_static.default, *inputs, scale)
        assert_like_its_fake(torch.ops.zq_cuda.gelu_quantize.default, inputs[0], "tanh")
        assert_like_its_fake(torch.ops.zq_cuda.gelu_quantize_static.default, inputs[0], "none", scale)


@triton.jit
def _gelu(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, gelu(tl.load(x_ptr + i), False))


def test_gelu_is_as_accurate_as_torchs():
    x = torch.linspace(-16, 16, 2**16)
    y = torch.empty_like(x)
    _gelu[1,](x, y, BLOCK=2**16)
    exact = x.double() * torch.special.ndtr(x.double())
    error, of_torch = ((t.double() - exact).abs() for t in (y, torch.nn.functional.gelu(x)))
    for where in (x > 0, (x < 0) & (x > -2.5)):
        assert (error / exact.abs())[where].max() <= max((of_torch / exact.abs())[where].max(), 6e-7)
    assert error[x < -2.5].max() <= 2e-8 < of_torch[x < -2.5].max(), "where an error function's 1 and -1 cancel"
    assert y[0].abs() < 1e-20 and y[-1] == 16
    assert (y.diff()[x[1:] > -0.7] >= 0).all()
