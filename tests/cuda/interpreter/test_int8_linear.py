"""INT8 linear on CUDA: the reference's bits, whatever the tiles, the split of K and the epilogue."""

import pytest
import torch

from tests.cuda.interpreter.linears import SPLIT, TILES, force, integers, operands
from zq_compiler import kernels
from zq_compiler.kernels.cuda import int8_linear as cuda

DTYPES = torch.float32, torch.float16, torch.bfloat16
SHAPES = (1, 5, 33), (7, 65, 100), (130, 70, 128)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", ["rows", "one", "none"])
def test_bits_are_the_references(shape, scale, monkeypatch):
    force(monkeypatch, cuda, TILES)
    bits_are_the_references(*shape, scale)


@pytest.mark.parametrize("scale", ["rows", "one", "none"])
def test_bits_are_the_references_with_k_split(scale, monkeypatch):
    force(monkeypatch, cuda, SPLIT)
    bits_are_the_references(20, 65, 100, scale)


def bits_are_the_references(m, n, k, scale):
    for bias, dtype in ((None, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)):
        given = operands(m, n, k, scale, bias)
        want = kernels.int8_linear(*given, dtype)
        got = cuda.int8_linear(*given, dtype)
        assert got.dtype is dtype
        assert torch.equal(got, want)
    given = operands(m, n, k, scale, torch.float32, spread=90)  # saturates now and then
    want = kernels.int8_linear_quantize(*given)
    assert {-128, 127} <= set(want.flatten().tolist()) or want.numel() < 100
    assert torch.equal(cuda.int8_linear_quantize(*given), want)


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_one_step_off_at_most(dtype, approximate, tiles, monkeypatch):
    force(monkeypatch, cuda, tiles)
    given = operands(16, 65, 100, "rows", dtype, spread=2)
    tail = torch.tensor([[2e-4]])  # of what is left of negative numbers, where erf and tanh are two steps apart
    for out_scale in (torch.rand(1, 65) * 0.05 + 0.01, torch.tensor([[0.02]]), tail):
        want = kernels.int8_linear_gelu_quantize(*given, dtype, approximate, out_scale)
        got = cuda.int8_linear_gelu_quantize(*given, dtype, approximate, out_scale)
        off = (got.int() - want.int()).abs()
        print(f"{dtype} {approximate}: {(off > 0).float().mean():.4%} of integers differ")
        assert off.max() <= 1
        assert (off > 0).float().mean() < 0.01
        assert want.float().std() > 10


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_is_added_to_what_was_rounded(dtype, tiles, monkeypatch):
    force(monkeypatch, cuda, tiles)
    given = operands(7, 65, 100, "rows", dtype)
    residual = torch.randn(7, 65).to(dtype)
    want = kernels.int8_linear(*given, dtype) + residual
    assert torch.equal(torch.ops.zq_cuda.int8_linear_add(*given, residual, dtype), want)
    if dtype is not torch.float32:
        once = (kernels.int8_linear(*given, torch.float32) + residual.float()).to(dtype)
        assert not torch.equal(once, want)


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
def test_nan_scales_stay_nan_and_become_zeros(tiles, monkeypatch):
    force(monkeypatch, cuda, tiles)
    x, x_scale, w, w_scale, bias = operands(9, 33, 50, "rows", torch.float32)
    x_scale[4], w_scale[7], x_scale[5] = float("nan"), float("nan"), float("inf")
    given = x, x_scale, w, w_scale, bias
    got = cuda.int8_linear(*given, torch.float16)
    assert got[4].isnan().all() and got[:, 7].isnan().all() and got[5, :7].isinf().all()
    assert torch.equal(got.nan_to_num(), kernels.int8_linear(*given, torch.float16).nan_to_num())
    quantized = cuda.int8_linear_quantize(*given)
    assert not quantized[4].any() and not quantized[:, 7].any()
    assert torch.equal(quantized, kernels.int8_linear_quantize(*given))
    out_scale = torch.full((1, 33), 0.1)
    quantized = cuda.int8_linear_gelu_quantize(*given, torch.float32, "none", out_scale)
    want = kernels.int8_linear_gelu_quantize(*given, torch.float32, "none", out_scale)
    assert not quantized[4].any() and not quantized[:, 7].any()
    off = (quantized.int() - want.int()).abs()
    assert off[torch.arange(9) != 5].max() <= 1  # on a CPU torch takes GELU of Inf for NaN


def test_halves_round_to_even():
    x, w = torch.eye(16, dtype=torch.int8), torch.arange(-8, 8, dtype=torch.int8).repeat(16, 1)
    given = x, None, w, torch.full((16, 1), 0.5), None
    want = kernels.int8_linear_quantize(*given)
    assert want[9:14, 0].tolist() == [0, 1, 2, 2, 2]
    assert torch.equal(cuda.int8_linear_quantize(*given), want)


@pytest.mark.parametrize("tiles", [TILES, SPLIT], ids=["tiles", "split"])
def test_sums_beyond_float32_are_exact_integers_first(tiles, monkeypatch):
    force(monkeypatch, cuda, {**tiles, "BLOCK_K": 512})
    k = 2100
    x, w = torch.full((3, k), -128, dtype=torch.int8), torch.full((5, k), 127, dtype=torch.int8)
    w[:, ::7] = torch.arange(5, dtype=torch.int8)[:, None]
    one = torch.ones(5, 1)
    got = cuda.int8_linear(x, None, w, one, None, torch.float32)
    assert got.abs().min() > 2**24
    assert torch.equal(got, (x.long() @ w.long().t()).float())


def test_programs_in_groups_cover_every_tile_once(monkeypatch):
    force(monkeypatch, cuda, {**TILES, "BLOCK_M": 16, "BLOCK_N": 16, "GROUP_M": 2})
    given = operands(70, 50, 16, "rows", None)  # 5 by 4 tiles: groups of 2, 2 and 1 rows of tiles
    assert torch.equal(cuda.int8_linear(*given, torch.float16), kernels.int8_linear(*given, torch.float16))


def test_parts_of_k_may_be_empty(monkeypatch):
    force(monkeypatch, cuda, {**SPLIT, "BLOCK_K": 16, "SPLIT_K": 8})
    given = operands(3, 20, 40, "rows", torch.float32)  # three parts of eight have something
    assert torch.equal(cuda.int8_linear(*given, torch.float16), kernels.int8_linear(*given, torch.float16))


def test_no_rows_any_leading_dimensions_and_strides():
    _, _, w, w_scale, bias = operands(1, 20, 64, "rows", torch.float16)
    x, x_scale = integers(2, 3, 128)[..., ::2], torch.rand(3, 2, 1).transpose(0, 1)
    assert not x.is_contiguous() and not x_scale.is_contiguous()
    given = x, x_scale, w, w_scale, bias
    want = kernels.int8_linear(*given, torch.float32)
    assert want.shape == (2, 3, 20)
    assert torch.equal(cuda.int8_linear(*given, torch.float32), want)
    wide = w.repeat_interleave(2, 1)[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(cuda.int8_linear(x, x_scale, wide, w_scale, bias, torch.float32), want)
    assert torch.equal(
        cuda.int8_linear(x, x_scale[:1, :1], w, w_scale, bias, torch.float32),
        kernels.int8_linear(x, x_scale[:1, :1], w, w_scale, bias, torch.float32),
    )
    empty = cuda.int8_linear_quantize(x[:, :0], x_scale[:, :0], w, w_scale, bias)
    assert empty.shape == (2, 0, 20) and empty.dtype is torch.int8


def test_the_fakes_results_look_alike():
    given = operands(4, 20, 32, "rows", torch.float16)
    arguments = (*given, torch.randn(4, 20).half(), torch.float16)
    torch.library.opcheck(
        torch.ops.zq_cuda.int8_linear_add.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
