"""The attention kernel: the reference's integers, except where a last-place difference of the softmax crosses a tie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.walls import before_a_wall
from zq_compiler.kernels import int8_attention
from zq_compiler.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.float16]
FORMS = ["static", "signed", "token-wise"]
# Of INT8 outputs: one probability that crosses a tie moves some outputs of its row by a step. Measured: 5e-6.
MAX_DIFFERING = 1e-4
# Probabilities of one row that cross a tie. Measured: at most one in 4000 examples.
CROSSINGS = 1
# Relative: the token-wise sum of exponentials is added up in another order, and they are right to 4e-7.
RELATIVE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    build.load()


def kernel(**arguments) -> Tensor:
    return torch.ops.zq_cpu.int8_attention(**arguments)


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
    """The kernel's output is the reference's, but for probabilities that cross a tie."""
    actual, expected = kernel(**q), int8_attention(*q.values())
    assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = actual.double().nan_to_num(), expected.double().nan_to_num()
    crossed = CROSSINGS * 128 * q["out_scale"].double().abs() / (255 if q["probability_scale"] is None else 1)
    if q["out_dtype"] is torch.int8:
        assert ((actual - expected).abs() <= crossed.ceil()).all()
    else:
        rounding = RELATIVE + torch.finfo(q["out_dtype"]).eps
        assert ((actual - expected).abs() <= crossed + rounding * expected.abs()).all()


MASKS = {
    "none": lambda b, h, t, s, g: None,
    "bool": lambda b, h, t, s, g: torch.rand(b, 1, t, s, generator=g) > 0.3,
    "of keys": lambda b, h, t, s, g: torch.rand(b, 1, 1, s, generator=g) > 0.3,
    "of rows": lambda b, h, t, s, g: torch.rand(t, 1, generator=g) > 0.3,
    "added": lambda b, h, t, s, g: torch.randn(h, t, s, generator=g),
    "transposed": lambda b, h, t, s, g: torch.randn(b, h, s, t, generator=g).transpose(2, 3),
    "most negative": lambda b, h, t, s, g: (
        torch.zeros(t, s).masked_fill(torch.rand(t, s, generator=g) < 0.4, torch.finfo(torch.bfloat16).min).bfloat16()
    ),
    "infinite": lambda b, h, t, s, g: torch.randn(b, h, 1, s, generator=g).masked_fill(
        torch.rand(s, generator=g) < 0.4, -torch.inf
    ),
}


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3])),
    st.integers(0, 20),
    st.integers(0, 70),
    st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 100, 128])),
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
    st.sampled_from(list(MASKS)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(sizes, t, s, d, form, out_dtype, mask, is_causal, seed):
    b, h_kv, group = sizes
    q = operands(b, h_kv * group, h_kv, t, s, d, form, out_dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    assert_same(q | dict(mask=MASKS[mask](b, h_kv * group, t, s, g), is_causal=is_causal))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape, is_causal",
    [
        ((2, 12, 12, 128, 128, 64), False),
        ((1, 8, 2, 250, 250, 128), True),
        ((1, 2, 2, 6, 4096, 64), False),
        ((4, 8, 2, 1, 4101, 80), False),
        ((1, 2, 1, 40, 600, 256), False),
    ],
)
def test_against_the_reference_at_model_sizes(shape, is_causal, form, capsys):
    q = operands(*shape, form) | dict(is_causal=is_causal)
    actual, expected = kernel(**q).int(), int8_attention(*q.values()).int()
    differing = (actual != expected).double().mean().item()
    with capsys.disabled():
        print(f"\n{shape} {form}: {differing:.1e} of the integers differ", end=" ")
    assert actual.abs().max() > 20  # there is something to compare
    assert (actual - expected).abs().max() <= 1
    assert differing <= MAX_DIFFERING


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_key_a_row_is_exact(out_dtype, form, mask, is_causal):
    """Then there is no sum and no tie to cross: every bit is the reference's."""
    q = operands(2, 6, 3, 19, 33, 21, form, out_dtype) | dict(is_causal=is_causal)
    chosen = torch.nn.functional.one_hot(torch.arange(19) // 2, 33).bool()
    q["mask"] = chosen if mask is torch.bool else torch.zeros(19, 33).masked_fill(~chosen, -torch.inf).to(mask)
    assert torch.equal(kernel(**q), int8_attention(*q.values()))
    q["mask"] = torch.zeros(19, 33).masked_fill(~chosen, torch.finfo(torch.float32).min)
    assert torch.equal(kernel(**q), int8_attention(*q.values()))
    single = operands(2, 6, 3, 19, 1, 21, form, out_dtype)
    assert torch.equal(kernel(**single), int8_attention(*single.values()))


@pytest.mark.parametrize("s", [5, 64, 1000, 4096])
def test_equal_keys_are_exact(s):
    """All exponentials are 1 and their sum is an integer: the product with V alone is seen, at its largest."""
    q = operands(1, 2, 1, 7, s, 70, "token-wise", torch.float32)
    q["key"] = q["key"][:, :, :1].expand_as(q["key"])
    assert torch.equal(kernel(**q), int8_attention(*q.values()))
    q["value"] = torch.full_like(q["value"], -128)
    assert torch.equal(kernel(**q), int8_attention(*q.values()))


@pytest.mark.parametrize("query, key", [(127, 127), (-128, 127), (-128, -128), (127, -128)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e30, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_scores(query, key, scale, form):
    q = operands(1, 2, 2, 7, 50, 256, form, torch.float32)
    q["query"], q["key"][:, :, :3] = torch.full_like(q["query"], query), torch.tensor(key, dtype=torch.int8)
    q["key"][:, :, 20:] = -q["key"][:, :, 20:].clamp(min=-127)
    q["score_scale"] = torch.full((1, 1, 1, 1), scale)
    assert_same(q)
    assert_same(q | dict(mask=torch.full((7, 50), torch.finfo(torch.float32).min)))
    assert_same(q | dict(mask=torch.full((7, 50), torch.finfo(torch.float32).max)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_masked_rows_and_nan(form, out_dtype):
    q = operands(1, 2, 1, 9, 30, 20, form, out_dtype)
    q["mask"] = torch.zeros(9, 30)
    q["mask"][1] = -torch.inf
    q["mask"][4, 29], q["mask"][5, 3] = torch.nan, torch.inf
    assert_same(q)
    out = kernel(**q)
    assert not out[:, :, 1].any() and out[:, :, 2].any()
    poisoned = out[:, :, 4:6]
    assert not poisoned.any() if out_dtype is torch.int8 else poisoned.isnan().all()
    assert_same(q | dict(mask=torch.zeros(9, 30, dtype=torch.bool)))


@pytest.mark.parametrize("form, most", [("static", 255), ("signed", 127)])
def test_saturation(form, most):
    q = operands(1, 1, 1, 9, 30, 20, form)
    assert kernel(**q | dict(out_scale=torch.full((1, 1, 1, 1), 1e30))).abs().unique().tolist() in ([127], [-128, 127])
    full = q | dict(probability_scale=torch.full((1, 1, 1, 1), 1e-30), out_dtype=torch.float32)  # of every integer
    full["score_scale"] = torch.zeros(1, 1, 1, 1)
    assert torch.equal(
        kernel(**full), (most * full["value"].sum(2, keepdim=True) * full["out_scale"]).expand(1, 1, 9, 20)
    )


def test_strides():
    g = torch.Generator().manual_seed(0)
    q = operands(3, 4, 4, 30, 30, 48)
    fused = torch.randint(-128, 128, (3, 30, 3, 4, 48), dtype=torch.int8, generator=g)
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    wide = torch.randint(-128, 128, (3, 4, 70, 100), dtype=torch.int8, generator=g)
    for views in (
        (query, key, value),
        (wide[:, :, :30, 3:51], wide[:, :, 5:65:2, 7:55], wide[:, :, 40:, :48]),
        (query, wide[:, :, :30, 0:96:2], wide.transpose(2, 3)[:, :, :30, :48]),
        (query, key[:1].expand_as(key), value[:, :1].expand_as(value)),
    ):
        strided = q | dict(zip(("query", "key", "value"), views, strict=True))
        packed = q | dict(zip(("query", "key", "value"), (v.contiguous() for v in views), strict=True))
        out = kernel(**strided)
        assert torch.equal(out, kernel(**packed))
        assert out.stride() == (30 * 4 * 48, 48, 4 * 48, 1)


@pytest.mark.parametrize("d", [1, 21, 70])
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_nothing_is_read_beyond_the_end(d, mask):
    q = operands(1, 2, 1, 7, 33, d)
    q["mask"] = MASKS[mask](1, 2, 7, 33, torch.Generator().manual_seed(0))
    walled = {name: before_a_wall(q[name]) for name in ("query", "key", "value", "mask")}
    assert torch.equal(kernel(**q | walled), kernel(**q))


@pytest.mark.parametrize("shape", [(1, 3, 3, 100, 100, 64), (2, 4, 2, 130, 77, 33), (1, 4, 1, 1, 3000, 64)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_threads_do_not_change_a_bit(shape, is_causal):
    before = torch.get_num_threads()
    results = []
    for form in FORMS:
        q = operands(*shape, form, torch.float32) | dict(is_causal=is_causal)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel(**q))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[-3], results[-2]) and torch.equal(results[-3], results[-1])


def test_fake_matches_the_kernel():
    for form, out_dtype in (("static", torch.int8), ("token-wise", torch.bfloat16), ("signed", torch.int8)):
        q = operands(2, 4, 2, 5, 9, 12, form, out_dtype) | dict(is_causal=True)
        torch.library.opcheck(
            torch.ops.zq_cpu.int8_attention.default, (), q, test_utils=("test_schema", "test_faketensor")
        )


def test_compiles_with_dynamic_shapes():
    q = operands(1, 2, 2, 4, 4, 16)

    def layer(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (2, 16)).transpose(1, 2)
        out = kernel(**q | dict(query=split, key=split, value=split))
        return out.transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for tokens in (5, 12, 31):
            x = torch.randint(-128, 128, (2, tokens, 32), dtype=torch.int8)
            assert torch.equal(compiled(x), layer(x))


ONE = torch.ones(1, 1, 1, 1)
ERRORS = {
    "query must be Char": dict(query=torch.zeros(1, 2, 3, 4)),
    r"value must be \[B, H, T, D\]": dict(value=torch.zeros(3, 4, dtype=torch.int8)),
    "Hkv a divisor of H": dict(key=torch.zeros(1, 4, 5, 4, dtype=torch.int8)),
    r"key must be \[B, Hkv, S, D\]": dict(key=torch.zeros(1, 2, 5, 6, dtype=torch.int8)),
    r"value must be \[1, 2, 5, 4\]": dict(value=torch.zeros(1, 2, 6, 4, dtype=torch.int8)),
    "score_scale must be Float": dict(score_scale=ONE.double()),
    r"score_scale must broadcast to \[1, 2, 1, 1\]": dict(score_scale=torch.ones(1, 3, 1, 1)),
    r"probability_scale must broadcast to \[1, 2, 1, 1\]": dict(probability_scale=torch.ones(1, 1, 3, 1)),
    r"out_scale must broadcast to \[1, 2, 1, 4\]": dict(out_scale=torch.ones(1, 1, 1, 3)),
    r"mask must broadcast to \[1, 2, 3, 5\]": dict(mask=torch.zeros(3, 4)),
    "mask must be Bool or a float dtype": dict(mask=torch.zeros(3, 5, dtype=torch.int32)),
    "out_dtype must be Char, Float, BFloat16 or Half": dict(out_dtype=torch.int32),
    "S and D must be at most 65793": {k: torch.zeros(1, 2, 65794, 4, dtype=torch.int8) for k in ("key", "value")},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    good = operands(1, 2, 2, 3, 5, 4)
    kernel(**good)
    with pytest.raises(RuntimeError, match=message):
        kernel(**good | ERRORS[message])
