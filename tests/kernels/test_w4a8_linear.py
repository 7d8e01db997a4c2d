"""w4a8_linear: the integer sum of each group exactly, and the float sum of groups in the order that is written down."""

import numpy as np
import pytest
import torch

from tests.kernels.formulas import assert_close, data, float64
from zq_compiler.formats import FORMATS, NIBBLES, unpack
from zq_compiler.kernels import int8_linear, w4a8_linear
from zq_compiler.numerics import quantize_per_token, quantize_per_token_int4, quantize_weight


def operands(m, k, n, name, group, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return (
        *quantize_per_token(data((m, k), seed=seed)),
        *quantize_weight(weight, name, group),
        data((n,), seed=seed + 1),
    )


def values(packed, name, k):
    return FORMATS[name].decode(unpack(packed, FORMATS[name].bits, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 16, 32, 64])
@pytest.mark.parametrize("name", NIBBLES)
def test_the_product_of_the_values_times_both_scales(name, group, dtype):
    k = 41  # ragged groups of 16 and 32, one that is wider than the row
    x, x_scale, packed, scale, bias = operands(5, k, 7, name, group)
    y = w4a8_linear(x, x_scale, packed, scale, bias, name, group, dtype)
    w = values(packed, name, k).double().numpy() * np.repeat(float64(scale), group or k, axis=1)[:, :k]
    assert y.dtype is dtype
    assert_close(y, float64(x) * float64(x_scale) @ w.T + float64(bias), dtype)


def test_the_sum_of_groups_bit_for_bit():
    k, n, group = 300, 9, 64
    x, x_scale, packed, scale, bias = operands(4, k, n, "int4", group)
    w, s = values(packed, "int4", k).numpy().astype(np.int64), scale.numpy().astype(np.float32)
    total = None
    for g, start in enumerate(range(0, k, group)):
        part = slice(start, start + group)
        product = (x.numpy().astype(np.int64)[:, part] @ w[:, part].T).astype(np.float32) * s[:, g]
        total = product if total is None else total + product
    expected = total * x_scale.numpy() + bias.numpy()
    y = w4a8_linear(x, x_scale, packed, scale, bias, "int4", group, torch.float32)
    assert np.array_equal(y.numpy(), expected)
    backwards = [s[:, g] * (x.numpy()[:, p].astype(np.int64) @ w[:, p].T) for g, p in _parts(k, group)][::-1]
    assert not np.array_equal(sum(backwards) * x_scale.numpy() + bias.numpy(), expected)  # the order does show


def _parts(k, group):
    return [(g, slice(start, start + group)) for g, start in enumerate(range(0, k, group))]


def test_one_group_is_int8_linears_arithmetic():
    x, x_scale, packed, scale, bias = operands(6, 100, 11, "int4", 0)
    w = values(packed, "int4", 100).to(torch.int8)
    expected = int8_linear(x, x_scale, w, scale, bias, torch.float32)
    assert torch.equal(w4a8_linear(x, x_scale, packed, scale, bias, "int4", 0, torch.float32), expected)


def test_leading_dimensions_and_no_rows():
    x, x_scale, packed, scale, _ = operands(6, 40, 5, "int3", 16)
    flat = w4a8_linear(x, x_scale, packed, scale, None, "int3", 16, torch.float32)
    shaped = w4a8_linear(x.view(2, 3, 40), x_scale.view(2, 3, 1), packed, scale, None, "int3", 16, torch.float32)
    assert torch.equal(shaped, flat.view(2, 3, 5))
    assert w4a8_linear(x[:0], x_scale[:0], packed, scale, None, "int3", 16, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("quantize", [quantize_per_token, quantize_per_token_int4])
def test_a_poisoned_row_is_nan_and_no_other(quantize):
    x = data((4, 32))
    x[2, 3] = torch.inf
    packed, scale = quantize_weight(data((5, 32), seed=1), "int4", 16)
    y = w4a8_linear(*quantize(x), packed, scale, None, "int4", 16, torch.float32)
    assert y.isnan().all(-1).tolist() == [False, False, True, False]
