"""A pass of one's own among the standard ones: verified, timed and recorded like them.

The pass: GELU costs more than ReLU on small machines. `gelu -> relu` is no equivalence, so its contract is LOSSY; with
CLOSE instead, the pipeline refuses it, which the end of this file shows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx, nn

from zq_compiler import VerificationError
from zq_compiler.capture import capture_module
from zq_compiler.passes import PASSES
from zq_compiler.pipeline import Contract, Pass, PassPipeline, readable
from zq_compiler.program import Program, Stage
from zq_compiler.recipe import preset
from zq_compiler.rewrite import Builder, Match, Op, RewriteRule, apply_rules

aten = torch.ops.aten


class GeluToRelu(RewriteRule):
    """What to look for, and what to put there."""

    pattern = Op(aten.gelu.default, "x", "approximate")

    def rewrite(self, found: Match, build: Builder) -> fx.Node:
        return build.call(aten.relu.default, found["x"])


class CheapActivation(Pass):
    """A pass names the stage of the graphs it takes and gives, and what it promises about the outputs."""

    name = "cheap_activation"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract: ClassVar[Contract] = Contract.LOSSY

    def __call__(self, program: Program) -> int:
        return apply_rules(program, [GeluToRelu()])


class Overconfident(CheapActivation):
    """The same, promising too much."""

    contract = Contract.CLOSE


def run(step: Pass) -> Program:
    """Capture a small MLP, and run `step` after `canonicalize`, before the passes that quantize."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    program = capture_module(model, (torch.randn(8, 64),), {}, preset("w8a8"))
    return PassPipeline([PASSES[0], step, *PASSES[1:]]).run(program, check=True)


def main() -> None:
    """Run it, then be refused."""
    program = run(CheapActivation())
    for record in program.history:
        print(f"{record.name:20} {record.changes:3} changes  {record.sqnr:6.1f} dB")
    print(readable(program))
    try:
        run(Overconfident())
    except VerificationError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
