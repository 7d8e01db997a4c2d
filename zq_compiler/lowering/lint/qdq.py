"""Rules for every runtime: what makes a product of Q/DQ one of floats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from .attention import attentions
from .graph import Graph, Node, Operand, Product
from .report import Severity
from .rule import Complaints, rule

FUSING = ("tensorrt", "onnxruntime")  # what computes products of Q/DQ in integers
ALL = (*FUSING, "onnxruntime-cuda")


def is_quantized(operand: Operand) -> bool:
    return operand.dequantize is not None


def linears(graph: Graph) -> Iterator[tuple[Product, Operand, Operand]]:
    """Products with a weight: the product, its activation and its weight."""
    for product in graph.products:
        if product.weight is not None and product.activation is not None and not product.activation.constant:
            yield product, product.activation, product.weight


def hidden_dequantize(graph: Graph, operand: Operand) -> Node | None:
    """A DequantizeLinear one operation ahead of what makes an operand, when that operation computes something."""
    if operand.maker is None or is_quantized(operand) or operand.maker.op in ("MatMul", "Gemm", "Concat", "Softmax"):
        return None
    inputs = (graph.operand(name) for name in operand.maker.inputs if name and not graph.is_constant(name))
    return next((x.dequantize for x in inputs if x.dequantize is not None), None)


@rule(
    "QDQ001",
    "weight-in-float",
    Severity.UNFUSED,
    *FUSING,
    mend="quantize the weight too: store it as INT8 ahead of a DequantizeLinear",
)
def weight_in_float(graph: Graph) -> Complaints:
    """A product whose activation is quantized and whose weight is not is one of floats."""
    for product, activation, weight in linears(graph):
        if is_quantized(activation) and not is_quantized(weight):
            yield product.node, f"its weight {weight.value} is {'/'.join(_types(graph, weight))}"


@rule(
    "QDQ002",
    "operation-after-dequantize",
    Severity.UNFUSED,
    *FUSING,
    mend="quantize right ahead of the product, behind that operation",
)
def operation_after_dequantize(graph: Graph) -> Complaints:
    """Arithmetic between DequantizeLinear and the product makes that a product of floats."""
    for product, activation, weight in linears(graph):
        if is_quantized(weight) and activation.maker and hidden_dequantize(graph, activation):
            yield product.node, f"{activation.maker.op} stands between it and the DequantizeLinear"


@rule(
    "QDQ003",
    "one-activation-in-float",
    Severity.UNFUSED,
    *FUSING,
    mend="quantize the other activation too, or neither",
)
def one_activation_in_float(graph: Graph) -> Complaints:
    """A product of two activations needs both quantized."""
    parts = {id(p.node) for a in attentions(graph) for p in (a.scores, a.context)}  # they have rules of their own
    for product in graph.products:
        if product.weight is None and id(product.node) not in parts:
            floats = [x.value for x in product.operands if not is_quantized(x)]
            if len(floats) == 1:
                yield product.node, f"{floats[0]} is not quantized"


@rule(
    "QDQ004",
    "scale-infinite",
    Severity.WRONG,
    *ALL,
    mend="calibrate again without Inf and NaN; a scale of float16 cannot exceed 65504",
)
def scale_infinite(graph: Graph) -> Complaints:
    """An infinite scale makes every value 0 or NaN; TensorRT accepts it without a word."""
    for node in graph.quantizers:
        scale = graph.constant(node.input(1))
        if scale is not None and np.isinf(scale.astype(np.float32)).any():
            yield node, "its scale is infinite"


@rule(
    "QDQ005",
    "weight-quantized-in-graph",
    Severity.NOTE,
    *ALL,
    mend="store the integers: quantize the weight once, and leave only DequantizeLinear in the graph",
    source="the file's size",
)
def weight_quantized_in_graph(graph: Graph) -> Complaints:
    """A weight stored in floats and quantized in the graph makes the file no smaller."""
    for node in graph.quantizers:
        if node.quantizes and graph.is_constant(node.input(0)):
            yield node, f"{node.input(0)} is stored as {'/'.join(_types(graph, graph.operand(node.input(0))))}"


@rule(
    "QDQ006",
    "norm-or-softmax-of-integers",
    Severity.NOTE,
    *ALL,
    mend="leave the inputs of norms and softmax in floats",
    source="github.com/NVIDIA/TensorRT/issues/4084",
)
def norm_of_integers(graph: Graph) -> Complaints:
    """A norm or softmax that reads quantized values loses accuracy, and gains no integer kernel."""
    for node in graph.of("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax"):
        if is_quantized(graph.operand(node.input(0))):
            yield node, f"its input {node.input(0)} comes from DequantizeLinear"


def _types(graph: Graph, operand: Operand) -> list[str]:
    kind = graph.dtype(operand.value)
    return [TensorProto.DataType.Name(kind).lower()] if kind else ["not quantized"]
