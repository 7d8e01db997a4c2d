"""Linears and attentions to lint, in one line each: what is not said is as TensorRT, or ONNX Runtime, likes it."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from tests.onnx_graphs import graph

K = N = 64
FLOATS: dict[str, Any] = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_random = np.random.default_rng(0)
INTEGERS = _random.integers(-127, 128, (K, N)).astype(np.int8)
SCALES = _random.uniform(0.005, 0.02, N).astype(np.float32)  # they differ: equal ones are as good as one


def quantized(name: str, out: str = "", scale: str = "s") -> str:
    """Q/DQ of a value.

    >>> quantized("x")
    'xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)  '
    """
    out = out or f"{name}d"
    return f"{name}q = QuantizeLinear({name}, {scale}, z)  {out} = DequantizeLinear({name}q, {scale}, z)  "


def model(io: str, body: str, dtype: str, opset: int, constants: dict[str, Any]) -> onnx.ModelProto:
    """A model with those of the usual constants that its text names."""
    float_ = FLOATS[dtype]
    usual = {
        "s": float_(0.05),
        "s2": float_(0.03),
        "s32": np.float32(0.05),
        "p": float_(1 / 127),
        "z": np.int8(0),
        "w": INTEGERS,
        "ws": SCALES.astype(float_),
        "w32": SCALES,
        "wf": (INTEGERS * SCALES).astype(float_),
        "wz": np.zeros(N, np.int8),
        "bias": np.ones(N, float_),
        "half": float_(0.5),
        "c127": float_(127),
    }
    named = set(re.findall(r"\w+", body)) - set(re.findall(r"\w+", io))
    used = {name: value for name, value in {**usual, **constants}.items() if name in named}
    return graph(f"{io} {{ {body} }}", opset=opset, **used)


def linear(
    x: str = quantized("x"),
    weight: str = "wd = DequantizeLinear<axis = 1>(w, ws)",
    y: str = "y = MatMul(xd, wd)",
    *,
    dtype: str = "float16",
    rank: int = 3,
    k: int = K,
    n: int = N,
    io: str = "",
    opset: int = 21,
    **constants: Any,
) -> onnx.ModelProto:
    """A quantized linear: what becomes of its input, of its weight, and the product."""
    batch = ",".join("BSL"[: rank - 1])
    io = io or f"({dtype}[{batch},{k}] x) => ({dtype}[{batch},{n}] y)"
    return model(io, f"{x} {weight} {y}", dtype, opset, constants)


def attention(
    *,
    dtype: str = "float16",
    q: bool = True,
    k: bool = True,
    v: bool = True,
    p: bool = True,
    out: bool = True,
    scores: bool = False,
    masked: bool = True,
    guard: bool = False,
    heads: int = 64,
    length: int | str = "S",
    **constants: Any,
) -> onnx.ModelProto:
    """An attention as products and a softmax, with a mask; the switches say where Q/DQ are."""
    kind = f"{dtype}[B,4,{length},{heads}]"
    io = f"({kind} q, {kind} k, {kind} v, {dtype}[B,1,{length},{length}] mask) => ({kind} y)"

    def maybe(name: str, wanted: bool, scale: str = "s") -> str:
        return quantized(name, scale=scale) if wanted else f"{name}d = Identity({name})  "

    softmax = "e = Softmax(m)  nan = IsNaN(e)  a = Where(nan, zero, e)  " if guard else "a = Softmax(m)  "
    body = (
        maybe("q", q) + maybe("k", k) + maybe("v", v)
        + "kt = Transpose<perm = [0, 1, 3, 2]>(kd)  t = MatMul(qd, kt)  " + maybe("t", scores)
        + f"h = Mul(td, half)  m = {'Add(h, mask)' if masked else 'Identity(h)'}  " + softmax + maybe("a", p, "p")
        + "c = MatMul(ad, vd)  " + maybe("c", out) + "y = Identity(cd)"
    )  # fmt: skip
    return model(io, body, dtype, 21, {"zero": FLOATS[dtype](0), **constants})


def fp8(values: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(values).astype(ml_dtypes.float8_e4m3fn))


FP8_ZERO = fp8(0)
assert FP8_ZERO.data_type == TensorProto.FLOAT8E4M3FN
