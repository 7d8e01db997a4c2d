"""Small ONNX models written as text, in the syntax of `onnx.parser`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser

IR_VERSION = 10  # what ONNX Runtime reads with opset 21; onnx's own default is too new for it


def graph(body: str, *, opset: int = 21, ir_version: int = IR_VERSION, **constants: Any) -> onnx.ModelProto:
    """A model from a header and nodes, and its constants as arrays or TensorProtos.

    >>> model = graph("(float[2] x) => (float[2] y) { y = Add(x, one) }", one=np.float32(1))
    >>> [node.op_type for node in model.graph.node]
    ['Add']
    """
    domains = ", ".join(f'"{name}": 1' for name in ("com.microsoft", "trt") if f"{name}." in body)
    imports = f'"": {opset}' + (f", {domains}" if domains else "")
    model = parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{imports}]>\ntest {body}")
    for name, value in constants.items():
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        tensor.name = name
        model.graph.initializer.append(tensor)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def tensor(kind: int, values: Any) -> onnx.TensorProto:
    """A constant of an element type that numpy has not, such as `TensorProto.INT4`."""
    values = np.asarray(values)
    return helper.make_tensor("", kind, values.shape, values.reshape(-1).tolist())
