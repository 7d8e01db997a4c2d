"""GELU^quant, token-wise: the activation of the MLP and the quantize of its output in one pass over the row."""

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
