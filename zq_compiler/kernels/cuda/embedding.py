"""Rows of an INT8 table, gathered and dequantized; with the other embeddings, LayerNorm and quantize in the same pass.

    x = table_q[id] * table_scale[id];  y = layer_norm(x + others);  (q, scale) = quantize_per_token(y, rotated)

A row of the table is read as INT8, once. An id that is none of the table's gives NaN, and reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..embedding import embedding_layer_norm_quantize as dialect_embedding_layer_norm_quantize
from ..embedding import int8_embedding as dialect_int8_embedding
from .arithmetic import EXACT, FLOATS, quantize_rows, rotate, rounded
from .configs import choose_rows, row_config
from .norm_quantize import norm, norm_config
from .registration import broadcast_rows, provides


@triton.jit
def _gather(ids_ptr, table_ptr, table_scale_ptr, rows, features, M, V, K: tl.constexpr):
    """A tile `[M, K]` of dequantized rows; `rows [M, 1]`, `features [1, K]`."""
    ids = tl.load(ids_ptr + rows, mask=rows < M, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    q = tl.load(table_ptr + ids * K + features, mask=(rows < M) & known & (features < K), other=0).to(tl.float32)
    return q * tl.load(table_scale_ptr + ids, mask=known, other=float("nan"))


@triton.jit
def _int8_embedding(
    ids_ptr,
    table_ptr,
    table_scale_ptr,
    x_ptr,
    M,
    V,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.arange(0, BLOCK_K)[None, :]
    x = _gather(ids_ptr, table_ptr, table_scale_ptr, rows, features, M, V, K)
    offsets = rows.to(tl.int64) * K + features
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=(rows < M) & (features < K))


@triton.jit
def _embedding_layer_norm_quantize(
    ids_ptr,
    table_ptr,
    table_scale_ptr,
    others_ptr,
    weight_ptr,
    bias_ptr,
    q_ptr,
    scale_ptr,
    y_ptr,
    M,
    V,
    repeat,
    count,
    eps,
    DTYPE: tl.constexpr,
    ROTATED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    features = tl.arange(0, BLOCK_K)[None, :]
    inside = (rows < M) & (features < K)
    offsets = rows.to(tl.int64) * K + features
    x = rounded(_gather(ids_ptr, table_ptr, table_scale_ptr, rows, features, M, V, K), DTYPE)
    other_rows = (rows // repeat % count).to(tl.int64)
    h = rounded(x + tl.load(others_ptr + other_rows * K + features, mask=inside, other=0.0).to(tl.float32), DTYPE)
    y = rounded(norm(h, inside, features, weight_ptr, bias_ptr, eps, K, False), DTYPE)
    tl.store(y_ptr + offsets, y.to(DTYPE), mask=inside)
    if ROTATED:
        y = rotate(y, BLOCK_M, BLOCK_K)
    q, scale = quantize_rows(y)
    tl.store(q_ptr + offsets, q, mask=inside)
    tl.store(scale_ptr + rows, scale[:, None], mask=rows < M)


@provides(dialect_int8_embedding, contiguous=True)
def int8_embedding(ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`zq::int8_embedding`: `ids [...]`, `table_q [V, K]` int8, `table_scale [V, 1]` -> `[..., K]` of `out_dtype`."""
    m, (v, k) = ids.numel(), table_q.shape
    x = table_q.new_empty((*ids.shape, k), dtype=out_dtype)
    if m:
        config = choose_rows("int8_embedding", x, m, k, row_config(m, k))
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        table = table_q.contiguous(), table_scale.contiguous()
        _int8_embedding[grid](ids.contiguous(), *table, x, m, v, K=k, **config, **EXACT)
    return x


@provides(dialect_embedding_layer_norm_quantize, contiguous=True)
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
    """`zq::embedding_layer_norm_quantize`: ids, table and `others`, float that broadcasts against `[..., K]` -> `q`
    int8, `scale [..., 1]` float32 and `y` of others' dtype."""
    v, k = table_q.shape
    shape = torch.broadcast_shapes((*ids.shape, k), others.shape)
    q = table_q.new_empty(shape)
    scale = table_q.new_empty((*shape[:-1], 1), dtype=torch.float32)
    y = table_q.new_empty(shape, dtype=others.dtype)
    if m := scale.numel():
        config = choose_rows("embedding_layer_norm_quantize", y, m, k, norm_config(m, k))
        grid = (triton.cdiv(m, config["BLOCK_M"]),)
        other_rows, repeat = broadcast_rows(others.expand(*others.shape[:-1], k), shape)
        _embedding_layer_norm_quantize[grid](
            ids.expand(shape[:-1]).contiguous(),
            table_q.contiguous(),
            table_scale.contiguous(),
            other_rows,
            weight.contiguous() if weight is not None else None,
            bias.contiguous() if bias is not None else None,
            q,
            scale,
            y,
            m,
            v,
            repeat,
            other_rows.shape[0],
            eps,
            DTYPE=FLOATS[y.dtype],
            ROTATED=rotated,
            K=k,
            **config,
            **EXACT,
        )
    return q, scale, y
