"""docs/kernels.md: what each CUDA kernel computes, moves and takes, from its own machine code.

    python -m benchmarks.kernel_cards

Compiles every case of `analysis/kernel_cases.py` for five architectures (`offline_gpu.py`), reads registers, shared
memory and instructions off the cubins, and predicts times by `roofline.py`. No GPU is needed, and none was there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import triton
import typer

from benchmarks.offline_gpu import ARCHITECTURES, Report, offline_gpu, report
from benchmarks.roofline import BANDWIDTH_SHARE, GPUS, LAUNCH_SECONDS, PEAK_SHARE, Work, bound, predicted_seconds
from zq_compiler.analysis.kernel_cases import KernelCase, cases

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
FORMULAS = {
    "quantize_per_token": "`a = max(|x|)` of a row, `q = round((x / a) / (1/127))`, `scale = a / 127`",
    "norm_quantize": "`h = x + residual`, `y = norm(h)`, `q, scale` token-wise of y",
    "embedding_layer_norm_quantize": "`h = table[ids] + others`, `q, scale` token-wise of `LayerNorm(h)`",
    "gelu_quantize": "`q, scale` token-wise of `gelu(x)`",
    "gelu_quantize_static": "`q = round(gelu(x) / s)`, a scale a feature",
    "silu_mul_quantize": "`q, scale` token-wise of `silu(gate) * up`",
    "int8_linear": "`Y = (Xq Wq^T) * s_w * s_x + b`, sums in int32",
    "int8_linear_gelu_quantize": "`q = round(gelu((Xq Wq^T) * s_w * s_x + b) / s)`",
    "int8_linear_low_rank": "`Y = (Xq Wq^T) * s_w * s_x + b + H U^T`",
    "w4a8_linear": "`Y = (sum_g (Xq_g Wq_g^T) * s_g) * s_x + b`, sums of a group in int32",
    "weight_only_linear": "`Y = X W^T + b`, `W = (code - zero) * s_g` in registers",
    "fp8_linear": "`Y = (sum_g (Xq_g Wq_g^T) * s_g) * s_x + b`, E4M3",
    "grouped_int8_linear": "`int8_linear` of each expert's rows",
    "softmax_quantize": "`P = round(exp(A - max) / sum / s)`",
    "int8_attention": "`S = Q K^T`, `P = round(255 exp(S - max))`, `O = P V`, sums in int32",
    "cached_attention": "`O = softmax(Q K^T) V` of packed keys and values",
}
HEADER = f"""# The CUDA kernels

Written by `python -m benchmarks.kernel_cards`, from what Triton {triton.__version__} compiles without a GPU.
*bytes* are the least that must be moved. Registers, shared memory, instructions and blocks on a streaming
multiprocessor (SM) are read off the machine code of the shape's tiles; *loop* is the longest innermost loop's
instructions, those of tensor cores in brackets. Kernels of more than one launch have one row for each.

**Times are predictions, of which none was measured**: `max(bytes / ({BANDWIDTH_SHARE} bandwidth), operations /
({PEAK_SHARE} peak)) + {1e6 * LAUNCH_SECONDS:.0f} us`, beside the same formula of what torch does in float16 (cuBLAS for
linears). `zq bench --device cuda` measures them."""


def reports(case: KernelCase, architecture: int) -> list[Report]:
    """Of each of its launches."""
    with offline_gpu(architecture) as gpu:
        case.run(*case.arguments("meta"))
    return [report(launch) for launch in gpu.launches]


def page(chosen: list[KernelCase]) -> Iterator[str]:
    """Its lines."""
    yield HEADER
    for op, group in groupby(sorted(chosen, key=lambda case: list(FORMULAS).index(case.op)), key=lambda case: case.op):
        yield from ("", f"## {op}", "", FORMULAS[op])
        for case in group:
            with offline_gpu(89):  # whose weights of FP8 are bytes
                ours, floats = case.bytes, case.float_bytes
            yield from ("", f"**{case.shape}**: {ours:,} bytes, in float16 {floats:,}.", "")
            yield from _predictions(Work(ours, case.operations, case.operands), Work(floats, case.operations))
            yield from ("", "| | kernel | blocks | warps | registers | shared | an SM | instructions | loop | spills |")
            yield "|---|---|---|---|---|---|---|---|---|---|"
            for architecture in ARCHITECTURES:
                yield from (_row(found) for found in reports(case, architecture))


def _predictions(ours: Work, theirs: Work) -> Iterator[str]:
    yield "| predicted | ours, us | waits for | float16, us | ratio |"
    yield "|---|---|---|---|---|"
    for gpu in GPUS:
        a, b = predicted_seconds(ours, gpu), predicted_seconds(theirs, gpu)
        yield f"| {gpu.name} | {1e6 * a:.1f} | {bound(ours, gpu)} | {1e6 * b:.1f} | {b / a:.2f} |"


def _row(found: Report) -> str:
    loop = found.loops[0] if found.loops else None
    cores = {kind: n for kind, n in (loop.mix.items() if loop else ()) if kind.endswith("MMA")}
    said = f"{loop.instructions} ({', '.join(f'{n} {kind}' for kind, n in cores.items()) or 'none'})" if loop else "-"
    x, y, z = found.grid
    cells = [
        f"sm_{found.architecture}",
        f"`{found.kernel}`",
        f"{x * y * z}",
        f"{found.warps}",
        f"{found.registers}",
        f"{found.shared}",
        f"{found.occupancy.blocks}",
        f"{found.instructions}",
        said,
        f"{found.spill_stores + found.spill_loads}",
    ]
    return f"| {' | '.join(cells)} |"


def main(only: Annotated[str | None, typer.Option(help="an op, whose part is printed and not written")] = None) -> None:
    """Writes the page."""
    chosen = [case for case in cases() if only in (None, case.op)]
    lines = "\n".join(page(chosen)) + "\n"
    if only is not None:
        print(lines)
    else:
        PAGE.write_text(lines)


if __name__ == "__main__":
    typer.run(main)
