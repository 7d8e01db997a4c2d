"""One table of options for both doors, `quantize(...)` and `torch.compile(..., options={...})`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from .batches import Batches
from .errors import CalibrationError, RecipeError
from .recipe import Recipe, load_recipe
from .statistics import Statistics

LOWERINGS = ("inductor", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """How to compile.

    Args:
        recipe: a preset's name, a JSON path, a dict or a Recipe.
        strict: raise StrictError when anything the recipe names was not quantized.
        check: after each pass, run the graph on the example inputs and hold the pass to its numerics contract.
        dump: directory that receives the graph after each pass.
        lowering: `"inductor"`, or `"eager"` to run every op's reference: slow, and the oracle.
        calibration: for recipes with static scales: `Batches` or what they are made from, `Statistics`, or the path
            of their file. One generator or forward_loop serves all graphs of a model.
        observe: the other way to static scales, of torch.compile only: a graph runs its first `observe` calls in float
            and looks at its values, then in INT8. Graphs of one part of a model (other sizes, prefill and decode)
            count together; other recipes or numbers on the same model do not.
        mode: of torch.compile only, which does not take its own `mode` beside options: Inductor's, for what it is
            left. `"reduce-overhead"` runs graphs on CUDA as CUDA graphs.
    """

    recipe: Recipe
    strict: bool = False
    check: bool = False
    dump: str | PathLike[str] | None = None
    lowering: str = "inductor"
    calibration: Batches | Statistics | None = None
    observe: int | None = None
    mode: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from a dict.

        Raises:
            RecipeError: an unknown key (the valid ones are named), a malformed recipe, or a wrong type.
        """
        given = dict(options or {})
        valid = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(valid)):
            raise RecipeError(f"unknown option {', '.join(unknown)}", fix=f"use {', '.join(valid)}")
        recipe = load_recipe(given.pop("recipe", "w8a8"))
        observe = given.get("observe")
        if observe is not None and (type(observe) is not int or observe < 1):
            fix = "give how many calls to observe, 1 or more"
            raise RecipeError(f"option observe must be a positive int, got {observe!r}", fix=fix)
        if observe is not None and given.get("calibration") is not None:
            raise RecipeError("options observe and calibration are two ways to one thing", fix="give one of them")
        given["calibration"] = calibration_data(given.get("calibration"))
        for key in ("strict", "check"):
            if not isinstance(given.get(key, False), bool):
                raise RecipeError(f"option {key} must be True or False, got {given[key]!r}")
        if not isinstance(given.get("dump"), str | PathLike | None):
            raise RecipeError(f"option dump must be the path of a directory, got {given['dump']!r}")
        if given.get("lowering", "inductor") not in LOWERINGS:
            raise RecipeError(f"unknown lowering {given['lowering']!r}", fix=f"use {', '.join(LOWERINGS)}")
        if given.get("mode") not in (None, *MODES):
            raise RecipeError(f"unknown mode {given['mode']!r}", fix=f"use {', '.join(MODES)}")
        return cls(recipe, **given)


_batches: MutableMapping[Any, Batches] = WeakKeyDictionary()  # what can be read only once is read by one
_recent: deque[tuple[Any, Batches]] = deque(maxlen=4)  # a list is that of the model's other graphs, and has no weak key


def calibration_data(given: Any) -> Batches | Statistics | None:
    """What users give as `calibration`, as the passes take it.

    Raises:
        CalibrationError: it is none of the documented forms, or a file that cannot be read.
    """
    if given is None or isinstance(given, Batches | Statistics):
        return given
    if isinstance(given, str | PathLike):
        return Statistics.load(Path(given))
    if not isinstance(given, Iterator | FunctionType):
        known = next((batches for data, batches in _recent if data is given), None)
        if known is None:
            known = Batches(given)
            _recent.append((given, known))
        return known
    if given not in _batches:
        _batches[given] = Batches(given)
    return _batches[given]


def require_calibration(options: Options, model: str) -> None:
    """Raises CalibrationError where nothing was given of what the recipe chooses scales or weights by."""
    recipe = options.recipe
    if methods := recipe.methods_with_data:
        if options.calibration is None or isinstance(options.calibration, Statistics):
            given = "no calibration data was given" if options.calibration is None else "only statistics were given"
            what = f"recipe {recipe.name} chooses weights by the inputs of layers ({', '.join(methods)}), and {given}"
            fix = "give calibration=batches, or leave these methods out"
            raise CalibrationError(what, where=model, fix=fix)
    elif recipe.calibrated and options.calibration is None and options.observe is None:
        raise CalibrationError(
            f"recipe {recipe.name} has static scales, and no calibration data was given",
            where=model,
            fix="give calibration=batches (torch.compile also takes observe=32, which looks at the first 32 calls), or"
            " use a recipe that needs none (w8a8, hero-m1)",
        )
