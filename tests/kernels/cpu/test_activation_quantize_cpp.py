"""GELU and SiLU-mul kernels: accurate functions, and integers within a step of the reference's."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zq_compiler import numerics
from zq_compiler.kernels import (
    gelu_quantize,
    gelu_quantize_static,
    silu_mul_quantize,
    silu_mul_quantize_static,
)
from zq_compiler.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["none", "tanh"]
ACTIVATIONS = ["gelu none", "gelu tanh", "silu_mul"]
# Where functions that differ in the last place fall on two sides of a tie. Measured: 2.5e-6 at most.
MAX_DIFFERING = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def both(
    name: str, x: Tensor, up: Tensor, rotated: bool = False
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(q, scale) of the kernel and of the reference."""
    if name == "silu_mul":
        return torch.ops.zq_cpu.silu_mul_quantize(x, up, rotated), silu_mul_quantize(x, up, rotated)
    form = name.split()[1]
    return torch.ops.zq_cpu.gelu_quantize(x, form, rotated), gelu_quantize(x, form, rotated)


def function_values(q: Tensor, scale: Tensor) -> Tensor:
    """With one value a row, the scale is its magnitude / 127 and q its sign."""
    return (q.double() * scale.double()).squeeze(-1)


def sweep() -> Tensor:
    """Dense where the functions bend, every magnitude elsewhere."""
    logarithmic = torch.logspace(-30, 30, 20001)
    return torch.cat([torch.linspace(-12, 12, 600001), logarithmic, -logarithmic, torch.zeros(1)])


@pytest.mark.parametrize("form", FORMS)
def test_gelu_is_accurate(form):
    x = sweep()
    x = x[(x == 0) | (x.abs() > 1e-10)]  # the scale has a floor
    got = function_values(*torch.ops.zq_cpu.gelu_quantize(x[:, None], form))
    exact = torch.nn.functional.gelu(x.double(), approximate=form)
    error = (got - exact).abs()
    assert (error <= 2e-7 * x.double().abs().clamp(min=1)).all()
    near_zero = (x.abs() < 0.1) & (x != 0)
    assert (error[near_zero] / exact[near_zero].abs()).max() < 5e-7  # a row of tiny values keeps its ratios


def test_silu_is_accurate():
    x = sweep()
    x = x[(x > -80) & ((x == 0) | (x.abs() > 1e-10))]
    up = torch.full_like(x, 2.0**20)  # keeps the tail above the floor of the scale
    got = function_values(*torch.ops.zq_cpu.silu_mul_quantize(x[:, None], up[:, None]))
    exact = torch.nn.functional.silu(x.double()) * up.double()
    kept = exact.abs() > 1e-11
    assert ((got - exact)[kept].abs() / exact[kept].abs()).max() < 5e-7


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ACTIVATIONS),
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape(name, rows, k, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x, up = ((torch.randn(*rows, k, generator=g) * 3).to(dtype) for _ in range(2))
    # Of a row wholly in the tail of GELU, torch's float32 form is mostly cancellation, so no oracle.
    x[..., 0], up[..., 0] = 1.5, 2.0
    (q, scale), (q_ref, scale_ref) = both(name, x, up)
    assert q.shape == x.shape and scale.shape == (*x.shape[:-1], 1)
    assert not q.numel() or (q.int() - q_ref.int()).abs().max() <= 1
    torch.testing.assert_close(scale, scale_ref, rtol=max(2e-6, torch.finfo(dtype).eps * 1.01), atol=1e-9)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_against_the_reference_at_model_sizes(name, dtype, rotated, capsys):
    g = torch.Generator().manual_seed(0)
    x, up = ((torch.randn(256, 3072, generator=g) * 2).to(dtype) for _ in range(2))
    (q, scale), (q_ref, scale_ref) = both(name, x, up, rotated)
    differing = (q != q_ref).double().mean().item()
    with capsys.disabled():
        print(f"\n{name} {dtype} rotated={rotated}: {differing:.1e} of the integers differ", end=" ")
    assert (q.int() - q_ref.int()).abs().max() <= 1
    assert differing <= MAX_DIFFERING
    torch.testing.assert_close(scale, scale_ref, rtol=max(1e-6, torch.finfo(dtype).eps * 1.01), atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_half_value(name, dtype):
    """One value a row shows the function itself: the exact one, rounded to the dtype."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs() > 1e-10) & (x.abs() < 1e30)][:, None]
    got = function_values(*both(name, x, torch.ones_like(x))[0])
    wide = x[:, 0].double()
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    exact = silu(wide) if name == "silu_mul" else gelu(wide, approximate=name.split()[1])
    below_normal = 3e-8  # half a step of a float16 denormal
    assert ((got - exact).abs() <= torch.finfo(dtype).eps * 0.501 * exact.abs() + below_normal).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("place", [0, 16, 36])
def test_poisoned_row(name, dtype, bad, place):
    x, up = torch.randn(3, 37).to(dtype), torch.randn(3, 37).to(dtype)
    clean = both(name, x, up)[0]
    x[1, place] = bad
    (q, scale), (q_ref, scale_ref) = both(name, x, up)
    assert scale[1].isnan().all() and scale_ref[1].isnan().all()
    assert not q[1].any() and not q_ref[1].any()
    assert torch.equal(q[::2], clean[0][::2]) and torch.equal(scale[::2], clean[1][::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_and_outliers(name, dtype):
    x = torch.zeros(4, 40, dtype=dtype)
    x[1, 7] = 6e4
    x[2, 7] = -6e4
    x[3] = -60
    (q, scale), (q_ref, scale_ref) = both(name, x, torch.ones_like(x))
    assert not q[0].any() and q[1, 7] == 127
    assert torch.equal(q[:3], q_ref[:3]) and torch.equal(scale[:3], scale_ref[:3])
    assert scale[3] <= 1e-12 / 127 * 1.001  # the tail ends in zeros, not in noise


def test_strides_and_threads():
    """Gate and up as halves of one linear's output, read in place."""
    wide = torch.randn(5, 300, 2 * 170)
    gate, up = wide.chunk(2, dim=-1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for x, y in ((gate, up), (gate.transpose(0, 1), up.transpose(0, 1)), (wide.mT, wide.mT), (gate[:0], up[:0])):
            for name in ACTIVATIONS:
                actual, expected = both(name, x, y)[0], both(name, x.contiguous(), y.contiguous())[0]
                assert all(torch.equal(a, e) and a.is_contiguous() for a, e in zip(actual, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_integers_are_those_of_the_kernels_own_values():
    """Beyond x = 6.1 both GELUs are x itself, so the integers must be quantize_per_token's, ties included."""
    x = torch.rand(200, 1000) * 100 + 7
    x = torch.cat([x, ((torch.arange(20, 127) + 0.5) / 127 * 110).expand(200, -1), torch.full((200, 1), 110.0)], 1)
    for rotated, form in itertools.product((False, True), FORMS):
        x = x[:, : x.shape[1] // 16 * 16] if rotated else x
        expected = numerics.quantize_per_token(x, rotated)
        for actual, wanted in zip(torch.ops.zq_cpu.gelu_quantize(x, form, rotated), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_fakes_match_the_kernels():
    x, utils = torch.randn(2, 3, 32, dtype=torch.bfloat16), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.zq_cpu.gelu_quantize.default, (x, "tanh"), test_utils=utils)
    torch.library.opcheck(torch.ops.zq_cpu.silu_mul_quantize.default, (x, x, True), test_utils=utils)


def test_errors_name_the_argument():
    ops, x = torch.ops.zq_cpu, torch.zeros(2, 8)
    for message, call in {
        "approximate must be none or tanh, got erf": lambda: ops.gelu_quantize(x, "erf"),
        "x must be Float, BFloat16 or Half": lambda: ops.gelu_quantize(x.double(), "none"),
        "K at least 1": lambda: ops.gelu_quantize(torch.zeros(2, 0), "none"),
        "gelu_quantize: a rotated row must": lambda: ops.gelu_quantize(x, "none", True),
        "silu_mul_quantize: a rotated row must": lambda: ops.silu_mul_quantize(x, x, True),
        r"up must be \[2, 8\]": lambda: ops.silu_mul_quantize(x, torch.zeros(8)),
        "up must be Float": lambda: ops.silu_mul_quantize(x, x.half()),
        "gate must be": lambda: ops.silu_mul_quantize(x.double(), x.double()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ACTIVATIONS),
    st.lists(st.integers(0, 5), max_size=2),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_static_scales(name, rows, k, dtype, one_scale, seed):
    g = torch.Generator().manual_seed(seed)
    x, up = ((torch.randn(*rows, k, generator=g) * 3).to(dtype) for _ in range(2))
    scale = (torch.rand(1 if one_scale else k, generator=g) / 20 + 1e-3).reshape([1] * len(rows) + [-1])
    if name == "silu_mul":
        got = torch.ops.zq_cpu.silu_mul_quantize_static(x, up, scale)
        expected = silu_mul_quantize_static(x, up, scale)
    else:
        got = torch.ops.zq_cpu.gelu_quantize_static(x, name.split()[1], scale)
        expected = gelu_quantize_static(x, name.split()[1], scale)
    assert got.dtype is torch.int8 and got.shape == x.shape
    # A half dtype rounds a last-place difference to its next value: 127 / 2^8 of a step and more.
    assert not got.numel() or (got.int() - expected.int()).abs().max() <= 1


def test_static_scales_saturate_and_drop_nan():
    x = torch.tensor([[1e30, 3.0, torch.nan, torch.inf, -torch.inf]])
    got = torch.ops.zq_cpu.silu_mul_quantize_static(x, torch.full_like(x, -1.0), torch.tensor([[1.0]]))
    assert got.tolist() == [[-128, -3, 0, -128, 0]]
    scales = torch.tensor([[1.0, 0.1, 1.0, 1.0, 1.0]])
    assert torch.ops.zq_cpu.gelu_quantize_static(x, "none", scales).tolist() == [[127, 30, 0, 127, 0]]


def test_static_scales_at_model_sizes(capsys):
    g = torch.Generator().manual_seed(0)
    x, scale = torch.randn(256, 3072, generator=g) * 2, torch.rand(1, 3072, generator=g) / 20 + 1e-3
    differing = (
        (torch.ops.zq_cpu.gelu_quantize_static(x, "none", scale) != gelu_quantize_static(x, "none", scale))
        .double()
        .mean()
        .item()
    )
    with capsys.disabled():
        print(f"\nstatic: {differing:.1e} of the integers differ", end=" ")
    assert differing <= MAX_DIFFERING
