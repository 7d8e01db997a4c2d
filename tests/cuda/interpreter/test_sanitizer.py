"""The sanitizer: it catches faults planted in kernels, and computes what a GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.cuda.interpreter.sanitizer import OutOfBoundsError, RaceError, counted


@triton.jit
def _copy(x_ptr, y_ptr, N, READ, WRITTEN, STEP, BLOCK: tl.constexpr):
    """Copies N elements in blocks STEP apart; reads READ and writes WRITTEN of them where those are other numbers."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < READ, other=0.0)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < WRITTEN)


def copy(
    x: torch.Tensor, y: torch.Tensor, read: int = 0, written: int = 0, step: int = 64, programs: int = 0
) -> torch.Tensor:
    n = x.shape[0]
    _copy[(programs or triton.cdiv(n, step),)](x, y, n, n + read, n + written, step, BLOCK=64)
    return y


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_bytes_of_a_copy_are_those_of_its_tensors(dtype):
    x = torch.arange(100).to(dtype)
    with counted() as traffic:
        assert torch.equal(copy(x, torch.empty_like(x)), x)
    assert traffic.read == traffic.written == traffic.unique_read == traffic.unique_written == x.nbytes
    assert (traffic.launches[0].kernel, traffic.launches[0].grid) == ("_copy", (2, 1, 1))
    assert traffic.launches[0].read == {"x_ptr": x.nbytes}


@triton.jit
def _read_thrice(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i) + tl.load(x_ptr + i) + tl.load(x_ptr + i * 0)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + i, x)


def test_what_is_read_again_counts_again_but_is_unique_once():
    x, y = torch.randn(32), torch.empty(64)
    with counted() as traffic:
        _read_thrice[(2,)](x, y, BLOCK=32)
    assert (traffic.read, traffic.unique_read) == (2 * 3 * x.nbytes, x.nbytes)


@pytest.mark.parametrize("spare", [0, 64], ids=["own storage", "within a larger one"])
def test_a_mask_that_is_one_too_wide_is_caught(spare):
    x, y = torch.zeros(100 + spare)[:100], torch.zeros(100 + spare)[:100]
    copy(x, y)
    with pytest.raises(OutOfBoundsError, match=r"program \(1, 0, 0\), load: 1 lanes .* 0 bytes past the end of x_ptr"):
        copy(x, y, read=1)
    with pytest.raises(OutOfBoundsError, match=r"store: 1 lanes .* past the end of y_ptr"):
        copy(x, y, written=1)


@triton.jit
def _shifted(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK) - 1, 0.0)


def test_what_lies_before_a_tensor_is_out_of_bounds():
    with pytest.raises(OutOfBoundsError, match=r"1 lanes .* 4 bytes before x_ptr"):
        _shifted[(1,)](torch.zeros(128)[64:], BLOCK=64)


@triton.jit
def _rows(x_ptr, y_ptr, K, STRIDE, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * STRIDE + i, mask=i < K, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * K + i, x, mask=i < K)


def test_what_lies_between_the_rows_of_a_view_is_out_of_bounds():
    x, y = torch.randn(4, 24)[:, :20], torch.empty(4, 20)
    _rows[(4,)](x, y, 20, 24, BLOCK=32)
    assert torch.equal(x, y)
    with pytest.raises(OutOfBoundsError, match="between the elements of x_ptr"):
        _rows[(4,)](x, torch.empty(4, 21), 21, 24, BLOCK=32)


def test_two_programs_that_store_to_one_address_are_caught():
    x = torch.randn(96)
    with pytest.raises(RaceError, match=r"program \(1, 0, 0\), store: program 0 stored there too, in y_ptr"):
        copy(x, torch.empty_like(x), step=32)


@triton.jit
def _folded(y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i // 2, i)


def test_two_lanes_of_a_store_at_one_address_are_caught():
    with pytest.raises(RaceError, match="two lanes"):
        _folded[(1,)](torch.empty(16, dtype=torch.int32), BLOCK=32)


def test_reading_what_another_program_stores_is_caught():
    x = torch.randn(128)
    copy(x, x)  # each program its own
    with pytest.raises(RaceError, match="in no order"):
        _copy[(2,)](x, x[64:], 64, 128, 64, 64, BLOCK=64)
    with pytest.raises(RaceError, match="in no order"):
        _copy[(2,)](x[64:], x, 64, 64, 128, 64, BLOCK=64)


@triton.jit
def _sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + i // 2, tl.load(x_ptr + tl.program_id(0) * BLOCK + i))


def test_atomics_may_meet_and_are_counted():
    x, y = torch.ones(64), torch.zeros(16)
    with counted() as traffic:
        _sum[(2,)](x, y, BLOCK=32)
    assert torch.equal(y, torch.full((16,), 4.0))
    assert (traffic.written, traffic.unique_written) == (x.nbytes, y.nbytes)
    with pytest.raises(OutOfBoundsError, match="atomic"):
        _sum[(2,)](x, torch.zeros(15), BLOCK=32)


@triton.jit
def _fails(y_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1)


def test_other_errors_stay_what_they_are():
    with pytest.raises(InterpreterError):
        _fails[(1,)](torch.zeros(1), BLOCK=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int32])
def test_an_output_that_nobody_writes_shows(dtype):
    x = torch.zeros(100).to(dtype)
    for y in (torch.empty(100, dtype=dtype), torch.empty_like(x), x.new_empty(100)):
        written = copy(x, y, written=-1)
        assert torch.equal(written[:99].float(), x[:99].float())
        assert not torch.equal(written.float(), x.float())


@triton.jit
def _without_other(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N))


def test_what_a_masked_load_gives_without_other_is_no_zero():
    for x in (torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int8)):
        y = torch.zeros_like(x)
        _without_other[(1,)](x, y, 7, BLOCK=8)
        assert (y != 0).tolist() == [False] * 7 + [True]


# Numbers


def bits(count: int = 2**14, seed: int = 0) -> torch.Tensor:
    """float32 of all magnitudes, and what is special."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    near = random.normal(size=count).astype(np.float32) * 100
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 448, 449, 464, 480, 1e-45, 65504, 65520, 3.4e38], np.float32)
    return torch.from_numpy(np.concatenate([drawn, near, special]))


@triton.jit
def _elementwise(x_ptr, y_ptr, z_ptr, out_ptr, N, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = (tl.load(p + i, mask=i < N, other=0.0) for p in (x_ptr, y_ptr, z_ptr))
    if OP == "cast":
        r = x
    elif OP == "add":
        r = x + y
    elif OP == "multiply":
        r = x * y
    elif OP == "fma":
        r = tl.fma(x, y, z)
    elif OP == "maximum":
        r = tl.maximum(x, y)
    elif OP == "minimum":
        r = tl.minimum(x, y)
    elif OP == "clamp":
        r = tl.clamp(x, -1.0, 1.0)
    elif OP == "erf":
        r = tl.erf(x)
    elif OP == "shift":
        r = (x >> 2) * 8 + (x & 1)
    elif OP == "less":
        r = x < y
    tl.store(out_ptr + i, r.to(out_ptr.dtype.element_ty), mask=i < N)


def elementwise(op: str, dtype: torch.dtype, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
    out, block = torch.empty(x.shape, dtype=dtype), triton.next_power_of_2(x.numel())
    y, z = (*more, x, x)[:2]
    _elementwise[(1,)](x, y, z, out, x.numel(), op, BLOCK=block)
    return out


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_half_to_even(source, target):
    x = bits().to(source)
    assert_same(elementwise("cast", target, x), x.to(target))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("target", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_casts_to_fp8_saturate(source, target, largest):
    x = bits().to(source)
    fp8 = elementwise("cast", target, x)
    assert_same(fp8, x.float().clamp(-largest, largest).to(target))
    assert_same(elementwise("cast", source, fp8), fp8.to(source))


def test_what_no_integer_stands_for_becomes_no_plausible_one():
    x = torch.tensor([-128.9, -129.0, 127.9, 128.0, 300.0, float("nan"), float("inf")])
    assert elementwise("cast", torch.int8, x).tolist() == [-128, 90, 127, 90, 90, 90, 90]
    assert elementwise("cast", torch.int8, x.bfloat16()).tolist() == [90, 90, 90, 90, 90, 90, 90]  # -129, 128


@pytest.mark.parametrize("op", ["add", "multiply", "less"])
def test_bfloat16_computes(op):
    x, y = bits(seed=1).bfloat16(), bits(seed=2).bfloat16()
    expected = {"add": torch.add, "multiply": torch.mul, "less": torch.lt}[op](x, y)
    assert_same(elementwise(op, torch.float32, x, y), expected.float())


def test_fma_rounds_once():
    random = np.random.default_rng(0)
    x, y, z = (torch.from_numpy(random.normal(size=4000).astype(np.float32)) for _ in range(3))
    z[::2] = -(x * y)[::2]  # what is left is the product's rounding error
    expected = [float(np.float32(exact)) for exact in _fused(x.tolist(), y.tolist(), z.tolist())]
    assert elementwise("fma", torch.float32, x, y, z).tolist() == expected
    # A sum that lies, in float64 too, all but halfway between two of float32.
    x, y, z = torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), torch.tensor([2.0**-24 + 2.0**-47])
    assert elementwise("fma", torch.float32, x, y, z).item() == 1.0 + 2**-22
    assert elementwise("fma", torch.float32, -x, y, -z).item() == -1.0 - 2**-22


def _fused(x: list[float], y: list[float], z: list[float]) -> list[float]:
    """Rounded to odd by exact arithmetic, so that rounding to float32 is right."""
    from fractions import Fraction

    results = []
    for a, b, c in zip(x, y, z, strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        rounded = float(exact)
        if Fraction(rounded) != exact and np.float64(rounded).view(np.int64) % 2 == 0:
            rounded = float(np.nextafter(rounded, np.inf if exact > Fraction(rounded) else -np.inf))
        results.append(rounded)
    return results


def test_maximum_minimum_and_clamp_drop_nan():
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([3.0, nan, nan, 5.0])
    assert_same(elementwise("maximum", torch.float32, x, y), torch.tensor([3.0, 1.0, nan, 5.0]))
    assert_same(elementwise("minimum", torch.float32, x, y), torch.tensor([3.0, 1.0, nan, 2.0]))
    assert_same(elementwise("clamp", torch.float32, x), torch.tensor([-1.0, 1.0, -1.0, 1.0]))


def test_erf_and_shifts():
    x = torch.linspace(-4, 4, 1000)
    assert_same(elementwise("erf", torch.float32, x), torch.erf(x))
    x = torch.arange(-128, 128).to(torch.int8).int()
    assert elementwise("shift", torch.int32, x).tolist() == [(i >> 2) * 8 + (i & 1) for i in range(-128, 128)]


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, K: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(a_ptr + i[:, None] * K + k[None, :]), tl.load(b_ptr + i[:, None] * K + k[None, :])
    c = tl.dot(a, b.T, input_precision=PRECISION, out_dtype=c_ptr.dtype.element_ty)
    tl.store(c_ptr + i[:, None] * N + i[None, :], c)


@pytest.mark.parametrize("k", [32, 2048])
def test_integer_products_are_exact(k):
    a, b = (torch.full((16, k), v, dtype=torch.int8) for v in (-128, 127))
    a[0, ::3], b[1, ::5] = 1, -128
    c = torch.empty(16, 16, dtype=torch.int32)
    _matmul[(1,)](a, b, c, k, "ieee", N=16)
    assert torch.equal(c, a.int() @ b.int().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_products_of_floats(dtype):
    a, b = (torch.randint(-8, 9, (16, 32)).float().to(dtype) for _ in range(2))  # sums are exact in any order
    c = torch.empty(16, 16)
    _matmul[(1,)](a, b, c, 32, "ieee", N=16)
    assert torch.equal(c, a.float() @ b.float().T)


def test_tf32_drops_low_bits():
    a, b = torch.full((16, 32), 1 + 2.0**-11), torch.eye(32)[:16].contiguous()
    c = torch.empty(16, 16)
    for precision, expected in (("ieee", 1 + 2.0**-11), ("tf32", 1.0)):
        _matmul[(1,)](a, b, c, 32, precision, N=16)
        assert torch.equal(c, torch.full((16, 16), expected))
