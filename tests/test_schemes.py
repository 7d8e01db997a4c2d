"""Schemes: what is legal, and the JSON round trip."""

import pytest

from zq_compiler import Granularity, QScheme, RecipeError
from zq_compiler.schemes import INT8_TOKEN, INT8_WEIGHT, ROTATED_TOKEN, ROTATED_WEIGHT

LEGAL = {(g, False) for g in ("per_tensor", "per_channel", "per_feature")} | {("per_tensor", True), ("per_token", True)}
ALL = {(g.value, dynamic) for g in Granularity for dynamic in (False, True)}


@pytest.mark.parametrize(("granularity", "dynamic"), sorted(LEGAL))
def test_legal_schemes_round_trip(granularity, dynamic):
    scheme = QScheme(granularity=granularity, dynamic=dynamic)
    assert scheme.granularity is Granularity(granularity)
    assert scheme.to_dict() == {"bits": 8, "granularity": granularity, "dynamic": dynamic, "rotated": False}
    assert QScheme.from_dict(scheme.to_dict()) == scheme


@pytest.mark.parametrize(("granularity", "dynamic"), sorted(ALL - LEGAL))
def test_combinations_without_a_meaning_are_refused(granularity, dynamic):
    with pytest.raises(RecipeError, match=granularity):
        QScheme(granularity=granularity, dynamic=dynamic)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4}, "4-bit"),
        ({"granularity": "per_row"}, "per_tensor, per_token, per_channel, per_feature"),
        ({"granularity": "per_token", "dynamic": "yes"}, "dynamic must be True or False"),
        ({"granularity": "per_feature", "rotated": True}, "not rotated"),
        ({"rotated": 1}, "rotated must be True or False"),
    ],
)
def test_wrong_values_are_recipe_errors(arguments, message):
    with pytest.raises(RecipeError, match=message):
        QScheme(**arguments)


@pytest.mark.parametrize("data", [{"bit": 8}, "int8", ["bits"]])
def test_what_is_no_scheme_names_the_keys(data):
    with pytest.raises(RecipeError, match="bits, granularity, dynamic, rotated"):
        QScheme.from_dict(data)


def test_the_schemes_that_kernels_compute():
    assert ROTATED_WEIGHT.describe() == "int8 per_channel static rotated"
    assert ROTATED_TOKEN.describe() == "int8 per_token dynamic rotated"
    assert QScheme.from_dict(ROTATED_TOKEN.to_dict()) == ROTATED_TOKEN
    assert INT8_WEIGHT.describe() == "int8 per_channel static"
    assert INT8_TOKEN.describe() == "int8 per_token dynamic"
