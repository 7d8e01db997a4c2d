"""Quantize and dequantize as graph ops: the explicit stage, between `insert_qdq` and the fusions.

q, scale = zq::quantize_per_token(x)      reads 4 bytes (float32), writes 1 byte and 4/K bytes an element
q        = zq::quantize_static(x, scale)  the same with a calibrated scale
x        = zq::dequantize(q, scale)       the value the following op is computed from

Weights of other formats than INT8 a row are packed: `quantize_weight` and `dequantize_weight`. A pass that rounds a
weight otherwise than to the nearest leaves `chosen_weight` in place of its quantize.
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
def quantize_static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """`x [...] float, scale float32 that broadcasts -> q [...] float8_e4m3fn`; see `numerics.quantize_static_fp8`."""
    return numerics.quantize_static_fp8(x, scale)


@dialect_op
def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
    """`q [..., K] int8, scale float32 that broadcasts -> x [..., K] dtype`; see `numerics.dequantize`."""
    return numerics.dequantize(q, scale, dtype, rotated)


@dialect_op
def quantize_weight(
    w: Tensor,
    format: str,
    group: int,
    rotated: bool = False,
    scale_constraint: str = "none",
    scale_rounding: str = "ceil",
) -> tuple[Tensor, Tensor]:
    """`w [N, K] float -> packed [N, bytes] uint8, scale [N, G]`; see `numerics.quantize_weight`."""
    return numerics.quantize_weight(w, format, group, rotated, scale_constraint, scale_rounding)


@dialect_op
def dequantize_weight(
    w_packed: Tensor,
    w_scale: Tensor,
    format: str,
    group: int,
    features: int,
    dtype: torch.dtype,
    rotated: bool = False,
) -> Tensor:
    """`w_packed [N, bytes] uint8, w_scale [N, G] -> w [N, features] dtype`; see `numerics.dequantize_weight`."""
    return numerics.dequantize_weight(w_packed, w_scale, format, group, features, dtype, rotated)


@dialect_op
def quantize_per_token_int4(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`x [..., K] float -> q [..., K] int8, scale [..., 1] float32`; see `numerics.quantize_per_token_int4`."""
    return numerics.quantize_per_token_int4(x, rotated)


@dialect_op
def chosen_weight(w: Tensor, q: Tensor, scale: Tensor, packed: bool, rotated: bool) -> tuple[Tensor, Tensor]:
    """Integers and scales that a pass has chosen for `w [N, K]`, in place of those that its quantize would choose.

    They are that quantize's results, of `quantize_weight` where `packed`, else of `quantize_per_channel`; w stays, for
    what makes up for their error.
    """
    return q.clone(), scale.clone()


@dialect_op
def quantize_per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., K] float -> q [..., K] float8_e4m3fn, scale [..., 1] float32`; see `numerics.quantize_per_token_fp8`."""
    return numerics.quantize_per_token_fp8(x)
