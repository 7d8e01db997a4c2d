"""The explicit form of INT8 attention, against the formula in float64 and against torch's own attention."""

import pytest
import torch

from tests.kernels.formulas import data
from zq_compiler.kernels import quantized_softmax_attention

B, H, T, S, D = 2, 4, 5, 7, 16
Q, K, V = data((B, H, T, D)), data((B, 2, S, D), seed=1), data((B, 2, S, D), seed=2)
ALLOWED = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) > 0.3
ALLOWED[1, 0, 2] = False  # a row that is wholly masked
ADDED = torch.zeros(T, S).masked_fill(torch.arange(S) > 4, -torch.inf)
STEP = torch.tensor([1 / 255, 1 / 300, 1 / 200, 1 / 255]).reshape(1, H, 1, 1)


def formula(mask, causal, scale, step):
    """Row by row, head by head."""
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = (K[b, h // 2].double() @ Q[b, h, t].double()) * scale
                if mask is not None:
                    row = mask.expand(B, H, T, S)[b, h, t]
                    scores = torch.where(row, scores, -torch.inf) if mask.dtype is torch.bool else scores + row
                if causal:
                    scores[t + 1 :] = -torch.inf
                if scores.max() == -torch.inf:
                    continue
                e = (scores - scores.max()).exp()
                if step is None:
                    p = (e * 255).round() / (255 * e.sum())
                else:
                    p = (e / e.sum() / step[0, h, 0, 0].double()).round().clamp(max=255) * step[0, h, 0, 0].double()
                out[b, h, t] = p @ V[b, h // 2].double()
    return out


@pytest.mark.parametrize("step", [None, STEP])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), (ALLOWED, False), (ADDED, True)])
def test_is_the_formula(mask, causal, scale, step):
    got = quantized_softmax_attention(Q, K, V, mask, causal, scale, step)
    want = formula(mask, causal, D**-0.5 if scale is None else scale, step)
    # A probability at a tie may round the other way in float32: one step of it, times a value.
    assert (got - want).abs().max() <= V.abs().max() / 200
    assert ((got - want).abs() > 1e-5).float().mean() < 0.05
    if mask is ALLOWED:
        assert torch.equal(got[1, :, 2], torch.zeros(H, D))


def test_is_close_to_the_attention_it_stands_for():
    keys, values = (x.repeat_interleave(2, 1) for x in (K, V))
    exact = torch.nn.functional.scaled_dot_product_attention(Q, keys, values)
    got = quantized_softmax_attention(Q, K, V, None, False, None, None)
    assert (got - exact).abs().max() <= S * V.abs().max() / 255 / 2  # half a step of each probability
    half = quantized_softmax_attention(Q.bfloat16(), K.bfloat16(), V.bfloat16(), None, False, None, None)
    assert half.dtype is torch.bfloat16
