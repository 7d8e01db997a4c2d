"""GELU^quant: the activation of the MLP and the quantize of its output, token-wise or static, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def gelu_quantize(x: Tensor, approximate: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_per_token(gelu(x))`.

    Args:
        x: `[..., K]` float.
        approximate: `"none"` (erf) or `"tanh"`.
        rotated: as in `numerics.quantize_per_token`.

    Returns:
        `q [..., K]` int8, `scale [..., 1]` float32.
    """
    return numerics.quantize_per_token(torch.nn.functional.gelu(x, approximate=approximate), rotated)


@dialect_op
def gelu_quantize_static(x: Tensor, approximate: str, scale: Tensor) -> Tensor:
    """`quantize_static(gelu(x), scale)` (ZeroQuant-HERO's GELU^quant, feature-wise).

    Args:
        x: `[..., K]` float.
        approximate: `"none"` (erf) or `"tanh"`.
        scale: `[1, ..., K]` float32.

    Returns:
        `[..., K]` int8.
    """
    return numerics.quantize_static(torch.nn.functional.gelu(x, approximate=approximate), scale)
