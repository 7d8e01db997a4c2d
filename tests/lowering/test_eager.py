"""The oracle computes every op by its reference, whatever kernels are registered."""

import torch

from tests.programs import after, captured, randn
from zq_compiler.kernels import OPS, reference_of
from zq_compiler.lowering import eager

X = randn(3, 32)


def program():
    return after(captured(lambda self, x: self.a(self.norm(x)), X))


def test_it_computes_what_the_graph_says():
    p = program()
    with torch.no_grad():
        assert torch.equal(eager.lower(p)(X)[0], p.gm(X)[0])
    result = eager.lower(p)(X)
    assert isinstance(result, tuple) and not result[0].requires_grad


def test_dialect_ops_run_as_their_references(monkeypatch):
    called = []

    def spy(target):
        reference = reference_of(target)
        if reference is not None:
            called.append(reference.__name__)
        return reference

    monkeypatch.setattr(eager, "reference_of", spy)
    eager.lower(program())(X)
    assert called == ["layer_norm_quantize", "int8_linear"]
    assert all(reference_of(op.overload) is op.reference for op in OPS.values())


def test_observers_see_every_node_in_order():
    p, seen = program(), []
    eager.ReferenceInterpreter(p, observe=lambda node, value: seen.append((node.name, value))).run(X)
    assert [name for name, _ in seen] == [n.name for n in p.graph.nodes]
    values = dict(seen)
    (linear,) = p.graph.find_nodes(op="call_function", target=OPS["int8_linear"].overload)
    assert torch.equal(values[linear.name], eager.lower(p)(X)[0])
    q = linear.args[0]
    assert torch.equal(values[q.name], values[q.args[0].name][0])


def test_runs_do_not_influence_one_another():
    run = eager.lower(program())
    first = run(X)[0].clone()
    run(X * 100)
    assert torch.equal(run(X)[0], first)
