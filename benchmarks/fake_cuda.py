"""Fake tensors on CUDA, in a build of torch that has none: they have a device and no memory.

Some of torch's Python methods ask for the device's guard, which such a build lacks; within `without_guards` they go
straight to ATen, which knows what to do with a fake tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from zq_compiler.torch_private import FakeTensor

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


def fake_on_cuda(x: Tensor) -> Tensor:
    """A fake tensor of the same layout; to be called under a fake mode."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)


@contextmanager
def without_guards() -> Iterator[None]:
    """Context in which fake tensors, traced ones too, can be indexed, inverted and made contiguous."""
    methods = {
        "__getitem__": _index,
        "__invert__": lambda x: aten.bitwise_not.default(x),
        "contiguous": lambda x, memory_format=torch.contiguous_format: aten.contiguous.default(
            x, memory_format=memory_format
        ),
    }
    classes = (FakeTensor, FunctionalTensor)
    own = {(c, name): vars(c).get(name) for c in classes for name in methods}
    for c, name in own:
        setattr(c, name, methods[name])
    try:
        yield
    finally:
        for (c, name), method in own.items():
            if method is None:
                delattr(c, name)
            else:
                setattr(c, name, method)


def _index(x: Tensor, places: Any) -> Tensor:
    """`x[places]` of numbers, slices and None, or of one tensor, in ATen."""
    if isinstance(places, Tensor):
        return aten.index.Tensor(x, [places])
    places = list(places) if isinstance(places, tuple) else [places]
    if Ellipsis in places:
        at, given = places.index(Ellipsis), sum(place not in (None, Ellipsis) for place in places)
        places[at : at + 1] = [slice(None)] * (x.dim() - given)
    dim = 0
    for place in places:
        if isinstance(place, int):
            x = aten.select.int(x, dim, place)
            continue
        if place is None:
            x = aten.unsqueeze.default(x, dim)
        elif place != slice(None):
            x = aten.slice.Tensor(x, dim, place.start, place.stop, place.step or 1)
        dim += 1
    return x
