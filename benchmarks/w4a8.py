"""A linear of INT4 weights and INT8 activations against float32, against INT8 weights, and against INT4 weights with
float activations; and FP4 weights with FP8 activations: `python -m benchmarks.w4a8`, a Markdown table.

Milliseconds of process CPU time a call, one thread, medians of rounds in which all have a turn. The activations' own
quantize, which norms and activation functions do in passing, is not timed.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch
import typer

from zq_compiler.formats import unpack
from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import quantize_per_channel, quantize_per_token, quantize_per_token_fp8, quantize_weight

from .attention import Run, measure
from .peers import machine

SHAPES = ((576, 1536), (2048, 2048), (4096, 4096))  # K and N
ROWS = (1, 4, 128)
GROUPS = (0, 128)


def runs(weight: torch.Tensor, rows: int) -> dict[str, Run]:
    """The contestants, of one weight `[N, K]` and as many rows."""
    ops, (n, k) = torch.ops.zq_cpu, weight.shape
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
    (q, scale), (w_q, w_scale) = quantize_per_token(x), quantize_per_channel(weight)
    int8 = ops.pack_weight(w_q), w_scale, w_q.sum(1, dtype=torch.int32)
    codes = ops.pack_codes(*quantize_weight(weight, "int4", 128), "int4")
    made: dict[str, Run] = {
        "float32": partial(torch.nn.functional.linear, x, weight),
        "w4a16-g128": partial(ops.weight_only_linear, x, *codes, None, "int4", 128, n),
        "w8a8": partial(ops.int8_linear, q, scale, *int8, None, torch.float32),
    }
    fp4, fp8 = ops.pack_codes(*quantize_weight(weight, "fp4_e2m1", 128), "fp4_e2m1"), quantize_per_token_fp8(x)
    made["w4a8-fp"] = lambda: ops.weight_only_linear(fp8[0].float(), *fp4, None, "fp4_e2m1", 128, n) * fp8[1]
    for group in GROUPS:
        packed, scales = quantize_weight(weight, "int4", group)
        nibbles = (unpack(packed, 4, k) ^ 8).to(torch.int8) - 8  # two's complement
        laid_out = ops.pack_nibbles(nibbles, scales)
        name = f"w4a8-g{group}" if group else "w4a8"
        made[name] = partial(ops.w4a8_linear, q, scale, *laid_out, None, group, n, torch.float32)
    return made


def main(rounds: int = 15) -> None:
    """Times each shape and number of rows, and prints the table."""
    build.load()
    torch.set_num_threads(1)
    header = False
    for k, n in SHAPES:
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        for rows in ROWS:
            times = measure(made := runs(weight, rows), rounds, time.process_time)
            if not header:
                print(f"| K x N | rows | {' | '.join(f'{who} ms' for who in made)} | float32 / w4a8 |")
                print("|---" * (len(made) + 3) + "|")
                header = True
            medians = {who: statistics.median(times[who]) for who in made}
            cells = " | ".join(f"{ms:.3f}" for ms in medians.values())
            print(f"| {k} x {n} | {rows} | {cells} | {medians['float32'] / medians['w4a8']:.2f} |", flush=True)
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items() if key in ("cpu", "isa", "torch")))


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
