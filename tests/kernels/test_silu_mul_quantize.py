"""silu_mul_quantize against the float64 formula."""

import pytest
import torch

from tests.kernels.formulas import CASES, assert_quantizes, data, float64, silu
from zq_compiler.kernels import silu_mul_quantize


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_silu_mul(shape, dtype):
    gate, up = data(shape, dtype), data(shape, dtype, seed=1)
    if dtype is torch.float16:  # 1e4 squared is no float16
        gate, up = gate.clamp(-10, 10), up.clamp(-10, 10)
    assert_quantizes(*silu_mul_quantize(gate, up), silu(float64(gate)) * float64(up), dtype)


def test_it_is_the_gate_that_is_activated():
    gate, up = torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, -2.0]])
    assert not torch.equal(silu_mul_quantize(gate, up)[0], silu_mul_quantize(up, gate)[0])
