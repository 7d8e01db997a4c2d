"""Bytes of activations that a graph's operations read and write: what its memory-bound part costs.

How it is counted: an operation reads each tensor it is given once, constants aside, and writes each result that
something reads. Moves (reshape, transpose, slice, ...) are free. An attention counts as one operation: its scores and
probabilities stay in fast memory. Dimensions are those of the example inputs; what depends on data counts nothing.

Three sums of it compare a quantized graph with what it was:

- op by op: the float graph, each ATen operation by itself;
- fused alike: the quantized graph with every value in the model's own dtype in place of integers and scales;
- now: the quantized graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .kernels import (
    dequantize,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    reference_of,
)
from .program import OpTraffic, Program, fake_value
from .rewrite import CONSTANT_VIEWS, constant_of, layer_name
from .torch_private import concrete

aten = torch.ops.aten
MOVES = CONSTANT_VIEWS | {
    *(operator.getitem, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints, aten.alias.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.detach.default),
    *(aten.squeeze.default, aten.squeeze.dims, aten.view_as.default, aten.expand_as.default, aten.narrow.default),
    aten.lift_fresh_copy.default,
}
_ONLY_QUANTIZED = {
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    dequantize,
}  # a float twin of the graph has no such op
_NARROW = (torch.int8, torch.uint8, torch.float8_e4m3fn)


def count_traffic(program: Program) -> list[OpTraffic]:
    """What each operation of the graph, at whatever stage, reads and writes."""
    width = model_dtype(program).itemsize
    return [row for node in program.graph.nodes if (row := _count(program, node, width)) is not None]


def node_traffic(program: Program, nodes: Sequence[fx.Node]) -> int:
    """Bytes that these nodes read and write."""
    return sum(row.moved for node in nodes if (row := _count(program, node, 0)) is not None)


def model_dtype(program: Program) -> torch.dtype:
    """The float dtype that most values of the graph have, or had before it was quantized."""
    if program.float_dtype is not None:
        return program.float_dtype
    values = (fake_value(node) for node in program.graph.nodes if node.op == "call_function")
    dtypes = Counter(
        v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dtype not in _NARROW
    )
    return dtypes.most_common(1)[0][0] if dtypes else torch.float32


def _count(program: Program, node: fx.Node, width: int) -> OpTraffic | None:
    if node.op != "call_function" or node.target in MOVES:
        return None
    inputs = [x for x in node.all_input_nodes if constant_of(program.gm, x) is None]
    results = _results(node)
    if not results or (node.all_input_nodes and not inputs):  # a size; something done to a weight
        return None
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
    twin = 0
    if node.target not in _ONLY_QUANTIZED:
        twin = sum(_as_float(x, width) for x in inputs) + sum(_as_float(x, width) for x in _distinct(results))
    return OpTraffic(
        layer_name(program, node),
        name,
        sum(_bytes(fake_value(x)) for x in inputs),
        sum(_bytes(fake_value(x)) for x in results),
        twin,
    )


def _results(node: fx.Node) -> list[fx.Node]:
    """The node itself, or those of its several results that something reads."""
    if isinstance(fake_value(node), Tensor):
        return [node]
    if not isinstance(fake_value(node), tuple | list):
        return []
    return [user for user in node.users if user.target is operator.getitem and user.users]


def _distinct(results: Sequence[fx.Node]) -> list[fx.Node]:
    """A norm's integers (result 0) and floats (result 2) are one value in float."""
    indices = {node.args[1] for node in results if node.target is operator.getitem}
    return [n for n in results if not (2 in indices and n.target is operator.getitem and n.args[1] == 0)]


def _as_float(node: fx.Node, width: int) -> int:
    """Integers at the model's width, scales not at all."""
    value = fake_value(node)
    if not isinstance(value, Tensor) or _is_scale(node):
        return 0
    return _elements(value) * width if value.dtype in _NARROW else _bytes(value)


def _is_scale(node: fx.Node) -> bool:
    """Whether a value is the scales that a quantize took at run time, perhaps reshaped."""
    while node.op == "call_function" and node.target in MOVES and node.target is not operator.getitem:
        node = node.all_input_nodes[0]
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    return reference_of(node.args[0].target) is not None  # type: ignore[union-attr]


def _bytes(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(map(_bytes, value))
    return _elements(value) * value.element_size() if isinstance(value, Tensor) else 0


def _elements(value: Tensor) -> int:
    count = 1
    for size in value.shape:
        count *= concrete(size) or 0  # a size that depends on data has no number here
    return count
