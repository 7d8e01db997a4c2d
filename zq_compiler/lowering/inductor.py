"""Inductor: our kernels for what the device has them for, plain torch for what is left.

For every dialect node one provider is chosen, by the device that its values are on:

    native     on the CPU: our C++ kernel (`native_cpu.py`)
    triton     on CUDA: our Triton kernel (`triton_cuda.py`)
    inline     the reference itself, which Inductor traces into and fuses with its neighbours

A kernel is an opaque op. All of them are functional and none waits for the device, so that what Inductor makes of a
graph on CUDA can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import fx

from ..kernels import reference_of
from ..program import Program, copy_graph, fake_value
from . import native_cpu, triton_cuda
from .provider import Provider, nothing


@dataclass
class ProviderChoice:
    """Which provider runs an op, how often, and why not a kernel of the device."""

    op: str
    provider: str
    reason: str = ""
    count: int = 0


@dataclass
class Lowered:
    """A graph that Inductor compiles, and the choices made."""

    gm: fx.GraphModule
    providers: list[ProviderChoice] = field(default_factory=list)


def lower(program: Program, native: bool = True, architecture: int | None = None) -> Lowered:
    """Choose a provider for each dialect node, on a copy of the graph; constants are shared with the Program.

    Args:
        native: False inlines every op, for tests and comparisons.
        architecture: a compute capability, such as 90, to lower for it wherever the values are; None for the devices
            that they are on.

    Raises:
        KernelBuildError: this machine should run the native kernels and they do not compile, or values are on CUDA and
            Triton is not installed.
    """
    lowered = Lowered(copy_graph(program.gm))
    graph = lowered.gm.graph
    choices: dict[tuple[str, str, str], ProviderChoice] = {}
    provider_of = functools.cache(lambda device: _provider(device, native, architecture))
    for node in list(graph.nodes):
        reference = reference_of(node.target)
        if reference is None:
            continue
        provider = provider_of(_device(node))
        reason = provider.refusal(node)
        if reason is None:
            provider.rewrites[node.target](lowered.gm, node)
        else:
            node.target = reference
        key = reference.__name__, "inline" if reason else provider.name, reason or ""
        choices.setdefault(key, ProviderChoice(*key)).count += 1
    lowered.providers = list(choices.values())
    graph.eliminate_dead_code()
    lowered.gm.delete_all_unused_submodules()
    lowered.gm.recompile()
    return lowered


def _provider(device: torch.device, native: bool, architecture: int | None) -> Provider:
    if not native:
        return nothing("native kernels were switched off")
    if architecture is not None or device.type == "cuda":
        return triton_cuda.provider(device, architecture)
    if device.type == "cpu":
        return native_cpu.provider()
    return nothing(f"there are no kernels for {device.type}")


def _device(node: fx.Node) -> torch.device:
    value = fake_value(node)
    return (value if isinstance(value, torch.Tensor) else value[0]).device
