"""Recipe to plan: for every layer that holds weights, how it is to be quantized, or why it is not."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..capture import is_op, layer_of
from ..errors import RecipeError
from ..kernels.int8_linear import MAX_K
from ..mutation import Mutations
from ..numerics import ROTATION
from ..pipeline import Contract, Pass
from ..program import LayerPlan, Program, Stage, fake_value
from ..recipe import QRule, Recipe, Role
from ..rewrite import constant_of
from ..roles import ATTENTION, roles
from ..schemes import INT8_WEIGHT
from ..torch_private import concrete

aten = torch.ops.aten
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Names that projections onto the vocabulary go by, where their weight is not tied to the embedding.
LM_HEAD = re.compile(
    r"(.*\.)?(lm_head|lm_head\.decoder|embed_out|proj_out|output_projection|predictions\.decoder"
    r"|generator_lm_head|lm_head\.dense_out|vocab_projector|pred_layer\.proj|mlm_head)$"
)
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input),
)
ELEMENTWISE_OK = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.batch_norm.default}


class Annotate(Pass):
    """Fills `program.plan`, keyed by layer name, and marks each node it speaks of with `meta["layer"]`."""

    name = "annotate"
    requires = Stage.FLOAT
    produces = Stage.FLOAT
    contract = Contract.EXACT

    def __call__(self, program: Program) -> int:
        tied = _weights_of(program, aten.embedding.default, 0) & _weights_of(program, aten.linear.default, 1)
        mutations = Mutations(program.graph)
        role_of = roles(program.graph)
        for node in program.graph.nodes:
            plan = _plan_node(program, node, tied, role_of.get(node, Role.OTHER))
            if plan is not None:
                if (plan.weight or plan.dtype) and any(map(mutations.of, _weight_nodes(program, node, plan))):
                    plan.leave_float("the graph changes its weight in place")
                node.meta["layer"] = plan.name
                known = program.plan.setdefault(plan.name, plan)
                known.calls += 1
                if known.quantized and not plan.quantized:  # one call of a shared layer that cannot
                    known.leave_float(plan.reason)
        norms = _names_of_norms(program) if program.recipe.residual == "int8" else {}
        unmatched = program.recipe.unmatched({**norms, **{plan.name: plan.role for plan in program.plan.values()}})
        if unmatched and program.plan:
            raise RecipeError(
                f"rule {unmatched[0].pattern!r} matches no layer",
                fix=f"correct the pattern, or set optional=True; layers here: {_some(program.plan)}",
            )
        return len(program.plan)


def _names_of_norms(program: Program) -> dict[str, Role]:
    """A rule may name a norm, to keep the residual that it writes in float."""
    nodes = [n for n in program.graph.nodes if is_op(n, aten.layer_norm.default, aten.rms_norm.default)]
    weights = [constant_of(program.gm, operand) for node in nodes for operand in node.all_input_nodes]
    return {_name(weight, weight): Role.OTHER for weight in weights if weight is not None}


def _weights_of(program: Program, target: Any, index: int) -> set[str]:
    """Constants that calls of `target` take as their weight."""
    nodes = program.graph.find_nodes(op="call_function", target=target)
    return {str(c.target) for n in nodes if (c := constant_of(program.gm, n.args[index])) is not None}


def _weight_nodes(program: Program, node: fx.Node, plan: LayerPlan) -> list[fx.Node]:
    found = (constant_of(program.gm, n) for n in node.all_input_nodes)
    return [n for n in found if n is not None and n.target == plan.constant]


def _some(names: Any, count: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _plan_node(program: Program, node: fx.Node, tied: set[str], role: Role) -> LayerPlan | None:
    if is_op(node, aten.linear.default):
        return _plan_linear(program, node, tied, role)
    if is_op(node, ATTENTION):
        plan = _plan_attention(program, node)
        return plan if program.recipe.quantizes_attention or plan.dtype is not None else None
    if is_op(node, aten.embedding.default):
        return _plan_embedding(program, node, tied)
    if is_op(node, *CONVOLUTIONS):
        weight = constant_of(program.gm, node.args[1])
        plan = _left_in_float(node, weight, node.args[1], "conv", "convolutions have no INT8 form here")
        return _cast_by_rule(program, node, plan)
    if node.op == "call_function" and node.target not in ELEMENTWISE_OK and _is_product(node):
        for operand in node.all_input_nodes:
            weight = constant_of(program.gm, operand)
            if weight is not None and fake_value(operand).ndim >= 2 and fake_value(operand).is_floating_point():
                dims = fake_value(operand).ndim
                why = "expert weights" if dims == 3 else f"a constant operand of {dims} dimensions"
                why = f"{why} in {_op_name(node)}: no INT8 form here"
                return _cast_by_rule(program, node, _left_in_float(node, weight, operand, "matmul", why))
    return None


def _cast_by_rule(program: Program, node: fx.Node, plan: LayerPlan) -> LayerPlan:
    """The plan, with the dtype that a rule has the layer run in, if it has one."""
    rule = program.recipe.rule_for(plan.name, plan.role)
    if rule is not None and rule.dtype is not None:
        own, plan.reason = str(fake_value(node).dtype).removeprefix("torch."), rule.reason
        plan.dtype = rule.dtype if rule.dtype != own and getattr(torch, own) in FLOATS else None
    return plan


_PRODUCTS = ("mm", "matmul", "einsum", "linear", "baddbmm", "tensordot")


def _is_product(node: fx.Node) -> bool:
    return any(word in _op_name(node) for word in _PRODUCTS)


def _op_name(node: fx.Node) -> str:
    return str(node.target).rsplit("::", 1)[-1].removesuffix(".default").removeprefix("aten.")


def _left_in_float(node: fx.Node, constant: fx.Node | None, operand: Any, kind: str, reason: str) -> LayerPlan:
    weight = fake_value(operand) if isinstance(operand, fx.Node) else torch.empty(0)
    shape = tuple(map(concrete, weight.shape))  # a position table may be resized to the input's size
    return LayerPlan(
        _name(node, constant),
        kind,
        shape,
        constant=str(constant.target) if constant is not None else "",
        float_bytes=math.prod(shape) * weight.element_size() if constant is not None else 0,
        reason=reason,
    )


def _name(node: fx.Node, weight: fx.Node | None) -> str:
    """From the weight's own name; a node without one goes by the module it was traced in."""
    if weight is not None:
        return re.sub(r"\.weight$", "", str(weight.target))
    return layer_of(node) or node.name


def _plan_linear(program: Program, node: fx.Node, tied: set[str], role: Role) -> LayerPlan:
    recipe = program.recipe
    x, weight = fake_value(node.args[0]), fake_value(node.args[1])  # type: ignore[arg-type]
    constant = constant_of(program.gm, node.args[1])
    plan = _left_in_float(node, constant, node.args[1], "linear", "the weight is computed at run time")
    plan.role = role
    if constant is None:
        return plan
    if constant.target in tied:  # one weight, two layers: each goes by the module it was traced in
        plan.name = layer_of(node) or f"{plan.name} (tied output)"
    kind = plan.kind = "lm_head" if constant.target in tied or LM_HEAD.match(plan.name) else "linear"
    plan.reason = ""
    rule = recipe.rule_for(plan.name, role)
    plan.requested = bool(rule and rule.weight) and not (kind == "lm_head" and recipe.lm_head == "float")
    if rule is None:
        as_what = "" if role is Role.OTHER else f" as {role.value}"
        plan.reason = f"no rule of recipe {recipe.name} names it{as_what}"
    elif rule.weight is None:
        plan.reason = rule.reason
        _cast_by_rule(program, node, plan)
    elif kind == "lm_head" and recipe.lm_head == "float":
        plan.reason = "projections onto the vocabulary stay in float (lm_head='float')"
    else:
        plan.reason = _unquantizable(recipe, rule, x, weight)
        if not plan.reason:
            # tables are not rotated, nor what is tied to them
            divisible = weight.shape[1] % ROTATION == 0 and kind != "lm_head"
            plan.weight, plan.input = (
                s if divisible else s and replace(s, rotated=False) for s in (rule.weight, rule.input)
            )
            plan.output, plan.smooth = rule.output, rule.smooth
            plan.lorc_rank, plan.methods = rule.lorc_rank, tuple(rule.methods)
        elif plan.reason.startswith("only"):
            plan.requested = False  # the recipe's own min_size decides, it was not asked for
    return plan


def _unquantizable(recipe: Recipe, rule: QRule, x: torch.Tensor, weight: torch.Tensor) -> str:
    """Why a linear cannot or should not be quantized; empty when it can."""
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} dimensions"
    n, k = weight.shape
    if weight.dtype not in FLOATS or x.dtype != weight.dtype:
        return f"its weight is {weight.dtype} and its input {x.dtype}"
    if min(n, k) < recipe.min_size:
        format = rule.weight.format.upper() if rule.weight is not None else ""
        return f"only {k} in and {n} out features: {format} does not pay under {recipe.min_size}"
    if k > MAX_K and rule.input is not None and rule.input.format == "int8":
        return f"{k} input features could overflow an int32 sum (at most {MAX_K})"
    return ""


def _plan_attention(program: Program, node: fx.Node) -> LayerPlan:
    query = fake_value(node.args[0])  # type: ignore[arg-type]
    shape = tuple(query.shape[1::2]) if query.ndim == 4 else ()  # heads, head dimension
    plan = LayerPlan(layer_of(node) or node.name, "attention", shape, role=Role.ATTENTION)
    rule = program.recipe.rule_for(plan.name, Role.ATTENTION)
    plan.requested = bool(rule and rule.input)
    if rule is None:
        plan.reason = f"no rule of recipe {program.recipe.name} names it"
    elif rule.input is None:
        plan.reason = rule.reason
        _cast_by_rule(program, node, plan)
    elif query.ndim != 4:
        plan.reason = f"its query has {query.ndim} dimensions"
    elif query.dtype not in FLOATS:
        plan.reason = f"its query is {query.dtype}"
    elif not all(isinstance(n, int) for n in shape):
        plan.reason = "its number of heads or their dimension is known at run time only"
    else:
        plan.input = rule.input
    return plan


def _plan_embedding(program: Program, node: fx.Node, tied: set[str]) -> LayerPlan:
    table = constant_of(program.gm, node.args[0])
    plan = _left_in_float(node, table, node.args[0], "embedding", "embedding tables stay in float (embedding='float')")
    if table is not None and table.target in tied:
        plan.name = layer_of(node) or plan.name
    if program.recipe.embedding == "int8":
        plan.requested = True
        rule = program.recipe.rule_for(plan.name)
        if table is None:
            plan.reason = "the table is computed at run time"
        elif rule is not None and rule.weight is None:
            plan.reason, plan.requested = rule.reason, False
        elif fake_value(table).dtype not in FLOATS:
            plan.reason = f"its table is {fake_value(table).dtype}"
        else:
            plan.weight, plan.reason = INT8_WEIGHT, ""
    return plan if plan.quantized or table is None else _cast_by_rule(program, node, plan)
