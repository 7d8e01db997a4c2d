"""Statistics as files: they come back, merge to the file of the whole, and are refused where they do not belong."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.programs import randn
from tests.test_statistics import content, seen
from zq_compiler import CalibrationError, ZQError
from zq_compiler.statistics import Statistics


def statistics(*seeds: int, key: str = "model") -> Statistics:
    """Statistics of three values, one of which was never seen."""
    batches = [randn(6, 4, seed=seed) * 3.0**seed for seed in seeds]
    ragged = [x[:, : 1 + seed % 4].abs() for x, seed in zip(batches, seeds, strict=True)]
    values = {
        "a.0:input": seen(*batches),
        "b:probabilities": seen(*ragged, dim=None),
        "c": seen(*batches, name="c", dim=0, bins=64, feature_bins=32),
        "d": seen(),
    }
    return Statistics(values, key, len(seeds))


def everything(found: Statistics) -> list:
    return [found.key, found.batches, {name: content(value) for name, value in found.items()}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    statistics(0, 1).save(tmp_path / "model.stats")
    return tmp_path / "model.stats"


def test_files_come_back(path: Path):
    assert everything(Statistics.load(path)) == everything(statistics(0, 1))
    assert [p.name for p in path.parent.iterdir()] == ["model.stats"]
    written = path.read_bytes()
    Statistics.load(path).save(path)
    assert path.read_bytes() == written
    assert torch.equal(
        Statistics.load(path)["c"].scale("mse", "per_feature"), statistics(0, 1)["c"].scale("mse", "per_feature")
    )


def test_halves_from_files_merge_to_the_file_of_the_whole(tmp_path: Path):
    """Byte for byte, in either order."""
    statistics(0, 1, 2, 3).save(tmp_path / "whole")
    for i, seeds in enumerate([(0, 1), (2, 3)]):
        statistics(*seeds).save(tmp_path / f"{i}")
    for first, second in [("0", "1"), ("1", "0")]:
        merged = Statistics.load(tmp_path / first)
        merged.merge(Statistics.load(tmp_path / second))
        merged.save(tmp_path / "merged")
        assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_values_that_one_of_two_has_are_kept():
    merged = Statistics({"a": seen(randn(2, 4))}, "model", 1)
    merged.merge(Statistics({"b": seen(randn(2, 5), feature_bins=16)}, "model", 2))
    assert everything(merged) == everything(
        Statistics({"a": seen(randn(2, 4)), "b": seen(randn(2, 5), feature_bins=16)}, "model", 3)
    )


def test_statistics_of_another_model_are_refused():
    mine = statistics(0)
    before = everything(mine)
    with pytest.raises(CalibrationError, match=r"belong to another model, or to other weights\. To mend it: collect"):
        mine.merge(statistics(1, key="another"))
    mine.require("model")
    with pytest.raises(CalibrationError, match="another model"):
        mine.require("another")
    assert everything(mine) == before


def test_a_merge_that_fails_changes_nothing():
    mine, other = statistics(0), statistics(1)
    before = everything(mine)
    with pytest.raises(CalibrationError, match="c: was collected with"):
        mine.merge(Statistics({**other, "c": seen(randn(2, 3), name="c")}, "model", 1))
    assert everything(mine) == before


def test_summary_is_json():
    x = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    found = Statistics({"a": seen(x), "b": seen()}, "model", 1).summary()
    assert json.loads(json.dumps(found)) == {
        "key": "model",
        "batches": 1,
        "values": {
            "a": {"elements": 4, "features": 2, "dead_features": 1, "minimum": -2.0, "maximum": 1.0},
            "b": {"elements": 0, "features": 0, "dead_features": 0, "minimum": None, "maximum": None},
        },
    }


def edited(path: Path, change) -> None:
    """Rewrite the file with other tensors or another header."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["zq_compiler"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"zq_compiler": json.dumps(header)})


def broken_count(header, tensors):
    tensors["a.0:input.histogram.counts"][0, 2048] += 1


def broken_range(header, tensors):
    tensors["a.0:input.maximum"][0] = math.nan


def lost_tensor(header, tensors):
    del tensors["c.feature_histogram.counts"]


def other_bins(header, tensors):
    header["values"]["c"]["bins"] = 128


def lost_entry(header, tensors):
    del header["values"]["c"]["elements"]


def newer(header, tensors):
    header["version"] = 2


@pytest.mark.parametrize("change", [broken_count, broken_range, lost_tensor, other_bins, lost_entry])
def test_damaged_files_are_named(path: Path, change):
    edited(path, change)
    with pytest.raises(ZQError, match=r"model\.stats: is damaged: .*To mend it: copy the file again, or collect"):
        Statistics.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_named(path: Path, keep: int):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CalibrationError, match=r"model\.stats: is damaged: .*To mend it: copy the file again"):
        Statistics.load(path)


def test_other_files_are_named(path: Path, tmp_path: Path):
    edited(path, newer)
    with pytest.raises(
        CalibrationError, match=r"model\.stats: was not written by this version.*collect the statistics"
    ):
        Statistics.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CalibrationError, match=r"model\.stats: was not written by this version"):
        Statistics.load(path)
    path.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(CalibrationError, match=r"model\.stats: is damaged"):
        Statistics.load(path)
    for missing in (tmp_path / "none.stats", tmp_path):
        with pytest.raises(CalibrationError, match=rf"{missing.name}: cannot be read: .*To mend it: give a file"):
            Statistics.load(missing)
