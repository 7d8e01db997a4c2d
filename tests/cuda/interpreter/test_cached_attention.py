"""The kernel that reads the quantized cache, beside its reference: float32 to its rounding, other dtypes to theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zq_compiler.kernels.cached_attention import cached_attention, quantize_keys, quantize_values
from zq_compiler.kernels.cuda import cached_attention as cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of a row's values' largest magnitude: sums of S float32 products in two orders.
FLOAT32 = 2e-6


def operands(b=1, h=4, h_kv=2, t=1, packed=64, new=5, d=32, dv=None, dtype=torch.float32, bits=8, group=32, **given):
    g = torch.Generator().manual_seed(0)
    dv = dv or d

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) * torch.logspace(-0.5, 0.5, shape[-1])

    keys, values = (floats(b, h_kv, packed, width).to(dtype) for width in (d, dv))
    return dict(
        query=floats(b, h, t, d).to(dtype),
        **dict(zip(("key_codes", "key_scale", "key_least"), quantize_keys(keys, bits, group), strict=True)),
        **dict(zip(("value_codes", "value_scale", "value_least"), quantize_values(values, bits, group), strict=True)),
        new_keys=floats(b, h_kv, new, d).to(dtype),
        new_values=floats(b, h_kv, new, dv).to(dtype),
        **dict(mask=None, is_causal=False, score_scale=0.2, bits=bits, group=group) | given,
    )


def assert_same(q: dict) -> None:
    actual, expected = cuda.cached_attention(**q), cached_attention(*q.values())
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.is_contiguous()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    rounding = torch.finfo(q["query"].dtype).eps * expected.abs() if q["query"].dtype is not torch.float32 else 0
    largest = expected.abs().amax() if expected.numel() else 0
    assert ((actual - expected).abs() <= FLOAT32 * largest + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_formats(dtype, bits):
    assert_same(operands(b=2, h=6, packed=96, new=7, d=32, dv=64, dtype=dtype, bits=bits))


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_codes_that_cross_bytes(bits):
    assert_same(operands(packed=24, new=3, d=24, bits=bits, group=8))


@pytest.mark.parametrize("group", [1, 5, 16, 20, 40, 64, 128])
def test_groups_of_any_size(group):
    """Groups that divide a tile, that a tile divides, and neither."""
    assert_same(operands(packed=3 * group, new=2, d=40, dv=math.lcm(group, 8) if group < 128 else 128, group=group))


@pytest.mark.parametrize("d", [8, 16, 24, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_head_dims(d, bits):
    assert_same(operands(d=d, packed=48, new=33, bits=bits, group=8))


@pytest.mark.parametrize("packed, new", [(0, 0), (0, 1), (0, 70), (32, 0), (32, 64), (320, 65), (800, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_and_split(packed, new, dtype):
    assert_same(operands(packed=packed, new=new, dtype=dtype))


@pytest.mark.parametrize("h, h_kv, t", [(1, 1, 1), (7, 1, 1), (6, 2, 5), (12, 1, 7), (2, 2, 70)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_that_share_keys(h, h_kv, t, is_causal):
    assert_same(operands(h=h, h_kv=h_kv, t=t, packed=64, new=t + 3, is_causal=is_causal))


MASKS = {
    "bool": lambda b, h, t, s, g: torch.rand(b, 1, t, s, generator=g) > 0.3,
    "of keys": lambda b, h, t, s, g: torch.rand(b, 1, 1, s, generator=g) > 0.3,
    "of rows": lambda b, h, t, s, g: torch.rand(t, 1, generator=g) > 0.3,
    "added": lambda b, h, t, s, g: torch.randn(h, t, s, generator=g),
    "added to keys": lambda b, h, t, s, g: torch.randn(b, 1, 1, s, generator=g).bfloat16(),
    "infinite": lambda b, h, t, s, g: torch.zeros(b, 1, t, s).where(
        torch.rand(b, 1, t, s, generator=g) > 0.3, -math.inf
    ),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", [64, 512])
def test_masks(mask, is_causal, packed):
    q = operands(b=2, h=4, t=3, packed=packed, new=9, is_causal=is_causal)
    q["mask"] = MASKS[mask](2, 4, 3, packed + 9, torch.Generator().manual_seed(1))
    assert_same(q)


@pytest.mark.parametrize("packed", [64, 512])
def test_rows_without_keys_are_zeros_and_nan_is_not_hidden(packed):
    q = operands(t=4, packed=packed)
    mask = torch.zeros(4, packed + 5)
    mask[1] = -math.inf
    mask[2, 30] = math.nan
    mask[3, 7] = math.inf
    mask[0, :300] = -math.inf  # whole parts of a row
    out = cuda.cached_attention(**(q | dict(mask=mask)))
    assert out.isnan().any(-1)[0, 0].tolist() == [False, False, True, True] and not out[:, :, 1].any()
    assert_same(q | dict(mask=mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_gives_its_value(dtype):
    """A softmax of one: the value as it was stored, rounded to the dtype and not once more."""
    q = operands(packed=0, new=1, dtype=dtype)
    assert torch.equal(cuda.cached_attention(**q), q["new_values"].repeat_interleave(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_keep_the_places_of_a_float32(dtype):
    """Two that all but cancel: rounded to 16 bits they would be equal, or off by as much as their difference."""
    difference = 2.0**-6
    q = operands(h=1, h_kv=1, packed=0, new=2, d=32, dtype=dtype, score_scale=1.0)
    q["query"] = torch.ones_like(q["query"])
    q["new_keys"] = torch.tensor([0.0, -difference / 32], dtype=dtype).view(1, 1, 2, 1).expand(-1, -1, -1, 32)
    q["new_values"] = torch.tensor([1.0, -1.0], dtype=dtype).view(1, 1, 2, 1).expand(-1, -1, -1, 32)
    out = cuda.cached_attention(**q).double()
    wanted = math.tanh(difference / 2)
    assert ((out - wanted).abs() <= 2e-7 + torch.finfo(dtype).eps / 2 * wanted).all()


def test_layouts():
    """Queries and a cache that are views of others."""
    q = operands(b=2, t=3)
    expected = cuda.cached_attention(**q)
    for name, x in q.items():
        if isinstance(x, Tensor):
            q[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cuda.cached_attention(**q), expected)


def test_empty():
    assert_same(operands(b=0))
    assert cuda.cached_attention(**operands(t=0)).shape == (1, 4, 0, 32)


def test_parts():
    """They cover every tile once, and none is empty."""
    for tiles in range(0, 40):
        for programs in (1, 3, 8, 100):
            parts, tiles_a_part = cuda.parts_of(tiles, programs, 24)
            assert parts >= 1 and parts * tiles_a_part >= tiles
            assert parts == 1 or (parts - 1) * tiles_a_part < tiles
