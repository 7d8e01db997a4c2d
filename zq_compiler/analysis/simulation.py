"""Recipes tried on a float model that is captured once, with nothing compiled.

A trial is the graph at stage QDQ, in which quantize and dequantize stand around float math: what the integer graph
computes, but for float rounding, at about the float model's speed. Trials share their integer weights.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ..batches import Batches
from ..calibration import run_batches
from ..calling import CallingConvention
from ..capture import capture
from ..errors import ZQError
from ..mutation import Mutations, state_kept
from ..options import calibration_data
from ..passes import default_pipeline
from ..program import LayerPlan, Program, copy_graph, fake_value
from ..recipe import Recipe, load_recipe
from ..roles import ATTENTION
from ..torch_private import concrete

_PIPELINE = default_pipeline()


@dataclass
class Noise:
    """Power of an output and of what differs from it, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, actual: Tensor) -> None:
        """Take in an output and what stands in its place; elements not finite in the reference do not count."""
        finite = reference.isfinite()
        signal = reference[finite].double()
        noise = (signal - actual[finite].double()).square().sum().item()
        self.signal += signal.square().sum().item()
        self.noise += noise if math.isfinite(noise) else math.inf

    @property
    def sqnr(self) -> float:
        """In dB; `inf` where nothing differs, `-inf` where what differs is not finite."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise < math.inf else -math.inf


class Simulation:
    """A model, captured, and data to try recipes on.

    Args:
        model: a module in eval mode, or an ExportedProgram.
        batches: as for `calibration=`, but no forward_loop: the first is the example that the model is captured with.
        recipe: most of what trials will quantize; what needs calibration is calibrated once, for it.
        calibration: other batches to calibrate with, or Statistics; by default the same batches.

    Raises:
        CalibrationError, CaptureError, RecipeError: as `quantize` raises them.
    """

    def __init__(self, model: Any, batches: Any, recipe: Any = "hero-m3", calibration: Any = None) -> None:
        self.batches = batches if isinstance(batches, Batches) else Batches(batches)
        self.recipe = load_recipe(recipe)
        args, kwargs = self.batches.first()
        self.program = capture(model, args, kwargs, self.recipe)
        self.convention = CallingConvention.of(self.program)
        self._weights: dict[Any, dict[Any, Any]] = {}
        self.program.weight_cache = lambda name: self._weights.setdefault(name, {})
        self.program.calibration = calibration_data(calibration) or self.batches
        _PIPELINE.run(self.program, until="cast_layers")
        mutations = Mutations(self.program.graph)
        self._written = [mutations.of(node) is not None for node in self.program.graph.find_nodes(op="placeholder")]

    @property
    def plan(self) -> dict[str, LayerPlan]:
        """What the recipe makes of each layer."""
        return self.program.plan

    @property
    def layers(self) -> list[LayerPlan]:
        """Those that the recipe quantizes or runs in another dtype."""
        return [plan for plan in self.plan.values() if plan.quantized or plan.dtype is not None]

    def trial(self, recipe: Recipe | None = None, only: Collection[str] | None = None) -> Program:
        """The model quantized by a recipe, at stage QDQ.

        Args:
            recipe: the simulation's own by default; another may need no range that the own one does not need.
            only: layers to quantize; what the recipe says of others does not hold. All by default.
        """
        trial = dataclasses.replace(
            self.program,
            gm=copy_graph(self.program.gm),
            plan={name: copy.copy(plan) for name, plan in self.plan.items()},
            recipe=recipe or self.recipe,
            history=[],
            near_misses=[],
            notes=[],
        )
        if recipe is not None:
            trial.plan = {}
            _PIPELINE.run(trial, since="annotate", until="calibrate")
        if only is not None:
            trial.recipe = trial.recipe.replace(residual="float")  # that of a norm belongs to no layer
            apart = frozenset(only)  # what data chooses follows from the layers in front too
            trial.weight_cache = lambda name: self._weights.setdefault((name, apart), {})
            for name, plan in trial.plan.items():
                if name not in only:
                    plan.leave_float("another layer's trial")
        return _PIPELINE.run(trial, since="cast_layers", until="move_quantize")

    def run(self, program: Program, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Flat outputs of the float model or of a trial, which leaves its inputs and the model's state as they were."""
        inputs = [x.clone() if written else x for x, written in zip(inputs, self._written, strict=True)]
        with torch.no_grad(), state_kept(program):
            return tuple(y.clone() if isinstance(y, Tensor) else y for y in program.gm(*inputs))  # not the state itself

    def as_model(self, program: Program) -> Callable[..., Any]:
        """The float model or a trial, called like the model."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.convention.unflatten(self.run(program, self.convention.flatten(args, kwargs)))

        return call

    def compare(self, trials: Sequence[Program], doing: str) -> list[Noise]:
        """Noise of each trial's first output of floats, against the float model's, over all batches."""
        noises = [Noise() for _ in trials]

        def run(*inputs: Any) -> Sequence[Any]:
            outputs = self.run(self.program, inputs)
            index = first_floats(outputs)
            for trial, noise in zip(trials, noises, strict=True):
                noise.add(outputs[index], self.run(trial, inputs)[index])
            return outputs

        run_batches(self.program, self.convention, self.batches, run, doing)
        return noises

    def work(self) -> dict[str, int]:
        """Multiply-accumulates of each layer on the example inputs; of a table, the elements it looks up."""
        work = dict.fromkeys(self.plan, 0)
        for node in self.program.graph.nodes:
            layer = node.meta.get("layer")
            if layer in work:
                work[layer] += _work(node)
        return work


def first_floats(outputs: Sequence[Any]) -> int:
    """Position of a model's first output that is a tensor of floats with a dimension: hidden states, or logits."""
    for index, value in enumerate(outputs):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            return index
    raise ZQError("the model has no output of floats to compare", fix="return one, for example the logits")


def _work(node: fx.Node) -> int:
    """Of a product, elements of the result times summands of each."""
    result = _elements(fake_value(node))
    if node.target is ATTENTION:
        key = fake_value(node.args[1])  # type: ignore[arg-type]
        return 2 * result * int(concrete(key.shape[-2]))
    if node.target is torch.ops.aten.linear.default:
        return result * int(concrete(fake_value(node.args[0]).shape[-1]))  # type: ignore[arg-type]
    return result


def _elements(value: Any) -> int:
    return reduce(operator.mul, (int(concrete(size)) for size in value.shape), 1)
