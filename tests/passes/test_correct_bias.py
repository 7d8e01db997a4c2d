"""Bias correction: on the calibration data, no layer's mean output is off any more."""

import pytest
import torch

import zq_compiler as zq
from tests.programs import Block, after, captured, changes, decoder, encoder, ops, randn, run
from zq_compiler.batches import Batches
from zq_compiler.program import constants
from zq_compiler.replay import Replay

X = randn(64, 32) + 1.0


@pytest.mark.parametrize("recipe", ["w3a16-g64", "w3a16-g64+lorc2", "fp6"])
def test_the_mean_output_of_a_layer_is_the_float_layers(recipe):
    block = Block(lambda self, x: self.a(x))
    want = run(captured(block, X), X)[0].mean(0)
    plain = run(after(captured(block, X, recipe=recipe)), X)[0].mean(0)
    program = after(captured(block, X, recipe=f"{recipe}+bias"), check=True)
    mean = run(program, X)[0].mean(0)
    assert (mean - want).abs().max() < 1e-5 < (plain - want).abs().max()
    assert changes(program, "correct_bias") == 1
    assert program.refinements[-1].before == pytest.approx(
        float((plain - want).square().sum() / want.square().sum()), rel=1e-3
    )


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8+lorc2", "w8a8-plain", "fp8"])
def test_of_quantized_activations_it_is_the_weights_share_that_goes(recipe):
    """W times what the layer reads, rotations and all."""
    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, X, recipe=f"{recipe}+bias"), "insert_qdq")
    linear = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0]
    replay = Replay(program, Batches([X]))
    replay.advance(linear)
    (read,) = replay.inputs(linear.args[0])
    want = torch.nn.functional.linear(read, block.a.weight, block.a.bias).detach().mean(0)
    mean = run(after(captured(block, X, recipe=f"{recipe}+bias"), check=True), X)[0].mean(0)
    plain = run(after(captured(block, X, recipe=recipe)), X)[0].mean(0)
    assert (mean - want).abs().max() < 1e-5 < (plain - want).abs().max()


def test_a_layer_without_a_bias_gets_one():
    block = Block(lambda self, x: torch.nn.functional.linear(x, self.a.weight))
    want = run(captured(block, X), X)[0].mean(0)
    program = after(captured(block, X, recipe="w3a16-g64+bias"), check=True)
    assert (run(program, X)[0].mean(0) - want).abs().max() < 1e-5


def test_each_call_of_a_shared_weight_has_its_own():
    block = Block(lambda self, x: self.a(self.a(x).relu()))
    program = after(captured(block, X, recipe="w3a16-g64+bias"), check=True)
    biases = [name for name, _ in constants(program.gm) if "bias" in name]
    assert len(biases) == 2 and changes(program, "correct_bias") == 2


@pytest.mark.parametrize("recipe", ["hero-m3+bias", "w8a8+gptq+lorc4+bias"])
@pytest.mark.parametrize("forward", [encoder, decoder])
def test_whole_blocks_fuse_as_before(forward, recipe):
    x = randn(2, 8, 32)
    with_bias = after(captured(Block(forward), x, recipe=recipe), check=True)
    without = after(captured(Block(forward), x, recipe=recipe.removesuffix("+bias")))
    assert ops(with_bias) == ops(without)


def test_a_bias_that_is_computed_stays():
    block = Block(lambda self, x: torch.nn.functional.linear(x, self.a.weight, self.b(x).mean(0)))
    program = after(captured(block, X, recipe="w3a16-g64+bias"), check=True)
    assert changes(program, "correct_bias") == 1
    assert "a: no bias correction: its bias is computed at run time" in program.notes


def test_of_one_row_without_a_batch():
    block = Block(lambda self, x: self.a(x.mean(0)))
    want = run(captured(block, X), X)[0]
    program = after(captured(block, X, recipe="w3a16-g64+bias"), check=True)
    torch.testing.assert_close(run(program, X)[0], want, rtol=0, atol=1e-5)


def test_what_rounding_the_bias_leaves_is_told():
    x = X.bfloat16()
    program = after(captured(Block(lambda self, x: self.a(x)).bfloat16(), x, recipe="w3a16-g64+bias"))
    assert 0 < program.refinements[-1].after < program.refinements[-1].before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["bias", "gptq", "lkd"])
def test_data_that_is_not_finite_is_named(method, value):
    bad = X.clone()
    bad[3, 2] = value
    program = captured(Block(lambda self, x: self.b(torch.relu(self.a(x)))), X, recipe=f"w4a16-g64+{method}")
    program.calibration = [X, bad]
    with pytest.raises(
        zq.CalibrationError, match=r"a: batch 1 of the calibration data leads to NaN or Inf.*leave that"
    ):
        after(program)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("w2a16-g64-asym+bias", "w2a16-g64-asym+lorc32+bias"),
        ("w4a16-g128+gptq", "w4a8-g128+gptq"),
        ("w4a8-g128+lkd", "w4a16-g128+lkd"),
    ],
)
def test_what_was_chosen_for_one_recipe_is_not_anothers(first, second):
    """torch.compile keeps what it chose for a model's weights, for its other graphs."""
    data = [{"x": X}]
    block = two_linears()

    def compiled(model, recipe):
        torch._dynamo.reset()
        options = {"recipe": recipe, "calibration": data, "lowering": "eager"}
        with torch.no_grad():
            return torch.compile(model, backend="zeroquant", options=options)(X)

    compiled(block, first)
    torch.testing.assert_close(compiled(block, second), compiled(two_linears(), second), rtol=0, atol=0)


def two_linears():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    return Model().eval()
