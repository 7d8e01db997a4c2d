"""Sessions of ONNX Runtime whose integer products are exact on any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

HAS_VNNI = torch.cpu.get_capabilities().get("avx512_vnni", False)
# Without VNNI, ONNX Runtime multiplies u8 by s8 in instructions that saturate sums of two products. The option below
# makes it exact, through an optimization of the third level; what is optimized less cannot be.
LEVELS = ("ORT_DISABLE_ALL" if HAS_VNNI else "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def session(model: Any, level: str = "ORT_ENABLE_ALL", optimized: Path | None = None) -> Any:
    """A session on one CPU thread, of a path or the bytes of a model, optimized to a level; saved so on request."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    if not HAS_VNNI:  # where there is, it would only keep ONNX Runtime from loading a weight that several nodes share
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
