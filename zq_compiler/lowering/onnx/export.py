"""The whole way from a Program to a checked file, and the report of it."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import onnx
import torch
from onnxscript import ir

from ...errors import ExportError
from ...program import Program, Stage, constant_bytes, constants, content_hash
from ...recipe import DTYPES
from ...traffic import model_dtype
from . import naming
from .conversion import convert, prepared
from .dialect import Dialect
from .onnxruntime import OnnxRuntime, OnnxRuntimeCuda
from .sharing import share_weights, weights_below
from .tensorrt import TensorRT

DIALECTS: dict[str, type[Dialect]] = {dialect.target: dialect for dialect in (OnnxRuntime, OnnxRuntimeCuda, TensorRT)}
TARGETS = tuple(DIALECTS)
IR_VERSIONS = {20: 9, 21: 10, 22: 10, 28: 14}  # of each opset; onnx's own default is too new for runtimes
PROTOBUF_LIMIT = 2**31 - 2**27  # bytes of a file with its weights inside: 2 GB less room for the graph
_ELEMENTS = {
    "int4": ml_dtypes.int4,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
}
_SMALL = 256  # bytes of a constant that stays in the file, where shape inference can read it
_BFLOAT16 = "it holds bfloat16 values, for which ONNX Runtime has no kernels on the CPU: use float16 or float32 there"


@dataclass
class ExportReport:
    """What was written.

    Args:
        nodes: how many of each operator.
        bytes_on_disk: the file and its external data, as far as they were written.
        bytes_shared: constants that the file reads from a saved model's weights.
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
    bytes_shared: int = 0
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.target}, opset {self.opset}, {self.bytes_on_disk / 1e6:.1f} MB"
            f" ({self.bytes_predicted / 1e6:.1f} MB of constants), {sum(self.nodes.values())} nodes"
        ]
        if self.bytes_shared:
            lines.append(f"  {self.bytes_shared / 1e6:.1f} MB are read from the saved model's weights")
        lines += [f"  input  {name}: {kind}" for name, kind in self.inputs.items()]
        lines += [f"  output {name}: {kind}" for name, kind in self.outputs.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, *(f"  checked: {check}" for check in self.checks)])


def export(
    program: Program,
    path: str | Path,
    target: str = "onnxruntime",
    opset: int = 21,
    float_dtype: str | torch.dtype | None = None,
    saved: str | Path | None = None,
    inline_limit: int = PROTOBUF_LIMIT,
) -> ExportReport:
    """Write a fused Program as an ONNX file.

    A bfloat16 model gives a valid file, but ONNX Runtime has no bfloat16 kernels on the CPU.

    Args:
        path: of the file; larger models put their weights beside it, in `<path>.data`.
        target: the runtime that the graph is written for.
        opset: of the standard operators, 20, 21 or 22; for "tensorrt" also 28, whose own types FP6 and FP4 E2M1 weights
            get. No runtime reads FP6 yet, and ONNX Runtime no such file.
        float_dtype: of the file's floats, inputs and outputs included: "float16", "bfloat16" or "float32"; the
            model's own where it is None. Angles of rotary embeddings and the like stay as they are.
        saved: a folder that `q.save` wrote, in the folder of `path` or that folder itself. Constants that its
            `weights.safetensors` holds are read from there, not stored again.
        inline_limit: bytes of weights above which they go to the second file.

    Raises:
        ExportError: the target, opset or dtype is unknown, an operation of the model has no ONNX form, or the saved
            folder is elsewhere, has no weights or those of another model.
    """
    path = Path(path)
    weights = None if saved is None else weights_below(path.parent, Path(saved))
    if target not in DIALECTS:
        raise ExportError(f"unknown target {target!r}", fix=f"use one of {', '.join(TARGETS)}")
    if opset not in DIALECTS[target].opsets:
        known = ", ".join(map(str, DIALECTS[target].opsets))
        raise ExportError(f"opset {opset} is not supported for {target}", fix=f"use one of {known}")
    if program.stage is not Stage.FUSED:
        raise ExportError(f"the graph is at stage {program.stage.name}, not FUSED", fix="run the whole pipeline first")
    dtype = model_dtype(program) if float_dtype is None else _parsed_dtype(float_dtype)
    dialect = DIALECTS[target](program, dtype, opset)
    gm = prepared(program, dialect)
    model = convert(program, gm, dialect, opset)
    _store_elements(model, dialect.elements_of)
    naming.drop_metadata(model)
    names = naming.input_names(program)
    inputs = [names[str(node.target)] for node in gm.graph.find_nodes(op="placeholder")]
    naming.name_values(model, inputs, naming.output_names(program))
    naming.name_axes(model)
    naming.name_nodes(model)
    _describe(model, program, dialect, opset)
    shared = 0 if weights is None else share_weights(model, path.parent, weights, dialect.suffix)
    size = _save(model, path, inline_limit)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the file is not valid ONNX: {error}", where=str(path), fix="report it as a bug") from error
    bfloat16 = dialect.dtype is torch.bfloat16 or any(t.dtype is torch.bfloat16 for _, t in constants(program.gm))
    return ExportReport(
        path=path,
        target=target,
        opset=opset,
        nodes=dict(Counter(node.op_type for node in model.graph.all_nodes())),
        bytes_on_disk=size,
        bytes_predicted=constant_bytes(program.gm),
        inputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.inputs},
        outputs={str(v.name): f"{v.dtype} {v.shape}" for v in model.graph.outputs},
        bytes_shared=shared,
        checks=["onnx.checker with full shape inference"],
        notes=[*dict.fromkeys(dialect.notes), *([_BFLOAT16] if bfloat16 and target == "onnxruntime" else [])],
    )


def _parsed_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ExportError(f"unknown float_dtype {name!r}", fix=f"use one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _store_elements(model: ir.Model, elements_of: Mapping[str, str]) -> None:
    """Give values the element type that torch has not, in which each is exact."""
    for name, element in elements_of.items():
        if name not in model.graph.initializers:  # equal to another one, which stands for both
            continue
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(_ELEMENTS[element]), name=name)
        value.dtype = value.const_value.dtype


def _describe(model: ir.Model, program: Program, dialect: Dialect, opset: int) -> None:
    model.ir_version = IR_VERSIONS[opset]
    version = importlib.metadata.version("zq-compiler")
    model.producer_name, model.producer_version = "zq_compiler", version
    dtype = str(dialect.dtype).removeprefix("torch.")
    known = {"recipe": program.recipe.name, "hash": content_hash(program)}
    known |= {"target": dialect.target, "float_dtype": dtype}
    model.metadata_props.update(known, zq_compiler=version, torch=torch.__version__)


def _save(model: ir.Model, path: Path, inline_limit: int) -> int:
    """Write the file, and its weights beside it when they are too many; returns the bytes of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {v: v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
    own = {value: tensor for value, tensor in own.items() if not isinstance(tensor, ir.ExternalTensor)}
    data = path.with_name(f"{path.name}.data")
    external = sum(tensor.nbytes for tensor in own.values()) > inline_limit
    if external:
        large = {value: tensor for value, tensor in own.items() if tensor.nbytes > _SMALL}
        moved = ir.external_data.convert_tensors_to_external(list(large.values()), path.parent, data.name)
        for value, tensor in zip(large, moved, strict=True):
            value.const_value = tensor
    ir.save(model, path, format="protobuf")
    return path.stat().st_size + (data.stat().st_size if external else 0)
