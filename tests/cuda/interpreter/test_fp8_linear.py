"""FP8 linear on CUDA, with tensor cores of E4M3 and without: values bit for bit, sums as exact as float32 is."""

import pytest
import torch

from tests.cuda.interpreter.linears import force
from tests.cuda.interpreter.low_bit import LARGE, SPLIT, TILES, weight
from zq_compiler import kernels
from zq_compiler.formats import WITHIN_E4M3
from zq_compiler.kernels.cuda import group_products
from zq_compiler.kernels.cuda.fp8_linear import fp8_linear, pack_fp8
from zq_compiler.numerics import dequantize_weight, quantize_per_token_fp8

DTYPES = torch.float32, torch.float16, torch.bfloat16
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # of three products and of the result
SUM = 1e-6  # of the sum of magnitudes: float32 sums of a few hundred products
ARCHITECTURES = 80, 89


def run(x, x_scale, packed, scale, bias, name, group, dtype, architecture):
    layout = pack_fp8(packed, scale, name, group, x.shape[-1], architecture)
    return fp8_linear(x, x_scale, *layout, bias, name, group, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("name", WITHIN_E4M3)
def test_each_value_is_the_references(name, group, architecture, monkeypatch):
    """Rows with a single one: a product is one weight's value, scaled."""
    force(monkeypatch, group_products, LARGE)
    k, n = 150, 40
    packed, scale = weight(n, k, name, group)
    x, x_scale, bias = torch.eye(k).to(torch.float8_e4m3fn), torch.rand(k, 1) + 0.5, torch.randn(n)
    for dtype in DTYPES:
        want = kernels.fp8_linear(x, x_scale, packed, scale, bias, name, group, dtype)
        got = run(x, x_scale, packed, scale, bias, name, group, dtype, architecture)
        assert got.dtype is dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_activation_is_what_it_is(architecture, monkeypatch):
    force(monkeypatch, group_products, LARGE)
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = torch.where(x.float().isnan(), 0.0, x.float()).to(torch.float8_e4m3fn).view(256, 1)
    packed = torch.tensor([[1.0], [-0.5]]).to(torch.float8_e4m3fn).view(torch.uint8)
    got = run(x, torch.ones(1, 1), packed, torch.ones(2, 1), None, "fp8_e4m3", 0, torch.float32, architecture)
    assert torch.equal(got, x.float() * torch.tensor([1.0, -0.5]))


def assert_sums(m, k, n, name, group, dtype, architecture, bias=None, one=False):
    packed, scale = weight(n, k, name, group)
    x, x_scale = quantize_per_token_fp8(torch.randn(m, k))
    x_scale = x_scale[:1] if one else x_scale
    b = None if bias is None else torch.randn(n).to(bias)
    w = dequantize_weight(packed, scale, name, group, k, torch.float64)
    real = x.double() * x_scale.double()
    exact, size = real @ w.t(), real.abs() @ w.abs().t()
    if b is not None:
        exact, size = exact + b.double(), size + b.double().abs()
    got = run(x, x_scale, packed, scale, b, name, group, dtype, architecture)
    assert got.shape == (m, n) and got.dtype is dtype
    assert ((got.double() - exact).abs() <= SUM * size + ROUNDING[dtype] * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("name", WITHIN_E4M3)
def test_sums_are_float32s(name, tiles, architecture, monkeypatch):
    force(monkeypatch, group_products, tiles)
    assert_sums(5, 301, 70, name, 64, torch.float32, architecture)
    assert_sums(5, 301, 70, name, 0, torch.float16, architecture, torch.bfloat16, one=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("k", "group"), [(576, 128), (256, 128), (1, 32), (1030, 512)])
def test_groups_and_features_of_other_sizes(k, group, architecture, monkeypatch):
    force(monkeypatch, group_products, TILES)
    assert_sums(17, k, 33, "fp8_e4m3", group, torch.bfloat16, architecture, torch.float32)
    assert_sums(1, k, 33, "fp4_e2m1", 0, torch.float32, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_leading_dimensions_poison_and_no_rows(architecture, monkeypatch):
    force(monkeypatch, group_products, TILES)
    packed, scale = weight(7, 40, "fp8_e4m3", 0)
    x, x_scale = quantize_per_token_fp8(torch.randn(2, 3, 40))
    x_scale[1, 1] = float("nan")
    got = run(x, x_scale, packed, scale, None, "fp8_e4m3", 0, torch.float32, architecture)
    want = kernels.fp8_linear(x, x_scale, packed, scale, None, "fp8_e4m3", 0, torch.float32)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got.isnan().all(-1).flatten().tolist() == [False] * 4 + [True, False]
    assert run(x[:0], x_scale[:0], packed, scale, None, "fp8_e4m3", 0, torch.float16, architecture).shape == (0, 3, 7)
