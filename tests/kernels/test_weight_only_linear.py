"""weight_only_linear: the float product of the weight's values, in the activations' dtype."""

import numpy as np
import pytest
import torch

from tests.kernels.formulas import assert_close, data, float64
from zq_compiler.formats import FORMATS, unpack
from zq_compiler.kernels import weight_only_linear
from zq_compiler.numerics import quantize_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_of_the_values(name, group, dtype):
    fmt, k = FORMATS[name], 41
    packed, scale = quantize_weight(torch.randn(7, k, generator=torch.Generator().manual_seed(0)), name, group)
    x, bias = torch.randn(3, k, generator=torch.Generator().manual_seed(1)).to(dtype), data((7,)).to(dtype)
    y = weight_only_linear(x, packed, scale, bias, name, group)
    codes = unpack(packed, fmt.bits, k).numpy()
    groups = -(-k // group) if group else 1
    assert scale.shape == (7, 2 * groups if fmt.asymmetric else groups)
    scales, zeros = (np.repeat(float64(part), group or k, axis=1)[:, :k] for part in (scale, scale[:, -groups:]))
    values = np.array(fmt.values)[codes] - (zeros if fmt.asymmetric else 0)
    scales = scales[:, :k]
    weight = torch.from_numpy(values * scales).float().to(dtype)
    assert y.dtype is dtype
    assert_close(y, float64(x) @ float64(weight).T + float64(bias), dtype)
