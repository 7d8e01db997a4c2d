"""Bias correction: on the calibration data, no layer's mean output is off any more."""

import pytest
import torch

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
