"""On random graphs the lint has nothing to say exactly where the runtime computes in integers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import zq_compiler as zq
from tests import tensorrt_rtx
from tests.lowering.lint.cases import (
    AXIS,
    KEEP,
    PER_K,
    RELU,
    RELU_FIRST,
    TRANSPOSED,
    WEIGHT_QUANTIZED,
    ZERO_POINT,
    computed,
)
from tests.lowering.lint.graphs import FLOATS, SCALES, attention, linear, quantized
from tests.lowering.lint.test_rules import optimized

needs_tensorrt = pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)
INPUTS = [
    quantized("x"),
    computed(quantized("x", scale="sx")),
    RELU,
    RELU_FIRST,
    AXIS,
    quantized("x", out="x1") + "xd = Reshape(x1, keep)",
    quantized("x", out="x1") + "xd = Mul(x1, half)",
    quantized("x", out="x1") + "xd = Add(x1, half)",
    quantized("x", out="x1") + quantized("x1", out="xd", scale="s2"),
    "xd = Identity(x)",
]
WEIGHTS = [
    "wd = DequantizeLinear<axis = 1>(w, ws)",
    "wd = DequantizeLinear(w, s)",
    "wd = Identity(wf)",
    *(PER_K, ZERO_POINT, WEIGHT_QUANTIZED, TRANSPOSED.format(0), TRANSPOSED.format(1)),
]


def random_linear(choose: random.Random, zero_points: list[Any], dtypes: list[str]) -> onnx.ModelProto:
    """A MatMul or Gemm of something made of a quantized input, by something made of a weight."""
    gemm = choose.random() < 0.25
    x, weight = choose.choice(INPUTS), choose.choice(WEIGHTS)
    dtype, zero = choose.choice(dtypes), choose.choice(zero_points)
    return linear(
        x.replace("axis = 2", "axis = 1") if gemm else x,
        weight,
        f"y = {'Gemm' if gemm else 'MatMul'}(xd, wd)",
        dtype=dtype,
        rank=2 if gemm else 3,
        z=zero,
        sv=SCALES.astype(FLOATS[dtype]),
        zv=np.full(64, zero),
        keep=KEEP["keep"][gemm:],
    )


def random_attention(choose: random.Random) -> onnx.ModelProto:
    switches: Any = {name: choose.random() < 0.85 for name in ("q", "k", "v", "p", "out")}
    switches |= {name: choose.random() < 0.15 for name in ("scores", "guard")}
    switches["masked"] = choose.random() < 0.7
    return attention(
        dtype=choose.choice(["float16", "float", "bfloat16"]),
        heads=choose.choice([16, 32, 64, 64, 128]),
        length=choose.choice(["S", 128, 600]),
        **switches,
    )


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether both operands of the product are, or were, quantized: of others the lint claims nothing."""
    return {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node} and any(
        n.op_type == "DequantizeLinear" and n.input[0] in ("w", "wq") for n in model.graph.node
    )


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_linears_for_tensorrt(seed: int):
    model = random_linear(random.Random(seed), [np.int8(0)] * 3 + [np.uint8(128)], ["float16", "float"])
    report, built = zq.lint(model, "tensorrt"), tensorrt_rtx.build(model)
    in_floats = any(finding.name == "weight-only" for finding in report.findings)
    if is_quantized(model):
        assert (report.ok and not in_floats) == (built.built and built.int8_gemms == 1), f"{report}\n{built}"


@needs_tensorrt
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_attentions_for_tensorrt(seed: int):
    model = random_attention(random.Random(seed))
    report, built = zq.lint(model, "tensorrt"), tensorrt_rtx.build(model)
    assert report.ok == (built.built and built.int8_mhas == 1), f"{report}\n{built}"


@pytest.mark.parametrize("seed", range(100))
def test_linears_for_onnxruntime(seed: int, tmp_path: Path):
    model = random_linear(random.Random(seed), [np.int8(0), np.uint8(128)], ["float", "float", "float16"])
    report = zq.lint(model, "onnxruntime")
    # Fused by mistake, and then wrong or fails when it runs.
    mistaken = any(f.name.startswith(("activation-scale", "weight-scale", "square-weight")) for f in report.findings)
    if not is_quantized(model) or mistaken:
        return
    try:
        operators = optimized(model, tmp_path)
    except Exception:
        operators = {}
    fused = sum(operators.get(name, 0) for name in ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul"))
    assert report.ok == (fused == 1), f"{report}\n{operators}"
