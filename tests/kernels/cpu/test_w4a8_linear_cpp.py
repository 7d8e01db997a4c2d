"""The C++ linear of INT4 weights and INT8 activations equals its reference bit for bit, and reads what it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.walls import before_a_wall
from zq_compiler.formats import FORMATS, NIBBLES, pack, unpack
from zq_compiler.kernels import w4a8_linear
from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import quantize_per_token, quantize_weight

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def nibbles(packed: Tensor, name: str, k: int) -> Tensor:
    return FORMATS[name].decode(unpack(packed, FORMATS[name].bits, k)).to(torch.int8)


def native(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, name: str, group: int, dtype: Any
) -> Tensor:
    laid_out = torch.ops.zq_cpu.pack_nibbles(nibbles(packed, name, x.shape[-1]), scale)
    return torch.ops.zq_cpu.w4a8_linear(x, x_scale, *laid_out, bias, group, packed.shape[0], dtype)


def operands(rows: tuple[int, ...], k: int, n: int, name: str, group: int, seed: int = 0) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((*rows, k), (n, k), (n,)))
    return [*quantize_per_token(x), *quantize_weight(w, name, group), bias, name, group]


def assert_equal(operands: list[Any], dtype: torch.dtype = torch.float32) -> None:
    y, expected = native(*operands, dtype), w4a8_linear(*operands, dtype)
    assert y.dtype is dtype and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 16, 24, 64, 128])
@pytest.mark.parametrize("name", NIBBLES)
def test_every_format(name, group, dtype):
    """One row and several, odd N and K, groups that end amid a step's 32 features, a last one with less."""
    for rows, k, n in (((1,), 41, 7), ((5,), 300, 70), ((2, 3), 129, 17)):
        assert_equal(operands(rows, k, n, name, group), dtype)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 300),
    st.integers(1, 140),
    st.sampled_from(NIBBLES),
    st.integers(0, 12).map(lambda i: 8 * i),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(m, k, n, name, group, dtype, with_bias, seed):
    given = operands((m,), k, n, name, group, seed)
    given[4] = given[4] if with_bias else None
    assert_equal(given, dtype)


@pytest.mark.parametrize("m", [*range(14), 130])
def test_every_tile_height(m):
    for k, n in ((1, 1), (130, 17), (257, 129)):
        assert_equal(operands((m,), k, n, "int4", 64, seed=m))


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-8, 7])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_largest_sums_do_not_saturate(x, w, rows):
    """All activations and all weights at an end: what a lane of 16 bits holds at most."""
    k, n = 4096, 33
    packed = pack(torch.full((n, k), w & 15, dtype=torch.uint8), 4)
    for group, scale in ((0, torch.ones(n, 1)), (128, torch.ones(n, k // 128, dtype=torch.float16))):
        given = torch.full((rows, k), x, dtype=torch.int8), torch.ones(rows, 1), packed, scale, None, "int4", group
        y = native(*given, torch.float32)
        assert (y == x * w * k).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [(1,), (130,)])
def test_threads(rows, threads):
    given = operands(rows, 1100, 520, "int4", 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = native(*given, torch.float32)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, w4a8_linear(*given, torch.float32))


def test_a_nan_scale_is_a_row_of_nan():
    given = operands((7,), 64, 20, "int4", 16)
    given[1][3] = torch.nan
    y = native(*given, torch.bfloat16)
    assert y.isnan().all(-1).tolist() == [i == 3 for i in range(7)]


def test_one_dimension_and_strides():
    x, x_scale, *rest = operands((6,), 40, 20, "int4", 16)
    assert_equal([x[0], x_scale[0], *rest])
    assert_equal([x.T.contiguous().T, x_scale, *rest])
    assert_equal([torch.cat([x, x], 1)[:, :40], x_scale, *rest])


@pytest.mark.parametrize(("group", "bits"), [(0, 0), (64, 0.25)])
def test_codes_take_four_bits(group, bits):
    _, _, packed, scale, *_ = operands((1,), 512, 64, "int4", group)
    codes, scales = torch.ops.zq_cpu.pack_nibbles(nibbles(packed, "int4", 512), scale)
    assert codes.nbytes == packed.nbytes == 64 * 512 // 2 and scales.nbytes == scale.nbytes
    assert not group or 8 * scales.nbytes == bits * 64 * 512


def test_reads_nothing_beyond_the_end():
    for m, k, n, group in ((1, 8, 1, 0), (1, 40, 33, 16), (7, 136, 65, 64), (3, 37, 20, 16)):
        x, x_scale, packed, scale, bias, *_ = operands((m,), k, n, "int4", group)
        laid_out = torch.ops.zq_cpu.pack_nibbles(before_a_wall(nibbles(packed, "int4", k)), before_a_wall(scale))
        walled = [before_a_wall(t) for t in (x, x_scale, *laid_out, bias)]
        y = torch.ops.zq_cpu.w4a8_linear(*walled, group, n, torch.float32)
        assert torch.equal(y, w4a8_linear(x, x_scale, packed, scale, bias, "int4", group, torch.float32))


ERRORS = {
    "x_q must be Char": dict(x_q=torch.zeros(2, 40)),
    "K at least 1": dict(x_q=torch.zeros(2, 0, dtype=torch.int8)),
    r"x_scale must be Float \[2, 1\]": dict(x_scale=torch.ones(2)),
    r"codes must be Byte \[1, 6, 16, 4\]": dict(x_q=torch.zeros(2, 41, dtype=torch.int8)),
    r"scale must be Half \[1, 3, 16\]": dict(scale=torch.zeros(1, 3, 16)),
    r"bias must be \[5\]": dict(bias=torch.zeros(1)),
    "bias must be a float dtype": dict(bias=torch.zeros(5, dtype=torch.int32)),
    "group must be a multiple of 8": dict(group=12),
    "n must be positive": dict(n=0),
    "out_dtype must be Float, BFloat16 or Half": dict(out_dtype=torch.int8),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    x, x_scale, packed, scale, bias, *_ = operands((2,), 40, 5, "int4", 16)
    codes, scales = torch.ops.zq_cpu.pack_nibbles(nibbles(packed, "int4", 40), scale)
    good = dict(x_q=x, x_scale=x_scale, codes=codes, scale=scales, bias=bias, group=16, n=5, out_dtype=torch.float32)
    torch.ops.zq_cpu.w4a8_linear(**good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zq_cpu.w4a8_linear(**good | ERRORS[message])


def test_pack_errors():
    w, scale = torch.zeros(5, 40, dtype=torch.int8), torch.ones(5, 1)
    with pytest.raises(RuntimeError, match=r"w_q must be Char \[N, K\]"):
        torch.ops.zq_cpu.pack_nibbles(w.int(), scale)
    with pytest.raises(RuntimeError, match=r"w_scale must be Half or Float \[N, groups\]"):
        torch.ops.zq_cpu.pack_nibbles(w, scale[:4])
    for value in (8, -9):
        w[4, 39] = value
        with pytest.raises(RuntimeError, match=rf"w_q must be in \[-8, 7\], got {value}"):
            torch.ops.zq_cpu.pack_nibbles(w, scale)


@pytest.mark.parametrize("group", [0, 16])
def test_fakes_match_the_kernels(group):
    x, x_scale, packed, scale, bias, *_ = operands((2, 3), 41, 20, "int4", group)
    ops, utils = torch.ops.zq_cpu, ("test_schema", "test_faketensor")
    w = nibbles(packed, "int4", 41)
    torch.library.opcheck(ops.pack_nibbles.default, (w, scale), test_utils=utils)
    args = (x, x_scale, *ops.pack_nibbles(w, scale), bias, group, 20, torch.bfloat16)
    torch.library.opcheck(ops.w4a8_linear.default, args, test_utils=utils)
