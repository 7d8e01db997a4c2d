"""The C++ kernels agree with plain torch bit for bit, at any shape, and refuse what they cannot compute."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.walls import before_a_wall
from zq_compiler.kernels import int8_linear_gelu_quantize
from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import rotate

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

BLOCK, GROUP = build.PACKING.get(build.isa(), (1, 1))
STEP = torch.tensor(1 / 127, dtype=torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def linear_reference(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    acc = x_q.to(torch.int32) @ w_q.to(torch.int32).T
    y = (acc.to(torch.float32) * w_scale.reshape(-1)) * x_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def linear(
    x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    packed, colsum = torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)
    return torch.ops.zq_cpu.int8_linear(x_q, x_scale, packed, w_scale, colsum, bias, out_dtype)


def operands(rows: tuple[int, ...], k: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_q = torch.randint(-128, 128, (*rows, k), dtype=torch.int8, generator=g)
    w_q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    x_scale, w_scale = torch.rand(*rows, 1, generator=g), torch.rand(n, 1, generator=g) / 64
    return x_q, x_scale, w_q, w_scale, torch.randn(n, generator=g) * 64


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal values, signs of zero and NaN places, not only close ones."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(actual.signbit()[numbers], expected.signbit()[numbers])


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    a = x.float().abs().amax(-1, keepdim=True)
    finite = a.isfinite()
    a = a.clamp(min=1e-12)
    q = ((x.float() / a) / STEP).round()  # torch rounds half to even
    return q.where(finite, 0).to(torch.int8), (a * STEP).where(finite, torch.nan)


def assert_quantizes(x: Tensor) -> None:
    (q, scale), (q_ref, scale_ref) = torch.ops.zq_cpu.quantize_per_token(x), quantize_reference(x)
    assert torch.equal(q, q_ref)
    assert_same_bits(scale, scale_ref)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 70),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *DTYPES]),
    st.integers(0, 2**31),
)
def test_linear_any_shape(m, k, n, out_dtype, bias_dtype, seed):
    *xw, bias = operands((m,), k, n, seed)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    assert_same_bits(linear(*xw, bias, out_dtype), linear_reference(*xw, bias, out_dtype))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, k, n", [((128,), 768, 768), ((2, 3, 50), 386, 200), ((1,), 3072, 65), ((700,), 1027, 33)]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_large(rows, k, n, out_dtype, threads):
    args = operands(rows, k, n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = linear(*args, out_dtype)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(actual, linear_reference(*args, out_dtype))


@pytest.mark.parametrize("x, w", [(127, 127), (-128, 127), (-128, -127), (127, -127)])
def test_linear_extremes(x, w):
    x_q, w_q = torch.full((7, 4099), x, dtype=torch.int8), torch.full((70, 4099), w, dtype=torch.int8)
    args = x_q, torch.ones(7, 1), w_q, torch.ones(70, 1), None, torch.float32
    assert_same_bits(linear(*args), linear_reference(*args))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_linear_nan_inf_and_denormal_scales(out_dtype):
    x_q, _, w_q, w_scale, bias = operands((9,), 40, 80)
    x_q[8] = 0
    tiny = [1e-38, 1e-41, 1e-8]  # denormal in float32 and bfloat16, denormal in float16
    x_scale = torch.tensor([torch.nan, torch.inf, -torch.inf, *tiny, 0.0, -1.0, 1.0])[:, None]
    for offset in (None, bias):
        y = linear(x_q, x_scale, w_q, w_scale, offset, out_dtype)
        assert y[0].isnan().all()
        assert_same_bits(y, linear_reference(x_q, x_scale, w_q, w_scale, offset, out_dtype))


def test_linear_rounds_ties_to_even():
    """Sums around 2^8 and 2^11 with halves: ties of bfloat16 and float16."""
    x_q, w_q = torch.ones(1, 64, dtype=torch.int8), torch.ones(4096, 64, dtype=torch.int8)
    w_scale = (torch.arange(4096) / 64)[:, None]
    for dtype in DTYPES:
        args = x_q, torch.ones(1, 1), w_q, w_scale, None, dtype
        assert_same_bits(linear(*args), linear_reference(*args))


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 5)])
def test_linear_empty(rows):
    y = linear(*operands(rows, 10, 20), torch.bfloat16)
    assert y.shape == (*rows, 20) and y.dtype == torch.bfloat16


def test_linear_takes_one_dimension_and_strides():
    x_q, x_scale, w_q, w_scale, bias = operands((6,), 24, 70)
    assert_same_bits(
        linear(x_q[0], x_scale[0], w_q, w_scale, bias, torch.float32),
        linear_reference(x_q[0], x_scale[0], w_q, w_scale, bias, torch.float32),
    )
    strided = x_q.T.contiguous().T, x_scale.expand(6, 2)[:, :1], w_q.T.contiguous().T, w_scale, bias, torch.float32
    assert_same_bits(linear(*strided), linear_reference(*strided))


def test_pack_weight_layout():
    w_q = operands((1,), 10, 70)[2]
    packed = torch.ops.zq_cpu.pack_weight(w_q)
    padded = torch.zeros(-(-70 // BLOCK) * BLOCK, -(-10 // GROUP) * GROUP, dtype=torch.int8)
    padded[:70, :10] = w_q
    assert torch.equal(packed, padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, GROUP)).transpose(1, 2))


@pytest.mark.parametrize("x, w", [(127, 127), (-128, 127), (127, -127), (-128, -128)])
@pytest.mark.parametrize("k", [1, 2, 3, 4096, 4097])
def test_no_sum_of_a_few_products_saturates(x, w, k):
    """All products alike and at their largest: two of 255 * 127 are beyond int16."""
    x_q, w_q = torch.full((13, k), x, dtype=torch.int8), torch.full((17, k), w, dtype=torch.int8)
    x_q[5], w_q[3] = -x_q[5].clamp(min=-127), -w_q[3].clamp(min=-127)
    args = x_q, torch.ones(13, 1), w_q, torch.ones(17, 1), None, torch.float32
    assert_same_bits(linear(*args), linear_reference(*args))


@pytest.mark.parametrize("m", range(1, 14))
@pytest.mark.parametrize("k, n", [(1, 1), (3, 15), (31, 16), (66, 17), (257, 129)])
def test_linear_every_tile_height(m, k, n):
    """Ragged groups of K and blocks of N under tiles of each height."""
    for out_dtype in DTYPES:
        args = operands((m,), k, n, seed=m)
        assert_same_bits(linear(*args, out_dtype), linear_reference(*args, out_dtype))


@pytest.mark.parametrize("m", [16, 17, 31, 32, 33, 48, 49, 65])
@pytest.mark.parametrize("k, n", [(1, 1), (63, 31), (64, 32), (65, 33), (128, 64), (200, 97), (320, 130)])
def test_linear_every_strip_height(m, k, n):
    """Ragged strips of 32 rows and tiles of 64 values, for AMX."""
    for out_dtype in (*DTYPES, torch.int8):
        args = operands((m,), k, n, seed=m)
        expected = linear_reference(*args, torch.float32)
        if out_dtype == torch.int8:
            expected = expected.round().clamp(-128, 127)
        assert_same_bits(linear(*args, out_dtype), expected.to(out_dtype))


def test_linear_reads_nothing_beyond_the_end():
    for m, k, n in ((1, 1, 1), (7, 37, 33), (2, 64, 65), (33, 64, 65), (40, 70, 33), (32, 192, 64)):
        x_q, x_scale, w_q, w_scale, bias = operands((m,), k, n)
        packed, colsum = torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)
        args = x_q, x_scale, packed, w_scale, colsum, bias
        expected = linear_reference(x_q, x_scale, w_q, w_scale, bias, torch.float16)
        assert_same_bits(torch.ops.zq_cpu.int8_linear(*map(before_a_wall, args), torch.float16), expected)


needs_amx = pytest.mark.skipif(build.isa() != "amx_int8", reason="there is no AMX")


@needs_amx
@pytest.mark.parametrize("threads", [1, 2])
def test_others_who_use_tiles_find_them_as_they_left_them(threads):
    """oneDNN's and Inductor's products use AMX too."""
    args = operands((70,), 128, 64)
    x, w = args[0], args[2].T.contiguous()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (70, 24, 70):
            expected = x[:rows].int() @ w.int()
            assert torch.equal(torch._int_mm(x[:rows], w), expected)
            assert_same_bits(linear(*args, torch.float32), linear_reference(*args, torch.float32))
            assert torch.equal(torch._int_mm(x[:rows], w), expected)
            halves = x[:rows, :8].bfloat16() @ w[:8].bfloat16()  # of sums that float32 holds
            assert torch.equal(halves, (x[:rows, :8].int() @ w[:8].int()).bfloat16())
    finally:
        torch.set_num_threads(before)


REFUSED = """
import ctypes
libc = ctypes.CDLL(None)
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(8192)  # for signals: too small to save tiles to
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 8192)), None) == 0
import torch
from zq_compiler.kernels.cpu import build
build.load()
assert libc.syscall(158, 0x1023, 18) == -1
x, w = torch.randint(-128, 128, (70, 130), dtype=torch.int8), torch.randint(-127, 128, (64, 130), dtype=torch.int8)
packed, colsum = torch.ops.zq_cpu.pack_weight(w), w.sum(1, dtype=torch.int32)
y = torch.ops.zq_cpu.int8_linear(x, None, packed, torch.ones(64, 1), colsum, None, torch.float32)
print(torch.equal(y.int(), x.int() @ w.int().T))
"""


@needs_amx
def test_where_linux_refuses_tiles_vectors_multiply():
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=Path(__file__).parents[3], text=True, capture_output=True
    )
    assert done.stdout == "True\n", done.stderr


LINEAR_ERRORS = {
    "x_q must be Char": dict(x_q=torch.zeros(2, 8)),
    "x_scale must be Float": dict(x_scale=torch.ones(2, 1, dtype=torch.float64)),
    r"x_scale must be \[2, 1\]": dict(x_scale=torch.ones(2)),
    "w_packed must be Char": dict(w_packed=torch.zeros(1, 8 // GROUP, BLOCK, GROUP)),
    rf"w_packed must be \[1, {8 // GROUP}, {BLOCK}, {GROUP}\] .*from pack_weight": dict(
        w_packed=torch.zeros(3, 8, dtype=torch.int8)
    ),
    "w_scale must be Float": dict(w_scale=torch.ones(3, 1, dtype=torch.float16)),
    r"w_scale must be \[N, 1\]": dict(w_scale=torch.ones(3)),
    "w_colsum must be Int": dict(w_colsum=torch.zeros(3, dtype=torch.int64)),
    r"w_colsum must be \[3\]": dict(w_colsum=torch.zeros(4, dtype=torch.int32)),
    r"bias must be \[3\]": dict(bias=torch.zeros(1)),
    "bias must be a float dtype": dict(bias=torch.zeros(3, dtype=torch.int32)),
    "out_dtype must be": dict(out_dtype=torch.int32),
    "K must be at least 1": dict(x_q=torch.zeros(2, 0, dtype=torch.int8)),
}


@pytest.mark.parametrize("message", LINEAR_ERRORS)
def test_linear_errors_name_the_argument(message):
    x_q, x_scale, w_q, w_scale, bias = operands((2,), 8, 3)
    good = dict(
        x_q=x_q,
        x_scale=x_scale,
        w_packed=torch.ops.zq_cpu.pack_weight(w_q),
        w_scale=w_scale,
        w_colsum=w_q.sum(1, dtype=torch.int32),
        bias=bias,
        out_dtype=torch.float32,
    )
    torch.ops.zq_cpu.int8_linear(**good)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zq_cpu.int8_linear(**good | LINEAR_ERRORS[message])


def test_pack_and_quantize_errors():
    with pytest.raises(RuntimeError, match="w_q must be int8"):
        torch.ops.zq_cpu.pack_weight(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"w_q must be \[N, K\]"):
        torch.ops.zq_cpu.pack_weight(torch.zeros(2, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="w_q must not be empty"):
        torch.ops.zq_cpu.pack_weight(torch.zeros(2, 0, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="x must be Float, BFloat16 or Half"):
        torch.ops.zq_cpu.quantize_per_token(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="K at least 1"):
        torch.ops.zq_cpu.quantize_per_token(torch.zeros(2, 0))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 100),
    st.sampled_from(DTYPES),
    st.floats(-40, 38),
    st.integers(0, 2**31),
)
def test_quantize_any_shape(rows, k, dtype, exponent, seed):
    x = torch.randn(*rows, k, generator=torch.Generator().manual_seed(seed))
    assert_quantizes((x * 10**exponent).to(dtype))


def test_quantize_many_random_values():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(64, 8191, generator=g) * torch.rand(64, 1, generator=g).exp2() ** 9
        assert_quantizes(x)


def test_quantize_next_to_ties():
    """For many ranges a and every tie (i + 1/2) a / 127, the floats within 24 steps of it."""
    g = torch.Generator().manual_seed(0)
    a = torch.cat([torch.rand(300, generator=g) + 0.5, 10 ** (torch.rand(300, generator=g) * 49 - 12), torch.ones(1)])
    a = torch.cat([a, torch.tensor([1e-12, 127.0, torch.finfo(torch.float32).max])])[:, None]
    ties = (a.double() * (torch.arange(-127, 127) + 0.5) / 127).float()
    steps = torch.arange(-24, 25, dtype=torch.int32)
    near = (ties.view(torch.int32)[..., None] + steps).view(torch.float32).flatten(1)
    assert_quantizes(torch.cat([near, a], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_every_half_value(dtype):
    """Every finite value of the dtype, in rows of which each begins with the largest magnitude of another scale."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for a in (values.max().item(), 1000.0, 127.0, 1.0, 0.37, 3e-5):
        a = torch.tensor(a, dtype=dtype)
        assert_quantizes(torch.cat([a[None], values[values.abs() <= a]]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.sampled_from(DTYPES), st.floats(-30, 37), st.integers(0, 2**31))
def test_quantize_rotated(rows, blocks, dtype, exponent, seed):
    x = torch.randn(rows, 16 * blocks, generator=torch.Generator().manual_seed(seed))
    x = (x * 10**exponent).to(dtype)
    q, scale = torch.ops.zq_cpu.quantize_per_token(x, True)
    q_ref, scale_ref = quantize_reference(rotate(x))
    assert torch.equal(q, q_ref)
    assert_same_bits(scale, scale_ref)


def test_quantize_rotated_needs_whole_blocks():
    with pytest.raises(RuntimeError, match="multiple of 16 features, got 24"):
        torch.ops.zq_cpu.quantize_per_token(torch.zeros(2, 24), True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 16, 36])
def test_quantize_poisoned_row(bad, dtype, place):
    x = torch.randn(3, 37).to(dtype)
    x[1, place] = bad
    q, scale = torch.ops.zq_cpu.quantize_per_token(x)
    assert scale[1].isnan().all() and not q[1].any()
    assert_quantizes(x)


def test_quantize_zeros_and_strides():
    assert_quantizes(torch.zeros(2, 33))
    assert_quantizes(torch.randn(40, 3).T)
    q, scale = torch.ops.zq_cpu.quantize_per_token(torch.zeros(0, 33))
    assert q.shape == (0, 33) and scale.shape == (0, 1)


def test_fakes_match_the_kernels():
    x_q, x_scale, w_q, w_scale, bias = operands((2, 3), 10, 70)
    ops, utils = torch.ops.zq_cpu, ("test_schema", "test_faketensor")
    args = x_q, x_scale, ops.pack_weight(w_q), w_scale, w_q.sum(1, dtype=torch.int32), bias, torch.bfloat16
    torch.library.opcheck(ops.pack_weight.default, (w_q,), test_utils=utils)
    torch.library.opcheck(ops.int8_linear.default, args, test_utils=utils)
    torch.library.opcheck(ops.quantize_per_token.default, (torch.randn(2, 3, 10),), test_utils=utils)


def test_compiles_with_dynamic_shapes():
    _, _, w_q, w_scale, bias = operands((1,), 48, 70)
    packed, colsum = torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)

    def layer(x: Tensor) -> Tensor:
        q, scale = torch.ops.zq_cpu.quantize_per_token(torch.relu(x))
        return torch.ops.zq_cpu.int8_linear(q, scale, packed, w_scale, colsum, bias, x.dtype) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for rows in (5, 12, 31):
            x = torch.randn(2, rows, 48)
            assert torch.equal(compiled(x), layer(x))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 140), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_integers_out_and_no_row_scale(m, k, n, row_scales, with_bias, seed):
    """GeMM^quant: the same product, rounded half to even and saturated; feature-wise inputs have no row scale."""
    x_q, x_scale, w_q, w_scale, bias = operands((m,), k, n, seed)
    scale, offset = (x_scale if row_scales else None), (bias if with_bias else None)
    floats = linear_reference(
        x_q, torch.ones_like(x_scale) if scale is None else scale, w_q, w_scale, offset, STEP.dtype
    )
    assert_same_bits(linear(x_q, scale, w_q, w_scale, offset, torch.float32), floats)
    rounded = linear(x_q, scale, w_q, w_scale, offset, torch.int8)
    assert rounded.dtype is torch.int8
    assert torch.equal(rounded.double(), floats.double().round().clamp(-128, 127))


def test_integers_out_of_nan_and_huge_sums():
    x_q = torch.full((3, 8), 100, dtype=torch.int8)
    w_q = torch.tensor([[100] * 8, [-100] * 8], dtype=torch.int8)
    x_scale = torch.tensor([[1e30], [torch.nan], [0.0]])
    got = linear(x_q, x_scale, w_q, torch.ones(2, 1), None, torch.int8)
    assert got.tolist() == [[127, -128], [0, 0], [0, 0]]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(1, 70),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "tanh"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_gelu_in_the_epilogue(m, k, n, dtype, approximate, one_scale, seed):
    """The reference's integers, but for a step where two forms of GELU fall on two sides of a tie."""
    x_q, x_scale, w_q, w_scale, bias = operands((m,), k, n, seed)
    args = x_q, x_scale / 8, w_q, w_scale / 8, bias / 64
    out_scale = torch.rand(1, 1 if one_scale else n, generator=torch.Generator().manual_seed(seed)) / 20 + 0.01
    reference = int8_linear_gelu_quantize(*args, dtype, approximate, out_scale)
    packed, colsum = torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)
    kernel = torch.ops.zq_cpu.int8_linear_gelu_quantize
    got = kernel(*args[:2], packed, args[3], colsum, args[4], dtype, approximate, out_scale)
    difference = (got.int() - reference.int()).abs()
    assert got.dtype is torch.int8 and got.shape == (m, n)
    assert difference.numel() == 0 or (difference.max() <= 1 and difference.sum() <= 1 + 1e-3 * difference.numel())


def test_gelu_in_the_epilogue_errors():
    x_q, x_scale, w_q, w_scale, bias = operands((2,), 8, 3)
    good = x_q, x_scale, torch.ops.zq_cpu.pack_weight(w_q), w_scale, w_q.sum(1, dtype=torch.int32), bias
    kernel = torch.ops.zq_cpu.int8_linear_gelu_quantize
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel.default, (*good, torch.float32, "none", torch.ones(3)), test_utils=utils)
    for rest, message in (
        ((torch.int8, "none", torch.ones(3)), "int8_linear_gelu_quantize: dtype must be"),
        ((torch.float32, "exact", torch.ones(3)), "approximate must be none or tanh, got exact"),
        ((torch.float32, "none", torch.ones(2)), "out_scale must have 3 elements"),
        ((torch.float32, "none", torch.ones(3).double()), "out_scale must be Float"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(*good, *rest)
