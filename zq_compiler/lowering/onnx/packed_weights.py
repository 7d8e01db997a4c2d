"""Weights of a few bits in ONNX's element types: integers where all values of a format are, times a power of two.

FP6 and FP4 have no operators in today's runtimes; E2M3, E2M1 and E3M0 are exact in INT8, and E3M2 is in FP8 E4M3.
From opset 28 on ONNX has types for them, and torch none: E4M3 holds their values until the file is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ... import kernels
from ...formats import FORMATS, pack, unpack
from ...numerics import dequantize_weight
from ...program import set_constant

NATIVE_FLOATS = ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2")  # ONNX's types of opset 28, the smallest first
_IN_TORCH = {"fp8_e5m2": torch.float8_e5m2} | dict.fromkeys(("fp8_e4m3", *NATIVE_FLOATS), torch.float8_e4m3fn)


@dataclass(frozen=True)
class Storage:
    """An element type for a format: each value times `factor` is one of `element`'s.

    Args:
        element: name of a format that ONNX has.
        factor: a power of two.
    """

    element: str
    factor: int


def storage_of(format: str, elements: Sequence[str]) -> Storage | None:
    """The first of these element types that holds every value of a format exactly, if any does.

    >>> storage_of("fp6_e2m3", ["int4", "int8", "fp8_e4m3"])
    Storage(element='int8', factor=8)
    >>> storage_of("fp6_e3m2", ["int4", "int8", "fp8_e4m3"])
    Storage(element='fp8_e4m3', factor=1)
    """
    wanted = {v for v in FORMATS[format].values if not math.isnan(v)}
    for element in elements:
        held = set(FORMATS[element].values)
        for factor in (1, 2, 4, 8) if FORMATS[element].is_integer else (1,):
            if {v * factor for v in wanted} <= held:
                return Storage(element, factor)
    return None


def stored_values(packed: Tensor, format: str, features: int, storage: Storage) -> Tensor:
    """The codes of a weight as `[N, features]` of the element type, or of one that torch has in its place.

    Returns:
        int8 for integers, float8_e4m3fn for floats but E5M2, which is float8_e5m2; exact in each.
    """
    fmt = FORMATS[format]
    values = fmt.decode(unpack(packed, fmt.bits, features)) * storage.factor
    return values.to(_IN_TORCH.get(storage.element, torch.int8))


def packed_operands(node: fx.Node) -> tuple[int, int, str, int]:
    """Argument positions of a packed weight and its scales, its format and its group."""
    first = 2 if node.target in (kernels.fp8_linear, kernels.w4a8_linear) else 1
    return first, first + 1, str(node.args[first + 3]), int(node.args[first + 4])  # type: ignore[arg-type]


def as_rows_of_e4m3(
    packed: Tensor, scale: Tensor, format: str, group: int, features: int
) -> tuple[Tensor, Tensor] | None:
    """A weight with scales of groups as one with scales of rows, where E4M3 holds each value times its scale's ratio to
    the row's largest: `[N, features]` float8_e4m3fn and `[N, 1]` float32. None where it does not.

    It does for FP4 under a constraint of scales (ZeroQuant-FP's M1 and M2): the ratios are shifts of the exponent.
    """
    largest = scale.float().amax(-1, keepdim=True)
    values = dequantize_weight(packed, scale.float() / largest, format, group, features)
    stored = values.to(torch.float8_e4m3fn)
    return (stored, largest) if torch.equal(stored.float(), values) else None


def replace_constants(gm: fx.GraphModule, node: fx.Node, suffix: str, values: Mapping[int, Tensor]) -> list[str]:
    """Constants in the place of a node's arguments at some positions, under the old names with a suffix."""
    names = []
    for position, value in values.items():
        old = node.args[position]
        assert isinstance(old, fx.Node)
        names.append(f"{old.target}{suffix}")
        set_constant(gm, names[-1], value)
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(names[-1])
        constant.meta = {**old.meta, "val": value.to("meta")}
        node.update_arg(position, constant)
    return names


def nibble_blocks(values: Tensor, bits: int, block: int) -> Tensor:
    """Integers as com.microsoft::MatMulNBits reads them: unsigned, `2^(bits-1)` for zero, each block in whole bytes.

    Args:
        values: `[N, K]` int8.
        block: input features to a block; the last is filled up with zeros.

    Returns:
        `[N, ceil(K / block), block * bits / 8]` uint8.
    """
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % block)).unflatten(1, (-1, block))
    return pack(unsigned(padded, bits), bits)


def unsigned(values: Tensor, bits: int) -> Tensor:
    """Integers as codes of which `2^(bits-1)` stands for zero: uint8."""
    return (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
