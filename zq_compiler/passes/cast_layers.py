"""Layers that the recipe runs in another float dtype: operands are cast, weights once and for all, results cast back.

Neighbours see the model's own dtype. Where two such layers follow one another, with nothing between them but moves, the
casts cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..errors import WeightError
from ..mutation import Mutations
from ..pipeline import Contract, Pass
from ..program import Program, Stage, cast_name, fake_value, from_weight, get_constant
from ..rewrite import Builder, constant_of, set_fake_value

aten = torch.ops.aten
_MOVES = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default),
    *(aten.expand.default, aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, aten.slice.Tensor),
    *(aten.flatten.using_ints, aten.unflatten.int),
}


class CastLayers(Pass):
    """See the module's docstring. Returns the number of layers' calls that were cast.

    Raises:
        WeightError: a weight was released before it could be cast, or exceeds the dtype's range.
    """

    name = "cast_layers"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract = Contract.LOSSY

    def __call__(self, program: Program) -> int:
        casting = _Casting(program)
        changes = 0
        for node in list(program.graph.nodes):
            plan = program.plan.get(node.meta.get("layer", ""))
            if plan is None or plan.dtype is None:
                continue
            dtype = getattr(torch, plan.dtype)
            if fake_value(node).dtype != dtype:
                casting.layer(node, dtype)
                changes += 1
        return changes


class _Casting:
    """One run of the pass: the casts so far, and what changes in place."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.mutations = Mutations(program.graph)
        self.shared: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.widened: dict[fx.Node, fx.Node] = {}  # a result in the model's dtype -> as the layer computed it

    def layer(self, node: fx.Node, dtype: torch.dtype) -> None:
        own = fake_value(node).dtype

        def operand(value: fx.Node) -> fx.Node:
            fake = fake_value(value)
            is_float = isinstance(fake, Tensor) and fake.is_floating_point()
            return self.operand(node, value, dtype) if is_float and fake.dtype != dtype else value

        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        set_fake_value(node)
        users = list(node.users)
        wide = Builder(self.program, node.next).call(aten.to.dtype, node, own)
        wide.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        for user in users:
            user.replace_input_with(node, wide)
        self.widened[wide] = node

    def operand(self, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if constant_of(self.program.gm, value) is not None:
            return self.constant(node, value, dtype)
        if self.mutations.between(value, node, [value]) is not None:
            return Builder(self.program, node).call(aten.to.dtype, value, dtype)
        key = value, dtype
        if key not in self.shared:
            build = Builder(self.program, node)
            self.shared[key] = self.narrow(build, value, dtype) or build.call(aten.to.dtype, value, dtype)
        return self.shared[key]

    def narrow(self, build: Builder, value: Any, dtype: torch.dtype) -> fx.Node | None:
        """A value that is only a widened result of this dtype, moved: the same moves of the result itself."""
        source = self.widened.get(value)
        if source is not None:
            return source if fake_value(source).dtype == dtype else None
        if not (isinstance(value, fx.Node) and value.target in _MOVES) or self.mutations.of(value) is not None:
            return None
        inner = self.narrow(build, value.args[0], dtype)
        return build.call(value.target, inner, *value.args[1:]) if inner is not None else None

    def constant(self, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The constant in this dtype, and what is done to it done again."""
        build = Builder(self.program, node)
        if value.op != "get_attr":
            again = (self.constant(node, a, dtype) if isinstance(a, fx.Node) else a for a in value.args)
            return build.call(value.target, *again)  # type: ignore[arg-type]
        name = str(value.target)
        target = cast_name(name, str(dtype).removeprefix("torch."))
        return build.constant(target, _cast(self.program, name, dtype))


def _cast(program: Program, name: str, dtype: torch.dtype) -> Tensor:
    """One weight in another dtype."""

    def compute() -> Tensor:
        weight = get_constant(program.gm, name)
        cast = weight.detach().to(dtype)
        if weight.isfinite().all() and not cast.isfinite().all():
            raise WeightError(f"the weight exceeds what {dtype} holds", where=name, fix="use bfloat16 in that rule")
        return cast

    return from_weight(program, name, dtype, compute)
