"""The dialect's ops in ONNX Runtime's terms: one function an op, written in torch plus a few standard ONNX operators.

The functions stand in for the dialect's ops when the graph is traced for export. What is memory-bound stays plain
torch, which the exporter turns into the operators that ONNX Runtime knows and fuses (LayerNormalization, Gelu). Only
the integers are written as ONNX operators by hand:

    a = max(|row|);  u8 = QuantizeLinear(x / a, 1/127, 128);  MatMulInteger(u8, s8, 128) -> int32;  float32 epilogue

Activations are stored as unsigned integers, `u8 = s8 + 128`, because ONNX Runtime's x86 kernels are ten times slower
on signed ones. The products are the same integers. They are exact where the CPU has VNNI; with the older AVX2 and
AVX-512 instructions they are under the session option `session.x64quantprecision`, and may saturate otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
import torch
from onnxscript import opset18 as op
from torch import Tensor

from .. import kernels
from ..errors import ExportError
from ..numerics import AMAX_FLOOR, INT8_STEP, ROTATION, rotate
from ..torch_private import OpOverload

ZERO_POINT = 128  # u8 = s8 + 128


def quantize_per_token(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """`x [..., K] float -> u8 [..., K], scale [..., 1] float32`, the integers of `numerics.quantize_per_token`.

    A rotation is one product with a 16 x 16 matrix: it sums in another order than `numerics.rotate`.
    """
    x = _rotate(x.float()) if rotated else x.float()
    a = x.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    normalised = x / a
    # ONNX Runtime's ReduceMax loses NaN, its ReduceSum keeps it; the sum of a row in [-1, 1] cannot overflow.
    poison = normalised.sum(-1, keepdim=True)
    a = a + (poison - poison)
    step, zero = torch.tensor(INT8_STEP), torch.tensor(ZERO_POINT, dtype=torch.uint8)
    q = _operator("QuantizeLinear", (normalised, step, zero), torch.uint8, x.shape)
    return q, a * INT8_STEP


def _rotate(x: Tensor) -> Tensor:
    return (x.unflatten(-1, (x.shape[-1] // ROTATION, ROTATION)) @ rotate(torch.eye(ROTATION))).flatten(-2)


def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """`x float -> u8`, the integers of `numerics.quantize_static`; one division whatever the layout of the scales."""
    return _rounded(x.float() / scale)


def _rounded(x: Tensor, zero_point: int = ZERO_POINT) -> Tensor:
    """Integers nearest to `x + zero_point`, half to even, saturated to [0, 255]."""
    one, zero = torch.tensor(1.0), torch.tensor(zero_point, dtype=torch.uint8)
    return _operator("QuantizeLinear", (x, one, zero), torch.uint8, x.shape)


def int8_linear(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """`kernels.int8_linear` with `x_q [..., K]` unsigned, `w_q [K, N]` as MatMulInteger reads it, `w_scale [N]`."""
    return _linear(x_q, x_scale, w_q, w_scale, bias).to(out_dtype)


def int8_linear_quantize(
    x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`kernels.int8_linear_quantize`, operands as `int8_linear` has them."""
    return _rounded(_linear(x_q, x_scale, w_q, w_scale, bias))


def int8_linear_gelu_quantize(
    x_q: Tensor,
    x_scale: Tensor | None,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    approximate: str,
    out_scale: Tensor,
) -> Tensor:
    """`kernels.int8_linear_gelu_quantize`, operands as `int8_linear` has them."""
    y = _linear(x_q, x_scale, w_q, w_scale, bias).to(dtype)
    return gelu_quantize_static(y, approximate, out_scale)


def _linear(x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    if x_q.dtype is not torch.uint8:
        raise ExportError("an INT8 linear reads integers that no quantize made", fix="report this graph as a bug")
    zero = torch.tensor(ZERO_POINT, dtype=torch.uint8)
    acc = _operator("MatMulInteger", (x_q, w_q, zero), torch.int32, (*x_q.shape[:-1], w_q.shape[1]))
    y = acc.float() * w_scale
    if x_scale is not None:
        y = y * x_scale
    return y if bias is None else y + bias.float()


def int8_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_scale: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
    out_scale: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """`kernels.int8_attention` with unsigned operands; an INT8 result is unsigned too."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (_repeated(x, groups) for x in (key, value))
    a = _integer_product(query, key.transpose(-2, -1)).float() * score_scale
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else a + mask.float()
    if is_causal:
        a = a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).tril().logical_not(), -torch.inf)
    top = a.amax(-1, keepdim=True)
    e = torch.exp(a - top.masked_fill(top == -torch.inf, 0.0))
    total = e.sum(-1, keepdim=True).clamp(min=1.0)  # exp(0) is in it, unless the row is wholly masked
    if probability_scale is not None:
        out = _integer_product(_rounded(e / total / probability_scale, 0), value, 0).float() * out_scale
    else:
        out = _integer_product(_rounded(e * 255, 0), value, 0).float() * out_scale * (1 / (255 * total))
    return _rounded(out) if out_dtype is torch.int8 else out.to(out_dtype)


def _integer_product(a: Tensor, b: Tensor, a_zero: int = ZERO_POINT) -> Tensor:
    """Of unsigned `a [..., M, K]` and `b [..., K, N]`, both without their zero points."""
    zeros = torch.tensor(a_zero, dtype=torch.uint8), torch.tensor(ZERO_POINT, dtype=torch.uint8)
    return _operator("MatMulInteger", (a, b, *zeros), torch.int32, (*a.shape[:-1], b.shape[-1]))


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each head of `[B, H, S, D]` `groups` times."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def int8_embedding(ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`kernels.int8_embedding` with `table_scale [V]`."""
    rows = torch.nn.functional.embedding(ids, table_q)
    return (rows.float() * _scales(table_scale, ids)).to(out_dtype)


def int8_embedding_transposed(ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The same with `table_q [D, V]`: a table tied to a linear is stored once, as the linear reads it."""
    rows = table_q.index_select(1, ids.reshape(-1)).t().reshape(*ids.shape, table_q.shape[0])
    return (rows.float() * _scales(table_scale, ids)).to(out_dtype)


def _scales(table_scale: Tensor, ids: Tensor) -> Tensor:
    return table_scale.index_select(0, ids.reshape(-1)).reshape(*ids.shape, 1)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
    """Of activations (`q` unsigned, `scale [..., 1]`), or of a weight (`q [N, K]` signed, `scale [N]`)."""
    if q.dtype is torch.uint8:
        x = (q.float() - ZERO_POINT) * scale
    else:  # as an operator: arithmetic on a constant would be folded, and the file would hold a float copy
        zeros = torch.zeros(q.shape[0], dtype=torch.int8)  # ONNX Runtime puts a wrong one where it has none to shift
        x = _operator("DequantizeLinear", (q, scale, zeros), torch.float32, q.shape, {"axis": 0})
    return (_rotate(x) if rotated else x).to(dtype)


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
    """See `kernels.embedding_layer_norm_quantize`; a table tied to a linear is `[D, V]`, as that reads it."""
    lookup = int8_embedding if table_q.shape[0] == table_scale.shape[0] else int8_embedding_transposed
    h = lookup(ids, table_q, table_scale, others.dtype) + others
    return layer_norm_quantize(h, weight, bias, eps, rotated)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.layer_norm_quantize`."""
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return (*quantize_per_token(y, rotated), y)


def add_layer_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.add_layer_norm_quantize`."""
    h = x + residual
    return (*layer_norm_quantize(h, weight, bias, eps, rotated), h)


def int8_add_layer_norm_quantize(
    x: Tensor,
    x_scale: Tensor | None,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_rotated: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.int8_add_layer_norm_quantize`."""
    x = x if x_scale is None else dequantize(x, x_scale, dtype)
    residual = residual if residual_scale is None else dequantize(residual, residual_scale, dtype, residual_rotated)
    return add_layer_norm_quantize(x, residual, weight, bias, eps, rotated)


def int8_add_rms_norm_quantize(
    x: Tensor,
    x_scale: Tensor | None,
    residual: Tensor,
    residual_scale: Tensor | None,
    residual_rotated: bool,
    weight: Tensor | None,
    eps: float,
    rotated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.int8_add_rms_norm_quantize`."""
    x = x if x_scale is None else dequantize(x, x_scale, dtype)
    residual = residual if residual_scale is None else dequantize(residual, residual_scale, dtype, residual_rotated)
    return add_rms_norm_quantize(x, residual, weight, eps, rotated)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`aten.rms_norm`, over the last dimension spelled as ONNX Runtime's fusion into one operator wants it."""
    if len(shape) != 1:
        return torch.nn.functional.rms_norm(x, list(shape), weight, eps)
    wide, eps = x.float(), torch.finfo(x.dtype).eps if eps is None else eps
    y = (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y if weight is None else y * weight


def rms_norm_quantize(
    x: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.rms_norm_quantize`."""
    y = rms_norm(x, x.shape[-1:], weight, eps)
    return (*quantize_per_token(y, rotated), y)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.add_rms_norm_quantize`."""
    h = x + residual
    return (*rms_norm_quantize(h, weight, eps, rotated), h)


def gelu_quantize(x: Tensor, approximate: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """See `kernels.gelu_quantize`."""
    return quantize_per_token(torch.nn.functional.gelu(x, approximate=approximate), rotated)


def silu_mul_quantize(gate: Tensor, up: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """See `kernels.silu_mul_quantize`."""
    return quantize_per_token(torch.nn.functional.silu(gate) * up, rotated)


def gelu_quantize_static(x: Tensor, approximate: str, scale: Tensor) -> Tensor:
    """See `kernels.gelu_quantize_static`."""
    return quantize_static(torch.nn.functional.gelu(x, approximate=approximate), scale)


def silu_mul_quantize_static(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """See `kernels.silu_mul_quantize_static`."""
    return quantize_static(torch.nn.functional.silu(gate) * up, scale)


FORMS: dict[OpOverload, Callable[..., Any]] = {
    kernels.quantize_per_token: quantize_per_token,
    kernels.int8_linear: int8_linear,
    kernels.int8_embedding: int8_embedding,
    kernels.dequantize: dequantize,
    kernels.layer_norm_quantize: layer_norm_quantize,
    kernels.add_layer_norm_quantize: add_layer_norm_quantize,
    kernels.rms_norm_quantize: rms_norm_quantize,
    kernels.add_rms_norm_quantize: add_rms_norm_quantize,
    kernels.gelu_quantize: gelu_quantize,
    kernels.silu_mul_quantize: silu_mul_quantize,
    kernels.quantize_static: quantize_static,
    kernels.int8_linear_quantize: int8_linear_quantize,
    kernels.int8_linear_gelu_quantize: int8_linear_gelu_quantize,
    kernels.int8_attention: int8_attention,
    kernels.embedding_layer_norm_quantize: embedding_layer_norm_quantize,
    kernels.int8_add_layer_norm_quantize: int8_add_layer_norm_quantize,
    kernels.int8_add_rms_norm_quantize: int8_add_rms_norm_quantize,
    kernels.gelu_quantize_static: gelu_quantize_static,
    kernels.silu_mul_quantize_static: silu_mul_quantize_static,
    torch.ops.aten.rms_norm.default: rms_norm,
}


def translations(targets: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Operators for torch's exporter to use where it knows none, among those that a graph holds."""
    return {target: _grouped_mm for target in targets if str(target) in _GROUPED_MM}


_GROUPED_MM = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}


def _grouped_mm(x: Any, weight: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Each expert's rows of `x [M, K]` times its matrix of `weight [E, K, N]`; those of expert e end at `ends[e]`."""
    if bias is not None or out_dtype is not None:
        raise ExportError("a grouped product with bias or another dtype has no ONNX form")
    first, one, results = op.Constant(value_int=0), op.Constant(value_int=1), []
    for expert in range(weight.shape[0]):
        index = op.Constant(value_int=expert)
        last = op.Cast(op.Gather(ends, index), to=onnx.TensorProto.INT64)
        rows = op.Gather(x, op.Range(first, last, one))
        results.append(op.MatMul(rows, op.Gather(weight, index)))
        first = last
    return op.Concat(*results, axis=0)


def _operator(
    name: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    shape: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """A standard ONNX operator as a graph node; it cannot be computed, only exported."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)
