"""The torch.compile backend `zeroquant`, found by entry point."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from .analysis.report import Report, make_report, require_all
from .analysis.saturation import saturation_notes
from .capture import DynamoBinding, capture_dynamo, holds_layers, refuse_training, version_of
from .errors import ZQError
from .lowering import eager, inductor
from .observe import Observation, ObservedGraph, is_symbolic, observation_of
from .options import Options, require_calibration
from .passes import default_pipeline
from .passes.calibrate import Calibrate
from .program import Program, constants
from .torch_private import inductor_compile

MAX_REPORTS = 1000
_Weights = Mapping[str, weakref.ref[Tensor]]  # of a graph, by name
_reports: deque[_Entry] = deque(maxlen=MAX_REPORTS)
_derived: MutableMapping[Tensor, dict[Any, Any]] = WeakIdKeyDictionary()  # parameter -> what follows from its content
_held_otherwise: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # parameters some graph holds quantized or cast
_read_as_float: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # parameters some graph still reads
_warned_of_grad = False


@dataclass
class _Entry:
    """A place in the list of reports."""

    report: Report
    observed: weakref.ref[ObservedGraph] | None = None  # while it runs in float

    def now(self) -> Report | None:
        """None for a graph that is gone, or will be quantized only if it is called again."""
        if self.observed is None:
            return self.report
        graph = self.observed()
        note = graph.note if graph is not None else None
        return replace(self.report, notes=[*self.report.notes, note]) if note is not None else None


def zeroquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Quantize a graph that Dynamo captured and compile it with Inductor.

    Args:
        options: `recipe`, `calibration`, `observe`, `strict`, `check`, `dump`, `mode`; see `options.Options`. Batches
            are dicts: they reach a graph's inputs by name.
        mode: torch.compile's own, of Inductor.

    Raises:
        ZQError: a bad option, calibration data that is missing or does not reach this graph, an input that needs
            grad, active dropout, a weight with NaN. torch.compile shows it as the cause of a BackendCompilerFailed.
            With `observe`, what the switch to INT8 finds is raised by the call that makes it.
    """
    chosen = Options.parse({**(options or {}), **({"mode": mode} if mode is not None else {})})
    require_calibration(chosen, "this model")
    program, binding = capture_dynamo(gm, example_inputs, chosen.recipe)
    if holds_layers(program):
        refuse_training(program, binding.needing_grad)
    weights = {binding.names[index]: reference for index, reference, _, _ in binding.weights}
    program.weight_cache = lambda target: _entries(weights[target]()) if target in weights else {}
    program.calibration = chosen.calibration
    default_pipeline().run(program, until=Calibrate.name, check=chosen.check, dump=chosen.dump)
    if chosen.observe is not None:
        observation = observation_of(program, chosen.observe, map(program.weight_cache, weights))
        if observation is None:
            program.notes.append("nothing needed to be observed: no layer of this graph has a static scale")
        elif observation.remaining:
            return _observed(program, binding, weights, chosen, observation)
        else:
            program.calibration = observation.statistics
    _finish(program, chosen)
    if not any(plan.quantized or plan.dtype for plan in program.plan.values()):
        _reports.append(_Entry(make_report(program)))
        _note(_read_as_float, weights, weights)
        return inductor_compile(gm, example_inputs, chosen.mode)

    _note_use(program, weights)
    _warn_of_grad(weights)
    inputs = [example_inputs[i] for i in binding.kept]
    run, providers = _lower(program, chosen, lambda g: inductor_compile(g, inputs, chosen.mode))
    _reports.append(_Entry(make_report(program, providers)))
    return _bound(run, binding)


def _finish(program: Program, options: Options) -> None:
    default_pipeline().run(program, since=Calibrate.name, check=options.check, dump=options.dump)
    if options.check:
        program.notes += saturation_notes(program)
    if options.strict:
        require_all(program)


def _lower(
    program: Program, options: Options, compile_graph: Callable[[fx.GraphModule], Callable[..., Any]]
) -> tuple[Callable[..., Any], list[inductor.ProviderChoice]]:
    if options.lowering == "eager":
        return eager.lower(program), []
    lowered = inductor.lower(program)
    with torch.no_grad():
        return compile_graph(lowered.gm), lowered.providers


def _observed(
    program: Program, binding: DynamoBinding, weights: _Weights, options: Options, observation: Observation
) -> Callable[..., Any]:
    """A graph that runs in float until enough was seen.

    By then Dynamo has made its guards, so the integer graph goes through a torch.compile of its own, which guards what
    it assumes of sizes.
    """
    if not options.check:
        program.example_inputs = None  # tensors of the first call
    entry = _Entry(make_report(program))
    dynamic = any(map(is_symbolic, program.graph.find_nodes(op="placeholder")))

    def quantize(program: Program) -> Callable[..., Any]:
        _finish(program, options)
        _note_use(program, weights)
        compile_graph = functools.partial(torch.compile, fullgraph=True, dynamic=dynamic, mode=options.mode)
        run, providers = _lower(program, options, compile_graph)
        entry.report, entry.observed = make_report(program, providers), None
        return run

    _warn_of_grad(weights)
    graph = ObservedGraph(program, binding, observation, quantize)
    entry.observed = weakref.ref(graph)
    _reports.append(entry)
    return graph


def _bound(compiled: Callable[..., Any], binding: DynamoBinding) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*binding.inputs(args))

    return run


def _entries(parameter: Tensor | None) -> dict[Any, Any]:
    """What was derived from a parameter at its present version: integer forms, digests, observations."""
    if parameter is None:
        return {}
    version, derived = _derived.get(parameter, {}).get("current", (None, None))
    if derived is None or version != version_of(parameter):
        derived = {}
        _derived[parameter] = {"current": (version_of(parameter), derived)}
    return derived


def _note_use(program: Program, weights: _Weights) -> None:
    _note(_read_as_float, weights, dict(constants(program.gm)))
    held = {plan.constant for plan in program.plan.values() if plan.weight is not None or plan.dtype is not None}
    _note(_held_otherwise, weights, held)


def _note(use: MutableMapping[Tensor, bool], weights: _Weights, names: Container[str]) -> None:
    for name, reference in weights.items():
        parameter = reference()
        if parameter is not None and name in names:
            use[parameter] = True


def _warn_of_grad(weights: _Weights) -> None:
    global _warned_of_grad
    trains = any(p is not None and p.requires_grad for p in (reference() for reference in weights.values()))
    if trains and torch.is_grad_enabled() and not _warned_of_grad:
        _warned_of_grad = True
        warnings.warn(
            "zeroquant compiles for inference: outputs carry no grad. Call the model under torch.no_grad() to say so.",
            stacklevel=2,
        )


def compile_reports() -> list[Report]:
    """Reports of the graphs compiled in this process by the backend, newest last.

    With `observe`, a graph that is not quantized yet has its place too, and a note of what it waits for.
    """
    return [report for entry in _reports if (report := entry.now()) is not None]


def release(model: torch.nn.Module) -> int:
    """Free the float weights of a compiled model that only integer kernels read any more; returns the bytes freed.

    The model's shapes and dtypes stay, its quantized weights' values are gone: it can run what is compiled and be
    compiled for new shapes, but not be saved, moved, or compiled with another recipe.

    Raises:
        ZQError: the model was not compiled with backend="zeroquant" yet, or a graph of it still observes.
    """
    derived = [value for p in model.parameters() for value in _entries(p).values()]
    if waiting := [value.remaining for value in derived if isinstance(value, Observation) and value.pending]:
        raise ZQError(
            f"graphs of it still observe and run in float, for {max(waiting)} more calls",
            where=type(model).__name__,
            fix="release when no note of compile_reports() says so any more",
        )
    weights = [p for p in model.parameters() if p in _held_otherwise]
    if not weights:
        raise ZQError(
            "no weight of it has been quantized",
            where=type(model).__name__,
            fix="run the compiled model once, then release",
        )
    freed = 0
    for weight in weights:
        storage = weight.untyped_storage()
        if weight not in _read_as_float and storage.size() > 0:
            freed += storage.size()
            storage.resize_(0)
    return freed


__all__ = ["compile_reports", "release", "zeroquant"]
