"""Weights of a torch module, read back from the ONNX file that it was exported to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn


class WeightsDiffer(ValueError):  # noqa: N818 - reads as what happened
    """A file's weights and a module's are not the same set; the message names those of one that the other lacks."""


def read_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """The initializers whose name starts with `prefix`, by the rest of it, and all anonymous ones.

    torch's exporter transposes the weight of a linear and calls it `onnx::MatMul_<number>`. It gets its name back, and
    its `[out, in]` form, from the bias that is added to the product. What else is anonymous keeps the name it has.
    """
    graph = onnx.load(path).graph
    values = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    added = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values and node.output[0] in added:
            for bias in set(added[node.output[0]].input) & values.keys():
                values[f"{bias.removesuffix('.bias')}.weight"] = values.pop(node.input[1]).T.contiguous()
    return {name.removeprefix(prefix): x for name, x in values.items() if name.startswith((prefix, "onnx::"))}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill every parameter and buffer of a module's state.

    Raises:
        WeightsDiffer: one would stay as it was initialised, is of another shape, or a weight has no place.
    """
    state = module.state_dict()
    missing, unused = state.keys() - weights.keys(), weights.keys() - state.keys()
    reshaped = [name for name in state.keys() & weights.keys() if state[name].shape != weights[name].shape]
    if missing or unused or reshaped:
        raise WeightsDiffer(
            f"{type(module).__name__}: not in the file: {_some(missing)}; "
            f"not in the module: {_some(unused)}; of another shape: {_some(reshaped)}"
        )
    module.load_state_dict(weights)


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
