"""The last vector of a row, where there are fewer values than lanes: read and written no farther than they go."""

from __future__ import annotations

import pytest
import torch

from tests.walls import before_a_wall
from zq_compiler import numerics
from zq_compiler.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", range(1, 34))
def test_floats_of_any_length(k, dtype):
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).to(dtype)
    for got, expected in zip(
        torch.ops.zq_cpu.quantize_per_token(before_a_wall(x)), numerics.quantize_per_token(x), strict=True
    ):
        assert torch.equal(got, expected)
    scale = torch.rand(k) / 20 + 0.01
    for call in (
        lambda x, scale: torch.ops.zq_cpu.gelu_quantize_static(x, "none", scale),
        lambda x, scale: torch.ops.zq_cpu.silu_mul_quantize_static(x, x, scale),
        lambda x, scale: torch.ops.zq_cpu.norm_quantize(x, x, scale, scale, 1e-5, False, True, True),
    ):
        got, expected = call(before_a_wall(x), before_a_wall(scale)), call(x, scale)
        pairs = [(got, expected)] if isinstance(got, torch.Tensor) else zip(got, expected, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 7, 15, 16, 17, 31])
def test_integers_of_any_length(k, dtype):
    g = torch.Generator().manual_seed(k)
    x, residual = (torch.randint(-128, 128, (3, k), dtype=torch.int8, generator=g) for _ in range(2))
    scales = torch.rand(k, generator=g), torch.rand(3, 1, generator=g)
    calls = []
    for operands in ((x, residual, *scales), tuple(before_a_wall(t) for t in (x, residual, *scales))):
        x, residual, x_scale, residual_scale = operands
        rest = 1e-5, True, True, True, False, x_scale, residual_scale, False, dtype
        calls.append(torch.ops.zq_cpu.norm_quantize(x, residual, None, None, *rest))
    assert all(torch.equal(a, b) for a, b in zip(*calls, strict=True))
    h = calls[0][3]
    assert torch.equal(h, (x.float() * scales[0]).to(dtype) + (residual.float() * scales[1]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_rounds_as_torch_does(dtype):
    """Denormals, infinities and NaN too, on their way through a norm's h, in whole vectors and in the last one."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (bits << 16 | 0x8000).view(torch.float32)  # ties of bfloat16
    x = torch.cat([x, (bits << 16 | 0x7FFF).view(torch.float32), bits.to(torch.int16).view(torch.float16).float()])
    for k in (16, 5):
        rows = x[: x.numel() // k * k].view(-1, k)
        scale = torch.full((rows.shape[0], 1), 1.0)
        zero = torch.zeros(rows.shape, dtype=torch.int8)
        h = torch.ops.zq_cpu.norm_quantize(
            rows.to(dtype), zero, None, None, 1e-5, True, False, True, False, None, scale, False, dtype
        )[3]
        expected = rows.to(dtype) + zero.to(dtype)
        assert torch.equal(h.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(h.isnan(), expected.isnan())
