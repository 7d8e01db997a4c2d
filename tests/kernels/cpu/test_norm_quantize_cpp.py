"""The norm kernel: h bit-equal to the reference, y within its rounding, and integers exactly those of its own y."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zq_compiler import numerics
from zq_compiler.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# float32 norms differ in the last places; where that crosses a tie, an integer differs. Measured: 6e-7 of them.
MAX_DIFFERING = 2e-5
# A last-place difference that crosses a tie of the half dtype moves y by one unit of it. Measured: 3e-4 of them.
MAX_ROUNDED_ELSEWHERE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def kernel(x, residual=None, weight=None, bias=None, eps=1e-5, rms=False, want_y=True, want_h=True, rotated=False):
    return torch.ops.zq_cpu.norm_quantize(x, residual, weight, bias, eps, rms, want_y, want_h, rotated)


def exact_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """The norm in float64."""
    h = h.double()
    if not rms:
        h = h - h.mean(-1, keepdim=True)
    y = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y * weight.double() if weight is not None else y
    return y + bias.double() if bias is not None else y


def reference_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    if rms:
        return torch.nn.functional.rms_norm(h, h.shape[-1:], weight, eps)
    return torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)


def operands(rows, k, dtype, residual=True, weight=True, bias=True, rms=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(*rows, k, generator=g).to(dtype) for _ in range(2))
    w, b = (torch.randn(k, generator=g).to(dtype) for _ in range(2))
    return x, r if residual else None, w if weight else None, b if bias and not rms else None


def assert_quantized(q: Tensor, scale: Tensor, y: Tensor, rotated: bool = False) -> None:
    q_ref, scale_ref = numerics.quantize_per_token(y, rotated)
    assert torch.equal(q, q_ref)
    torch.testing.assert_close(scale, scale_ref, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.tuples(*[st.booleans()] * 4),
    st.integers(0, 2**31),
)
def test_any_shape(rows, k, dtype, flags, seed):
    residual, weight, bias, rms = flags
    x, r, w, b = operands(rows, k, dtype, residual, weight, bias, rms, seed)
    q, scale, y, h = kernel(x, r, w, b, rms=rms)
    assert torch.equal(h, x if r is None else x + r)
    assert_quantized(q, scale, y)
    exact = exact_norm(h, w, b, 1e-5, rms)
    half_step = torch.finfo(dtype).eps / 2 * exact.abs()
    # sqrt(K) bounds |y| before the weight; a mean near the values themselves loses their common digits (K = 2)
    assert ((y.double() - exact).abs() <= half_step * 1.001 + 3e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_against_the_reference_at_model_sizes(dtype, rms, capsys):
    x, r, w, b = operands((2, 256), 768, dtype, rms=rms)
    q, scale, y, h = kernel(x, r, w, b, rms=rms)
    assert torch.equal(h, x + r)
    y_ref = reference_norm(h, w, b, 1e-5, rms)
    q_ref, _ = numerics.quantize_per_token(y_ref)
    assert_quantized(q, scale, y)
    differing = (q != q_ref).double().mean().item()
    elsewhere = (y != y_ref).double().mean().item()
    with capsys.disabled():
        print(f"\n{dtype} rms={rms}: {differing:.1e} of the integers and {elsewhere:.1e} of y differ", end=" ")
    assert (q.int() - q_ref.int()).abs().max() <= 1
    if dtype is torch.float32:
        assert differing <= MAX_DIFFERING
        torch.testing.assert_close(y, y_ref, rtol=2e-6, atol=2e-6)
        exact = exact_norm(h, w, b, 1e-5, rms)
        assert (y - exact).abs().max() <= 1.5 * (y_ref - exact).abs().max() + 1e-7  # as accurate as torch
    else:
        assert elsewhere <= MAX_ROUNDED_ELSEWHERE and differing <= MAX_ROUNDED_ELSEWHERE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 48, 768])
def test_rotated(k, dtype):
    """The integers are those of the rotated y; y itself, which the next residual reads, is not rotated."""
    x, r, w, b = operands((40,), k, dtype)
    q, scale, y, h = kernel(x, r, w, b, rotated=True)
    _, _, y_plain, h_plain = kernel(x, r, w, b)
    assert torch.equal(y, y_plain) and torch.equal(h, h_plain)
    assert_quantized(q, scale, y, rotated=True)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
def test_variance_of_a_row_far_from_zero(offset):
    x = torch.randn(4, 1024) + offset
    y = kernel(x)[2]
    assert (y - exact_norm(x, None, None, 1e-5, False)).abs().max() < 2e-6 + 2e-7 * offset


def test_mixed_parameter_dtypes():
    """A float32 norm in a bfloat16 model."""
    x, r, w, b = operands((3,), 65, torch.bfloat16)
    w, b = w.float() + 1e-3, b.float() + 1e-3
    q, scale, y, _ = kernel(x, r, w, b)
    assert_quantized(q, scale, y)
    expected = exact_norm(x + r, w, b, 1e-5, False).to(torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3)


@pytest.mark.parametrize("want_y", [False, True])
@pytest.mark.parametrize("want_h", [False, True])
def test_unwanted_outputs_are_empty(want_y, want_h):
    x, r, w, b = operands((4,), 33, torch.float32)
    full = kernel(x, r, w, b)
    q, scale, y, h = kernel(x, r, w, b, want_y=want_y, want_h=want_h)
    assert torch.equal(q, full[0]) and torch.equal(scale, full[1])
    assert torch.equal(y, full[2]) if want_y else y.shape == (0,)
    assert torch.equal(h, full[3]) if want_h else h.shape == (0,)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 16, 36])
def test_poisoned_row(bad, dtype, place, rms):
    x, r, w, b = operands((3,), 37, dtype, rms=rms)
    clean = kernel(x, r, w, b, rms=rms)
    x[1, place] = bad
    q, scale, y, _ = kernel(x, r, w, b, rms=rms)
    assert scale[1].isnan().all() and not q[1].any() and y[1, place].isnan()
    for row in (0, 2):
        assert torch.equal(q[row], clean[0][row]) and torch.equal(y[row], clean[2][row])


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_outliers(dtype, rms):
    x = torch.zeros(3, 40, dtype=dtype)
    x[1, 7] = 3e4
    x[2] = 5.0
    q, scale, y, _ = kernel(x, rms=rms)
    assert not q[0].any() and not y[0].any() and scale[0] == numerics.AMAX_FLOOR * torch.tensor(numerics.INT8_STEP)
    assert_quantized(q, scale, y)
    assert q[1, 7] == 127
    assert not y[2].any() if not rms else torch.equal(q[2], torch.full((40,), 127, dtype=torch.int8))


@pytest.mark.parametrize("threads", [1, 3])
def test_strides_and_threads(threads):
    """A slice of a wider tensor is read in place, anything else is copied; no rows give no rows."""
    wide = torch.randn(6, 50, 900)
    inputs = [wide[..., 100:868], wide[:, ::2, :768], wide.transpose(0, 1)[..., :768], wide.transpose(1, 2), wide[2:2]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in inputs:
            results = kernel(x, x)
            for actual, expected in zip(results, kernel(x.contiguous(), x.contiguous()), strict=True):
                assert torch.equal(actual, expected) and actual.is_contiguous()
            assert results[0].shape == x.shape
    finally:
        torch.set_num_threads(before)


def test_fake_matches_the_kernel():
    x, r, w, b = operands((2, 3), 20, torch.bfloat16)
    for want in ((True, False), (False, True)):
        args = x, r, w, b, 1e-5, False, *want
        torch.library.opcheck(
            torch.ops.zq_cpu.norm_quantize.default, args, test_utils=("test_schema", "test_faketensor")
        )


ERRORS = {
    "x must be Float, BFloat16 or Half": dict(x=torch.zeros(2, 8, dtype=torch.float64)),
    "rotated row must have a multiple of 16": dict(rotated=True),
    "K at least 1": dict(x=torch.zeros(2, 0), residual=None),
    r"residual must be \[2, 8\]": dict(residual=torch.zeros(8)),
    "residual must be Float": dict(residual=torch.zeros(2, 8, dtype=torch.float16)),
    r"weight must be \[8\]": dict(weight=torch.zeros(7)),
    "bias must be a float dtype": dict(bias=torch.zeros(8, dtype=torch.int32)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    good = dict(x=torch.zeros(2, 8), residual=torch.zeros(2, 8), weight=torch.ones(8), bias=torch.ones(8))
    kernel(**good)
    with pytest.raises(RuntimeError, match=message):
        kernel(**good | ERRORS[message])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.tuples(*[st.booleans()] * 4),
    st.integers(0, 2**31),
)
def test_integer_summands(rows, k, dtype, flags, seed):
    """x feature-wise, the residual token-wise, either or both: h is the sum of what they stand for, bit for bit."""
    x_integer, residual_integer, residual_rotated, rms = flags
    residual_rotated = residual_rotated and residual_integer and k % 16 == 0
    x, r, w, b = operands(rows, k, dtype, rms=rms, seed=seed)
    x_scale = (torch.rand(k) / 50).reshape([1] * len(rows) + [k]) if x_integer else None
    if x_integer:
        x = numerics.quantize_static(x, x_scale)
    residual_scale = None
    if residual_integer:
        r, residual_scale = numerics.quantize_per_token(r, residual_rotated)
    summands = (x, x_scale, False), (r, residual_scale, residual_rotated)
    floats = [t if s is None else numerics.dequantize(t, s, dtype, rotated) for t, s, rotated in summands]
    q, scale, y, h = torch.ops.zq_cpu.norm_quantize(
        x, r, w, b, 1e-5, rms, True, True, k % 16 == 0, x_scale, residual_scale, residual_rotated, dtype
    )
    assert h.dtype is y.dtype is dtype
    assert torch.equal(h, floats[0] + floats[1])
    assert_quantized(q, scale, y, rotated=k % 16 == 0)
    from_floats = kernel(*floats, w, b, rms=rms)
    assert torch.equal(y, from_floats[2])


def test_integer_summands_need_scales_that_fit():
    x = torch.ones(2, 32, dtype=torch.int8)
    call = torch.ops.zq_cpu.norm_quantize
    with pytest.raises(RuntimeError, match="scale of x must have 32 elements"):
        call(x, None, None, None, 1e-5, False, True, True, False, torch.ones(31), None, False, torch.float32)
    with pytest.raises(RuntimeError, match="x must be Float"):
        call(x, None, None, None, 1e-5, False, True, True, False, None, None, False, torch.float32)
    with pytest.raises(RuntimeError, match="scale of residual must have 2 elements"):
        scales = torch.ones(32), torch.ones(3)
        call(x, x, None, None, 1e-5, False, True, True, False, *scales, False, torch.float32)
