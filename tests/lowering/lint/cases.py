"""For every rule a graph that breaks it, and one that differs as little as can be and does not.

`proof` says what shows the difference: `refused` (the bad graph does not build or run, the good one does), a count of
`tests.tensorrt_rtx.Build` that the bad graph lacks, operators that ONNX Runtime fuses the good graph into and not the
bad, or another of the names in `test_rules.py`. It is empty for rules that state their source instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tests.lowering.lint.graphs import FP8_ZERO, INTEGERS, SCALES, K, N, attention, fp8, linear, model, quantized
from tests.onnx_graphs import graph, tensor

Make = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Case:
    rule: str
    target: str
    bad: Make
    good: Make
    proof: str = ""

    def __str__(self) -> str:
        return f"{self.rule}-{self.target}"


def io(kind: str, **shapes: str) -> str:
    """A header: inputs, and an output `y`."""
    out = shapes.pop("y")
    return f"({', '.join(f'{kind}[{shape}] {name}' for name, shape in shapes.items())}) => ({kind}[{out}] y)"


def cpu(*args: Any, **options: Any) -> onnx.ModelProto:
    """A linear as ONNX Runtime likes it: floats, uint8 activations."""
    return linear(*args, **{"dtype": "float", "z": np.uint8(128), **options})


def numbered(opset: int | None = None, ir: int | None = None) -> onnx.ModelProto:
    found = cpu(opset=opset or 21)
    found.ir_version = ir or found.ir_version
    return found


def computed(x: str) -> str:
    """A scale of the whole tensor, computed."""
    return f"ab = Abs(x)  am = ReduceMax<keepdims = 0>(ab)  sx = Div(am, c127)  {x}"


RELU = quantized("x", out="x1") + "xd = Relu(x1)"
RELU_FIRST = "r = Relu(x) " + quantized("r", out="xd")
AXIS = "xq = QuantizeLinear<axis = 2>(x, sv, zv)  xd = DequantizeLinear<axis = 2>(xq, sv, zv)"
BLOCKS = "wd = DequantizeLinear<axis = 0, block_size = {}>({}, bs)"
PER_K = "wd = DequantizeLinear<axis = 0>(w, ws)"
WEIGHT_QUANTIZED = "wq = QuantizeLinear<axis = 1>(wf, ws, wz)  wd = DequantizeLinear<axis = 1>(wq, ws, wz)"
ZERO_POINT = "wd = DequantizeLinear<axis = 1>(w, ws, wz)"
TRANSPOSED = "wt = DequantizeLinear<axis = {}>(w, ws)  wd = Transpose<perm = [1, 0]>(wt)"
CONCAT_IO = "({0}[B,S,32] a, {0}[B,S,32] b) => ({0}[B,S,64] y)"
SEVERAL = "y = MatMul(xd, wd)  vd = DequantizeLinear<axis = 1>(v, ws)  y2 = MatMul(xd, vd)"
ATTENTION_IO = "({0}[B,4,S,64] q, {0}[B,4,S,64] k, {0}[B,4,S,64] v) => ({0}[B,4,S,64] y)"
LAYER_NORM = "(float16[B,S,64] x) => (float16[B,S,64] y)"


def blocks(block: int, integers: int | None = None, x: str = "", k: int = 256, **options: Any) -> onnx.ModelProto:
    """A linear whose weight is INT8, or of another type, with a scale for each block of rows."""
    rows = np.resize(INTEGERS, (k, N))
    weight = rows if integers is None else tensor(integers, rows % 8)
    scales = np.resize(SCALES, (k // block, N)).astype(np.float16 if options.get("dtype") != "float" else np.float32)
    return linear(
        x, BLOCKS.format(block, "wb"), f"y = MatMul({'xd' if x else 'x'}, wd)", k=k, wb=weight, bs=scales, **options
    )


KEEP = {"keep": np.array([0, 0, 64])}


def moved(move: str, z: Any, opset: int = 21) -> onnx.ModelProto:
    """A linear for ONNX Runtime, of an activation that is moved behind its DequantizeLinear."""
    shapes = {**KEEP, "first": np.array([0]), "last": np.array([3])}
    out = "1,B,S,64" if "Unsqueeze" in move else "M,S,64"
    x = quantized("x", out="x1") + f"xd = {move}"
    return cpu(x, io=f"(float[B,S,64] x) => (float[{out}] y)", z=z, opset=opset, **shapes)


def two_activations(both: bool, dtype: str, **constants: Any) -> onnx.ModelProto:
    body = quantized("x") + (quantized("v") if both else "vd = Identity(v)  ") + "y = MatMul(xd, vd)"
    return model(io(dtype, x="B,S,64", v="B,64,S", y="B,S,S"), body, dtype, 21, constants)


def attention_operator(dtype: str, with_quantizers: bool) -> onnx.ModelProto:
    body = "".join(quantized(x) if with_quantizers else f"{x}d = Identity({x})  " for x in "qkv")
    return model(ATTENTION_IO.format(dtype), body + "y = Attention(qd, kd, vd)", dtype, 23, {})


def norm(body: str) -> onnx.ModelProto:
    return model(LAYER_NORM, body, "float16", 21, {"g": np.ones(64, np.float16)})


def integers(product: str, **options: Any) -> onnx.ModelProto:
    return graph(f"({product.split('|')[0]}) => (int32[B,S,64] y) {{ {product.split('|')[1]} }}", w=INTEGERS, **options)


MATMUL_INTEGER = "y = MatMulInteger(x, w)"
FP8_WEIGHT = {"weight": "wd = DequantizeLinear<axis = 1>(w8, ws)", "w8": fp8(INTEGERS / 32)}
GEMM = {"dtype": "float", "rank": 2, "z": np.uint8(128)}
NAN, INF = np.float16(np.nan), np.float16(np.inf)
VECTOR = {"sv": SCALES.astype(np.float16), "zv": np.zeros(64, np.int8)}

CASES = [
    # --- every runtime ---
    Case("QDQ001", "tensorrt", lambda: linear(weight="", y="y = MatMul(xd, wf)"), linear, "int8_gemms"),
    Case("QDQ001", "onnxruntime", lambda: cpu(weight="", y="y = MatMul(xd, wf)"), cpu, "MatMulIntegerToFloat"),
    Case("QDQ002", "tensorrt", lambda: linear(RELU), lambda: linear(RELU_FIRST), "int8_gemms"),
    Case("QDQ002", "onnxruntime", lambda: cpu(RELU), lambda: cpu(RELU_FIRST), "MatMulIntegerToFloat"),
    Case(
        "QDQ003",
        "tensorrt",
        lambda: two_activations(False, "float16"),
        lambda: two_activations(True, "float16"),
        "int8_gemms",
    ),
    Case(
        "QDQ003",
        "onnxruntime",
        lambda: two_activations(False, "float", z=np.uint8(128)),
        lambda: two_activations(True, "float", z=np.uint8(128)),
        "MatMulIntegerToFloat",
    ),
    Case("QDQ004", "tensorrt", lambda: linear(s=INF), linear, "accepted"),
    Case("QDQ004", "onnxruntime", lambda: cpu(s=np.float32(np.inf)), cpu, "finite"),
    Case("QDQ004", "onnxruntime-cuda", lambda: cpu(s=np.float32(np.inf)), cpu, "finite"),
    *(
        Case(
            "QDQ005",
            target,
            lambda: linear(weight=WEIGHT_QUANTIZED),
            linear,
        )
        for target in ("tensorrt", "onnxruntime", "onnxruntime-cuda")
    ),
    *(
        Case(
            "QDQ006",
            target,
            lambda: norm(quantized("x") + "y = LayerNormalization(xd, g)"),
            lambda: norm("n = LayerNormalization(x, g)  " + quantized("n", out="y")),
        )
        for target in ("tensorrt", "onnxruntime", "onnxruntime-cuda")
    ),
    # --- TensorRT: Q/DQ ---
    Case("TRT001", "tensorrt", lambda: linear(z=np.int8(3)), linear, "refused"),
    Case("TRT001", "tensorrt", lambda: linear(z=np.uint8(128)), linear, "refused"),
    Case(
        "TRT002",
        "tensorrt",
        lambda: linear(io="(float16[B,S,64] x, int8 z) => (float16[B,S,64] y)"),
        linear,
        "refused",
    ),
    *(Case("TRT003", "tensorrt", lambda s=s: linear(s=np.float16(s)), linear, "refused") for s in (0, -0.1, NAN)),
    Case("TRT003", "tensorrt", lambda: linear(ws=np.r_[SCALES[1:], 0].astype(np.float16)), linear, "refused"),
    Case("TRT004", "tensorrt", lambda: linear(z=np.uint8(0)), linear, "warned"),
    Case(
        "TRT004",
        "tensorrt",
        lambda: linear("xq = QuantizeLinear(x, s)  xd = DequantizeLinear(xq, s)"),
        lambda: linear("xq = QuantizeLinear<output_dtype = 3>(x, s)  xd = DequantizeLinear(xq, s)"),
        "accepted",
    ),
    *(
        Case("TRT005", "tensorrt", lambda z=z: linear(z=z), linear, "refused")
        for z in (np.int16(0), np.uint16(0), tensor(TensorProto.FLOAT8E5M2, 0.0))
    ),
    *(
        Case("TRT005", "tensorrt", lambda w=w, opset=opset: linear(w=w, opset=opset), linear, "refused")
        for w, opset in (
            (INTEGERS.view(np.uint8), 21),
            (tensor(TensorProto.UINT4, INTEGERS.astype(int) % 8), 21),
            (tensor(TensorProto.INT2, INTEGERS % 2), 25),
        )
    ),
    Case(
        "TRT006",
        "tensorrt",
        lambda: linear(y="bd = DequantizeLinear(b32, s)  t = MatMul(xd, wd)  y = Add(t, bd)", b32=np.ones(N, np.int32)),
        lambda: linear(y="t = MatMul(xd, wd)  y = Add(t, bias)"),
        "refused",
    ),
    Case("TRT007", "tensorrt", lambda: linear(computed(quantized("x", scale="sx"))), linear, "int8_gemms"),
    Case(
        "TRT008",
        "tensorrt",
        lambda: linear(
            "ab = Abs(x)  am = ReduceMax(ab, last)  sx = Div(am, c127)"
            "  xq = QuantizeLinear<axis = 2, block_size = 64, output_dtype = 3>(x, sx)"
            "  xd = DequantizeLinear<axis = 2, block_size = 64>(xq, sx)",
            last=np.array([-1]),
        ),
        lambda: linear(  # the mend
            "ab = Abs(x)  am = ReduceMax(ab, last)  n = Div(x, am)  " + quantized("n", out="xd", scale="p"),
            y="t = MatMul(xd, wd)  y = Mul(t, am)",
            last=np.array([-1]),
        ),
        "refused",
    ),
    Case("TRT009", "tensorrt", lambda: linear(AXIS, **VECTOR), linear, "int8_gemms"),
    Case(
        "TRT010",
        "tensorrt",
        lambda: linear(weight="wt = Transpose<perm = [1, 0]>(w)  wd = DequantizeLinear<axis = 1>(wt, ws)"),
        lambda: linear(weight=TRANSPOSED.format(0)),
        "refused",
    ),
    # --- TensorRT: operators ---
    Case("TRT011", "tensorrt", lambda: integers("int8[B,S,64] x|" + MATMUL_INTEGER), linear, "refused"),
    Case(
        "TRT011",
        "tensorrt",
        lambda: integers("float[B,S,64] x|q, s, z = DynamicQuantizeLinear(x)  y = MatMulInteger(q, w, z)"),
        linear,
        "refused",
    ),
    Case(
        "TRT012",
        "tensorrt",
        lambda: norm("y = com.microsoft.SkipLayerNormalization(x, x, g, g)"),
        lambda: norm("t = Add(x, x)  y = LayerNormalization(t, g, g)"),
        "refused",
    ),
    Case("TRT012", "tensorrt", lambda: norm("y = com.microsoft.FastGelu(x)"), lambda: norm("y = Gelu(x)"), "refused"),
    Case(
        "TRT013",
        "tensorrt",
        lambda: graph(
            LAYER_NORM + "{ y = com.microsoft.MatMulNBits<K = 64, N = 64, bits = 4, block_size = 32>(x, w, s) }",
            w=np.ones((64, 2, 16), np.uint8),
            s=np.ones((64, 2), np.float16),
        ),
        lambda: blocks(64, TensorProto.INT4),
        "refused",
    ),
    # --- TensorRT: products ---
    Case("TRT020", "tensorrt", lambda: linear(weight=PER_K), linear, "int8_gemms"),
    Case(
        "TRT020",
        "tensorrt",
        lambda: linear(weight=TRANSPOSED.format(1)),
        lambda: linear(weight=TRANSPOSED.format(0)),
        "int8_gemms",
    ),
    Case(
        "TRT020",
        "tensorrt",
        lambda: linear(y="y = Gemm<transB = 1>(xd, wd)", rank=2),
        lambda: linear(weight=PER_K, y="y = Gemm<transB = 1>(xd, wd)", rank=2),
        "int8_gemms",
    ),
    Case("TRT021", "tensorrt", lambda: linear("", y="y = MatMul(x, wd)"), linear, "int8_gemms"),
    Case(
        "TRT022",
        "tensorrt",
        lambda: linear(
            quantized("a") + quantized("b", scale="s2") + "xd = Concat<axis = 2>(ad, bd)",
            io=CONCAT_IO.format("float16"),
        ),
        lambda: linear(
            quantized("a") + quantized("b") + "xd = Concat<axis = 2>(ad, bd)", io=CONCAT_IO.format("float16")
        ),
        "int8_gemms",
    ),
    Case("TRT023", "tensorrt", lambda: linear(ws=SCALES), linear, "refused"),
    Case(
        "TRT024",
        "tensorrt",
        lambda: linear(
            "xq = QuantizeLinear(x, s32, z)  xd = DequantizeLinear<output_dtype = 10>(xq, s32, z)", opset=23
        ),
        lambda: linear(
            "xq = QuantizeLinear(x, s32, z)  xd = DequantizeLinear<output_dtype = 10>(xq, s32, z)",
            "wd = DequantizeLinear<axis = 1, output_dtype = 10>(w, w32)",
            opset=23,
        ),
        "refused",
    ),
    Case("TRT025", "tensorrt", lambda: blocks(64, x=quantized("x")), lambda: blocks(64), "refused"),
    Case("TRT025", "tensorrt", lambda: blocks(64, TensorProto.INT4, quantized("x")), lambda: blocks(64), "refused"),
    Case("TRT026", "tensorrt", lambda: blocks(64), lambda: blocks(64, TensorProto.INT4), "dequantizes"),
    Case(
        "TRT027",
        "tensorrt",
        lambda: blocks(256, TensorProto.INT4),
        lambda: blocks(64, TensorProto.INT4),
        "dequantizes",
    ),
    Case(
        "TRT027",
        "tensorrt",
        lambda: linear("", y="y = MatMul(x, wd)", w=tensor(TensorProto.INT4, INTEGERS % 8)),
        lambda: blocks(64, TensorProto.INT4),
        "dequantizes",
    ),
    Case("TRT028", "tensorrt", lambda: blocks(32, TensorProto.INT4), lambda: blocks(128, TensorProto.INT4)),
    Case("TRT029", "tensorrt", lambda: linear(**FP8_WEIGHT), lambda: linear(z=FP8_ZERO, **FP8_WEIGHT), "refused"),
    Case("TRT030", "tensorrt", lambda: linear(n=8, w=INTEGERS[:, :8], ws=SCALES[:8].astype(np.float16)), linear),
    # --- TensorRT: attention ---
    *(Case("TRT040", "tensorrt", lambda x=x: attention(**{x: False}), attention, "int8_mhas") for x in ("q", "k", "v")),
    Case("TRT041", "tensorrt", lambda: attention(p=False), attention, "int8_mhas"),
    Case("TRT042", "tensorrt", lambda: attention(out=False), attention, "int8_mhas"),
    Case("TRT043", "tensorrt", lambda: attention(scores=True), attention, "int8_mhas"),
    *(
        Case("TRT044", "tensorrt", lambda d=d: attention(heads=d), lambda d=d: attention(heads=d // 2), "int8_mhas")
        for d in (128,)
    ),
    Case("TRT044", "tensorrt", lambda: attention(heads=80), lambda: attention(heads=16), "int8_mhas"),
    Case("TRT045", "tensorrt", lambda: attention(length=513), lambda: attention(length=512), "int8_mhas"),
    Case("TRT046", "tensorrt", lambda: attention(guard=True), attention, "int8_mhas"),
    Case(
        "TRT047",
        "tensorrt",
        lambda: attention(q=False, k=False, v=False, p=False, out=False, dtype="float"),
        lambda: attention(q=False, k=False, v=False, p=False, out=False),
        "half_mhas",
    ),
    *(
        Case(
            "TRT048",
            "tensorrt",
            lambda d=d: attention(q=False, k=False, v=False, p=False, out=False, heads=d),
            lambda: attention(q=False, k=False, v=False, p=False, out=False, heads=128),
            "half_mhas",
        )
        for d in (8, 320)
    ),
    Case("TRT049", "tensorrt", lambda: attention(z=FP8_ZERO), lambda: attention(z=FP8_ZERO, length=128), "fp8_mhas"),
    Case(
        "TRT050",
        "tensorrt",
        lambda: attention_operator("float16", True),
        lambda: attention(),
        "int8_mhas",
    ),
    Case(
        "TRT051",
        "tensorrt",
        lambda: attention_operator("float", False),
        lambda: attention_operator("float16", False),
        "refused",
    ),
    Case(
        "TRT052",
        "tensorrt",
        lambda: attention(dtype="bfloat16"),
        lambda: attention(dtype="bfloat16", masked=False),
        "int8_mhas",
    ),
    Case("TRT052", "tensorrt", lambda: attention(dtype="bfloat16"), lambda: attention(dtype="float"), "int8_mhas"),
    # --- ONNX Runtime ---
    *(
        case
        for target in ("onnxruntime", "onnxruntime-cuda")
        for case in (
            Case("ORT001", target, lambda: numbered(opset=27), lambda: numbered(opset=26), "refused"),
            Case("ORT002", target, lambda: numbered(ir=14), lambda: numbered(ir=13), "refused"),
            Case(
                "ORT003",
                target,
                lambda: cpu("", y="y = MatMul(x, wd)", w=tensor(TensorProto.FLOAT4E2M1, INTEGERS % 3), opset=23),
                lambda: cpu("", y="y = MatMul(x, wd)", opset=23),
                "refused",
            ),
            Case("ORT014", target, lambda: cpu(s=np.float32(0)), cpu, "finite"),
            Case("ORT014", target, lambda: cpu(ws=np.r_[SCALES[1:], np.nan].astype(np.float32)), cpu, "finite"),
        )
    ),
    Case("ORT004", "onnxruntime", lambda: cpu(dtype="bfloat16"), cpu, "refused"),
    Case("ORT005", "onnxruntime", lambda: cpu(dtype="float16"), cpu, "MatMulIntegerToFloat"),
    Case("ORT006", "onnxruntime", lambda: cpu(z=FP8_ZERO, **FP8_WEIGHT), cpu, "refused"),
    Case("ORT006", "onnxruntime", lambda: attention(z=FP8_ZERO), lambda: attention(z=np.uint8(128)), "refused"),
    Case("ORT007", "onnxruntime", lambda: cpu(z=np.int16(0)), cpu, "MatMulIntegerToFloat"),
    Case(
        "ORT007",
        "onnxruntime",
        lambda: cpu(w=tensor(TensorProto.INT4, INTEGERS % 8)),
        cpu,
        "MatMulIntegerToFloat",
    ),
    Case(
        "ORT010",
        "onnxruntime",
        lambda: integers("int8[B,S,64] x|" + MATMUL_INTEGER),
        lambda: integers("uint8[B,S,64] x|" + MATMUL_INTEGER),
    ),
    *(
        Case(
            "ORT011",
            "onnxruntime",
            lambda y=y: cpu(
                y=y,
                io="(float[B,S,64] x) => (float[B,S,64] y, float[B,S,64] y2)",
                z=np.int8(0),
                v=INTEGERS.T.copy(),
            ),
            lambda y=y: cpu(y=y, io="(float[B,S,64] x) => (float[B,S,64] y, float[B,S,64] y2)", v=INTEGERS.T.copy()),
            "MatMulIntegerToFloat",
        )
        for y in (
            SEVERAL,
            SEVERAL.replace("vd =", "xq2 = QuantizeLinear(x, s, z)  xd2 = DequantizeLinear(xq2, s, z)  vd =").replace(
                "MatMul(xd, vd)", "MatMul(xd2, vd)"
            ),
            "y = MatMul(xd, wd)  y2 = Relu(xd)",
        )
    ),
    Case(
        "ORT012",
        "onnxruntime",
        lambda: cpu("xq = QuantizeLinear<output_dtype = 3>(x, s)  xd = DequantizeLinear(xq, s)"),
        lambda: cpu(z=np.int8(0)),
        "MatMulIntegerToFloat",
    ),
    Case("ORT013", "onnxruntime", lambda: cpu(AXIS, sv=SCALES, zv=np.full(64, 128, np.uint8)), cpu, "refused"),
    *(
        Case("ORT015", "onnxruntime", lambda m=m: moved(m, np.int8(0)), lambda m=m: moved(m, np.uint8(128)), "refused")
        for m in (
            "Reshape(x1, keep)",
            "Transpose<perm = [0, 1, 2]>(x1)",
            "Unsqueeze(x1, first)",
            "Slice(x1, first, last)",
        )
    ),
    Case(
        "ORT015",
        "onnxruntime",
        lambda: moved("Reshape(x1, keep)", np.int8(0)),
        lambda: moved("Reshape(x1, keep)", np.int8(0), opset=20),
        "refused",
    ),
    Case(
        "ORT015",
        "onnxruntime",
        lambda: moved("Reshape(x1, keep)", np.int8(0)),
        lambda: cpu(
            quantized("x", out="x1") + "r = Reshape(x1, keep)  " + quantized("r", out="xd"), z=np.int8(0), **KEEP
        ),
        "refused",
    ),
    *(
        Case(
            "ORT016",
            "onnxruntime",
            lambda m=m: moved(m, np.uint8(128)),
            lambda: moved("Reshape(x1, keep)", np.uint8(128)),
            "MatMulIntegerToFloat",
        )
        for m in ("Mul(x1, half)", "Gather<axis = 0>(x1, first)")
    ),
    Case(
        "ORT017",
        "onnxruntime",
        lambda: cpu(AXIS, sv=SCALES, zv=np.zeros(64, np.int8)),
        lambda: cpu(z=np.int8(0)),
        "MatMulIntegerToFloat",
    ),
    Case("ORT020", "onnxruntime", lambda: cpu(weight=PER_K, n=32, w=INTEGERS[:, :32]), cpu, "refused"),
    Case("ORT021", "onnxruntime", lambda: cpu(weight=PER_K), cpu, "exact"),
    Case(
        "ORT021",
        "onnxruntime",
        lambda: cpu(weight=TRANSPOSED.format(1)),
        lambda: cpu(weight=TRANSPOSED.format(0)),
        "exact",
    ),
    Case(
        "ORT022",
        "onnxruntime",
        lambda: blocks(64, x=quantized("x"), dtype="float", z=np.uint8(128)),
        lambda: blocks(64, dtype="float"),
        "refused",
    ),
    Case(
        "ORT023",
        "onnxruntime",
        lambda: cpu(weight="wd = DequantizeLinear(w, s, z)", w=INTEGERS.view(np.uint8)),
        cpu,
    ),
    Case(
        "ORT024",
        "onnxruntime",
        lambda: linear(weight=ZERO_POINT, y="y = Gemm(xd, wd, bias)", **GEMM),
        lambda: linear(
            weight=ZERO_POINT,
            y="bd = DequantizeLinear<axis = 0>(b32, bs)  y = Gemm(xd, wd, bd)",
            b32=np.ones(N, np.int32),
            bs=SCALES * np.float32(0.05),
            **GEMM,
        ),
        "QGemm",
    ),
    Case(
        "ORT026",
        "onnxruntime",
        lambda: linear(y="y = Gemm(xd, wd)", **GEMM),
        lambda: linear(weight=ZERO_POINT, y="y = Gemm(xd, wd)", **GEMM),
        "QGemm",
    ),
    Case("ORT025", "onnxruntime", cpu, lambda: cpu("", "", "y = MatMul(x, wf)")),
    # --- ONNX Runtime on CUDA ---
    Case(
        "CUDA001",
        "onnxruntime-cuda",
        lambda: integers("float[B,S,64] x|q, s, z = DynamicQuantizeLinear(x)  y = MatMulInteger(q, w, z)"),
        lambda: integers("int8[B,S,64] x|" + MATMUL_INTEGER),
    ),
    Case(
        "CUDA002",
        "onnxruntime-cuda",
        lambda: integers("uint8[B,S,64] x|" + MATMUL_INTEGER),
        lambda: integers("int8[B,S,64] x|" + MATMUL_INTEGER),
    ),
    Case("CUDA003", "onnxruntime-cuda", lambda: cpu(z=np.uint16(0)), cpu),
    Case("CUDA004", "onnxruntime-cuda", cpu, lambda: integers("int8[B,S,64] x|" + MATMUL_INTEGER)),
]
assert K == N == 64
