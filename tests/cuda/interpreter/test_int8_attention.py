"""The attention kernel beside its reference: equal but for probabilities that cross a tie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zq_compiler.kernels import int8_attention
from zq_compiler.kernels.cuda import int8_attention as cuda

DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.float16]
FORMS = ["static", "signed", "token-wise"]
# Probabilities of one row that cross a tie, as in the CPU provider's test.
CROSSINGS = 1
# Of INT8 outputs: a probability that crosses a tie moves some outputs of its row by a step.
MAX_DIFFERING = 1e-4
# Relative: the token-wise sum of exponentials is added up in another order.
RELATIVE = 2e-6


def operands(b, h, h_kv, t, s, d, form="static", out_dtype=torch.int8, spread=2.0, seed=0) -> dict:
    """Operands as projections leave them, `[B, T, H * D]` seen as `[B, H, T, D]`; scores of deviation `spread`."""
    g = torch.Generator().manual_seed(seed)

    def heads(h: int, t: int) -> Tensor:
        return torch.randint(-128, 128, (b, t, h * d), dtype=torch.int8, generator=g).view(b, t, h, d).transpose(1, 2)

    def scale(d: int) -> Tensor:
        return torch.rand(1, h, 1, d, generator=g) + 0.5

    return dict(
        query=heads(h, t),
        key=heads(h_kv, s),
        value=heads(h_kv, s),
        score_scale=scale(1) * spread / (74**2 * d**0.5),  # 74 is the deviation of a byte
        mask=None,
        is_causal=False,
        probability_scale=None if form == "token-wise" else scale(1) / (127 if form == "signed" else 255),
        # A step of one probability moves an output by less than a step.
        out_scale=scale(d) / 2 if form == "token-wise" else scale(d) / 384,
        out_dtype=out_dtype,
        signed_probabilities=form == "signed",
    )


def assert_same(q: dict) -> None:
    """Strides, NaN and values are the reference's, but for what probabilities that cross a tie move."""
    actual, expected = cuda.int8_attention(**q), int8_attention(*q.values())
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.stride() == expected.stride()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    scale = q["out_scale"].double().abs().nan_to_num()
    crossed = CROSSINGS * 128 * scale / (255 if q["probability_scale"] is None else 1)
    difference = (actual - expected).abs()
    if q["out_dtype"] is torch.int8:
        assert (difference <= crossed.ceil()).all()
        share = difference.ne(0).double().mean().nan_to_num().item()
        print(f"{share:.1e} of {difference.numel()} integers differ")
        assert share <= MAX_DIFFERING or difference.ne(0).any(-1).sum() <= CROSSINGS
    else:
        rounding = RELATIVE + torch.finfo(q["out_dtype"]).eps
        assert (difference <= crossed + rounding * expected.abs()).all()


MASKS = {
    "none": lambda b, h, t, s, g: None,
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
@pytest.mark.parametrize("form", FORMS)
def test_masks(mask, is_causal, form):
    b, h, t, s = 2, 2, 20, 83
    q = operands(b, h, 1, t, s, 32, form, seed=FORMS.index(form)) | dict(is_causal=is_causal)
    q["mask"] = MASKS[mask](b, h, t, s, torch.Generator().manual_seed(1))
    assert_same(q)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6, 2, 33, 130, 64), (1, 2, 2, 1, 129, 80)])
def test_outputs(form, out_dtype, shape):
    assert_same(operands(*shape, form, out_dtype))


@pytest.mark.parametrize("d", [16, 24, 96, 128, 160, 256])
@pytest.mark.parametrize("form", FORMS)
def test_head_dims(d, form):
    assert_same(operands(1, 2, 1, 20, 70, d, form) | dict(is_causal=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t, s", [(1, 1), (3, 1), (65, 64), (64, 65), (129, 3), (20, 300)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_ragged(form, t, s, is_causal):
    assert_same(operands(1, 2, 2, t, s, 16, form) | dict(is_causal=is_causal))


@pytest.mark.parametrize("b, t, s", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty(b, t, s, form, is_causal):
    assert_same(operands(b, 2, 1, t, s, 16, form) | dict(is_causal=is_causal))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_scales_of_one_head_and_of_any_sign(form, masked):
    """One scale for all heads, a negative and a zero one, which turn the order of the scores around or end it."""
    q = operands(1, 3, 1, 17, 40, 32, form)
    q["out_scale"] = q["out_scale"][:, :1, :, :1]
    q["score_scale"] = q["score_scale"] * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    if masked:
        q["mask"] = torch.rand(17, 40, generator=torch.Generator().manual_seed(2)) > 0.5
        q["mask"][3] = False
    assert_same(q)
    q["score_scale"] = q["score_scale"][:, :1]
    assert_same(q)


@pytest.mark.parametrize("form", FORMS)
def test_layouts(form):
    """Contiguous heads, one product of all three, features that do not lie side by side, rows backwards in a batch."""
    q = operands(2, 2, 2, 19, 19, 16, form)
    names = "query", "key", "value"
    expected = cuda.int8_attention(**q)
    together = torch.stack([q[name] for name in names], 2)
    for layout in (
        {name: q[name].contiguous() for name in names},
        {name: together[:, :, i] for i, name in enumerate(names)},
        {name: q[name].transpose(2, 3).contiguous().transpose(2, 3) for name in names},
        {name: q[name].flip(0).contiguous()[[1, 0]] for name in names},
    ):
        assert torch.equal(cuda.int8_attention(**(q | layout)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_integers(form):
    """Sums at their largest: -128 everywhere, the longest products that fit the features."""
    q = operands(1, 1, 1, 2, 200, 256, form)
    q["query"], q["key"], q["value"] = (torch.full_like(q[name], -128) for name in ("query", "key", "value"))
    q["key"][:, :, 100:] = 127
    assert_same(q)


def one_key(value: int, probability_scale: float | None, out_scale: float) -> float:
    """One key: its probability is exactly 1."""
    x, scale = torch.full((1, 1, 1, 1), value, dtype=torch.int8), torch.ones(1, 1, 1, 1)
    step = None if probability_scale is None else scale * probability_scale
    return cuda.int8_attention(x, x, x, scale, None, False, step, scale * out_scale, torch.int8).item()


def test_rounding_is_half_to_even_and_saturates():
    assert [one_key(1, 1 / 1.5, 1.0), one_key(1, 1 / 2.5, 1.0)] == [2, 2]  # of probabilities
    assert [one_key(5, 1.0, 0.5), one_key(7, 1.0, 0.5), one_key(-5, 1.0, 0.5)] == [2, 4, -2]  # of outputs
    assert [one_key(1, 1 / 256, 0.25), one_key(1, 1e-30, 0.25)] == [64, 64]  # 255 is the last probability
    assert [one_key(100, 1.0, 2.0), one_key(-100, 1.0, 2.0), one_key(100, 1.0, 1e30)] == [127, -128, 127]
    assert [one_key(77, None, 1.0), one_key(-128, None, 1.0)] == [77, -128]


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_keys_are_zeros_and_nan_is_not_hidden(form):
    q = operands(1, 2, 1, 4, 40, 16, form, torch.float32)
    mask = torch.zeros(4, 40)
    mask[1] = -math.inf
    mask[2, 30] = math.nan
    mask[3, 7] = math.inf
    for out_dtype in (torch.float32, torch.int8):
        assert_same(q | dict(mask=mask, out_dtype=out_dtype))
    out = cuda.int8_attention(**(q | dict(mask=mask)))
    assert not out[:, :, 1].any() and out.isnan().any(-1)[0, 0].tolist() == [False, False, True, True]
    for name in ("score_scale", "probability_scale", "out_scale"):
        if q[name] is not None:
            poisoned = q[name].clone()
            poisoned[:, 1] = math.nan
            assert_same(q | {name: poisoned, "mask": mask})
            assert_same(q | {name: poisoned})


def test_exponentials_of_equal_scores_need_no_tolerance():
    """Keys that all score alike: exponentials are exactly 1, and so all integers are the reference's."""
    for form in FORMS:
        q = operands(1, 2, 1, 20, 90, 32, form)
        q["key"] = q["key"][:, :, :1].expand(-1, -1, 90, -1)
        for is_causal in (False, True):
            q["is_causal"] = is_causal
            assert torch.equal(cuda.int8_attention(**q), int8_attention(*q.values()))
