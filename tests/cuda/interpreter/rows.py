"""What tests of memory-bound kernels share: how far integers are apart, which bytes moved, what a fake promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.cuda.interpreter.sanitizer import Traffic

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where a last place of a norm or an activation crosses a tie of the half dtype, or of the integers.
MAX_DIFFERING = 2e-3


def assert_at_most_a_step(q: Tensor, expected: Tensor, label: str = "") -> None:
    """Integers a step apart at most, and few of them; prints how many."""
    apart = (q.int() - expected.int()).abs()
    differing = (apart > 0).double().mean().item()
    print(f"{label} {differing:.1e} of {q.numel()} integers differ")
    assert q.dtype is expected.dtype and q.shape == expected.shape
    assert apart.max() <= 1 and differing <= max(MAX_DIFFERING, 1 / q.numel())


def assert_each_byte_once(
    traffic: Traffic, read: dict[str, Tensor], written: dict[str, Tensor], cached: tuple[Tensor | None, ...] = ()
) -> None:
    """One launch reads and writes each byte of these arguments once, and nothing else but the cached tensors, which
    every program reads."""
    (launch,) = traffic.launches
    assert {name: launch.read[name] for name in read} == {name: t.nbytes for name, t in read.items()}
    assert dict(launch.written) == {name: t.nbytes for name, t in written.items()}
    others = sum(t.nbytes for t in cached if t is not None)
    assert traffic.unique_read == sum(t.nbytes for t in read.values()) + others
    assert traffic.unique_written == traffic.written


def assert_like_its_fake(op: Callable[..., Any], *args: Any) -> None:
    """Shapes, dtypes and strides are those that a graph is compiled for."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
