"""int8_linear: the integer sum exactly, the epilogue in the order that is written down."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.formulas import RELATIVE, assert_close, data, float64, gelu
from zq_compiler import torch_private
from zq_compiler.kernels import int8_linear, int8_linear_gelu_quantize
from zq_compiler.kernels.int8_linear import MAX_K


def integers(rng, *shape):
    return rng.integers(-127, 128, shape, dtype=np.int8)


@given(st.integers(0, 9), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_integer_sum_is_exact(m, k, n, seed):
    rng = np.random.default_rng(seed)
    x, w = integers(rng, m, k), integers(rng, n, k)
    # powers of two scale without rounding, and |sum| <= 127^2 * 70 < 2^24 is a float32: the result must be exact
    x_scale, w_scale = np.exp2(rng.integers(-9, 9, (m, 1))), np.exp2(rng.integers(-9, 9, (n, 1)))
    operands = [torch.from_numpy(a) for a in (x, x_scale.astype(np.float32), w, w_scale.astype(np.float32))]
    y = int8_linear(*operands, None, torch.float32)
    exact = (x.astype(np.int64) @ w.astype(np.int64).T) * x_scale * w_scale.T
    np.testing.assert_array_equal(y.numpy(), exact)


def test_extremes_do_not_overflow():
    k = 4096
    x, w = torch.full((2, k), -127, dtype=torch.int8), torch.full((3, k), 127, dtype=torch.int8)
    one = torch.ones(1, 1)
    y = int8_linear(x, one.expand(2, 1), w, one.expand(3, 1), None, torch.float32)
    assert (y == float(np.float32(-127 * 127 * k))).all()
    assert 255 * 128 * MAX_K < 2**31 <= 255 * 128 * (MAX_K + 1)


@pytest.mark.parametrize("has_vnni", [False, True])
@pytest.mark.parametrize("k", [1, 7, 1024, 1025, 3000])
def test_the_sum_is_exact_with_and_without_vnni(k, has_vnni, monkeypatch):
    monkeypatch.setattr(torch_private, "_HAS_VNNI", has_vnni)
    rng = np.random.default_rng(k)
    extremes = np.full((2, k), -128, np.int8), np.full((k, 3), -128, np.int8)
    for a, b in (extremes, (integers(rng, 5, k), integers(rng, k, 4))):
        got = torch_private.int_mm(torch.from_numpy(a), torch.from_numpy(b))
        assert got.dtype is torch.int32
        np.testing.assert_array_equal(got.numpy(), a.astype(np.int64) @ b.astype(np.int64))


def test_the_epilogue_multiplies_by_the_weights_scale_first():
    rng = np.random.default_rng(0)
    x, w = integers(rng, 5, 33), integers(rng, 7, 33)
    x_scale, w_scale, bias = (rng.random(s, dtype=np.float32) for s in ((5, 1), (7, 1), (7,)))
    acc = (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32)
    want = (acc * w_scale.T) * x_scale + bias
    got = int8_linear(*map(torch.from_numpy, (x, x_scale, w, w_scale, bias)), torch.float32)
    np.testing.assert_array_equal(got.numpy(), want)
    half = int8_linear(
        *map(torch.from_numpy, (x, x_scale, w, w_scale)), torch.from_numpy(bias).bfloat16(), torch.bfloat16
    )
    assert_close(half, acc.astype(np.float64) * w_scale.T * x_scale + bias, torch.bfloat16)


@pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3), (2, 0, 3), (1, 2, 1, 3)])
def test_leading_dimensions(lead):
    x, w = torch.ones(*lead, 8, dtype=torch.int8), torch.ones(5, 8, dtype=torch.int8)
    y = int8_linear(x, torch.ones(*lead, 1), w, torch.ones(5, 1), None, torch.float32)
    assert y.shape == (*lead, 5) and (y == 8).all()


def test_rows_that_are_not_contiguous():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(integers(rng, 6, 4, 16)).transpose(0, 1)
    w, scale = torch.from_numpy(integers(rng, 5, 16)), torch.rand(6, 4, 1).transpose(0, 1)
    y = int8_linear(x, scale, w, torch.ones(5, 1), None, torch.float32)
    assert_close(y, float64(x) @ float64(w).T * float64(scale), torch.float32)


def test_a_nan_scale_gives_its_row_nan():
    x, w = torch.zeros(2, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)
    scale = torch.tensor([[1.0], [float("nan")]])
    y = int8_linear(x, scale, w, torch.ones(3, 1), data((3,)), torch.float32)
    assert y.isnan().any(-1).tolist() == [False, True] and y[1].isnan().all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_scales", [True, False])
def test_gelu_and_its_quantize_in_the_epilogue(row_scales, dtype, approximate):
    rng = np.random.default_rng(0)
    x, w = integers(rng, 40, 33), integers(rng, 7, 33)
    x_scale, w_scale, bias = (rng.random(s, dtype=np.float32) / 50 for s in ((40, 1), (7, 1), (7,)))
    out_scale = rng.random((1, 7), dtype=np.float32) / 50 + 0.001
    rows = x_scale if row_scales else None
    y = (x.astype(np.int64) @ w.astype(np.int64).T) * w_scale.astype(np.float64).T
    y = (y * x_scale if row_scales else y) + bias
    exact = gelu(y, approximate)
    steps = (exact / out_scale).clip(-128, 127)
    arguments = (torch.from_numpy(a) if a is not None else None for a in (x, rows, w, w_scale, bias))
    q = int8_linear_gelu_quantize(*arguments, dtype, approximate, torch.from_numpy(out_scale))
    slack = RELATIVE[dtype] * np.maximum(np.abs(y), 1e-6) / out_scale
    assert q.dtype is torch.int8 and q.shape == (40, 7)
    assert (np.abs(float64(q) - steps) <= 0.5 + 1e-3 + 2 * slack).all()
    assert steps.max() == 127 and (np.abs(steps) < 100).mean() > 0.3  # saturated ones and others


def test_gelu_in_the_epilogue_of_a_nan_row_gives_zeros():
    x, w = torch.ones(2, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)
    scale = torch.tensor([[1.0], [float("nan")]])
    q = int8_linear_gelu_quantize(x, scale, w, torch.ones(3, 1), None, torch.float32, "none", torch.ones(1, 3))
    assert q.tolist() == [[4, 4, 4], [0, 0, 0]]


def test_the_sum_is_exact_under_autocast(monkeypatch):
    monkeypatch.setattr(torch_private, "_HAS_VNNI", False)
    rng = np.random.default_rng(0)
    a, b = integers(rng, 5, 256), integers(rng, 256, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch_private.int_mm(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_array_equal(got.numpy(), a.astype(np.int64) @ b.astype(np.int64))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 64), (3, 9, 5), (17, 8, 16), (40, 33, 24)])
def test_products_are_padded_to_what_cublas_takes(m: int, k: int, n: int, monkeypatch):
    def strict(a, b):
        assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0 and a.shape[1] == b.shape[0]
        return a.int() @ b.int()

    monkeypatch.setattr(torch, "_int_mm", strict)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n)))
    assert torch.equal(torch_private._int_mm_cuda(a, b), a.int() @ b.int())


def test_products_on_cuda_are_traced_without_a_gpu():
    with torch_private.FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.int8, device="cuda") for shape in ((3, 9), (9, 5)))
        y = torch_private.int_mm(a, b)
    assert (y.shape, y.dtype, y.device.type) == ((3, 5), torch.int32, "cuda")
