"""In-place operations: what they write, and which values share that memory."""

import pytest
import torch

from tests.programs import captured, randn
from zq_compiler.mutation import Mutations

aten = torch.ops.aten


def found(forward, *inputs):
    """Whether the value that `cos` reads is changed in place, and whether between it and `sin`."""
    program = captured(forward, *(inputs or (randn(4, 32),)))
    mutations = Mutations(program.graph)
    (value,) = {n.args[0] for n in program.graph.find_nodes(op="call_function", target=aten.cos.default)}
    (last,) = program.graph.find_nodes(op="call_function", target=aten.sin.default)
    return mutations.of(value) is not None, mutations.between(value, last, [value]) is not None


def sketch(write):
    def forward(self, x):
        x = x * 2
        value = x * 3
        y = value.cos()
        write(self, x, value)
        return y, x.sin(), value

    return forward


@pytest.mark.parametrize(
    "write",
    [
        lambda self, x, v: v.add_(1),
        lambda self, x, v: v.view(-1).relu_(),
        lambda self, x, v: v.t().mul_(2),
        lambda self, x, v: v[0].fill_(1.0),
        lambda self, x, v: v.index_put_((torch.tensor([0]),), torch.zeros(())),
        lambda self, x, v: v.type_as(x).add_(1),
        lambda self, x, v: v.to(torch.float32).add_(1),
        lambda self, x, v: self.drop(v).add_(1),
        lambda self, x, v: torch.chunk(v, 2)[1].add_(1),
        lambda self, x, v: torch.einsum("ij->ji", v).add_(1),
        lambda self, x, v: v.unsqueeze(0).expand(1, 4, 32).copy_(x),
        lambda self, x, v: torch._foreach_add_([v], 1.0),
        lambda self, x, v: torch.add(x, 1, out=v),
    ],
)
def test_writes_through_every_kind_of_alias_are_seen(write):
    assert found(sketch(write)) == (True, True)


@pytest.mark.parametrize(
    "write",
    [
        lambda self, x, v: x.add_(1),
        lambda self, x, v: v.clone().add_(1),
        lambda self, x, v: (v + 1).relu_(),
        lambda self, x, v: self.state.add_(1),
        lambda self, x, v: v.contiguous() + 1,
    ],
)
def test_other_memory_is_left_alone(write):
    assert found(sketch(write)) == (False, False)


def test_only_what_lies_between_counts():
    def before(self, x):
        value = (x * 2).add_(1)
        return value.cos(), x.sin()

    def behind(self, x):
        value = x * 2
        y = value.cos(), x.sin()
        value.add_(1)
        return y

    assert found(before) == (True, False)
    assert found(behind) == (True, False)


def test_inputs_and_tied_constants():
    assert found(lambda self, x: (x.cos(), x.add_(1), (x * 2).sin())) == (True, True)
    model_state = captured(lambda self, x: (self.state.add_(1), self.state * x), randn(32))
    states = model_state.graph.find_nodes(op="get_attr")
    assert all(Mutations(model_state.graph).of(n) is not None for n in states) and states
