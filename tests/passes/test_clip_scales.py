"""Clip search: the scale of least error among those tried, group by group."""

import pytest
import torch

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, randn
from zq_compiler.formats import FORMATS
from zq_compiler.numerics import (
    WHOLE,
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_weight,
    rotate,
    scales_and_zeros,
)
from zq_compiler.passes.clip_scales import LEAST, STEPS
from zq_compiler.program import constants

X = randn(3, 32)


@pytest.mark.parametrize(
    ("recipe", "format", "group"),
    [("w4a16-g64", "int4", 64), ("w2a16-g64-asym", "int2_asym", 64), ("w3a16-g64", "int3", 64), ("fp6", "fp6_e3m2", 0)],
)
def test_no_tried_scale_of_any_row_is_better(recipe, format, group):
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, X, recipe=f"{recipe}+clip"), check=True)
    stored = dict(constants(program.gm))
    w, scale = block.a.weight.detach(), stored["a.weight_scale"].float()
    got = dequantize_weight(stored["a.weight_q"], stored["a.weight_scale"], format, group, 32)
    found = (got - w).square().sum(1)
    (first, zero), scale = scales_and_zeros(quantize_weight(w, format, group)[1], format), scale[:, :1]
    zero = 0 if zero is None else zero.float()
    for step in range(STEPS + 1):
        tried = (first.float() * (1 - (1 - LEAST) * step / STEPS)).to(first.dtype).float()
        fmt = FORMATS[format]
        values = (fmt.decode(fmt.encode(w / tried + zero)) - zero) * tried
        assert (found <= (values - w).square().sum(1) * (1 + 1e-5)).all()
    assert (scale <= first.float()).all() and (scale < first.float()).any()
    row = program.refinements[0]
    assert row.after == pytest.approx(float(found.sum() / w.square().sum()), rel=1e-4) and row.after < row.before


@pytest.mark.parametrize("format", ["int4", "int2_asym", "fp4_e2m1"])
def test_one_scale_of_a_whole_weight_stays_one(format):
    """And is the best of those that were tried."""
    block = Block(lambda self, x: self.a(x))
    rule = zq.QRule("a", zq.QScheme(format, "per_tensor"), None, methods=("clip",))
    program = after(captured(block, X, recipe=zq.load_recipe("float").with_rules(rule)), check=True)
    stored, w = dict(constants(program.gm)), block.a.weight.detach()
    assert len(stored["a.weight_scale"].unique(dim=0)) == 1
    first, zero = scales_and_zeros(quantize_weight(w, format, WHOLE)[1], format)
    fmt, zero = FORMATS[format], 0 if zero is None else zero
    tried = [first[0, 0] * (1 - (1 - LEAST) * step / STEPS) for step in range(STEPS + 1)]
    errors = [((fmt.decode(fmt.encode(w / s + zero)) - zero) * s - w).square().sum() for s in tried]
    assert stored["a.weight_scale"][0, 0] == tried[int(torch.stack(errors).argmin())]


def test_groups_are_clipped_apart_and_a_ragged_last_one_too():
    block = Block(lambda self, x: self.a(x), width=48)
    with torch.no_grad():
        block.a.weight[:, 40] = 3.0  # an outlier that only its own group should pay for
    x = randn(3, 48)
    int4 = zq.QScheme("int4", "per_group", 32)
    rule = zq.QRule("a", int4, None, methods=("clip",))
    program = after(captured(block, x, recipe=zq.load_recipe("float").with_rules(rule)))
    scale = dict(constants(program.gm))["a.weight_scale"]
    first = quantize_weight(block.a.weight.detach(), "int4", 32)[1]
    assert scale.shape == (48, 2) and (scale[:, 0] < first[:, 0]).any()


def test_a_rotated_weight_is_clipped_as_it_is_stored():
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, X, recipe="w8a8+clip"))
    stored = dict(constants(program.gm))
    w = rotate(block.a.weight.detach())
    got = (dequantize(stored["a.weight_q"], stored["a.weight_scale"]) - w).square().sum()
    plain = (dequantize(*quantize_per_channel(w)) - w).square().sum()
    assert got <= plain and program.refinements[0].after <= program.refinements[0].before


def test_what_is_exact_stays():
    block = Block(lambda self, x: self.a(x))
    with torch.no_grad():
        block.a.weight.copy_(torch.randint(-7, 8, (32, 32)).float())
        block.a.weight[:, 0] = 0
        block.a.weight[:, 1] = 7.0
    rule = zq.QRule("a", zq.QScheme("int8", "per_channel"), None, methods=("clip",))
    with torch.no_grad():
        block.a.weight[:, 1] = 127.0
    program = after(captured(block, X, recipe=zq.load_recipe("float").with_rules(rule)))
    assert changes(program, "clip") == 0 and program.refinements[0].before == 0.0


def test_constrained_scales_are_not_clipped():
    constrained = zq.QScheme("fp4_e2m1", "per_group", 64, scale_constraint="group_pow2")
    with pytest.raises(zq.RecipeError, match="clip would break the constraint"):
        zq.QRule("a", constrained, None, methods=("clip",))
