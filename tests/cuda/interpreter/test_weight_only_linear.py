"""Weight-only linear on CUDA: the weight's values bit for bit, and sums of products as exact as float32 is."""

import pytest
import torch

from tests.cuda.interpreter.linears import force
from tests.cuda.interpreter.low_bit import LARGE, SPLIT, TILES, weight
from zq_compiler import kernels
from zq_compiler.formats import FORMATS
from zq_compiler.kernels.cuda import weight_only_linear as cuda
from zq_compiler.numerics import dequantize_weight

DTYPES = torch.float32, torch.float16, torch.bfloat16
ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a last place, relative
SUM = 1e-6  # of the sum of magnitudes: float32 sums of a few hundred products


def run(x, packed, scale, bias, name, group):
    layout = cuda.pack_weight_only(packed, scale, name, group, x.shape[-1])
    return cuda.weight_only_linear(x, *layout, bias, name, group)


@pytest.mark.parametrize("group", [0, 16, 32, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_each_weight_is_the_references(name, group, monkeypatch):
    """Rows with a single one: a product is one weight's value."""
    force(monkeypatch, cuda, LARGE)
    k, n = 150, 40
    packed, scale = weight(n, k, name, group)
    for dtype in DTYPES:
        want = dequantize_weight(packed, scale, name, group, k, dtype).t()
        got = run(torch.eye(k, dtype=dtype), packed, scale, None, name, group)
        assert got.dtype is dtype and want.isfinite().all()
        assert torch.equal(got, want)


def assert_sums(m, k, n, name, group, dtype, bias=None):
    packed, scale = weight(n, k, name, group)
    x, b = torch.randn(m, k).to(dtype), None if bias is None else torch.randn(n).to(bias)
    w = dequantize_weight(packed, scale, name, group, k, dtype).double()
    exact, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    if b is not None:
        exact, size = exact + b.double(), size + b.double().abs()
    got = run(x, packed, scale, b, name, group)
    assert got.shape == (m, n)
    assert ((got.double() - exact).abs() <= SUM * size + ROUNDING[dtype] * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "int4_asym", "int8", "ternary", "fp6_e2m3", "fp4_e2m1"])
def test_sums_are_float32s(name, dtype, tiles, monkeypatch):
    force(monkeypatch, cuda, tiles)
    assert_sums(5, 300, 70, name, 64, dtype, bias=dtype)


@pytest.mark.parametrize(("k", "group"), [(576, 128), (256, 128), (1, 32), (1030, 512), (300, 0)])
def test_groups_and_features_of_other_sizes(k, group, monkeypatch):
    force(monkeypatch, cuda, TILES)
    assert_sums(17, k, 33, "int4", group, torch.float16)
    force(monkeypatch, cuda, SPLIT)
    assert_sums(1, k, 33, "int3_asym", group, torch.float16, torch.float16)


def test_more_rows_than_a_tile_has(monkeypatch):
    force(monkeypatch, cuda, {**TILES, "BLOCK_M": 64, "BLOCK_N": 32})
    assert_sums(150, 130, 100, "int4", 64, torch.float16)


def test_leading_dimensions_strides_and_no_rows(monkeypatch):
    force(monkeypatch, cuda, TILES)
    packed, scale = weight(7, 40, "int4", 32)
    x = torch.randn(2, 3, 80)[..., ::2]
    bias = torch.randn(14)[::2]
    got = run(x, packed, scale, bias, "int4", 32)
    assert torch.equal(got.view(6, 7), run(x.reshape(6, 40), packed, scale, bias.clone(), "int4", 32))
    torch.testing.assert_close(got, kernels.weight_only_linear(x, packed, scale, bias, "int4", 32))
    assert run(x[:0], packed, scale, None, "int4", 32).shape == (0, 3, 7)


def test_infinities_reach_their_row_alone(monkeypatch):
    force(monkeypatch, cuda, TILES)
    packed, scale = weight(7, 40, "int4", 32)
    x = torch.randn(3, 40)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    assert run(x, packed, scale, None, "int4", 32).isfinite().all(1).tolist() == [True, False, False]
