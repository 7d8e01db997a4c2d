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
from ..rewrite import Builder, arguments, evaluate_constant
from ..weights import QuantizedWeight, quantized_weights

aten = torch.ops.aten
OBJECTIVE = "squared mean error of the layer's outputs, relative to their squared mean"


class CorrectBias(Pass):
    """See the module's docstring. Returns the number of layers that have another bias, or one at all.

    Raises:
        CalibrationError: there are no batches to take inputs from, or they do not fit the model.
        WeightError: a weight holds NaN or Inf.
    """

    name = "correct_bias"
    requires = Stage.QDQ
    produces = Stage.QDQ
    contract = Contract.IMPROVING

    def __call__(self, program: Program) -> int:
        weights = quantized_weights(program, lambda plan: "bias" in plan.methods)
        calls = [replace(weight, linears=(linear,)) for weight in weights for linear in weight.linears]
        if not calls:
            return 0
        batches = batches_of(program, "bias correction")
        keys = {c.linears[0]: ("bias", i, weakref.ref(batches), c.key(program)) for i, c in enumerate(calls)}
        inputs: Iterable[tuple[QuantizedWeight, Tensor]] = ((call, torch.empty(0)) for call in calls)
        if not all(is_known(program, call.constant(program), keys[call.linears[0]]) for call in calls):
            inputs = sums_over_inputs(Replay(program, batches), calls, _sum_and_count)
        changes = 0
        with refining(program, "bias correction", OBJECTIVE, len(calls)) as finished:
            for call, total in inputs:
                linear, name = call.linears[0], call.constant(program)

                def compute(call: QuantizedWeight = call, total: Tensor = total) -> tuple[Tensor, float, float]:
                    return _mean_error(program, call, total[:-1] / total[-1])

                error, before, after = from_weight(program, name, keys[linear], compute)
                _add(program, linear, error, f"{name}_bias{keys[linear][1]}")
                changes += 1
                finished(call.name, before, after)
        return changes


def _sum_and_count(x: Tensor) -> Tensor:
    """The sum of all rows of `x [..., K]` and their number, in one float64 `[K + 1]`."""
    rows = x.double().flatten(0, -2)
    return torch.cat([rows.sum(0), rows.new_tensor([rows.shape[0]])])


def _mean_error(program: Program, call: QuantizedWeight, mean: Tensor) -> tuple[Tensor, float, float]:
    """What the layer's outputs lack on average, `[N]` float32; its square beside that of the mean output, before and
    after."""
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
        if bias is not None:
            wanted = wanted + value_of(bias)
        error = (wanted - value_of(output))[0]
    size = float(wanted.square().sum()) or 1.0
    return error, float(error.square().sum()) / size, 0.0


def _add(program: Program, linear: fx.Node, error: Tensor, name: str) -> None:
    bias = arguments(linear)[2]
    dtype = fake_value(linear).dtype
    if bias is not None:
        error = error + evaluate_constant(program.gm, bias).float()
    linear.args = (*linear.args[:2], Builder(program, linear).constant(name, error.to(dtype)))
