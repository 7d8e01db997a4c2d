"""The page of what recipes cost is what its rows say, and every recipe on it can be run again."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the real models need transformers")

import zq_compiler
from benchmarks import accuracy


def test_the_page_is_written_from_the_rows() -> None:
    assert accuracy.PAGE.read_text() == "\n".join(accuracy.page(accuracy.rows())) + "\n"


def test_rows_are_different_and_of_recipes_that_exist() -> None:
    rows = accuracy.rows()
    keys = [tuple(row[k] for k in ("model", "recipe", "size", "windows")) for row in rows]
    assert len(set(keys)) == len(keys) > 0
    for row in rows:
        assert row["model"] in accuracy.RUNS and zq_compiler.load_recipe(row["recipe"]).name == row["recipe"]


def test_all_recipes_of_the_page_load() -> None:
    names = accuracy.all_recipes()
    assert len(set(names)) == len(names) and len(names) == 4 * 7 + len(accuracy.OTHERS)
    for name in names:
        assert zq_compiler.load_recipe(name).name == name
