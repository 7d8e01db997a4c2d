"""Quantize moves up through what moves whole rows, and through nothing else."""

import pytest
import torch

from tests.programs import after, captured, changes, dialect, randn, run
from zq_compiler.kernels import quantize_per_token
from zq_compiler.passes.move_quantize import MoveQuantize

aten = torch.ops.aten
X = randn(2, 3, 32)


def moved(forward, *inputs):
    """The Program after the pass; that outputs stay bit for bit is held by the contract's check."""
    program = after(captured(forward, *(inputs or (X,))), "move_quantize", check=True)
    assert MoveQuantize()(program) == 0  # a second run finds nothing
    return program


def sources(program):
    quantizes = program.graph.find_nodes(op="call_function", target=quantize_per_token)
    return {str(getattr(q.args[0].target, "_opname", q.args[0].op)) for q in quantizes}


@pytest.mark.parametrize(
    "step",
    [
        lambda h: h.view(-1, 32),
        lambda h: h.reshape(6, 32),
        lambda h: h.reshape(-1, 1, 32),
        lambda h: h.transpose(0, 1),
        lambda h: h.transpose(1, 0).reshape(-1, 32).view(2, 3, 32),
        lambda h: h.transpose(-2, 0),
        lambda h: h.unsqueeze(1),
        lambda h: h.unsqueeze(-2),
    ],
)
def test_through_everything_that_moves_whole_rows(step):
    program = moved(lambda self, x: self.a(step(torch.sin(x * self.scale))))
    assert sources(program) == {"sin"}
    assert changes(program, "move_quantize") >= 1


@pytest.mark.parametrize(
    ("step", "source"),
    [
        (lambda h: h.transpose(1, 2).reshape(2, -1, 32), "reshape"),
        (lambda h: h.view(2, 3, 2, 16).transpose(1, 2).reshape(4, 3, 16).reshape(-1, 32), "reshape"),
        (lambda h: h.view(2, 96)[:, :32], "slice"),
        (lambda h: h.unsqueeze(-1).transpose(-1, -2)[..., 0, :], "select"),
        (lambda h: h.transpose(-1, 0).transpose(0, -1), "transpose"),
        (lambda h: h * 2, "mul"),
    ],
)
def test_not_where_rows_change(step, source):
    assert sources(moved(lambda self, x: self.a(step(torch.sin(x * self.scale))))) == {source}


def test_quantizes_that_meet_become_one():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        return self.a(h), self.b(h.view(-1, 32)), self.c(h.transpose(0, 1))

    program = moved(forward)
    assert dialect(program)["quantize_per_token"] == 1
    assert changes(program, "move_quantize") == 4  # two moves, two merges


def test_a_symbolic_last_dimension_that_the_model_fixes_counts_as_fixed():
    def forward(self, x):
        return self.a(x.view(-1, 32)), x * self.scale

    assert sources(after(captured(forward, X, dynamic=True), "move_quantize")) == {"placeholder"}
    free = captured(lambda self, x: self.a(x.view(-1, 32)), X, dynamic=True)
    assert sources(after(free, "move_quantize")) == {"view"}  # rows of 64 would do as well


@pytest.mark.parametrize("change", [lambda h: h.mul_(3), lambda h: h.view(-1)[:5].zero_()])
def test_not_across_an_in_place_change(change):
    def forward(self, x):
        h = torch.sin(x * self.scale)
        copy = h.transpose(0, 1).reshape(-1, 32)
        change(h)
        return self.a(copy), self.b(h), self.c(copy)

    program = captured(forward, X)
    want = run(after(program, "fold_quantize"), X)
    after_move = run_pass(program)
    for w, y in zip(want, run(program, X), strict=True):
        assert torch.equal(w, y)
    assert dialect(program)["quantize_per_token"] == 2
    assert after_move >= 0


def run_pass(program):
    count = MoveQuantize()(program)
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    return count


def test_equal_quantizes_are_not_merged_across_a_change():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        same_memory = h.view(-1)
        first = self.a(h)
        same_memory.add_(1)
        return first, self.b(h)

    assert dialect(moved(forward))["quantize_per_token"] == 2
