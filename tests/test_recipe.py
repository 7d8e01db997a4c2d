"""Recipes: rules over names, presets, JSON, and errors that name the mend."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zq_compiler import QRule, QScheme, Recipe, RecipeError, list_recipes, load_recipe
from zq_compiler.formats import NIBBLES, WITHIN_E4M3
from zq_compiler.recipe import PRESETS, RANGE_METHODS, Role
from zq_compiler.schemes import (
    FP8_TOKEN,
    FP8_WEIGHT,
    INT4_TOKEN,
    INT8_FEATURE,
    INT8_TENSOR,
    INT8_TOKEN,
    INT8_WEIGHT,
    ROTATED_TOKEN,
    ROTATED_WEIGHT,
)

INT4_GROUP = QScheme("int4", "per_group", 32)

patterns = st.text("abc.*+\\d(|)", max_size=8).filter(lambda p: _compiles(p))
SCHEMES = [
    {"weight": None, "input": None},
    {"weight": INT8_WEIGHT, "input": INT8_TOKEN},
    {"weight": INT8_WEIGHT, "input": INT8_FEATURE, "output": INT8_FEATURE, "roles": ("attention_output", Role.OTHER)},
    {"weight": None, "input": INT8_TENSOR, "roles": (Role.ATTENTION,)},
    {"dtype": "float16"},
]
rules = st.builds(
    lambda pattern, schemes, optional, reason: QRule(pattern, **schemes, optional=optional, reason=reason),
    patterns,
    st.sampled_from(SCHEMES),
    st.booleans(),
    st.text(max_size=8),
)
tables = st.sampled_from(["float", "int8"])
recipes = st.builds(
    Recipe,
    name=st.text(max_size=8),
    rules=st.lists(rules, max_size=4).map(tuple),
    embedding=tables,
    lm_head=tables,
    residual=tables,
    range_method=st.sampled_from(RANGE_METHODS),
    min_size=st.integers(0, 4096),
)


def _compiles(pattern: str) -> bool:
    try:
        QRule(pattern)
    except RecipeError:
        return False
    return True


@given(recipes)
def test_json_round_trip(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_saved_recipes_load_again(tmp_path):
    recipe = PRESETS["w8a8"].with_rules(QRule.leave_float(r"head\.")).replace(embedding="int8")
    recipe.save(tmp_path / "mine.json")
    assert load_recipe(tmp_path / "mine.json") == load_recipe(str(tmp_path / "mine.json")) == recipe


def test_last_matching_rule_wins_and_matches_from_the_start():
    first, second = QRule(".*"), QRule.leave_float("encoder")
    recipe = Recipe("r", (first, second))
    assert recipe.rule_for("encoder.0") is second
    assert recipe.rule_for("my.encoder.0") is first
    assert Recipe("r", (second, first)).rule_for("encoder.0") is first
    assert Recipe("r", (second,)).rule_for("decoder") is None


def test_unmatched_rules_are_those_that_are_not_optional():
    typo, fine, optional = QRule("encodr"), QRule("enc"), QRule("missing", optional=True)
    assert Recipe("r", (typo, fine, optional)).unmatched({"encoder.0": Role.OTHER}) == [typo]


def test_presets_are_listed_and_load():
    assert set(list_recipes()) == set(PRESETS) >= {"w8a8", "w8a8-plain", "float"}
    assert all(list_recipes().values())
    for name in list_recipes():
        assert load_recipe(name) is PRESETS[name]
    assert PRESETS["w8a8"].rule_for("anything").weight == ROTATED_WEIGHT
    assert PRESETS["w8a8-plain"].rule_for("anything").weight == INT8_WEIGHT
    assert PRESETS["float"].rule_for("anything") is None


def test_a_rule_may_give_a_float_dtype():
    rule = QRule("a", dtype=torch.bfloat16)
    assert (rule.dtype, rule.weight, rule.input) == ("bfloat16", None, None)
    assert rule.reason == "the recipe runs it in bfloat16"
    assert QRule.from_dict(rule.to_dict()) == rule
    assert rule.matches("a", Role.ATTENTION) and not Recipe("r", (rule,)).calibrated
    with pytest.raises(RecipeError, match="use one of float32, float16, bfloat16"):
        QRule("a", dtype="float8")
    with pytest.raises(RecipeError, match="gives schemes and a dtype"):
        QRule("a", INT8_WEIGHT, INT8_TOKEN, dtype="float16")
    with pytest.raises(RecipeError, match="only the output"):
        QRule("a", output=INT8_FEATURE, dtype="float16")


GOOD = {"name": "r", "rules": []}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "layers": []}, "unknown recipe key layers.*use name, rules"),
        ({"name": "r"}, "lacks rules"),
        ({**GOOD, "rules": [{"pattern": "a", "wieght": None}]}, "unknown rule key wieght"),
        ({**GOOD, "rules": [{}]}, "lacks pattern"),
        ({**GOOD, "rules": ["a"]}, "a rule is a mapping"),
        ({**GOOD, "rules": "abc"}, "rules must be a list"),
        ({**GOOD, "rules": [{"pattern": "(", "optional": True}]}, "no regular expression"),
        ({**GOOD, "rules": [{"pattern": 5}]}, "no regular expression"),
        ({**GOOD, "rules": [{"pattern": "a", "weight": None}]}, "the input only"),
        ({**GOOD, "rules": [{"pattern": "a", "weight": {"bit": 8}}]}, "format, granularity, group, dynamic"),
        ({**GOOD, "embedding": "int4"}, "float, int8"),
        ({**GOOD, "min_size": "16"}, "min_size"),
        ({**GOOD, "min_size": True}, "min_size"),
        ({**GOOD, "rules": [{"pattern": "a", "methods": 5}]}, "rule 'a': methods=5.*use a list of names"),
        ({**GOOD, "rules": [{"pattern": "a", "methods": None}]}, "rule 'a': methods=None"),
        ({**GOOD, "rules": [{"pattern": "a", "roles": None}]}, "rule 'a': roles=None"),
        ({**GOOD, "rules": [{"pattern": "a", "weight": {"format": []}}]}, r"unknown format \[\]"),
        ({**GOOD, "version": 99}, "version 99"),
    ],
)
def test_malformed_dicts(data, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(data)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        (QScheme(granularity="per_tensor"), INT8_TOKEN),
        (INT8_WEIGHT, QScheme(granularity="per_tensor", dynamic=True)),
        (INT8_TOKEN, INT8_WEIGHT),
        (ROTATED_WEIGHT, INT8_TOKEN),
        (INT8_WEIGHT, ROTATED_TOKEN),
        (INT4_GROUP, ROTATED_TOKEN),
        (FP8_WEIGHT, INT8_TOKEN),
        (INT8_WEIGHT, FP8_TOKEN),
        (ROTATED_WEIGHT, None),
        (QScheme(granularity="per_tensor", dynamic=True), None),
        (QScheme("int4_asym"), INT8_TOKEN),
    ],
)
def test_schemes_that_no_kernel_computes_are_refused_not_ignored(weight, activation):
    with pytest.raises(RecipeError, match="no kernel takes"):
        QRule(".*", weight, activation)


@pytest.mark.parametrize("name", ["w8a16", "w4a16-g64", "w4a16-g128", "w3a16-g64", "fp6", "fp8", "w4a8-fp-m2"])
def test_low_bit_presets_speak_of_linears_and_round_trip(name):
    recipe = PRESETS[name]
    rule = recipe.rule_for("layer.0.mlp", Role.FEED_FORWARD_IN)
    assert rule.input == (FP8_TOKEN if "fp" in name and name != "fp6" else None) and not rule.leaves_float
    assert recipe.rule_for("layer.0.attention", Role.ATTENTION) is None
    assert not recipe.calibrated and Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", ["w4a8", "w4a8-g128", "w48a8", "w4a4"])
def test_int4_weights_meet_integers_per_token(name):
    recipe = PRESETS[name]
    mlp, attention = (recipe.rule_for("layer", role) for role in (Role.FEED_FORWARD_OUT, Role.QUERY_KEY_VALUE))
    assert mlp.weight.format == "int4" and mlp.weight.group == (128 if name == "w4a8-g128" else 0)
    assert attention.weight.format == ("int8" if name == "w48a8" else "int4")
    assert mlp.input.format == ("int4" if name == "w4a4" else "int8")
    for rule in (mlp, attention):
        assert rule.weight.rotated == rule.input.rotated == (name != "w4a8-g128")
    assert recipe.rule_for("layer", Role.ATTENTION) is None
    assert not recipe.calibrated and Recipe.from_dict(recipe.to_dict()) == recipe


PACKED_PAIRS = [(QScheme(name), INT8_TOKEN) for name in NIBBLES]
PACKED_PAIRS += [(INT4_GROUP, INT4_TOKEN), (QScheme("int3", rotated=True), ROTATED_TOKEN)]
PACKED_PAIRS += [(QScheme(name, "per_group", 16), FP8_TOKEN) for name in WITHIN_E4M3]
NO_PAIRS = [
    *((QScheme(name), INT8_TOKEN) for name in ("binary", "fp4_e2m1", "fp8_e4m3")),
    *((QScheme(name), FP8_TOKEN) for name in ("int8", "int4", "fp8_e5m2")),
    *((INT4_GROUP, scheme) for scheme in (INT8_TENSOR, INT8_FEATURE, ROTATED_TOKEN)),
    *((INT8_WEIGHT, INT4_TOKEN), (QScheme("int8", "per_group", 16), INT8_TOKEN), (INT8_TOKEN, INT8_TOKEN)),
]


@pytest.mark.parametrize(("weight", "activation"), PACKED_PAIRS)
def test_pairs_of_packed_weights_and_activations(weight, activation):
    rule = QRule("a", weight, activation)
    assert QRule.from_dict(rule.to_dict()) == rule and not rule.leaves_float


@pytest.mark.parametrize(("weight", "activation"), NO_PAIRS)
def test_pairs_that_no_product_takes(weight, activation):
    with pytest.raises(RecipeError, match=r"no kernel takes.*a weight of int4, int3, int2, ternary with INT8 or INT4"):
        QRule("a", weight, activation)


def test_a_rule_for_a_weight_alone():
    rule = QRule("a", INT4_GROUP, None)
    assert not rule.leaves_float and rule.matches("a") and not rule.matches("a", Role.ATTENTION)
    with pytest.raises(RecipeError, match="only the output"):
        QRule("a", INT4_GROUP, None, INT8_FEATURE)
    with pytest.raises(RecipeError, match="no kernel takes int4"):
        QRule("a", INT4_GROUP, None, roles=("attention",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "a recipe is a mapping"),
        ('{"name": "r", "rules": [], "x": 1}', "unknown recipe key x"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert ("not JSON" in str(error.value)) == (text == "{")


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"missing\.json"):
        load_recipe(tmp_path / "missing.json")
    with pytest.raises(RecipeError, match=r"w8a8, .*float"):
        load_recipe("w9a9")
    with pytest.raises(RecipeError, match="cannot be a int"):
        load_recipe(8)
    with pytest.raises(RecipeError, match="unknown recipe key rule"):
        PRESETS["w8a8"].replace(rule=())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": None, "input": INT8_TENSOR}, "the input only"),
        ({"input": INT8_FEATURE}, "no kernel takes int8 per_channel static rotated x int8 per_feature static"),
        ({"weight": None, "input": INT8_TENSOR, "roles": ("attention", "other")}, "the input only"),
        ({"roles": ("attention",)}, "no kernel takes"),
        ({"weight": INT8_WEIGHT, "input": INT8_TOKEN, "output": INT8_TOKEN}, "no kernel writes"),
        ({"weight": None, "input": None, "output": INT8_FEATURE}, "only the output"),
        ({"roles": ("mlp",)}, "unknown role 'mlp'.*query_key_value"),
    ],
)
def test_rules_without_a_kernel(given, message):
    with pytest.raises(RecipeError, match=message):
        QRule(".*", **given)


def test_one_role_needs_no_list():
    assert QRule(".*", roles="other").roles == (Role.OTHER,)
    assert QRule.leave_float(".*", roles="attention").roles == (Role.ATTENTION,)


def test_rules_speak_of_roles():
    recipe = PRESETS["hero-m2"].with_rules(QRule.leave_float("layer.0"))
    assert recipe.rule_for("layer.1.query", Role.QUERY_KEY_VALUE).input == ROTATED_TOKEN
    assert recipe.rule_for("layer.1.out", Role.ATTENTION_OUTPUT).output == INT8_FEATURE
    assert recipe.rule_for("layer.1.self", Role.ATTENTION).input == INT8_TENSOR
    assert recipe.rule_for("layer.1.fc2", Role.FEED_FORWARD_OUT) is None
    assert recipe.rule_for("layer.0.self", Role.ATTENTION).input is None
    assert PRESETS["w8a8"].rule_for("layer.0.self", Role.ATTENTION) is None


def test_calibration_is_needed_by_static_scales_only():
    needing = {name for name, recipe in PRESETS.items() if recipe.calibrated}
    assert needing == {"hero-m2", "hero-m3", "hero-decoder", "hero-m2-tensorrt", "hero-m3-tensorrt", "fp8-static"}
