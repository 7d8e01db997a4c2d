"""Layouts of packed weights: every code is where the module's formula says, and a kernel's masks find it."""

import re

import pytest
import torch

from tests.cuda.interpreter.low_bit import weight
from zq_compiler.formats import FORMATS, NIBBLES, unpack
from zq_compiler.kernels.cuda.fp8_linear import pack_fp8
from zq_compiler.kernels.cuda.w4a8_linear import pack_w4a8
from zq_compiler.kernels.cuda.weight_layouts import UNIT, _take_asm, layout_of, pack
from zq_compiler.kernels.cuda.weight_only_linear import pack_weight_only

GROUPS = 0, 16, 32, 64, 128, 256


def codes_in(words, layout, features):
    """The inverse of `pack`, by where each feature's bits are."""
    words = words.view(torch.int16).int() & 0xFFFF if layout.word == 16 else words.int()
    feature = torch.arange(features)
    unit, tile, j = feature // layout.unit, feature % layout.unit // layout.span, feature % layout.span
    codes, below, before = 0, 0, 0
    for bits, count in zip(layout.planes, layout.words, strict=True):
        at = unit * sum(layout.words) * layout.span + (before + tile * bits // layout.word) * layout.span + j
        shift = bits * (tile % (layout.word // bits))
        codes = codes | ((words[:, at] >> shift) & (2**bits - 1)) << below
        below, before = below + bits, before + count
    return codes.to(torch.uint8)


@pytest.mark.parametrize("features", [1, 41, 576, 641])
@pytest.mark.parametrize("word", [8, 16])
@pytest.mark.parametrize("name", ["int4", "int2", "fp6_e3m2", "fp8_e4m3"])
def test_every_code_is_at_its_place(name, word, features):
    for group in GROUPS:
        layout = layout_of(name, group, word)
        codes = torch.randint(2 ** sum(layout.planes), (3, features), dtype=torch.uint8)
        codes[0] = torch.arange(features) % 2 ** sum(layout.planes)
        words = pack(codes, layout)
        units = -(-features // layout.unit)
        assert words.shape == (3, units * sum(layout.words) * layout.span)
        assert words.element_size() * words.shape[1] == units * layout.unit * sum(layout.planes) // 8
        assert torch.equal(codes_in(words, layout, features), codes)


@pytest.mark.parametrize("word", [8, 16])
@pytest.mark.parametrize("name", FORMATS)
def test_spans_have_one_scale_where_tensor_cores_allow(name, word):
    for group in GROUPS:
        layout = layout_of(name, group, word)
        assert layout.unit <= UNIT or group < 256 // word
        assert layout.span == 256 // word or not group or group % layout.span == 0
        assert layout.span * layout.word >= 256  # what tensor cores sum at once
        assert layout.span * layout.word // 8 % 16 == 0  # loads of 128 bits


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", FORMATS)
def test_values_come_back(name, group):
    fmt, k = FORMATS[name], 301
    packed, scale = weight(5, k, name, group)
    values = fmt.decode(unpack(packed, fmt.bits, k))
    codes, scales = pack_weight_only(packed, scale, name, group, k)
    layout = layout_of(name, group, 16)
    stored = codes_in(codes, layout, k)
    decoded = fmt.decode(stored) if "_e" in name else stored.float() - 2 ** (sum(layout.planes) - 1)
    assert torch.equal(decoded, values)
    if group:
        halves = scales.t().contiguous().view(torch.float16).view(5, -1, 2)
        scales = (halves if fmt.asymmetric else halves[..., :1]).transpose(1, 2).flatten(1).t()
    assert torch.equal(scales.t(), scale)
    if name in NIBBLES:
        codes, scales = pack_w4a8(packed, scale, name, group, k)
        layout = layout_of(name, group, 8)
        unused = 8 - sum(layout.planes)
        stored = (codes_in(codes, layout, k) << unused).view(torch.int8) >> unused
        assert torch.equal(stored.float(), values)
        assert torch.equal(scales.t(), scale)
    if "_e" in name:
        for architecture, word in ((80, 16), (89, 8), (90, 8)):
            codes, scales = pack_fp8(packed, scale, name, group, k, architecture)
            assert torch.equal(fmt.decode(codes_in(codes, layout_of(name, group, word), k)), values)
            assert torch.equal(scales.t(), scale)


@pytest.mark.parametrize("bits", [8, 16])
def test_ptx_shifts_words_side_by_side(bits):
    """The instructions, executed here, against the words one by one."""
    torch.manual_seed(0)
    words = torch.randint(2**32, (64,)).tolist()
    parts = range(0, 32, bits)
    cases = 0
    for shift in range(1 - bits, bits):
        own = (1 << bits) - 1
        kept = (own >> shift if shift >= 0 else own << -shift) & own
        for mask, ones in ((kept, 0), (kept & 0x5A5A, 0), (kept & 0xF, 0x6400 & own)):
            run = ptx(_take_asm(bits, shift, mask, ones))
            for word in words:
                each = [(word >> low) & own for low in parts]
                expected = [(((w >> shift if shift >= 0 else w << -shift) & mask) | ones) for w in each]
                assert run(word) == sum(w << low for w, low in zip(expected, parts, strict=True))
                cases += 1
        if kept != own:
            with pytest.raises(AssertionError):
                _take_asm(bits, shift, own, 0)
    assert cases == 64 * 3 * (2 * bits - 1)


def ptx(asm):
    """A function of the instructions that `take` uses."""
    statements = [s.strip() for s in asm.strip("{} ").split(";") if s.strip()]
    assert statements.pop(0) == ".reg .b32 t"

    def run(word):
        registers = {"$1": word}
        for statement in statements:
            name, to, *rest = re.split(r"[ ,]+", statement)
            a, *b = (registers[r] if r in registers else int(r, 0) for r in rest)
            if name == "lop3.b32":
                mask, ones, table = b
                choose = [-(table >> i & 1) for i in range(8)]  # by the bits of the three operands
                sides = [(~a, a), (~mask, mask), (~ones, ones)]
                value = 0
                for i in range(8):
                    value |= choose[i] & sides[0][i >> 2] & sides[1][i >> 1 & 1] & sides[2][i & 1]
            else:
                value = {"shl.b32": int.__lshift__, "shr.b32": int.__rshift__, "and.b32": int.__and__}[name](a, b[0])
            registers[to] = value & 0xFFFFFFFF
        return registers["$0"]

    return run
