"""One table of options for both doors."""

from pathlib import Path

import pytest

from zq_compiler import RecipeError
from zq_compiler.options import Options
from zq_compiler.recipe import PRESETS


def test_defaults():
    assert Options.parse(None) == Options.parse({}) == Options(PRESETS["w8a8"])
    assert Options.parse({}).lowering == "inductor"


def test_everything_given():
    given = {"recipe": "float", "strict": True, "check": True, "dump": Path("d"), "lowering": "eager"}
    assert Options.parse(given) == Options(PRESETS["float"], True, True, Path("d"), "eager")
    assert given["recipe"] == "float"  # the caller's dict is not changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recip": "w8a8"}, "unknown option recip.*use recipe, strict, check, dump, lowering"),
        ({"strict": 1}, "strict must be True or False, got 1"),
        ({"check": "yes"}, "check must be"),
        ({"dump": 5}, "dump must be"),
        ({"lowering": "fast"}, "inductor, eager"),
        ({"recipe": "w9a9"}, "w9a9"),
        ({"recipe": None}, "NoneType"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        Options.parse(options)
