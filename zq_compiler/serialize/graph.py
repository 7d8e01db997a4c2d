"""Nodes and inputs as JSON, and back; and the fake values that a file cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..calling import CallingConvention, InputSpec
from ..capture import layer_of
from ..errors import ZQError
from ..program import Program, fake_value, get_constant
from ..rewrite import set_fake_value
from ..torch_private import (
    FakeTensorMode,
    backed_size_oblivious,
    concrete,
    new_symbol,
    symbolic_fake_mode,
    symbolic_sizes_allowed,
)
from .arguments import NO_CONTROL_FLOW, decode, encode, resolve, target_name
from .constants import short


def inputs_out(program: Program, convention: CallingConvention) -> list[dict[str, Any]]:
    """Every input: name and dtype, dimensions (names where dynamic) with the example's sizes, or a constant value."""
    inputs = []
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), convention.inputs, strict=True):
        value = fake_value(node)
        entry: dict[str, Any] = {"name": spec.name, "dtype": spec.dtype}
        if spec.dtype is None:
            entry["value"] = encode(spec.value)
        else:
            hints = [concrete(d) for d in value.shape]
            entry |= {**_describe(value), "hints": hints, "device": str(value.device)}
        inputs.append(entry)
    return inputs


def inputs_in(entries: list[dict[str, Any]], graph: fx.Graph) -> tuple[InputSpec, ...]:
    """The calling convention's part of what `inputs_out` wrote, dimensions named as the graph names them now."""
    specs = []
    for entry, node in zip(entries, graph.find_nodes(op="placeholder"), strict=True):
        dims = _describe(fake_value(node))["dims"] if entry["dtype"] else ()
        specs.append(InputSpec(entry["name"], entry["dtype"], tuple(dims), decode(entry.get("value"))))
    return tuple(specs)


def nodes_out(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Every node in order, with the layer and module it belongs to; for readers, with its dtype and dimensions."""
    nodes = []
    for node in gm.graph.nodes:
        target = target_name(node)
        if node.op == "get_attr" and not isinstance(get_constant(gm, target), Tensor):
            raise ZQError("is no tensor and cannot be saved", where=target, fix=NO_CONTROL_FLOW)
        entry = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args)}
        if node.kwargs:
            entry["kwargs"] = encode(dict(node.kwargs))
        entry |= {k: name for k, name in (("layer", node.meta.get("layer")), ("module", layer_of(node))) if name}
        nodes.append({**entry, "val": _describe(fake_value(node))})
    return nodes


def _describe(value: Any) -> Any:
    """`[dtype, dims]` of a tensor, a list of those for several results, None for anything else."""
    if isinstance(value, Tensor):
        return {"dtype": short(value.dtype), "dims": [_size(d) for d in value.shape]}
    return [_describe(v) for v in value] if isinstance(value, tuple | list) else None


def _size(dim: Any) -> int | str:
    """A number, or the symbol's name; a symbol that the capture found to have one value prints as that number."""
    text = str(dim)
    return int(text) if text.isdecimal() else text


def nodes_in(entries: list[dict[str, Any]]) -> fx.Graph:
    """The graph that `nodes_out` wrote."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in entries:
        op, target = entry["op"], entry["target"]
        args, kwargs = decode(entry["args"], nodes), decode(entry.get("kwargs", {"dict": []}), nodes)
        call = resolve(target) if op == "call_function" else target
        node = nodes[entry["name"]] = graph.create_node(op, call, args, kwargs, name=entry["name"])
        if "layer" in entry:
            node.meta["layer"] = entry["layer"]
        if "module" in entry:  # as captures leave it, for `layer_of`
            node.meta["nn_module_stack"] = {"module": (entry["module"], "")}
    if not nodes or entries[-1]["op"] != "output":
        raise ZQError("its last node is no output")
    graph.lint()
    return graph


def rebuild_fake_values(gm: fx.GraphModule, graph: Mapping[str, Any]) -> None:
    """Fill `meta["val"]` of every node by running the graph on fake tensors with symbolic sizes."""
    # Every size that the file calls by one name becomes one symbol. Symbols are as the capture made them: with the
    # example's size as a hint, which ops may branch on, and valid for sizes 0 and 1 too.
    mode = symbolic_fake_mode()
    symbols: dict[str, Any] = {}
    entries = {entry["name"]: entry for entry in graph["nodes"]}
    inputs = {entry["name"]: entry for entry in graph["inputs"]}
    with backed_size_oblivious(), symbolic_sizes_allowed():
        for (name, entry), node in zip(entries.items(), gm.graph.nodes, strict=True):
            if node.op == "placeholder":
                node.meta["val"] = _fake_input(inputs[name], mode, symbols)
            elif node.op == "get_attr":
                node.meta["val"] = mode.from_tensor(get_constant(gm, node.target), static_shapes=True)
            elif node.op == "call_function":
                try:
                    set_fake_value(node)
                except Exception as error:
                    if not node.users:  # an assertion about sizes; its value is read by nothing and nobody
                        continue
                    what = f"node {name} ({entry['target']}) cannot be evaluated: {type(error).__name__}: {error}"
                    raise ZQError(what, fix=f"load it with torch {graph['torch']}, which wrote it") from error
            if node.op != "output" and not _agree(_describe(node.meta["val"]), entry["val"]):
                what = f"node {name} is {_describe(node.meta['val'])}, the file says {entry['val']}"
                raise ZQError(what)


def _fake_input(spec: Mapping[str, Any], mode: FakeTensorMode, symbols: dict[str, Any]) -> Any:
    if spec["dtype"] is None:
        return decode(spec["value"])
    for dim, hint in zip(spec["dims"], spec["hints"], strict=True):
        if isinstance(dim, str) and dim not in symbols:
            symbols[dim] = new_symbol(mode, hint)
    dims = [symbols[d] if isinstance(d, str) else d for d in spec["dims"]]
    with mode:
        return torch.empty(dims, dtype=getattr(torch, spec["dtype"]), device=spec["device"])


def _agree(computed: Any, written: Any) -> bool:
    """Equal dtypes, ranks and fixed sizes; a size that is symbolic on either side may have become another."""
    if isinstance(computed, list) or isinstance(written, list):
        both = isinstance(computed, list) and isinstance(written, list) and len(computed) == len(written)
        return both and all(_agree(c, w) for c, w in zip(computed, written, strict=True))
    if computed is None or written is None:
        return computed == written
    sizes = zip(computed["dims"], written["dims"], strict=False)
    alike = computed["dtype"] == written["dtype"] and len(computed["dims"]) == len(written["dims"])
    return alike and all(c == w for c, w in sizes if isinstance(c, int) and isinstance(w, int))
