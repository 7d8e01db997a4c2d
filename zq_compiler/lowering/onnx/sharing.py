"""Constants that a file need not hold, because a saved model's weights beside it do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnxscript import ir

from ...errors import ExportError
from ...serialize.constants import stored_at

_SAVE = "give the folder that save() of this model wrote"


def weights_below(folder: Path, saved: Path) -> Path:
    """The weights of a saved model, which a file in `folder` may read: ONNX knows no way up, for safety.

    Raises:
        ExportError: they are elsewhere, or there are none.
    """
    weights = saved / "weights.safetensors"
    if not weights.is_file():
        raise ExportError("is missing", where=str(weights), fix=_SAVE)
    if not weights.resolve().is_relative_to(folder.resolve()):
        fix = f"write the ONNX file into {saved} or the folder around it, or save the model below {folder}"
        raise ExportError(f"is not below {folder}, where the ONNX file can read it", where=str(saved), fix=fix)
    return weights


def share_weights(model: ir.Model, folder: Path, weights: Path, suffix: str) -> int:
    """Point the initializers of a file in `folder` that have a namesake among the weights to it; returns their bytes.

    What a target reads in a form of its own is named after the constant, with a suffix: it is shared where the bytes
    are the same.

    Raises:
        ExportError: a namesake is not the same bit for bit, or there is none.
    """
    stored, content = stored_at(weights), np.memmap(weights, np.uint8, "r")
    location, shared = weights.resolve().relative_to(folder.resolve()).as_posix(), 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        key = name.removesuffix(suffix)
        if tensor is None or key not in stored:
            continue
        offset, length = stored[key]
        wanted = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        if wanted.data != content[offset : offset + length].data:  # compared in place: it may be large
            if key != name:
                continue
            raise ExportError(f"holds another {name} than the model", where=str(weights), fix=_SAVE)
        shape = ir.Shape(tensor.shape)
        value.const_value = ir.ExternalTensor(
            location, offset, length, tensor.dtype, shape=shape, name=name, base_dir=folder
        )
        shared += length
    if not shared:
        raise ExportError("holds no constant of the model", where=str(weights), fix=_SAVE)
    return shared
