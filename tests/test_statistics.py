"""Statistics against numpy, to the bit where they promise it, and scales that are never NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.programs import randn
from zq_compiler import CalibrationError, RecipeError
from zq_compiler.numerics import quantize_static
from zq_compiler.recipe import RANGE_METHODS
from zq_compiler.statistics import METHODS, ValueStatistics


def seen(*tensors: torch.Tensor, name: str = "layer:input", **layout) -> ValueStatistics:
    value = ValueStatistics(name, **layout)
    for batch, x in enumerate(tensors):
        value.observe(x, batch)
    return value


def content(value: ValueStatistics) -> list:
    """Everything that it holds, as bytes, so that -0.0 is not 0.0."""
    tensors = [value.minimum, value.maximum]
    for histogram in value.histograms().values():
        tensors += [histogram.exponents, histogram.counts]
    return [value.elements, value.layout, [(t.dtype, list(t.shape), t.numpy().tobytes()) for t in tensors]]


# --- what is seen --------------------------------------------------------------------------------------------------


def test_ranges_of_features_are_numpys():
    batches = [randn(4, 7, 5, seed=i) * 10.0**i for i in range(3)]
    value, x = seen(*batches), torch.cat(batches).reshape(-1, 5).numpy()
    assert (value.features, value.rows, value.elements) == (5, 84, 420)
    np.testing.assert_array_equal(value.minimum, x.min(0))
    np.testing.assert_array_equal(value.maximum, x.max(0))
    np.testing.assert_array_equal(value.max_abs, np.abs(x).max(0))
    assert value.minimum.dtype is value.maximum.dtype is torch.float32
    assert value.histogram.counts.sum() == 420


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_features_lie_where_it_is_said(dim):
    x = randn(2, 3, 4)
    others = tuple(d for d in range(3) if d != dim % 3)
    np.testing.assert_array_equal(seen(x, dim=dim).max_abs, np.abs(x.numpy()).max(others))
    there, last = seen(x, dim=dim, feature_bins=16), seen(x.movedim(dim, -1), feature_bins=16)
    assert content(there)[2] == content(last)[2]


def test_without_features_every_size_may_change():
    value = seen(randn(2, 3, 4), randn(5, 1, 9), torch.tensor(7.0), dim=None)
    assert (value.features, value.rows, value.elements) == (1, 70, 70)
    assert value.scale() == 7.0 / 127
    with pytest.raises(CalibrationError, match=r"layer:input: was collected without features.*one scale per tensor"):
        value.scale(granularity="per_feature")


def test_strides_and_empty_tensors_do_not_matter():
    x = randn(6, 4)
    assert content(seen(x.t().contiguous().t(), x[:0])) == content(seen(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_in_float32(dtype):
    x = randn(6, 4).to(dtype)
    assert content(seen(x, feature_bins=16)) == content(seen(x.float(), feature_bins=16))


def test_memory_is_what_is_documented():
    value = seen(randn(5, 3), feature_bins=256)
    assert value.histogram.counts.nbytes == 32 * 1024
    assert value.feature_histogram.counts.nbytes == 3 * 16 * 256
    before = [h.counts.nbytes for h in value.histograms().values()]
    for i in range(20):
        value.observe(randn(50, 3, seed=i) * 4.0**i)
    assert [h.counts.nbytes for h in value.histograms().values()] == before


@pytest.mark.parametrize(("poison", "kind"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf"), (1e300, "Inf")])
def test_values_that_are_not_finite_name_the_value_and_the_batch(poison, kind):
    value = seen(randn(3, 4), feature_bins=16)
    before = content(value)
    x = randn(3, 4).double()
    x[1, 2] = poison
    with pytest.raises(
        CalibrationError, match=rf"^layer:input: holds {kind} \(batch 41\)\. To mend it: leave that batch"
    ):
        value.observe(x, 41)
    assert content(value) == before


def test_what_is_no_float_or_has_other_features_is_refused():
    value = seen(randn(3, 4))
    before = content(value)
    with pytest.raises(CalibrationError, match=r"layer:input: is int64, and only floats have ranges \(batch 1\)"):
        value.observe(torch.ones(3, 4, dtype=torch.int64), 1)
    with pytest.raises(CalibrationError, match=r"layer:input: has 5 features, and had 4 before \(batch 2\)"):
        value.observe(randn(3, 5), 2)
    assert content(value) == before


# --- merging -------------------------------------------------------------------------------------------------------

elements = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 2.0**-70, 1.0, -(2.0**40)])
)
rows = st.lists(st.tuples(elements, elements), min_size=1, max_size=5)


@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 6), st.randoms())
@settings(max_examples=200, deadline=None)
def test_two_halves_merged_are_the_whole_bit_for_bit(parts, cut, random):
    batches = [torch.tensor(part, dtype=torch.float32) for part in parts]
    whole = seen(torch.cat(batches), feature_bins=8)
    random.shuffle(batches)
    first, second = seen(*batches[:cut], feature_bins=8), seen(*batches[cut:], feature_bins=8)
    untouched = content(second)
    first.merge(second)
    assert content(first) == content(whole)
    assert content(second) == untouched


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (seen(randn(2, 5)), "has 4 features here and 5 there"),
        (seen(randn(2, 4), dim=0), "collected with .*'dim': -1.* here and .*'dim': 0.* there"),
        (seen(randn(2, 4), bins=64), "'bins': 2048.*'bins': 64"),
        (seen(randn(2, 4), feature_bins=64), "'feature_bins': None.*'feature_bins': 64"),
    ],
)
def test_only_like_is_merged(other, what):
    value = seen(randn(2, 4))
    before = content(value)
    with pytest.raises(CalibrationError, match=f"layer:input: .*{what}"):
        value.merge(other)
    assert content(value) == before


# --- scales --------------------------------------------------------------------------------------------------------


def test_the_methods_are_those_that_recipes_know():
    assert tuple(METHODS) == RANGE_METHODS


@pytest.mark.parametrize(("unsigned", "bits", "levels"), [(False, 8, 127), (True, 8, 255), (False, 4, 7), (True, 2, 3)])
def test_largest_magnitudes_over_the_largest_integer(unsigned, bits, levels):
    x = randn(100, 6)
    x[:, 3] -= 100
    value, top = seen(x), (x.numpy().max(0) if unsigned else np.abs(x.numpy()).max(0))
    per_tensor = value.scale(unsigned=unsigned, bits=bits)
    assert per_tensor.shape == (1,) and per_tensor.dtype is torch.float32
    assert per_tensor.item() == top.max() / np.float32(levels)
    per_feature = value.scale("max_abs", "per_feature", unsigned=unsigned, bits=bits)
    alive = top > 0
    assert per_feature.shape == (6,) and alive.sum() == (5 if unsigned else 6)
    np.testing.assert_array_equal(per_feature.numpy()[alive], top[alive] / np.float32(levels))


def test_methods_per_tensor_and_per_feature_agree_where_there_is_one_feature():
    value = seen(randn(5000, 1), bins=512, feature_bins=512)
    found = {m: value.scale(m) for m in METHODS}
    assert max(found.values()) == found["max_abs"] > min(found.values())
    for method, scale in found.items():
        assert torch.equal(value.scale(method, "per_feature"), scale)


def test_percentiles_are_a_parameter():
    x = torch.linspace(0, 1, 10_001)[:, None]
    value = seen(x)
    for percent in (50.0, 90.0, 99.9):
        # A bin is 2/2048 wide: the range is 2, the least power of two above 1.
        assert percent / 100 <= value.scale("percentile", percentile=percent) * 127 <= percent / 100 + 2 / 2048 + 1e-6
    assert value.scale("percentile", percentile=100) == value.scale()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_dead_features_have_a_floor(method, unsigned):
    x = randn(400, 5).abs()
    x[:, 1] = 0.0  # never other than zero
    x[:, 2] *= 1e-9  # nearly so: the tail of a GELU
    x[:, 4] *= 1e6  # an outlier, which must not coarsen the others
    value = seen(x, feature_bins=512)
    scale = value.scale(method, "per_feature", unsigned=unsigned)
    assert scale.isfinite().all() and (scale > 0).all()
    levels = 255 if unsigned else 127
    median = scale[[0, 2, 3, 4]].clone()
    median[1] = 0
    floor = 0.01 * median.sort().values[1]
    assert scale[1] == scale[2] == pytest.approx(floor.item())
    assert scale[0] * levels > 1 and scale[3] * levels > 1
    assert not quantize_static(x, scale, unsigned)[:, 1].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_feature"])
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_value_that_is_zero_throughout_has_a_scale(method, granularity, unsigned):
    """And so has one that is negative throughout, unsigned."""
    for x in (torch.zeros(8, 3), torch.full((8, 3), -1e-20), -torch.ones(8, 3) if unsigned else torch.zeros(8, 3)):
        scale = seen(x, feature_bins=512).scale(method, granularity, unsigned=unsigned)
        assert scale.isfinite().all() and torch.equal(scale, torch.full_like(scale, 1e-12) / (255 if unsigned else 127))
        assert torch.equal(torch.zeros(3) / scale, torch.zeros(3))


@given(rows, st.sampled_from(RANGE_METHODS), st.booleans(), st.sampled_from(["per_tensor", "per_feature"]))
@settings(max_examples=200, deadline=None)
def test_no_scale_is_ever_nan_zero_or_beyond_the_range(x, method, unsigned, granularity):
    x = torch.tensor(x, dtype=torch.float32)
    value = seen(x, bins=512, feature_bins=512)
    scale = value.scale(method, granularity, unsigned=unsigned)
    assert scale.isfinite().all() and (scale > 0).all()
    assert (scale <= value.scale("max_abs", granularity, unsigned=unsigned)).all()


def test_what_was_never_seen_is_an_error_that_names_it():
    with pytest.raises(
        CalibrationError, match=r"^encoder\.0:output: was never seen in calibration\. To mend it: calibr"
    ):
        seen(torch.empty(0, 4), name="encoder.0:output").scale()


def test_choices_that_need_more_detail():
    value = seen(randn(9, 4))
    with pytest.raises(
        CalibrationError, match=r"layer:input: has no histogram for each feature, which mse needs.*=256"
    ):
        value.scale("mse", "per_feature")
    small = seen(randn(9, 4), feature_bins=256)
    small.scale("entropy", "per_feature")
    with pytest.raises(CalibrationError, match=r"has 256 bins, and entropy needs 512.*collect with 512"):
        small.scale("entropy", "per_feature", unsigned=True)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"method": "minmax"}, "unknown range method 'minmax'.*max_abs, percentile, mse, entropy"),
        ({"granularity": "per_token"}, "per_token scales do not come from statistics"),
        ({"bits": 16}, "16-bit integers are not supported"),
        ({"method": "percentile", "percentile": 0.0}, r"no percentile 0\.0"),
        ({"method": "percentile", "percentile": 100.1}, r"no percentile 100\.1"),
        ({"method": "percentile", "percentile": math.nan}, "no percentile nan"),
    ],
)
def test_bad_choices(arguments, what):
    with pytest.raises(RecipeError, match=what):
        seen(randn(2, 4)).scale(**arguments)
