"""gelu_quantize against the float64 formulas of both GELUs."""

import pytest
import torch

from tests.kernels.formulas import CASES, assert_quantizes, data, float64, gelu
from zq_compiler.kernels import gelu_quantize


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gelu(shape, dtype, approximate):
    x = data(shape, dtype)
    assert_quantizes(*gelu_quantize(x, approximate), gelu(float64(x), approximate), dtype)


def test_the_two_gelus_differ():
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    assert not torch.equal(gelu_quantize(x, "none")[1], gelu_quantize(x, "tanh")[1])
