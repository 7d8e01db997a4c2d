"""CUDA's provider: our Triton kernels, from compute capability 8.0.

Without Triton nothing on CUDA is lowered: a model that ran as plain torch instead would be slower than it was in float,
and would not say so.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from .. import kernels
from ..kernels.cuda import registration
from ..torch_private import OpOverload
from ..traffic import MOVES
from .provider import FLOATS, Provider, Rewrite, float_dtype, norms, same_signature

NAMESPACE = registration.NAMESPACE
FP8_ARCHITECTURE = 89  # the first that converts to FP8


def provider(device: torch.device, architecture: int | None) -> Provider:
    """Our kernels.

    Args:
        architecture: that of `device` where None.

    Raises:
        KernelBuildError: Triton is not installed.
    """
    registration.load()
    if architecture is None:
        architecture = registration.architecture(device)
    return Provider("triton", REWRITES, functools.partial(_unfit, architecture))


def _unfit(architecture: int, node: fx.Node) -> str | None:
    dtype = float_dtype(node)
    if dtype not in (None, *FLOATS):
        return f"the Triton kernels have no {dtype}"
    if node.target in _TO_FP8 and architecture < FP8_ARCHITECTURE:
        return f"compute capability {architecture / 10} has no conversion to FP8"
    if node.target in _ELEMENTWISE and _is_computed_by_inductor(node.args[0]):
        return "Inductor fuses it with what it reads"
    return None


def _is_computed_by_inductor(value: Any) -> bool:
    """Whether a value is that of an element-wise operation, or of an inlined op, which are all memory-bound."""
    while value.op == "call_function" and value.target in MOVES:
        value = value.all_input_nodes[0]
    if value.op != "call_function":
        return False
    return not isinstance(value.target, OpOverload) or torch.Tag.pointwise in value.target.tags


_ELEMENTWISE = (kernels.quantize_static, kernels.quantize_static_fp8)
_TO_FP8 = (kernels.quantize_per_token_fp8, kernels.quantize_static_fp8)
_same = same_signature(NAMESPACE)
REWRITES: dict[Any, Rewrite] = {
    **norms(NAMESPACE),
    kernels.quantize_per_token: _same,
}
