"""A graph's floats in another dtype, as a runtime that is strongly typed wants to read them from the file.

What the model computes from its inputs is cast: the results of linears, tables, norms, and all that follows from them.
What only positions and constants go into (the angles of rotary embeddings, masks) is computed as it was, and cast where
the two meet. Scales of integers stay float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import NAMESPACE
from ...program import cast_name, fake_value, get_constant, set_constant
from ...torch_private import OpOverload

aten = torch.ops.aten
_SOURCES = (
    *(aten.linear.default, aten.embedding.default, aten.layer_norm.default, aten.rms_norm.default),
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
)


def cast_floats(gm: fx.GraphModule, dtype: torch.dtype) -> None:
    """Cast in place, constants included. Fake values keep the dtypes that they had."""
    wide, limits = _activations(gm), torch.finfo(dtype)
    for node in list(gm.graph.nodes):
        if node not in wide or node.op == "placeholder":
            continue
        scales = _scales(node)

        def cast(value: Any, node: fx.Node = node, scales: set[int] = scales) -> Any:
            if isinstance(value, fx.Node):
                return value if id(value) in scales else _cast(gm, node, value, wide, dtype)
            if isinstance(value, torch.dtype):
                return dtype if _is_float(value) else value
            if isinstance(value, float) and math.isfinite(value):
                return min(max(value, limits.min), limits.max)
            return value

        node.args = _mapped(node.args, cast)
        node.kwargs = {key: _mapped(value, cast) for key, value in node.kwargs.items()}


def _activations(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that are cast."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            fake = fake_value(node)
            chosen = isinstance(fake, Tensor) and _is_float(fake.dtype)
        elif node.op == "call_function":
            chosen = _is_dialect(node) or node.target in _SOURCES or any(a in found for a in node.all_input_nodes)
        else:
            chosen = False
        if chosen:
            found.add(node)
    return found


def _cast(gm: fx.GraphModule, node: fx.Node, value: fx.Node, wide: set[fx.Node], dtype: torch.dtype) -> fx.Node:
    """The operand `value` of `node` in the dtype; a value that is not cast where it is made is cast here."""
    fake = fake_value(value)
    if value in wide or not isinstance(fake, Tensor) or not _is_float(fake.dtype):
        return value
    limits = torch.finfo(dtype).min, torch.finfo(dtype).max  # of masks: the least float32 would become -Inf
    with gm.graph.inserting_before(node):
        if value.op != "get_attr":
            within = gm.graph.call_function(aten.clamp.default, (value, *limits))
            return gm.graph.call_function(aten.to.dtype, (within, dtype))
        name = cast_name(str(value.target), str(dtype).removeprefix("torch."))
        set_constant(gm, name, get_constant(gm, str(value.target)).detach().clamp(*limits).to(dtype))
        constant = gm.graph.get_attr(name)
    constant.meta = {**value.meta}
    return constant


def _scales(node: fx.Node) -> set[int]:
    """Operands that are scales of integers."""
    if not _is_dialect(node):
        return set()
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {id(value) for name, value in given.items() if "scale" in name}


def _is_dialect(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE


def _is_float(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _mapped(value: Any, f: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, f) for v in value)
    if isinstance(value, dict):
        return {key: _mapped(v, f) for key, v in value.items()}
    return f(value)
