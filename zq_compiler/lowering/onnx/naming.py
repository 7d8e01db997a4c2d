"""Names that say what something is: inputs and outputs as the model has them, axes, and each node after its layer."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from onnxscript import ir
from torch import Tensor, fx

from ...decoding import cache_leaves
from ...kernels import reference_of
from ...program import Program, fake_value
from ...rewrite import layer_name
from ...torch_private import pytree


def input_names(program: Program) -> dict[str, str]:
    """Placeholder -> the model's name for it; a cache's are `past_key_values.0.key`, as Optimum has them."""
    past = cache_leaves(program.in_spec)
    placeholders = [str(node.target) for node in program.graph.find_nodes(op="placeholder")]
    return {name: f"past_key_values.{past[i]}" if i in past else name for i, name in enumerate(placeholders)}


def output_names(program: Program) -> list[str]:
    """Dotted names of the outputs, from the structure that the model returns: `logits`, `past_key_values.0`.

    Where the model takes a cache, what it returns of one is `present.0.key`, as Optimum has it.
    """
    outputs: Any = program.graph.output_node().args[0]
    names = _leaf_names(program.out_spec) if program.out_spec is not None else [str(i) for i in range(len(outputs))]
    if cache_leaves(program.in_spec):
        present = cache_leaves(program.out_spec)
        names = [f"present.{present[i]}" if i in present else name for i, name in enumerate(names)]
    names = [name for name, y in zip(names, outputs, strict=True) if isinstance(y, fx.Node)]
    names = [f"output.{name}".rstrip(".") if not name or name[0].isdigit() else name for name in names]
    inputs = set(input_names(program).values())
    return [f"{name}_out" if name in inputs else name for name in names]


NAMED = "zq::Named"  # stands behind a value that is to have a name, until the exporter is done


def boundary_names(program: Program) -> dict[str, str]:
    """Node -> name of its value in a file: operands and results of dialect ops, `h.0.mlp/int8_linear_3`, and outputs.

    Results of one op are told apart by a number, `h.0.ln_1/layer_norm_quantize.0`. Inputs, constants and outputs have
    names of their own.
    """
    names: dict[str, str] = {}
    for node in program.graph.nodes:
        if reference_of(node.target) is None:
            continue
        name = f"{layer_name(program, node)}/{node.name.replace('_default', '')}"
        for result in results(node):
            names[result.name] = name if result is node else f"{name}.{result.args[1]}"
        for x in node.all_input_nodes:
            if x.op == "call_function" and isinstance(fake_value(x), Tensor):
                names.setdefault(x.name, f"{layer_name(program, x)}/{x.name}")
    returned = [y for y in program.graph.output_node().args[0] if isinstance(y, fx.Node)]  # type: ignore[union-attr]
    outputs = zip(returned, output_names(program), strict=True)
    return names | {y.name: name for y, name in outputs if y.op == "call_function"}


def results(node: fx.Node) -> list[fx.Node]:
    """What stands for the tensors that a dialect op returns and the graph reads."""
    if isinstance(fake_value(node), Tensor):
        return [node]
    return [user for user in node.users if user.target is operator.getitem]


def take_names(model: ir.Model) -> None:
    """Each `NAMED` gives its name to the value before it, and goes."""
    domain, op_type = NAMED.split("::")
    named: set[ir.Value] = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in [n for n in model.graph if (n.domain, n.op_type) == (domain, op_type)]:
        (value,), (out,) = node.inputs, node.outputs
        assert value is not None
        if value not in named:
            value.name = node.attributes["name"].as_string()
            named.add(value)
        value.shape, value.dtype = value.shape or out.shape, value.dtype or out.dtype
        ir.convenience.replace_all_uses_with(out, value, replace_graph_outputs=True)
        model.graph.remove(node)
    model.opset_imports.pop(domain, None)


def _leaf_names(spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return [""]
    children = spec.children()
    keys: Sequence[Any] = spec.context
    if not isinstance(keys, list) or len(keys) != len(children) or not all(isinstance(k, str) for k in keys):
        keys = range(len(children))
    pairs = zip(keys, children, strict=True)
    return [f"{key}.{name}".rstrip(".") for key, child in pairs for name in _leaf_names(child)]


def drop_metadata(model: ir.Model) -> None:
    """The exporter's notes: stack traces with paths of this machine, larger than the graph itself."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)]
    for holder in (model, graph, *graph.all_nodes(), *values):
        holder.metadata_props.clear()
        holder.doc_string = None


def name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs and outputs get the model's names for them; the optimizer has made each a value of its own."""
    graph = model.graph
    names = [*inputs, *outputs]
    named = dict(zip((*graph.inputs, *graph.outputs), names, strict=True))
    for value in (*graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs), *named):
        if value in named or value.name in names:
            value.name = f"{value.name}/inner"  # out of the way
    for value, name in named.items():
        value.name = name


_AXES = {1: ("batch",), 2: ("batch", "sequence"), 3: ("batch", "sequence", "features")}
_IMAGE_AXES = ("batch", "channels", "height", "width")
_CACHE_AXES = ("batch", "heads", "past_sequence", "head_size")
_PAST_MASK_AXES = ("batch", "total")


def name_axes(model: ir.Model) -> None:
    """Dynamic dimensions get names that say what they are; two of one name are equal.

    Where a cache goes in, sizes of one name are equal by what a cache is, also where the graph does not compare them.
    """
    names: dict[str, str] = {}
    with_past = any(str(value.name).startswith("past_key_values.") for value in model.graph.inputs)
    for value in model.graph.inputs:
        axes = _AXES.get(len(value.shape or ()), _CACHE_AXES if "past" in str(value.name) else _IMAGE_AXES)
        if with_past and value.name == "attention_mask":
            axes = _PAST_MASK_AXES
        for axis, size in zip(axes, value.shape or (), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value not in names:
                names[size.value] = axis if with_past or axis not in names.values() else f"{value.name}_{axis}"
    for value in (*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: Any, names: dict[str, str]) -> Any:
    if not isinstance(size, ir.SymbolicDim) or size.value is None:
        return size
    named = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.value)
    return " + ".join(sorted(named.split(" + "))) if re.fullmatch(r"\w+( \+ \w+)+", named) else named


def name_nodes(model: ir.Model) -> None:
    """Nodes that read a constant of a layer, as it is or dequantized, or write a named value, are named after it."""
    seen: Counter[str] = Counter()
    layers: dict[ir.Value, str] = {}  # values that follow from constants alone
    for node in model.graph.all_nodes():
        inputs = [v for v in node.inputs if v is not None]
        owners = [layers[v] if v in layers else _layer(v) for v in inputs]
        made = (str(v.name).rpartition("/")[0] for v in node.outputs if not str(v.name).endswith("/inner"))
        layer = next(filter(None, [*owners, *made]), "")
        if all(v in layers or v.is_initializer() for v in inputs):
            layers.update(dict.fromkeys(node.outputs, layer))
        if layer:
            name = f"{layer}/{node.op_type}"
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _layer(value: ir.Value) -> str:
    """The layer that a constant belongs to, by its dotted name."""
    return str(value.name).rpartition(".")[0] if value.is_initializer() else ""
