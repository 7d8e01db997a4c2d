"""Recipes tried on a float model that is captured once, with nothing compiled.

A trial is the graph at stage QDQ, in which quantize and dequantize stand around float math: what the integer graph
computes, but for float rounding, at about the float model's speed. Trials share their integer weights.
"""

from __future__ import annotations

import copy
import dataclasses
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
from ..passes import PASSES
from ..pipeline import Pass
from ..program import LayerPlan, Program, copy_graph, fake_value
from ..recipe import Recipe, load_recipe
from ..roles import ATTENTION
from ..statistics import Statistics
from ..torch_private import concrete

_BY_NAME: dict[str, Pass] = {step.name: step for step in PASSES}
_PLANNING = ("canonicalize", "annotate", "calibrate")
_QUANTIZING = tuple(
    step.name for step in PASSES if step.name in ("cast_layers", "insert_qdq", "absorb_scales", "fold_quantize")
)


@dataclass
class Noise:
    """Power of an output and of what differs from it, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, actual: Tensor) -> None:
        """Take in an output and what stands in its place; elements not finite in the reference do not count."""
        finite = reference.isfinite()
        signal = reference[finite].double()
        self.signal += signal.square().sum().item()
        self.noise += (signal - actual[finite].double()).square().sum().item()

    @property
    def sqnr(self) -> float:
        """In dB; `inf` where nothing differs."""
        if self.noise == 0:
            return float("inf")
        return float(10 * torch.log10(torch.tensor(self.signal / self.noise, dtype=torch.float64)))


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
        self._weights: dict[str, dict[Any, Any]] = {}
        self.program.weight_cache = lambda name: self._weights.setdefault(name, {})
        self.program.calibration = _calibration(calibration) or self.batches
        for name in _PLANNING:
            _BY_NAME[name](self.program)
        self.program.graph.eliminate_dead_code()
        self.program.gm.recompile()

    @property
    def plan(self) -> dict[str, LayerPlan]:
        """What the recipe makes of each layer."""
        return self.program.plan

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
            _BY_NAME["annotate"](trial)
        if only is not None:
            trial.recipe = trial.recipe.replace(residual="float")  # that of a norm belongs to no layer
            for name, plan in trial.plan.items():
                if name not in only:
                    plan.leave_float("another layer's trial")
        for name in _QUANTIZING:
            _BY_NAME[name](trial)
        trial.graph.eliminate_dead_code()
        trial.gm.recompile()
        return trial

    def as_model(self, program: Program) -> Callable[..., Any]:
        """A trial, called like the model."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self.convention.unflatten(program.gm(*self.convention.flatten(args, kwargs)))

        return call

    def compare(self, trials: Sequence[Program], doing: str) -> list[Noise]:
        """Noise of each trial's first output of floats, against the float model's, over all batches."""
        noises = [Noise() for _ in trials]

        def run(*inputs: Any) -> Sequence[Any]:
            with torch.no_grad():
                outputs = self.program.gm(*inputs)
                index = first_floats(outputs)
                for trial, noise in zip(trials, noises, strict=True):
                    noise.add(outputs[index], trial.gm(*inputs)[index])
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
    raise ValueError("the model has no output of floats")


def _calibration(given: Any) -> Any:
    return given if given is None or isinstance(given, Batches | Statistics) else Batches(given)


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
