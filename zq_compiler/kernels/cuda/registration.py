"""Ops of `torch.ops.zq_cuda`: a host function that launches Triton kernels, its schema and its fake.

An op that takes what its dialect op takes has its name and its signature (`provides`). One that takes a weight in a
layout of its own has a signature of its own, and a fake (`cuda_op`). Host functions read shapes and dtypes, never
values: nothing waits for the device, and what they launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import KernelBuildError
from ...torch_private import OpOverload
from ..registry import OPS

NAMESPACE = "zq_cuda"
MODULES: tuple[str, ...] = (
    "activation_quantize",
    "cached_attention",
    "embedding",
    "fp8_linear",
    "grouped_linear",
    "int8_attention",
    "int8_linear",
    "low_rank_linear",
    "norm_quantize",
    "quantize",
    "quantize_int4_fp8",
    "quantize_static",
    "softmax_quantize",
    "w4a8_linear",
    "weight_only_linear",
)  # every file of kernels
_library = torch.library.Library(NAMESPACE, "DEF")
Host = Callable[..., Any]
HOSTS: dict[str, Host] = {}  # by their ops' names, for callers that have no device


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used in this environment, as a sentence; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def load() -> None:
    """Make `torch.ops.zq_cuda` available. Safe to call again.

    Raises:
        KernelBuildError: Triton is not installed.
    """
    if reason := unavailable_reason():
        raise KernelBuildError(reason, where="CUDA kernels", fix='install it: pip install "zq-compiler[triton]"')
    for name in MODULES:
        importlib.import_module(f"{__package__}.{name}")


def provides(dialect: OpOverload, contiguous: bool = False) -> Callable[[Host], Host]:
    """Registers a host function as the op of a dialect op's name, with its schema and its fake.

    Args:
        contiguous: its results are, where those of the reference follow the strides of what it reads.
    """
    op = OPS[dialect._opname]

    def fake(*args: Any, **kwargs: Any) -> Any:
        results = dialect(*args, **kwargs)
        if not contiguous:
            return results
        return results.contiguous() if isinstance(results, torch.Tensor) else tuple(r.contiguous() for r in results)

    def register(host: Host) -> Host:
        schema = torch.library.infer_schema(op.reference, mutates_args=())
        return _register(op.name, schema, host, fake)

    return register


def cuda_op(fake: Host) -> Callable[[Host], Host]:
    """Registers a typed host function under its own name.

    Args:
        fake: gives empty tensors of the results' shapes and dtypes.
    """

    def register(host: Host) -> Host:
        return _register(host.__name__, torch.library.infer_schema(host, mutates_args=()), host, fake)

    return register


def _register(name: str, schema: str, host: Host, fake: Host) -> Host:
    @functools.wraps(host)
    def on_its_device(*args: Any, **kwargs: Any) -> Any:
        """Triton launches on the current device, which need not be the tensors'."""
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        if not x.is_cuda:
            return host(*args, **kwargs)
        with torch.cuda.device(x.device):
            return host(*args, **kwargs)

    HOSTS[name] = on_its_device
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_its_device, "CompositeExplicitAutograd")  # on a CPU it runs in the interpreter, for tests
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return on_its_device


@functools.cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """The compute capability that a launch on a device compiles for, such as 90; in the interpreter 80."""
    if device.type == "cuda":
        return _architecture(device.index if device.index is not None else torch.cuda.current_device())
    import triton

    if triton.knobs.runtime.interpret:
        return 80
    return int(triton.runtime.driver.active.get_current_target().arch)  # of the fake driver of offline tests


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """`[..., K]` as contiguous `[M, K]`, M and K."""
    k = x.shape[-1]
    return x.contiguous().view(-1, k), x.numel() // k if k else 0, k


def leading(x: torch.Tensor, *last: int) -> Sequence[int]:
    """The shape of x with other last dimensions."""
    return (*x.shape[:-1], *last)


def strided_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """`[..., K]` as `[M, K]`, read in place where its rows are equally far apart; M, K, and how far."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()
    return rows, *rows.shape, rows.stride(0)


def broadcast_rows(t: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, int]:
    """What broadcasts to `[..., K]`, as contiguous `[R, 1 or K]` and a number: row i of M reads `i // number % R`."""
    t = t.reshape((1,) * (len(shape) - t.dim()) + t.shape)
    varying = [d for d in range(len(shape) - 1) if t.shape[d] > 1]
    first, last = (varying[0], varying[-1] + 1) if varying else (0, 0)
    t = t.expand(*t.shape[:first], *shape[first:last], *t.shape[last:])
    return t.reshape(-1, t.shape[-1]).contiguous(), math.prod(shape[last:-1])
