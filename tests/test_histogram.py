"""Histograms against numpy's own binning, and ranges against sorting, brute force and the published algorithm."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zq_compiler.histogram import Histogram, entropy_range, mse_range, percentile_range
from zq_compiler.numerics import quantize_static

rng = np.random.default_rng(0)
GAUSSIAN = rng.standard_normal(50_000).astype(np.float32)
LAPLACE = rng.laplace(size=50_000).astype(np.float32) * 1e-3
OUTLIERS = np.concatenate([GAUSSIAN, [300.0, -250.0]]).astype(np.float32)
SPARSE = np.maximum(GAUSSIAN, 0)
DATA = {"gaussian": GAUSSIAN, "laplace": LAPLACE, "outliers": OUTLIERS, "sparse": SPARSE}


def histogram(*columns: np.ndarray, bins: int = 2048) -> Histogram:
    made = Histogram(len(columns), bins)
    add(made, np.stack(columns, -1))
    return made


def add(made: Histogram, rows: np.ndarray) -> None:
    made.add(torch.from_numpy(rows), torch.from_numpy(np.abs(rows).max(0)))


def largest(*columns: np.ndarray, unsigned: bool = False) -> torch.Tensor:
    return torch.tensor([max(c.max(), 0) if unsigned else np.abs(c).max() for c in columns], dtype=torch.float64)


def by_hand(x: np.ndarray, bins: int) -> np.ndarray:
    """Counts in float64, where dividing by a power of two is exact, with the range found by doubling."""
    span = 2.0**-64
    while span <= np.abs(x.astype(np.float64)).max(initial=0.0):
        span *= 2
    k = np.trunc(x.astype(np.float64) * bins / span).astype(np.int64)
    counts = np.zeros(2 * bins, np.int64)
    np.add.at(counts, k + bins, 1)
    return counts


# --- counting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bins", [16, 2048])
def test_counts_are_numpys(name, bins):
    made = histogram(DATA[name], bins=bins)
    np.testing.assert_array_equal(made.counts[0].numpy(), by_hand(DATA[name], bins))


def test_edges_of_bins_and_ranges():
    made = histogram(np.array([1.0, -1.0, 0.99, 0.0, -0.0, 0.5, -0.49], np.float32), bins=4)
    # 1.0 is no longer below a range of 1, so the range is 2 and a bin is 0.5 wide.
    assert made.widths.tolist() == [0.5]
    assert made.counts.tolist() == [[0, 0, 1, 0, 3, 2, 1, 0]]
    assert made.magnitudes(unsigned=False).tolist() == [[3, 2, 2, 0]]
    assert made.magnitudes(unsigned=True).tolist() == [[4, 2, 1, 0]]


values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.integers(-140, 127).map(lambda e: 2.0**e),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.4028234663852886e38, -1e-45]),
)
pieces = st.lists(st.lists(values, min_size=1, max_size=6), min_size=1, max_size=6)


@given(pieces, st.randoms())
@settings(max_examples=200, deadline=None)
def test_any_order_and_any_merge_give_the_counts_of_the_whole(parts, random):
    arrays = [np.array(part, np.float32)[:, None] for part in parts]
    whole = by_hand(np.concatenate(arrays), 16)
    random.shuffle(arrays)
    in_turn = Histogram(1, 16)
    for part in arrays:
        add(in_turn, part)
    np.testing.assert_array_equal(in_turn.counts[0].numpy(), whole)
    each = [histogram(part[:, 0], bins=16) for part in arrays]
    while len(each) > 1:  # merge two at random until one is left
        random.shuffle(each)
        last = each.pop()
        before = last.counts.clone(), last.exponents.clone()
        each[-1].merge(last)
        assert torch.equal(last.counts, before[0]) and torch.equal(last.exponents, before[1])
    assert torch.equal(each[0].counts, in_turn.counts) and torch.equal(each[0].exponents, in_turn.exponents)


def test_groups_are_counted_apart():
    columns = [GAUSSIAN[:1000], LAPLACE[:1000], np.zeros(1000, np.float32), GAUSSIAN[:1000] * 1e30]
    made = histogram(*columns, bins=64)
    for row, column in zip(made.counts, columns, strict=True):
        np.testing.assert_array_equal(row.numpy(), by_hand(column, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_in_float32(dtype):
    x = torch.from_numpy(GAUSSIAN[:1000, None]).to(dtype)
    made, want = Histogram(1, 64), Histogram(1, 64)
    made.add(x, x.abs().amax(0).float())
    want.add(x.float(), x.float().abs().amax(0))
    assert torch.equal(made.counts, want.counts)


# --- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99, 100.0])
def test_percentiles_are_those_of_the_sorted_values_up_to_a_bin(name, percent):
    made, magnitudes = histogram(DATA[name]), np.sort(np.abs(DATA[name]))
    exact = magnitudes[math.ceil(percent / 100 * len(magnitudes)) - 1]
    found = percentile_range(made.magnitudes(False), made.widths, largest(DATA[name]), percent)
    assert exact <= found <= exact + made.widths
    assert percent < 100 or found == np.abs(DATA[name]).max()


def squared_error(x: np.ndarray, threshold: float, levels: int) -> float:
    """Of really quantizing the data."""
    scale = torch.tensor([threshold / levels])
    unsigned = levels == 255
    q = quantize_static(torch.from_numpy(x), scale, unsigned).double()
    return (q * scale.double() - torch.from_numpy(x).double()).square().sum().item()


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("bins", [256, 2048])
def test_least_squared_error_is_that_of_brute_force(name, bins):
    x, levels = DATA[name], 255 if name == "sparse" else 127
    made, top = histogram(x, bins=bins), largest(x)
    found = mse_range(made.magnitudes(levels == 255), made.widths, top, levels).item()
    best = min(squared_error(x, t, levels) for t in np.linspace(0.005, 1, 400) * top.item())
    # The values of a bin are taken as spread over it; of 256 bins, one may be wider than a step and hold all the zeros.
    assert squared_error(x, found, levels) <= best * (1.03 if bins == 2048 else 1.1)
    if name == "laplace":
        assert found < 0.9 * top.item()  # clipping pays


@pytest.mark.parametrize("seed", range(12))
def test_least_squared_error_integrates_each_bin_exactly(seed):
    """Few values in wide bins, against the mean error at two thousand points of each bin."""
    chance = np.random.default_rng(seed)
    counts, top, levels = chance.integers(0, 9, 8), chance.uniform(3.6, 4.0), int(chance.integers(2, 9))
    found = mse_range(torch.from_numpy(counts)[None], torch.tensor([0.5]).double(), torch.tensor([top]), levels).item()
    points = (np.arange(2000) + 0.5) / 4000

    def error(threshold):
        t, step = points + 0.5 * np.arange(8)[:, None], threshold / levels
        return (counts * ((np.minimum(np.rint(t / step), levels) * step - t) ** 2).mean(-1)).sum()

    candidates = [top * 2 ** (-j / 16) for j in range(97)]
    assert error(found) == pytest.approx(min(map(error, candidates)), rel=1e-4)


def divergences_by_hand(counts: np.ndarray, groups: int) -> dict[int, float]:
    """The loop of the slides (S7310), one bin at a time, with what the docstring says that they leave open."""
    bins = [float(c) for c in counts]
    bins[0] = bins[1]
    used = max(i for i, c in enumerate(counts) if c) + 1
    found = {}
    for i in range(groups, used + 1):
        if sum(bins[:i]) < sum(bins[i:]):
            continue
        reference = bins[:i]
        reference[-1] += sum(bins[i:])
        candidate = [0.0] * i
        for level in range(groups):
            members = [k for k in range(i) if k * groups // i == level and bins[k] > 0]
            for k in members:
                candidate[k] = sum(bins[m] for m in members) / len(members)
        candidate[-1] = candidate[-1] or 1e-4
        p, q = np.array(reference) / sum(reference), np.array(candidate) / sum(candidate)
        found[i] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    return found


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("levels", [7, 127])
def test_entropy_is_the_published_loop(name, levels):
    made, top = histogram(DATA[name], bins=256), largest(DATA[name])
    counts = made.magnitudes(False)
    divergences = divergences_by_hand(counts[0].numpy(), levels + 1)
    found = entropy_range(counts, made.widths, top, levels).item()
    bins = round(found / made.widths.item()) if found < top.item() else max(divergences)
    assert divergences[bins] == pytest.approx(min(divergences.values()), rel=1e-9)


def test_entropy_clips_outliers_and_nothing_else():
    made, top = histogram(OUTLIERS), largest(OUTLIERS)
    found = entropy_range(made.magnitudes(False), made.widths, top, 127).item()
    assert np.abs(GAUSSIAN).max() < found < 40  # 32 is the least that it looks at
    far = rng.uniform(1, 2, 50_000).astype(np.float32)  # as published, the loop would clip all of these
    made, top = histogram(far), largest(far)
    assert 1.9 < entropy_range(made.magnitudes(False), made.widths, top, 127).item() <= top.item()


@pytest.mark.parametrize("choose", [percentile_range, mse_range, entropy_range])
def test_groups_are_chosen_apart(choose):
    columns = [GAUSSIAN, LAPLACE, OUTLIERS[: len(GAUSSIAN)], GAUSSIAN**3, np.zeros_like(GAUSSIAN)]
    last = 99.0 if choose is percentile_range else 127
    made = histogram(*columns, bins=256)
    together = choose(made.magnitudes(False), made.widths, largest(*columns), last)
    for found, column in zip(together.tolist(), columns, strict=True):
        one = histogram(column, bins=256)
        assert choose(one.magnitudes(False), one.widths, largest(column), last).item() == found
    assert together[-1] == 0 and (together[:-1] > 0).all()
