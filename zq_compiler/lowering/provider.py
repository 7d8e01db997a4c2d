"""What the kernels of a device are to the lowering, and what rewrites into their ops have in common."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels
from ..program import fake_value, get_constant, set_constant, size
from ..rewrite import arguments
from ..torch_private import OpOverload

Rewrite = Callable[[fx.GraphModule, fx.Node], None]  # puts a kernel's op in a dialect node's place
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provider:
    """The kernels of one device.

    Args:
        name: in reports.
        rewrites: of every dialect op with a kernel; the others are inlined.
        unfit: why a node of these cannot have its kernel, or None.
        missing: why nothing has a kernel, or None.
    """

    name: str
    rewrites: Mapping[Any, Rewrite]
    unfit: Callable[[fx.Node], str | None]
    missing: str | None = None

    def refusal(self, node: fx.Node) -> str | None:
        """Why a node is inlined; None where it has a kernel."""
        if self.missing is not None:
            return self.missing
        if node.target not in self.rewrites:
            return f"no {self.name} kernel: Inductor fuses it"
        return self.unfit(node)


def nothing(reason: str) -> Provider:
    """Has every op inlined."""
    return Provider("", {}, lambda node: None, reason)


def float_dtype(node: fx.Node) -> torch.dtype | None:
    """What a dialect node computes in: the dtype that it is given, else that of its float operand; None for none."""
    given = [a for a in node.args if isinstance(a, torch.dtype)]
    value = fake_value(node.args[3 if node.target is kernels.embedding_layer_norm_quantize else 0])  # type: ignore[arg-type]
    dtype = given[-1] if given else value.dtype
    return dtype if dtype.is_floating_point else None


def odd_attention(node: fx.Node) -> str | None:
    """Why no kernel has an `int8_attention`: they have one width of heads, and a batch for each query."""
    if node.target is not kernels.int8_attention:
        return None
    query, key, value = (tuple(map(size, fake_value(x).shape)) for x in node.args[:3])  # type: ignore[arg-type]
    if (query[0], query[-1]) == (key[0], key[-1]) and key == value:
        return None
    return (
        f"keys {[*key]} and values {[*value]} are not all of the queries' batch and width, {query[0]} and {query[-1]}"
    )


def op(namespace: str, name: str) -> OpOverload:
    """An op of a provider, which exists from when its kernels are loaded."""
    return getattr(getattr(torch.ops, namespace), name).default


def same_signature(namespace: str) -> Rewrite:
    """Of ops with the dialect op's name and arguments."""

    def rewrite(gm: fx.GraphModule, node: fx.Node) -> None:
        node.target = op(namespace, node.target._opname)  # type: ignore[union-attr]

    return rewrite


def norms(namespace: str) -> dict[Any, Rewrite]:
    """All norms are one kernel, which writes `y` and `h` only where something reads them.

    norm_quantize(x, residual, weight, bias, eps, rms, want_y, want_h, rotated, x_scale, residual_scale,
                  residual_rotated, dtype) -> q, scale, y, h
    """

    def of_floats(gm: fx.GraphModule, node: fx.Node) -> None:
        x, *rest = arguments(node)
        with_add = node.target in (kernels.add_layer_norm_quantize, kernels.add_rms_norm_quantize)
        residual = rest.pop(0) if with_add else None
        rms = node.target in (kernels.rms_norm_quantize, kernels.add_rms_norm_quantize)
        weight, bias, eps, rotated = (rest[0], None, *rest[1:]) if rms else rest
        node.target = op(namespace, "norm_quantize")
        node.args = (x, residual, weight, bias, eps, rms, is_read(node, 2), is_read(node, 3), rotated)

    def of_integers(gm: fx.GraphModule, node: fx.Node) -> None:
        """The summands are dequantized as they are read."""
        x, x_scale, residual, residual_scale, residual_rotated, weight, *rest = arguments(node)
        rms = node.target is kernels.int8_add_rms_norm_quantize
        bias, eps, rotated, dtype = (None, *rest) if rms else rest
        node.target = op(namespace, "norm_quantize")
        scales = (x_scale, residual_scale, residual_rotated, dtype)
        node.args = (x, residual, weight, bias, eps, rms, is_read(node, 2), is_read(node, 3), rotated, *scales)

    floats = ("layer_norm_quantize", "add_layer_norm_quantize", "rms_norm_quantize", "add_rms_norm_quantize")
    integers = ("int8_add_layer_norm_quantize", "int8_add_rms_norm_quantize")
    return {
        **{getattr(kernels, name): of_floats for name in floats},
        **{getattr(kernels, name): of_integers for name in integers},
    }


def is_read(node: fx.Node, result: int) -> bool:
    """Whether anything reads one of a call's several results."""
    return any(u.target is operator.getitem and u.args[1] == result and u.users for u in node.users)


def constant(gm: fx.GraphModule, node: Any) -> Tensor:
    """The tensor that an operand is, which must be a constant."""
    return get_constant(gm, str(node.target))


def set_constants(gm: fx.GraphModule, name: str, **values: Tensor) -> list[fx.Node]:
    """Constants made of another one, named after it."""
    for suffix, value in values.items():
        set_constant(gm, f"{name}_{suffix}", value)
    return [gm.graph.get_attr(f"{name}_{suffix}") for suffix in values]


def replace(gm: fx.GraphModule, node: fx.Node, call: fx.Node) -> None:
    """A call in a node's place; constants that only the node read are gone with it."""
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    read = [n for n in node.all_input_nodes if n.op == "get_attr"]
    gm.graph.erase_node(node)
    for constant in read:
        if not constant.users:
            gm.graph.erase_node(constant)
            owner, _, buffer = str(constant.target).rpartition(".")
            gm.get_submodule(owner)._buffers.pop(buffer, None)


_made: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], tuple[Tensor, Tensor]]] = {}


def once(make: Callable[..., tuple[Tensor, Tensor]], constant: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """What is made of a constant, once for all graphs that share it.

    Args:
        others: what else `make` takes; tensors among them always come with this constant.
    """
    key = id(constant), make, *(other for other in others if not isinstance(other, Tensor))
    known = _made.get(key)
    if known is None or known[0]() is not constant:
        made = _made  # at exit, globals go first
        reference = weakref.ref(constant, lambda _: made.pop(key, None))
        known = _made[key] = reference, make(constant, *others)
    return known[1]
