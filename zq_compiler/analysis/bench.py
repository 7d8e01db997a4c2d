"""How fast a model is as it is, under torch.compile, and quantized, side by side in one process (`zq bench`).

Contestants take turns, round by round, so that what disturbs the machine falls on all of them alike; a figure is the
median of its rounds. On CUDA floats are float16, a time is from the call to the end of its last kernel, and
torch.compile records CUDA graphs for both sides. On a CPU floats are what the model has.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, numerics
from ..api import quantize
from ..errors import ZQError
from ..recipe import load_recipe
from ..torch_private import pytree

WARM_UPS = 3
Contestants = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Timing:
    """One contestant's figures.

    Args:
        name: what ran.
        milliseconds: median of a call.
        sqnr: of the first output of floats, to the model in float32, in dB; `inf` for that model itself.
    """

    name: str
    milliseconds: float
    sqnr: float


def bench(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipes: Sequence[Any] = ("w8a8",),
    device: str = "cpu",
    rounds: int = 20,
    tell: Callable[[str], None] = lambda doing: None,
) -> list[Timing]:
    """Times a model in eval mode, the same under torch.compile, and quantized by each recipe.

    Args:
        model: stays as it is; copies are moved to the device.
        inputs: keyword arguments of one call.
        recipes: as `quantize` takes them; those that need calibration data get the inputs.
        device: `"cpu"` or `"cuda"`.
        rounds: calls of each contestant.
        tell: is called with what begins: compiling takes minutes.

    Raises:
        ZQError: the device is not there.
        RecipeError: there is no such recipe.
    """
    _require(device)
    loaded = [load_recipe(recipe) for recipe in recipes]
    plain = copy.deepcopy(model).to(device).eval()
    arguments = pytree.tree_map_only(Tensor, lambda x: x.to(device), dict(inputs))
    options: dict[str, Any] = {}
    with torch.no_grad():
        truth = _first_floats(plain.float()(**arguments))
        if device == "cuda":
            options["mode"] = "reduce-overhead"
            arguments = pytree.tree_map_only(Tensor, lambda x: x.half() if x.is_floating_point() else x, arguments)
            plain = plain.half()
        else:
            plain = copy.deepcopy(model).eval()
        compiled = torch.compile(copy.deepcopy(plain), **options)
        contestants: dict[str, Callable[[], Any]] = {
            f"eager {_dtype(plain)}": lambda: plain(**arguments),
            f"torch.compile {_dtype(plain)}": lambda: compiled(**arguments),
        }
        for recipe in loaded:
            tell(f"zeroquant {recipe.name}: quantizing")
            data = [arguments] if recipe.needs_data else None
            fast = quantize(plain, arguments, recipe=recipe, calibration=data).compile(**options)
            contestants[f"zeroquant {recipe.name}"] = lambda fast=fast: fast(**arguments)  # type: ignore[misc]
        sqnr = {}
        for name, run in contestants.items():
            tell(f"{name}: compiling and the first call")
            sqnr[name] = numerics.sqnr(truth, _first_floats(run()))
        tell("timing")
        times = take_turns(contestants, device, rounds)
    return [Timing(name, times[name], sqnr[name]) for name in contestants]


def _require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise ZQError("no CUDA device is available", where="zq bench", fix="run it on a machine with an NVIDIA GPU")


def take_turns(contestants: Contestants, device: str, rounds: int) -> dict[str, float]:
    """The median milliseconds of each, warmed up."""
    clock = _cuda_milliseconds if device == "cuda" else _cpu_milliseconds
    for run in contestants.values():
        for _ in range(WARM_UPS):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(clock(run))
    return {name: statistics.median(found) for name, found in times.items()}


def bench_kernels() -> Iterator[str]:
    """Lines of a table: each CUDA kernel beside what torch does in float16 in its place, on this device.

    Both are timed as CUDA graphs, whose operands may be in the cache from the call before.
    """
    from .kernel_cases import cases  # imported late: it needs Triton

    yield "| kernel | shape | ms | GB/s | TOPS | float16, ms | times as fast |"
    yield "|---|---|---|---|---|---|---|"
    for case in cases():
        (call, make), arguments = case.floats, case.arguments("cuda")
        if torch.float8_e4m3fn in {x.dtype for x in arguments if isinstance(x, Tensor)} and _capability() < 89:
            yield f"| `{case.op}` | {case.shape} | compute capability 8.9 is needed | | | | |"
            continue
        floats = make("cuda")
        ours = device_milliseconds(lambda: case.run(*arguments))  # noqa: B023
        theirs = device_milliseconds(lambda: call(*floats))  # noqa: B023
        rates = f"{case.bytes / ours / 1e6:.0f} | {case.operations / ours / 1e9:.1f}"
        yield f"| `{case.op}` | {case.shape} | {ours:.4f} | {rates} | {theirs:.4f} | {theirs / ours:.2f} |"


def device_milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a CUDA graph's call of it: the device's own, without what Python takes to launch."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(run, return_mode="median"))


def _capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _cpu_milliseconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _cuda_milliseconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def environment(device: str) -> str:
    """What the figures are of: the processor and the versions, in a line.

    Raises:
        ZQError: the device is not there.
    """
    _require(device)
    versions = f"torch {torch.__version__}, zq_compiler {__version__}"
    if device == "cuda":
        import triton

        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        versions = (
            f"compute capability {capability}, CUDA {torch.version.cuda}, triton {triton.__version__}, {versions}"
        )
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{_processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {versions}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def markdown(timings: Sequence[Timing]) -> Iterator[str]:
    """Lines of a table; ratios are to the first row."""
    yield "| | ms | times as fast | SQNR, dB |"
    yield "|---|---|---|---|"
    for timing in timings:
        ratio = timings[0].milliseconds / timing.milliseconds
        yield f"| {timing.name} | {timing.milliseconds:.3f} | {ratio:.2f} | {timing.sqnr:.1f} |"


def _first_floats(outputs: Any) -> Tensor:
    found = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise ZQError("the model returns no tensor of floats to compare", where="zq bench")
    return found[0].float().clone()  # the next call of a CUDA graph writes over its outputs


def _dtype(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
