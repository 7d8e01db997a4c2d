"""The C++ linear of packed weights agrees with its reference in every format, at any shape, and reads what it may."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.formulas import RELATIVE, float64
from tests.tolerances import ROUNDING_DB
from tests.walls import before_a_wall
from zq_compiler.formats import FORMATS
from zq_compiler.kernels import weight_only_linear
from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import dequantize_weight, quantize_weight, sqnr

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def native(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, name: str, group: int) -> Tensor:
    codes, scales = torch.ops.zq_cpu.pack_codes(packed, scale, name)
    return torch.ops.zq_cpu.weight_only_linear(x, codes, scales, bias, name, group, packed.shape[0])


def operands(rows: tuple[int, ...], k: int, n: int, name: str, group: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*shape, generator=g) for shape in ((*rows, k), (n, k), (n,)))
    return [x, *quantize_weight(w, name, group), bias]


def assert_agrees(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, name: str, group: int) -> None:
    """With the float64 product of the values that the reference multiplies: a float32 sum, rounded once to x's dtype.

    A sum of few outputs may be nearly zero by chance, so its error is in units of what was summed."""
    y = native(x, packed, scale, bias, name, group)
    left, right = float64(x), float64(dequantize_weight(packed, scale, name, group, x.shape[-1], x.dtype)).T
    offset = 0.0 if bias is None else float64(bias)
    exact, summed = left @ right + offset, np.abs(left) @ np.abs(right) + np.abs(offset)
    assert y.dtype is x.dtype and y.shape == exact.shape
    slack = RELATIVE[torch.float32] * summed + (0 if x.dtype is torch.float32 else RELATIVE[x.dtype] * np.abs(exact))
    assert (np.abs(float64(y) - exact) <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 3, 16, 24, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, group, dtype):
    """One row and several, odd N, groups that end amid sixteen codes, a last one with less."""
    for rows, k, n in (((1,), 41, 7), ((5,), 41, 7), ((1,), 300, 70), ((2, 3), 300, 70)):
        x, packed, scale, bias = operands(rows, k, n, name, group)
        assert_agrees(x.to(dtype), packed, scale, bias.to(dtype), name, group)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 150),
    st.integers(1, 140),
    st.sampled_from(list(FORMATS)),
    st.integers(0, 80),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(m, k, n, name, group, dtype, with_bias, seed):
    x, packed, scale, bias = operands((m,), k, n, name, group, seed)
    assert_agrees(x.to(dtype), packed, scale, bias if with_bias else None, name, group)


@pytest.mark.parametrize("m", [*range(14), 193, 400])
def test_every_tile_height_and_blocks_of_rows(m):
    for k, n in ((1, 1), (130, 17), (257, 129)):
        assert_agrees(*operands((m,), k, n, "int4", 64, seed=m), "int4", 64)


@pytest.mark.parametrize("rows", [(1,), (4,), (130,)])
@pytest.mark.parametrize("threads", [1, 3])
def test_large(rows, threads):
    x, packed, scale, bias = operands(rows, 3072, 520, "fp6_e3m2", 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = native(x, packed, scale, bias, "fp6_e3m2", 128)
    finally:
        torch.set_num_threads(before)
    assert sqnr(weight_only_linear(x, packed, scale, bias, "fp6_e3m2", 128), y) > ROUNDING_DB


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_to_the_last_bit(name, dtype):
    """A row of the identity picks one feature of the weight, in the arithmetic of one row and of several."""
    fmt = FORMATS[name]
    values = torch.tensor([v for v in fmt.values if v == v])
    w = values.repeat(3)[: 2 * len(values) + 1] * torch.rand(9, 1, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize_weight(w, name, 0)
    expected = dequantize_weight(packed, scale, name, 0, w.shape[1], dtype)
    eye = torch.eye(w.shape[1], dtype=dtype)
    assert torch.equal(native(eye, packed, scale, None, name, 0).T, expected)
    rows = [native(row, packed, scale, None, name, 0) for row in eye]
    assert torch.equal(torch.stack(rows, 1), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int4", "fp6_e3m2", "binary"])
def test_nan_and_inf_propagate(name, dtype, bad):
    x, packed, scale, bias = operands((3,), 41, 20, name, 16)
    x[1, 40] = bad
    x, bias = x.to(dtype), bias.to(dtype)
    expected = weight_only_linear(x, packed, scale, bias, name, 16)
    assert not expected[1].isfinite().any()
    for y in (
        native(x, packed, scale, bias, name, 16),
        torch.cat([native(r[None], packed, scale, bias, name, 16) for r in x]),
    ):
        assert torch.equal(y[1].isnan(), expected[1].isnan()) and torch.equal(y[1].isposinf(), expected[1].isposinf())
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 5)])
def test_no_rows(rows):
    y = native(*operands(rows, 40, 20, "int3", 16), "int3", 16)
    assert y.shape == (*rows, 20) and y.dtype is torch.float32


def test_one_dimension_and_strides():
    x, packed, scale, bias = operands((6,), 40, 20, "int8", 0)
    assert_agrees(x[0], packed, scale, bias, "int8", 0)
    assert_agrees(x.T.contiguous().T, packed, scale, bias, "int8", 0)
    assert_agrees(torch.cat([x, x], 1)[:, :40], packed, scale, bias, "int8", 0)


@pytest.mark.parametrize("name", FORMATS)
def test_packed_codes_take_no_more_memory(name):
    packed, scale = quantize_weight(torch.randn(64, 512), name, 64)
    codes, scales = torch.ops.zq_cpu.pack_codes(packed, scale, name)
    assert codes.nbytes == packed.nbytes and scales.nbytes == scale.nbytes


def test_reads_nothing_beyond_the_end():
    for m, k, n, name, group in ((1, 1, 1, "int4", 0), (1, 37, 33, "fp6_e3m2", 16), (7, 130, 65, "int3", 64)):
        x, packed, scale, bias = operands((m,), k, n, name, group)
        codes, scales = torch.ops.zq_cpu.pack_codes(before_a_wall(packed), before_a_wall(scale), name)
        walled = [before_a_wall(t) for t in (x, codes, scales, bias)]
        y = torch.ops.zq_cpu.weight_only_linear(*walled, name, group, n)
        assert torch.equal(y, native(x, packed, scale, bias, name, group))


ERRORS = {
    "x must be Float, BFloat16 or Half": dict(x=torch.zeros(2, 40, dtype=torch.float64)),
    "K at least 1": dict(x=torch.zeros(2, 0)),
    r"codes must be Short \[1, 12, 16\] .*from pack_codes": dict(x=torch.zeros(2, 41), codes=torch.zeros(1, 12, 16)),
    r"scale must be Half \[1, 3, 16\]": dict(scale=torch.zeros(1, 3, 16)),
    r"bias must be \[5\]": dict(bias=torch.zeros(1)),
    "bias must be a float dtype": dict(bias=torch.zeros(5, dtype=torch.int32)),
    "unknown format int5": dict(format="int5"),
    "group must not be negative": dict(group=-1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    x, packed, scale, bias = operands((2,), 40, 5, "int4", 16)
    codes, scales = torch.ops.zq_cpu.pack_codes(packed, scale, "int4")
    good = dict(x=x, codes=codes, scale=scales, bias=bias, format="int4", group=16, n=5)
    torch.ops.zq_cpu.weight_only_linear(**good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zq_cpu.weight_only_linear(**good | ERRORS[message])


def test_pack_errors():
    packed, scale = quantize_weight(torch.randn(5, 40), "int4", 16)
    with pytest.raises(RuntimeError, match=r"w_packed must be Byte \[N, bytes\]"):
        torch.ops.zq_cpu.pack_codes(packed.int(), scale, "int4")
    with pytest.raises(RuntimeError, match=r"w_scale must be Half or Float \[N, groups\]"):
        torch.ops.zq_cpu.pack_codes(packed, scale[:4], "int4")
    with pytest.raises(RuntimeError, match="unknown format int5"):
        torch.ops.zq_cpu.pack_codes(packed, scale, "int5")


@pytest.mark.parametrize(("name", "group"), [("int4", 16), ("fp6_e3m2", 0)])
def test_fakes_match_the_kernels(name, group):
    x, packed, scale, bias = operands((2, 3), 41, 20, name, group)
    ops, utils = torch.ops.zq_cpu, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.pack_codes.default, (packed, scale, name), test_utils=utils)
    args = (x.bfloat16(), *ops.pack_codes(packed, scale, name), bias, name, group, 20)
    torch.library.opcheck(ops.weight_only_linear.default, args, test_utils=utils)
