"""Schemes: what is legal, and the JSON round trip."""

import pytest

from zq_compiler import Granularity, QScheme, RecipeError
from zq_compiler.formats import FORMATS
from zq_compiler.schemes import FP8_TOKEN, INT4_TOKEN, INT8_TOKEN, INT8_WEIGHT, ROTATED_TOKEN, ROTATED_WEIGHT

LEGAL = {(g, False) for g in ("per_tensor", "per_channel", "per_feature")} | {("per_tensor", True), ("per_token", True)}
ALL = {(g.value, dynamic) for g in Granularity if g != "per_group" for dynamic in (False, True)}


@pytest.mark.parametrize(("granularity", "dynamic"), sorted(LEGAL))
def test_legal_schemes_round_trip(granularity, dynamic):
    scheme = QScheme(granularity=granularity, dynamic=dynamic)
    assert scheme.granularity is Granularity(granularity)
    expected = {"format": "int8", "granularity": granularity, "group": 0, "dynamic": dynamic, "rotated": False}
    expected |= {"scale_constraint": "none", "scale_rounding": "ceil"}
    assert scheme.to_dict() == expected
    assert QScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [0, 16, 128])
def test_weights_may_have_any_format(format, group):
    scheme = QScheme(format, "per_group" if group else "per_channel", group)
    assert QScheme.from_dict(scheme.to_dict()) == scheme and not scheme.calibrated
    assert scheme.describe() == f"{format} {f'per_group({group})' if group else 'per_channel'} static"


@pytest.mark.parametrize(("granularity", "dynamic"), sorted(ALL - LEGAL))
def test_combinations_without_a_meaning_are_refused(granularity, dynamic):
    with pytest.raises(RecipeError, match=granularity):
        QScheme(granularity=granularity, dynamic=dynamic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int5"}, "unknown format 'int5'.*fp4_e2m1"),
        ({"granularity": "per_group"}, "group=0.*power of two from 16"),
        ({"granularity": "per_group", "group": 48}, "group=48"),
        ({"granularity": "per_group", "group": 8}, "group=8"),
        ({"granularity": "per_group", "group": 32, "dynamic": True}, "per_group scales are static"),
        ({"group": 64}, "per_channel scales have no group.*per_group"),
        ({"format": "int3", "granularity": "per_token", "dynamic": True}, "no per_token activations are int3"),
        (
            {"format": "fp8_e4m3", "granularity": "per_tensor", "dynamic": True},
            "no per_tensor activations are fp8_e4m3",
        ),
        ({"format": "fp4_e2m1", "rotated": True}, "fp4_e2m1 values are not rotated"),
        ({"scale_constraint": "pow3"}, "scale_constraint='pow3'.*none, pow2, group_pow2"),
        ({"scale_rounding": "up"}, "scale_rounding='up'.*ceil, nearest, floor"),
        ({"scale_constraint": "pow2"}, "per_channel scales have no ratios.*per_group"),
        ({"granularity": "per_row"}, "per_tensor, per_token, per_channel, per_feature"),
        ({"granularity": "per_token", "dynamic": "yes"}, "dynamic must be True or False"),
        ({"granularity": "per_feature", "rotated": True}, "not rotated"),
        ({"rotated": 1}, "rotated must be True or False"),
    ],
)
def test_wrong_values_are_recipe_errors(arguments, message):
    with pytest.raises(RecipeError, match=message):
        QScheme(**arguments)


@pytest.mark.parametrize("data", [{"bit": 8}, "int8", ["format"]])
def test_what_is_no_scheme_names_the_keys(data):
    with pytest.raises(RecipeError, match="format, granularity, group, dynamic, rotated"):
        QScheme.from_dict(data)


def test_the_schemes_that_kernels_compute():
    assert ROTATED_WEIGHT.describe() == "int8 per_channel static rotated"
    assert ROTATED_TOKEN.describe() == "int8 per_token dynamic rotated"
    assert QScheme.from_dict(ROTATED_TOKEN.to_dict()) == ROTATED_TOKEN
    fp4 = QScheme("fp4_e2m1", "per_group", 128, scale_constraint="group_pow2", scale_rounding="floor")
    assert fp4.describe() == "fp4_e2m1 per_group(128) static group_pow2 floor"
    assert QScheme.from_dict(fp4.to_dict()) == fp4
    int4 = QScheme("int4", "per_group", 64, rotated=True)
    assert int4.describe() == "int4 per_group(64) static rotated"
    assert INT4_TOKEN.describe() == "int4 per_token dynamic"
    assert FP8_TOKEN.describe() == "fp8_e4m3 per_token dynamic"
    assert INT8_WEIGHT.describe() == "int8 per_channel static"
    assert INT8_TOKEN.describe() == "int8 per_token dynamic"
