"""A quantized model is called as the model was: same names, same structure, clear refusals."""

import pytest
import torch
from torch import nn

from tests.programs import randn
from zq_compiler import CaptureError
from zq_compiler.calling import CallingConvention, InputSpec
from zq_compiler.capture import capture_exported, capture_module
from zq_compiler.recipe import PRESETS

X, Y = randn(3, 32), randn(3, 32, seed=1)


def convention(forward, args, kwargs=None):
    model = nn.Linear(32, 32)
    model.forward = forward
    return CallingConvention.of(capture_module(model.eval(), args, kwargs, PRESETS["w8a8"]))


def scaled(x, mask=None, scale=2.0, *, flag=True):
    y = x * scale if flag else x
    return y if mask is None else y * mask


def same(flat, *want):
    return len(flat) == len(want) and all(a is b for a, b in zip(flat, want, strict=True))


def test_positional_arguments_by_name_and_the_other_way_round():
    by_position = convention(scaled, (X, Y))
    assert by_position.inputs == (InputSpec("x", "float32", by_position.inputs[0].dims), by_position.inputs[1])
    for args, kwargs in [((X, Y), {}), ((X,), {"mask": Y}), ((), {"mask": Y, "x": X})]:
        assert same(by_position.flatten(args, kwargs), X, Y)
    by_name = convention(scaled, (), {"mask": Y, "x": X})
    for args, kwargs in [((X, Y), {}), ((X,), {"mask": Y}), ((), {"x": X, "mask": Y})]:
        assert same(by_name.flatten(args, kwargs), Y, X)  # in the captured order


def test_none_may_be_given_or_left_out_where_it_was_left_out():
    c = convention(scaled, (X,))
    assert same(c.flatten((X,), {}), X)
    assert same(c.flatten((X, None), {}), X)
    assert same(c.flatten((X,), {"mask": None}), X)


def test_none_and_constants_that_were_captured_must_come_again():
    c = convention(scaled, (X, None, 3.0), {"flag": False})
    assert c.flatten((X, None, 3.0), {"flag": False})[1:] == [None, 3.0, False]
    for args, kwargs, message in [
        ((X, None, 2.0), {"flag": False}, "scale: was 3.0"),
        ((X, None, 3.0), {"flag": True}, "flag: was False"),
        ((X, Y, 3.0), {"flag": False}, "mask: was None"),
        ((X, None, 3.0), {}, "argument flag is missing.*give x, mask, scale, flag"),
    ]:
        with pytest.raises(CaptureError, match=message):
            c.flatten(args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, "argument mask is missing"),
        ((X, Y, 2.0), {}, "argument scale was not given when"),
        ((X, Y), {"extra": X}, "argument extra was not given"),
        ((X, Y, 1.0, True, X), {}, "do not fit x, mask, scale, flag"),
        ((X, Y), {"x": X}, "do not fit"),
        ((X[:, :16], Y), {}, r"x: expected float32 \[.*, 32\], got float32 \[3, 16\]"),
        ((X[0], Y), {}, r"x: expected float32"),
        ((X.double(), Y), {}, "got float64"),
        ((X, 1.0), {}, "mask: expected a tensor, got float"),
        ((X, [Y]), {}, "inputs are structured"),
    ],
)
def test_calls_that_do_not_fit(args, kwargs, message):
    def forward(x, mask=None, scale=2.0, *, flag=True):
        return nn.functional.linear(x, torch.eye(32)) * mask

    with pytest.raises(CaptureError, match=message):
        convention(forward, (X, Y)).flatten(args, kwargs)


def test_dimensions_are_names_where_dynamic_and_numbers_where_the_model_fixes_them():
    c = convention(lambda x: nn.functional.linear(x, torch.eye(32)), (X,))
    (spec,) = c.inputs
    assert isinstance(spec.dims[0], str) and spec.dims[1] == 32
    assert same(c.flatten((randn(1, 32).expand(7, 32),), {})[:0])
    c.flatten((randn(7, 32),), {})


def test_nested_structures_come_back():
    c = convention(lambda d: {"sum": d["a"] + d["b"][0], "none": (None, [d["a"]])}, ({"a": X, "b": (Y,)},))
    assert same(c.flatten(({"a": X, "b": (Y,)},), {}), X, Y)
    out = c.unflatten([X, None, Y])
    assert set(out) == {"sum", "none"} and out["none"][0] is None and out["none"][1][0] is Y


def test_star_arguments_have_no_names():
    c = convention(lambda *xs: xs[0] + xs[1], (X, Y))
    assert same(c.flatten((X, Y), {}), X, Y)
    for args, kwargs in [((X,), {}), ((X, Y, Y), {}), ((X, Y), {"z": Y})]:
        with pytest.raises(CaptureError):
            c.flatten(args, kwargs)


def test_an_exported_program_refuses_what_it_does_not_know():
    class Model(nn.Module):
        def forward(self, x, *, y):
            return x + y

    exported = torch.export.export(Model(), (X,), {"y": Y})
    c = CallingConvention.of(capture_exported(exported, PRESETS["w8a8"]))
    assert same(c.flatten((X,), {"y": Y}), X, Y)
    with pytest.raises(CaptureError, match="argument z was not given"):
        c.flatten((X,), {"y": Y, "z": X})


def test_a_graph_of_dynamo_has_none():
    program = capture_module(nn.Linear(32, 32).eval(), (X,), {}, PRESETS["w8a8"])
    program.in_spec = None
    with pytest.raises(CaptureError, match="Dynamo"):
        CallingConvention.of(program)
