"""Programs whose values are on CUDA, on a machine that has none: fake tensors, which have a device and no memory.

Constants and inputs stay real and on the CPU, so that calibration and the choice of weights run as they are. What is
moved is every node's fake value, and those of constants that passes make later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from benchmarks.fake_cuda import DEVICE, fake_on_cuda, without_guards
from zq_compiler.passes import default_pipeline
from zq_compiler.program import Program, fake_value
from zq_compiler.rewrite import fake_mode_of
from zq_compiler.torch_private import FakeTensor, pytree


def quantize_on_cuda(program: Program) -> Program:
    """Run all passes on a captured Program whose values are on CUDA."""
    mode = fake_mode_of(program.graph)
    with mode:
        for node in program.graph.nodes:
            node.meta["val"] = pytree.tree_map_only(FakeTensor, fake_on_cuda, fake_value(node))
    with as_on_cuda(mode):
        default_pipeline().run(program)
    return program


def run_on_cuda(gm: fx.GraphModule, *inputs: Any) -> Any:
    """A lowered graph's outputs, of fake inputs on CUDA: the fakes of every kernel's op have their say."""
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with mode, as_on_cuda(mode), torch.no_grad():
        return _OnCUDA(gm).run(*inputs)


class _OnCUDA(fx.Interpreter):
    """Constants, and what a graph makes of nothing, are on CUDA."""

    def get_attr(self, *where: Any) -> Any:
        return fake_on_cuda(super().get_attr(*where))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: DEVICE, (args, kwargs))
        return super().call_function(target, args, kwargs)


@contextmanager
def as_on_cuda(mode: Any) -> Iterator[None]:
    """Context in which new constants are on CUDA by their fakes alone."""
    original = mode.from_tensor

    def from_tensor(tensor: Tensor, **options: Any) -> Tensor:
        fake = original(tensor, **options)
        with mode:
            return fake_on_cuda(fake)

    mode.from_tensor = from_tensor
    try:
        with without_guards(), _StayOnCPU():
            yield
    finally:
        del mode.from_tensor


class _StayOnCPU(TorchFunctionMode):
    """Real tensors are not moved to CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[1:] == (DEVICE,) and not isinstance(args[0], FakeTensor):
            return args[0]
        return func(*args, **(kwargs or {}))
