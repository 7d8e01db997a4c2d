"""What low-bit linears compile to: tensor cores of the values' width, weights copied 16 bytes at a time and decoded in
registers, nothing spilled."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.offline_gpu import ARCHITECTURES, Launch, Report, offline_gpu, report
from zq_compiler.kernels.cuda.fp8_linear import fp8_linear
from zq_compiler.kernels.cuda.w4a8_linear import w4a8_linear
from zq_compiler.kernels.cuda.weight_layouts import layout_of
from zq_compiler.kernels.cuda.weight_only_linear import weight_only_linear

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
N = K = 4096
# Instructions of the main loop, by what is compiled and for which architecture, as they were when this was written.
LOOPS = {
    ("weight_only", "int4", 128, "float16", 80, 16): 199,
    ("weight_only", "int4", 128, "float16", 89, 16): 206,
    ("weight_only", "int4", 128, "float16", 90, 16): 208,
    ("weight_only", "int4", 128, "float16", 100, 16): 208,
    ("weight_only", "int4", 128, "float16", 120, 16): 206,
    ("weight_only", "int4", 128, "float16", 80, 128): 371,
    ("weight_only", "int4", 128, "float16", 89, 128): 359,
    ("weight_only", "int4", 128, "float16", 90, 128): 373,
    ("weight_only", "int4", 128, "float16", 100, 64): 487,
    ("weight_only", "int4", 128, "float16", 120, 32): 391,
    ("weight_only", "int8", 64, "float16", 80, 16): 214,
    ("weight_only", "int4_asym", 64, "float16", 80, 16): 226,
    ("weight_only", "int2", 64, "float16", 80, 16): 218,
    ("weight_only", "fp6_e3m2", 64, "bfloat16", 90, 16): 451,
    ("weight_only", "fp6_e3m2", 64, "float16", 80, 16): 328,
    ("weight_only", "fp4_e2m1", 64, "bfloat16", 90, 16): 407,
    ("weight_only", "fp4_e2m1", 64, "float16", 80, 16): 286,
    ("w4a8", "int4", 128, "float16", 80, 16): 123,
    ("w4a8", "int4", 128, "float16", 89, 16): 125,
    ("w4a8", "int4", 128, "float16", 90, 16): 119,
    ("w4a8", "int4", 128, "float16", 100, 16): 110,
    ("w4a8", "int4", 128, "float16", 120, 16): 116,
    ("w4a8", "int4", 128, "float16", 80, 128): 375,
    ("w4a8", "int4", 128, "float16", 89, 128): 375,
    ("w4a8", "int4", 128, "float16", 90, 128): 310,
    ("w4a8", "int4", 128, "float16", 100, 128): 312,
    ("w4a8", "int4", 128, "float16", 120, 64): 381,
    ("w4a8", "int4", 0, "float16", 90, 128): 105,
    ("w4a8", "int4", 32, "float16", 90, 128): 492,
    ("w4a8", "int4", 256, "float16", 90, 128): 433,
    ("w4a8", "int2", 64, "float16", 90, 128): 528,
    ("fp8", "fp8_e4m3", 0, "float16", 80, 16): 184,
    ("fp8", "fp8_e4m3", 0, "float16", 89, 16): 68,
    ("fp8", "fp8_e4m3", 0, "float16", 90, 16): 86,
    ("fp8", "fp8_e4m3", 0, "float16", 100, 16): 105,
    ("fp8", "fp8_e4m3", 0, "float16", 120, 16): 58,
    ("fp8", "fp8_e4m3", 0, "float16", 80, 128): 368,
    ("fp8", "fp8_e4m3", 0, "float16", 89, 128): 181,
    ("fp8", "fp8_e4m3", 0, "float16", 90, 128): 148,
    ("fp8", "fp8_e4m3", 0, "float16", 100, 128): 97,
    ("fp8", "fp8_e4m3", 0, "float16", 120, 128): 128,
    ("fp8", "fp4_e2m1", 128, "float16", 89, 128): 371,
    ("fp8", "fp4_e2m1", 128, "float16", 90, 128): 278,
    ("fp8", "fp6_e3m2", 128, "float16", 80, 32): 521,
    ("weight_only", "int8", 64, "bfloat16", 90, 16): 314,
    ("weight_only", "int4_asym", 64, "bfloat16", 90, 16): 328,
    ("weight_only", "int2", 64, "bfloat16", 90, 16): 331,
}


def meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight(name, group, word, scale=HALF):
    layout, groups = layout_of(name, group, word), K // group if group else 1
    row = -(-K // layout.unit) * sum(layout.words) * layout.span
    codes = meta(N, row, dtype=torch.uint8 if word == 8 else torch.int16)
    return codes, meta(groups, N, dtype=scale if group else FLOAT)


@functools.cache  # a decoding's two kernels are looked at by two tests
def launched(architecture, op, m, name, group, dtype=HALF, ranks=0) -> list[tuple[Launch, Report]]:
    bias = meta(N, dtype=dtype)
    branch = (meta(m, ranks, dtype=dtype), meta(N, ranks, dtype=HALF)) if ranks else ()
    with offline_gpu(architecture) as gpu:
        if op == "weight_only":
            x = meta(m, K, dtype=dtype)
            weight_only_linear(x, *weight(name, group, 16, torch.int32), bias, name, group, *branch)
        else:
            host, x_dtype, word = (w4a8_linear, torch.int8, 8) if op == "w4a8" else (fp8_linear, torch.float8_e4m3fn, 8)
            if op == "fp8" and architecture < 89:
                word = 16
            given = meta(m, K, dtype=x_dtype), meta(m, 1, dtype=FLOAT), *weight(name, group, word)
            host(*given, bias, name, group, dtype, *branch)
    return [(launch, report(launch)) for launch in gpu.launches]


def instruction(architecture, op, block_m, block_n):
    """The tensor cores' instruction, and how many products one thread block's has of it."""
    wide = block_n >= 64
    if op == "w4a8":
        return "IGMMA" if architecture == 90 and wide else "IMMA"
    if op == "fp8" and architecture >= 89:
        return {90: "QGMMA", 100: "UTCQMMA"}.get(architecture, "QMMA")
    return {90: "HGMMA", 100: "UTCHMMA"}.get(architecture, "HMMA") if wide else "HMMA"


def check(architecture, op, m, name, group, dtype=HALF) -> tuple[Launch, Report]:
    launch, seen = launched(architecture, op, m, name, group, dtype)[0]
    block_m, block_n = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]
    key = op, name, group, str(dtype).removeprefix("torch."), architecture, block_m
    case = f"{key} x {block_n}: {seen.registers} registers, {seen.loops}"
    assert seen.spill_stores == seen.spill_loads == seen.stack == 0, case
    assert seen.occupancy.blocks >= (2 if block_m == 16 else 1), case
    loop = max(seen.loops, key=lambda loop: loop.count("LDGSTS"))
    kind = instruction(architecture, op, block_m, block_n)
    assert loop.count(kind), case
    assert set(seen.tensor_cores) == {kind}, case
    # Weights are copied 16 bytes at a time; so are activations, where a tile has so many, and scales 4.
    words = sum(layout_of(name, group, launch.arguments["w_ptr"].element_size() * 8).words)
    assert loop.count("LDGSTS.128") >= words, case
    assert block_m <= 32 or loop.count("LDGSTS") - loop.count("LDGSTS.128") <= loop.count("LDGSTS.32") <= 4, case
    assert not loop.count("LDG.8", "LDG.32", "LDG.64", "LDG.128", "STS.64", "STS.128", "LDL", "STL"), case
    assert loop.count("PRMT") <= 2, case  # codes are not taken one by one
    assert seen.count("STG") == seen.count("STG.128", "STG.64"), case
    assert loop.instructions <= LOOPS[key], case
    return launch, seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8192])
def test_int4_weights_alone(m, architecture):
    check(architecture, "weight_only", m, "int4", 128)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("name", ["int8", "int4_asym", "int2", "fp6_e3m2", "fp4_e2m1"])
def test_other_weights_alone(name, dtype):
    check(90 if dtype is BF16 else 80, "weight_only", 1, name, 64, dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8192])
def test_w4a8(m, architecture):
    check(architecture, "w4a8", m, "int4", 128)


@pytest.mark.parametrize(("name", "group"), [("int4", 0), ("int4", 32), ("int4", 256), ("int2", 64)])
def test_other_groups_of_w4a8(name, group):
    check(90, "w4a8", 8192, name, group)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8192])
def test_fp8(m, architecture):
    check(architecture, "fp8", m, "fp8_e4m3", 0)


@pytest.mark.parametrize(("name", "architecture"), [("fp4_e2m1", 89), ("fp4_e2m1", 90), ("fp6_e3m2", 80)])
def test_narrower_floats_times_fp8(name, architecture):
    check(architecture, "fp8", 512, name, 128)


def test_float32_is_multiplied_as_it_is():
    """No tensor cores: they would drop bits."""
    _, seen = launched(90, "weight_only", 16, "int4", 128, FLOAT)[0]
    assert not seen.tensor_cores and seen.spill_stores == 0 and seen.occupancy.blocks >= 1


def test_parts_of_k_are_added():
    (launch, _), (adding, seen) = launched(90, "weight_only", 16, "int4", 128)
    assert launch.grid[1] == adding.arguments["SPLIT_K"] > 1
    assert seen.spill_stores == 0 and seen.occupancy.blocks >= 2
    assert seen.count("LDG.128") >= adding.arguments["SPLIT_K"] and seen.count("STG") == seen.count("STG.128")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8192])
@pytest.mark.parametrize(
    ("op", "name", "group"),
    [("weight_only", "int4", 128), ("w4a8", "int4", 128), ("w4a8", "int4", 0), ("fp8", "fp8_e4m3", 0)],
)
def test_a_low_rank_branch_in_the_same_kernel(op, name, group, m, architecture):
    """Nothing more is written, nothing spilled; where K is split, it is in the kernel that adds the parts."""
    plain = launched(architecture, op, m, name, group)
    with_branch = launched(architecture, op, m, name, group, HALF, 8)
    assert len(with_branch) == len(plain)
    for launch, seen in with_branch:
        assert seen.spill_stores == seen.spill_loads == seen.stack == 0, seen.registers
        assert seen.occupancy.blocks >= 2 or launch.warps == 8
        assert seen.count("STG") == seen.count("STG.128", "STG.64")
    float_products = {"HMMA", "HGMMA", "UTCHMMA"}
    (first, _), (last, adding) = with_branch[0], with_branch[-1]
    assert first.arguments["BLOCK_R"] == last.arguments["BLOCK_R"] == 16
    assert float_products & set(adding.tensor_cores)


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
@pytest.mark.parametrize("op", ["weight_only", "w4a8"])
def test_many_ranks_and_other_floats_spill_nothing(op, dtype):
    for m in (1, 8192):
        for _, seen in launched(90, op, m, "int4", 128, dtype, 64):
            assert seen.spill_stores == seen.spill_loads == 0
