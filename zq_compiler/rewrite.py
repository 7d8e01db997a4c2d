"""The one matcher: patterns over FX nodes, rules with a check, and a builder that keeps shapes known.

A pattern is an expression: `Op(target, *arguments)` matches a call, a string captures whatever stands there (the same
string twice must capture the same thing), anything else is a literal that must be equal. Arguments that a pattern does
not mention must have their schema's default.

>>> import operator
>>> graph = fx.Graph(); x = graph.placeholder("x"); y = graph.call_function(operator.mul, (x, 2))
>>> match(Op(operator.mul, "a", 2), y)
{'a': x}
>>> match(Op(operator.mul, "a", 3), y) is None
True
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .capture import layer_of
from .mutation import Mutations
from .program import NearMiss, Program, fake_value, get_constant, set_constant, weight_name
from .torch_private import FakeTensorMode

Match = dict[str, Any]
ROOT = ""  # the key under which a rule finds the matched node itself
_MISSING = object()


@dataclass(frozen=True, init=False)
class Op:
    """A call to one of `targets`, with argument patterns in schema order."""

    targets: tuple[Callable[..., Any], ...]
    args: tuple[Any, ...]
    commutes: bool

    def __init__(self, targets: Any, *args: Any, commutes: bool = False) -> None:
        object.__setattr__(self, "targets", targets if isinstance(targets, tuple) else (targets,))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "commutes", commutes)


@dataclass(frozen=True, init=False)
class AnyOf:
    """Whichever alternative matches first."""

    patterns: tuple[Any, ...]

    def __init__(self, *patterns: Any) -> None:
        object.__setattr__(self, "patterns", patterns)


def arguments(node: fx.Node) -> list[Any]:
    """All arguments of a call in schema order, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, *node.kwargs.values()]
    values = list(node.args)
    for parameter in schema.arguments[len(values) :]:
        values.append(node.kwargs.get(parameter.name, parameter.default_value))
    return values


def match(pattern: Any, value: Any) -> Match | None:
    """What the pattern's strings captured, or None."""
    return next(_matches(pattern, value, {}), None)


def _matches(pattern: Any, value: Any, bound: Match) -> Iterator[Match]:
    if isinstance(pattern, str):
        known = bound.get(pattern, _MISSING)
        if known is _MISSING:
            yield {**bound, pattern: value}
        elif known is value or (not isinstance(value, fx.Node) and known == value):
            yield bound
    elif isinstance(pattern, AnyOf):
        for alternative in pattern.patterns:
            yield from _matches(alternative, value, bound)
    elif isinstance(pattern, Op):
        if not (isinstance(value, fx.Node) and value.op == "call_function" and value.target in pattern.targets):
            return
        actual = arguments(value)
        if len(actual) < len(pattern.args) or not _defaults(value, actual, len(pattern.args)):
            return
        orders = [actual[: len(pattern.args)]]
        if pattern.commutes:
            orders.append([actual[1], actual[0], *actual[2 : len(pattern.args)]])
        for order in orders:
            yield from _matches_all(pattern.args, order, bound)
    elif isinstance(pattern, list | tuple):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _matches_all(pattern, value, bound)
    elif not isinstance(value, fx.Node) and value == pattern:
        yield bound


def _matches_all(patterns: Sequence[Any], values: Sequence[Any], bound: Match) -> Iterator[Match]:
    if not patterns:
        yield bound
        return
    for first in _matches(patterns[0], values[0], bound):
        yield from _matches_all(patterns[1:], values[1:], first)


def _defaults(node: fx.Node, actual: list[Any], mentioned: int) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return len(actual) == mentioned
    return all(
        value == parameter.default_value
        for value, parameter in zip(actual[mentioned:], schema.arguments[mentioned:], strict=True)
    )


class NoMatch(Exception):  # noqa: N818 - an outcome, not an error
    """Raised by a rule's check: the pattern is there but the rewrite would be wrong, and why."""


class RewriteRule:
    """One rewrite. `rewrite` returns the node that replaces the matched one, which is `found[ROOT]`.

    Dead nodes are left for the driver; nodes of the pattern that have other users stay.
    """

    pattern: Any

    def check(self, found: Match) -> None:
        """Raise `NoMatch(reason)` where the rewrite would be wrong or would not pay."""

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        """Build the replacement before the matched node."""
        raise NotImplementedError


class Builder:
    """Adds nodes before a given one, each with its fake value.

    Args:
        of: the node whose module they belong to; `before` itself by default.
    """

    def __init__(self, program: Program, before: fx.Node, of: fx.Node | None = None) -> None:
        self.program, self.before, self.of = program, before, before if of is None else of

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call with its fake value computed, so that the next rule sees shapes and dtypes."""
        graph = self.program.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args)
        if stack := self.of.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = stack
        set_fake_value(node)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """The `index`-th of a call's several results."""
        return self.call(operator.getitem, node, index)

    def constant(self, target: str, value: torch.Tensor) -> fx.Node:
        """A new constant under a dotted target."""
        set_constant(self.program.gm, target, value)
        graph = self.program.graph
        with graph.inserting_before(self.before):
            node = graph.get_attr(target)
        node.meta["val"] = fake_mode_of(graph).from_tensor(value, static_shapes=True)
        return node


def set_fake_value(node: fx.Node) -> None:
    """Compute `meta["val"]` of a call from those of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_value)
    with fake_mode_of(node.graph), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake mode all of a graph's values belong to."""
    for node in graph.nodes:
        mode = getattr(fake_value(node), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def apply_rules(program: Program, rules: Sequence[RewriteRule]) -> int:
    """Try every rule at every node, in graph order; returns the number of rewrites."""
    mutations = Mutations(program.graph)
    changes = 0
    for node in list(program.graph.nodes):
        if node._erased or node.op != "call_function" or not node.users:  # an earlier rewrite left it dead
            continue
        for rule in rules:
            found = match(rule.pattern, node)
            if found is None:
                continue
            try:
                _refuse_to_cross(mutations, node, found)
                rule.check({ROOT: node, **found})
            except NoMatch as refusal:
                program.near_misses.append(NearMiss(type(rule).__name__, node.name, str(refusal)))
                continue
            replacement = rule.rewrite({ROOT: node, **found}, Builder(program, node))
            node.replace_all_uses_with(replacement)
            program.graph.erase_node(node)
            changes += 1
            break
    return changes


def _refuse_to_cross(mutations: Mutations, root: fx.Node, found: Match) -> None:
    """The replacement reads everything where `root` stands: what the pattern read earlier must not have changed."""
    captured: list[fx.Node] = []
    fx.node.map_arg(list(found.values()), captured.append)
    inner: list[fx.Node] = []
    queue = [root]
    while queue:
        found_here = [n for n in queue.pop().all_input_nodes if n not in captured and n not in inner]
        inner, queue = inner + found_here, queue + found_here
    read = {n for node in inner for n in (node, *node.all_input_nodes)}
    if inner and (writer := mutations.between(min(inner), root, read)):
        raise NoMatch(f"{writer.name} changes one of its operands in place")


def constant_of(gm: fx.GraphModule, node: Any) -> fx.Node | None:
    """The `get_attr` that a node is computed from by shape changes, and by factors that are constants too, or None."""
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return node if isinstance(get_constant(gm, str(node.target)), torch.Tensor) else None
        if node.op != "call_function" or node.target not in CONSTANT_VIEWS | {_aten.mul.Tensor}:
            return None
        others = [a for a in arguments(node)[1:] if isinstance(a, fx.Node)]
        factors = node.target is _aten.mul.Tensor and all(constant_of(gm, other) is not None for other in others)
        if bool(others) != (node.target is _aten.mul.Tensor) or (others and not factors):
            return None
        node = node.args[0]
    return None


def layer_name(program: Program, node: fx.Node) -> str:
    """Dotted name of the layer whose constants a node reads, or of the module it was traced in; empty if unknown."""
    if "layer" in node.meta:
        return node.meta["layer"]
    constants = [c for x in reversed(node.all_input_nodes) if (c := constant_of(program.gm, x)) is not None]
    for constant in constants:
        if str(constant.target).endswith("_q"):
            return weight_name(str(constant.target)).removesuffix(".weight")
    owners = Counter(str(c.target).rpartition(".")[0] for c in constants)  # a scale may be named by its neighbour
    return owners.most_common(1)[0][0] if owners else layer_of(node)


_aten = torch.ops.aten
CONSTANT_VIEWS = {
    _aten.t.default,
    _aten.numpy_T.default,
    _aten.transpose.int,
    _aten.permute.default,
    _aten.select.int,
    _aten.view.default,
    _aten.reshape.default,
    _aten.contiguous.default,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.expand.default,
}


def evaluate_constant(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The value of a node for which `constant_of` is not None."""
    if node.op == "get_attr":
        return get_constant(gm, str(node.target))
    args = fx.node.map_arg(node.args, lambda n: evaluate_constant(gm, n))
    return node.target(*args, **node.kwargs)  # type: ignore[operator]


def view_key(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    """What is done to a constant, as a hashable value; factors by their content."""
    if node.op == "get_attr":
        return ()
    others = [content_of(evaluate_constant(gm, a)) if isinstance(a, fx.Node) else repr(a) for a in node.args[1:]]
    return (*view_key(gm, node.args[0]), str(node.target), *others)  # type: ignore[arg-type]


def content_of(value: torch.Tensor) -> str:
    """Hash of every byte."""
    return hashlib.blake2b(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
