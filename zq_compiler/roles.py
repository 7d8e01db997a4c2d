"""What each layer does in a transformer block, read off the graph: recipes speak of roles, models of names.

Needs the canonical graph, in which linears, attentions and activation functions stand whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from .recipe import Role
from .rewrite import CONSTANT_VIEWS

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
_ACTIVATIONS = {
    *(aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default, aten.mish.default),
    *(aten.hardswish.default, aten.leaky_relu.default, aten.elu.default, aten.relu_.default, aten.silu_.default),
}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
_POWERS = {aten.square.default, aten.pow.Tensor_Scalar}  # squared ReLU
_MOVES = {
    *CONSTANT_VIEWS,
    *(aten.expand.default, aten.clone.default, aten.to.dtype, aten._unsafe_view.default, aten.unflatten.int),
    *(aten.flatten.using_ints, aten.view.dtype, aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default),
    aten.unbind.int,
}
_STOPS = {ATTENTION, aten.embedding.default, aten.softmax.int, aten.bmm.default, aten.matmul.default}


def roles(graph: fx.Graph) -> dict[fx.Node, Role]:
    """Role of every linear and attention."""
    found: dict[fx.Node, Role] = {}
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        found[node] = Role.ATTENTION
        for operand in node.args[:3]:
            for linear in _sources(operand, _is_linear):
                found.setdefault(linear, Role.QUERY_KEY_VALUE)
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        if _reads_attention(node.args[0]):
            found[node] = Role.ATTENTION_OUTPUT
        elif activation := _activation(node.args[0]):
            found.setdefault(node, Role.FEED_FORWARD_OUT)
            passes = {activation.target, aten.mul.Tensor, operator.getitem, *NORMS, *_POWERS, *_MOVES}
            for linear in _sources(node.args[0], _is_linear, lambda n, passes=passes: n.target in passes):  # type: ignore[misc]
                found.setdefault(linear, Role.FEED_FORWARD_IN)
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        found.setdefault(node, Role.OTHER)
    return found


def _reads_attention(value: object) -> bool:
    """Whether `value` is an attention's result, perhaps times a gate."""
    value = _moved(value)
    factors = value.args if isinstance(value, fx.Node) and value.target is aten.mul.Tensor else (value,)
    return any(is_moved(factor, ATTENTION) is not None for factor in factors)


def is_moved(value: object, target: object) -> fx.Node | None:
    """The call to `target` whose result `value` is, but for reshapes, transposes and the like."""
    source = _moved(value)
    return source if isinstance(source, fx.Node) and source.target is target else None


def _moved(value: object) -> object:
    while isinstance(value, fx.Node) and value.op == "call_function" and value.target in _MOVES:
        value = value.args[0]
    return value


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default


def _sources(
    value: object, wanted: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool] = lambda node: True
) -> Iterator[fx.Node]:
    """The nearest nodes behind `value` that are wanted: through elementwise operations, not through other layers."""
    queue, seen = [value], set()
    while queue:
        node = queue.pop()
        if not isinstance(node, fx.Node) or node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if wanted(node):
            yield node
        elif node.target not in _STOPS and through(node):
            queue.extend(node.all_input_nodes)


def _unpowered(value: object) -> object:
    value = _moved(value)
    return _moved(value.args[0]) if isinstance(value, fx.Node) and value.target in _POWERS else value


def _activation(value: object) -> fx.Node | None:
    """The activation function whose result, perhaps squared or times a gate, `value` is."""
    value = _unpowered(value)
    for _ in range(3):  # up * silu(gate), x * sigmoid(1.702 x), norm(up * relu(gate)^2)
        if not isinstance(value, fx.Node):
            return None
        if value.target in _ACTIVATIONS:
            return value
        if value.target in NORMS and (gated := is_moved(value.args[0], aten.mul.Tensor)):  # else it is a head's norm
            value = gated
        if value.target is not aten.mul.Tensor:
            return None
        factors = [_unpowered(factor) for factor in value.args]
        activated = [f for f in factors if isinstance(f, fx.Node) and f.target in _ACTIVATIONS]
        value = activated[0] if activated else factors[0]
    return None
