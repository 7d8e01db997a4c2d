"""Rules of ONNX Runtime: what its CPU kernels fuse Q/DQ into, and what its CUDA kernels are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from .attention import attentions
from .graph import FP8, Graph, Node, Operand, Product, type_name
from .qdq import is_quantized, linears
from .report import Severity
from .rule import Complaints, rule

CPU, CUDA = "onnxruntime", "onnxruntime-cuda"
REFUSED, WRONG, UNFUSED, SLOW = Severity.REFUSED, Severity.WRONG, Severity.UNFUSED, Severity.SLOW
NEWEST_OPSET, NEWEST_IR = 26, 13  # of ONNX Runtime 1.31
INT8, UINT8 = int(TensorProto.INT8), int(TensorProto.UINT8)
KERNELS = "ONNX Runtime's list of kernels, docs/OperatorKernels.md"


def _named(prefix: str) -> set[int]:
    return {int(kind) for name, kind in TensorProto.DataType.items() if name.startswith(prefix)}


_NO_KERNEL = _named("FLOAT4") | _named("FLOAT6") | _named("FLOAT8E8M0")


def _quantized(graph: Graph) -> Iterator[tuple[Product, Node, Node]]:
    """Products both of whose operands come from DequantizeLinear, and those two nodes."""
    for product in graph.products:
        left, right = (x.dequantize for x in product.operands)
        if left is not None and right is not None:
            yield product, left, right


def _in_attention(graph: Graph) -> set[int]:
    """Identities of the products that are part of an attention."""
    return {id(product.node) for a in attentions(graph) for product in (a.scores, a.context)}


def _is_main(graph: Graph) -> bool:
    return graph.outer is None and bool(graph.nodes)


# --- the file --------------------------------------------------------------------------------------------------------


@rule("ORT001", "opset-too-new", REFUSED, CPU, CUDA, mend="export with opset 21, which has all that INT8 needs")
def opset_too_new(graph: Graph) -> Complaints:
    """ONNX Runtime 1.31 reads opsets up to 26."""
    if _is_main(graph) and graph.file.opset > NEWEST_OPSET:
        yield graph.nodes[0], f"the file is of opset {graph.file.opset}"


@rule(
    "ORT002", "ir-too-new", REFUSED, CPU, CUDA, mend="set model.ir_version = 10 for opset 21: onnx's default is newer"
)
def ir_too_new(graph: Graph) -> Complaints:
    """ONNX Runtime 1.31 reads IR versions up to 13."""
    if _is_main(graph) and graph.file.ir_version > NEWEST_IR:
        yield graph.nodes[0], f"the file has IR version {graph.file.ir_version}"


# --- types -----------------------------------------------------------------------------------------------------------


@rule("ORT003", "type-without-kernel", REFUSED, CPU, CUDA, mend="store FP4 and FP6 as float8e4m3fn, which holds them")
def type_without_kernel(graph: Graph) -> Complaints:
    """There are no kernels for FP4, FP6 and E8M0."""
    for node in graph.quantizers:
        if graph.integers(node) in _NO_KERNEL:
            yield node, f"it is {type_name(graph.integers(node))}"


@rule("ORT004", "bfloat16", REFUSED, CPU, mend="convert the model to float32")
def bfloat16(graph: Graph) -> Complaints:
    """The CPU has no QuantizeLinear or DequantizeLinear of bfloat16."""
    for node in graph.quantizers:
        if TensorProto.BFLOAT16 in (graph.dtype(node.input(0)), graph.dtype(node.input(1))):
            yield node, "it quantizes bfloat16" if node.quantizes else "it dequantizes to bfloat16"


@rule("ORT005", "float16", UNFUSED, CPU, mend="convert the model to float32 for the CPU")
def float16(graph: Graph) -> Complaints:
    """On the CPU, Q/DQ of float16 is not fused."""
    in_attention = _in_attention(graph)  # there some do
    for product, left, right in _quantized(graph):
        if id(product.node) not in in_attention and TensorProto.FLOAT16 in (
            graph.dtype(left.outputs[0]),
            graph.dtype(right.outputs[0]),
        ):
            yield product.node, "its operands are dequantized to float16"


@rule("ORT006", "fp8-product", REFUSED, CPU, mend='set the session option "session.disable_quant_qdq" to "1"')
def fp8_product(graph: Graph) -> Complaints:
    """A product of FP8 Q/DQ is fused into an integer operator that does not take FP8, and the file is not loaded."""
    in_attention = _in_attention(graph)
    for product, left, right in _quantized(graph):
        kinds = {graph.integers(left), graph.integers(right)}
        fuses = graph.dtype(left.outputs[0]) == TensorProto.FLOAT or id(product.node) in in_attention
        if kinds & FP8 and fuses:
            yield product.node, f"it multiplies {' by '.join(sorted(type_name(kind) for kind in kinds))}"


@rule("ORT007", "no-integer-product", UNFUSED, CPU, mend="use uint8 activations and int8 weights")
def no_integer_product(graph: Graph) -> Complaints:
    """Integer products are of 8 bits; wider and narrower operands are multiplied as floats."""
    for product, left, right in _quantized(graph):
        odd = {graph.integers(left), graph.integers(right)} - {INT8, UINT8, None} - FP8
        if odd:
            yield product.node, f"an operand is {' and '.join(sorted(type_name(kind) for kind in odd))}"


# --- activations -----------------------------------------------------------------------------------------------------


@rule(
    "ORT010",
    "signed-matmulinteger",
    SLOW,
    CPU,
    mend="use uint8 activations, with zero point 128",
    source="measured with ONNX Runtime 1.31 on x86: 10 times the time of uint8 activations, and more than float32's",
)
def signed_matmulinteger(graph: Graph) -> Complaints:
    """On x86, MatMulInteger of int8 activations is slower than a product of floats."""
    for node in graph.of("MatMulInteger"):
        if graph.dtype(node.input(0)) == INT8:
            yield node, f"{node.input(0)} is int8"


@rule("ORT011", "signed-and-shared", UNFUSED, CPU, mend="quantize activations to uint8")
def signed_and_shared(graph: Graph) -> Complaints:
    """An int8 activation becomes uint8 only where one node reads it; shared, as by Q, K and V, it stays unfused."""
    readers: dict[tuple[str, ...], int] = {}
    for node in graph.quantizers:
        if node.dequantizes and graph.integers(node) == INT8 and graph.is_activation(node):
            readers[_source(graph, node)] = readers.get(_source(graph, node), 0) + len(graph.readers(node.outputs[0]))
    for product, left, right in _quantized(graph):
        for operand, node in zip(product.operands, (left, right), strict=True):
            if not operand.constant and readers.get(_source(graph, node), 0) > 1:
                yield product.node, f"{readers[_source(graph, node)]} nodes read {operand.value}, which was int8"
                break


def _source(graph: Graph, dequantize: Node) -> tuple[str, ...]:
    """What equal quantizations of one value have in common; ONNX Runtime makes one of them."""
    quantize = graph.maker(dequantize.input(0))
    return quantize.inputs if quantize is not None else dequantize.inputs


@rule("ORT012", "signed-without-zero-point", UNFUSED, CPU, mend="give QuantizeLinear and DequantizeLinear a zero point")
def signed_without_zero_point(graph: Graph) -> Complaints:
    """An int8 activation whose zero point is left out does not fuse."""
    for product, left, right in _quantized(graph):
        for operand, node in zip(product.operands, (left, right), strict=True):
            if not operand.constant and graph.integers(node) == INT8 and not node.input(2):
                yield product.node, f"{operand.value} is int8, without a zero point"


def _scaled_by_parts(graph: Graph, kind: int) -> Complaints:
    """Products of an activation of a type with several scales."""
    for product, left, right in _quantized(graph):
        for operand, node in zip(product.operands, (left, right), strict=True):
            if not operand.constant and graph.integers(node) == kind and graph.granularity(node) in ("axis", "block"):
                yield product.node, f"{operand.value} has scales by {graph.granularity(node)}"


@rule("ORT013", "activation-scale-not-per-tensor", REFUSED, CPU, mend="give an activation one scale")
def activation_scale_not_per_tensor(graph: Graph) -> Complaints:
    """A product of a uint8 activation with several scales is fused all the same, and fails when it runs."""
    yield from _scaled_by_parts(graph, UINT8)


@rule("ORT017", "signed-activation-scale-not-per-tensor", UNFUSED, CPU, mend="give an activation one scale")
def signed_activation_scale_not_per_tensor(graph: Graph) -> Complaints:
    """A product of an int8 activation with several scales is one of floats."""
    yield from _scaled_by_parts(graph, INT8)


def _eight_bits(graph: Graph, node: Node) -> bool:
    return graph.integers(node) in (INT8, UINT8)


_MOVED = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice")  # ONNX Runtime draws DequantizeLinear through these


@rule(
    "ORT015",
    "signed-and-moved",
    REFUSED,
    CPU,
    mend="quantize behind that operation, or to uint8, or export to opset 20",
)
def signed_and_moved(graph: Graph) -> Complaints:
    """From opset 21 on, an int8 activation that is transposed or reshaped behind DequantizeLinear is not loaded."""
    for node in graph.quantizers:
        if graph.file.opset < 21 or not node.dequantizes or not node.input(2) or not graph.is_activation(node):
            continue
        for reader in graph.readers(node.outputs[0]):
            if graph.integers(node) == INT8 and reader.op in _MOVED and not _ends(graph, reader):
                yield node, f"{reader.op} reads it"


def _ends(graph: Graph, node: Node) -> bool:
    """Whether what a node moves is quantized again, or read by several."""
    readers = graph.readers(node.outputs[0])
    while len(readers) == 1 and readers[0].op in _MOVED:
        readers = graph.readers(readers[0].outputs[0])
    return len(readers) > 1 or any(reader.quantizes for reader in readers)


@rule("ORT016", "moved-behind-dequantize", UNFUSED, CPU, mend="quantize right ahead of the product")
def moved_behind_dequantize(graph: Graph) -> Complaints:
    """Gather, or a multiplication by a number, between DequantizeLinear and a product keeps that from fusing."""
    for product, _, _ in _quantized(graph):
        for operand in product.operands:
            kept = [step.op for step in operand.path if step.op in ("Gather", "Mul", "Div")]
            if kept and not operand.constant:
                yield product.node, f"{kept[0]} stands between {operand.value} and DequantizeLinear"


@rule("ORT014", "scale-not-a-number", WRONG, CPU, CUDA, mend="give dead channels a small positive scale, such as 1e-6")
def scale_not_a_number(graph: Graph) -> Complaints:
    """A scale of 0 or NaN makes NaN of what it scales."""
    for node in graph.quantizers:
        scale = graph.constant(node.input(1))
        if scale is not None:
            values = scale.astype(np.float32)
            if (values == 0).any() or np.isnan(values).any():
                yield node, f"a scale is {'0' if (values == 0).any() else 'NaN'}"


# --- weights ---------------------------------------------------------------------------------------------------------


def _scaled_along_sum(graph: Graph) -> Iterator[tuple[Product, Operand, bool]]:
    """Fused products whose weight has scales along the axis that is summed; and whether the weight is square."""
    for product, activation, weight in linears(graph):
        if is_quantized(activation) and graph.scale_axis(weight) == weight.contracted:
            shape = graph.shape(weight.value)
            yield product, weight, shape is not None and len(set(shape[-2:])) == 1


_PER_OUTPUT = "quantize per output channel: axis 1 of [K, N] for MatMul, axis 0 of [N, K] with transB or a Transpose"


@rule("ORT020", "weight-scale-on-contracted-axis", REFUSED, CPU, mend=_PER_OUTPUT)
def weight_scale_on_contracted_axis(graph: Graph) -> Complaints:
    """A weight with scales along the axis that is summed is fused all the same, and fails when it runs."""
    for product, weight, square in _scaled_along_sum(graph):
        if not square:
            yield product.node, f"the scales of {weight.value} run along the axis that is summed"


@rule("ORT021", "square-weight-scaled-on-contracted-axis", WRONG, CPU, mend=_PER_OUTPUT)
def square_weight_scale(graph: Graph) -> Complaints:
    """A square weight with scales along the axis that is summed is scaled along the other one, in silence."""
    for product, weight, square in _scaled_along_sum(graph):
        if square:
            yield product.node, f"the scales of {weight.value} run along the axis that is summed"


@rule(
    "ORT022",
    "blocked-weight-and-quantized-activation",
    REFUSED,
    CPU,
    mend="quantize the weight per output channel, or leave the activation in floats",
)
def blocked_weight(graph: Graph) -> Complaints:
    """A weight quantized by blocks is fused with a quantized activation, and fails, or is scaled wrongly."""
    for product, activation, weight in linears(graph):
        node = weight.dequantize
        if is_quantized(activation) and node and _eight_bits(graph, node) and graph.granularity(node) == "block":
            yield product.node, f"{weight.value} has blocks of {node.attribute('block_size', 0)}"


@rule(
    "ORT023",
    "unsigned-weight",
    SLOW,
    CPU,
    mend="quantize weights to int8 with zero point 0",
    source="measured with ONNX Runtime 1.31 on x86 with VNNI: a BERT takes 1.5 times the time that int8 weights do",
)
def unsigned_weight(graph: Graph) -> Complaints:
    """Products of uint8 by uint8 are slower than of uint8 by int8."""
    for product, activation, weight in linears(graph):
        if is_quantized(activation) and weight.dequantize and graph.integers(weight.dequantize) == UINT8:
            yield product.node, f"{weight.value} is uint8"


@rule(
    "ORT024",
    "gemm-bias-in-float",
    UNFUSED,
    CPU,
    mend="store the bias as int32 times activation scale times weight scale, or write MatMul and Add",
)
def gemm_bias_in_float(graph: Graph) -> Complaints:
    """Gemm fuses with an int32 bias that comes from DequantizeLinear, or with none."""
    for product, _, _ in _quantized(graph):
        bias = product.node.input(2)
        if product.node.op == "Gemm" and bias:
            maker = graph.maker(bias)
            if maker is None or not maker.dequantizes:
                yield product.node, f"its bias {bias} is not quantized"


@rule("ORT026", "gemm-without-zero-point", UNFUSED, CPU, mend="give the weight's DequantizeLinear a zero point of 0")
def gemm_without_zero_point(graph: Graph) -> Complaints:
    """Gemm fuses where its weight has a zero point; MatMul does without."""
    for product, activation, weight in linears(graph):
        node = weight.dequantize
        if product.node.op == "Gemm" and is_quantized(activation) and node is not None and not node.input(2):
            yield product.node, f"{weight.value} has no zero point"


@rule(
    "ORT025",
    "saturating-product",
    Severity.NOTE,
    CPU,
    mend='without VNNI set the session option "session.x64quantprecision" to "1", or use 7 bits for weights',
    source="depends on the processor; ONNX Runtime's documentation of quantization, on overflow",
)
def saturating_product(graph: Graph) -> Complaints:
    """On x86 without VNNI, sums of two products of uint8 by int8 saturate at 16 bits."""
    for node in graph.of("MatMulInteger", "QLinearMatMul", "com.microsoft.DynamicQuantizeMatMul"):
        yield node, "it, and others, multiply 8-bit integers"
        return
    for product, left, right in _quantized(graph):
        if _eight_bits(graph, left) and _eight_bits(graph, right):
            yield product.node, "it, and others, are products of 8-bit integers"
            return


# --- CUDA ------------------------------------------------------------------------------------------------------------

_CPU_ONLY = frozenset(
    (
        *("DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv", "ConvInteger"),
        *("com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat", "com.microsoft.QGemm"),
        *("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul", "com.microsoft.QLinearSoftmax"),
    )
)


@rule("CUDA001", "operator-without-kernel", SLOW, CUDA, mend="use int8 MatMulInteger or MatMulNBits", source=KERNELS)
def operator_without_kernel(graph: Graph) -> Complaints:
    """What has no CUDA kernel runs on the CPU, and its operands travel there and back."""
    for node in graph.nodes:
        if node.op in _CPU_ONLY:
            yield node, "it has no CUDA kernel"


@rule("CUDA002", "unsigned-matmulinteger", SLOW, CUDA, mend="quantize to int8, with zero point 0", source=KERNELS)
def unsigned_matmulinteger(graph: Graph) -> Complaints:
    """MatMulInteger has a CUDA kernel for int8 by int8 only; others run on the CPU."""
    for node in graph.of("MatMulInteger"):
        if UINT8 in (graph.dtype(node.input(0)), graph.dtype(node.input(1))):
            yield node, f"it multiplies {type_name(graph.dtype(node.input(0)))}"


@rule(
    "CUDA003", "type-without-cuda-kernel", SLOW, CUDA, mend="use int8 or uint8; keep biases in floats", source=KERNELS
)
def type_without_cuda_kernel(graph: Graph) -> Complaints:
    """There are no CUDA kernels for Q/DQ of int16, uint16 and int32."""
    for node in graph.quantizers:
        if graph.integers(node) in (TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32):
            yield node, f"it is {type_name(graph.integers(node))}"


@rule(
    "CUDA004",
    "product-of-floats",
    UNFUSED,
    CUDA,
    mend="use TensorRT for Q/DQ, or write MatMulInteger of int8",
    source="onnxruntime/core/optimizer/qdq_transformer: products are selected for the CPU and DirectML only",
)
def product_of_floats(graph: Graph) -> Complaints:
    """Q/DQ around a product is not fused for CUDA: quantization is only simulated."""
    for product, _, _ in _quantized(graph):
        yield product.node, "it multiplies what DequantizeLinear puts out"
