"""Programs of tiny modules, for tests that look at one pass or one rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zq_compiler.analysis.report import op_histogram
from zq_compiler.capture import capture_module
from zq_compiler.passes import PASSES
from zq_compiler.pipeline import PassPipeline
from zq_compiler.program import Program
from zq_compiler.recipe import load_recipe


class Block(nn.Module):
    """Layers for a forward that a test writes down as a function `f(self, *inputs)`."""

    def __init__(self, forward: Callable[..., Any], width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.norm2 = nn.LayerNorm(width, eps=0.1), nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width, eps=1e-3)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.randn(width))
        self.matrix = nn.Parameter(torch.randn(width, 2 * width))
        self.register_buffer("state", torch.zeros(width))
        with torch.no_grad():
            for norm in (self.norm, self.norm2):
                norm.weight.normal_()
                norm.bias.normal_()
            self.rms.weight.normal_()
        self._written = forward
        self.out, self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(4))

    def forward(self, *inputs: Any) -> Any:
        return self._written(self, *inputs)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention with heads of 8 features, split off and merged as models do."""
    heads = (t.view(*t.shape[:-1], -1, 8).transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(*heads, **options).transpose(1, 2).flatten(-2)


def encoder(self: Block, x: torch.Tensor) -> torch.Tensor:
    """A post-norm layer, as in BERT."""
    y = self.norm(x + self.out(attend(self.a(x), self.b(x), self.c(x))))
    return self.norm2(y + self.down(nn.functional.gelu(self.up(y))))


def decoder(self: Block, x: torch.Tensor) -> torch.Tensor:
    """A pre-norm layer with a gated MLP, as in Llama."""
    y = self.rms(x)
    x = x + self.out(attend(self.a(y), self.b(y), self.c(y), is_causal=True))
    y = self.rms(x)
    return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def captured(
    model: nn.Module | Callable[..., Any], *inputs: Any, recipe: Any = "w8a8", dynamic: bool = False
) -> Program:
    """A model, or a function of a Block and inputs, as a Program before any pass. The inputs are what it calibrates on.

    Sizes are fixed unless `dynamic`: reasoning about symbols is most of what a capture costs.
    """
    module = model if isinstance(model, nn.Module) else Block(model)
    fixed = inspect.signature(module.forward).bind(*(None for _ in inputs)).arguments
    program = capture_module(module.eval(), inputs, {}, load_recipe(recipe), None if dynamic else fixed)
    program.calibration = [inputs]
    return program


def after(program: Program, *names: str, check: bool = False) -> Program:
    """The Program after the passes up to the last of `names`, or after all."""
    count = max((i + 1 for i, p in enumerate(PASSES) if p.name in names), default=len(PASSES))
    PassPipeline(PASSES[:count]).run(program, check=check)
    return program


def changes(program: Program, name: str) -> int:
    """How many changes a pass recorded."""
    return next(record.changes for record in program.history if record.name == name)


def ops(program: Program) -> dict[str, int]:
    """How often each op stands in the graph, `getitem` left out."""
    return op_histogram(program)


def dialect(program: Program) -> dict[str, int]:
    """The same, of the package's own ops only, without `zq.`."""
    return {k.removeprefix("zq."): v for k, v in ops(program).items() if k.startswith("zq.")}


def reasons(program: Program) -> set[tuple[str, str]]:
    """Rules that almost applied, and why not."""
    return {(miss.rule, miss.reason) for miss in program.near_misses}


def run(program: Program, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The Program's outputs, its inputs left alone."""
    with torch.no_grad():
        return program.gm(*(x.clone() for x in inputs))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian data, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
