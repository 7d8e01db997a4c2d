"""Quantizes of elements, and of rows to INT4 and FP8: exactly their references' integers and floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.interpreter.rows import DTYPES, assert_each_byte_once, assert_like_its_fake
from tests.cuda.interpreter.sanitizer import counted
from zq_compiler import kernels, numerics
from zq_compiler.kernels.cuda.quantize_int4_fp8 import quantize_per_token_fp8, quantize_per_token_int4
from zq_compiler.kernels.cuda.quantize_static import dequantize, quantize_static, quantize_static_fp8

SHAPES = [(5, 100), (2, 3, 48), (3, 600), (1, 1)]
SCALES = {  # that broadcast against [2, 3, 5, 48]
    "one": (1,),
    "none": (),
    "features": (1, 1, 1, 48),
    "features alone": (48,),
    "heads": (1, 3, 1, 1),
    "heads and features": (3, 1, 48),
    "rows": (2, 3, 5, 1),
    "tokens": (2, 1, 5, 1),
    "batch": (2, 1, 1, 1),
    "all": (2, 3, 5, 48),
}


def values(shape, dtype) -> Tensor:
    """Of all sizes, halves of a step among them."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 1, shape[-1])
    x.view(-1)[::7] = torch.randint(-300, 300, x.view(-1)[::7].shape) / 128
    return x.to(dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype is expected.dtype and actual.stride() == expected.stride()
    assert torch.equal(actual.float().nan_to_num(-1e9), expected.float().nan_to_num(-1e9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_static_scales_of_every_shape(scale, dtype):
    x, s = values((2, 3, 5, 48), dtype), torch.rand(SCALES[scale]) / 20 + 1e-3
    moved = x.transpose(1, 2).contiguous().transpose(1, 2), x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for each in (x, *moved):
        assert each.shape == x.shape
        assert_same(quantize_static(each, s), kernels.quantize_static(each, s))
        assert_same(quantize_static_fp8(each, s), kernels.quantize_static_fp8(each, s))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged(shape, dtype):
    x, s = values(shape, dtype), torch.rand(shape[-1]) / 20 + 1e-3
    assert_same(quantize_static(x, s), kernels.quantize_static(x, s))
    assert_same(quantize_static_fp8(x, s), kernels.quantize_static_fp8(x, s))
    q = quantize_static(x, s)
    rows = torch.rand(*shape[:-1], 1)
    for rotated in (False, True)[: 1 + (shape[-1] % 16 == 0)]:
        for scale in (s, rows):
            assert_same(dequantize(q, scale, dtype, rotated), kernels.dequantize(q, scale, dtype, rotated))
        assert_same(*(op(x, rotated)[0] for op in (quantize_per_token_int4, kernels.quantize_per_token_int4)))
        assert_same(*(op(x, rotated)[1] for op in (quantize_per_token_int4, kernels.quantize_per_token_int4)))
    for actual, expected in zip(quantize_per_token_fp8(x), kernels.quantize_per_token_fp8(x), strict=True):
        assert_same(actual, expected)


def test_dequantize_reads_fp8():
    q, scale = numerics.quantize_per_token_fp8(torch.randn(3, 100))
    assert_same(dequantize(q, scale, torch.float16), kernels.dequantize(q, scale, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype):
    """Static scales saturate Inf and drop NaN; a row with either becomes zeros with a NaN scale."""
    x = values((5, 40), dtype)
    x[1, 39], x[2, 0], x[3, 20] = torch.nan, torch.inf, -torch.inf
    x[4] = 0.0
    s = torch.rand(40) / 20 + 1e-3
    assert_same(quantize_static(x, s), kernels.quantize_static(x, s))
    assert_same(quantize_static_fp8(x, s), kernels.quantize_static_fp8(x, s))
    for op, reference in (
        (quantize_per_token_int4, kernels.quantize_per_token_int4),
        (quantize_per_token_fp8, kernels.quantize_per_token_fp8),
    ):
        for actual, expected in zip(op(x), reference(x), strict=True):
            assert_same(actual, expected)
        assert op(x)[1][1:4].isnan().all()


def test_halves_of_a_step():
    """Where a product with the scale's reciprocal, a last place off, would round to the other side."""
    torch.manual_seed(0)
    s = torch.rand(500) / 20 + 1e-3
    x = (torch.arange(-60, 60)[:, None] + 0.5) * s
    assert (torch.round(x * (1 / s)) != torch.round(x / s)).any()
    assert_same(quantize_static(x, s), kernels.quantize_static(x, s))
    assert_same(quantize_static_fp8(x, s), kernels.quantize_static_fp8(x, s))


def test_far_beyond_the_range():
    x = torch.tensor([[3e38, -3e38, 1e-38, -1e-38, 1e4, 128.49, -128.51]])
    for s in (1e-6, 1.0, 1e6):
        assert_same(quantize_static(x, torch.tensor([s])), kernels.quantize_static(x, torch.tensor([s])))
        assert_same(quantize_static_fp8(x, torch.tensor([s])), kernels.quantize_static_fp8(x, torch.tensor([s])))


def test_each_byte_moves_once():
    """Of a transposed tensor and of a slice too: both are gone through as they lie."""
    x = torch.randn(2, 6, 3, 64).half().transpose(1, 2)
    heads, features = torch.rand(1, 3, 1, 1), torch.rand(64)
    for s in (heads, features):
        with counted() as traffic:
            q = quantize_static(x, s)
        assert_each_byte_once(traffic, {"x_ptr": x}, {"q_ptr": q}, cached=(s,))
    wide = torch.randn(4, 200).half()
    with counted() as traffic:
        q = quantize_static(wide[:, :100], features[:1])
    assert_each_byte_once(traffic, {"x_ptr": wide[:, :100]}, {"q_ptr": q}, cached=(features[:1],))
    q, scale = numerics.quantize_per_token(wide)
    with counted() as traffic:
        out = dequantize(q, scale, torch.float16)
    assert_each_byte_once(traffic, {"q_ptr": q}, {"x_ptr": out}, cached=(scale,))
    for op in (quantize_per_token_int4, quantize_per_token_fp8):
        with counted() as traffic:
            q, scale = op(wide[:, :100])
        assert_each_byte_once(traffic, {"x_ptr": wide[:, :100]}, {"q_ptr": q, "scale_ptr": scale})


def test_no_elements_and_fakes():
    ops, x, s = torch.ops.zq_cuda, torch.randn(2, 3, 32), torch.rand(1, 1, 32)
    assert quantize_static(x[:0], s).shape == dequantize(x[:0].to(torch.int8), s, torch.float16).shape == (0, 3, 32)
    assert quantize_per_token_int4(x[:0])[1].shape == (0, 3, 1)
    for each in (x, x.transpose(0, 1), x[..., :16]):
        scale = s[..., : each.shape[-1]]
        assert_like_its_fake(ops.quantize_static.default, each, scale)
        assert_like_its_fake(ops.dequantize.default, each.to(torch.int8), scale, torch.float16)
        assert_like_its_fake(ops.dequantize.default, each.to(torch.int8), scale, torch.float16, True)
        assert_like_its_fake(ops.quantize_per_token_int4.default, each)


def test_a_single_number() -> None:
    x, scale = torch.tensor(0.5), torch.tensor(0.1)
    assert_same(quantize_static(x, scale), numerics.quantize_static(x, scale))
    q = torch.tensor(5, dtype=torch.int8)
    assert_same(dequantize(q, scale, torch.float32), numerics.dequantize(q, scale))
