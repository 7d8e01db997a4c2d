"""Softmax^quant: at most a step from the formula of int8_attention, whatever takes part."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda.interpreter.rows import DTYPES, assert_at_most_a_step, assert_each_byte_once, assert_like_its_fake
from tests.cuda.interpreter.sanitizer import counted
from zq_compiler.kernels.cuda.softmax_quantize import softmax_quantize

B, H, T = 2, 3, 5
MASKS = ("none", "keys", "heads", "all", "added", "nothing seen")


def reference(
    scores: Tensor, mask: Tensor | None, is_causal: bool, probability_scale: Tensor | None, signed: bool = False
) -> tuple[Tensor, Tensor]:
    a = scores.float()
    if mask is not None:
        a = a.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else a + mask.float()
    if is_causal:
        a = a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    top = a.amax(-1, keepdim=True)
    exponentials = (a - top.masked_fill(top == -math.inf, 0.0)).exp()
    total = exponentials.sum(-1, keepdim=True).clamp(min=1)
    if probability_scale is None:
        return (exponentials * 255).round().nan_to_num(nan=0.0).to(torch.uint8), total
    most, dtype = (127, torch.int8) if signed else (255, torch.uint8)
    steps = (exponentials / total / probability_scale).round().clamp(max=most)
    return steps.nan_to_num(nan=0.0).to(dtype), total


def mask_of(kind: str, s: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "added":
        return torch.randn(H, T, s)
    shape = {"keys": (B, 1, 1, s), "heads": (H, 1, s), "all": (B, H, T, s), "nothing seen": (B, 1, T, 1)}[kind]
    return torch.rand(shape) > 0.4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("s", [7, 100])
def test_softmax(s, mask, dtype):
    torch.manual_seed(s)
    scores, mask = (3 * torch.randn(B, H, T, s)).to(dtype), mask_of(mask, s)
    per_head = torch.rand(1, H, 1, 1) / 100 + 1e-3
    for is_causal in (False, True):
        for probability_scale, signed in ((None, False), (per_head, False), (per_head[:, :1], True)):
            operands = scores, mask, is_causal, probability_scale, signed
            q, total = softmax_quantize(*operands)
            q_expected, expected = reference(*operands)
            assert_at_most_a_step(q, q_expected, f"{dtype} causal={is_causal}")
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_long_rows_have_the_whole_range():
    """Of the token-wise form; a static one only has a largest step."""
    scores, mask = 3 * torch.randn(1, 2, 2, 1030), torch.rand(1, 1, 2, 1030) > 0.4
    for probability_scale in (None, torch.full((1, 1, 1, 1), 1e-4)):
        actual, expected = (op(scores, mask, False, probability_scale)[0] for op in (softmax_quantize, reference))
        assert_at_most_a_step(actual, expected)
    q, total = softmax_quantize(torch.zeros(1, 1, 2, 3000), None, False, None)
    assert (q == 255).all() and (total == 3000).all()
    for signed, most in ((False, 255), (True, 127)):
        q, _ = softmax_quantize(torch.zeros(1, 1, 2, 2), None, False, torch.full((1, 1, 1, 1), 1e-6), signed)
        assert (q == most).all()


def test_rows_with_nan_become_zeros_and_say_so():
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 3, 40)
    scores[0, 0, 1, 3], scores[0, 1, 0, 39] = torch.nan, torch.inf
    for probability_scale in (None, torch.full((1, 1, 1, 1), 1 / 255)):
        q, total = softmax_quantize(scores, None, False, probability_scale)
        q_expected, expected = reference(scores, None, False, probability_scale)
        assert_at_most_a_step(q, q_expected)
        assert torch.equal(total.isnan(), expected.isnan()) and total.isnan().sum() == 2


def test_each_byte_moves_once_and_later_keys_none():
    scores = torch.randn(B, H, T, 1030)
    scale, mask = torch.full((1, H, 1, 1), 0.01), torch.rand(B, 1, 1, 1030) > 0.5
    with counted() as traffic:
        q, total = softmax_quantize(scores, mask, False, scale)
    assert_each_byte_once(traffic, {"scores_ptr": scores}, {"q_ptr": q, "total_ptr": total}, cached=(mask, scale))
    square = torch.randn(1, 1, 100, 100)
    with counted() as traffic:
        softmax_quantize(square, None, True, None)
    assert traffic.read == sum(min(t // 16 * 16 + 16, 100) for t in range(100)) * square.element_size()
    padded = torch.randn(B, H, T, 1040)[..., :1030]
    with counted() as traffic:
        q, total = softmax_quantize(padded, None, False, None)
    assert_each_byte_once(traffic, {"scores_ptr": padded}, {"q_ptr": q, "total_ptr": total})


def test_no_rows_and_fakes():
    assert softmax_quantize(torch.empty(0, H, T, 40), None, False, None)[1].shape == (0, H, T, 1)
    op, scores = torch.ops.zq_cuda.softmax_quantize.default, torch.randn(B, T, H, 40)
    for each in (scores.transpose(1, 2), scores.transpose(1, 2).contiguous()):
        assert_like_its_fake(op, each, None, True, None)
        assert_like_its_fake(op, each, None, False, torch.full((1, 1, 1, 1), 0.01), True)
