"""The dialect: every `torch.ops.zq` op, defined by its reference implementation.

The reference is the op: it gives the schema, the meaning, the fake kernel and the kernel of every device that has
nothing faster. A provider (a native or Triton kernel) must agree with it and is chosen by the lowering, openly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_private import OpOverload

NAMESPACE = "zq"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class DialectOp:
    """One op: its name, its reference in plain torch, and the overload that graphs hold."""

    name: str
    reference: Callable[..., Any]
    overload: OpOverload


OPS: dict[str, DialectOp] = {}


def dialect_op(reference: Callable[..., Any]) -> OpOverload:
    """Register a typed function as `torch.ops.zq.<its name>` and return the overload.

    Raises:
        ValueError: the signature cannot be expressed as an operator schema, or the name is taken.
    """
    name = reference.__name__
    if name in OPS:
        raise ValueError(f"zq::{name} is registered twice")
    _library.define(name + torch.library.infer_schema(reference, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake(reference), lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = DialectOp(name, reference, overload)
    return overload


def _fake(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference without its rotations: they change no shape, and on symbolic sizes they take most of a pass."""
    signature = inspect.signature(reference)
    rotations = [name for name in ("rotated", "residual_rotated") if name in signature.parameters]
    if not rotations:
        return reference

    @functools.wraps(reference)
    def fake(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        results = reference(**{**given, **dict.fromkeys(rotations, False)})
        if not given.get("rotated", False):
            return results
        if not isinstance(results, tuple):
            return results.contiguous()
        return *(result.contiguous() for result in results[:2]), *results[2:]  # integers and scales; floats follow

    return fake


def reference_of(target: object) -> Callable[..., Any] | None:
    """The reference of a graph node's target, or None when the target is no dialect op."""
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        return OPS[target._opname].reference
    return None
