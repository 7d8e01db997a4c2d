"""Rules of TensorRT: explicit quantization, symmetric, by constant scales; and what its fused attention asks for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from .attention import Attention, attentions, head_size, output_quantizer, sequence_length
from .graph import FP8, Graph, Node, Operand, type_name
from .qdq import hidden_dequantize, is_quantized, linears
from .report import Severity
from .rule import Complaints, rule

TARGET = "tensorrt"
INT8, UINT8, INT4 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4
TYPES = {INT8, INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1}  # of quantized values
REFUSED, WRONG, UNFUSED, SLOW = Severity.REFUSED, Severity.WRONG, Severity.UNFUSED, Severity.SLOW

# --- QuantizeLinear and DequantizeLinear -----------------------------------------------------------------------------


@rule("TRT001", "zero-point-not-zero", REFUSED, TARGET, mend="quantize symmetrically, to int8 with zero point 0")
def zero_point_not_zero(graph: Graph) -> Complaints:
    """TensorRT quantizes symmetrically only: every zero point is 0."""
    for node in graph.quantizers:
        zero_point = graph.constant(node.input(2))
        if zero_point is not None and (zero_point.astype(np.float32) != 0).any():
            odd = zero_point[zero_point.astype(np.float32) != 0].flat[0]
            yield node, f"its zero point is {odd}" if zero_point.size == 1 else f"a zero point is {odd}"


@rule("TRT002", "zero-point-computed", REFUSED, TARGET, mend="store the zero point, or leave it out")
def zero_point_computed(graph: Graph) -> Complaints:
    """A zero point is known when the engine is built."""
    for node in graph.quantizers:
        if node.input(2) and not graph.is_constant(node.input(2)):
            yield node, f"its zero point {node.input(2)} is computed, or an input"


@rule("TRT003", "scale-not-positive", REFUSED, TARGET, mend="give dead channels a small positive scale, such as 1e-6")
def scale_not_positive(graph: Graph) -> Complaints:
    """Every scale is above 0."""
    for node in graph.quantizers:
        scale = graph.constant(node.input(1))
        if scale is not None and not (scale.astype(np.float32) > 0).all():
            bad = scale[~(scale.astype(np.float32) > 0)].flat[0]
            yield node, f"a scale is {bad}"


@rule("TRT004", "unsigned-read-as-signed", WRONG, TARGET, mend="quantize to int8: scale = max(|x|) / 127, zero point 0")
def unsigned_read_as_signed(graph: Graph) -> Complaints:
    """uint8 with zero point 0 is taken for int8: what lies above 127 comes out wrong."""
    for node in graph.quantizers:
        zero_point = graph.constant(node.input(2))
        zero = zero_point is None or not zero_point.any()
        if graph.is_activation(node) and graph.integers(node) == UINT8 and zero:
            yield node, "it is uint8" if node.input(2) else "without a zero point it is uint8"


@rule("TRT005", "type-not-supported", REFUSED, TARGET, mend="use int8, or float8e4m3fn, or int4 for weights alone")
def type_not_supported(graph: Graph) -> Complaints:
    """Quantized values are int8, float8e4m3fn, int4 or float4e2m1."""
    for node in graph.quantizers:
        kind = graph.integers(node)
        unsigned_activation = kind == UINT8 and graph.is_activation(node)  # TRT001 or TRT004
        if kind is not None and kind not in {*TYPES, TensorProto.INT32} and not unsigned_activation:
            yield node, f"it is {type_name(kind)}"


@rule("TRT006", "int32-dequantized", REFUSED, TARGET, mend="keep the bias in floats")
def int32_dequantized(graph: Graph) -> Complaints:
    """DequantizeLinear does not read int32, as which ONNX Runtime's quantizer stores biases."""
    for node in graph.quantizers:
        if node.dequantizes and graph.integers(node) == TensorProto.INT32:
            yield node, f"{node.input(0)} is int32"


def _scaled_at_run_time(graph: Graph, node: Node) -> bool:
    return graph.is_activation(node) and not graph.is_constant(node.input(1))


@rule(
    "TRT007",
    "scale-computed",
    UNFUSED,
    TARGET,
    mend="divide by the row's maximum first, quantize by the constant 1/127, and multiply the product by the maximum",
)
def scale_computed(graph: Graph) -> Complaints:
    """An activation's scale is a constant; one that is computed makes a product of floats."""
    for node in graph.quantizers:
        if _scaled_at_run_time(graph, node) and graph.granularity(node) == "tensor":
            yield node, f"its scale {node.input(1)} is computed, or an input"


@rule(
    "TRT008",
    "blocked-scale-computed",
    REFUSED,
    TARGET,
    mend="divide by the row's maximum first, quantize by the constant 1/127, and multiply the product by the maximum",
)
def blocked_scale_computed(graph: Graph) -> Complaints:
    """Scales of blocks are constants; an activation by blocks has none that are known."""
    for node in graph.quantizers:
        if _scaled_at_run_time(graph, node) and graph.granularity(node) == "block":
            yield node, f"its scales {node.input(1)} are computed, or an input"


@rule(
    "TRT009",
    "activation-scale-per-channel",
    UNFUSED,
    TARGET,
    mend="give activations one scale, and move what differs between channels into the weight",
)
def activation_scale_per_channel(graph: Graph) -> Complaints:
    """An activation has one scale; with one for each channel, the product is of floats."""
    for node in graph.quantizers:
        if graph.is_activation(node) and graph.granularity(node) == "axis":
            scale = graph.constant(node.input(1))
            if scale is None or (scale != scale.flat[0]).any():
                yield node, f"it has scales along axis {node.attribute('axis', 1)}"


@rule("TRT010", "constant-not-dequantized", REFUSED, TARGET, mend="store it as DequantizeLinear should read it")
def constant_not_dequantized(graph: Graph) -> Complaints:
    """A constant of quantized values is read by DequantizeLinear and nothing else."""
    for node in graph.nodes:
        if node.quantizes or node.dequantizes or node.op in UNSUPPORTED or _is_vendor(node) or node.op == "Constant":
            continue
        read_as = [reader.input(2) == name for name in node.outputs for reader in graph.readers(name)]
        if read_as and all(read_as):
            continue  # a zero point on its way
        for name in node.inputs:
            if name and graph.is_stored(name) and graph.dtype(name) in TYPES:
                yield node, f"it reads {name}, which is {type_name(graph.dtype(name))}"


# --- operators -------------------------------------------------------------------------------------------------------

UNSUPPORTED = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
_VENDOR = "com.microsoft."
VENDOR_SUPPORTED = frozenset(  # by the parser of TensorRT-RTX 1.7.1
    _VENDOR + op
    for op in (
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding", "CausalConvWithState"),
        *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "Gelu", "GatherND", "Pad", "Trilu"),
        *("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "QMoE"),
    )
)


def _is_vendor(node: Node) -> bool:
    return node.op.startswith(_VENDOR)


@rule("TRT011", "integer-operator", REFUSED, TARGET, mend="write it as QuantizeLinear, DequantizeLinear and MatMul")
def integer_operator(graph: Graph) -> Complaints:
    """There is no importer for ONNX's operators on integers."""
    for node in graph.of(*UNSUPPORTED):
        yield node, "there is no importer for it"


@rule(
    "TRT012",
    "vendor-operator",
    REFUSED,
    TARGET,
    mend="give TensorRT the file as it was before ONNX Runtime optimized it, with ONNX's own operators",
)
def vendor_operator(graph: Graph) -> Complaints:
    """Few of ONNX Runtime's own operators have an importer."""
    for node in graph.nodes:
        if _is_vendor(node) and node.op not in VENDOR_SUPPORTED:
            yield node, "there is no importer for it"


@rule(
    "TRT013",
    "matmulnbits-without-plugin",
    REFUSED,
    TARGET,
    mend="load TensorRT-RTX's plugin library, or write DequantizeLinear by blocks of 128 and MatMul",
)
def matmulnbits(graph: Graph) -> Complaints:
    """MatMulNBits is imported as a plugin, which is in a library of its own."""
    for node in graph.of(f"{_VENDOR}MatMulNBits"):
        yield node, "it needs the plugin library"


# --- products --------------------------------------------------------------------------------------------------------


@rule(
    "TRT020",
    "weight-scale-on-contracted-axis",
    UNFUSED,
    TARGET,
    mend="quantize per output channel: axis 1 of [K, N] for MatMul, axis 0 of [N, K] with transB or a Transpose",
)
def weight_scale_on_contracted_axis(graph: Graph) -> Complaints:
    """A weight's scales run along its output channels; along the axis that is summed, the product is of floats."""
    for product, activation, weight in linears(graph):
        if is_quantized(activation) and graph.scale_axis(weight) == weight.contracted:
            yield product.node, f"the scales of {weight.value} run along the axis that is summed"


@rule("TRT021", "weight-only", SLOW, TARGET, mend="quantize the activation too, if speed rather than memory is the aim")
def weight_only(graph: Graph) -> Complaints:
    """A product with a quantized weight and a float activation is computed in floats: smaller, no faster."""
    for product, activation, weight in linears(graph):
        concat = activation.maker is not None and activation.maker.op == "Concat"  # TRT022
        in_float = not (is_quantized(activation) or hidden_dequantize(graph, activation) or concat)
        if is_quantized(weight) and in_float:
            yield product.node, f"{activation.value} is not quantized"


@rule(
    "TRT022",
    "concat-of-scales",
    UNFUSED,
    TARGET,
    mend="quantize what Concat makes, or all its inputs by one scale",
)
def concat_of_scales(graph: Graph) -> Complaints:
    """Values that were quantized by different scales cannot be joined and multiplied as integers."""
    for product in graph.products:
        for operand in product.operands:
            maker = operand.maker
            if maker is None or maker.op != "Concat" or operand.constant:
                continue
            parts = [graph.operand(name).dequantize for name in maker.inputs]
            scales = [graph.constant(part.input(1)) if part is not None else None for part in parts]
            if any(s is not None for s in scales):
                first = scales[0]
                if any(s is None or first is None or not np.array_equal(s, first) for s in scales):
                    yield product.node, f"{maker.label} joins values of different scales"


@rule("TRT023", "operand-types-differ", REFUSED, TARGET, mend="give all scales the type of the model's floats")
def operand_types_differ(graph: Graph) -> Complaints:
    """The operands of a product are floats of one type."""
    for product in graph.products:
        left, right = (graph.dtype(x.value) for x in product.operands)
        if left and right and left != right:
            yield product.node, f"it multiplies {type_name(left)} by {type_name(right)}"


@rule("TRT024", "scale-types-differ", REFUSED, TARGET, mend="give all scales the type of the model's floats")
def scale_types_differ(graph: Graph) -> Complaints:
    """The scales of a product's operands have one type, whatever DequantizeLinear puts out."""
    for product in graph.products:
        nodes = [x.dequantize for x in product.operands]
        left, right = (graph.dtype(node.input(1)) if node else None for node in nodes)
        same = len({graph.dtype(x.value) for x in product.operands}) == 1
        if left and right and left != right and same:
            yield product.node, f"scales are {type_name(left)} and {type_name(right)}"


@rule(
    "TRT025",
    "blocked-weight-and-quantized-activation",
    REFUSED,
    TARGET,
    mend="quantize the weight per output channel, or leave the activation in floats",
)
def blocked_weight(graph: Graph) -> Complaints:
    """A weight quantized by blocks multiplies floats only."""
    for product, activation, weight in linears(graph):
        node = weight.dequantize
        if is_quantized(activation) and node is not None and graph.granularity(node) == "block":
            yield product.node, f"{weight.value} has blocks of {node.attribute('block_size', 0)}"


@rule("TRT026", "int8-weight-by-blocks", SLOW, TARGET, mend="quantize INT8 weights per output channel, or use INT4")
def int8_weight_by_blocks(graph: Graph) -> Complaints:
    """An INT8 weight quantized by blocks is dequantized to memory by a kernel of its own."""
    for product, activation, weight in linears(graph):
        node = weight.dequantize
        if node is None or graph.granularity(node) != "block" or is_quantized(activation):
            continue
        if graph.integers(node) == INT8:
            yield product.node, f"{weight.value} has blocks of {node.attribute('block_size', 0)}"


@rule("TRT027", "int4-block-size", SLOW, TARGET, mend="use blocks of 64 or 128 along the axis that is summed")
def int4_block_size(graph: Graph) -> Complaints:
    """INT4 weights with one scale for a whole channel are dequantized to memory by a kernel of its own."""
    for product, activation, weight in linears(graph):
        node = weight.dequantize
        if node is None or is_quantized(activation) or graph.integers(node) != INT4:
            continue
        block = node.attribute("block_size", 0)
        shape = graph.shape(node.input(0))
        whole = shape is not None and block == shape[weight.contracted]
        if graph.granularity(node) != "block" or whole:
            yield product.node, f"{weight.value} has no blocks" if not block else f"its blocks are of {block}"


@rule(
    "TRT028",
    "int4-block-undocumented",
    Severity.NOTE,
    TARGET,
    mend="use blocks of 64 or 128",
    source="TensorRT's documentation of INT4 weight-only quantization; TensorRT-RTX fuses 16 and 32 too",
)
def int4_block_undocumented(graph: Graph) -> Complaints:
    """INT4 weights have blocks of 64 or 128."""
    for product, _, weight in linears(graph):
        node = weight.dequantize
        if node is not None and graph.integers(node) == INT4:
            block = node.attribute("block_size", 0)
            if block and block not in (64, 128):
                yield product.node, f"its blocks are of {block}"


@rule("TRT029", "int8-and-fp8", REFUSED, TARGET, mend="quantize both operands to one type")
def int8_and_fp8(graph: Graph) -> Complaints:
    """A product does not multiply INT8 by FP8."""
    for product in graph.products:
        kinds = [graph.integers(x.dequantize) for x in product.operands if x.dequantize is not None]
        if INT8 in kinds and any(kind in FP8 for kind in kinds):
            yield product.node, f"it multiplies {type_name(kinds[0])} by {type_name(kinds[1])}"


@rule(
    "TRT030",
    "narrow-product",
    SLOW,
    TARGET,
    mend="leave it in floats",
    source="NVIDIA ModelOpt, which leaves products with fewer than 16 inputs or outputs, or with one row, in floats",
)
def narrow_product(graph: Graph) -> Complaints:
    """INT8 gains nothing in products with fewer than 16 inputs or outputs."""
    for product, activation, weight in linears(graph):
        shape = graph.shape(weight.value)
        if shape and len(shape) == 2 and is_quantized(activation) and is_quantized(weight):
            small = [size for size in shape if size is not None and size < 16]
            if small:
                yield product.node, f"its weight is {' x '.join(map(str, shape))}"


# --- attention -------------------------------------------------------------------------------------------------------


def _types(graph: Graph, operands: Iterator[Operand]) -> list[int | None]:
    return [graph.integers(x.dequantize) for x in operands if x.dequantize is not None]


def _quantized(graph: Graph, kinds: set[int] | frozenset[int]) -> Iterator[Attention]:
    """Attentions of which some operand is quantized to one of some types."""
    for attention in attentions(graph):
        operands = iter((*attention.scores.operands, *attention.context.operands))
        if any(kind in kinds for kind in _types(graph, operands)):
            yield attention


def _int8(graph: Graph) -> Iterator[Attention]:
    return _quantized(graph, {int(INT8), int(UINT8)})


@rule(
    "TRT040",
    "attention-input-in-float",
    UNFUSED,
    TARGET,
    mend="quantize queries, keys, values, softmax and the attention's result; or none of them",
)
def attention_input_in_float(graph: Graph) -> Complaints:
    """INT8 fused attention needs queries, keys and values quantized."""
    for attention in _int8(graph):
        missing = [name for name, x in attention.inputs.items() if not is_quantized(x)]
        if missing:
            yield attention.softmax, f"{' and '.join(missing)} are not quantized"


@rule("TRT041", "softmax-in-float", UNFUSED, TARGET, mend="quantize what softmax puts out, by a calibrated scale")
def softmax_in_float(graph: Graph) -> Complaints:
    """INT8 fused attention needs Q/DQ behind the softmax."""
    for attention in _int8(graph):
        if not is_quantized(attention.probabilities):
            yield attention.softmax, "its output is multiplied as floats"


@rule(
    "TRT042",
    "attention-output-in-float",
    UNFUSED,
    TARGET,
    mend="put Q/DQ behind the second product, of which the output projection can then do without another",
)
def attention_output_in_float(graph: Graph) -> Complaints:
    """INT8 fused attention needs Q/DQ behind its second product."""
    for attention in _int8(graph):
        if output_quantizer(graph, attention) is None:
            yield attention.context.node, "its output is not quantized"


@rule("TRT043", "scores-quantized", UNFUSED, TARGET, mend="take the Q/DQ behind the first product away")
def scores_quantized(graph: Graph) -> Complaints:
    """INT8 fused attention keeps the scores in registers: no Q/DQ between the first product and softmax."""
    for attention in _int8(graph):
        if attention.scores_quantizer is not None:
            yield attention.scores_quantizer, f"it quantizes what {attention.softmax.label} reads"


@rule(
    "TRT044",
    "head-size",
    UNFUSED,
    TARGET,
    mend="leave the attention in float16: its fused kernels take heads of 16 to 256",
)
def int8_head_size(graph: Graph) -> Complaints:
    """INT8 fused attention takes heads of 16, 32 or 64."""
    for attention in _int8(graph):
        size = head_size(graph, attention)
        if size is not None and size not in (16, 32, 64):
            yield attention.softmax, f"its heads have {size} elements"


@rule("TRT045", "sequence-too-long", UNFUSED, TARGET, mend="leave the attention in float16, or shorten the sequence")
def int8_sequence(graph: Graph) -> Complaints:
    """INT8 fused attention takes at most 512 tokens where the length is fixed."""
    for attention in _int8(graph):
        length = sequence_length(graph, attention)
        if length is not None and length > 512:
            yield attention.softmax, f"it attends to {length} tokens"


@rule(
    "TRT046",
    "softmax-guarded",
    UNFUSED,
    TARGET,
    mend="export with eager attention, or take the IsNaN and Where behind softmax away where no row is masked whole",
)
def softmax_guarded(graph: Graph) -> Complaints:
    """A Where behind the softmax, which torch exports for scaled_dot_product_attention, keeps INT8 from fusing."""
    for attention in _int8(graph):
        if attention.guard is not None:
            yield attention.guard, f"it stands between {attention.softmax.label} and {attention.context.node.label}"


@rule("TRT047", "attention-in-float32", UNFUSED, TARGET, mend="convert the model to float16 or bfloat16")
def attention_in_float32(graph: Graph) -> Complaints:
    """Attention in float32 never fuses."""
    for attention in attentions(graph):
        operands = (*attention.scores.operands, *attention.context.operands)
        floats = {graph.dtype(x.value) for x in operands}
        if not any(is_quantized(x) for x in operands) and floats == {TensorProto.FLOAT}:
            yield attention.softmax, "it is float32, and not quantized"


@rule("TRT048", "head-size-of-floats", UNFUSED, TARGET, mend="pad the heads, or split them")
def float_head_size(graph: Graph) -> Complaints:
    """Fused attention of float16 or bfloat16 takes heads of 16 to 256."""
    for attention in attentions(graph):
        operands = (*attention.scores.operands, *attention.context.operands)
        size = head_size(graph, attention)
        half = graph.dtype(attention.scores.left.value) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if half and size is not None and not 16 <= size <= 256 and not any(is_quantized(x) for x in operands):
            yield attention.softmax, f"its heads have {size} elements"


@rule("TRT049", "fp8-attention-of-dynamic-length", UNFUSED, TARGET, mend="fix the sequence length; the batch may vary")
def fp8_dynamic_length(graph: Graph) -> Complaints:
    """FP8 fused attention needs a fixed sequence length."""
    for attention in _quantized(graph, FP8):
        if sequence_length(graph, attention) is None:
            yield attention.softmax, "its sequence length is dynamic"


@rule(
    "TRT050",
    "attention-operator-quantized",
    UNFUSED,
    TARGET,
    mend="write the attention as MatMul, Softmax and MatMul with Q/DQ, or leave its inputs in floats",
)
def attention_operator_quantized(graph: Graph) -> Complaints:
    """The Attention operator runs in half precision, whatever Q/DQ are about it."""
    for node in graph.of("Attention"):
        if any(is_quantized(graph.operand(name)) for name in node.inputs[:3] if name):
            yield node, "its inputs come from DequantizeLinear"


@rule("TRT051", "attention-operator-in-float32", REFUSED, TARGET, mend="convert the model to float16 or bfloat16")
def attention_operator_in_float32(graph: Graph) -> Complaints:
    """The Attention operator has no kernel for float32."""
    for node in graph.of("Attention"):
        if graph.dtype(node.input(0)) == TensorProto.FLOAT:
            yield node, "it is float32"


@rule("TRT052", "masked-attention-in-bfloat16", UNFUSED, TARGET, mend="convert the model to float16")
def masked_attention_in_bfloat16(graph: Graph) -> Complaints:
    """INT8 fused attention with a mask is for float16 and float32, not for bfloat16."""
    for attention in _int8(graph):
        if attention.mask is not None and graph.dtype(attention.scores.node.outputs[0]) == TensorProto.BFLOAT16:
            yield attention.softmax, f"{attention.mask.label} masks scores of bfloat16"
