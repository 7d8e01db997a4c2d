"""CUDA's provider: our Triton kernels, from compute capability 8.0.

Without Triton nothing on CUDA is lowered: a model that ran as plain torch instead would be slower than it was in float,
and would not say so. Two things that the dialect has no op for are put together here:

    int8_linear(...) + residual                 one kernel, where no norm has taken the sum in
    low_rank_linear(a linear, x, ...)           a thin product, and the other one within the linear's kernel

Floats are rounded in between as the graph says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels
from ..kernels.cuda import registration
from ..program import fake_value, size
from ..rewrite import arguments
from ..torch_private import OpOverload
from ..traffic import MOVES
from .provider import (
    FLOATS,
    Provider,
    Rewrite,
    constant,
    float_dtype,
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
NAMESPACE = registration.NAMESPACE
OLDEST = 80
FP8_ARCHITECTURE = 89  # the first that converts to FP8
MAX_HEAD_FEATURES = 256  # whose tiles fit into shared memory


def provider(device: torch.device, architecture: int | None) -> Provider:
    """Our kernels.

    Args:
        architecture: that of `device` where None.

    Raises:
        KernelBuildError: Triton is not installed.
    """
    registration.load()
    if architecture is None:
        architecture = registration.architecture(device)
    if architecture < OLDEST:
        return nothing(f"compute capability {architecture / 10} is older than {OLDEST / 10}")
    rewrites: dict[Any, Rewrite] = {**REWRITES, kernels.fp8_linear: functools.partial(_fp8, architecture)}
    return Provider("triton", rewrites, functools.partial(_unfit, architecture))


def _unfit(architecture: int, node: fx.Node) -> str | None:
    dtype = float_dtype(node)
    if dtype not in (None, *FLOATS):
        return f"the Triton kernels have no {dtype}"
    if node.target in _TO_FP8 and architecture < FP8_ARCHITECTURE:
        return f"compute capability {architecture / 10} has no conversion to FP8"
    if node.target in _ELEMENTWISE and _among_inductors(node):
        return "Inductor fuses it with its neighbours"
    if node.target is kernels.int8_attention:
        features = size(fake_value(node.args[0]).shape[-1])  # type: ignore[arg-type]
        if not isinstance(features, int) or features > MAX_HEAD_FEATURES:
            return f"heads have {features} features, more than {MAX_HEAD_FEATURES}"
    return odd_attention(node)


def _among_inductors(node: fx.Node) -> bool:
    """Whether Inductor computes what a node reads, or what reads it, beyond views."""
    read, users = node.args[0], list(node.users)
    while read.target in MOVES and read.op == "call_function":  # type: ignore[union-attr]
        read = read.all_input_nodes[0]  # type: ignore[union-attr]
    while moved := [user for user in users if user.op == "call_function" and user.target in MOVES]:
        users = [u for u in users if u not in moved] + [u for user in moved for u in user.users]
    return any(map(_is_inductors, (read, *users)))


def _is_inductors(node: Any) -> bool:
    """Whether it is an element-wise operation or a norm, or an inlined op."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload) or node.target in _NORMS:
        return True
    return torch.Tag.pointwise in node.target.tags


def _linear(gm: fx.GraphModule, node: fx.Node) -> None:
    operands = arguments(node)
    node.target = op(NAMESPACE, "int8_linear")
    total, *others = node.users
    if others or total.target is not aten.add.Tensor:
        return
    first, second, alpha = arguments(total)
    residual = second if first is node else first
    if residual is node or alpha != 1 or _layout(residual) != _layout(node):
        return
    with gm.graph.inserting_before(total):
        call = gm.graph.call_function(op(NAMESPACE, "int8_linear_add"), (*operands[:5], residual, operands[5]))
    replace(gm, total, call)
    gm.graph.erase_node(node)


def _layout(value: Any) -> Any:
    """Dtype and sizes of a tensor; None of a number."""
    if not isinstance(value, fx.Node) or not isinstance(tensor := fake_value(value), Tensor):
        return None
    return tensor.dtype, *map(size, tensor.shape)


def _low_rank(gm: fx.GraphModule, node: fx.Node) -> None:
    y, x, v, u, v_scale, u_scale = arguments(node)
    linear = y.target
    if linear not in (op(NAMESPACE, name) for name in _WITH_BRANCH) or len(y.users) > 1:
        _same(gm, node)
        return
    with gm.graph.inserting_before(node):
        hidden = gm.graph.call_function(op(NAMESPACE, "low_rank_hidden"), (x, v, v_scale))
        operands, branch = arguments(y), (hidden, u, u_scale)
        if linear is op(NAMESPACE, "int8_linear"):
            linear = op(NAMESPACE, "int8_linear_low_rank")
            operands[-1:] = (*branch, operands[-1])
        else:
            operands[-3:] = branch
        call = gm.graph.call_function(linear, tuple(operands))
    replace(gm, node, call)
    gm.graph.erase_node(y)


def _packed(gm: fx.GraphModule, node: fx.Node) -> None:
    """A packed weight is laid out anew for its kernel, once."""
    from ..kernels.cuda.w4a8_linear import pack_w4a8  # imported late: it needs Triton
    from ..kernels.cuda.weight_only_linear import pack_weight_only

    if node.target is kernels.weight_only_linear:
        _lay_out(gm, node, 1, pack_weight_only)
    else:
        _lay_out(gm, node, 2, pack_w4a8)


def _fp8(architecture: int, gm: fx.GraphModule, node: fx.Node) -> None:
    """The same, for the tensor cores that there are."""
    from ..kernels.cuda.fp8_linear import pack_fp8

    _lay_out(gm, node, 2, pack_fp8, architecture)


def _lay_out(
    gm: fx.GraphModule, node: fx.Node, weight: int, pack: Callable[..., tuple[Tensor, Tensor]], *others: Any
) -> None:
    """The kernel's op has the dialect op's arguments but for codes and scales, which `pack` makes.

    Args:
        weight: which argument is the packed weight; scale, bias, format and group follow.
        others: that `pack` takes behind weight, scale, format, group and features.
    """
    name = node.target._opname  # type: ignore[union-attr]
    x, *_ = operands = arguments(node)
    w_packed, w_scale, _, format, group = operands[weight : weight + 5]
    features = size(fake_value(x).shape[-1])
    codes, scales = once(pack, constant(gm, w_packed), constant(gm, w_scale), format, group, features, *others)
    with gm.graph.inserting_before(node):
        operands[weight : weight + 2] = set_constants(gm, str(w_packed.target), codes=codes, scales=scales)
        call = gm.graph.call_function(op(NAMESPACE, name), tuple(operands))
    replace(gm, node, call)


_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_WITH_BRANCH = ("int8_linear", "w4a8_linear", "weight_only_linear", "fp8_linear")
_ELEMENTWISE = (kernels.quantize_static, kernels.quantize_static_fp8, kernels.int8_embedding)
_TO_FP8 = (kernels.quantize_per_token_fp8, kernels.quantize_static_fp8)
_same = same_signature(NAMESPACE)
REWRITES: dict[Any, Rewrite] = {
    **norms(NAMESPACE),
    kernels.int8_linear: _linear,
    kernels.int8_linear_quantize: _same,
    kernels.int8_linear_gelu_quantize: _same,
    kernels.low_rank_linear: _low_rank,
    kernels.weight_only_linear: _packed,
    kernels.w4a8_linear: _packed,
    kernels.embedding_layer_norm_quantize: _same,
    kernels.int8_embedding: _same,
    kernels.quantize_per_token: _same,
    kernels.quantize_per_token_int4: _same,
    kernels.quantize_per_token_fp8: _same,
    kernels.quantize_static: _same,
    kernels.quantize_static_fp8: _same,
    kernels.gelu_quantize: _same,
    kernels.silu_mul_quantize: _same,
    kernels.gelu_quantize_static: _same,
    kernels.silu_mul_quantize_static: _same,
    kernels.int8_attention: _same,
    kernels.cached_attention: _same,
}
