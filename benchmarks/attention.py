"""INT8 attention against torch's own in float32 and bfloat16, in alternating rounds: `python -m benchmarks.attention`.

The INT8 side reads and writes int8 with static scales, as between two INT8 linears; the float sides read and write
their dtype. All read heads as views of projections, `[B, T, H * D]`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from zq_compiler.kernels.cpu import build

from .peers import machine

Run = Callable[[], Tensor]
SECONDS = 0.02  # the least that one measurement lasts


def contestants(batch: int, heads: int, tokens: int, features: int, is_causal: bool) -> dict[str, Run]:
    """The same attention four times."""
    generator = torch.Generator().manual_seed(0)
    projected = [torch.randn(batch, tokens, heads, features, generator=generator).transpose(1, 2) for _ in range(3)]
    steps = [(x.abs().max() / 127).view(1, 1, 1, 1) for x in projected]
    integers = [(x / step).round().to(torch.int8) for x, step in zip(projected, steps, strict=True)]
    score_scale = steps[0] * steps[1] / features**0.5
    probability_step = torch.full((1, 1, 1, 1), 1 / 255)

    def floats(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def int8(probability_scale: Tensor | None, out_scale: Tensor) -> Tensor:
        return torch.ops.zq_cpu.int8_attention(
            *integers, score_scale, None, is_causal, probability_scale, out_scale, torch.int8
        )

    out_scale = steps[2] / (floats(*projected).abs().max() / 127)
    return {
        "int8 static": partial(int8, probability_step, probability_step * out_scale),
        "int8 token": partial(int8, None, out_scale),
        "fp32": partial(floats, *projected),
        "bf16": partial(floats, *(x.bfloat16() for x in projected)),
    }


def measure(runs: dict[str, Run], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds a call, one value a round; within a round everyone has a turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()
        started = time.perf_counter()
        run()
        calls[name] = 1 + int(SECONDS / (time.perf_counter() - started))
    for _ in range(rounds):
        for name, run in runs.items():
            started = clock()
            for _ in range(calls[name]):
                run()
            times[name].append((clock() - started) / calls[name] * 1e3)
    return times


def main(
    threads: int = 1,
    batch: int = 1,
    heads: int = 12,
    features: Annotated[int, typer.Option(help="Of a head.")] = 64,
    tokens: Annotated[list[int] | None, typer.Option(help="Queries and keys; repeat for several.")] = None,
    is_causal: Annotated[bool, typer.Option("--causal")] = False,
    rounds: int = 15,
) -> None:
    """Times one attention per length and prints median and minimum, in milliseconds a call."""
    build.load()
    torch.set_num_threads(threads)
    clock, unit = (time.process_time, "CPU time") if threads == 1 else (time.perf_counter, "wall time")
    shape = f"batch {batch}, {heads} heads of {features}{', causal' if is_causal else ''}"
    table = Table(title=f"attention, {shape}, {threads} thread(s): median/min ms, {unit}", box=box.SIMPLE)
    for column in ("tokens", "int8 static", "int8 token", "fp32", "bf16", "x fp32"):
        table.add_column(column, justify="right", no_wrap=True)
    with torch.no_grad():
        for t in tokens or [128, 512, 2048]:
            times = measure(contestants(batch, heads, t, features, is_causal), rounds, clock)
            median = {name: statistics.median(values) for name, values in times.items()}
            cells = [f"{median[name]:.3g}/{min(values):.3g}" for name, values in times.items()]
            table.add_row(str(t), *cells, f"{median['fp32'] / median['int8 static']:.2f}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items() if key in ("cpu", "isa", "torch")))


if __name__ == "__main__":
    typer.run(main)
