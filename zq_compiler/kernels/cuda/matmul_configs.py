"""Tiles of matrix products that no file has timed: the least time by a roofline of one streaming multiprocessor (SM).

A program takes, for each K, the larger of what its tensor cores need for BLOCK_M * BLOCK_N products and what its share
of the cache needs for its two operands; programs run in waves of one an SM; no product is faster than memory. SPLIT_K
lets several programs sum parts of K where a wave would leave SMs idle, for a workspace and one more launch.

Rates are assumptions that only rank tiles. Nothing here was timed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .configs import Config, Problem


@dataclass(frozen=True)
class Chip:
    """An architecture, by its chip of most SMs; rates of one SM and one clock.

    Args:
        sms: how many.
        shared: bytes of shared memory that a program may have.
        macs: products of INT8, or of FP8, added; of 16 bits half as many.
        cache: bytes from the second-level cache.
        memory: bytes from memory.
        wgmma: whether tensor cores read shared memory, 64 rows at a time.
    """

    sms: int
    shared: int
    macs: int
    cache: float
    memory: float
    wgmma: bool = False


CHIPS = {
    80: Chip(sms=108, shared=166912, macs=2048, cache=40, memory=13.4),
    86: Chip(sms=84, shared=101376, macs=1024, cache=16, memory=6.5),
    89: Chip(sms=128, shared=101376, macs=1024, cache=16, memory=3.1),
    90: Chip(sms=132, shared=232448, macs=4096, cache=32, memory=14.5, wgmma=True),
    100: Chip(sms=148, shared=232448, macs=2048, cache=32, memory=28.0),  # INT8 by mma.sync
    120: Chip(sms=170, shared=101376, macs=1024, cache=16, memory=4.4),
}
SMALLEST = Chip(sms=48, shared=65536, macs=1024, cache=16, memory=4.0)  # in place of one unknown
FILL = 1000  # clocks before a program's first product and after its last
PROGRAM = 1024  # bytes of shared memory that the system takes of each program
CACHED = 32 << 20  # bytes that the second-level cache of any of these keeps
LAUNCH = 2000  # clocks of a second kernel
# BLOCK_M, BLOCK_N, warps
TILES = (
    *((16, 32, 4), (16, 64, 4), (16, 128, 4), (32, 64, 4), (32, 128, 4)),
    *((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8)),
)
SPLITS = (1, 2, 4, 8, 16)
MOST_STAGES = 5


def matmul_config(
    problem: Problem,
    architecture: int,
    *,
    x_bytes: float = 1,
    w_bytes: float = 1,
    most_k: int = 256,
    largest_tile: int = 128 * 256,
    split: bool = True,
    products: int = 1,
) -> Config:
    """A formula for `configs.choose`, by what `functools.partial` binds.

    Args:
        problem: the product `[m, k] x [k, n]`; m counts as its bucket.
        architecture: such as 90.
        x_bytes, w_bytes: bytes an element of either operand, as stored: 0.5 of packed INT4.
        most_k: the largest BLOCK_K, such as a group of scales.
        largest_tile: the largest BLOCK_M * BLOCK_N, for kernels that keep more than one such tile in registers.
        split: whether the kernel can split K.
        products: how many such products a launch computes.

    Returns:
        BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M (rows of tiles that take turns, for the cache), SPLIT_K, num_warps and
        num_stages.

    >>> matmul_config(Problem("int8_linear", 8192, 4096, 4096, "float16"), 90)["BLOCK_M"]
    128
    """
    shape = problem.bucket, problem.n, problem.k, products
    return dict(_choice(*shape, architecture, x_bytes, w_bytes, most_k, largest_tile, split))


@functools.cache
def _choice(
    m: int,
    n: int,
    k: int,
    products: int,
    architecture: int,
    x_bytes: float,
    w_bytes: float,
    most_k: int,
    largest_tile: int,
    split: bool,
) -> Config:
    chip = CHIPS.get(architecture, SMALLEST)
    choices: list[tuple[float, float, int, Config]] = []
    least = products * (m * k * x_bytes + n * k * w_bytes) / (chip.memory * chip.sms)
    for block_m, block_n, warps in TILES:
        if block_m * block_n > largest_tile or (block_m >= 2 * m and block_m > 16):
            continue
        block_k, stages = _depth(chip, block_m, block_n, warps, x_bytes, w_bytes, most_k)
        multiplies = block_m * block_n * max(x_bytes, w_bytes) / chip.macs
        operands = (min(block_m, m) * x_bytes + block_n * w_bytes) / chip.cache
        for split_k in SPLITS if split else (1,):
            steps = math.ceil(math.ceil(k / block_k) / split_k)
            if split_k > 1 and steps < stages:
                continue
            programs = math.ceil(m / block_m) * math.ceil(n / block_n) * split_k * products
            waves = math.ceil(programs / chip.sms)
            clocks = waves * (FILL + steps * block_k * max(multiplies, operands))
            sums = _reduction(chip, split_k * m * n * products) if split_k > 1 else 0
            config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "SPLIT_K": split_k}
            config |= {"num_warps": warps, "num_stages": stages}
            choices.append((max(clocks, least) + sums, clocks, len(choices), config))
    return min(choices)[-1]


def _reduction(chip: Chip, partial_sums: int) -> float:
    """Clocks to write and to read so many words, and of the launch that adds them."""
    rate = chip.cache if 4 * partial_sums <= CACHED else chip.memory
    return LAUNCH + 8 * partial_sums / (rate * chip.sms)


def _depth(
    chip: Chip, block_m: int, block_n: int, warps: int, x_bytes: float, w_bytes: float, most_k: int
) -> tuple[int, int]:
    """BLOCK_K and stages: the most bytes a row with three buffers, of which two programs fit on an SM."""
    large = block_m * block_n > 128 * 128  # one of these has all registers, and mma.sync's operands are in them too
    shared = chip.shared if large else chip.shared // 2
    asynchronous = chip.wgmma and block_m >= 64  # its operands stay in shared memory: a buffer for each stage
    most_bytes = 256 if block_m <= 32 else 64 if large and not asynchronous else 128
    for block_k in (256, 128, 64, 32, 16):
        if block_k > most_k or block_k * max(x_bytes, w_bytes) > most_bytes:
            continue
        if block_k < most_k and block_k * min(block_m * x_bytes, block_n * w_bytes) < warps * 512:
            break  # a thread would copy less than 16 bytes of an operand
        buffers = int((shared - PROGRAM) // (block_k * (block_m * x_bytes + block_n * w_bytes)))
        deepest = block_k, max(2, min(buffers if asynchronous else buffers + 1, MOST_STAGES))
        if buffers >= 3:
            break
    return deepest
