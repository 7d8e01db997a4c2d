"""The norm kernel: h bit-equal to the reference, y within its rounding, and integers exactly those of its own y."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.interpreter.rows import (
    DTYPES,
    MAX_DIFFERING,
    assert_at_most_a_step,
    assert_each_byte_once,
    assert_like_its_fake,
)
from tests.cuda.interpreter.sanitizer import counted
from zq_compiler import kernels, numerics
from zq_compiler.kernels.cuda.norm_quantize import norm_quantize

EPS = 1e-5
SHAPES = [(5, 100), (2, 3, 48), (2, 1100), (1, 1)]


def operands(shape, dtype, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    w, b = (torch.randn(shape[-1], generator=g).to(dtype) for _ in range(2))
    return x, r, w, b


def exact_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    h = h.double()
    if not rms:
        h = h - h.mean(-1, keepdim=True)
    y = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = y * weight.double() if weight is not None else y
    return y + bias.double() if bias is not None else y


def assert_norm(results: tuple[Tensor, ...], h: Tensor, weight, bias, rms: bool, rotated: bool = False) -> None:
    q, scale, y, h_out = results
    assert torch.equal(h_out, h)
    exact = exact_norm(h, weight, bias, rms)
    assert ((y.double() - exact).abs() <= torch.finfo(y.dtype).eps / 2 * 1.001 * exact.abs() + 1e-5).all()
    q_of_y, scale_of_y = numerics.quantize_per_token(y, rotated)
    assert torch.equal(q, q_of_y) and torch.equal(scale, scale_of_y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape, rms, dtype):
    x, r, w, b = operands(shape, dtype)
    rotated = shape[-1] % 16 == 0
    bias = None if rms else b
    results = norm_quantize(x, r, w, bias, EPS, rms, True, True, rotated)
    assert_norm(results, x + r, w, bias, rms, rotated)
    if rms:
        expected = kernels.add_rms_norm_quantize(x, r, w, EPS, rotated)
    else:
        expected = kernels.add_layer_norm_quantize(x, r, w, b, EPS, rotated)
    assert_at_most_a_step(results[0], expected[0], f"{dtype} rms={rms}")
    assert torch.equal(results[3], expected[3])
    assert (results[2] != expected[2]).double().mean() <= MAX_DIFFERING or dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_norms_without_residual_or_parameters(dtype, rms):
    x, _, w, b = operands((3, 100), dtype)
    for weight, bias in ((None, None), (w, None), (w, b)):
        results = norm_quantize(x, None, weight, bias, EPS, rms, True, True)
        assert_norm(results, x, weight, bias, rms)
    if rms:
        expected = kernels.rms_norm_quantize(x, w, EPS)
        results = norm_quantize(x, None, w, None, EPS, True, True, True)
    else:
        expected = kernels.layer_norm_quantize(x, w, b, EPS)
    assert_at_most_a_step(results[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 48)])
def test_integer_summands(shape, integers, dtype):
    """x feature-wise, the residual token-wise: h is the sum of what they stand for, bit for bit."""
    x, r, w, b = operands(shape, dtype, seed=1)
    rotated = shape[-1] % 16 == 0
    x_scale = residual_scale = None
    if integers[0]:
        x_scale = torch.rand([1] * (len(shape) - 1) + [shape[-1]]) / 50 + 1e-3
        x = numerics.quantize_static(x, x_scale)
    if integers[1]:
        r, residual_scale = numerics.quantize_per_token(r, rotated)
    scales = x_scale, residual_scale, rotated and integers[1], dtype
    results = norm_quantize(x, r, w, b, EPS, False, True, True, rotated, *scales)
    expected = kernels.int8_add_layer_norm_quantize(
        x, x_scale, r, residual_scale, rotated and integers[1], w, b, EPS, rotated, dtype
    )
    assert_norm(results, expected[3], w, b, False, rotated)
    assert_at_most_a_step(results[0], expected[0])
    results = norm_quantize(x, r, w, None, EPS, True, True, True, rotated, *scales)
    expected = kernels.int8_add_rms_norm_quantize(
        x, x_scale, r, residual_scale, rotated and integers[1], w, EPS, rotated, dtype
    )
    assert_norm(results, expected[3], w, None, True, rotated)
    assert_at_most_a_step(results[0], expected[0])


def test_one_scale_for_all_features():
    x = torch.randint(-128, 128, (3, 48), dtype=torch.int8)
    scale = torch.tensor([[0.03]])
    results = norm_quantize(x, None, None, None, EPS, False, True, True, False, scale, dtype=torch.float16)
    assert_norm(results, numerics.dequantize(x, scale, torch.float16), None, None, False)


@pytest.mark.parametrize("want_y", [False, True])
@pytest.mark.parametrize("want_h", [False, True])
def test_unwanted_outputs_are_empty_and_each_byte_moves_once(want_y, want_h):
    x, r, w, b = operands((6, 700), torch.float16)
    full = norm_quantize(x, r, w, b, EPS, False, True, True)
    with counted() as traffic:
        q, scale, y, h = norm_quantize(x, r, w, b, EPS, False, want_y, want_h)
    assert torch.equal(q, full[0]) and torch.equal(scale, full[1])
    assert torch.equal(y, full[2]) if want_y else y.shape == (0,)
    assert torch.equal(h, full[3]) if want_h else h.shape == (0,)
    written = {"q_ptr": q, "scale_ptr": scale}
    written |= {"y_ptr": y} if want_y else {}
    written |= {"h_ptr": h} if want_h else {}
    assert_each_byte_once(traffic, {"x_ptr": x, "residual_ptr": r}, written, cached=(w, b))


def test_integer_summands_move_a_byte_an_element():
    x, r = torch.randint(-128, 128, (2, 4, 700), dtype=torch.int8)
    x_scale, residual_scale = torch.rand(1, 700), torch.rand(4, 1)
    with counted() as traffic:
        q, scale, _, _ = norm_quantize(
            x, r, None, None, EPS, True, False, False, False, x_scale, residual_scale, dtype=torch.bfloat16
        )
    read = {"x_ptr": x, "residual_ptr": r, "residual_scale_ptr": residual_scale}
    assert_each_byte_once(traffic, read, {"q_ptr": q, "scale_ptr": scale}, cached=(x_scale,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
def test_poison_stays_in_its_row(dtype, rms):
    x, r, w, _ = operands((5, 37), dtype)
    clean = norm_quantize(x, r, w, None, EPS, rms, True, True)
    x[1, 36], r[3, 0] = torch.nan, -torch.inf
    q, scale, y, _ = norm_quantize(x, r, w, None, EPS, rms, True, True)
    for row, place in ((1, 36), (3, 0)):
        assert scale[row].isnan() and not q[row].any() and y[row, place].isnan()
    for row in (0, 2, 4):
        assert torch.equal(q[row], clean[0][row]) and torch.equal(y[row], clean[2][row])


def test_zeros_and_rows_far_from_zero():
    x = torch.zeros(3, 1000)
    x[1] = 5.0
    x[2] = torch.randn(1000) + 1e4
    q, scale, y, _ = norm_quantize(x, None, None, None, EPS, False, True, True)
    assert not q[:2].any() and not y[:2].any()
    assert scale[0] == numerics.AMAX_FLOOR * torch.tensor(numerics.INT8_STEP)
    assert (y[2] - exact_norm(x[2], None, None, False)).abs().max() < 3e-3  # float32 holds x to 5e-4


def test_parameters_of_another_dtype():
    """A float32 norm in a bfloat16 model."""
    x, r, w, b = operands((3, 65), torch.bfloat16)
    w, b = w.float() + 1e-3, b.float() + 1e-3
    assert_norm(norm_quantize(x, r, w, b, EPS, False, True, True), x + r, w, b, False)


def test_strides():
    """A slice of a wider tensor is read in place, anything else is copied; no rows give no rows."""
    wide = torch.randn(2, 3, 2 * 64)
    half, w = wide[..., 64:], torch.randn(64)
    with counted() as traffic:
        results = norm_quantize(half, None, w, None, EPS, True, False, False)
    assert traffic.launches[0].read["x_ptr"] == half.numel() * 4 == traffic.unique_read - w.nbytes
    for x in (half, wide.transpose(0, 1)[..., :64], torch.randn(2, 64, 3).transpose(1, 2), wide[2:, :, :64]):
        results = norm_quantize(x, x, w, None, EPS, True, True, True)
        expected = norm_quantize(x.contiguous(), x.contiguous(), w, None, EPS, True, True, True)
        for actual, same in zip(results, expected, strict=True):
            assert torch.equal(actual, same) and actual.is_contiguous()
        assert results[0].shape == x.shape


def test_fake():
    x, r, w, b = operands((2, 3, 20), torch.float16)
    op = torch.ops.zq_cuda.norm_quantize.default
    for want in ((True, False), (False, True)):
        assert_like_its_fake(op, x, r, w, b, EPS, False, *want)
        assert_like_its_fake(op, x.transpose(0, 1), r.transpose(0, 1), w, b, EPS, False, *want)
