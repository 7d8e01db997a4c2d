"""What INT8 linears compile to: tensor cores fed by asynchronous copies of 16 bytes, and nothing spilled."""

from __future__ import annotations

import pytest
import torch

from benchmarks.offline_gpu import ARCHITECTURES, Launch, Report, offline_gpu, report
from zq_compiler.kernels.cuda import grouped_linear, int8_linear
from zq_compiler.kernels.cuda.low_rank_linear import low_rank_hidden

HALF = torch.float16
# Instructions of the main loop of (architecture, BLOCK_M, BLOCK_N, BLOCK_K), as they were when this was written.
LOOPS = {
    (80, 16, 64, 256): 95,
    (80, 64, 64, 128): 113,
    (80, 128, 128, 64): 84,
    (89, 16, 32, 256): 72,
    (89, 128, 128, 64): 84,
    (89, 128, 256, 64): 127,
    (90, 16, 32, 256): 73,
    (90, 64, 64, 128): 85,
    (90, 128, 128, 128): 89,
    (90, 128, 256, 128): 109,
    (100, 16, 32, 256): 76,
    (100, 128, 128, 128): 143,
    (100, 128, 256, 64): 128,
    (120, 16, 32, 256): 73,
    (120, 128, 128, 64): 83,
}


def meta(*shape, dtype=torch.int8):
    return torch.empty(*shape, dtype=dtype, device="meta")


def operands(m, n, k):
    scales = meta(m, 1, dtype=torch.float32), meta(n, 1, dtype=torch.float32)
    return meta(m, k), scales[0], meta(n, k), scales[1], meta(n, dtype=HALF)


def launched(architecture, op, *arguments) -> list[tuple[Launch, Report]]:
    with offline_gpu(architecture) as gpu:
        op(*arguments)
    return [(launch, report(launch)) for launch in gpu.launches]


def check(launch: Launch, seen: Report) -> None:
    block = [launch.arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    case = f"sm_{seen.architecture} {block}: {seen.registers} registers, {seen.loops}"
    assert seen.spill_stores == seen.spill_loads == seen.stack == 0, case
    assert seen.occupancy.blocks >= 1, case
    assert seen.count("LDGSTS") == seen.count("LDGSTS.128") > 0, case
    wgmma = seen.architecture == 90 and block[0] >= 64
    (loop,) = [loop for loop in seen.loops if loop.count("IMMA", "IGMMA")]
    products = loop.count("IMMA") * 16 * 8 * 32 * seen.warps
    assert loop.count("IGMMA") and not products if wgmma else products == block[0] * block[1] * block[2], case
    assert loop.count("LDSM") or wgmma, case
    assert not loop.count("PRMT", "LDG", "STS", "LDL"), case
    assert loop.instructions <= LOOPS[seen.architecture, *block], case


def stores(launch: Launch, seen: Report, bytes_each: int) -> None:
    """A thread stores 16 bytes at a time, or all that it has of the tile."""
    of_a_thread = launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"] * bytes_each // (32 * seen.warps)
    assert seen.count("STG") == seen.count(f"STG.{8 * min(of_a_thread, 16)}") > 0, seen.mix


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8192])
def test_floats_out(m, architecture):
    ((launch, seen),) = launched(architecture, int8_linear.int8_linear, *operands(m, 4096, 4096), HALF)
    assert launch.arguments["BLOCK_M"] == (16 if m == 1 else 128)
    check(launch, seen)
    stores(launch, seen, 2)


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_integers_out_behind_a_gelu(architecture):
    given = *operands(512, 3072, 768), HALF, "none", meta(1, 3072, dtype=torch.float32)
    ((launch, seen),) = launched(architecture, int8_linear.int8_linear_gelu_quantize, *given)
    assert launch.arguments["BLOCK_M"] * launch.arguments["BLOCK_N"] == 128 * 128
    check(launch, seen)
    stores(launch, seen, 1)


@pytest.mark.parametrize("architecture", [80, 90])
def test_parts_of_k(architecture):
    partial, finish = launched(architecture, int8_linear.int8_linear_quantize, *operands(128, 768, 3072))
    check(*partial)
    stores(*partial, 4)
    assert partial[0].grid[1] == finish[0].arguments["SPLIT_K"] > 1
    seen = finish[1]
    assert seen.spill_stores == 0 and seen.occupancy.blocks >= 2
    assert seen.count("LDG.128") >= finish[0].arguments["SPLIT_K"]
    stores(*finish, 1)


@pytest.mark.parametrize(("m", "dtype"), [(512, HALF), (8192, torch.float32)])
def test_a_residual_is_read_as_wide(m, dtype):
    given = *operands(m, 3072, 768), meta(m, 3072, dtype=dtype), dtype
    ((launch, seen),) = launched(89, int8_linear.int8_linear_add, *given)
    check(launch, seen)
    stores(launch, seen, dtype.itemsize)
    assert seen.count("LDG.128") >= seen.count("STG.128")


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_low_rank_branch_in_the_same_kernel(architecture):
    low_rank = meta(8192, 16, dtype=HALF), meta(4096, 16, dtype=HALF), None, HALF
    ((launch, seen),) = launched(architecture, int8_linear.int8_linear_low_rank, *operands(8192, 4096, 4096), *low_rank)
    check(launch, seen)
    stores(launch, seen, 2)
    ((_, hidden),) = launched(architecture, low_rank_hidden, meta(8192, 4096, dtype=HALF), meta(16, 4096, dtype=HALF))
    assert hidden.spill_stores == 0 and hidden.count("LDGSTS") == hidden.count("LDGSTS.128") > 0
    assert set(hidden.tensor_cores) == {kind for kind in seen.tensor_cores if kind not in ("IMMA", "IGMMA")} != set()


@pytest.mark.parametrize(("n", "k"), [(50257, 768), (770, 770)], ids=["vocabulary", "no multiple of 16"])
def test_odd_sizes_spill_nothing(n, k):
    ((_, seen),) = launched(80, int8_linear.int8_linear, *operands(8192, n, k), HALF)
    assert seen.spill_stores == 0 and seen.occupancy.blocks >= 1 and seen.count("IMMA") > 0
    assert (seen.count("LDGSTS.128") > 0) == (k % 16 == 0), "rows that do not begin at 16 bytes are read byte by byte"


@pytest.mark.parametrize("architecture", [80, 90])
def test_experts(architecture):
    x, x_scale, _, _, _ = operands(4096, 4096, 4096)
    w, w_scale, ends = meta(8, 4096, 4096), meta(8, 4096, dtype=torch.float32), meta(8, dtype=torch.int32)
    given = x, x_scale, w, w_scale, ends, HALF
    ((launch, seen),) = launched(architecture, grouped_linear.grouped_int8_linear, *given)
    check(launch, seen)
    stores(launch, seen, 2)
