"""The low-rank branch: by float64, and the native kernel beside the reference."""

import pytest
import torch

from zq_compiler.kernels import low_rank_linear
from zq_compiler.kernels.cpu import build
from zq_compiler.kernels.low_rank_linear import factor
from zq_compiler.numerics import quantize_per_channel, sqnr


def problem(rows, n, k, r, dtype=torch.float32):
    g = torch.Generator().manual_seed(n + k)
    y, x = torch.randn(rows, n, generator=g).to(dtype), torch.randn(rows, k, generator=g).to(dtype)
    return y, x, torch.randn(r, k, generator=g).half(), torch.randn(n, r, generator=g).half()


def test_by_formula():
    y, x, v, u = problem(7, 33, 70, 5)
    want = y.double() + x.double() @ v.double().t() @ u.double().t()
    assert sqnr(want, low_rank_linear(y, x, v, u)) > 120
    (v_q, v_scale), (u_q, u_scale) = quantize_per_channel(v), quantize_per_channel(u.t())
    want = y.double() + x.double() @ (v_q * v_scale).double().t() @ (u_q * u_scale).double()
    got = low_rank_linear(y, x, v_q, u_q.t().contiguous(), v_scale, u_scale.t().contiguous())
    assert sqnr(want, got) > 120


@pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
@pytest.mark.parametrize(("rows", "n", "k", "r"), [(1, 576, 1536, 8), (5, 33, 70, 3), (130, 16, 16, 32), (3, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_native_kernel_is_the_reference(rows, n, k, r, dtype):
    build.load()
    y, x, v, u = problem(rows, n, k, r, dtype)
    want = low_rank_linear(y, x, v, u)
    floor = {torch.float32: 110, torch.bfloat16: 45, torch.float16: 62}[dtype]  # sums in another order, then rounded
    for kept in (torch.float16, torch.float32):
        got = torch.ops.zq_cpu.low_rank_linear(y, x, v.to(kept), u.t().contiguous().to(kept))
        assert got.dtype is dtype and sqnr(want, got) > floor
    padded = torch.cat([x, x], 1)[:, :k]  # rows one stride apart
    assert torch.equal(
        torch.ops.zq_cpu.low_rank_linear(y, padded, v, u.t()), torch.ops.zq_cpu.low_rank_linear(y, x, v, u.t())
    )


@pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))
def test_shapes_that_do_not_fit_are_refused():
    build.load()
    y, x, v, u = problem(3, 8, 16, 2)
    for arguments in ((y, x[:2], v, u.t()), (y, x.half(), v, u.t()), (y, x, v, u), (y, x, v.double(), u.t())):
        with pytest.raises(RuntimeError, match="low_rank_linear"):
            torch.ops.zq_cpu.low_rank_linear(*arguments)


def test_a_factor_is_rounded_to_the_activations_dtype():
    q, scale = torch.tensor([[100, -3]], dtype=torch.int8), torch.tensor([[0.013]])
    assert factor(q, scale, torch.bfloat16).dtype is torch.bfloat16
    torch.testing.assert_close(factor(q, scale, torch.float32), torch.tensor([[1.3, -0.039]]))
