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
    return _rows(ids, table_q, table_scale, out_dtype)


@dialect_op
def embedding_layer_norm_quantize(
    ids: Tensor,
    table_q: Tensor,
    table_scale: Tensor,
    others: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first LN^quant of an encoder: token rows in INT8, plus position and type rows, normalised and quantized.

    Args:
        ids: `[..., T]` integer.
        table_q: `[V, K]` int8.
        table_scale: `[V, 1]` float32.
        others: float that broadcasts against `[..., T, K]`: the sum of the other embeddings.
        weight, bias: `[K]` or None.
        eps, rotated: as in `layer_norm_quantize`.

    Returns:
        As `layer_norm_quantize`.
    """
    h = _rows(ids, table_q, table_scale, others.dtype) + others
    y = torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return (*numerics.quantize_per_token(y, rotated), y)


def _rows(ids: Tensor, table_q: Tensor, table_scale: Tensor, dtype: torch.dtype) -> Tensor:
    embed = torch.nn.functional.embedding
    return numerics.dequantize(embed(ids, table_q), embed(ids, table_scale), dtype)
