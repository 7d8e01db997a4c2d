"""Weights become integers: those of `numerics`, stored under the weight's name."""

import pytest
import torch
from torch import nn

from tests.programs import Block, after, captured, changes, dialect, randn, run
from tests.tolerances import W8A8_DB
from zq_compiler import WeightError
from zq_compiler.numerics import quantize_per_channel, sqnr
from zq_compiler.passes.fold_quantize import FoldQuantize
from zq_compiler.program import constants

X = randn(3, 32)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain"])
def test_integers_are_those_of_numerics(recipe):
    block = Block(lambda self, x: self.b(self.a(x)))
    program = after(captured(block, X, recipe=recipe), "fold_quantize", check=True)
    assert changes(program, "fold_quantize") == 2
    assert dialect(program) == {"quantize_per_token": 2, "dequantize": 4}
    stored = dict(constants(program.gm))
    for name in ("a", "b"):
        q, scale = quantize_per_channel(getattr(block, name).weight.detach(), recipe == "w8a8")
        assert torch.equal(stored[f"{name}.weight_q"], q) and stored[f"{name}.weight_q"].is_contiguous()
        assert torch.equal(stored[f"{name}.weight_scale"], scale)
    assert FoldQuantize()(program) == 0


def test_a_transposed_weight_is_quantized_along_its_outputs():
    block = Block(lambda self, x: x @ self.matrix)
    stored = dict(constants(after(captured(block, X), "fold_quantize").gm))
    q, scale = quantize_per_channel(block.matrix.detach().t(), True)
    assert torch.equal(stored["matrix_q"], q) and torch.equal(stored["matrix_scale"], scale)


def test_parts_and_transposes_of_one_weight_keep_their_own_integers():
    def forward(self, x):
        w = self.a.weight
        return nn.functional.linear(x, w), x @ w, nn.functional.linear(x, w[:16]), nn.functional.linear(x, w[16:])

    program = captured(forward, X)
    want = run(program, X)
    after(program, check=True)
    names = {name for name, _ in constants(program.gm) if name.endswith("_q")}
    assert names == {"a.weight_q", "a.weight_view1_q", "a.weight_view2_q", "a.weight_view3_q"}
    for w, y in zip(want, run(program, X), strict=True):
        assert sqnr(w, y) > W8A8_DB


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_weight_names_its_layer(poison):
    block = Block(lambda self, x: self.b(self.a(x)))
    with torch.no_grad():
        block.b.weight[3, 5] = poison
    with pytest.raises(WeightError, match=r"^b\.weight: the weight holds NaN or Inf.*checkpoint"):
        after(captured(block, X))


def test_graphs_share_integers_through_the_cache():
    cache = {}
    block = Block(lambda self, x: self.a(x))
    programs = [captured(block, X) for _ in range(2)]
    for program in programs:
        program.weight_cache = lambda name: cache.setdefault(name, {})
        after(program, "fold_quantize")
    first, second = (dict(constants(p.gm))["a.weight_q"] for p in programs)
    assert first is second
    assert list(cache) == ["a.weight"]


def test_a_released_weight_is_an_error_when_its_integers_are_not_known():
    block = Block(lambda self, x: self.a(x))
    program = captured(block, X)
    after(program, "insert_qdq")
    block.a.weight.untyped_storage().resize_(0)
    with pytest.raises(WeightError, match=r"a\.weight: the float weight was released"):
        FoldQuantize()(program)


def test_a_scale_beyond_float16_names_its_layer():
    block = Block(lambda self, x: self.b(self.a(x)))
    with torch.no_grad():
        block.b.weight[3, 5] = 1e7
    with pytest.raises(WeightError, match=r"^b\.weight: a group's scale exceeds float16.*per channel"):
        after(captured(block, X, recipe="w4a16-g64"))
    after(captured(block, X, recipe="fp6"))


def test_a_weight_times_a_number_of_no_dimension_is_folded():
    block = Block(lambda self, x: torch.nn.functional.linear(x, self.a.weight * self.gain))
    block.register_buffer("gain", torch.tensor(0.5))
    x = randn(4, 32)
    want = run(captured(block, x), x)[0]
    assert sqnr(want, run(after(captured(block, x, recipe="w8a8"), check=True), x)[0]) > 35
