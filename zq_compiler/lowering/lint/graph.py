"""An indexed view of an ONNX file: who makes a value, who reads it, its type, and what is constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from ...errors import LintError

QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear")
DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
# What moves values without changing them. Products look through these, and through a multiplication by one number.
MOVES = frozenset(
    [
        "Transpose",
        "Reshape",
        "Slice",
        "Split",
        "Gather",
        "Unsqueeze",
        "Squeeze",
        "Flatten",
        "Expand",
        "Cast",
        "Dropout",
        "Identity",
    ]
)
FP8 = frozenset(getattr(TensorProto, f"FLOAT8{kind}") for kind in ("E4M3FN", "E4M3FNUZ", "E5M2", "E5M2FNUZ"))
_LARGE = 4096  # elements; a constant that has more stays where it is until it is asked for


def type_name(kind: int | None) -> str:
    """An element type in ONNX's words, in lower case.

    >>> type_name(TensorProto.FLOAT8E5M2)
    'float8e5m2'
    """
    names = {int(value): name for name, value in TensorProto.DataType.items()}
    return names.get(int(kind), f"type {kind}").lower() if kind else "an unknown type"


class Node:
    """A node.

    Args:
        op: its operator, with the domain ahead unless that is ONNX's own.
        inputs: names of values, empty where one is left out.
    """

    def __init__(self, proto: NodeProto) -> None:
        self.proto = proto
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
        self.op: str = domain + proto.op_type
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self.label: str = proto.name or next((name for name in proto.output if name), "")

    def input(self, index: int) -> str:
        """An input's name; empty if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute's value."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return helper.get_attribute_value(attribute)
        return default

    @property
    def quantizes(self) -> bool:
        return self.op in QUANTIZE

    @property
    def dequantizes(self) -> bool:
        return self.op in DEQUANTIZE


@dataclass(frozen=True)
class Operand:
    """What a product multiplies.

    Args:
        value: the value the product reads.
        maker: the node that made it, behind those that only move values; None for a constant or a graph's input.
        path: the latter, in the order of execution.
        constant: whether it is known before the graph runs.
        contracted: the axis that the product sums over, counted from the end.
    """

    value: str
    maker: Node | None
    path: tuple[Node, ...]
    constant: bool
    contracted: int

    @property
    def dequantize(self) -> Node | None:
        """The DequantizeLinear it comes from, if it does."""
        return self.maker if self.maker is not None and self.maker.dequantizes else None


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm."""

    node: Node
    left: Operand
    right: Operand

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.left, self.right

    @property
    def weight(self) -> Operand | None:
        """The operand that is constant; None when both are activations."""
        return next((x for x in (self.right, self.left) if x.constant), None)

    @property
    def activation(self) -> Operand | None:
        """The other operand of a product with a weight."""
        return None if self.weight is None else self.left if self.weight is self.right else self.right


class Graph:
    """One graph of a file: the main one, or the body of an If, Loop or Scan."""

    def __init__(self, proto: GraphProto, file: File, outer: Graph | None = None) -> None:
        self.file, self.outer = file, outer
        self.nodes = [Node(node) for node in proto.node]
        self.inputs = tuple(value.name for value in proto.input)
        self.outputs = tuple(value.name for value in proto.output)
        self._tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self._makers = {name: node for node in self.nodes for name in node.outputs if name}
        self._readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(filter(None, node.inputs)):
                self._readers.setdefault(name, []).append(node)
            if node.op == "Constant" and (value := node.attribute("value", None)) is not None:
                self._tensors[node.outputs[0]] = value
        values = [*proto.value_info, *proto.input, *proto.output]
        self._types = {v.name: v.type.tensor_type for v in values if v.type.HasField("tensor_type")}
        self._arrays: dict[str, np.ndarray | None] = {}

    @cached_property
    def _constants(self) -> set[str]:
        """Values that no input has a part in."""
        known = {*self._tensors, *(self.outer._constants if self.outer else ())} - set(self.inputs)
        for node in self.nodes:
            read = [name for name in node.inputs if name]
            if node.op == "Constant" or (read and all(name in known for name in read)):
                known.update(node.outputs)
        return known

    def of(self, *ops: str) -> list[Node]:
        """The nodes of some operators."""
        return [node for node in self.nodes if node.op in ops]

    @cached_property
    def quantizers(self) -> list[Node]:
        """QuantizeLinear and DequantizeLinear, ONNX Runtime's own too."""
        return self.of(*QUANTIZE, *DEQUANTIZE)

    def maker(self, value: str) -> Node | None:
        """The node that computes a value; None for an input or a stored constant."""
        return self._makers.get(value) or (self.outer.maker(value) if self.outer and value else None)

    def readers(self, value: str) -> list[Node]:
        """The nodes of this graph that read a value."""
        return self._readers.get(value, [])

    def is_constant(self, value: str) -> bool:
        """Whether a value is known before the graph runs: stored, or computed from what is stored."""
        return value in self._constants

    def is_stored(self, value: str) -> bool:
        """Whether a value is an initializer or a Constant."""
        return value in self._tensors or bool(self.outer and self.outer.is_stored(value))

    def constant(self, value: str) -> np.ndarray | None:
        """A stored constant's elements, as numpy holds them, read from beside the file if need be; None otherwise.

        Raises:
            LintError: its data is missing.
        """
        if value not in self._arrays:
            node = self._makers.get(value)
            if value in self._tensors:
                self._arrays[value] = self.file.read(self._tensors[value])
            elif node is not None and node.op == "Identity":
                self._arrays[value] = self.constant(node.input(0))
            elif node is not None and node.op == "Constant":  # a number, or a list of them
                attribute = node.proto.attribute[0]
                self._arrays[value] = np.asarray(helper.get_attribute_value(attribute))
            else:
                self._arrays[value] = self.outer.constant(value) if self.outer and value else None
        return self._arrays[value]

    def dtype(self, value: str) -> int | None:
        """A value's element type, from `TensorProto`; None if unknown."""
        if value in self._tensors:
            return int(self._tensors[value].data_type)
        if value in self._types:
            return int(self._types[value].elem_type) or None
        return self.outer.dtype(value) if self.outer and value else None

    def shape(self, value: str) -> tuple[int | None, ...] | None:
        """A value's shape, None for dimensions that are not fixed; None if the rank is unknown."""
        if value in self._tensors:
            return tuple(self._tensors[value].dims)
        if value in self._types:
            kind = self._types[value]
            if not kind.HasField("shape"):
                return None
            return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        return self.outer.shape(value) if self.outer and value else None

    # --- quantization ----------------------------------------------------------------------------------------------

    def integers(self, node: Node) -> int | None:
        """The type of the quantized values that a QuantizeLinear makes or a DequantizeLinear reads."""
        if node.dequantizes:
            return self.dtype(node.input(0)) or self.dtype(node.input(2))
        if zero_point := node.input(2):
            return self.dtype(zero_point)
        return node.attribute("output_dtype", 0) or int(TensorProto.UINT8)

    def granularity(self, node: Node) -> str | None:
        """`tensor`, `axis` or `block`: what has a scale of its own; None if it is unknown."""
        if node.attribute("block_size", 0):
            return "block"
        shape = self.shape(node.input(1))
        if shape is None:
            return None
        return "tensor" if all(size == 1 for size in shape) else "axis"

    def scale_axis(self, operand: Operand) -> int | None:
        """The axis of an operand that its scales run along, counted from its end; None if there is none, or unknown."""
        node = operand.dequantize
        if node is None or self.granularity(node) != "axis":
            return None
        scale = self.constant(node.input(1))
        if scale is not None and (scale == scale.flat[0]).all():
            return None  # as good as one scale
        shape = self.shape(node.input(0))
        if shape is None:
            return None
        rank = len(shape)
        axis = node.attribute("axis", 1) % rank
        for step in operand.path:
            if step.op == "Transpose":
                order = list(step.attribute("perm", range(rank)[::-1]))
                axis = order.index(axis)
            elif step.op not in ("Identity", "Cast", "Mul", "Div", "Dropout"):
                return None
        return axis - rank

    def is_activation(self, node: Node) -> bool:
        """Whether a QuantizeLinear or DequantizeLinear handles what is known at run time only."""
        return not self.is_constant(node.input(0))

    # --- products --------------------------------------------------------------------------------------------------

    def moves(self, node: Node) -> bool:
        """Whether a node only moves its first input's values, or multiplies them by one number."""
        if node.op in ("Mul", "Div"):
            return any(self._is_number(name) for name in node.inputs)
        return node.op in MOVES

    def _is_number(self, value: str) -> bool:
        shape = self.shape(value)
        return self.is_constant(value) and shape is not None and all(size == 1 for size in shape)

    def _moved(self, node: Node) -> str:
        """The value that a node moves."""
        if node.op in ("Mul", "Div") and self._is_number(node.input(0)):
            return node.input(1)
        return node.input(0)

    def operand(self, value: str, contracted: int = -1) -> Operand:
        """A value, and where it comes from."""
        path: list[Node] = []
        source, maker = value, self.maker(value)
        while maker is not None and self.moves(maker):
            path.insert(0, maker)
            source = self._moved(maker)
            maker = self.maker(source)
        return Operand(value, maker, tuple(path), self.is_constant(value), contracted)

    @cached_property
    def products(self) -> list[Product]:
        """Every MatMul and Gemm."""
        found = []
        for node in self.of("MatMul", "Gemm"):
            left = -2 if node.attribute("transA", 0) else -1
            right = -1 if node.attribute("transB", 0) else -2
            found.append(Product(node, self.operand(node.input(0), left), self.operand(node.input(1), right)))
        return found


class File:
    """A model: its graphs, and what is beside it."""

    def __init__(self, model: ModelProto, folder: Path | None) -> None:
        self._folder = folder
        self.notes: list[str] = []
        self.name: str = model.graph.name
        self.ir_version: int = int(model.ir_version)
        self.opset: int = next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self._left_out = {t.name: t for t in model.graph.initializer if _size(t) > _LARGE}
        light = _without_weights(model)
        if light.functions:
            light = inliner.inline_local_functions(light)
        try:
            light = onnx.shape_inference.infer_shapes(light, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError) as error:
            self.notes.append(f"types could not be inferred, so rules about types see little: {error}")
        self.graphs = list(_graphs(light.graph, self, None))

    def read(self, tensor: TensorProto) -> np.ndarray:
        """A constant's elements."""
        tensor = self._left_out.get(tensor.name, tensor)
        if tensor.data_location == TensorProto.EXTERNAL:
            copy = TensorProto()
            copy.CopyFrom(tensor)  # reading changes it
            tensor = copy
            if self._folder is None:
                raise LintError("its data lies in another file", where=tensor.name, fix="give the model's path")
        try:
            return numpy_helper.to_array(tensor, str(self._folder or ""))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise LintError(
                f"its data cannot be read: {error}", where=tensor.name, fix="keep the data files beside the model"
            ) from error


def read(model: str | Path | ModelProto) -> File:
    """A view of a file or a model.

    Raises:
        LintError: it cannot be read, or is not ONNX.
    """
    if isinstance(model, ModelProto):
        return File(model, None)
    path = Path(model)
    try:
        found = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise LintError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the path") from error
    except DecodeError as error:
        raise _not_onnx(path) from error
    if not found.graph.node or not found.opset_import:
        raise _not_onnx(path)
    return File(found, path.resolve().parent)


def _not_onnx(path: Path) -> LintError:
    return LintError("is not an ONNX model", where=str(path), fix="give a .onnx file")


def _size(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy whose large initializers have a type and a shape but no data, small enough for every tool of ONNX."""
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for name in ("node", "input", "output", "value_info"):
        getattr(light.graph, name).extend(getattr(model.graph, name))
    for tensor in model.graph.initializer:
        kept = light.graph.initializer.add()
        if _size(tensor) <= _LARGE:
            kept.CopyFrom(tensor)
            continue
        kept.name, kept.data_type, kept.data_location = tensor.name, tensor.data_type, TensorProto.EXTERNAL
        kept.dims.extend(tensor.dims)
        kept.external_data.add(key="location", value="left out")
    return light


def _graphs(proto: GraphProto, file: File, outer: Graph | None) -> Iterator[Graph]:
    """A graph and the bodies within it."""
    graph = Graph(proto, file, outer)
    yield graph
    for node in proto.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g, file, graph)
