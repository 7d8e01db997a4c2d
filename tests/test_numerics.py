"""Quantization against formulas written out in numpy, step by step in float32, and against float64 bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tolerances import HALF_STEP, ULPS
from zq_compiler import numerics
from zq_compiler.formats import FORMATS, packed_size
from zq_compiler.numerics import quantize_per_channel, quantize_per_token, sqnr

FLOOR = np.float32(1e-12)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def token_wise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ZeroQuant's TWQ in float32 steps; numpy rounds half to even."""
    assert x.dtype == np.float32
    step = np.float32(1.0) / np.float32(127.0)
    a = np.maximum(np.abs(x).max(-1, keepdims=True), FLOOR)
    return np.rint((x / a) / step).astype(np.int8), a * step


def rows(elements=finite32):
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 9))
    return shapes.flatmap(
        lambda s: st.lists(elements, min_size=s[0] * s[1], max_size=s[0] * s[1]).map(
            lambda values: np.array(values, np.float32).reshape(s)
        )
    )


@given(rows())
@settings(max_examples=200, deadline=None)
def test_token_wise_equals_the_formula_bit_for_bit(x):
    q, scale = quantize_per_token(torch.from_numpy(x))
    want_q, want_scale = token_wise(x)
    assert q.dtype is torch.int8 and scale.dtype is torch.float32
    np.testing.assert_array_equal(q.numpy(), want_q)
    np.testing.assert_array_equal(scale.numpy(), want_scale)


@given(rows(st.floats(-(2.0**99), 2.0**99, width=32)))
@settings(max_examples=200, deadline=None)
def test_range_and_error_of_both_schemes(x):
    for q, scale in (quantize_per_token(torch.from_numpy(x)), quantize_per_channel(torch.from_numpy(x))):
        q, scale = q.double(), scale.double()
        assert q.abs().max() <= 127
        error = (torch.from_numpy(x).double() - q * scale).abs()
        assert (error <= HALF_STEP * scale).all()
        largest = torch.from_numpy(np.abs(x).max(-1))
        ordinary = largest > 1e-12
        assert (q.abs().amax(-1)[ordinary] == 127).all()  # the whole range is used
        assert ((scale[:, 0] * 127 - largest.double()).abs()[ordinary] <= ULPS * largest[ordinary]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_quantized_from_its_exact_values(dtype):
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, scale = quantize_per_token(x)
    want_q, want_scale = token_wise(x.float().numpy())
    np.testing.assert_array_equal(q.numpy(), want_q)
    np.testing.assert_array_equal(scale.numpy(), want_scale)


def test_ties_go_to_even():
    # with a row maximum of 127 the steps are ones: x / 127 / (1/127) is x where both divisions are exact enough
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]])
    steps = (x / 127.0 / numerics.INT8_STEP).tolist()[0]
    ties = [i for i, s in enumerate(steps) if abs(s) % 1 == 0.5]
    assert len(ties) >= 4, "the data holds no ties"
    q = quantize_per_token(x)[0].tolist()[0]
    assert all(q[i] == 2 * round(steps[i] / 2) for i in ties)
    # weights divide by s = 1 exactly, so every one of these is a tie
    assert quantize_per_channel(x)[0].tolist() == [[127, 0, 2, 2, 4, 0, -2, -2]]


def test_zero_rows_and_rows_below_the_floor():
    q, scale = quantize_per_token(torch.tensor([[0.0, -0.0], [1e-13, -5e-13], [1.4e-45, 0.0]]))
    assert q.tolist() == [[0, 0], [13, -64], [0, 0]]  # 1e-13 / 1e-12 of 127 steps
    assert scale.isfinite().all() and (scale > 0).all()
    q, scale = quantize_per_channel(torch.zeros(3, 5))
    assert q.count_nonzero() == 0 and scale.isfinite().all()


def test_one_huge_outlier_costs_its_own_row_only():
    x = torch.ones(2, 8)
    x[0, 3] = 3e38
    q, scale = quantize_per_token(x)
    assert q[0].tolist() == [0, 0, 0, 127, 0, 0, 0, 0]
    assert q[1].tolist() == [127] * 8
    assert math.isclose(scale[0, 0].item(), 3e38 / 127, rel_tol=ULPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_has_a_nan_scale_and_zeros(poison, dtype):
    x = torch.ones(3, 4, dtype=dtype)
    x[1, 2] = poison
    q, scale = quantize_per_token(x)
    assert scale[:, 0].isnan().tolist() == [False, True, False]
    assert q[1].tolist() == [0] * 4
    assert q[0].tolist() == q[2].tolist() == [127] * 4
    assert numerics.dequantize(q, scale)[1].isnan().all()


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (1, 1)])
def test_weights_have_one_scale_an_output_channel(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_per_channel(w)
    s = np.abs(w.numpy()).max(-1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(scale.numpy(), s)
    np.testing.assert_array_equal(q.numpy(), np.rint(w.numpy() / s))


def test_dequantize_multiplies_in_float32_and_rounds_once():
    q, scale = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([[0.1]])
    want = np.array([[127, -3]], np.float32) * np.float32(0.1)
    assert torch.equal(numerics.dequantize(q, scale), torch.from_numpy(want))
    assert torch.equal(numerics.dequantize(q, scale, torch.bfloat16), torch.from_numpy(want).bfloat16())


def test_empty_batches():
    q, scale = quantize_per_token(torch.empty(0, 4))
    assert q.shape == (0, 4) and scale.shape == (0, 1)


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert math.isclose(sqnr(x, x + torch.tensor([0.3, 0.4])), 20.0, rel_tol=1e-6)
    assert sqnr(x, x) == math.inf
    assert sqnr(torch.zeros(2), x) == -math.inf
    assert math.isnan(sqnr(x, torch.tensor([3.0, math.nan])))
    assert math.isnan(sqnr(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0])))
    assert math.isclose(sqnr(torch.full((1000,), 1e30), torch.full((1000,), 1.1e30)), 20.0, rel_tol=1e-5)


# --- rotation ------------------------------------------------------------------------------------------------------


def hadamard(n: int) -> np.ndarray:
    """Sylvester's construction, orthonormal."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(n)


@pytest.mark.parametrize("shape", [(16,), (3, 48), (2, 0, 32), (2, 3, 16)])
def test_rotation_is_a_blockwise_hadamard_product(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    blocks = x.double().numpy().reshape(*shape[:-1], shape[-1] // 16, 16) @ hadamard(16)
    rotated = numerics.rotate(x)
    assert rotated.dtype is torch.float32
    np.testing.assert_allclose(rotated.numpy(), blocks.reshape(shape), atol=1e-6)
    np.testing.assert_allclose(numerics.rotate(rotated).numpy(), x.numpy(), atol=1e-6)  # its own inverse


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_schemes_quantize_the_rotated_values(dtype):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for quantize in (quantize_per_token, quantize_per_channel):
        q, scale = quantize(x, True)
        for got, want in zip((q, scale), quantize(numerics.rotate(x)), strict=True):
            assert torch.equal(got, want)
        back = numerics.dequantize(q, scale, rotated=True)
        # a rotation keeps lengths, so the row's error is at most half a step in each of its 32 directions
        error = (back - x.float()).double().norm(dim=-1, keepdim=True)
        assert (error <= HALF_STEP * scale.double() * math.sqrt(32)).all()


def test_rotation_leaves_products_alone_and_tames_an_outlier():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 64, generator=generator), torch.randn(8, 64, generator=generator)
    torch.testing.assert_close(numerics.rotate(x) @ numerics.rotate(w).t(), x @ w.t(), atol=1e-4, rtol=0)
    x[:, 7] = 100.0
    assert sqnr(x, numerics.dequantize(*quantize_per_token(x, True), rotated=True)) > 6 + sqnr(
        x, numerics.dequantize(*quantize_per_token(x))
    )


def test_a_poisoned_row_stays_poisoned_when_rotated():
    x = torch.ones(3, 32)
    x[1, 2], x[2, 5] = math.nan, math.inf
    q, scale = quantize_per_token(x, True)
    assert scale[:, 0].isnan().tolist() == [False, True, True]
    assert q[1:].count_nonzero() == 0


def test_a_rotation_never_mixes_rows():
    x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([numerics.rotate(row) for row in x.reshape(-1, 48)]).reshape(x.shape)
    assert torch.equal(numerics.rotate(x), alone) and numerics.rotate(x).is_contiguous()
    assert numerics.rotate(x[:0]).shape == (0, 5, 48)
    with pytest.raises(RuntimeError):  # 16 rows of 24 are as many numbers as whole blocks have
        numerics.rotate(torch.randn(16, 24))


# --- weights in a few bits --------------------------------------------------------------------------------------


def float64_weight(w, fmt, group):
    """Values of a quantized weight by another route: float64, a group at a time, the nearest of all grid values."""
    result = np.zeros(w.shape)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group or w.shape[1]):
            values = w[row, start : start + (group or w.shape[1])].double().numpy()
            low, high = np.float32(min(0, values.min())), np.float32(max(0, values.max()))
            if fmt.asymmetric:  # from the least to the largest, zero among them, in whole steps
                grid = np.arange(2**fmt.bits)
                scale = (high - low) / np.float32(grid.max())
            else:
                grid = np.array([v for v in fmt.values if not np.isnan(v)])
                beyond = 0.5 if grid.min() < -grid.max() else 0  # two's complement has one more below zero than above
                scale = max(low / np.float32(grid.min()), high / np.float32(grid.max() + beyond))
            scale = max(scale, np.float32(2e-12 / (grid.max() - grid.min())))
            if group:
                half = np.float16(scale)
                scale = np.nextafter(half, np.float16(np.inf)) if half < scale else half
            if fmt.asymmetric:
                grid = grid + np.clip(np.round(low / np.float32(scale)), -grid.max(), 0)
            nearest = np.abs(values[:, None] / float(scale) - grid[None]).argmin(1)
            result[row, start : start + (group or w.shape[1])] = grid[nearest] * float(scale)
    return result


@pytest.mark.parametrize("group", [0, 32, 48])
@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("binary", "ternary")])
def test_weights_are_the_nearest_values_of_each_groups_grid(name, group):
    w = torch.randn(7, 80, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 7)[:, None]
    packed, scale = numerics.quantize_weight(w, name, group)
    assert packed.shape == (7, packed_size(80, FORMATS[name].bits)) and packed.dtype is torch.uint8
    assert scale.shape == (7, (-(-80 // group) if group else 1) * (2 if FORMATS[name].asymmetric else 1))
    assert scale.dtype is (torch.float16 if group else torch.float32)
    values = numerics.dequantize_weight(packed, scale, name, group, 80).double()
    expected = torch.from_numpy(float64_weight(w, FORMATS[name], group))
    distance, least = (values - w).abs(), (expected - w).abs()  # halfway, float32 may take the other one
    assert (distance <= least + 1e-6 * w.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_no_weight_is_more_than_half_a_step_off_and_the_least_may_be_exact(name):
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    low, high = FORMATS[name].range
    for longer, end, off in ((w < 0, low, 0.0), (w > 0, high, 0.5)):
        skewed = torch.where(longer, 4 * w, w)
        packed, scale = numerics.quantize_weight(skewed, name)
        steps = numerics.dequantize_weight(packed, scale, name, 0, 256) / scale
        error = (steps - skewed / scale).abs()
        assert error.max() <= 0.5 + 1e-5
        largest = skewed.abs().argmax(1, keepdim=True)
        assert torch.allclose(steps.gather(1, largest), torch.full((64, 1), end))
        assert torch.allclose(error.gather(1, largest), torch.full((64, 1), off), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("binary", "ternary")])
def test_one_scale_for_a_whole_weight_is_that_of_one_long_row(name):
    w = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) + 0.5
    packed, scale = numerics.quantize_weight(w, name, numerics.WHOLE)
    row, alone = numerics.quantize_weight(w.reshape(1, -1), name)
    assert scale.is_contiguous() and torch.equal(scale, alone.expand(7, -1)) and scale.dtype is torch.float32
    values = numerics.dequantize_weight(packed, scale, name, 0, 40)
    assert torch.equal(values.reshape(1, -1), numerics.dequantize_weight(row, alone, name, 0, 280))


def test_int8_rows_are_those_of_quantize_per_channel():
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    packed, scale = numerics.quantize_weight(w, "int8")
    q, expected = numerics.quantize_per_channel(w)
    assert torch.equal(packed.view(torch.int8), q) and torch.equal(scale, expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-42])
def test_groups_of_zeros_and_denormals_stay_finite_and_small(name, value):
    w = torch.full((2, 64), value)
    packed, scale = numerics.quantize_weight(w, name, 32)
    assert (numerics.scales_and_zeros(scale, name)[0] > 0).all() and scale.isfinite().all()
    values = numerics.dequantize_weight(packed, scale, name, 32, 64)
    assert values.isfinite().all() and (values.abs() <= 1e-7).all()


def test_a_scale_that_float16_cannot_hold_is_infinite():
    assert numerics.quantize_weight(torch.full((1, 32), 1e6), "int4", 32)[1].isinf().all()
    assert numerics.quantize_weight(torch.full((1, 32), 1e6), "int4")[1].isfinite().all()


def test_binary_and_ternary_are_scaled_by_means():
    w = torch.tensor([[1.0, -3.0, 0.1, 0.1], [0.0, 2.0, 0.0, 0.0]])
    assert numerics.quantize_weight(w, "binary")[1].flatten().tolist() == pytest.approx([4.2 / 4, 0.5])
    packed, scale = numerics.quantize_weight(w, "ternary")
    assert scale.flatten().tolist() == pytest.approx([2.0, 2.0])  # 0.7 of the mean leaves 1 and 3; 2
    assert numerics.dequantize_weight(packed, scale, "ternary", 0, 4).tolist() == [[0, -2, 0, 0], [0, 2, 0, 0]]
    ragged = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    assert numerics.quantize_weight(ragged, "binary", 3)[1].tolist() == [[1.0, 2.0]]


def test_fp8_activations_are_torchs_cast_of_the_normalised_row():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)) * 10
    x[1] = 0
    q, scale = numerics.quantize_per_token_fp8(x)
    amax = x.abs().amax(-1, keepdim=True)
    assert torch.equal(scale, amax.clamp(min=1e-12) * numerics.FP8_STEP)
    assert torch.equal(q.float(), (x / amax.clamp(min=1e-12) / numerics.FP8_STEP).clamp(-448, 448).to(q.dtype).float())
    assert q.float().abs().amax(-1).tolist() == [448, 0, 448, 448, 448, 448]
    x[0, 3], x[2, 1] = torch.nan, torch.inf
    q, scale = numerics.quantize_per_token_fp8(x)
    assert scale[[0, 2]].isnan().all() and (q[[0, 2]].float() == 0).all() and scale[3:].isfinite().all()


@pytest.mark.parametrize("rotated", [False, True])
def test_int4_activations_are_half_a_step_off_at_most(rotated):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)) * 10
    x[1] = 0
    q, scale = numerics.quantize_per_token_int4(x, rotated)
    values = numerics.rotate(x) if rotated else x
    assert q.dtype is torch.int8 and q.abs().amax(-1).tolist() == [7, 0, 7, 7, 7, 7]
    assert torch.equal(scale, numerics.row_range(values) * numerics.INT4_STEP)
    assert ((q * scale - values).abs() <= scale * 0.50001).all()
    x[0, 3], x[2, 1] = torch.nan, torch.inf
    q, scale = numerics.quantize_per_token_int4(x, rotated)
    assert scale[[0, 2]].isnan().all() and (q[[0, 2]] == 0).all() and scale[3:].isfinite().all()


@pytest.mark.parametrize("group", [0, 16])
def test_a_rotated_weight_is_the_rotation_s_and_is_rotated_back(group):
    w = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    packed, scale = numerics.quantize_weight(w, "int4", group, rotated=True)
    for found, expected in zip(
        (packed, scale), numerics.quantize_weight(numerics.rotate(w), "int4", group), strict=True
    ):
        assert torch.equal(found, expected)
    values = numerics.dequantize_weight(packed, scale, "int4", group, 48, rotated=True)
    steps = scale.float().repeat_interleave(group or 48, 1)
    assert ((numerics.rotate(values) - numerics.rotate(w)).abs() <= 0.51 * steps).all()


# --- scales under a constraint (ZeroQuant-FP) ------------------------------------------------------------------------


def scales_in_groups() -> torch.Tensor:
    """Of rows from 1e-5 to 10, groups of which differ by up to 2^9, as float16 holds them."""
    wide = torch.rand(64, 9, generator=torch.Generator().manual_seed(4)).mul(-9).exp2()
    return (wide * torch.logspace(-5, 1, 64)[:, None]).half().float().clamp(min=2.0**-24)


ROUND = {"ceil": np.ceil, "floor": np.floor, "nearest": np.round}


@pytest.mark.parametrize("rounding", numerics.SCALE_ROUNDINGS)
def test_m1_is_the_power_of_two_next_to_each_scale(rounding):
    scale = scales_in_groups()
    found = numerics.constrained_scales(scale, "pow2", rounding)
    expected = 2.0 ** ROUND[rounding](np.log2(scale.double().numpy()))
    least = expected.max(1, keepdims=True) / 2**8
    assert np.array_equal(found.double().numpy(), np.maximum(expected, least))
    assert torch.equal(found.half().float(), found)


@pytest.mark.parametrize("rounding", numerics.SCALE_ROUNDINGS)
def test_m2_keeps_the_largest_scale_of_a_row(rounding):
    scale = scales_in_groups()
    found = numerics.constrained_scales(scale, "group_pow2", rounding)
    top, shift = scale.amax(1, keepdim=True).double(), ROUND[rounding]
    expected = np.maximum(2.0 ** shift(np.log2((scale / top).numpy())), 2.0**-8)
    kept = found.amax(1, keepdim=True)
    assert np.array_equal((found / kept).double().numpy(), expected)
    assert torch.equal(found.half().float(), found)  # subnormal ones too
    # rounded up by less than the last place, of float16's least, of a scale 2^8 less
    assert ((kept >= top) & (kept - top < 2.0**-16)).all()
    normal = top >= 2.0**-6  # whose scales are all normal numbers
    assert torch.equal(kept[normal], top[normal].float())


@pytest.mark.parametrize("constraint", ["pow2", "group_pow2"])
@pytest.mark.parametrize("name", ["fp4_e2m1", "int4"])
def test_nothing_saturates_under_a_scale_rounded_up(constraint, name):
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(5))
    for rounding, saturates in (("ceil", False), ("floor", True)):
        packed, scale = numerics.quantize_weight(w, name, 32, False, constraint, rounding)
        values = numerics.dequantize_weight(packed, scale, name, 32, 256)
        largest = {"fp4_e2m1": 1.0, "int4": 0.5}[name]  # half of the widest gap between values
        steps = scale.float().repeat_interleave(32, 1)
        assert bool(((values - w).abs() > largest * steps * 1.0001).any()) == saturates


@pytest.mark.parametrize("constraint", ["pow2", "group_pow2"])
def test_under_a_constraint_fp4_is_fp8_by_a_shift_of_the_exponent(constraint):
    """Value times 2^-k is a value of E4M3 for every k that occurs, 0 to 8: M2's point."""
    e4m3 = set(FORMATS["fp8_e4m3"].values)
    exact = {k for k in range(16) if {v * 2.0**-k for v in FORMATS["fp4_e2m1"].values} <= e4m3}
    assert exact == set(range(numerics.MAX_SHIFT + 1))
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(6)) * torch.logspace(0, -5, 256)
    w[3, :32] = 0
    for rounding in numerics.SCALE_ROUNDINGS:
        _, scale = numerics.quantize_weight(w, "fp4_e2m1", 32, False, constraint, rounding)
        mantissa, exponent = torch.frexp(scale.float() / scale.float().amax(1, keepdim=True))
        shifts = {*(1 - exponent).flatten().tolist()}
        assert (mantissa == 0.5).all() and {0, 7, 8} <= shifts <= exact
