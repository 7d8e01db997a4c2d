"""One table: what a legal graph is at each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .errors import VerificationError
from .formats import FORMATS, packed_size
from .kernels import NAMESPACE, OPS, dequantize_weight, fp8_linear, w4a8_linear, weight_only_linear
from .program import Program, Stage, describe, fake_value, get_constant
from .torch_private import OpOverload

_EXPLICIT = {
    *("quantize_per_token", "quantize_per_channel", "quantize_static", "dequantize"),
    *("quantize_weight", "chosen_weight", "dequantize_weight"),
    *("quantize_per_token_fp8", "quantize_per_token_int4", "quantize_static_fp8"),
    *("quantized_softmax_attention", "low_rank_linear"),
}
_FUSED = set(OPS) - {"quantize_per_channel", "dequantize"}

# stage -> names of the dialect's ops that may stand in the graph
_MODELS_OWN = {"cached_attention"}  # a model brings it along with its cache
LEGAL_OPS: dict[Stage, set[str]] = {
    Stage.FLOAT: _MODELS_OWN,
    Stage.QDQ: _EXPLICIT | _MODELS_OWN,
    Stage.FUSED: _FUSED | _EXPLICIT | _MODELS_OWN,
}


def verify(program: Program, after: str) -> None:
    """Hold the graph to the rules of its stage.

    Raises:
        VerificationError: naming the pass and the node.
    """
    for node in program.graph.nodes:
        for rule in RULES:
            if problem := rule(program, node):
                raise VerificationError(f"after {after}: {problem}", where=node.name)
    try:
        program.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"after {after}: {str(error).splitlines()[0]}") from error


def _op_is_legal(program: Program, node: fx.Node) -> str | None:
    target = node.target
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        name = target._opname
        if name not in LEGAL_OPS[program.stage]:
            return f"zq::{name} is not legal at stage {program.stage.name}"
    return None


def _value_is_known(program: Program, node: fx.Node) -> str | None:
    if isinstance(node.target, OpOverload) and node.target._schema.returns and "val" not in node.meta:
        return "its fake value is unknown"
    return None


def _constant_exists(program: Program, node: fx.Node) -> str | None:
    if node.op != "get_attr":
        return None
    try:
        value: Any = get_constant(program.gm, str(node.target))
    except AttributeError:
        return f"there is no constant {node.target}"
    fake = fake_value(node)
    if not isinstance(value, torch.Tensor):
        return None
    if not isinstance(fake, torch.Tensor):
        return "its fake value is unknown"
    if value.shape != fake.shape or value.dtype != fake.dtype:
        return f"constant {node.target} is {describe(value)}, the graph thinks {describe(fake)}"
    return None


def _scale_fits(program: Program, node: fx.Node) -> str | None:
    """`scale.ndim == x.ndim` and `x.shape[i] % scale.shape[i] == 0`, float32."""
    linear = [(0, 1), (2, 3)]
    pairs = {
        "int8_linear": linear,
        "int8_linear_quantize": linear,
        "int8_linear_gelu_quantize": linear,
        "dequantize": [(0, 1)],
        "int8_embedding": [(1, 2)],
        "embedding_layer_norm_quantize": [(1, 2)],
    }
    target = node.target
    if not (isinstance(target, OpOverload) and target.namespace == NAMESPACE):
        return None
    for q_index, scale_index in pairs.get(target._opname, []):
        if node.args[scale_index] is None:  # its scale is in the other operand
            continue
        q, scale = fake_value(node.args[q_index]), fake_value(node.args[scale_index])  # type: ignore[arg-type]
        if q.dtype not in (torch.int8, torch.float8_e4m3fn) or scale.dtype is not torch.float32:
            return f"operand {q_index} is {q.dtype} with a {scale.dtype} scale"
        fits = q.ndim == scale.ndim and all(
            not isinstance(s, int) or s in (1, n) for s, n in zip(scale.shape, q.shape, strict=True)
        )
        if not fits:
            return f"scale {tuple(scale.shape)} does not fit {tuple(q.shape)}"
    return None


def _packed_weight_fits(program: Program, node: fx.Node) -> str | None:
    """A row of packed codes and one of scales for each output; as many scales, and zero points, as there are groups."""
    arguments: tuple[Any, ...] = node.args
    if node.target is dequantize_weight:
        packed, scale, format, group, features, *_ = arguments
    elif node.target is weight_only_linear:
        x, packed, scale, _, format, group = arguments
        features = fake_value(x).shape[-1]
    elif node.target in (fp8_linear, w4a8_linear):
        x, _, packed, scale, _, format, group, _ = arguments
        features = fake_value(x).shape[-1]
    else:
        return None
    codes, scales = fake_value(packed), fake_value(scale)
    groups = -(-features // group) if group else 1
    wanted = packed_size(features, FORMATS[format].bits), 2 * groups if FORMATS[format].asymmetric else groups
    if codes.dtype is not torch.uint8 or (*codes.shape[1:], *scales.shape[1:]) != wanted:
        found = f"{describe(codes)} with scales {describe(scales)}"
        return f"{found} is no weight of {features} features in {format}, {group or features} to a scale"
    return None


RULES: tuple[Callable[[Program, fx.Node], str | None], ...] = (
    _op_is_legal,
    _value_is_known,
    _constant_exists,
    _scale_fits,
    _packed_weight_fits,
)
