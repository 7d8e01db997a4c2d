"""fp8_linear: the product of E4M3 values, and both scales."""

import numpy as np
import pytest
import torch

from tests.kernels.formulas import assert_close, data, float64
from zq_compiler.formats import FORMATS, WITHIN_E4M3, unpack
from zq_compiler.kernels import fp8_linear
from zq_compiler.numerics import quantize_per_token_fp8, quantize_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "k", "n"), [(5, 41, 7), (1, 1, 1), (0, 8, 3), (3, 300, 2)])
def test_the_product_of_the_values_times_both_scales(rows, k, n, dtype):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    (x, x_scale), (w, w_scale) = quantize_per_token_fp8(data((rows, k))), quantize_weight(weight, "fp8_e4m3")
    bias = data((n,), seed=2)
    y = fp8_linear(x, x_scale, w, w_scale, bias, "fp8_e4m3", 0, dtype)
    values = float64(x) * float64(x_scale), float64(w.view(torch.float8_e4m3fn)) * float64(w_scale)
    exact = values[0] @ values[1].T + float64(bias)
    assert y.dtype is dtype
    assert_close(y, exact, dtype)


@pytest.mark.parametrize("group", [0, 16, 64])
@pytest.mark.parametrize("name", WITHIN_E4M3)
def test_floats_of_fewer_bits(name, group):
    x, x_scale = quantize_per_token_fp8(data((5, 41)))
    w, w_scale = quantize_weight(data((7, 41), seed=1), name, group)
    y = fp8_linear(x, x_scale, w, w_scale, None, name, group, torch.float32)
    codes = unpack(w, FORMATS[name].bits, 41).numpy()
    weight = np.array(FORMATS[name].values)[codes] * np.repeat(float64(w_scale), group or 41, axis=1)[:, :41]
    assert_close(y, float64(x) * float64(x_scale) @ weight.T, torch.float32)


def test_a_poisoned_row_is_nan_and_no_other():
    x = data((4, 8))
    x[2, 3] = torch.inf
    w, w_scale = quantize_weight(data((5, 8), seed=1), "fp8_e4m3")
    y = fp8_linear(*quantize_per_token_fp8(x), w, w_scale, None, "fp8_e4m3", 0, torch.float32)
    assert y.isnan().all(-1).tolist() == [False, False, True, False]
