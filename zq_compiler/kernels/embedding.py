"""Embedding tables stored row-wise in INT8 (ZeroQuant quantizes one row, one vocabulary entry, a scale)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from .registry import dialect_op


@dialect_op
def int8_embedding(ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Rows of a quantized table, as floats.

    Args:
        ids: any shape, integer.
        table_q: `[V, D]` int8.
        table_scale: `[V, 1]` float32.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        `[*ids.shape, D]` of `out_dtype`.
    """
    embed = torch.nn.functional.embedding
    return numerics.dequantize(embed(ids, table_q), embed(ids, table_scale), out_dtype)
