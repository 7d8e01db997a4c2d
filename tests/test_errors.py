"""Errors say what, where and how to mend it."""

import inspect

import pytest

import zq_compiler
from zq_compiler import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_a_zqerror_that_is_exported_and_documented(error):
    assert issubclass(error, errors.ZQError)
    assert getattr(zq_compiler, error.__name__) is error
    assert error.__doc__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "it broke"),
        ({"where": "layer.3"}, "layer.3: it broke"),
        ({"fix": "mend it."}, "it broke. To mend it: mend it."),
        ({"where": "layer.3", "fix": "glue"}, "layer.3: it broke. To mend it: glue."),
    ],
)
def test_message(arguments, message):
    error = errors.WeightError("it broke", **arguments)
    assert str(error) == message
    assert (error.what, error.where, error.fix) == ("it broke", arguments.get("where"), arguments.get("fix"))


def test_recipe_errors_are_value_errors():
    assert issubclass(errors.RecipeError, ValueError)
