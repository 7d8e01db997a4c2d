"""SiLU-mul^quant: the gate of a SwiGLU MLP and the quantize of its output, token-wise or static, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def silu_mul_quantize(gate: Tensor, up: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_per_token(silu(gate) * up)`.

    Args:
        gate, up: `[..., K]` float.
        rotated: as in `numerics.quantize_per_token`.

    Returns:
        `q [..., K]` int8, `scale [..., 1]` float32.
    """
    return numerics.quantize_per_token(torch.nn.functional.silu(gate) * up, rotated)


@dialect_op
def silu_mul_quantize_static(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """`quantize_static(silu(gate) * up, scale)`.

    Args:
        gate, up: `[..., K]` float.
        scale: `[1, ..., K]` float32.

    Returns:
        `[..., K]` int8.
    """
    return numerics.quantize_static(torch.nn.functional.silu(gate) * up, scale)
