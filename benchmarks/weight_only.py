"""A linear with packed weights against torch's in float32: `python -m benchmarks.weight_only`, a Markdown table.

Milliseconds of process CPU time a call, one thread, medians of rounds in which both have a turn.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import typer

from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import quantize_weight

from .attention import Run, measure
from .peers import machine

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))  # K and N
FORMATS = (("int4", 128), ("int4", 64), ("int8", 0), ("int3", 64), ("fp6_e3m2", 0))
ROWS = (1, 4, 128)


def main(rounds: int = 15) -> None:
    """Times each shape, format and number of rows, and prints the table."""
    build.load()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print("| K x N | rows | float32 ms | format | group | MB | ms | float32 / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for k, n in SHAPES:
        weight = torch.randn(n, k, generator=generator)
        for rows in ROWS:
            x = torch.randn(rows, k, generator=generator)
            for name, group in FORMATS:
                codes, scale = torch.ops.zq_cpu.pack_codes(*quantize_weight(weight, name, group), name)
                ours = partial(torch.ops.zq_cpu.weight_only_linear, x, codes, scale, None, name, group, n)
                runs: dict[str, Run] = {"float32": partial(torch.nn.functional.linear, x, weight), "ours": ours}
                times = measure(runs, rounds, time.process_time)
                float32, ms = (statistics.median(times[who]) for who in runs)
                size = (codes.nbytes + scale.nbytes) / 1e6
                print(
                    f"| {k} x {n} | {rows} | {float32:.3f} | {name} | {group or 'row'} | {size:.1f} | {ms:.3f} "
                    f"| {float32 / ms:.2f} |",
                    flush=True,
                )
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items() if key in ("cpu", "isa", "torch")))


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
