"""Bias correction: what quantizing a weight adds to a layer's outputs on average leaves through its bias.

    b' = b + mean(W x + b - y),   y what the layer gives, x what it reads, in the quantized model

(Data-Free Quantization, 1906.04721, section 4.2, with the mean taken from data.) The mean squared error of the outputs
falls by the square of that mean, so it never rises.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import dequantize
from ..numerics import rotate
from ..pipeline import Contract, Pass, refining
from ..program import Program, Stage, fake_value, from_weight, get_constant, is_known
from ..replay import Replay, batches_of, evaluate, sums_over_inputs
from ..rewrite import Builder, arguments, constant_of, evaluate_constant
from ..weights import QuantizedWeight, quantized_weights

aten = torch.ops.aten
OBJECTIVE = "squared mean error of the layer's outputs, relative to their squared mean"


class CorrectBias(Pass):
    """See the module's docstring. Returns the number of layers that have another bias, or one at all.

    A bias that is computed at run time stays, with a note.

    Raises:
        CalibrationError: there are no batches to take inputs from, or they do not fit the model or lead to NaN or Inf.
        WeightError: a weight holds NaN or Inf.
    """

    name = "correct_bias"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = quantized_weights(program, lambda plan: "bias" in plan.methods)
        calls: list[QuantizedWeight] = []
        for call in (replace(weight, linears=(linear,)) for weight in weights for linear in weight.linears):
            bias = arguments(call.linears[0])[2]
            if bias is None or constant_of(program.gm, bias) is not None:
                calls.append(call)
            else:
                program.notes.append(f"{call.name}: no bias correction: its bias is computed at run time")
        if not calls:
            return 0
        batches = batches_of(program, "bias correction")
        data = program.recipe, weakref.ref(batches)
        keys = {c.linears[0]: ("bias", i, *data, c.key(program)) for i, c in enumerate(calls)}
        inputs: Iterable[tuple[QuantizedWeight, Tensor]] = ((call, torch.empty(0)) for call in calls)
        if not all(is_known(program, call.constant(program), keys[call.linears[0]]) for call in calls):
            inputs = sums_over_inputs(Replay(program, batches), calls, _sum_and_count)
        changes = 0
        with refining(program, "bias correction", OBJECTIVE, len(calls)) as finished:
            for call, total in inputs:
                linear, name = call.linears[0], call.constant(program)

                def compute(call: QuantizedWeight = call, total: Tensor = total) -> tuple[Tensor, float, float]:
                    return _corrected(program, call, total[:-1] / total[-1])

                bias, before, after = from_weight(program, name, keys[linear], compute)
                build = Builder(program, linear)
                linear.args = (*linear.args[:2], build.constant(f"{name}_bias{keys[linear][1]}", bias))
                changes += 1
                finished(call.name, before, after)
        return changes


def _sum_and_count(x: Tensor) -> Tensor:
    """The sum of all rows of `x [..., K]` and their number, in one float64 `[K + 1]`."""
    rows = x.double().reshape(-1, x.shape[-1])
    return torch.cat([rows.sum(0), rows.new_tensor([rows.shape[0]])])


def _corrected(program: Program, call: QuantizedWeight, mean: Tensor) -> tuple[Tensor, float, float]:
    """The bias `[N]` that gives the layer its mean output; what that lacked and lacks, squared, beside its square."""
    linear = call.linears[0]
    x, _, bias = arguments(linear)
    row = mean.float()[None]
    given = {x: row}
    output = next((user for user in linear.users if user.meta.get("compensates") is linear), linear)

    def value_of(node: fx.Node) -> Any:
        if node not in given:
            unrotated = node.target is dequantize and x.target is dequantize and node.args[0] is x.args[0]
            if unrotated:  # what LoRC reads
                given[node] = rotate(row)
            elif node.op == "get_attr":
                given[node] = get_constant(program.gm, str(node.target)).float()
            else:
                given[node] = evaluate(node, value_of)
            if isinstance(given[node], Tensor) and given[node].is_floating_point():
                given[node] = given[node].float()
        return given[node]

    with torch.no_grad():
        wanted = torch.nn.functional.linear(rotate(row) if call.rotated else row, call.floats(program))
        old = torch.zeros_like(wanted) if bias is None else evaluate_constant(program.gm, bias).float()
        error = (wanted + old - value_of(output))[0]
        exact = old.expand_as(wanted)[0] + error
        new = exact.to(fake_value(linear).dtype)
    size = float((wanted + old).square().sum()) or 1.0
    return new, float(error.square().sum()) / size, float((exact - new.float()).square().sum()) / size
