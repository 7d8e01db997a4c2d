"""Arguments and targets of nodes survive JSON, and a file cannot name functions that graphs have no use for."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from zq_compiler import ZQError
from zq_compiler.serialize.arguments import decode, encode, resolve, target_name

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.complex_numbers(),
    st.just(...),
    st.sampled_from([torch.float32, torch.int8, torch.bfloat16, torch.strided, torch.channels_last]),
    st.sampled_from([torch.device("cpu"), torch.device("cuda", 1)]),
)
_ints = st.none() | st.integers()
_values = st.recursive(
    _scalars | st.builds(slice, _ints, _ints, _ints),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


def _same(a: Any, b: Any) -> bool:
    """Equal, of equal types, with NaN equal to itself and 0.0 different from -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, complex):
        return _same(a.real, b.real) and _same(a.imag, b.imag)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


@given(_values)
@settings(max_examples=300, deadline=None)
def test_arguments_survive_json(value: Any):
    assert _same(decode(json.loads(json.dumps(encode(value), allow_nan=False))), value)


def test_node_arguments_become_names():
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert encode((x, [x, 1])) == {"tuple": [{"node": "x"}, [{"node": "x"}, 1]]}
    assert decode({"tuple": [{"node": "x"}]}, {"x": x}) == (x,)


def test_foreign_values_are_refused():
    with pytest.raises(ZQError, match="an argument of type object cannot be saved"):
        encode([object()])


TARGETS = [torch.ops.aten.linear.default, torch.ops.zq.int8_linear.default, torch.ops.aten.sym_size.int]
TARGETS += [operator.getitem, operator.floordiv, math.ceil, torch.sym_max, torch.ops.aten.__and__.Tensor, max, abs]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: getattr(t, "__name__", str(t)))
def test_targets_have_names(target: Callable[..., Any]):
    node = fx.Graph().call_function(target, ())
    assert resolve(target_name(node)) is target


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "operator.attrgetter", "aten", "aten.linear", "", "x.y.z"]
)
def test_other_names_resolve_to_nothing(name: str):
    with pytest.raises(ZQError, match="unknown here"):
        resolve(name)
