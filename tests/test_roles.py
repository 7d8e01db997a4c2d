"""Roles of linears, read off tiny graphs."""

import pytest
import torch
from torch.nn import functional as F

from tests.programs import after, attend, captured, decoder, encoder, randn
from zq_compiler.recipe import Role
from zq_compiler.rewrite import constant_of
from zq_compiler.roles import ATTENTION, is_moved, roles

aten = torch.ops.aten
X = randn(2, 4, 32)
QKV, OUT, UP, DOWN, OTHER = (
    *(Role.QUERY_KEY_VALUE, Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_IN, Role.FEED_FORWARD_OUT),
    Role.OTHER,
)


def fused_projection(self, x):
    q, k, v, _ = (x @ self.matrix).chunk(4, -1)
    return attend(q, k, v)


def rotary(self, x):
    def turn(t):
        halves = torch.cat((-t[..., 16:], t[..., :16]), -1)
        return t * x.cos() + halves * x.sin()

    return self.out(attend(turn(self.a(x)), turn(self.b(x)), self.c(x)))


def normed_queries(self, x):
    return attend(self.norm(self.a(x)), self.norm2(self.b(x)), self.c(x) * 2)


def quick_gelu(self, x):
    h = self.up(x)
    return self.down(h * torch.sigmoid(1.702 * h))


def contiguous_heads(self, x):
    heads = (t.view(2, 4, 4, 8).transpose(1, 2) for t in (self.a(x), self.b(x), self.c(x)))
    return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).contiguous().reshape(2, 4, 32))


def attention_without_projections(self, x):
    return self.out(attend(x, x, x))


def chain(self, x):
    """Two blocks: what the second attention reads is two layers away from the first's linears."""
    x = self.out(attend(self.a(x), x, x))
    return attend(self.b(x), x, x)


CASES = {
    encoder: {"a": QKV, "b": QKV, "c": QKV, "out": OUT, "up": UP, "down": DOWN},
    decoder: {"a": QKV, "b": QKV, "c": QKV, "out": OUT, "gate": UP, "up": UP, "down": DOWN},
    fused_projection: {"matrix": QKV},
    rotary: {"a": QKV, "b": QKV, "c": QKV, "out": OUT},
    normed_queries: {"a": QKV, "b": QKV, "c": QKV},
    quick_gelu: {"up": UP, "down": DOWN},
    contiguous_heads: {"a": QKV, "b": QKV, "c": QKV, "out": OUT},
    attention_without_projections: {"out": OUT},
    chain: {"a": QKV, "out": OUT, "b": QKV},
}
FORWARDS = {
    "up first": (lambda s, x: s.down(s.up(x) * F.silu(s.gate(x))), {"gate": UP, "up": UP, "down": DOWN}),
    "relu": (lambda s, x: s.down(s.up(x).relu()), {"up": UP, "down": DOWN}),
    "squared relu": (lambda s, x: s.down(torch.square(s.up(x).relu())), {"up": UP, "down": DOWN}),
    "a norm behind the gate": (
        lambda s, x: s.down(s.rms(s.up(x) * s.gate(x).relu() ** 2)),
        {"gate": UP, "up": UP, "down": DOWN},
    ),
    "a head with a norm": (lambda s, x: s.b(s.norm(F.gelu(s.a(x)))), {"a": OTHER, "b": OTHER}),
    "a gated attention": (lambda s, x: s.out(attend(x, x, x) * s.gate(x).sigmoid()), {"gate": OTHER, "out": OUT}),
    "relu to a power": (lambda s, x: s.down(s.up(x).relu() ** 2), {"up": UP, "down": DOWN}),
    "one matrix for gate and up": (
        lambda s, x: (lambda g, u: s.down(F.silu(g) * u))(*(x @ s.matrix).chunk(2, -1)),
        {"matrix": UP, "down": DOWN},
    ),
    "a row of the result": (lambda s, x: s.down(F.gelu(s.up(x)).view(-1, 32)), {"up": UP, "down": DOWN}),
    "a pooler": (lambda s, x: torch.tanh(s.a(x[:, 0])), {"a": OTHER}),
    "behind a pooler": (lambda s, x: s.b(torch.tanh(s.a(x[:, 0]))), {"a": OTHER, "b": OTHER}),
    "behind a product": (lambda s, x: s.down(s.up(x) * s.gate(x)), {"up": OTHER, "gate": OTHER, "down": OTHER}),
    "behind a sum with attention": (lambda s, x: s.b(x + attend(x, x, x)), {"b": OTHER}),
    "behind a norm of attention": (lambda s, x: s.b(s.norm(attend(x, x, x))), {"b": OTHER}),
    "an activation that no linear reads": (lambda s, x: F.gelu(s.a(x)), {"a": OTHER}),
    "two after another": (lambda s, x: s.b(s.a(x)), {"a": OTHER, "b": OTHER}),
}


def found(forward):
    program = after(captured(forward, X), "canonicalize")
    found = roles(program.graph)
    assert set(found) == {n for n in program.graph.nodes if n.target in (ATTENTION, aten.linear.default)}
    assert all((role is Role.ATTENTION) == (node.target is ATTENTION) for node, role in found.items())
    linears = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    names = {node: constant_of(program.gm, node.args[1]).target.removesuffix(".weight") for node in linears}
    return {name: found[node] for node, name in names.items()}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_roles_of_blocks(forward):
    assert found(forward) == CASES[forward]


@pytest.mark.parametrize("case", FORWARDS)
def test_roles_of_pieces(case):
    forward, want = FORWARDS[case]
    assert found(forward) == want


def test_a_linear_that_feeds_an_attention_is_its_own_whatever_else_reads_it():
    def forward(self, x):
        y = self.a(x)
        return attend(y, y, y), self.down(F.gelu(y))

    assert found(forward) == {"a": QKV, "down": DOWN}


def test_is_moved_looks_through_moves_only():
    program = after(captured(contiguous_heads, X), "canonicalize")
    (attention,) = program.graph.find_nodes(op="call_function", target=ATTENTION)
    *_, out = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert is_moved(out.args[0], ATTENTION) is attention
    assert is_moved(out, ATTENTION) is None and is_moved(attention.args[0], ATTENTION) is None
