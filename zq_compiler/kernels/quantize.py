"""Quantize and dequantize as graph ops: the explicit stage, between `insert_qdq` and the fusions.

q, scale = zq::quantize_per_token(x)      reads 4 bytes (float32), writes 1 byte and 4/K bytes an element
q        = zq::quantize_static(x, scale)  the same with a calibrated scale
x        = zq::dequantize(q, scale)       the value the following op is computed from
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def quantize_per_token(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`x [..., K] float -> q [..., K] int8, scale [..., 1] float32`; see `numerics.quantize_per_token`."""
    return numerics.quantize_per_token(x, rotated)


@dialect_op
def quantize_per_channel(w: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`w [..., N, K] float -> q int8 of that shape, scale [..., N, 1] float32`; see `numerics.quantize_per_channel`."""
    return numerics.quantize_per_channel(w, rotated)


@dialect_op
def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """`x [...] float, scale float32 that broadcasts -> q [...] int8`; see `numerics.quantize_static`."""
    return numerics.quantize_static(x, scale)


@dialect_op
def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
    """`q [..., K] int8, scale float32 that broadcasts -> x [..., K] dtype`; see `numerics.dequantize`."""
    return numerics.dequantize(q, scale, dtype, rotated)
