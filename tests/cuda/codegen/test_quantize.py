"""What token-wise quantize compiles to: wide accesses, no spills, registers for two programs, few instructions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.offline_gpu import ARCHITECTURES, Report, offline_gpu, report
from zq_compiler.kernels.cuda.quantize import quantize_per_token

# Instructions of the whole kernel, by K and `rotated`, in the order of ARCHITECTURES; of bfloat16, which takes most.
INSTRUCTIONS = {
    (768, False): (542, 543, 540, 428, 551),
    (4096, False): (560, 561, 560, 448, 572),
    (16384, False): (570, 573, 572, 460, 585),
    (768, True): (702, 703, 700, 586, 703),
    (4096, True): (720, 721, 720, 653, 732),
    (16384, True): (1311, 1313, 1295, 1198, 1402),
}
# Bytes that a thread loads again, of the longest rows: sums of two pairs at a time want their registers side by side.
SPILLED = {(16384, True, 100): 4}
CASES = [
    *((k, dtype, False) for k in (768, 4096, 16384) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((k, torch.bfloat16, True) for k in (768, 4096, 16384)),
]


def compiled(k: int, dtype: torch.dtype, rotated: bool, architecture: int) -> Report:
    with offline_gpu(architecture) as gpu:
        quantize_per_token(torch.empty(8192, k, dtype=dtype, device="meta"), rotated)
    (launch,) = gpu.launches
    assert launch.programs == 8192 and launch.arguments["x_ptr"].shape == (8192, k)
    return report(launch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("k", "dtype", "rotated"), CASES)
def test_rows(k, dtype, rotated, architecture):
    seen = compiled(k, dtype, rotated, architecture)
    assert seen.count("LDG") == seen.count("LDG.128") > 0
    assert seen.count("STG.128") == seen.count("STG") - 1 > 0, "all but the scale"
    assert seen.spill_stores == 0
    assert seen.spill_loads == SPILLED.get((k, rotated, architecture), 0)
    assert seen.occupancy.blocks >= 2
    assert seen.count("LDS", "STS") <= 4, "only the ranges that warps have found pass through shared memory"
    assert not seen.loops, "a row is read once"
    budget = INSTRUCTIONS[k, rotated][ARCHITECTURES.index(architecture)]
    assert seen.instructions <= 1.1 * budget


def test_a_rotation_adds_its_sums_and_a_quarter():
    """Four sums and a product an element, 32 elements a thread: nothing is moved between threads."""
    plain, rotated = (compiled(4096, torch.bfloat16, r, 90) for r in (False, True))
    assert rotated.instructions - plain.instructions == 5 * 32
    for kind in ("SHFL", "LDS", "STS", "BAR"):
        assert rotated.count(kind) == plain.count(kind)
