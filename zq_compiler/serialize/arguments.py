"""Arguments and targets of nodes as JSON, and back."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..errors import ZQError
from ..torch_private import OpOverload

# Python functions that may stand in a graph: arithmetic on symbolic sizes, and picking one of several results. A fixed
# list, because a file that could name any function could do anything.
_OPERATORS = "add sub mul truediv floordiv mod pow neg pos eq ne lt le gt ge and_ or_ xor not_ getitem lshift rshift"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in dir(torch) if name.startswith("sym_")},
    **{f"builtins.{function.__name__}": function for function in (abs, max, min, round)},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
NO_CONTROL_FLOW = "save the float model, and quantize it where it is used"
_TORCH_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode(value: Any) -> Any:
    """An argument of a node as JSON. Lists, finite numbers, strings, booleans and None stand for themselves.

    >>> encode((1, float("-inf"), torch.int8))
    {'tuple': [1, {'float': '-inf'}, {'dtype': 'int8'}]}

    Raises:
        ZQError: a kind of value that graphs should not hold.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise ZQError(f"an argument of type {type(value).__name__} cannot be saved", fix="please report this")


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The inverse of `encode`; `nodes` are those that came before, by name.

    >>> decode({"tuple": [1, {"slice": [None, 2, None]}]})
    (1, slice(None, 2, None))
    """
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return (nodes or {})[content]
    if kind in _TORCH_KINDS:
        found = getattr(torch, content)
        if not isinstance(found, _TORCH_KINDS[kind]):
            raise ValueError(f"{content} is no {kind}")
        return found
    if kind == "dict":
        return {decode(k, nodes): decode(v, nodes) for k, v in content}
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    parts = (decode(v, nodes) for v in content)
    return {"tuple": tuple, "slice": lambda p: slice(*p), "complex": lambda p: complex(*p)}[kind](parts)  # type: ignore[operator]


def target_name(node: fx.Node) -> str:
    """The qualified name of what a node calls or reads.

    Raises:
        ZQError: a nested graph (control flow), or a function that loading would not know.
    """
    target = node.target
    if isinstance(target, str) and node.op in ("placeholder", "get_attr", "output"):
        return target
    if isinstance(target, OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    if node.op == "call_function" and target in _NAMES:
        return _NAMES[target]
    raise ZQError(f"{node.op} {target} cannot be saved", where=node.name, fix=NO_CONTROL_FLOW)


def resolve(name: str) -> Callable[..., Any]:
    """The inverse of `target_name` for calls.

    Raises:
        ZQError: no such op here.
    """
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    found: Any = torch.ops
    try:
        for part in (namespace, *rest.rsplit(".", 1)):
            found = getattr(found, part)
    except AttributeError:
        found = None
    if not isinstance(found, OpOverload):
        raise ZQError(f"calls {name}, which is unknown here", fix=f"import the library that registers {namespace} ops")
    return found
