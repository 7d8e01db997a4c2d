"""What nothing reads is gone: dead nodes and the float weights."""

import torch

from tests.programs import Block, after, captured, changes, randn
from zq_compiler.passes.cleanup import Cleanup
from zq_compiler.program import constants

X = randn(3, 32)


def tensors(gm):
    return {**dict(gm.named_parameters()), **dict(gm.named_buffers())}


def test_float_weights_are_gone_and_what_is_read_stays():
    program = after(captured(lambda self, x: self.b(self.norm(self.a(x))) + self.state, X))
    left = tensors(program.gm)
    assert (
        set(left)
        == {name for name, _ in constants(program.gm)}
        == {
            *(f"{layer}.{part}" for layer in "ab" for part in ("weight_q", "weight_scale", "bias")),
            *("norm.weight", "norm.bias", "state"),
        }
    )
    assert not any(t.is_floating_point() and t.numel() >= 32 * 32 for t in left.values())
    assert Cleanup()(program) == 0


def test_a_weight_that_something_else_reads_stays():
    program = after(captured(lambda self, x: self.a(x) + self.a.weight.sum(), X))
    assert "a.weight" in tensors(program.gm) and "a.weight_q" in tensors(program.gm)


def test_the_models_own_weights_are_left_alone():
    block = Block(lambda self, x: self.a(x))
    want = block.a.weight.detach().clone()
    after(captured(block, X))
    assert torch.equal(block.a.weight, want)


def test_dead_nodes_and_plain_tensor_attributes():
    program = captured(lambda self, x: self.a(x), X)
    program.gm.leftover = torch.zeros(5)
    after(program)
    assert not hasattr(program.gm, "leftover")
    assert changes(program, "cleanup") >= 2  # the weight and the attribute
    assert not [n for n in program.graph.nodes if n.op == "call_function" and not n.users]


def test_state_that_the_graph_changes_stays():
    def counting(self, x):
        self.state.add_(1)
        return self.a(x)

    program = after(captured(counting, X))
    assert "state" in tensors(program.gm)
    program.gm(X)
    assert (program.gm.state == 1).all()
