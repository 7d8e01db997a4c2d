"""Histograms that grow by doubling their range, and the ranges for quantization that are chosen from them.

A range is a power of two. When a larger value comes it doubles, and pairs of bins are added up, so the counts depend on
what was seen alone: in any order, at once or merged from parts, they are the same integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST_EXPONENT = -64  # ranges below 2^-64 are not told apart
_CHUNK = 1 << 17  # elements binned at once: their temporaries stay in the cache


class Histogram:
    """Counts of signed float values in bins of one width, for each of `groups` series of values.

    Bin `k` of `-bins < k < bins` holds the values that `k` is left of when `x / width` is rounded towards zero, so bin
    0 holds both signs. The range is the smallest power of two above every magnitude seen; `width = range / bins`.

    Args:
        groups: series counted apart.
        bins: for each sign, a power of two.
    """

    def __init__(self, groups: int, bins: int) -> None:
        self.bins = bins
        self.exponents = torch.full((groups,), _LEAST_EXPONENT)  # log2 of each range
        self.counts = torch.zeros(groups, 2 * bins, dtype=torch.int64)  # bin k at bins + k; the first is never used

    def add(self, rows: Tensor, max_abs: Tensor) -> None:
        """Count `rows [N, groups]`, whose largest magnitudes are `max_abs [groups]` float32."""
        needed = torch.frexp(max_abs).exponent.long().clamp(min=_LEAST_EXPONENT)
        self._grow(torch.where(max_abs > 0, needed, _LEAST_EXPONENT))
        groups, columns = self.counts.shape
        per_width = _power_of_two(self.bins.bit_length() - 1 - self.exponents).to(rows.device)
        first = torch.arange(groups, dtype=torch.int32, device=rows.device) * columns + self.bins
        for piece in rows.split(max(_CHUNK, self.counts.numel()) // groups):
            index = (piece.float() * per_width).int().add_(first)  # the product with a power of two is exact
            self.counts += torch.bincount(index.reshape(-1), minlength=groups * columns).view(groups, columns).cpu()

    def merge(self, other: Histogram) -> None:
        """Add the counts of another with the same groups and bins."""
        self._grow(other.exponents)
        self.counts += _rebinned(other.counts, self.exponents - other.exponents)

    def magnitudes(self, unsigned: bool) -> Tensor:
        """Counts of `|x|`, or of `max(x, 0)`: `[groups, bins]` int64."""
        counts = self.counts[:, self.bins :].clone()
        negative = self.counts[:, 1 : self.bins]
        if unsigned:
            counts[:, 0] += negative.sum(-1)
        else:
            counts[:, 1:] += negative.flip(-1)
        return counts

    @property
    def widths(self) -> Tensor:
        """Of a bin, `[groups]` float64."""
        return _power_of_two(self.exponents - (self.bins.bit_length() - 1)).double()

    def _grow(self, exponents: Tensor) -> None:
        grown = torch.maximum(self.exponents, exponents)
        self.counts = _rebinned(self.counts, grown - self.exponents)
        self.exponents = grown


def _rebinned(counts: Tensor, doublings: Tensor) -> Tensor:
    """Counts in bins that are `2^doublings` times as wide; exactly what binning the values so had given."""
    if not doublings.any():
        return counts
    half = counts.shape[1] // 2
    wide = torch.div(torch.arange(-half, half), (1 << doublings.clamp(max=62))[:, None], rounding_mode="trunc")
    return torch.zeros_like(counts).scatter_add_(1, wide + half, counts)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Float32 from its bits: `torch.ldexp` goes through a `pow` that promises no exactness."""
    return ((exponents + 127) << 23).int().view(torch.float32)


# --- ranges from histograms ----------------------------------------------------------------------------------------
#
# Each takes counts of magnitudes [G, bins], the width of a bin [G] float64, the largest value seen [G] float64 and the
# largest integer, and gives ranges [G] float64 that the largest value bounds.


def percentile_range(counts: Tensor, width: Tensor, largest: Tensor, percent: float) -> Tensor:
    """The lowest edge of a bin that at least `percent` of the values lie below."""
    total = counts.sum(-1, keepdim=True)
    needed = (total.double() * (percent / 100)).ceil().long().clamp(min=1)
    last_bin = torch.searchsorted(counts.cumsum(-1), needed).squeeze(-1)
    return torch.minimum((last_bin + 1) * width, largest)


def mse_range(counts: Tensor, width: Tensor, largest: Tensor, levels: int) -> Tensor:
    """The range with the least squared error of quantization, clipping included, among `largest * 2^(-j/16)`, j to 96.

    Values are taken as spread evenly over their bin, over which the squared error is integrated exactly: with
    `n = min(round(u), levels)`, the integral of `(t - round(t))^2` from 0 to u is `n/12 + (u - n)^3 / 3`.
    """
    edges = torch.arange(counts.shape[-1] + 1, dtype=torch.float64) * width[:, None]
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for j in range(97):
        candidate = largest * 2 ** (-j / 16)
        step = (candidate / levels).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        u = edges / step
        n = u.round().clamp(max=levels)
        integral = n / 12 + (u - n) ** 3 / 3
        error = (counts * integral.diff(dim=-1)).sum(-1) * step[:, 0] ** 3
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best


def entropy_range(counts: Tensor, width: Tensor, largest: Tensor, levels: int) -> Tensor:
    """The range with the least Kullback-Leibler divergence, as TensorRT chooses it (S. Migacz, GTC 2017, S7310).

    For each number `i` of bins that the range may cover, from `levels + 1` up to all that hold values:

    - P is the first `i` counts, and the last of them takes in the outliers, all that lie beyond;
    - Q is the first `i` counts, without the outliers, merged into `levels + 1` groups of bins; each group's sum is
      spread evenly over those of its bins that are not empty;
    - the divergence is the sum of `p log(p/q)`, both normalized.

    The range ends with the last of the `i` bins. The slides leave open what follows. Bin 0, which holds all exact zeros
    and would outweigh the rest, counts as much as bin 1 (as in NVIDIA's pytorch-quantization). Where only outliers fall
    into the last bin, its q is that of 1e-4 values (MXNet smooths by as much): the divergence would be infinite, and a
    lone outlier never be clipped. A range that holds less than half of the values is left out: where all are outliers,
    P equals Q.
    """
    groups = levels + 1
    counts = counts.double()
    counts[:, 0] = counts[:, 1]
    total = counts.sum(-1, keepdim=True)
    used = (largest / width).floor().long() + 1
    best, least = largest.clone(), torch.full_like(largest, math.inf)
    for i in range(groups, int(used.max()) + 1):
        inside = counts[:, :i]
        held = inside.sum(-1, keepdim=True)
        p = inside.clone()
        p[:, -1:] += total - held
        group = torch.arange(i) * groups // i
        sums = torch.zeros(len(counts), groups, dtype=torch.float64).index_add_(1, group, inside)
        filled = torch.zeros_like(sums).index_add_(1, group, (inside > 0).double())
        q = torch.where(inside > 0, (sums / filled.clamp(min=1))[:, group], 0.0)
        q[:, -1].clamp_(min=1e-4)
        terms = torch.where(p > 0, p / total * (p / q * (q.sum(-1, keepdim=True) / total)).log(), 0.0)
        divergence = terms.sum(-1)
        better = (divergence < least) & (i <= used) & (2 * held >= total).squeeze(-1)
        best = torch.where(better, torch.minimum(i * width, largest), best)
        least = torch.where(better, divergence, least)
    return best
