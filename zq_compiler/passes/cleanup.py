"""Remove what nothing reads: dead nodes, and the float weights that would otherwise live on beside their integers."""

from __future__ import annotations

import torch
from torch import fx

from ..pipeline import Contract, Pass
from ..program import Program, Stage


class Cleanup(Pass):
    """Returns the number of nodes and constants removed."""

    name = "cleanup"
    requires = Stage.FUSED
    produces = Stage.FUSED
    contract = Contract.EXACT

    def __call__(self, program: Program) -> int:
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code()
        return before - len(program.graph.nodes) + _drop_unused_constants(program.gm)


def _drop_unused_constants(gm: fx.GraphModule) -> int:
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    dropped = 0
    for path, module in list(gm.named_modules()):
        for table in (module._parameters, module._buffers):
            for name in [n for n in table if f"{path}.{n}".lstrip(".") not in used]:
                del table[name]
                dropped += 1
        for name, value in list(vars(module).items()):  # plain tensor attributes, as exporters leave them
            if isinstance(value, torch.Tensor) and f"{path}.{name}".lstrip(".") not in used:
                delattr(module, name)
                dropped += 1
    gm.delete_all_unused_submodules()
    return dropped
