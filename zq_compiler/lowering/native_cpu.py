"""The CPU's provider: our C++ kernels, where there is AVX512-VNNI or AVX2. A weight is repacked for its kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels
from ..formats import FORMATS, unpack
from ..kernels import reference_of
from ..kernels.cpu import build
from ..kernels.low_rank_linear import factor
from ..program import fake_value, get_constant, size
from ..rewrite import arguments
from .provider import (
    FLOATS,
    Provider,
    Rewrite,
    constant,
    float_dtype,
    is_read,
    norms,
    nothing,
    odd_attention,
    once,
    op,
    replace,
    same_signature,
    set_constants,
)

aten = torch.ops.aten
NAMESPACE = "zq_cpu"


def provider() -> Provider:
    """Our kernels, compiled at their first use.

    Raises:
        KernelBuildError: this machine should run them and they do not compile.
    """
    if reason := build.unavailable_reason():
        return nothing(reason)
    build.load()
    return Provider("native", REWRITES, _unfit)


def _unfit(node: fx.Node) -> str | None:
    dtype = float_dtype(node)
    return f"the native kernels have no {dtype}" if dtype not in (None, *FLOATS) else odd_attention(node)


def _embedding(gm: fx.GraphModule, node: fx.Node) -> None:
    """The lookup and the sum are Inductor's, the norm and the quantize are our kernel's."""
    ids, table_q, table_scale, others, weight, bias, eps, rotated = arguments(node)
    lookup = reference_of(kernels.int8_embedding)
    assert lookup is not None
    with gm.graph.inserting_before(node):
        rows = gm.graph.call_function(lookup, (ids, table_q, table_scale, fake_value(others).dtype))
        total = gm.graph.call_function(aten.add.Tensor, (rows, others))
    node.target = op(NAMESPACE, "norm_quantize")
    node.args = (total, None, weight, bias, eps, False, is_read(node, 2), False, rotated)


def _linear(gm: fx.GraphModule, node: fx.Node) -> None:
    x_q, x_scale, w_q, w_scale, bias, *rest = node.args
    gelu = node.target is kernels.int8_linear_gelu_quantize
    target = op(NAMESPACE, "int8_linear_gelu_quantize" if gelu else "int8_linear")
    name = str(w_q.target)  # type: ignore[union-attr]
    packed, colsum = once(_packed, get_constant(gm, name))
    with gm.graph.inserting_before(node):
        constants = set_constants(gm, name, packed=packed, colsum=colsum)
        operands = (x_q, x_scale, constants[0], w_scale, constants[1], bias, *(rest or [torch.int8]))
        call = gm.graph.call_function(target, operands)
    replace(gm, node, call)


def _packed(w_q: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in the kernel's layout and its column sums."""
    return torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)


def _weight_only(gm: fx.GraphModule, node: fx.Node) -> None:
    x, w_packed, w_scale, bias, format, group = node.args
    packed = constant(gm, w_packed)
    codes, scales = once(torch.ops.zq_cpu.pack_codes, packed, constant(gm, w_scale), format)
    with gm.graph.inserting_before(node):
        constants = set_constants(gm, str(w_packed.target), codes=codes, scales=scales)  # type: ignore[union-attr]
        operands = (x, *constants, bias, format, group, packed.shape[0])
        call = gm.graph.call_function(op(NAMESPACE, "weight_only_linear"), operands)
    replace(gm, node, call)


def _fp8(gm: fx.GraphModule, node: fx.Node) -> None:
    """The values of FP8 in floats, times the packed weight; scale and bias are Inductor's."""
    x_q, x_scale, w_packed, w_scale, bias, format, group, dtype = node.args
    packed = constant(gm, w_packed)
    codes, scales = once(torch.ops.zq_cpu.pack_codes, packed, constant(gm, w_scale), format)
    with gm.graph.inserting_before(node):
        constants = set_constants(gm, str(w_packed.target), codes=codes, scales=scales)  # type: ignore[union-attr]
        x = gm.graph.call_function(aten.to.dtype, (x_q, torch.float32))
        operands = (x, *constants, None, format, group, packed.shape[0])
        y = gm.graph.call_function(op(NAMESPACE, "weight_only_linear"), operands)
        y = gm.graph.call_function(aten.mul.Tensor, (y, x_scale))
        if bias is not None:
            offset = gm.graph.call_function(aten.to.dtype, (bias, torch.float32))
            y = gm.graph.call_function(aten.add.Tensor, (y, offset))
        call = gm.graph.call_function(aten.to.dtype, (y, dtype))
    replace(gm, node, call)


def _w4a8(gm: fx.GraphModule, node: fx.Node) -> None:
    x_q, x_scale, w_packed, w_scale, bias, format, group, dtype = node.args
    packed = constant(gm, w_packed)
    features = size(fake_value(x_q).shape[-1])  # type: ignore[arg-type]
    codes, scales = once(_nibbles, packed, constant(gm, w_scale), format, features)
    with gm.graph.inserting_before(node):
        constants = set_constants(gm, str(w_packed.target), codes=codes, scales=scales)  # type: ignore[union-attr]
        operands = (x_q, x_scale, *constants, bias, group, packed.shape[0], dtype)
        call = gm.graph.call_function(op(NAMESPACE, "w4a8_linear"), operands)
    replace(gm, node, call)


def _nibbles(packed: Tensor, scale: Tensor, format: str, features: int) -> tuple[Tensor, Tensor]:
    """Codes in the kernel's layout: a format of fewer bits takes four too."""
    fmt = FORMATS[format]
    values = fmt.decode(unpack(packed, fmt.bits, features)).to(torch.int8)
    return torch.ops.zq_cpu.pack_nibbles(values, scale)


def _low_rank(gm: fx.GraphModule, node: fx.Node) -> None:
    y, x, v, u, v_scale, u_scale = arguments(node)
    scales = [None if s is None else constant(gm, s) for s in (v_scale, u_scale)]
    down, up = once(_ranks_first, constant(gm, v), constant(gm, u), *scales, fake_value(y).dtype)
    with gm.graph.inserting_before(node):
        constants = set_constants(gm, str(v.target), down=down, up=up)
        call = gm.graph.call_function(op(NAMESPACE, "low_rank_linear"), (y, x, *constants))
    replace(gm, node, call)


def _ranks_first(
    v: Tensor, u: Tensor, v_scale: Tensor | None, u_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both factors as the kernel reads them: float16 as stored, the values of integers in float32."""
    u = u.t().contiguous()
    if v_scale is None or u_scale is None:
        return v, u
    return factor(v, v_scale, dtype).float(), factor(u, u_scale.t(), dtype).float()


_same = same_signature(NAMESPACE)
REWRITES: dict[Any, Rewrite] = {
    **norms(NAMESPACE),
    kernels.embedding_layer_norm_quantize: _embedding,
    kernels.int8_linear: _linear,
    kernels.int8_linear_quantize: _linear,
    kernels.int8_linear_gelu_quantize: _linear,
    kernels.weight_only_linear: _weight_only,
    kernels.w4a8_linear: _w4a8,
    kernels.fp8_linear: _fp8,
    kernels.low_rank_linear: _low_rank,
    kernels.quantize_per_token: _same,
    kernels.gelu_quantize: _same,
    kernels.silu_mul_quantize: _same,
    kernels.gelu_quantize_static: _same,
    kernels.silu_mul_quantize_static: _same,
    kernels.int8_attention: _same,
}
