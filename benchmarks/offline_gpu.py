"""GPUs that are not there: Triton compiles for one and believes to launch, and what it compiled is read.

    with offline_gpu(90) as gpu:
        quantize_per_token(torch.empty(512, 768, dtype=torch.float16, device="meta"))
    print(report(gpu.launches[0]))

Host functions of `kernels/cuda` run as they are, on CPU or meta tensors: Triton specialises on the sizes and on the
addresses' alignment, compiles to a cubin, raises `OutOfResources` where the GPU has not enough, and in place of the
launch notes what it would have launched. Nothing runs, so results hold what was in memory.

`report` tells what the cubin takes and does, by Triton's own cuobjdump and nvdisasm and by ptxas' log. Needs neither a
driver nor a CUDA toolkit. One process either compiles or interprets: not with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia_compiler

from zq_compiler.kernels.cuda.matmul_configs import CHIPS

WARP = 32
REGISTERS = 65536  # of an SM
REGISTER_UNIT = 256  # that a warp gets a multiple of
SHARED_UNIT = 128
RESERVED_SHARED = 1024  # of each block, by the system


@dataclass(frozen=True)
class Limits:
    """What a streaming multiprocessor (SM) holds: warps, blocks, bytes of shared memory (CUDA C++ Programming Guide,
    technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    80: Limits(64, 32, 167936),
    86: Limits(48, 16, 102400),
    89: Limits(48, 24, 102400),
    90: Limits(64, 32, 233472),
    100: Limits(64, 32, 233472),
    120: Limits(48, 24, 102400),
}
ARCHITECTURES = (80, 89, 90, 100, 120)  # that kernels are proven on


# Launches


@dataclass(frozen=True)
class Binary:
    """A kernel in machine code, and ptxas' log of making it."""

    name: str
    cubin: bytes = field(repr=False)
    log: str = field(repr=False)


@dataclass(frozen=True)
class Launch:
    """What would have been launched.

    Args:
        arguments: by name, `tl.constexpr` ones too; of tensors their shape, strides and dtype, on meta.
        warps: of a block.
        shared: bytes of shared memory of a block.
    """

    kernel: str
    architecture: int
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    warps: int
    stages: int
    shared: int
    binary: Binary

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z


class OfflineGPU(DriverBase):
    """A driver of a GPU that is not there; `offline_gpu` installs it.

    Args:
        architecture: one of `LIMITS`, such as 90.

    Attributes:
        launches: in their order.
    """

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self.architecture, self.launches, self.log = architecture, list[Launch](), ""
        self.utils, self.launcher_cls = self, _Launcher

    # As `utils`
    def get_device_properties(self, device: int) -> dict[str, int]:
        chip = CHIPS[self.architecture]
        return {"max_shared_mem": chip.shared, "max_num_regs": REGISTERS, "multiprocessor_count": chip.sms}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Binary, Binary, int, int, int]:
        binary, self.log = Binary(name, cubin, self.log), ""
        registers, stack = _resources(cubin)
        return binary, binary, registers, stack // 4, min(1024, REGISTERS // (-(-registers // 8) * 8) // WARP * WARP)

    # As the driver. Triton keeps what it has compiled by device, so each architecture is a device of its own.
    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("a GPU that is not there cannot be timed")


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.names, self.metadata = src.fn.arg_names, metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        binary: Binary,
        packed: Any,
        hooked: Any,
        enter: Any,
        exit: Any,
        *args: Any,
    ) -> None:
        gpu, m = triton.runtime.driver.active, self.metadata
        arguments = {name: _on_meta(value) for name, value in zip(self.names, args, strict=True)}
        gpu.launches.append(
            Launch(m.name, gpu.architecture, (x, y, z), arguments, m.num_warps, m.num_stages, m.shared, binary)
        )


def _on_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@contextmanager
def offline_gpu(architecture: int) -> Iterator[OfflineGPU]:
    """Within, Triton compiles for an architecture and notes launches; what it compiles is kept out of its cache."""
    gpu, drivers = OfflineGPU(architecture), triton.runtime.driver

    def keep(log: str) -> None:
        gpu.log = log

    with ExitStack() as stack:
        for group in (knobs.cache, knobs.compilation, knobs.nvidia):
            stack.enter_context(group.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        knobs.compilation.always_compile = True  # what comes from a cache has no log
        knobs.nvidia.dump_ptxas_log = True  # to `print`
        stack.enter_context(patch.object(nvidia_compiler, "print", keep, create=True))
        stack.enter_context(patch.object(drivers, "_active", gpu))
        yield gpu


# Reports


@dataclass(frozen=True)
class Occupancy:
    """How many blocks an SM runs at a time, their warps, the share of the warps that it could run, and what limits."""

    blocks: int
    warps: int
    share: float
    limit: str


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and how many of each kind."""

    instructions: int
    mix: Counter[str]

    def count(self, *kinds: str) -> int:
        return _count(self.mix, kinds)


@dataclass(frozen=True)
class Report:
    """What a kernel takes and does on an architecture.

    Args:
        registers, stack: of a thread; the stack in bytes.
        spill_stores, spill_loads: bytes that a thread keeps in memory for want of registers, as ptxas counts.
        shared: bytes of a block.
        mix: how many of each kind of instruction are in the code. Kinds are SASS opcodes without modifiers; those
            of memory have the bits that a thread moves: `LDG.128`, `STG.8`, `LDGSTS.128`, `LDS.32`, `STL.64`.
        loops: the innermost, the longest first.
    """

    kernel: str
    architecture: int
    grid: tuple[int, int, int]
    warps: int
    stages: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    occupancy: Occupancy
    instructions: int
    mix: Counter[str]
    loops: tuple[Loop, ...]
    sass: str = field(repr=False)

    def count(self, *kinds: str) -> int:
        """Instructions of these kinds, such as `IMMA`, `LDG.128`, or `LDG` of any width."""
        return _count(self.mix, kinds)

    @property
    def tensor_cores(self) -> dict[str, int]:
        """Instructions of tensor cores, by kind: IMMA and HMMA are mma.sync, IGMMA wgmma, UTCQMMA tcgen05, ..."""
        return {kind: count for kind, count in self.mix.items() if kind.endswith("MMA")}


def report(launch: Launch) -> Report:
    """Reads a launch's cubin."""
    registers, stack = _resources(launch.binary.cubin)
    sass, mix, loops = _disassembly(launch.binary.cubin)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", launch.binary.log)
    if spills is None:
        raise RuntimeError(f"ptxas said nothing of spills of {launch.kernel}: {launch.binary.log!r}")
    return Report(
        launch.kernel,
        launch.architecture,
        launch.grid,
        launch.warps,
        launch.stages,
        registers,
        stack,
        int(spills[1]),
        int(spills[2]),
        launch.shared,
        occupancy(launch.architecture, registers, launch.shared, launch.warps),
        mix.total(),
        mix,
        loops,
        sass,
    )


def occupancy(architecture: int, registers: int, shared: int, warps: int) -> Occupancy:
    """Of blocks of so many warps, registers a thread and bytes of shared memory.

    >>> occupancy(90, registers=255, shared=0, warps=4)
    Occupancy(blocks=2, warps=8, share=0.125, limit='registers')
    """
    sm = LIMITS[architecture]
    of_a_warp = _multiple(registers * WARP, REGISTER_UNIT)
    blocks = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": REGISTERS // of_a_warp // 4 * 4 // warps,  # an SM has four parts, of which a warp takes one
        "shared memory": sm.shared // _multiple(shared + RESERVED_SHARED, SHARED_UNIT),
    }
    limit = min(blocks, key=lambda name: blocks[name])
    resident = blocks[limit] * warps
    return Occupancy(blocks[limit], resident, resident / sm.warps, limit)


def _multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _count(mix: Counter[str], kinds: tuple[str, ...]) -> int:
    return sum(count for kind, count in mix.items() if kind in kinds or kind.partition(".")[0] in kinds)


def _run(tool: Any, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool.path, option, path], capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=256)
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _run(knobs.nvidia.cuobjdump, "--dump-resource-usage", cubin))
    assert usage is not None
    return int(usage[1]), int(usage[2])


@functools.lru_cache(maxsize=256)
def _disassembly(cubin: bytes) -> tuple[str, Counter[str], tuple[Loop, ...]]:
    sass = _run(knobs.nvidia.nvdisasm, "-c", cubin)
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
    while instructions and instructions[-1].startswith(("NOP", "BRA")):  # behind the end, for alignment
        instructions.pop()
    kinds = [_kind(instruction) for instruction in instructions]
    jumps = [(re.search(r"^BRA\b.*`\((\.L_x_\d+)\)", each), at) for at, each in enumerate(instructions)]
    spans = [(labels[jump[1]], at) for jump, at in jumps if jump and labels.get(jump[1], at + 1) <= at]
    inner = [
        (first, last)
        for first, last in spans
        if not any(o != (first, last) and first <= o[0] and o[1] <= last for o in spans)
    ]
    loops = (Loop(last + 1 - first, Counter(kinds[first : last + 1])) for first, last in set(inner))
    return sass, Counter(kinds), tuple(sorted(loops, key=lambda loop: -loop.instructions))


def _kind(instruction: str) -> str:
    """What `Report.mix` counts an instruction as.

    >>> [_kind(i) for i in ("LDG.E.LTC128B.128 R4, [R2]", "STG.E.U8 [R2], R4", "LDS R1, [R2]", "IMMA.16832.S8.S8 R0")]
    ['LDG.128', 'STG.8', 'LDS.32', 'IMMA']
    """
    opcode, *modifiers = instruction.split()[0].split(".")
    if opcode not in ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDL", "STL", "LD", "ST"):
        return opcode
    widths = [m.lstrip("US") for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128", "256")]
    return f"{opcode}.{widths[0] if widths else 32}"
