"""int8_attention: exact sums, the softmax and its rounding in the order that is written down, every kind of mask."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.formulas import float64
from zq_compiler.kernels import int8_attention
from zq_compiler.numerics import sqnr

# Of values in units of their row's largest: float32 scores of magnitude 10 are right to 1e-6, and so is what follows.
RELATIVE = 1e-5
# Of a step: integers this near to a tie may round either way, because float32 has them right to 255 * RELATIVE only.
NEAR_A_TIE = 255 * RELATIVE
# 8 bits for all four operands, on Gaussian data: measured 33 and 36 dB.
ATTENTION_DB = 30.0

SHAPES = [(1, 1, 1, 1, 1, 1), (2, 4, 2, 5, 9, 7), (1, 6, 2, 12, 12, 64), (3, 2, 2, 1, 33, 16), (1, 4, 1, 20, 3, 33)]
MASKS = ["none", "bool", "added", "both infinities"]


def operands(b, h, h_kv, t, s, d, per_feature=True, seed=0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=g).to(torch.int8)

    return dict(
        query=integers(b, h, t, d),
        key=integers(b, h_kv, s, d),
        value=integers(b, h_kv, s, d),
        score_scale=(torch.rand(1, h, 1, 1, generator=g) + 0.5) * 4e-4 / d**0.5,
        out_scale=(torch.rand(1, h if per_feature else 1, 1, d if per_feature else 1, generator=g) + 0.5) / 255,
    )


def masks(name: str, b: int, t: int, s: int) -> Tensor | None:
    g = torch.Generator().manual_seed(1)
    if name == "bool":
        mask = torch.rand(b, 1, t, s, generator=g) > 0.3
        mask[0, :, 0] = False
        return mask
    if name == "added":
        return torch.randn(1, 1, 1, s, generator=g)
    if name == "both infinities":
        return torch.randn(t, s, generator=g).where(torch.rand(t, s, generator=g) > 0.3, -torch.inf)
    return None


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_scale: Tensor,
    out_scale: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The output in float64, and how far it moves if every integer next to a tie rounds the other way."""
    (b, h, t, d), (_, h_kv, s, _) = query.shape, key.shape
    out, slack = np.zeros((b, h, t, d)), np.zeros((b, h, t, d))
    added = np.zeros((b, h, t, s))
    if mask is not None:
        added += np.where(mask.numpy(), 0, -np.inf) if mask.dtype is torch.bool else float64(mask)
    scales = np.broadcast_to(float64(out_scale), (1, h, 1, d))
    for i, j, k in itertools.product(range(b), range(h), range(t)):
        keys, values = (float64(x[i, j * h_kv // h]) for x in (key, value))
        a = keys @ float64(query[i, j, k]) * float64(score_scale)[0, j, 0, 0] + added[i, j, k]
        if is_causal:
            a[k + 1 :] = -np.inf
        if not s or a.max() == -np.inf:
            continue
        e = np.exp(a - a.max())
        if probability_scale is None:
            wanted, unit = e * 255, 255 * e.sum()
        else:
            step = np.broadcast_to(float64(probability_scale), (1, h, 1, 1))[0, j, 0, 0]
            wanted, unit = np.minimum(e / e.sum() / step, 255), 1.0
        near_a_tie = np.abs(wanted % 1 - 0.5) < NEAR_A_TIE
        out[i, j, k] = np.rint(wanted) @ values * scales[0, j, 0] / unit
        slack[i, j, k] = near_a_tie @ np.abs(values) * scales[0, j, 0] / unit
    return out, slack


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_against_the_formula(shape, mask, is_causal, static):
    b, h, _, t, s, _ = shape
    q = operands(*shape, per_feature=not is_causal)
    step = torch.linspace(0.5, 1.5, h).reshape(1, h, 1, 1) / 255 if static else None
    q |= dict(mask=masks(mask, b, t, s), is_causal=is_causal, probability_scale=step)
    out = int8_attention(**q, out_dtype=torch.float32)
    wanted, slack = exact(**q)
    assert out.shape == wanted.shape and out.dtype is torch.float32
    unit = np.abs(wanted).max(-1, keepdims=True)
    assert (np.abs(float64(out) - wanted) <= slack + RELATIVE * unit + 1e-9).all()


@pytest.mark.parametrize("static", [False, True])
def test_other_dtypes_are_the_floats_rounded(static):
    q = operands(2, 2, 2, 9, 30, 16) | dict(mask=None, is_causal=False)
    q["probability_scale"] = torch.full((1, 1, 1, 1), 1 / 255) if static else None
    q["out_scale"] = q["out_scale"] * (2.0 if static else 500.0)  # so that some saturate
    floats = int8_attention(**q, out_dtype=torch.float32)
    integers = int8_attention(**q, out_dtype=torch.int8)
    assert torch.equal(integers, floats.round().clamp(-128, 127).to(torch.int8))
    assert {-128, 127} <= set(integers.unique().tolist())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(int8_attention(**q, out_dtype=dtype), floats.to(dtype))


def one_key(value: int, probability_scale: float | None, out_scale: float) -> float:
    """One key: its probability is exactly 1."""
    x, scale = torch.full((1, 1, 1, 1), value, dtype=torch.int8), torch.ones(1, 1, 1, 1)
    step = None if probability_scale is None else scale * probability_scale
    return int8_attention(x, x, x, scale, None, False, step, scale * out_scale, torch.int8).item()


def test_rounding_is_half_to_even_and_saturates():
    assert [one_key(1, 1 / 1.5, 1.0), one_key(1, 1 / 2.5, 1.0)] == [2, 2]  # of probabilities
    assert [one_key(5, 1.0, 0.5), one_key(7, 1.0, 0.5), one_key(-5, 1.0, 0.5)] == [2, 4, -2]  # of outputs
    assert [one_key(1, 1 / 256, 0.25), one_key(1, 1e-30, 0.25)] == [64, 64]  # 255 is the last probability
    assert [one_key(100, 1.0, 2.0), one_key(-100, 1.0, 2.0), one_key(100, 1.0, 1e30)] == [127, -128, 127]


@pytest.mark.parametrize("static", [False, True])
def test_rows_without_keys_are_zeros(static):
    q = operands(2, 2, 1, 3, 8, 4) | dict(is_causal=False)
    q["probability_scale"] = torch.full((1, 1, 1, 1), 1 / 255) if static else None
    allowed = torch.ones(3, 8, dtype=torch.bool)
    allowed[1] = False
    for mask in (allowed, torch.zeros(3, 8).masked_fill(~allowed, -torch.inf)):
        out = int8_attention(**q, mask=mask, out_dtype=torch.float32)
        assert not out[:, :, 1].any() and out[:, :, 0].any() and out[:, :, 2].any()
    # The most negative float is no -Inf: a row full of it is a uniform one, as in torch's own attention.
    out = int8_attention(**q, mask=torch.full((3, 8), torch.finfo(torch.float32).min), out_dtype=torch.float32)
    assert (out == out[:, :, :1]).all() and out.any()


@pytest.mark.parametrize("b, t, s", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(b, t, s, is_causal):
    q = operands(b, 2, 1, t, s, 4)
    out = int8_attention(**q, mask=None, is_causal=is_causal, probability_scale=None, out_dtype=torch.int8)
    assert out.shape == (b, 2, t, 4) and not out.any()


def test_memory_is_ordered_by_token():
    out = int8_attention(
        **operands(2, 4, 2, 5, 6, 8), mask=None, is_causal=False, probability_scale=None, out_dtype=torch.int8
    )
    assert out.stride() == (5 * 4 * 8, 8, 4 * 8, 1)
    assert out.transpose(1, 2).view(2, 5, 32).is_contiguous()


@pytest.mark.parametrize("static", [False, True])
def test_nan_is_not_hidden(static):
    q = operands(1, 1, 1, 3, 8, 4) | dict(is_causal=False)
    q["probability_scale"] = torch.full((1, 1, 1, 1), 1 / 255) if static else None
    mask = torch.zeros(3, 8)
    mask[1, 5] = torch.nan
    assert int8_attention(**q, mask=mask, out_dtype=torch.float32).isnan().any(-1).tolist() == [[[False, True, False]]]
    assert not int8_attention(**q, mask=mask, out_dtype=torch.int8)[:, :, 1].any()  # integers cannot carry it


@pytest.mark.parametrize("s", [64, 2048])
def test_the_token_wise_form_survives_long_rows(s):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 64, generator=g) for n in (16, s, s))
    scales = [x.abs().max() / 127 for x in (query, key, value)]
    integers = [(x / scale).round().to(torch.int8) for x, scale in zip((query, key, value), scales, strict=True)]
    floats = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    score_scale = (scales[0] * scales[1] / 8).reshape(1, 1, 1, 1)
    one = torch.ones(1, 1, 1, 1)
    token_wise = int8_attention(*integers, score_scale, None, False, None, one * scales[2], torch.float32)
    static = int8_attention(*integers, score_scale, None, False, one / 255, one * scales[2] / 255, torch.float32)
    assert sqnr(floats, token_wise) > ATTENTION_DB
    assert (sqnr(floats, static) > 10) == (s == 64)  # of 2048 probabilities few reach half a step of 1/255


def test_sums_are_exact_under_autocast():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randint(-127, 128, (1, 2, 9, 64), generator=generator).to(torch.int8) for _ in range(3))
    one = torch.ones(1, 1, 1, 1)
    arguments = (q, k, v, one / 4000, None, False, None, one, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = int8_attention(*arguments)
    assert torch.equal(under, int8_attention(*arguments))
