"""Program -> ONNX file: the integer graph for ONNX Runtime, weights stored once as INT8, dynamic dimensions kept.

lower       dialect ops become `onnx_ops` functions, weights take the layout that MatMulInteger reads
export      torch.export of that graph, then torch's ONNX exporter
finish      names, metadata, file, checker
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir
from onnxscript.optimizer import optimize_ir
from torch import Tensor, fx

from ..errors import ExportError
from ..kernels import (
    NAMESPACE,
    dequantize,
    embedding_layer_norm_quantize,
    int8_embedding,
    int8_linear,
    int8_linear_gelu_quantize,
    int8_linear_quantize,
)
from ..program import Program, Stage, constant_bytes, constants, copy_graph, fake_value, get_constant, set_constant
from ..torch_private import OpOverload, backed_size_oblivious, concrete, pytree
from . import onnx_ops

TARGETS = ("onnxruntime",)
IR_VERSIONS = {20: 9, 21: 10, 22: 10}  # the IR version of each opset; onnx's own default is too new for its runtimes
PROTOBUF_LIMIT = 2**31 - 2**27  # bytes of a file with its weights inside: 2 GB less room for the graph


_SATURATION = (
    "on x86 without VNNI, set the session option session.x64quantprecision to 1: ONNX Runtime's integer products"
    " saturate there otherwise"
)
_BFLOAT16 = "it holds bfloat16 values, for which ONNX Runtime has no kernels on the CPU: use float16 or float32 there"


@dataclass
class ExportReport:
    """What was written.

    Args:
        nodes: how many of each operator.
        bytes_on_disk: the file and its external data.
        bytes_predicted: constants of the Program, tied ones once.
        checks: what was verified about the file.
        notes: what whoever runs it should know.
    """

    path: Path
    target: str
    opset: int
    nodes: dict[str, int]
    bytes_on_disk: int
    bytes_predicted: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.target}, opset {self.opset}, {self.bytes_on_disk / 1e6:.1f} MB"
            f" ({self.bytes_predicted / 1e6:.1f} MB of constants), {sum(self.nodes.values())} nodes"
        ]
        lines += [f"  input  {name}: {kind}" for name, kind in self.inputs.items()]
        lines += [f"  output {name}: {kind}" for name, kind in self.outputs.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  checked: {check}" for check in self.checks)])


def export(
    program: Program,
    path: str | Path,
    target: str = "onnxruntime",
    opset: int = 21,
    inline_limit: int = PROTOBUF_LIMIT,
) -> ExportReport:
    """Write a fused Program as an ONNX file.

    A bfloat16 model gives a valid file, but ONNX Runtime has no bfloat16 kernels on the CPU.

    Args:
        path: of the file; larger models put their weights beside it, in `<path>.data`.
        target: the runtime that the graph is written for.
        opset: of the standard operators.
        inline_limit: bytes of weights above which they go to the second file.

    Raises:
        ExportError: the target or opset is unknown, or an operation of the model has no ONNX form.
    """
    path = Path(path)
    if target not in TARGETS:
        raise ExportError(f"unknown target {target!r}", fix=f"use one of {', '.join(TARGETS)}")
    if opset not in IR_VERSIONS:
        raise ExportError(f"opset {opset} is not supported", fix=f"use one of {', '.join(map(str, IR_VERSIONS))}")
    if program.stage is not Stage.FUSED:
        raise ExportError(f"the graph is at stage {program.stage.name}, not FUSED", fix="run the whole pipeline first")
    lowered = lower(program)
    model = _converted(program, lowered, opset)
    _finish(model, program, [str(node.target) for node in lowered.graph.find_nodes(op="placeholder")], opset)
    size = _save(model, path, inline_limit)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the file is not valid ONNX: {error}", where=str(path), fix="report it as a bug") from error
    nodes = dict(Counter(node.op_type for node in model.graph.all_nodes()))
    bfloat16 = any(t.dtype is torch.bfloat16 for _, t in constants(program.gm))
    return ExportReport(
        path=path,
        target=target,
        opset=opset,
        nodes=nodes,
        bytes_on_disk=size,
        bytes_predicted=constant_bytes(program.gm),
        inputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.inputs},
        outputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.outputs},
        checks=["onnx.checker with full shape inference"],
        notes=[note for note, holds in ((_SATURATION, "MatMulInteger" in nodes), (_BFLOAT16, bfloat16)) if holds],
    )


# --- lower: still torch, already ONNX's operators --------------------------------------------------------------------


def lower(program: Program) -> fx.GraphModule:
    """A copy of the graph whose dialect ops are `onnx_ops` functions, its weights laid out for them.

    Raises:
        ExportError: a dialect op has no ONNX form.
    """
    gm = copy_graph(program.gm)
    _share_tied_constants(gm)
    transposed = _lay_out_constants(gm)
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and not isinstance(fake_value(node), Tensor) and not node.users:
            gm.graph.erase_node(node)  # a Python value that the graph was captured with
        if node.op == "output":
            node.args = (tuple(y for y in node.args[0] if isinstance(y, fx.Node)),)
        if node.op != "call_function":
            continue
        form = onnx_ops.FORMS.get(node.target)
        if form is None:
            if isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE:
                raise ExportError(f"{node.target} has no ONNX form", where=node.name, fix="report it as a bug")
            continue
        if node.target is int8_embedding and node.args[1].target in transposed:
            form = onnx_ops.int8_embedding_transposed
        node.target = form
    gm.recompile()
    return gm


def _share_tied_constants(gm: fx.GraphModule) -> None:
    """Constants that are one tensor under several names get one name."""
    names: dict[Any, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = get_constant(gm, node.target)
        if isinstance(value, Tensor):
            key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
            node.target = names.setdefault(key, node.target)


# argument positions of a weight's integers and scales
_LINEARS = (int8_linear, int8_linear_quantize, int8_linear_gelu_quantize)
_WEIGHTS = {
    **dict.fromkeys(_LINEARS, (2, 3)),
    int8_embedding: (1, 2),
    embedding_layer_norm_quantize: (1, 2),
    dequantize: (0, 1),
}


def _lay_out_constants(gm: fx.GraphModule) -> set[str]:
    """Integers `[N, K]` that a linear reads become `[K, N]`, scales `[N, 1]` become `[N]`; returns the transposed."""
    read: dict[Any, tuple[set[Any], ...]] = {}
    for target, positions in _WEIGHTS.items():
        nodes = gm.graph.find_nodes(op="call_function", target=target)
        weights = [node for node in nodes if node.args[positions[0]].op == "get_attr"]  # not an activation's
        read[target] = tuple({node.args[i].target for node in weights} for i in positions)
    transposed = set().union(*(read[linear][0] for linear in _LINEARS))
    if both := transposed & read[dequantize][0]:
        raise ExportError("is read both as integers and as floats", where=min(both), fix="report it as a bug")
    for name in set().union(*(scales for _, scales in read.values())):
        set_constant(gm, name, get_constant(gm, name).reshape(-1))
    for name in transposed:
        set_constant(gm, name, get_constant(gm, name).t().contiguous())
    return transposed


# --- export: torch's exporter ----------------------------------------------------------------------------------------


def _converted(program: Program, gm: fx.GraphModule, opset: int) -> ir.Model:
    placeholders = gm.graph.find_nodes(op="placeholder")
    with backed_size_oblivious(), torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(
                gm,
                _example_inputs(program, placeholders),
                dynamic_shapes=tuple(_dynamic_dims(fake_value(node)) for node in placeholders),
                strict=False,
            )
            result = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                custom_translation_table=onnx_ops.translations(n.target for n in gm.graph.nodes),
            )
            assert result is not None
            # A transposed constant stays an operation on it: folded, a table tied to a linear would be stored twice.
            optimize_ir(result.model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        except ExportError:
            raise
        except Exception as error:
            raise _explained(error, program) from error
    return result.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _example_inputs(program: Program, placeholders: Sequence[fx.Node]) -> tuple[Any, ...]:
    """The real inputs of these placeholders, or zeros of the sizes that the graph was traced with."""
    if program.example_inputs is not None:
        everything = program.graph.find_nodes(op="placeholder")
        given = dict(zip((n.target for n in everything), program.example_inputs, strict=True))
        return tuple(given[node.target] for node in placeholders)
    fakes = [fake_value(node) for node in placeholders]
    return tuple(
        torch.zeros([concrete(d) for d in f.shape], dtype=f.dtype) if isinstance(f, Tensor) else concrete(f)
        for f in fakes
    )


def _dynamic_dims(fake: Any) -> dict[int, Any] | None:
    if not isinstance(fake, Tensor):
        return None
    return {i: torch.export.Dim.AUTO for i, size in enumerate(fake.shape) if not isinstance(size, int)}


def _output_names(program: Program) -> list[str]:
    """Dotted names of the outputs, from the structure that the model returns: `logits`, `past_key_values.0`."""
    outputs: Any = program.graph.output_node().args[0]
    names = _leaf_names(program.out_spec) if program.out_spec is not None else [str(i) for i in range(len(outputs))]
    names = [name for name, y in zip(names, outputs, strict=True) if isinstance(y, fx.Node)]
    return [f"output.{name}".rstrip(".") if not name or name[0].isdigit() else name for name in names]


def _leaf_names(spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return [""]
    children = spec.children()
    keys: Sequence[Any] = spec.context
    if not isinstance(keys, list) or len(keys) != len(children) or not all(isinstance(k, str) for k in keys):
        keys = range(len(children))
    pairs = zip(keys, children, strict=True)
    return [f"{key}.{name}".rstrip(".") for key, child in pairs for name in _leaf_names(child)]


def _explained(error: Exception, program: Program) -> ExportError:
    """What torch's exporter could not do, and in which layer."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = str(chain[-1])
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text):
        operation = f"{found[1]}.{found[2]}"
        node = next((n for n in program.graph.nodes if str(n.target) in (operation, found[1])), None)
        return ExportError(
            f"{operation} has no ONNX form",
            where=_layer(node) if node is not None else None,
            fix="write this part of the model with other operations, or run it through compile()",
        )
    return ExportError(f"torch's ONNX exporter failed: {type(chain[-1]).__name__}: {text.strip().splitlines()[0]}")


def _layer(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return node.meta.get("layer") or (stack[-1][0] if stack and stack[-1][0] else node.name)


# --- finish: names, metadata, file -----------------------------------------------------------------------------------


def _finish(model: ir.Model, program: Program, inputs: Sequence[str], opset: int) -> None:
    _drop_metadata(model)
    _name_values(model, inputs, _output_names(program))
    _name_axes(model)
    _name_nodes(model)
    model.ir_version = IR_VERSIONS[opset]
    version = importlib.metadata.version("zq-compiler")
    model.producer_name, model.producer_version = "zq_compiler", version
    model.metadata_props.update(recipe=program.recipe.name, zq_compiler=version, torch=torch.__version__)


def _drop_metadata(model: ir.Model) -> None:
    """The exporter's notes: stack traces with paths of this machine, larger than the graph itself."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)]
    for holder in (model, graph, *graph.all_nodes(), *values):
        holder.metadata_props.clear()
        holder.doc_string = None


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Inputs and outputs get the model's names for them; the optimizer has made each a value of its own."""
    graph = model.graph
    names = [*inputs, *(f"{name}_out" if name in inputs else name for name in outputs)]
    named = dict(zip((*graph.inputs, *graph.outputs), names, strict=True))
    for value in (*graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs), *named):
        if value in named or value.name in names:
            value.name = f"{value.name}/inner"  # out of the way
    for value, name in named.items():
        value.name = name


_AXES = {1: ("batch",), 2: ("batch", "sequence"), 3: ("batch", "sequence", "features")}
_IMAGE_AXES = ("batch", "channels", "height", "width")
_CACHE_AXES = ("batch", "heads", "past_sequence", "head_size")


def _name_axes(model: ir.Model) -> None:
    """Dynamic dimensions get names that say what they are; two of one name are equal."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = _AXES.get(len(value.shape or ()), _CACHE_AXES if "past" in str(value.name) else _IMAGE_AXES)
        for axis, size in zip(axes, value.shape or (), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value not in names:
                names[size.value] = axis if axis not in names.values() else f"{value.name}_{axis}"
    for value in (*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: Any, names: dict[str, str]) -> Any:
    if not isinstance(size, ir.SymbolicDim) or size.value is None:
        return size
    return re.sub(r"\w+", lambda m: names.get(m[0], m[0]), size.value)


def _name_nodes(model: ir.Model) -> None:
    """Nodes that read a constant of a layer are named after the layer."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        constants = [v.name for v in node.inputs if v is not None and v.is_initializer() and "." in str(v.name)]
        if constants:
            name = f"{str(constants[0]).rpartition('.')[0]}/{node.op_type}"
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _save(model: ir.Model, path: Path, inline_limit: int) -> int:
    """Write the file, and its weights beside it when they are too many; returns the bytes of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = path.with_name(f"{path.name}.data")
    external = weights > inline_limit
    ir.save(model, path, format="protobuf", external_data=data.name if external else None)
    return path.stat().st_size + (data.stat().st_size if external else 0)
