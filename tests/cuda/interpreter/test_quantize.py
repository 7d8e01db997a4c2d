"""Token-wise quantize against its reference: integers and scales are the same, and memory is touched once."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.interpreter.sanitizer import counted
from zq_compiler import kernels
from zq_compiler.kernels.cuda.quantize import quantize_per_token

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 16), (7, 112), (33, 48), (5, 2000), (2, 3, 4096), (1, 16384)]
UNROTATED = [(1, 1), (5, 100), (3, 1001), (2, 3, 5)]


def assert_same(x: Tensor, rotated: bool = False) -> None:
    """As the reference quantizes, and no byte is moved twice."""
    with counted() as traffic:
        q, scale = quantize_per_token(x, rotated)
    expected_q, expected_scale = kernels.quantize_per_token(x, rotated)
    assert q.is_contiguous() and scale.is_contiguous()
    torch.testing.assert_close(q, expected_q, rtol=0, atol=0)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    assert traffic.read == traffic.unique_read == x.numel() * x.element_size()
    assert traffic.written == traffic.unique_written == q.nbytes + scale.nbytes
    assert len(traffic.launches) == (x.numel() > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rotated"), [(s, r) for s in SHAPES for r in (False, True)] + [(s, False) for s in UNROTATED]
)
def test_any_shape(shape, rotated, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])  # ranges that outliers set
    assert_same(x.to(dtype), rotated)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_hold_what_is_special(dtype, rotated):
    torch.manual_seed(1)
    x = torch.randn(11, 48).to(dtype)
    x[0], x[1], x[2] = 0, -0.0, x[2] * torch.finfo(dtype).smallest_normal / 64  # none, none, denormal
    x[3, 5], x[4, 47], x[5, 0] = float("nan"), float("inf"), -float("inf")
    x[6, :2] = torch.tensor([float("nan"), float("inf")])
    x[7], x[7, 3] = 0, torch.finfo(dtype).max / 4
    x[8] = torch.finfo(dtype).max / 16
    x[9] = 1e-13  # below the floor of ranges, in float32 and bfloat16
    assert_same(x, rotated)
    q, scale = quantize_per_token(x, rotated)
    assert scale.isnan().flatten().tolist() == [i in (3, 4, 5, 6) for i in range(11)]
    assert not q[:2].any() and not q[3:7].any() and q[7].any()


def test_ties_are_rounded_to_even():
    steps = torch.arange(-253, 254).float() / 2  # -126.5 to 126.5, of a range of 127: all of them ties or integers
    assert_same(torch.cat([steps, torch.tensor([127.0])])[None])
    assert_same((torch.cat([steps, torch.tensor([127.0])]) * 2**-40)[None])


def test_what_lies_next_to_a_tie_falls_to_its_side():
    torch.manual_seed(3)
    ranges = torch.cat([torch.rand(60) + 1, torch.logspace(-11, 37, 60)])[:, None]
    ties = ((torch.arange(127) + 0.5).double() / 127 * ranges.double()).float()
    infinity = torch.tensor(torch.inf)
    assert_same(torch.cat([ranges, ties, ties.nextafter(infinity), ties.nextafter(-infinity)], 1))


def test_tensors_that_are_not_contiguous():
    torch.manual_seed(2)
    x = torch.randn(6, 4, 64)
    assert_same(x[::2])  # read in place, or copied first
    assert_same(x[:, 1])
    assert_same(x[..., :48], rotated=True)
    assert_same(x.transpose(0, 1))
    assert_same(x.transpose(1, 2).half())
    assert_same(x[:1, :1].expand(6, 1, 64).contiguous()[:, :, ::2])


def test_nothing_to_do():
    for shape in [(0, 32), (2, 0, 32)]:
        assert_same(torch.empty(shape), rotated=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    arrays.arrays("float32", (3, 32), elements=st.floats(width=32), fill=st.just(0.5)),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_numbers(x, dtype, rotated):
    assert_same(torch.from_numpy(x).to(dtype), rotated)
