"""One table of options for both doors, `quantize(...)` and `torch.compile(..., options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from .errors import RecipeError
from .recipe import Recipe, load_recipe

LOWERINGS = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """How to compile.

    Args:
        recipe: a preset's name, a JSON path, a dict or a Recipe.
        strict: raise StrictError when anything the recipe names was not quantized.
        check: after each pass, run the graph on the example inputs and hold the pass to its numerics contract.
        dump: directory that receives the graph after each pass.
        lowering: `"inductor"`, or `"eager"` to run every op's reference: slow, and the oracle.
    """

    recipe: Recipe
    strict: bool = False
    check: bool = False
    dump: str | PathLike[str] | None = None
    lowering: str = "inductor"

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
        for key in ("strict", "check"):
            if not isinstance(given.get(key, False), bool):
                raise RecipeError(f"option {key} must be True or False, got {given[key]!r}")
        if not isinstance(given.get("dump"), str | PathLike | None):
            raise RecipeError(f"option dump must be the path of a directory, got {given['dump']!r}")
        if given.get("lowering", "inductor") not in LOWERINGS:
            raise RecipeError(f"unknown lowering {given['lowering']!r}", fix=f"use {', '.join(LOWERINGS)}")
        return cls(recipe, **given)
