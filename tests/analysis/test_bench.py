"""`zq bench`: what it compares, that its contestants take turns, and what it writes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from zq_compiler import numerics
from zq_compiler.analysis import bench
from zq_compiler.cli import app
from zq_compiler.errors import RecipeError, ZQError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    times = bench.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 2)
    assert "".join(calls) == "aaabbb" + "abab" and set(times) == {"a", "b"} and min(times.values()) >= 0


def test_a_figure_is_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([3.0, 900.0, 1.0])
    monkeypatch.setattr(bench, "_cpu_milliseconds", lambda run: next(told))
    assert bench.take_turns({"a": lambda: None}, "cpu", 3) == {"a": 3.0}


@pytest.mark.slow
def test_bench_compares_with_the_model_in_float32() -> None:
    plain, inputs = model(), {"input": torch.randn(8, 64)}
    weights = [p.clone() for p in plain.parameters()]
    eager, compiled, quantized = bench.bench(plain, inputs, ["w8a8-plain"], rounds=2)
    assert [t.name for t in (eager, compiled, quantized)] == [
        "eager float32",
        "torch.compile float32",
        "zeroquant w8a8-plain",
    ]
    import zq_compiler

    with torch.no_grad():
        reference = zq_compiler.quantize(plain, (), example_kwargs=inputs, recipe="w8a8-plain")(**inputs)
        expected = numerics.sqnr(plain(**inputs), reference)
    assert eager.sqnr == math.inf and compiled.sqnr > 100 and quantized.sqnr == pytest.approx(expected, abs=0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain.parameters(), strict=True))


@pytest.mark.slow
def test_recipes_that_need_data_are_calibrated_with_the_inputs() -> None:
    told: list[str] = []
    timings = bench.bench(model(), {"input": torch.randn(8, 64)}, ["hero-m3"], rounds=1, tell=told.append)
    assert timings[-1].name == "zeroquant hero-m3" and timings[-1].sqnr > 25
    assert told[0] == "zeroquant hero-m3: quantizing" and told[-1] == "timing" and len(told) == 5


@pytest.mark.slow
def test_what_was_timed_is_written_line_by_line(tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    done = CliRunner().invoke(app, ["bench", "--seq-len", "16", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0
    assert out.read_text() == done.stdout and out.read_text().startswith("# BERT-base of random weights, batch 1")
    assert out.read_text().splitlines()[-1].startswith("| zeroquant w8a8 |")


def test_a_mistake_leaves_the_page_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    out.write_text("figures")
    failed = CliRunner().invoke(app, ["bench", "--recipe", "w8a8", "--recipe", "w9a9", "--out", str(out)])
    assert failed.exit_code == 1 and "w9a9" in failed.stderr + str(failed.exception)
    assert out.read_text() == "figures"
    told: list[str] = []
    with pytest.raises(RecipeError, match="w9a9"):
        bench.bench(model(), {"input": torch.randn(8, 64)}, ["w8a8", "w9a9"], tell=told.append)
    assert not told


def test_a_page_in_no_folder_is_an_error_with_its_mend(tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "nowhere" / "bench.md")])
    assert failed.exit_code == 1
    assert "nowhere/bench.md: cannot be written: No such file" in failed.stderr + str(failed.exception)


def test_the_table_has_ratios_to_the_first() -> None:
    rows = [bench.Timing("eager", 4.0, math.inf), bench.Timing("ours", 1.0, 30.25)]
    assert list(bench.markdown(rows))[2:] == ["| eager | 4.000 | 1.00 | inf |", "| ours | 1.000 | 4.00 | 30.2 |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_a_gpu_cuda_is_an_error_with_its_mend() -> None:
    with pytest.raises(ZQError, match=r"no CUDA device is available.*NVIDIA GPU"):
        bench.bench(model(), {}, device="cuda")
    for command in (["bench", "--device", "cuda"], ["tune"]):
        failed = CliRunner().invoke(app, command)
        assert failed.exit_code == 1 and "no CUDA device is available" in failed.stderr + str(failed.exception)


def test_a_captured_program_cannot_be_timed(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["bench", str(tmp_path / "x.pt2")]).exit_code == 1
