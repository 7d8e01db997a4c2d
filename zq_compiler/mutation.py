"""Which values in-place operations change, so that no rewrite carries a read across a change.

Captured graphs hold what models write: `x += y`, `relu_`, a cache's `index_put_`. A rewrite that computes something
earlier or later than the model did must ask here first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .program import Program, fake_value, get_constant
from .torch_private import OpOverload, storage_key

aten = torch.ops.aten
# They return their own input in inference; neither their schemas nor fake tensors say so.
_SILENT_ALIASES = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}


class Mutations:
    """The in-place operations of a graph, and which values share memory with what they write.

    Args:
        graph: as it is now; nodes added later are understood, in-place operations added later are not.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._memory: dict[fx.Node, frozenset[Any]] = {}
        writers = [node for node in graph.nodes if any(_written(node))]
        if writers:  # views need their inputs' memory first, so in graph order
            for node in graph.nodes:
                self._memory_of(node)
        self._writers = [(node, frozenset().union(*map(self._memory_of, _written(node)))) for node in writers]

    @property
    def any(self) -> bool:
        """Whether the graph has in-place operations."""
        return bool(self._writers)

    def of(self, value: fx.Node) -> fx.Node | None:
        """An in-place operation that changes `value`, anywhere in the graph."""
        return next((node for node, memory in self._writers if memory & self._memory_of(value)), None)

    def between(self, first: fx.Node, last: fx.Node, values: Iterable[fx.Node]) -> fx.Node | None:
        """An in-place operation behind `first` and before `last` that changes one of `values`."""
        crossed = [memory for node, memory in self._writers if first < node < last]
        if not crossed:
            return None
        touched = frozenset().union(*map(self._memory_of, values))
        return next((n for n, memory in self._writers if first < n < last and memory & touched), None)

    def _memory_of(self, node: fx.Node) -> frozenset[Any]:
        """What stands for the memory a value may lie in: the nodes that made it, and its storages."""
        if node not in self._memory:
            made_by = frozenset().union(*map(self._memory_of, _aliased(node)))
            self._memory[node] = (made_by or frozenset({node})) | _storages(node)
        return self._memory[node]


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that a call changes."""
    for value, parameter in _parameters(node):
        if parameter.alias_info is not None and parameter.alias_info.is_write:
            yield from _nodes(value)


def _aliased(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that a call's results may share memory with."""
    if not isinstance(node.target, OpOverload):
        if node.op == "call_function":  # getitem of a list, and what has no schema
            yield from node.all_input_nodes
        return
    for value, parameter in _parameters(node):
        if parameter.alias_info is not None or node.target in _SILENT_ALIASES:
            yield from _nodes(value)


def _parameters(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    if isinstance(node.target, OpOverload):
        schema = node.target._schema.arguments
        yield from zip(node.args, schema, strict=False)
        by_name = {parameter.name: parameter for parameter in schema}
        yield from ((value, by_name[name]) for name, value in node.kwargs.items())


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _storages(node: fx.Node) -> frozenset[Any]:
    values = fake_value(node)
    gm = node.graph.owning_module
    if node.op == "get_attr" and gm is not None:  # tied constants: by the memory they really lie in
        values = get_constant(gm, str(node.target))
    tensors = values if isinstance(values, tuple | list) else [values]
    return frozenset(storage_key(t) for t in tensors if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def state_kept(program: Program) -> Iterator[None]:
    """Afterwards, constants that the graph changes (a running state) are what they were before."""
    mutations = Mutations(program.graph)
    names = {str(n.target) for n in program.graph.find_nodes(op="get_attr") if mutations.of(n)}
    saved = [(constant, constant.clone()) for constant in (get_constant(program.gm, name) for name in sorted(names))]
    try:
        yield
    finally:
        with torch.no_grad():
            for constant, copy in saved:
                constant.copy_(copy)
