"""Every rule of a legal graph, each with a planted violation."""

import pytest
import torch

from tests.programs import after, captured, randn
from zq_compiler import VerificationError
from zq_compiler.kernels import OPS, int8_linear
from zq_compiler.program import Stage, get_constant, set_constant
from zq_compiler.rewrite import Builder, fake_mode_of
from zq_compiler.verify import LEGAL_OPS, RULES, verify


@pytest.fixture
def program():
    return captured(lambda self, x: self.a(x), randn(3, 32))


@pytest.fixture
def fused():
    return after(captured(lambda self, x: self.a(x), randn(3, 32)))


def violation(program, message, where):
    with pytest.raises(VerificationError, match=f"after mine: .*{message}") as error:
        verify(program, "mine")
    assert error.value.where == where


def linear(program):
    return program.graph.find_nodes(op="call_function", target=int8_linear)[0]


def test_legal_graphs_pass(program, fused):
    verify(program, "mine")
    verify(fused, "mine")
    assert len(RULES) == 5  # one test, or more, below for each


def test_dialect_ops_have_their_stage(program, fused):
    before = program.graph.find_nodes(op="output")[0]
    quantize = Builder(program, before).call(OPS["quantize_per_token"].overload, before.args[0][0])
    violation(program, "zq::quantize_per_token is not legal at stage FLOAT", quantize.name)
    program.stage = Stage.QDQ
    verify(program, "mine")
    fused.stage = Stage.QDQ
    violation(fused, "zq::int8_linear is not legal at stage QDQ", linear(fused).name)
    assert set().union(*LEGAL_OPS.values()) == set(OPS)  # every op is legal somewhere


def test_fake_values_are_known(program):
    node = program.graph.find_nodes(op="output")[0].args[0][0]
    del node.meta["val"]
    violation(program, "its fake value is unknown", node.name)


def test_constants_exist_and_are_what_the_graph_thinks(program):
    weight = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == "a.weight")
    fake = weight.meta.pop("val")
    violation(program, "its fake value is unknown", weight.name)
    weight.meta["val"] = fake
    set_constant(program.gm, "a.weight", program.gm.a.weight.bfloat16())
    violation(program, r"constant a\.weight is bf16\[32, 32\], the graph thinks f32\[32, 32\]", weight.name)
    set_constant(program.gm, "a.weight", torch.zeros(32, 31))
    violation(program, r"is f32\[32, 31\]", weight.name)
    del program.gm.a.weight
    violation(program, r"there is no constant a\.weight", weight.name)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (3, torch.ones(31, 1), "scale .* does not fit"),
        (3, torch.ones(32), "scale .* does not fit"),
        (3, torch.ones(32, 1, dtype=torch.float64), "operand 2 is torch.int8 with a torch.float64 scale"),
        (2, torch.ones(32, 32), "operand 2 is torch.float32"),
        (1, torch.ones(3, 2), "scale .* does not fit"),
    ],
)
def test_scales_fit_what_they_scale(fused, argument, value, message):
    node = linear(fused)
    node.update_arg(argument, Builder(fused, node).constant("wrong", value))
    violation(fused, message, node.name)


def test_broken_graphs_do_not_pass(program):
    node = program.graph.find_nodes(op="output")[0].args[0][0]
    program.graph.find_nodes(op="placeholder")[0].prepend(node)  # used before its arguments are defined
    with pytest.raises(VerificationError, match=r"after mine: .*before it has been defined"):
        verify(program, "mine")


@pytest.mark.parametrize("recipe", ["w4a16-g64", "fp6", "fp8", "w4a8", "w4a8-fp"])
def test_packed_weights_fit_their_features(recipe):
    program = after(captured(lambda self, x: self.a(x), randn(3, 32), recipe=recipe))
    verify(program, "mine")
    packed = next(n for n in program.graph.find_nodes(op="get_attr") if n.target == "a.weight_q")
    value = get_constant(program.gm, "a.weight_q")
    set_constant(program.gm, "a.weight_q", value[:, 1:])
    packed.meta["val"] = packed.meta["val"][:, 1:]
    (reader,) = packed.users
    violation(program, "is no weight of 32 features in", reader.name)
    if recipe == "w4a16-g64":  # codes of four bits are not codes of six
        set_constant(program.gm, "a.weight_q", value)
        packed.meta["val"] = fake_mode_of(program.graph).from_tensor(value)
        verify(program, "mine")
        reader.update_arg(4, "fp6_e3m2")
        violation(program, "in fp6_e3m2, 64 to a scale", reader.name)
