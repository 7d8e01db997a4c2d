"""The four norms that quantize, against float64 formulas."""

import pytest
import torch

from tests.kernels.formulas import CASES, assert_close, assert_quantizes, data, float64, layer_norm, rms_norm
from zq_compiler.kernels import (
    add_layer_norm_quantize,
    add_rms_norm_quantize,
    layer_norm_quantize,
    quantize_per_token,
    rms_norm_quantize,
)

EPS = [1e-5, 0.1]


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(kind, add, shape, dtype, affine, eps):
    x, residual = data(shape, dtype), data(shape, dtype, seed=1)
    weight, bias = (data(shape[-1:], dtype, seed=s) if affine else None for s in (2, 3))
    parameters = (weight, bias) if kind == "layer" else (weight,)
    if add:
        op = add_layer_norm_quantize if kind == "layer" else add_rms_norm_quantize
        q, scale, y, h = op(x, residual, *parameters, eps)
        assert torch.equal(h, x + residual)
    else:
        op = layer_norm_quantize if kind == "layer" else rms_norm_quantize
        q, scale, y = op(x, *parameters, eps)
        h = x
    norm = layer_norm if kind == "layer" else rms_norm
    exact = norm(float64(h), eps, *(float64(p) for p in parameters if p is not None))
    assert y.dtype is dtype
    # one column normalises to zero exactly, so nothing is left there to be relative to but the bias
    assert_close(y, exact, dtype)
    assert_quantizes(q, scale, float64(y), torch.float32)
    want_q, want_scale = quantize_per_token(y)
    assert torch.equal(q, want_q) and torch.equal(scale, want_scale)
