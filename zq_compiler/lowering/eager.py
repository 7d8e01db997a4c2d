"""The oracle: every dialect op computed by its reference, node by node, whatever faster kernels exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..kernels import reference_of
from ..program import Program


class ReferenceInterpreter(fx.Interpreter):
    """Runs a Program's graph with references in place of kernels.

    Args:
        observe: called with each node and its result, in order; for comparisons between lowerings.
    """

    def __init__(self, program: Program, observe: Callable[[fx.Node, Any], None] | None = None) -> None:
        super().__init__(program.gm)
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.observe is not None:
            self.observe(n, result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(reference_of(target) or target, args, kwargs)


def lower(program: Program) -> Callable[..., tuple[Any, ...]]:
    """A function of the Program's flat inputs that returns its flat outputs."""
    interpreter = ReferenceInterpreter(program)

    def run(*inputs: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return interpreter.run(*inputs)

    return run
