"""W4A8 on CUDA: the reference's bits, whatever the format, the groups and the split of K."""

import pytest
import torch

from tests.cuda.interpreter.linears import force, integers
from tests.cuda.interpreter.low_bit import LARGE, SPLIT, TILES, weight
from zq_compiler import kernels
from zq_compiler.formats import NIBBLES
from zq_compiler.kernels.cuda import group_products
from zq_compiler.kernels.cuda.w4a8_linear import pack_w4a8, w4a8_linear

DTYPES = torch.float32, torch.float16, torch.bfloat16


def assert_bits(m, k, n, name, group, dtype, bias=None, one=False):
    packed, scale = weight(n, k, name, group)
    x, x_scale = integers(m, k), torch.rand(m, 1) * 0.02
    x[0] = -128
    b = None if bias is None else torch.randn(n).to(bias)
    want = kernels.w4a8_linear(x, x_scale, packed, scale, b, name, group, dtype)
    got = w4a8_linear(x, x_scale, *pack_w4a8(packed, scale, name, group, k), b, name, group, dtype)
    assert got.dtype is dtype
    assert want.isfinite().all() and want.float().std() > 0
    assert torch.equal(got, want)


@pytest.mark.parametrize("group", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", NIBBLES)
def test_bits_are_the_references(name, group, monkeypatch):
    force(monkeypatch, group_products, TILES)
    for dtype, bias in zip(DTYPES, (None, torch.float32, torch.bfloat16), strict=True):
        assert_bits(5, 301, 70, name, group, dtype, bias)


@pytest.mark.parametrize(("k", "group"), [(576, 128), (128, 64), (16, 16), (1, 32), (1030, 512), (512, 1024)])
def test_groups_and_features_of_other_sizes(k, group, monkeypatch):
    force(monkeypatch, group_products, TILES)
    assert_bits(3, k, 33, "int4", group, torch.float32, torch.float32)
    assert_bits(17, k, 5, "int4", 0, torch.float32)


def test_more_rows_than_a_tile_has(monkeypatch):
    force(monkeypatch, group_products, {**LARGE, "BLOCK_M": 64, "BLOCK_N": 32})
    assert_bits(150, 130, 100, "int4", 64, torch.float16)


def test_integer_sums_may_be_split(monkeypatch):
    force(monkeypatch, group_products, SPLIT)
    for k in (700, 128, 1):
        assert_bits(5, k, 70, "int4", 0, torch.float32, torch.float32)


def test_sums_of_groups_are_not_split(monkeypatch):
    asked = []
    monkeypatch.setattr(group_products, "low_bit_config", lambda *_, split, **others: asked.append(split) or TILES)
    for group in (0, 64):
        assert_bits(1, 64, 5, "int4", group, torch.float32)
    assert asked == [True, False]


def test_leading_dimensions_strides_and_no_rows(monkeypatch):
    force(monkeypatch, group_products, TILES)
    packed, scale = weight(7, 40, "int4", 32)
    layout = pack_w4a8(packed, scale, "int4", 32, 40)
    x, x_scale = integers(2, 3, 80)[..., ::2], torch.rand(2, 3, 1)
    bias = torch.randn(14)[::2]
    want = kernels.w4a8_linear(x, x_scale, packed, scale, bias, "int4", 32, torch.float32)
    assert torch.equal(w4a8_linear(x, x_scale, *layout, bias, "int4", 32, torch.float32), want)
    assert w4a8_linear(x[:0], x_scale[:0], *layout, None, "int4", 32, torch.float32).shape == (0, 3, 7)


def test_a_poisoned_row_is_nan_and_no_other(monkeypatch):
    force(monkeypatch, group_products, TILES)
    packed, scale = weight(7, 40, "int4", 32)
    x_scale = torch.tensor([[1.0], [float("nan")], [2.0]])
    y = w4a8_linear(
        integers(3, 40), x_scale, *pack_w4a8(packed, scale, "int4", 32, 40), None, "int4", 32, torch.float16
    )
    assert y.isnan().all(1).tolist() == [False, True, False] and y.isnan().any(1).tolist() == [False, True, False]
