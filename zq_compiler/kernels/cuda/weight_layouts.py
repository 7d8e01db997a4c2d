"""Layouts of weights of a few bits: words from which a shift and a mask take tiles of neighbouring features.

Codes are split into planes of bits (FP6: the lower four and the upper two; TC-FPx, 2401.14112) and padded to units of
`tiles * span` features. A plane of b bits has `tiles * b / word` words for each of a span's features, of which word
i holds, lowest bits first, the codes of features that are a span apart:

    word[i, j] = sum_t plane[i * word / b + t, j] << (b * t)

So a tile of words is `word / b` tiles of codes, each of a span of neighbouring features, as the activations are loaded.
Words of all planes of a unit lie side by side: `[N, units, words, span]`.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import format_of, unpack

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNIT = 128  # the most features that a unit has
_PLANES = {1: (2,), 2: (2,), 3: (4,), 4: (4,), 6: (4, 2), 8: (8,)}  # of a code's bits, lowest first
_WORDS = {8: torch.uint8, 16: torch.int16}


@dataclass(frozen=True)
class Layout:
    """How a format lies in words.

    Args:
        planes: bits of each plane, lowest first.
        word: bits of a word.
        span: features that neighbour each other.

    >>> layout_of("fp6_e3m2", 128, word=16)
    Layout(planes=(4, 2), word=16, span=16)
    """

    planes: tuple[int, ...]
    word: int
    span: int

    @property
    def tiles(self) -> int:
        """Spans in a unit."""
        return self.word // min(self.planes)

    @property
    def unit(self) -> int:
        """Features in a unit."""
        return self.tiles * self.span

    @property
    def words(self) -> tuple[int, ...]:
        """Of each plane, in a unit, for each feature of a span."""
        return tuple(self.tiles * bits // self.word for bits in self.planes)


def layout_of(format: str, group: int, word: int) -> Layout:
    """The layout for products of values of `word` bits: no span has features of two groups, but where 256 bits, of
    which tensor cores take the sum at once, are more than a group."""
    planes = _PLANES[format_of(format).bits]
    span = UNIT * min(planes) // word
    return Layout(planes, word, max(min(span, group or span), 256 // word))


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """Codes `[N, K]` uint8 in a layout's words, `[N, units * words * span]` uint8 or int16."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % layout.unit))
    spans = padded.unflatten(1, (-1, layout.tiles, layout.span))
    words, below = [], 0
    for bits, count in zip(layout.planes, layout.words, strict=True):
        plane = ((spans >> below) & (2**bits - 1)).unflatten(2, (count, -1)).to(_WORDS[layout.word])
        words.append(functools.reduce(operator.or_, (tile << bits * t for t, tile in enumerate(plane.unbind(3)))))
        below += bits
    return torch.cat(words, 2).flatten(1)


def signed_codes(w_packed: Tensor, format: str, features: int) -> Tensor:
    """Integers as two's complement of as many bits as their plane has, `[N, K]` uint8."""
    fmt = format_of(format)
    values = fmt.decode(unpack(w_packed, fmt.bits, features)).to(torch.int8)
    return values.view(torch.uint8) & (2 ** sum(_PLANES[fmt.bits]) - 1)


# --- in a kernel ----------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _take_asm(bits, shift, mask, ones):
    """PTX of `take`, for all words in 32 bits. Bits that a shift brings from a neighbour are not in the mask."""
    own = (1 << bits) - 1
    assert mask & (own << -shift if shift < 0 else own >> shift) & own == mask
    each = sum(1 << low for low in range(0, 32, bits))
    shifted = f"shl.b32 t, $1, {-shift};" if shift < 0 else f"shr.b32 t, $1, {shift};"
    # ptxas merges an `and` with what follows; with one of another constant it does not.
    masked = f"lop3.b32 $0, t, {mask * each}, {ones * each}, 0xEA;" if ones else f"and.b32 $0, t, {mask * each};"
    return f"{{ .reg .b32 t; {shifted} {masked} }}"


@triton.jit
def take(words, SHIFT: tl.constexpr, MASK: tl.constexpr, ONES: tl.constexpr = 0):
    """`((words >> SHIFT) & MASK) | ONES` of uint8 or uint16; shifted to the left where SHIFT is negative."""
    BITS: tl.constexpr = words.dtype.primitive_bitwidth
    if INTERPRETED:
        shifted = words >> SHIFT if SHIFT > 0 else words << -SHIFT
        return (shifted & MASK) | ONES
    else:
        asm: tl.constexpr = _take_asm(BITS, SHIFT, MASK, ONES)
        return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=words.dtype, is_pure=True, pack=32 // BITS)


@triton.jit
def widen(low, high, PART: tl.constexpr, TILE: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr):
    """Minifloats with M bits of mantissa as bits of the wider float of a word's size, E4M3 or E5M10.

    Sign and magnitude are moved to where the wider one has its own. It is then `2^(bias - wider bias)` of the value, a
    subnormal one of either too.

    Args:
        low: words of the lower plane, of PLANE bits, of which the PART-th are taken.
        high: words of the upper plane, of 2 bits, of which the TILE-th are taken, where BITS are more than PLANE.
    """
    SIGN: tl.constexpr = low.dtype.primitive_bitwidth - 1
    UP: tl.constexpr = (3 if SIGN == 7 else 10) - M
    if BITS > PLANE:
        upper = take(high, 2 * TILE + 1 - SIGN, 1 << SIGN) | take(high, 2 * TILE - 4 - UP, 1 << (4 + UP))
        return upper | take(low, 4 * PART - UP, 15 << UP)
    else:
        sign = take(low, PLANE * (PART + 1) - 1 - SIGN, 1 << SIGN)
        return sign | take(low, PLANE * PART - UP, ((1 << (PLANE - 1)) - 1) << UP)
