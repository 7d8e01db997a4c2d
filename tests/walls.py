"""Memory that ends where nobody may read, to catch kernels that read a vector too much."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def before_a_wall(x: Tensor) -> Tensor:
    """A copy that ends where memory begins that nobody may read."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape).copy_(x)
