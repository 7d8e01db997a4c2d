"""One table of options for both doors."""

import inspect
from pathlib import Path

import pytest

from zq_compiler import Batches, CalibrationError, RecipeError, quantize
from zq_compiler.options import Options, require_calibration
from zq_compiler.recipe import PRESETS
from zq_compiler.statistics import Statistics


def test_defaults():
    assert Options.parse(None) == Options.parse({}) == Options(PRESETS["w8a8"])
    assert Options.parse({}).lowering == "inductor"


def test_everything_given():
    given = {"recipe": "float", "strict": True, "check": True, "dump": Path("d"), "lowering": "eager"}
    assert Options.parse(given) == Options(PRESETS["float"], True, True, Path("d"), "eager")
    assert given["recipe"] == "float"  # the caller's dict is not changed


def test_observing_is_for_compiled_graphs_and_stands_in_for_calibration():
    options = Options.parse({"recipe": "hero-m2", "observe": 8})
    assert options.observe == 8 and Options.parse({"observe": None}).observe is None
    require_calibration(options, "model")
    with pytest.raises(CalibrationError, match=r"model: recipe hero-m2 .*give calibration=batches .*observe=32"):
        require_calibration(Options.parse({"recipe": "hero-m2"}), "model")


@pytest.mark.parametrize("given", [{}, {"observe": 4}, {"calibration": Statistics({}, "key", 1)}])
def test_methods_need_batches(given):
    """Neither statistics nor the first calls' ranges are what layers read."""
    options = Options.parse({"recipe": "hero-m2+smooth+gptq", **given})
    had = "only statistics were" if "calibration" in given else "no calibration data was"
    with pytest.raises(CalibrationError, match=rf"model: .* by the inputs of layers \(smooth, gptq\), and {had} given"):
        require_calibration(options, "model")
    assert "observe" not in inspect.signature(quantize).parameters


def test_calibration_that_can_be_read_once_is_one_for_all_graphs():
    generator = (x for x in [1])
    first, second = (Options.parse({"calibration": generator}).calibration for _ in range(2))
    assert first is second and isinstance(first, Batches)
    assert isinstance(Options.parse({"calibration": [1]}).calibration, Batches)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Options.parse({"calibration": "no/such.safetensors"})
    with pytest.raises(CalibrationError, match="int"):
        Options.parse({"calibration": 5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recip": "w8a8"}, "unknown option recip.*use recipe, strict, check, dump, lowering, calibration, observe"),
        ({"strict": 1}, "strict must be True or False, got 1"),
        ({"check": "yes"}, "check must be"),
        ({"dump": 5}, "dump must be"),
        ({"lowering": "fast"}, "inductor, eager"),
        ({"recipe": "w9a9"}, "w9a9"),
        ({"recipe": None}, "NoneType"),
        ({"observe": 0}, "observe must be a positive int, got 0.*give how many calls"),
        ({"observe": -3}, "got -3"),
        ({"observe": True}, "got True"),
        ({"observe": 2.0}, "got 2.0"),
        ({"observe": "8"}, "got '8'"),
        ({"observe": 8, "calibration": [1]}, "observe and calibration.*give one of them"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RecipeError, match=message):
        Options.parse(options)
