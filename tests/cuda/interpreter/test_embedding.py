"""Gathered rows: exact, and the norm and the quantize of their sums as norm_quantize has them."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.interpreter.rows import DTYPES, assert_at_most_a_step, assert_each_byte_once, assert_like_its_fake
from tests.cuda.interpreter.sanitizer import counted
from zq_compiler import kernels, numerics
from zq_compiler.kernels.cuda.embedding import embedding_layer_norm_quantize, int8_embedding

EPS = 1e-12


def table(v, k):
    torch.manual_seed(v * k)
    return numerics.quantize_per_channel(torch.randn(v, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 48, 100, 1100])
def test_rows_are_exact(k, dtype):
    table_q, table_scale = table(11, k)
    for ids in (torch.randint(0, 11, (2, 3)), torch.arange(11, dtype=torch.int32), torch.tensor(7)):
        actual = int8_embedding(ids, table_q, table_scale, dtype)
        assert torch.equal(actual, kernels.int8_embedding(ids, table_q, table_scale, dtype))
        assert actual.dtype is dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [48, 100, 1100])
def test_layer_norm_quantize(k, dtype):
    table_q, table_scale = table(11, k)
    ids = torch.randint(0, 11, (2, 5))
    w, b = torch.randn(2, k).to(dtype)
    rotated = k % 16 == 0
    for shape in ((2, 5, k), (1, 5, k), (5, k), (k,), (2, 1, k), (2, 5, 1), (3, 1, 1, k)):
        others = torch.randn(shape).to(dtype)
        actual = embedding_layer_norm_quantize(ids, table_q, table_scale, others, w, b, EPS, rotated)
        expected = kernels.embedding_layer_norm_quantize(ids, table_q, table_scale, others, w, b, EPS, rotated)
        assert_at_most_a_step(actual[0], expected[0], f"{dtype} {shape}")
        q_of_y, scale_of_y = numerics.quantize_per_token(actual[2], rotated)
        assert torch.equal(actual[0], q_of_y) and torch.equal(actual[1], scale_of_y)
        torch.testing.assert_close(actual[2], expected[2], rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_each_byte_moves_once():
    """Rows of the table and of the positions are read where they are, even if the batch shares the latter."""
    table_q, table_scale = table(50, 1100)
    ids = torch.randperm(50)[:8].view(2, 4)
    with counted() as traffic:
        x = int8_embedding(ids, table_q, table_scale, torch.float16)
    rows = {"ids_ptr": ids, "table_ptr": table_q[:8], "table_scale_ptr": table_scale[:8]}
    assert_each_byte_once(traffic, rows, {"x_ptr": x})
    others, w, b = torch.randn(1, 4, 1100), torch.randn(1100), torch.randn(1100)
    with counted() as traffic:
        q, scale, y = embedding_layer_norm_quantize(ids, table_q, table_scale, others, w, b, EPS)
    assert_each_byte_once(traffic, rows, {"q_ptr": q, "scale_ptr": scale, "y_ptr": y}, cached=(others, w, b))


def test_ids_out_of_the_table_read_nothing_and_give_nan():
    table_q, table_scale = table(11, 100)
    ids = torch.tensor([3, -1, 11, 2**40])
    x = int8_embedding(ids, table_q, table_scale, torch.float32)
    assert x[1:].isnan().all() and torch.equal(x[0], numerics.dequantize(table_q, table_scale)[3])
    q, scale, _ = embedding_layer_norm_quantize(ids, table_q, table_scale, torch.randn(4, 100), None, None, EPS)
    assert scale[1:].isnan().all() and not q[1:].any() and scale[0].isfinite()


def test_no_ids_and_fakes():
    table_q, table_scale = table(11, 32)
    none = torch.empty(0, 4, dtype=torch.int64)
    assert int8_embedding(none, table_q, table_scale, torch.float16).shape == (0, 4, 32)
    ids = torch.randint(0, 11, (2, 4))
    for each in (ids, ids.t()):
        others = torch.randn(*each.shape, 32)
        assert_like_its_fake(torch.ops.zq_cuda.int8_embedding.default, each, table_q, table_scale, torch.bfloat16)
        operands = each, table_q, table_scale, others, None, None, EPS
        assert_like_its_fake(torch.ops.zq_cuda.embedding_layer_norm_quantize.default, *operands)
