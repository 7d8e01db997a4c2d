"""The low-rank branch on CUDA, on its own and in the epilogues of linears."""

import functools

import pytest
import torch

from tests.cuda.interpreter import low_bit
from tests.cuda.interpreter.linears import SPLIT, TILES, force, integers, operands
from zq_compiler import kernels
from zq_compiler.kernels.cuda import fp8_linear, group_products, w4a8_linear, weight_only_linear
from zq_compiler.kernels.cuda import int8_linear as linear
from zq_compiler.kernels.cuda import low_rank_linear as cuda
from zq_compiler.kernels.low_rank_linear import factor

DTYPES = torch.float32, torch.float16, torch.bfloat16


def branch(m, n, k, r, dtype, stored, exact=False):
    """`x, v, u, v_scale, u_scale`; where exact, of few integers, so that no sum is rounded in any order."""
    torch.manual_seed(m * n * k + r)
    if exact:
        x, v, u = (torch.randint(-2, 3, shape) for shape in ((m, k), (r, k), (n, r)))
        scales = torch.full((r, 1), 0.5), torch.full((1, r), 2.0)
    else:
        x, v, u = torch.randn(m, k), torch.randn(r, k) / k**0.5, torch.randn(n, r) / r**0.5
        scales = torch.rand(r, 1) * 0.01 + 0.01, torch.rand(1, r) * 0.01 + 0.01
    if stored is torch.float16:
        return x.to(dtype), v.half(), u.half(), None, None
    integers = (v, u) if exact else (torch.randint(-127, 128, v.shape), torch.randint(-127, 128, u.shape))
    return x.to(dtype), *(values.to(torch.int8) for values in integers), *scales


@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_are_exact_have_equal_bits(dtype, stored):
    for m, n, k, r in ((1, 5, 33, 3), (70, 130, 128, 16), (7, 65, 300, 40)):
        x, v, u, v_scale, u_scale = branch(m, n, k, r, dtype, stored, exact=True)
        hidden = torch.nn.functional.linear(x.float(), factor(v, v_scale, torch.float32))
        assert torch.equal(cuda.low_rank_hidden(x, v, v_scale), hidden.to(dtype))
        if dtype is not torch.float32:  # a hidden value that is rounded is one in the reference too
            assert hidden.abs().max() < 256
        y = torch.randn(m, n).to(dtype)
        want = kernels.low_rank_linear(y, x, v, u, v_scale, u_scale)
        assert torch.equal(cuda.low_rank_linear(y, x, v, u, v_scale, u_scale), want)


@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_factors(dtype, stored):
    x, v, u, v_scale, u_scale = branch(20, 65, 300, 24, dtype, stored)
    y = torch.randn(2, 10, 65).to(dtype)
    x = x.view(2, 10, 300)
    want = kernels.low_rank_linear(y, x, v, u, v_scale, u_scale)
    got = cuda.low_rank_linear(y, x, v, u, v_scale, u_scale)
    assert got.shape == want.shape and got.dtype is dtype
    exact = [t.double() for t in (factor(v, v_scale, dtype), factor(u, u_scale, dtype))]
    truth = y.double() + x.double() @ exact[0].t() @ exact[1].t()
    error, reference_error = ((t.double() - truth).norm() / truth.norm() for t in (got, want))
    print(f"{dtype}, {stored}: relative error {error:.2e}, of the reference {reference_error:.2e}")
    assert error < 1.1 * reference_error


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_the_linears_epilogue(dtype, stored, tiles, monkeypatch):
    force(monkeypatch, linear, tiles)
    m, n, k, r = 20, 70, 100, 40
    given = operands(m, n, k, "rows", dtype)
    x, v, u, v_scale, u_scale = branch(m, n, k, r, dtype, stored, exact=True)
    y = kernels.int8_linear(*given, dtype)
    want = kernels.low_rank_linear(y, x, v, u, v_scale, u_scale)
    hidden = torch.ops.zq_cuda.low_rank_hidden(x, v, v_scale)
    assert torch.equal(torch.ops.zq_cuda.int8_linear_low_rank(*given, hidden, u, u_scale, dtype), want)
    assert not torch.equal(y, want)
    if dtype is not torch.float32:
        unrounded = kernels.int8_linear(*given, torch.float32) + (want.float() - y.float())
        assert not torch.equal(unrounded.to(dtype), want)  # the linear's result is rounded first


LOW_BIT = {
    "w4a8": (group_products, "int4", 64),
    "w4a8 of rows": (group_products, "int4", 0),
    "fp8": (group_products, "fp4_e2m1", 64),
    "weight alone": (weight_only_linear, "int4", 64),
}


@pytest.mark.parametrize("tiles", [low_bit.TILES, low_bit.SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("stored", [torch.float16, torch.int8])
@pytest.mark.parametrize("kind", LOW_BIT)
def test_in_the_epilogue_of_low_bit_linears(kind, stored, tiles, monkeypatch):
    module, name, group = LOW_BIT[kind]
    force(monkeypatch, module, tiles)
    m, n, k, r = 20, 70, 200, 40
    packed, scale = low_bit.weight(n, k, name, group)
    bias = torch.randn(n)
    for dtype in DTYPES:
        x, v, u, v_scale, u_scale = branch(m, n, k, r, dtype, stored, exact=True)
        if kind == "weight alone":
            host, layout = weight_only_linear.weight_only_linear, weight_only_linear.pack_weight_only
            given, others = (x,), (bias.to(dtype), name, group)
            y = host(x, *layout(packed, scale, name, group, k), *others)
        else:
            x_scale = torch.rand(m, 1) * 0.02
            others = (bias, name, group, dtype)
            if kind == "fp8":
                given = torch.randn(m, k).to(torch.float8_e4m3fn), x_scale
                host, layout = fp8_linear.fp8_linear, functools.partial(fp8_linear.pack_fp8, architecture=80)
            else:
                given = integers(m, k), x_scale
                host, layout = w4a8_linear.w4a8_linear, w4a8_linear.pack_w4a8
            y = host(*given, *layout(packed, scale, name, group, k), *others)
        hidden = torch.ops.zq_cuda.low_rank_hidden(x, v, v_scale)
        got = host(*given, *layout(packed, scale, name, group, k), *others, hidden, u, u_scale)
        want = kernels.low_rank_linear(y, x, v, u, v_scale, u_scale)
        assert y.isfinite().all() and not torch.equal(y, want)
        assert torch.equal(got, want)  # of what the linear alone gives, rounded: its own tests say that it is right


def test_no_rows_and_the_fakes_results():
    x, v, u, v_scale, u_scale = branch(4, 20, 32, 8, torch.float16, torch.int8)
    empty = cuda.low_rank_linear(torch.empty(2, 0, 20).half(), torch.empty(2, 0, 32).half(), v, u, v_scale, u_scale)
    assert empty.shape == (2, 0, 20)
    ops, hidden = torch.ops.zq_cuda, torch.randn(4, 8).half()
    given = *operands(4, 20, 32, "rows", torch.float16), hidden, u, u_scale, torch.float16
    for op, arguments in ((ops.low_rank_hidden, (x, v, v_scale)), (ops.int8_linear_low_rank, given)):
        torch.library.opcheck(op.default, arguments, test_utils="test_faketensor")
