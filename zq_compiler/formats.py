"""Number formats of a few bits: which values codes stand for, how floats are rounded to them, how codes are packed.

Integers are two's complement; minifloats are sign and magnitude, subnormals included, without infinities. Rounding is
to the nearest value, half to the one with the even code, which is the even integer or the even mantissa; what lies
outside saturates.

    int8 [-127, 127], int4 [-8, 7], int3 [-4, 3], int2 [-2, 1]; ternary and binary (XTC, 2206.01859)
    int4_asym, int3_asym, int2_asym: the same integers, of which another one than 0 in each group stands for zero
    fp8_e4m3 and fp8_e5m2 (2209.05433; E4M3 is the one without infinities), fp6_e3m2, fp6_e2m3, fp4_e2m1 (OCP MX 1.0)
    fp4_e3m0 (ZeroQuant-FP, 2307.09782)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from .errors import RecipeError


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: as recipes and files have it.
        bits: of a code.
        values: of each code in turn; NaN where a code stands for no number.
        asymmetric: a group has an integer zero point, which is taken off its values; scales lie in front of these.

    >>> FORMATS["fp4_e2m1"].values[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """

    name: str
    bits: int
    values: tuple[float, ...]
    asymmetric: bool = False

    @cached_property
    def is_integer(self) -> bool:
        """Whether its values are integers without gaps."""
        low, high = self.range
        return {v for v in self.values if not math.isnan(v)} == {float(v) for v in range(int(low), int(high) + 1)}

    @cached_property
    def minifloat(self) -> tuple[int, int] | None:
        """Bits of its exponent and mantissa; None of integers."""
        match = re.search(r"_e(\d)m(\d)$", self.name)
        return (int(match[1]), int(match[2])) if match else None

    @cached_property
    def range(self) -> tuple[float, float]:
        """The least and the largest value."""
        known = [v for v in self.values if not math.isnan(v)]
        return min(known), max(known)

    @cached_property
    def reach(self) -> tuple[float, float]:
        """Between which places the values of a group lie, with its scale. Integers with one more below zero than above
        reach half a step beyond the largest, so that no value is more than that off: -8 and 7.5 for `[-8, 7]`."""
        low, high = self.range
        return low, max(high, (high - low) / 2)

    @cached_property
    def half_span(self) -> float:
        """Half of what lies between the least and the largest value."""
        low, high = self.range
        return (high - low) / 2

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest values.

        Args:
            x: any shape, any float dtype, finite.

        Returns:
            uint8 of x's shape, `bits` bits of it used.

        >>> FORMATS["int4"].encode(torch.tensor([2.5, -9.0])).tolist()
        [2, 8]
        """
        x = x.float().contiguous()
        if self.is_integer:
            return x.round().clamp(*self.range).to(torch.int8).view(torch.uint8) & (2**self.bits - 1)
        if self.minifloat is not None and self.minifloat[1]:  # without a mantissa, a code is even where its exponent is
            return self._encode_minifloat(x, *self.minifloat)
        codes, halfway = (torch.tensor(table, device=x.device) for table in self._sorted)
        lower, upper = codes[torch.bucketize(x, halfway)], codes[torch.bucketize(x, halfway, right=True)]
        return torch.where(lower % 2 == 0, lower, upper).to(torch.uint8)  # they differ only halfway

    def _encode_minifloat(self, x: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
        """By the bits of float32: several times faster than a search."""
        least = 2 - 2 ** (exponent_bits - 1)  # exponent of the subnormals and of the binade above them
        x = x.clamp(*self.range)
        exponent = ((x.view(torch.int32) >> 23 & 255) - 127).clamp_(min=least)
        steps = x * ((127 + mantissa_bits - exponent) << 23).view(torch.float32)  # a power of two: exact
        places = steps.round_().int()
        magnitudes = ((exponent - least) << mantissa_bits) + places.abs()
        return torch.where(places < 0, magnitudes + 2 ** (self.bits - 1), magnitudes).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes: uint8 of any shape -> float32.

        >>> FORMATS["int4"].decode(torch.tensor([2, 8], dtype=torch.uint8)).tolist()
        [2.0, -8.0]
        """
        if self.is_integer:
            unused = 8 - self.bits
            return ((codes << unused).view(torch.int8) >> unused).float()
        return torch.tensor(self.values, device=codes.device)[codes.int()]

    def spacing(self, x: Tensor) -> Tensor:
        """How far apart the two values are between which each element lies; of one outside, the outermost two.

        >>> FORMATS["fp4_e2m1"].spacing(torch.tensor([0.2, 1.7, -5.0, 9.0])).tolist()
        [0.5, 0.5, 2.0, 2.0]
        """
        if self.is_integer:
            return torch.ones_like(x)
        values = torch.tensor(sorted({v for v in self.values if not math.isnan(v)}), device=x.device)
        above = torch.bucketize(x.float().contiguous(), values).clamp(1, len(values) - 1)
        return values[above] - values[above - 1]

    @cached_property
    def _sorted(self) -> tuple[list[int], list[float]]:
        """Codes in the order of their values, one for zero, and what lies halfway between neighbours."""
        code_of = {value: code for code, value in reversed(list(enumerate(self.values))) if not math.isnan(value)}
        values = sorted(code_of)
        return [code_of[value] for value in values], [(a + b) / 2 for a, b in pairwise(values)]


def _integer(bits: int, least: int | None = None) -> Format:
    values = [float(code - 2**bits if code >= 2 ** (bits - 1) else code) for code in range(2**bits)]
    kept = [math.nan if least is not None and v < least else v for v in values]
    return Format(f"int{bits}" if least is None or bits == 8 else "ternary", bits, tuple(kept))


def _asymmetric(bits: int) -> Format:
    return replace(_integer(bits), name=f"int{bits}_asym", asymmetric=True)


def _minifloat(exponent_bits: int, mantissa_bits: int, largest: float = math.inf) -> Format:
    bias, magnitudes = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, fraction = code >> mantissa_bits, (code % 2**mantissa_bits) / 2**mantissa_bits
        value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        magnitudes.append(value if value <= largest else math.nan)
    bits = 1 + exponent_bits + mantissa_bits
    return Format(f"fp{bits}_e{exponent_bits}m{mantissa_bits}", bits, (*magnitudes, *(-v for v in magnitudes)))


_E4M3 = _minifloat(4, 3, largest=448.0)
_ALL = (
    *(_integer(8, least=-127), _integer(4), _integer(3), _integer(2), _integer(2, least=-1)),
    Format("binary", 1, (1.0, -1.0)),
    *(_asymmetric(4), _asymmetric(3), _asymmetric(2)),
    *(_E4M3, _minifloat(5, 2, largest=57344.0)),
    *(_minifloat(3, 2), _minifloat(2, 3), _minifloat(2, 1), _minifloat(3, 0)),
)
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
# Weights that are multiplied with integers (W4A8): those that fit in four bits. With E4M3: floats that it holds.
NIBBLES = tuple(f.name for f in _ALL if f.is_integer and f.bits <= 4 and not f.asymmetric)
WITHIN_E4M3 = tuple(f.name for f in _ALL if "_e" in f.name and {*f.values} <= {*_E4M3.values})


def format_of(name: str) -> Format:
    """A format by name.

    Raises:
        RecipeError: no such format.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}", fix=f"use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes side by side without gaps, lowest bits first, each row in bytes of its own.

    Four bits lie as in ONNX and in a nibble array: the first code in a byte's lower half.

    Args:
        codes: `[..., K]` uint8, of 1 to 8 bits.

    Returns:
        `[..., ceil(K * bits / 8)]` uint8.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes
    per_word, word_bytes = _word(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    words = padded.unflatten(-1, (-1, per_word)).int() << torch.arange(0, per_word * bits, bits, device=codes.device)
    low_to_high = words.sum(-1, keepdim=True) >> torch.arange(0, 8 * word_bytes, 8, device=codes.device)
    return (low_to_high & 255).to(torch.uint8).flatten(-2)[..., : packed_size(codes.shape[-1], bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: the first `count` codes of each row, `[..., count]` uint8.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    if bits == 8:
        return packed
    per_word, word_bytes = _word(bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % word_bytes))
    words = padded.unflatten(-1, (-1, word_bytes)).int() << torch.arange(0, 8 * word_bytes, 8, device=packed.device)
    codes = words.sum(-1, keepdim=True) >> torch.arange(0, per_word * bits, bits, device=packed.device)
    return (codes & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :count]


def _word(bits: int) -> tuple[int, int]:
    """How many codes end where a byte ends, and the bytes that they take: 4 and 3 for codes of 6 bits."""
    shared = math.gcd(bits, 8)
    return 8 // shared, bits // shared


def to_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 6 bits in two planes that each read in whole bytes: sign and top exponent bit, and the lower four
    (TC-FPx, 2401.14112, section 5).

    Args:
        codes: `[..., K]` uint8.

    Returns:
        `[..., ceil(K / 4)]` and `[..., ceil(K / 2)]` uint8.
    """
    return pack(codes >> 4, 2), pack(codes & 15, 4)


def from_planes(high: Tensor, low: Tensor, count: int) -> Tensor:
    """The inverse of `to_planes`: `[..., count]` uint8."""
    return (unpack(high, 2, count) << 4) | unpack(low, 4, count)
