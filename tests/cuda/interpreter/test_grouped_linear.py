"""Linears of experts: each expert's rows as `int8_linear` has them, wherever the router's offsets lie."""

import pytest
import torch

from tests.cuda.interpreter.linears import TILES, force, integers
from zq_compiler import kernels
from zq_compiler.kernels.cuda import grouped_linear as cuda

SMALL = {**TILES, "BLOCK_M": 16, "BLOCK_K": 32, "GROUP_M": 2}


def each_expert(x_q, x_scale, w_q, w_scale, offsets, dtype):
    """The reference."""
    pieces, start = [], 0
    for w, scale, end in zip(w_q, w_scale, offsets.tolist(), strict=True):
        rows = slice(start, end)
        row_scale = x_scale if x_scale is None or x_scale.numel() == 1 else x_scale[rows]
        pieces.append(kernels.int8_linear(x_q[rows], row_scale, w, scale[:, None], None, dtype))
        start = end
    return torch.cat(pieces)


@pytest.mark.parametrize(
    "ends",
    [(16, 32, 48), (5, 5, 37), (0, 0, 20), (20, 20, 20), (1, 2, 3, 4, 21), (33,)],
    ids=lambda ends: "-".join(map(str, ends)),
)
def test_each_expert_has_its_rows(ends, monkeypatch):
    force(monkeypatch, cuda, SMALL)
    torch.manual_seed(0)
    t, e, n, k = ends[-1], len(ends), 70, 50
    x, w, w_scale = integers(t, k), integers(e, n, k), torch.rand(e, n) * 0.01
    offsets = torch.tensor(ends, dtype=torch.int32)
    scales = (torch.rand(t, 1), torch.float16), (torch.tensor([[0.3]]), torch.bfloat16), (None, torch.float32)
    for x_scale, dtype in scales:
        want = each_expert(x, x_scale, w, w_scale, offsets, dtype)
        assert torch.equal(cuda.grouped_int8_linear(x, x_scale, w, w_scale, offsets, dtype), want)


def test_a_programs_rows_end_with_its_experts(monkeypatch):
    force(monkeypatch, cuda, {**SMALL, "BLOCK_M": 64})
    x, w = torch.ones(10, 32, dtype=torch.int8), torch.arange(1, 5, dtype=torch.int8)[:, None, None].expand(4, 16, 32)
    offsets = torch.tensor([3, 3, 4, 10], dtype=torch.int32)
    got = cuda.grouped_int8_linear(x, None, w, torch.ones(4, 16), offsets, torch.float32)
    assert (got[:, 0] / 32).tolist() == [1, 1, 1, 3, 4, 4, 4, 4, 4, 4]


def test_rows_that_no_expert_has_stay_as_they_are(monkeypatch):
    force(monkeypatch, cuda, SMALL)
    x, w, offsets = integers(40, 32), integers(2, 16, 32), torch.tensor([7, 21], dtype=torch.int32)
    got = cuda.grouped_int8_linear(x, None, w, torch.ones(2, 16), offsets, torch.float32)
    assert torch.equal(got[:21], each_expert(x[:21], None, w, torch.ones(2, 16), offsets, torch.float32))
    assert got[21:].isnan().all()  # memory is poisoned here


def test_no_rows_and_the_fakes_result():
    x, w, offsets = integers(0, 32), integers(2, 16, 32), torch.zeros(2, dtype=torch.int32)
    assert cuda.grouped_int8_linear(x, None, w, torch.ones(2, 16), offsets, torch.float16).shape == (0, 16)
    given = integers(5, 32), torch.rand(5, 1), w, torch.rand(2, 16, 1), offsets + 5, torch.float16
    torch.library.opcheck(torch.ops.zq_cuda.grouped_int8_linear.default, given, test_utils="test_faketensor")
