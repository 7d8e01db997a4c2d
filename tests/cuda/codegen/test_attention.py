"""What the attention kernels compile to: tensor cores for all products, wide asynchronous copies, nothing spilled."""

from __future__ import annotations

import pytest
import torch

from benchmarks.offline_gpu import ARCHITECTURES, Launch, Report, offline_gpu, report
from zq_compiler.kernels.cuda.cached_attention import cached_attention
from zq_compiler.kernels.cuda.int8_attention import int8_attention

B, H, H_KV, T = 2, 4, 2, 512
# Instructions of the four loops: both sweeps, each over tiles at an edge and over whole ones; by architecture, head
# dim and form, as they were when this was written.
LOOPS: dict[tuple[int, int, str], tuple[int, ...]] = {
    (100, 128, "token-wise"): (463, 432, 147, 132),
    (100, 64, "static"): (937, 688, 687, 422),
    (100, 64, "token-wise"): (564, 510, 134, 125),
    (120, 128, "token-wise"): (455, 428, 144, 129),
    (120, 64, "static"): (974, 772, 644, 429),
    (120, 64, "token-wise"): (600, 540, 141, 135),
    (80, 128, "static"): (600, 516, 435, 331),
    (80, 128, "token-wise"): (485, 449, 148, 135),
    (80, 256, "static"): (742, 605, 478, 365),
    (80, 256, "token-wise"): (626, 566, 190, 158),
    (80, 32, "static"): (917, 770, 669, 483),
    (80, 32, "token-wise"): (573, 527, 154, 143),
    (80, 64, "static"): (1055, 799, 726, 456),
    (80, 64, "token-wise"): (605, 553, 142, 138),
    (89, 128, "token-wise"): (479, 453, 148, 133),
    (89, 64, "static"): (1056, 801, 709, 462),
    (89, 64, "token-wise"): (604, 553, 142, 137),
    (90, 128, "static"): (1016, 726, 717, 423),
    (90, 128, "token-wise"): (534, 478, 150, 121),
    (90, 256, "static"): (592, 458, 399, 275),
    (90, 256, "token-wise"): (378, 339, 134, 110),
    (90, 32, "token-wise"): (459, 406, 121, 109),
    (90, 32, "static"): (896, 771, 658, 407),
    (90, 64, "static"): (922, 668, 652, 411),
    (90, 64, "token-wise"): (492, 441, 129, 117),
}
# Of the loops over packed tokens and over those in floats; by architecture, head dim, bits and dtype.
CACHED_LOOPS: dict[tuple[int, int, int, torch.dtype], tuple[int, ...]] = {
    (80, 128, 8, torch.bfloat16): (1324, 401),
    (89, 128, 8, torch.bfloat16): (1340, 401),
    (90, 128, 8, torch.bfloat16): (1376, 396),
    (100, 128, 8, torch.bfloat16): (1237, 365),
    (120, 128, 8, torch.bfloat16): (1341, 404),
    (90, 128, 4, torch.float16): (1270, 370),
    (90, 128, 2, torch.float16): (1237, 367),
    (80, 64, 8, torch.bfloat16): (829, 325),
    (80, 64, 8, torch.float32): (699, 406),
    (80, 256, 8, torch.bfloat16): (1297, 378),
    (80, 256, 8, torch.float32): (1587, 923),
}
# Bytes a thread spills: queries in float32, whose products are of three TF32 each, with the widest heads.
SPILLED = {(80, 256, 8, torch.float32): 176}
OTHERS = [(80, 32), (80, 256), (90, 32), (90, 256)]
CASES = [
    *((architecture, d, "token-wise") for architecture in ARCHITECTURES for d in (64, 128)),
    *((architecture, 64, "static") for architecture in ARCHITECTURES),
    *((80, d, "static") for d in (32, 128, 256)),
    *((90, d, "static") for d in (32, 128, 256)),
    *((architecture, d, "token-wise") for architecture, d in OTHERS),
]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(architecture: int, op, *arguments) -> list[tuple[Launch, Report]]:
    with offline_gpu(architecture) as gpu:
        op(*arguments)
    return [(launch, report(launch)) for launch in gpu.launches]


def within(loops: tuple[int, ...], budget: tuple[int, ...]) -> bool:
    return len(loops) == len(budget) and all(a <= 1.1 * b for a, b in zip(loops, budget, strict=True))


@pytest.mark.parametrize(("architecture", "d", "form"), CASES)
def test_int8_attention(architecture, d, form):
    """Token-wise to INT8; static with a mask of floats and a causal one, to float16: what takes most registers."""

    def heads(h: int) -> torch.Tensor:
        return meta(B, T, h * d, dtype=torch.int8).view(B, T, h, d).transpose(1, 2)

    static, scale = form == "static", meta(1, H, 1, 1)
    mask, step, out_dtype = (meta(B, 1, T, T), scale, torch.float16) if static else (None, None, torch.int8)
    operands = heads(H), heads(H_KV), heads(H_KV), scale, mask, static, step, meta(1, H, 1, d), out_dtype
    ((launch, seen),) = launched(architecture, int8_attention, *operands)
    block_m, block_n = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]
    assert launch.programs == B * H * T // block_m
    assert seen.spill_stores == seen.spill_loads == 0
    assert seen.occupancy.blocks >= 1
    products = [loop.count("IMMA", "IGMMA") for loop in seen.loops]
    whole_first, whole_second = (
        min((loop for loop, n in zip(seen.loops, products, strict=True) if n == of_sweep), key=lambda x: x.instructions)
        for of_sweep in (min(products), max(products))
    )
    if architecture == 90:
        of_scores = block_m // 64 * d // 32 * 4 // seen.warps
        assert whole_first.count("IGMMA") == of_scores
        assert whole_second.count("IGMMA") >= of_scores + 2 * (block_m // 64 * block_n // 32 * 4 // seen.warps)
    else:
        scores = block_m * block_n * d // (16 * 8 * 32 * seen.warps)
        assert whole_first.count("IMMA") == scores and whole_second.count("IMMA") == 3 * scores
    of_a_thread = min(16, block_n * d // (32 * seen.warps))  # bytes of the keys' tile
    assert seen.count(f"LDGSTS.{8 * of_a_thread}") > 0 and not seen.count("LDGSTS.32", "LDG.8", "LDG.16")
    assert seen.count("STG") == seen.count("STG.128")
    assert not any(loop.count("STG", "LDL", "STL") for loop in seen.loops)
    loops = tuple(loop.instructions for loop in seen.loops)
    print(f"    {(architecture, d, form)}: {loops},")
    assert within(loops, LOOPS[architecture, d, form])


@pytest.mark.parametrize("form", ["token-wise", "static"])
def test_a_first_sweep_of_integers_converts_nothing(form):
    """Token-wise without a mask of floats, the largest int32 sum is enough."""
    d, static, scale = 64, form == "static", meta(1, H, 1, 1)
    heads = meta(B, H, T, d, dtype=torch.int8)
    operands = heads, heads, heads, scale, None, False, scale if static else None, scale, torch.int8
    ((_, seen),) = launched(90, int8_attention, *operands)
    assert bool(seen.loops[-1].count("I2FP", "MUFU")) == static


def cache(t: int, d: int, bits: int, dtype: torch.dtype, tokens: int = 4096, new: int = 128, group: int = 32) -> tuple:
    codes = meta(B, 8, tokens, d * bits // 8, dtype=torch.uint8)
    of_tokens = meta(B, 8, tokens // group, d, dtype=torch.float16)
    of_channels = meta(B, 8, tokens, d // group, dtype=torch.float16)
    floats = meta(B, 8, new, d, dtype=dtype)
    packed = codes, of_tokens, of_tokens, codes, of_channels, of_channels
    return meta(B, 32, t, d, dtype=dtype), *packed, floats, floats, None, False, 0.1, bits, group


@pytest.mark.parametrize(
    ("architecture", "d", "bits", "dtype"),
    [
        *((architecture, 128, 8, torch.bfloat16) for architecture in ARCHITECTURES),
        *((90, 128, bits, torch.float16) for bits in (4, 2)),
        *((80, d, 8, dtype) for d in (64, 256) for dtype in (torch.bfloat16, torch.float32)),
    ],
)
def test_cached_attention(architecture, d, bits, dtype):
    (launch, seen), (_, combined) = launched(architecture, cached_attention, *cache(1, d, bits, dtype))
    heads, parts, row_blocks = launch.grid
    assert (heads, row_blocks) == (B * 8, 1) and parts > 1, "four heads share a tile; tokens are split"
    assert seen.spill_stores == SPILLED.get((architecture, d, bits, dtype), 0)
    assert combined.spill_stores == 0 and combined.count("LDG.128") and combined.occupancy.blocks >= 2
    assert seen.occupancy.blocks >= (1 if dtype is torch.float32 else 2)
    packed, floats = seen.loops
    assert packed.count("HMMA") == floats.count("HMMA") > 0
    assert packed.count("LDGSTS.128") and floats.count("LDGSTS.128")
    assert not packed.count("STG") and not floats.count("STG")
    loops = packed.instructions, floats.instructions
    print(f"    {(architecture, d, bits, dtype)}: {loops},")
    assert within(loops, CACHED_LOOPS[architecture, d, bits, dtype])


def test_heads_that_share_keys_read_them_once():
    """As many programs for two heads of queries a head of keys as for four."""
    query, *rest = cache(1, 64, 8, torch.float16)
    with offline_gpu(90) as gpu:
        cached_attention(query[:, :16], *rest)
        cached_attention(query, *rest)
    assert gpu.launches[0].grid == gpu.launches[2].grid


def test_few_tokens_or_many_heads_are_not_split():
    ((launch, _),) = launched(90, cached_attention, *cache(1, 64, 8, torch.float16, tokens=128, new=1))
    assert launch.grid == (B * 8, 1, 1)
