"""The matcher, the builder and the rule driver."""

import operator

import pytest
import torch
from torch import fx

from tests.programs import captured, randn, reasons
from zq_compiler.rewrite import (
    ROOT,
    AnyOf,
    Builder,
    NoMatch,
    Op,
    RewriteRule,
    apply_rules,
    arguments,
    constant_of,
    evaluate_constant,
    match,
)

aten = torch.ops.aten


@pytest.fixture
def graph():
    return fx.Graph()


def test_strings_capture_and_literals_must_be_equal(graph):
    x = graph.placeholder("x")
    y = graph.call_function(aten.pow.Tensor_Scalar, (x, 2))
    assert match(Op(aten.pow.Tensor_Scalar, "a", 2), y) == {"a": x}
    assert match(Op(aten.pow.Tensor_Scalar, "a", 2.0), y) == {"a": x}
    assert match(Op(aten.pow.Tensor_Scalar, "a", "n"), y) == {"a": x, "n": 2}
    assert match(Op(aten.pow.Tensor_Scalar, "a", 3), y) is None
    assert match(Op(aten.pow.Tensor_Tensor, "a", 2), y) is None
    assert match(Op(aten.pow.Tensor_Scalar, "a", 2), x) is None
    assert match(Op(aten.pow.Tensor_Scalar, 2, 2), y) is None  # a literal never equals a node


def test_what_a_pattern_does_not_mention_must_be_default(graph):
    x = graph.placeholder("x")
    plain = graph.call_function(aten.add.Tensor, (x, x))
    scaled = graph.call_function(aten.add.Tensor, (x, x), {"alpha": 2})
    assert match(Op(aten.add.Tensor, "a", "b"), plain) == {"a": x, "b": x}
    assert match(Op(aten.add.Tensor, "a", "b"), scaled) is None
    assert match(Op(aten.add.Tensor, "a", "b", "alpha"), scaled) == {"a": x, "b": x, "alpha": 2}
    assert match(Op(aten.add.Tensor, "a", "b", "alpha"), plain)["alpha"] == 1  # defaults are filled in
    assert match(Op(operator.mul, "a"), graph.call_function(operator.mul, (x, 2))) is None  # no schema, no defaults


def test_arguments_are_in_schema_order_whatever_was_a_keyword(graph):
    x = graph.placeholder("x")
    norm = graph.call_function(aten.layer_norm.default, (x, [4]), {"eps": 0.5})
    assert arguments(norm) == [x, [4], None, None, 0.5, True]


def test_a_name_used_twice_must_capture_the_same_thing(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    square, product = (graph.call_function(aten.mul.Tensor, (x, other)) for other in (x, y))
    assert match(Op(aten.mul.Tensor, "a", "a"), square) == {"a": x}
    assert match(Op(aten.mul.Tensor, "a", "a"), product) is None
    lists = graph.call_function(operator.add, ([1, 2], [1, 2]))
    assert match(Op(operator.add, "a", "a"), lists) == {"a": [1, 2]}


def test_commutativity_backtracks(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    tanh, sine = graph.call_function(aten.tanh.default, (x,)), graph.call_function(aten.sin.default, (y,))
    swapped = graph.call_function(aten.mul.Tensor, (sine, tanh))
    ordered = Op(aten.mul.Tensor, Op(aten.tanh.default, "a"), "b")
    assert match(ordered, swapped) is None
    commuting = Op(aten.mul.Tensor, Op(aten.tanh.default, "a"), "b", commutes=True)
    assert match(commuting, swapped) == {"a": x, "b": sine}
    # the first order of the inner product fits by itself, but then the outer "a" contradicts it
    inner = graph.call_function(aten.mul.Tensor, (x, y))
    outer = graph.call_function(aten.add.Tensor, (inner, y))
    pattern = Op(aten.add.Tensor, Op(aten.mul.Tensor, "a", "b", commutes=True), "a")
    assert match(pattern, outer) == {"a": y, "b": x}


def test_any_of_takes_the_first_alternative_that_fits(graph):
    x = graph.placeholder("x")
    either = AnyOf(Op(aten.sin.default, "a"), Op(aten.cos.default, "a"))
    assert match(either, graph.call_function(aten.cos.default, (x,))) == {"a": x}
    assert match(either, graph.call_function(aten.tan.default, (x,))) is None
    assert match(Op((aten.sin.default, aten.tan.default), "a"), graph.call_function(aten.tan.default, (x,))) == {"a": x}


def test_lists_are_matched_element_by_element(graph):
    x = graph.placeholder("x")
    mean = graph.call_function(aten.mean.dim, (x, [-1], True))
    assert match(Op(aten.mean.dim, "x", ["d"], True), mean) == {"x": x, "d": -1}
    assert match(Op(aten.mean.dim, "x", [-1, -2], True), mean) is None


class SinToCos(RewriteRule):
    pattern = Op(aten.sin.default, "x")

    def check(self, found):
        if found["x"].op == "placeholder":
            raise NoMatch("it reads an input")

    def rewrite(self, found, build):
        assert found[ROOT].target is aten.sin.default
        return build.call(aten.cos.default, found["x"])


def test_rules_rewrite_count_and_record_refusals():
    program = captured(lambda self, x: (x.sin(), (x + 1).sin(), (x + 2).sin().sin()), randn(3, 4))
    assert apply_rules(program, [SinToCos()]) == 3
    assert reasons(program) == {("SinToCos", "it reads an input")}
    program.gm.recompile()
    x = randn(3, 4)
    first, second, third = program.gm(x)
    assert torch.equal(first, x.sin())
    assert torch.equal(second, (x + 1).cos())
    assert torch.equal(third, (x + 2).cos().cos())


def test_the_builder_knows_shapes_and_dtypes_at_once():
    program = captured(lambda self, x: x + 1, randn(3, 4), dynamic=True)
    output = next(iter(program.graph.find_nodes(op="output")))
    build = Builder(program, output)
    x = program.graph.find_nodes(op="placeholder")[0]
    best = build.call(aten.max.dim, x, -1)
    index = build.item(best, 1)
    table = build.constant("new.table", torch.arange(4))
    rows, _ = x.meta["val"].shape
    assert index.meta["val"].dtype is torch.int64
    assert tuple(index.meta["val"].shape) == (rows,) and not isinstance(rows, int)  # still symbolic
    assert table.meta["val"].shape == (4,)
    assert torch.equal(program.gm.new.table, torch.arange(4))
    program.graph.lint()


class MeanOfSquares(RewriteRule):
    pattern = Op(aten.mean.dim, Op(aten.mul.Tensor, "x", "x"), [-1], True)

    def rewrite(self, found, build):
        return build.call(aten.square.default, found["x"])


@pytest.mark.parametrize(
    "write", [lambda x, s: x.add_(1), lambda x, s: x.view(-1)[:1].zero_(), lambda x, s: s.view(-1).mul_(2)]
)
def test_a_rewrite_never_carries_a_read_across_a_change(write):
    def crossing(self, x):
        x = x * 2
        square = x * x
        write(x, square)
        return square.mean(-1, keepdim=True)

    def clear(self, x):
        x = x * 2
        write(x, x)
        y = (x * x).mean(-1, keepdim=True)
        x.add_(1)
        return y

    program = captured(crossing, randn(3, 4))
    assert apply_rules(program, [MeanOfSquares()]) == 0
    ((rule, reason),) = reasons(program)
    assert rule == "MeanOfSquares" and reason.endswith("changes one of its operands in place")
    assert apply_rules(captured(clear, randn(3, 4)), [MeanOfSquares()]) == 1


def test_constants_are_seen_through_shape_changes_only():
    def forward(self, x):
        return x @ self.matrix.t()[:4].t(), x @ (self.matrix * 2), x @ x.t()

    program = captured(forward, randn(32, 32))
    viewed, scaled, variable = (
        n.args[1] for n in program.graph.find_nodes(op="call_function", target=aten.matmul.default)
    )
    assert constant_of(program.gm, viewed).target == "matrix"
    assert torch.equal(evaluate_constant(program.gm, viewed), program.gm.matrix[:, :4])
    assert constant_of(program.gm, scaled) is constant_of(program.gm, variable) is None
    assert constant_of(program.gm, 3) is None
