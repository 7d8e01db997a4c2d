"""The TensorRT-RTX check itself: it counts the kernels that a graph can only have, and sees a refusal."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import tensorrt_rtx
from tests.onnx_graphs import graph
from tests.tensorrt_rtx import build

needs_tensorrt = pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)

WEIGHT = np.arange(64 * 64, dtype=np.int32).reshape(64, 64).astype(np.int8)
QUANTIZED = """(float16[B,S,64] x) => (float16[B,S,64] y) {
    xq = QuantizeLinear(x, xs, zero)
    xd = DequantizeLinear(xq, xs, zero)
    wd = DequantizeLinear<axis = 1>(w, ws)
    y = MatMul(xd, wd)
}"""
INT8 = {"xs": np.float16(0.05), "zero": np.int8(0), "w": WEIGHT, "ws": np.full(64, 0.01, np.float16)}
FLOAT = "(float16[B,S,64] x) => (float16[B,S,64] y) { y = MatMul(x, w) }"
ATTENTION = """(float16[B,4,S,64] q, float16[B,4,S,64] k, float16[B,4,S,64] v, float16[B,1,S,S] mask) =>
(float16[B,4,S,64] y) {
    kt = Transpose<perm = [0, 1, 3, 2]>(k)
    s = MatMul(q, kt)
    m = Add(s, mask)
    p = Softmax(m)
    y = MatMul(p, v)
}"""


@needs_tensorrt
def test_one_quantized_product_is_one_int8_gemm():
    found = build(graph(QUANTIZED, **INT8))
    assert found.parsed and found.built and found.errors == ()
    assert (found.int8_gemms, found.float_gemms, found.int8_mhas, found.half_mhas) == (1, 0, 0, 0)
    assert found.stray_quantizes == 1  # of the graph's input, which nothing can be fused into
    (product,) = found.gemms()
    assert "MatMul_3" in product.nodes and product.outputs == ("Half",)


@needs_tensorrt
def test_without_quantization_there_is_none(tmp_path):
    onnx.save(graph(FLOAT, w=WEIGHT.astype(np.float16)), tmp_path / "float.onnx")
    found = build(tmp_path / "float.onnx", shapes={"x": ((1, 1, 64), (1, 16, 64), (2, 32, 64))})
    assert found.built
    assert (found.int8_gemms, found.float_gemms, found.stray_quantizes) == (0, 1, 0)


@needs_tensorrt
def test_a_weight_alone_in_int8_is_a_float_product():
    text = QUANTIZED.replace("MatMul(xd", "MatMul(x")
    found = build(graph(text, **INT8).SerializeToString())
    assert (found.int8_gemms, found.float_gemms) == (0, 1)


@needs_tensorrt
@pytest.mark.parametrize("side", ["activation", "weight"])
def test_integers_that_are_cast_inside_a_product_are_no_int8_product(side):
    if side == "activation":  # scales along the contracted axis, that no integer product can apply
        scales = np.linspace(0.01, 0.02, 64, dtype=np.float16)
        model = graph(QUANTIZED.replace("axis = 1", "axis = 0"), **{**INT8, "ws": scales})
    else:
        text = re.sub("wd = .*", "", QUANTIZED).replace("xd, wd", "xd, w")
        model = graph(text, xs=INT8["xs"], zero=INT8["zero"], w=WEIGHT.astype(np.float16))
    found = build(model)
    assert found.built and any("Int8" in kernel.inputs for kernel in found.gemms())
    assert (found.int8_gemms, found.float_gemms) == (0, 1)


@needs_tensorrt
def test_an_attention_of_halves_is_one_kernel():
    found = build(graph(ATTENTION))
    assert (found.half_mhas, found.int8_mhas, len(found.gemms())) == (1, 0, 0)


@needs_tensorrt
def test_a_quantized_attention_is_one_int8_kernel_whatever_its_mask():
    quantize = "{0}q = QuantizeLinear({0}, xs, zero)\n {0}d = DequantizeLinear({0}q, xs, zero)\n"
    text = ATTENTION.replace("{\n", "{\n" + "".join(quantize.format(name) for name in "qkv"), 1)
    text = (
        text.replace("(k)", "(kd)").replace("MatMul(q,", "MatMul(qd,").replace("y = MatMul(p, v)", "c = MatMul(pd, vd)")
    )
    text = text.replace("c = ", quantize.format("p") + "c = ").replace("\n}", "\n" + quantize.format("c") + "}")
    found = build(graph(text.replace("cd =", "y ="), xs=INT8["xs"], zero=INT8["zero"]))
    assert (found.int8_mhas, found.half_mhas, len(found.gemms())) == (1, 0, 0)


@needs_tensorrt
def test_a_refusal_names_the_node():
    found = build(graph(QUANTIZED, **{**INT8, "zero": np.int8(3)}))
    assert not found.parsed and not found.built and found.kernels == ()
    assert any("QuantizeLinear_0" in error and "zero point" in error.lower() for error in found.errors)


@needs_tensorrt
def test_a_file_that_is_not_onnx_is_refused():
    found = build(b"not ONNX")
    assert not found.parsed and found.errors


def test_the_extra_and_the_hashed_requirements_pin_the_same():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    hashed = re.findall(r"^[a-z][^ ]*", (root / "requirements" / "trt-check.txt").read_text(), re.M)
    assert extras["trt-check"] == hashed
