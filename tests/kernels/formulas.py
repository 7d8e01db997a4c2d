"""The ops' mathematics in float64 numpy, written from the papers and not from the package."""

from __future__ import annotations

import math

import numpy as np
import torch

from tests.tolerances import HALF_STEP

# (shape, dtype): odd sizes, one column, empty batch, three dimensions, half precisions
CASES = [
    *((shape, torch.float32) for shape in [(5, 7), (1, 1), (3, 1), (2, 3, 33), (0, 8), (64,)]),
    ((3, 17), torch.bfloat16),
    ((3, 17), torch.float16),
]
# Of a value in units of what it is compared with: one rounding of the op's result to its dtype and of what leads there.
RELATIVE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Gaussian rows; where there are several, the first is zero and the last holds one huge outlier."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim > 1 and x.shape[0] > 2:
        x[0] = 0
        x[-1, ..., 0] = 1e4
    return x.to(dtype)


def float64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def layer_norm(
    x: np.ndarray, eps: float, weight: np.ndarray | float = 1.0, bias: np.ndarray | float = 0.0
) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x: np.ndarray, eps: float, weight: np.ndarray | float = 1.0) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def gelu(x: np.ndarray, approximate: str) -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def assert_close(actual: torch.Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    """Within the dtype's rounding, in units of the row's largest magnitude."""
    unit = np.abs(exact).max(-1, keepdims=True, initial=1e-6)
    assert actual.shape == exact.shape
    assert (np.abs(float64(actual) - exact) <= RELATIVE[dtype] * unit).all()


def assert_quantizes(q: torch.Tensor, scale: torch.Tensor, exact: np.ndarray, dtype: torch.dtype) -> None:
    """`q * scale` is `exact` within half a step and the dtype's rounding; the whole range is used."""
    assert q.dtype is torch.int8 and scale.dtype is torch.float32
    assert q.shape == exact.shape and scale.shape == (*exact.shape[:-1], 1)
    unit = np.abs(exact).max(-1, keepdims=True, initial=0)
    slack = RELATIVE[dtype] * unit
    assert (np.abs(float64(scale) * 127 - unit) <= slack + 2e-12).all()
    error = np.abs(float64(q) * float64(scale) - exact)
    assert (error <= HALF_STEP * float64(scale) + slack).all()
    if exact.size:
        used = np.abs(float64(q)).max(-1, keepdims=True)
        assert (used[unit > 1e-9] == 127).all() and (used <= 127).all()
