"""Programs lowered to CUDA's kernels, in the interpreter: op by op and whole, they compute what the references do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests import tiny_models
from tests.cuda_ops import cases, lone
from tests.programs import after, captured, decoder, encoder
from tests.tolerances import BF16_DB, ROUNDING_DB
from zq_compiler.batches import Batches
from zq_compiler.capture import capture
from zq_compiler.lowering import eager, inductor
from zq_compiler.numerics import sqnr
from zq_compiler.passes import default_pipeline
from zq_compiler.program import Program, fake_value
from zq_compiler.recipe import load_recipe
from zq_compiler.rewrite import fake_mode_of
from zq_compiler.torch_private import FakeTensorMode

A100, L40 = 80, 89  # the second one has FP8


def lowered(program: Program, architecture: int) -> tuple[Any, list[str]]:
    """The graph that Inductor would be given, and the kernels' ops in it."""
    gm = inductor.lower(program, architecture=architecture).gm
    return gm, [str(n.target) for n in gm.graph.nodes if str(n.target).startswith("zq_cuda.")]


def steps(expected: Tensor, actual: Tensor) -> Tensor:
    return (expected.int() - actual.int()).abs()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", cases(torch.float32), ids=str)
def test_every_op_as_it_is_lowered(target, dtype, transposed):
    operands, constants = cases(dtype, transposed)[target]
    mode = FakeTensorMode()
    program = lone(target, operands, constants, mode, mode.from_tensor)
    gm, ops = lowered(program, L40)
    assert len(ops) == 1
    inputs = [x for i, x in enumerate(operands) if isinstance(x, Tensor) and i not in constants]
    expected, actual = eager.lower(program)(*inputs), gm(*inputs)
    for want, got in zip(expected, actual, strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        if not got.is_floating_point():
            assert steps(want, got).max() <= 1
            assert steps(want, got).float().mean() < 0.02
        elif got.dtype is torch.float8_e4m3fn:
            assert torch.equal(want.float(), got.float())
        else:
            assert sqnr(want, got) > (ROUNDING_DB if dtype is torch.float32 else BF16_DB)
    fakes = OnFakes(gm).run(*map(fake_value, program.graph.find_nodes(op="placeholder")))
    assert [(f.shape, f.stride(), f.dtype) for f in fakes] == [(y.shape, y.stride(), y.dtype) for y in actual]


class OnFakes(fx.Interpreter):
    """Runs a graph on fakes of its constants: what Inductor believes of results."""

    def get_attr(self, *where: Any) -> Any:
        return fake_mode_of(self.module.graph).from_tensor(super().get_attr(*where))


RECIPES = [
    "w8a8",
    "w8a8-plain+lorc",
    "hero-m3",
    "w4a8",
    "w4a8-g128+lorc",
    "w4a16-g64",
    "w4a16-g64+lorc",
    "fp8",
    "fp8+lorc",
    "w4a4",
]


@pytest.mark.parametrize(("recipe", "architecture"), [*((recipe, A100) for recipe in RECIPES), ("fp8", L40)])
@pytest.mark.parametrize("layer", [encoder, decoder])
def test_layers(layer, recipe, architecture):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert_same(after(captured(layer, x, recipe=recipe)), architecture, x)


@pytest.mark.parametrize(("family", "recipe"), [("bert", "hero-m3"), ("llama", "w8a8+lorc")])
def test_models(family, recipe):
    model, inputs = tiny_models.build(family)
    program = capture(model, (), inputs, load_recipe(recipe))
    program.calibration = Batches([inputs])
    default_pipeline().run(program)
    assert_same(program, A100, *inputs.values())


def assert_same(program: Program, architecture: int, *inputs: Tensor) -> None:
    gm, ops = lowered(program, architecture)
    assert ops
    with torch.no_grad():
        expected, actual = eager.lower(program)(*inputs), gm(*inputs)
    for want, got in zip(expected, actual, strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            assert (want.shape, want.dtype) == (got.shape, got.dtype)
            ratio = sqnr(want, got)
            print(f"{ratio:.1f} dB, {len(ops)} kernels")
            assert ratio > ROUNDING_DB
