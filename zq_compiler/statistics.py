"""Streaming statistics of named values, and the static scales chosen from them.

Memory is fixed however much is seen: the range of each feature, and histograms; see `histogram.py`. Statistics are a
file that can be saved, loaded and merged, and know which graph they belong to.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CalibrationError, RecipeError
from .histogram import Histogram, entropy_range, mse_range, percentile_range
from .numerics import AMAX_FLOOR
from .schemes import Granularity

METHODS: dict[str, Callable[..., Tensor] | None] = {
    "max_abs": None,
    "percentile": percentile_range,
    "mse": mse_range,
    "entropy": entropy_range,
}
BINS = 2048  # of a value's histogram, for each sign: 32 KiB
FEATURE_FLOOR = 1e-2  # least range of a feature, relative to the median feature's
FORMAT = "zq_compiler statistics"
VERSION = 1


class ValueStatistics:
    """What one float tensor of a graph held, over all batches.

    Args:
        name: dotted name, for errors.
        dim: the dimension of features; None where it has none, for example because its size changes between batches.
        bins: of the histogram of all elements, for each sign; a power of two.
        feature_bins: of a histogram for each feature, or None for none. It takes `16 * feature_bins` bytes a feature;
            256 are enough for percentiles, least error and entropy of signed values.

    Attributes:
        elements: seen so far.
        minimum, maximum: of each feature, `[D]` float32, D = 1 without features; empty before anything was seen.

    >>> x = ValueStatistics("mlp:input")
    >>> x.observe(torch.tensor([[127.0, -254.0], [63.5, 0.0]]))
    >>> x.scale(), x.scale(granularity="per_feature")
    (tensor([2.]), tensor([1., 2.]))
    """

    def __init__(self, name: str, *, dim: int | None = -1, bins: int = BINS, feature_bins: int | None = None) -> None:
        self.name, self.dim, self.feature_bins = name, dim, feature_bins
        self.elements = 0
        self.minimum = self.maximum = torch.empty(0)
        self.histogram = Histogram(1, bins)
        self.feature_histogram: Histogram | None = None  # made when the number of features is known

    @property
    def features(self) -> int:
        """How many there are; 0 before anything was seen."""
        return len(self.minimum)

    @property
    def rows(self) -> int:
        """How often each feature was seen."""
        return self.elements // max(self.features, 1)

    @property
    def max_abs(self) -> Tensor:
        """Largest magnitude of each feature, `[D]` float32."""
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def observe(self, x: Tensor, batch: int | None = None) -> None:
        """Take in a tensor; nothing of it is kept.

        Args:
            x: any shape that has the dimension of features, any float dtype; read in float32.
            batch: its number, for errors.

        Raises:
            CalibrationError: it holds NaN or Inf, is not of floats, or has another number of features than before. The
                statistics are then as they were.
        """
        if not x.is_floating_point():
            raise self._error(f"is {str(x.dtype).removeprefix('torch.')}, and only floats have ranges", batch)
        if x.numel() == 0:
            return
        x = x.detach()
        rows = x.reshape(-1, 1) if self.dim is None else x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim])
        if self.elements and rows.shape[1] != self.features:
            raise self._error(f"has {rows.shape[1]} features, and had {self.features} before", batch)
        low, high = (y.float().cpu() + 0.0 for y in (rows.amin(0), rows.amax(0)))  # + 0.0 turns -0.0 into 0.0
        if not (low.isfinite().all() and high.isfinite().all()):
            kind = "NaN" if low.isnan().any() else "Inf"
            raise self._error(f"holds {kind}", batch, "leave that batch out, or run the model in a wider dtype")
        self._widen(low, high, x.numel())
        max_abs = torch.maximum(low.abs(), high.abs())
        self.histogram.add(rows.reshape(-1, 1), max_abs.amax(0, keepdim=True))
        if self.feature_histogram is not None:
            self.feature_histogram.add(rows, max_abs)

    def merge(self, other: ValueStatistics) -> None:
        """Take in all that another one saw.

        Raises:
            CalibrationError: it was collected in another way, or has another number of features.
        """
        self.require_like(other)
        if other.elements:
            self._widen(other.minimum, other.maximum, other.elements)
            for name, histogram in self.histograms().items():
                histogram.merge(other.histograms()[name])

    def require_like(self, other: ValueStatistics) -> None:
        """Raise a CalibrationError unless `other` can be merged into this one."""
        if self.layout != other.layout:
            raise self._error(f"was collected with {self.layout} here and {other.layout} there")
        if self.elements and other.elements and self.features != other.features:
            raise self._error(f"has {self.features} features here and {other.features} there")

    def scale(
        self,
        method: str = "max_abs",
        granularity: Granularity | str = Granularity.PER_TENSOR,
        *,
        unsigned: bool = False,
        bits: int = 8,
        percentile: float = 99.99,
    ) -> Tensor:
        """Real value of one step of a static scale: `range / (2^(bits-1) - 1)`, or `range / (2^bits - 1)` unsigned.

        A range is at least `AMAX_FLOOR`, so that 0 divided by a scale is 0. That of a feature is also at least
        `FEATURE_FLOOR` of the median range of the features that were ever other than zero: what was silent in
        calibration may speak up later. The median, because one feature with outliers must not coarsen all others.

        Args:
            method: how the range is chosen: `"max_abs"`, the largest magnitude; `"percentile"`, `"mse"` or
                `"entropy"`, see `percentile_range`, `mse_range` and `entropy_range` in `histogram.py`.
            granularity: `"per_tensor"` or `"per_feature"`.
            unsigned: integers from 0, for values that are never negative. Negative ones are taken for 0.
            bits: 2 to 8.
            percentile: of the magnitudes, above 0 and at most 100; for `"percentile"`.

        Returns:
            `[1]` or `[D]` float32, finite and above 0.

        Raises:
            CalibrationError: nothing was seen, or not in the detail that the choice needs.
            RecipeError: a bad argument.
        """
        _check_choice(method, granularity, bits, percentile)
        if not self.elements:
            raise self._error("was never seen in calibration", fix="calibrate with batches that reach it")
        per_feature = granularity == Granularity.PER_FEATURE
        if per_feature and self.dim is None:
            raise self._error("was collected without features", fix="use one scale per tensor")
        levels = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        largest = self.maximum.clamp(min=0) if unsigned else self.max_abs
        if not per_feature:
            largest = largest.amax(0, keepdim=True)
        chosen, choose = largest, METHODS[method]
        if choose is not None:
            histogram = self._detailed(method, per_feature, levels)
            last = percentile if method == "percentile" else levels
            chosen = choose(histogram.magnitudes(unsigned), histogram.widths, largest.double(), last).float()
        floor = AMAX_FLOOR
        if per_feature and largest.any():
            floor = max(floor, FEATURE_FLOOR * chosen[largest > 0].median().item())
        return chosen.clamp(min=floor) / levels

    def summary(self) -> dict[str, Any]:
        """For reports, as plain JSON values."""
        return {
            "elements": self.elements,
            "features": self.features,
            "dead_features": int((self.max_abs == 0).sum()),
            "minimum": self.minimum.amin().item() if self.elements else None,
            "maximum": self.maximum.amax().item() if self.elements else None,
        }

    @property
    def layout(self) -> dict[str, int | None]:
        """How it is collected."""
        return {"dim": self.dim, "bins": self.histogram.bins, "feature_bins": self.feature_bins}

    def histograms(self) -> dict[str, Histogram]:
        """Those that it keeps, by name."""
        both = {"histogram": self.histogram, "feature_histogram": self.feature_histogram}
        return {name: histogram for name, histogram in both.items() if histogram is not None}

    def _detailed(self, method: str, per_feature: bool, levels: int) -> Histogram:
        histogram = self.feature_histogram if per_feature else self.histogram
        if histogram is None:
            what = f"has no histogram for each feature, which {method} needs"
            raise self._error(what, fix='collect with feature_bins=256, or use method="max_abs"')
        least = 2 * (levels + 1)  # half of the bins may lie beyond the largest value
        if method == "entropy" and histogram.bins < least:
            raise self._error(f"has {histogram.bins} bins, and entropy needs {least}", fix=f"collect with {least}")
        return histogram

    def _widen(self, low: Tensor, high: Tensor, elements: int) -> None:
        if not self.elements:
            self.minimum, self.maximum = low, high
            if self.feature_bins is not None:
                self.feature_histogram = Histogram(len(low), self.feature_bins)
        self.minimum, self.maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        self.elements += elements

    def _error(self, what: str, batch: int | None = None, fix: str | None = None) -> CalibrationError:
        return CalibrationError(what if batch is None else f"{what} (batch {batch})", where=self.name, fix=fix)


def _check_choice(method: str, granularity: str, bits: int, percentile: float) -> None:
    if method not in METHODS:
        raise RecipeError(f"unknown range method {method!r}", fix=f"use one of {', '.join(METHODS)}")
    if granularity not in (Granularity.PER_TENSOR, Granularity.PER_FEATURE):
        raise RecipeError(f"{granularity!s} scales do not come from statistics", fix="use per_tensor or per_feature")
    if bits not in range(2, 9):
        raise RecipeError(f"{bits}-bit integers are not supported", fix="use 2 to 8")
    if not 0 < percentile <= 100:
        raise RecipeError(f"there is no percentile {percentile}", fix="use one above 0 and at most 100")


class Statistics(Mapping[str, ValueStatistics]):
    """Statistics of all watched values of a graph, by name.

    Args:
        values: by name.
        key: `calibration.structure_key` of the graph.
        batches: how many went into them.
    """

    def __init__(self, values: Mapping[str, ValueStatistics], key: str = "", batches: int = 0) -> None:
        self._values = dict(values)
        self.key, self.batches = key, batches

    def __getitem__(self, name: str) -> ValueStatistics:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def require(self, key: str) -> None:
        """Raise a CalibrationError unless the statistics belong to the graph with this key."""
        if key != self.key:
            raise CalibrationError(
                "the statistics belong to another model, or to other weights", fix="collect them from this model"
            )

    def merge(self, other: Statistics) -> None:
        """Take in all that another one saw: bit for bit what one run over the batches of both had given.

        Raises:
            CalibrationError: it belongs to another graph or a value was collected in another way. The statistics are
                then as they were.
        """
        other.require(self.key)
        for name in self.keys() & other.keys():
            self[name].require_like(other[name])
        for name, value in other.items():
            self._values.setdefault(name, ValueStatistics(name, **value.layout)).merge(value)  # type: ignore[arg-type]
        self.batches += other.batches

    def summary(self) -> dict[str, Any]:
        """For reports, as plain JSON values."""
        values = {name: value.summary() for name, value in self.items()}
        return {"key": self.key, "batches": self.batches, "values": values}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, all of it or nothing."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.items():
            tensors |= {f"{name}.minimum": value.minimum, f"{name}.maximum": value.maximum}
            for key, histogram in value.histograms().items():
                tensors |= {f"{name}.{key}.exponents": histogram.exponents, f"{name}.{key}.counts": histogram.counts}
        values = {name: {**v.layout, "elements": v.elements} for name, v in self.items()}
        header = {"format": FORMAT, "version": VERSION, "key": self.key, "batches": self.batches, "values": values}
        target = Path(path)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            save_file(tensors, partial, {"zq_compiler": json.dumps(header)})
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: naming the file that is missing, damaged or none of ours, and the mend.
        """
        fix = "copy the file again, or collect the statistics again"
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("zq_compiler", "{}"))
                if header.get("format") != FORMAT or header.get("version") != VERSION:
                    what, fix = "was not written by this version of zq_compiler", "collect the statistics again"
                    raise CalibrationError(what, where=str(path), fix=fix)
                values = {name: _restored(file, name, entry) for name, entry in header["values"].items()}
            return cls(values, header["key"], header["batches"])
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            raise CalibrationError(what, where=str(path), fix="give a file that save() wrote") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            what = f"is damaged: {type(error).__name__}: {error}"
            raise CalibrationError(what, where=str(path), fix=fix) from error


def _restored(file: Any, name: str, entry: Mapping[str, Any]) -> ValueStatistics:
    value = ValueStatistics(name, **{key: entry[key] for key in ("dim", "bins", "feature_bins")})
    value.elements = entry["elements"]
    value.minimum, value.maximum = (file.get_tensor(f"{name}.{part}") for part in ("minimum", "maximum"))
    if value.elements and value.feature_bins is not None:
        value.feature_histogram = Histogram(value.features, value.feature_bins)
    for key, histogram in value.histograms().items():
        for part in ("exponents", "counts"):
            stored, expected = file.get_tensor(f"{name}.{key}.{part}"), getattr(histogram, part)
            if stored.shape != expected.shape or stored.dtype != expected.dtype:
                raise ValueError(f"{name}.{key}.{part} is {stored.dtype} {list(stored.shape)}")
            setattr(histogram, part, stored)
        if histogram.counts.sum() != value.elements:
            raise ValueError(f"{name}.{key} counts other than {value.elements} elements")
    if not value.max_abs.isfinite().all():
        raise ValueError(f"the range of {name} is not finite")
    return value
