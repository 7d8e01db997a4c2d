"""What a kernel can at best take on a GPU, from its bytes and its products: predictions, of which none was measured.

    time = max(bytes / (bandwidth * 0.88), operations / (peak * 0.65)) + 3 us

The shares of the peaks that a kernel reaches and the time of a launch are assumptions, the same for both sides of a
comparison. Peaks are those of the makers' data sheets, without sparsity, at boost clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BANDWIDTH_SHARE, PEAK_SHARE, LAUNCH_SECONDS = 0.88, 0.65, 3e-6


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Args:
        name: as its maker calls it.
        architecture: compute capability, such as 80.
        bandwidth: of its memory, in bytes a second.
        peak: operations a second of its tensor cores, by the operands' dtype; a multiply-add is two.
    """

    name: str
    architecture: int
    bandwidth: float
    peak: Mapping[str, float]


GPUS = (
    GPU("A100 SXM 80 GB", 80, 2.039e12, {"int8": 624e12, "float16": 312e12}),
    GPU("H100 SXM", 90, 3.35e12, {"int8": 1979e12, "float16": 989e12, "float8_e4m3fn": 1979e12}),
    GPU("RTX 4090", 89, 1.008e12, {"int8": 660.6e12, "float16": 330.3e12, "float8_e4m3fn": 660.6e12}),
)


@dataclass(frozen=True)
class Work:
    """What a kernel has to do at least.

    Args:
        bytes: to read and to write.
        operations: of tensor cores.
        operands: their dtype.
    """

    bytes: int
    operations: int = 0
    operands: str = "float16"


def _terms(work: Work, gpu: GPU) -> dict[str, float]:
    """Seconds of each; operands that the tensor cores have not are multiplied as float16."""
    peak = gpu.peak.get(work.operands, gpu.peak["float16"])
    memory = work.bytes / (gpu.bandwidth * BANDWIDTH_SHARE)
    return {"launch": LAUNCH_SECONDS, "memory": memory, "tensor cores": work.operations / (peak * PEAK_SHARE)}


def predicted_seconds(work: Work, gpu: GPU) -> float:
    """By the formula above.

    >>> round(1e6 * predicted_seconds(Work(2_039_000_000), GPUS[0]))
    1139
    """
    terms = _terms(work, gpu)
    return max(terms["memory"], terms["tensor cores"]) + terms["launch"]


def bound(work: Work, gpu: GPU) -> str:
    """What takes longest: `launch`, `memory` or `tensor cores`.

    >>> bound(Work(1000), GPUS[0]), bound(Work(1000, 10**15, "int8"), GPUS[0])
    ('launch', 'tensor cores')
    """
    terms = _terms(work, gpu)
    return max(terms, key=lambda name: terms[name])
