"""`zq tune`: it finds what its clock calls fastest, refuses wrong results, and what it writes is used from then on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from zq_compiler.analysis import tune
from zq_compiler.errors import ZQError
from zq_compiler.kernels.cuda import configs, int8_linear, registration
from zq_compiler.kernels.cuda.configs import Config, Problem

registration.load()
M, N, K = 40, 64, 96


class Clock:
    """Has a kernel of a certain BLOCK_M and warps run fastest."""

    def __init__(self, milliseconds: Callable[[Config], float]) -> None:
        self.milliseconds, self.config = milliseconds, dict[str, int]()

    def __call__(self, run: Callable[[], Any]) -> float:
        def note(problem: Problem, config: Config) -> Config:
            self.config = config
            return config

        with configs.trying(note):
            run()
        return self.milliseconds(self.config)


def graph(quantize: bool = False) -> fx.GraphModule:
    """An INT8 linear, and a quantize."""
    graph = fx.Graph()
    x_q, x_scale, w_q, w_scale = (graph.placeholder(name) for name in ("x_q", "x_scale", "w_q", "w_scale"))
    operands = x_q, x_scale, w_q, w_scale, None, torch.float32
    y = graph.call_function(torch.ops.zq_cuda.int8_linear.default, operands)
    graph.output(graph.call_function(torch.ops.zq_cuda.quantize_per_token.default, (y,)) if quantize else y)
    return fx.GraphModule(torch.nn.Module(), graph)


def operands() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x_q, w_q = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((M, K), (N, K)))
    return x_q, torch.rand(M, 1), w_q, torch.rand(N, 1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ZQ_CACHE_DIR", str(tmp_path))
    configs.timed.cache_clear()
    yield tmp_path
    configs.timed.cache_clear()


def asked(run: Callable[[], Any]) -> Config:
    """The tiles that a call runs with."""
    clock = Clock(lambda config: 0.0)
    clock(run)
    return clock.config


def test_the_fastest_tiles_are_found_and_used_from_then_on() -> None:
    tuner = tune.Tuner(graph(quantize=True), Clock(lambda c: 1 + abs(c["BLOCK_M"] - 64) + abs(c["num_warps"] - 8)))
    q, scale = tuner.run(*operands())
    found, of_rows = tuner.tuned
    assert (of_rows.op, of_rows.m, of_rows.n, of_rows.k, of_rows.dtype) == ("quantize_per_token", 64, N, N, "float32")
    assert of_rows.config == {"BLOCK_M": 64, "num_warps": 8} and of_rows.refused == 0  # a row's length is no choice
    assert (found.op, found.m, found.n, found.k, found.dtype) == ("int8_linear", 64, N, K, "float32")
    assert found.config["BLOCK_M"] == 64 and found.config["num_warps"] == 8
    assert found.milliseconds == 1 < found.before and found.refused == 0 < found.tried
    x_q, x_scale, w_q, w_scale = operands()
    expected = torch.ops.zq.quantize_per_token(
        torch.ops.zq.int8_linear(x_q, x_scale, w_q, w_scale, None, torch.float32)
    )
    assert torch.equal(q, expected[0]) and torch.equal(scale, expected[1])

    def call() -> Tensor:
        return torch.ops.zq_cuda.int8_linear(x_q, x_scale, w_q, w_scale, None, torch.float32)

    assert asked(call) != found.config
    architecture = registration.architecture(torch.device("cpu"))
    tune.save(tuner.tuned, configs.tuned_file(architecture), "a GPU")
    assert asked(call) == found.config
    known = {(found.op, found.m, found.n, found.k, found.dtype, found.variant)}
    again = tune.Tuner(graph(), Clock(lambda c: 1.0), known)
    again.run(*operands())
    assert again.tuned == []


def test_tiles_that_give_another_result_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong with one BLOCK_N, which would be the fastest."""
    chosen = dict[str, int]()

    def choose(*args: Any) -> Config:
        chosen.update(configs.choose(*args))
        return dict(chosen)

    monkeypatch.setattr(int8_linear, "choose", choose)

    class Wrong(tune.Tuner):
        def _tune(self, problem: Problem, start: Config, call: Callable[[], Any]) -> tune.Tuned:
            def sometimes_wrong() -> Any:
                y = call()
                return y + (1000 if chosen["BLOCK_N"] == 2 * start["BLOCK_N"] else 0)

            return super()._tune(problem, start, sometimes_wrong)

    tuner = Wrong(graph(), Clock(lambda config: 1.0 if config["BLOCK_N"] <= 64 else 0.5))
    tuner.run(*operands())
    [found] = tuner.tuned
    assert found.refused == 1 and found.milliseconds == found.before == 1.0


def test_rows_take_their_old_ones_place(folder: Path) -> None:
    path = folder / "rows.json"
    row = tune.Tuned("int8_linear", 64, N, K, "float16", "", {"BLOCK_M": 16}, 1.0, 2.0, 3, 0)
    other = tune.Tuned("int8_linear", 1, N, K, "float16", "", {"BLOCK_M": 16}, 1.0, 2.0, 3, 0)
    tune.save([row, other], path, "a GPU")
    tune.save([tune.Tuned("int8_linear", 64, N, K, "float16", "", {"BLOCK_M": 32}, 0.5, 2.0, 3, 0)], path, "a GPU")
    rows = json.loads(path.read_text())
    assert [(r["m"], r["config"]["BLOCK_M"], r["gpu"]) for r in rows] == [(64, 32, "a GPU"), (1, 16, "a GPU")]
    path.write_text("{}[")
    with pytest.raises(ZQError, match="is no file of `zq tune`"):
        tune.save([row], path, "a GPU")


def test_one_formats_tiles_are_not_anothers() -> None:
    """Sums of INT8 are split over K where one scale is a row's, and must not be where groups have theirs."""
    from zq_compiler.kernels.cuda.w4a8_linear import pack_w4a8

    torch.manual_seed(0)
    m, n, k = 4, 32, 512
    x_q, x_scale = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.rand(m, 1)
    for group in (0, 128):
        w_packed, w_scale = torch.ops.zq.quantize_weight(torch.randn(n, k), "int4", group)
        operands = x_q, x_scale, *pack_w4a8(w_packed, w_scale, "int4", group, k), None, "int4", group, torch.float32
        expected = torch.ops.zq.w4a8_linear(x_q, x_scale, w_packed, w_scale, None, "int4", group, torch.float32)
        if group == 0:
            config = {**asked(lambda: torch.ops.zq_cuda.w4a8_linear(*operands)), "SPLIT_K": 2}  # noqa: B023
            row = tune.Tuned("w4a8_linear", 4, n, k, "float32", "int4, groups of 0", config, 1.0, 1.0, 1, 0)
            tune.save([row], configs.tuned_file(80), "a GPU")
            assert asked(lambda: torch.ops.zq_cuda.w4a8_linear(*operands))["SPLIT_K"] == 2  # noqa: B023
        assert torch.equal(torch.ops.zq_cuda.w4a8_linear(*operands), expected)


def test_a_damaged_file_is_named_with_the_mend() -> None:
    path = configs.tuned_file(80)
    path.parent.mkdir(parents=True)
    path.write_text('[{"op": "int8_li')
    with pytest.raises(ZQError, match=r"sm_80\.json.*delete it and tune again"):
        torch.ops.zq_cuda.int8_linear(*operands(), None, torch.float32)


def test_a_small_row_that_is_wrong_is_another_result() -> None:
    good = torch.cat([1000 * torch.randn(64, 16), torch.randn(1, 16)])
    bad = good.clone()
    bad[-1] = 0
    assert tune.same(good, good * 1.001) and not tune.same(bad, good)
    assert tune.same(torch.tensor([1, 2]), torch.tensor([2, 2])) and not tune.same(torch.tensor([1]), torch.tensor([3]))
    nan = good.clone()
    nan[0, 0] = float("nan")
    assert tune.same(nan, nan) and not tune.same(good, nan)
