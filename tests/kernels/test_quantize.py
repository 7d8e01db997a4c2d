"""quantize_per_token, quantize_per_channel and dequantize as ops."""

import pytest
import torch

from tests.kernels.formulas import CASES, assert_close, assert_quantizes, data, float64
from zq_compiler.kernels import dequantize, quantize_per_channel, quantize_per_token


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("op", [quantize_per_token, quantize_per_channel])
def test_quantize(op, shape, dtype):
    x = data(shape, dtype)
    assert_quantizes(*op(x), float64(x), torch.float32)  # exact in float32 whatever the input's dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(dtype):
    q, scale = torch.arange(-127, 128, dtype=torch.int8).reshape(5, 51), torch.rand(5, 1)
    y = dequantize(q, scale, dtype)
    assert y.dtype is dtype
    assert_close(y, float64(q) * float64(scale), dtype)
