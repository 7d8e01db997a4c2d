"""The most INT8 within an accuracy budget: layers of a recipe move to gentler schemes until the budget holds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import RecipeError, ZQError
from ..program import LayerPlan, Program
from ..recipe import QRule, Recipe, Role
from ..schemes import ROTATED_TOKEN, ROTATED_WEIGHT
from .simulation import Simulation

Metric = Callable[[Callable[..., Any]], float]


@dataclass(frozen=True)
class Trial:
    """One assignment that was tried.

    Args:
        token_wise, in_float: how many layers had moved to token-wise scales, and to float.
        residual: whether blocks add integers (`"int8"`) or floats.
        score: what the metric gave.
        int8: share of the multiply-accumulates in INT8, 0 to 1.
        fits: whether the budget holds.
    """

    token_wise: int
    in_float: int
    residual: str
    score: float
    int8: float
    fits: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        recipe: replays the assignment; `save` writes it as JSON.
        score, float_score: the metric of it and of the float model; for `"sqnr"` the latter is infinite.
        int8: share of the multiply-accumulates in INT8, of those in layers that the given recipe quantizes.
        trials: everything that was tried, in order.
    """

    recipe: Recipe
    score: float
    float_score: float
    int8: float
    trials: list[Trial]

    def __str__(self) -> str:
        lines = [
            f"{'fits  ' if t.fits else 'misses'} score {t.score:.4f}, {100 * t.int8:.1f} % of the work in INT8,"
            f" {t.token_wise} layers token-wise, {t.in_float} in float, residual in {t.residual}"
            for t in self.trials
        ]
        return "\n".join([*lines, f"found: score {self.score:.4f}, {100 * self.int8:.1f} % in INT8"])


@dataclass(frozen=True)
class _Move:
    """A layer to token-wise scales or to float, or (without one) the residual to float; the noise that takes away."""

    plan: LayerPlan | None
    to_float: bool
    gain: float
    work: int = 0


def search(
    model: Any,
    batches: Any,
    *,
    budget: float,
    metric: Metric | str = "sqnr",
    recipe: Any = "hero-m3",
    calibration: Any = None,
) -> SearchResult:
    """The assignment with the most INT8 whose accuracy is within the budget.

    Starts from `recipe`. Layers are measured one by one (`sensitivity`), and moved in the order of what that gains:
    first what costs no INT8 product (static scales to token-wise ones, the residual to floats), then layers to float,
    most noise for the least work first. The shortest sequence of moves that fits is found by bisection; then each move
    to float is taken back where the budget allows.

    Args:
        model: a module in eval mode, or an ExportedProgram.
        batches: what layers are measured on, as for `sensitivity`; also what `"sqnr"` is computed on.
        budget: for `"sqnr"`, the least SQNR of the model's first output of floats, in dB; for another metric, the most
            that its score may lie below the float model's.
        metric: `"sqnr"`, or a function that is given something called like the model and returns a score, higher for
            better: an accuracy on held-out data, for example.
        recipe: the most INT8 there may be.
        calibration: data for static scales, as for `quantize`; by default the same batches.

    Raises:
        RecipeError: an unknown metric, one that gives no finite number, or a budget below 0.
        ZQError: not even the float model keeps the budget: the metric differs from call to call.
        CalibrationError, CaptureError: as `quantize` raises them.
    """
    if not callable(metric) and metric != "sqnr":
        raise RecipeError(f"unknown metric {metric!r}", fix='use "sqnr", or a function of the model')
    if not budget >= 0:
        raise RecipeError(f"budget={budget!r}", fix="give a number that is not below 0")
    return _Search(Simulation(model, batches, recipe, calibration), metric, budget).run()


class _Search:
    def __init__(self, simulation: Simulation, metric: Metric | str, budget: float) -> None:
        self.simulation, self.metric, self.budget = simulation, metric, budget
        self.layers = simulation.layers
        self.work = simulation.work()
        self.trials: list[Trial] = []
        self.float_score = self.measured(simulation.program) if callable(metric) else math.inf

    def run(self) -> SearchResult:
        best = self.try_(())
        moves: Sequence[_Move] = ()
        if not best.fits:
            best, moves = self.shortest(self.moves())
            if not best.fits:
                raise ZQError(
                    f"nothing keeps the budget of {self.budget}: all in float, the score is {best.score:.4f}",
                    where=self.simulation.recipe.name,
                    fix="give a metric that is the same at each call, or a larger budget",
                )
            best, moves = self.taken_back(best, moves)
        return SearchResult(self.recipe(moves), best.score, self.float_score, best.int8, self.trials)

    def moves(self) -> list[_Move]:
        """Every move, most worthwhile first."""
        simulation = self.simulation
        token_wise = [plan for plan in self.layers if _can_be_token_wise(plan)]
        trials = [simulation.trial(only={plan.name}) for plan in self.layers]
        trials += [simulation.trial(_token_wise(simulation.recipe, [p.name]), only={p.name}) for p in token_wise]
        trials += [simulation.trial(), simulation.trial(simulation.recipe.replace(residual="float"))]
        *noises, whole, float_residual = (n.noise for n in simulation.compare(trials, "quantizing layer by layer"))
        left = dict(zip((plan.name for plan in self.layers), noises, strict=False))
        gentle = [_Move(None, True, whole - float_residual)] if float_residual < whole else []
        for plan, noise in zip(token_wise, noises[len(self.layers) :], strict=True):
            if noise < left[plan.name]:
                gentle.append(_Move(plan, False, left[plan.name] - noise))
                left[plan.name] = noise
        to_float = [_Move(plan, True, left[plan.name], self.work[plan.name]) for plan in self.layers]
        gentle.sort(key=lambda move: move.gain, reverse=True)
        to_float.sort(key=lambda move: move.gain / max(move.work, 1), reverse=True)
        return [*gentle, *to_float]

    def shortest(self, moves: Sequence[_Move]) -> tuple[Trial, Sequence[_Move]]:
        """The shortest prefix that fits; all moves, where even they do not (a metric that is noisy)."""
        low, high = 0, len(moves)  # `low` moves do not fit
        found = self.try_(moves)
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.try_(moves[:middle])
            if trial.fits:
                high, found = middle, trial
            else:
                low = middle
        return found, moves[:high]

    def taken_back(self, best: Trial, moves: Sequence[_Move]) -> tuple[Trial, Sequence[_Move]]:
        """Without the moves to float that are not needed, the costliest first."""
        for move in sorted((m for m in moves if m.to_float and m.plan), key=lambda m: m.work, reverse=True):
            fewer = [m for m in moves if m is not move]
            trial = self.try_(fewer)
            if trial.fits:
                best, moves = trial, fewer
        return best, moves

    def try_(self, moves: Sequence[_Move]) -> Trial:
        recipe = self.recipe(moves)
        program = self.simulation.trial(recipe)
        score = self.score(program)
        fits = score >= self.budget if self.metric == "sqnr" else score >= self.float_score - self.budget
        total = sum(self.work[plan.name] for plan in self.layers) or 1
        in_int8 = sum(self.work[name] for name, plan in program.plan.items() if plan.quantized)
        in_float = {m.plan.name for m in moves if m.plan and m.to_float}
        token_wise = {m.plan.name for m in moves if m.plan} - in_float
        trial = Trial(len(token_wise), len(in_float), recipe.residual, score, in_int8 / total, fits)
        self.trials.append(trial)
        return trial

    def score(self, program: Program) -> float:
        if callable(self.metric):
            return self.measured(program)
        return self.simulation.compare([program], "trying a recipe")[0].sqnr

    def measured(self, program: Program) -> float:
        """The user's metric of the float model or of a trial."""
        assert callable(self.metric)
        score = self.metric(self.simulation.as_model(program))
        if not isinstance(score, int | float | torch.Tensor) or not math.isfinite(score):
            raise RecipeError(f"the metric gave {score!r}", fix="return a finite number, higher for better")
        return float(score)

    def recipe(self, moves: Sequence[_Move]) -> Recipe:
        """The recipe with these moves as rules."""
        in_float = [m.plan for m in moves if m.plan and m.to_float]
        gone = {plan.name for plan in in_float}
        recipe = self.simulation.recipe
        if any(m.plan is None for m in moves):
            recipe = recipe.replace(residual="float")
        recipe = _token_wise(recipe, [m.plan.name for m in moves if m.plan and m.plan.name not in gone])
        attentions = [plan.name for plan in in_float if plan.role is Role.ATTENTION]
        others = [plan.name for plan in in_float if plan.role is not Role.ATTENTION]
        why = "a search for the accuracy budget left it in float"
        if attentions:
            rule = QRule.leave_float(_any_of(attentions), why, roles=[Role.ATTENTION])
            recipe = recipe.with_rules(rule)
        if others:
            recipe = recipe.with_rules(QRule.leave_float(_any_of(others), why))
        return recipe if not moves else recipe.replace(name=f"{self.simulation.recipe.name}, searched")


def _can_be_token_wise(plan: LayerPlan) -> bool:
    schemes = (plan.input, plan.output)
    return plan.weight is not None and any(scheme is not None and scheme.calibrated for scheme in schemes)


def _token_wise(recipe: Recipe, names: Sequence[str]) -> Recipe:
    rule = QRule(_any_of(names), ROTATED_WEIGHT, ROTATED_TOKEN)
    return recipe.with_rules(rule) if names else recipe


def _any_of(names: Iterable[str]) -> str:
    """A pattern that matches these names and no other."""
    return f"({'|'.join(sorted(map(re.escape, names)))})$"
