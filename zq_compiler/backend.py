"""The torch.compile backend `zeroquant`, found by entry point."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from .analysis.report import Report, make_report, require_all
from .analysis.saturation import saturation_notes
from .capture import DynamoBinding, capture_dynamo, holds_layers, refuse_training, version_of
from .errors import ZQError
from .lowering import eager, inductor
from .options import Options, require_calibration
from .passes import default_pipeline
from .program import constants
from .torch_private import inductor_compile

MAX_REPORTS = 1000
_reports: deque[Report] = deque(maxlen=MAX_REPORTS)
_quantized: MutableMapping[Tensor, dict[Any, Any]] = WeakIdKeyDictionary()  # parameter -> its integer forms
_read_as_float: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # parameters some graph still reads
_warned_of_grad = False


def zeroquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Quantize a graph that Dynamo captured and compile it with Inductor.

    Args:
        options: `recipe`, `calibration`, `strict`, `check`, `dump`; see `options.Options`. Batches are dicts: they
            reach a graph's inputs by name.
        mode: accepted by torch.compile for other backends; has no meaning here.

    Raises:
        ZQError: a bad option, calibration data that is missing or does not reach this graph, an input that needs
            grad, active dropout, a weight with NaN. torch.compile shows it as the cause of a BackendCompilerFailed.
    """
    chosen = Options.parse(options)
    require_calibration(chosen, "this model")
    if mode is not None:
        raise ZQError(f"mode={mode!r} has no meaning for this backend", fix="use options={...}")
    program, binding = capture_dynamo(gm, example_inputs, chosen.recipe)
    if holds_layers(program):
        refuse_training(program, binding.needing_grad)
    parameters = {binding.names[index]: reference() for index, reference, _, _ in binding.weights}
    program.weight_cache = lambda target: _entries(parameters[target])
    program.calibration = chosen.calibration
    default_pipeline().run(program, check=chosen.check, dump=chosen.dump)
    if chosen.check:
        program.notes += saturation_notes(program)
    if chosen.strict:
        require_all(program)
    if not any(plan.quantized or plan.dtype for plan in program.plan.values()):
        _reports.append(make_report(program))
        _note_float_use(parameters, parameters)
        return inductor_compile(gm, example_inputs)

    _note_float_use(parameters, dict(constants(program.gm)))
    _warn_of_grad(parameters)
    if chosen.lowering == "eager":
        _reports.append(make_report(program))
        return _bound(eager.lower(program), binding)
    lowered = inductor.lower(program)
    _reports.append(make_report(program, lowered.providers))
    with torch.no_grad():
        compiled = inductor_compile(lowered.gm, [example_inputs[i] for i in binding.kept])
    return _bound(compiled, binding)


def _bound(compiled: Callable[..., Any], binding: DynamoBinding) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*binding.inputs(args))

    return run


def _entries(parameter: Tensor | None) -> dict[Any, Any]:
    """The integer forms of a parameter at its present version."""
    if parameter is None:
        return {}
    version, forms = _quantized.get(parameter, {}).get("current", (None, None))
    if forms is None or version != version_of(parameter):
        forms = {}
        _quantized[parameter] = {"current": (version_of(parameter), forms)}
    return forms


def _note_float_use(parameters: Mapping[str, Tensor | None], still_read: Mapping[str, Any]) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and name in still_read:
            _read_as_float[parameter] = True


def _warn_of_grad(parameters: Mapping[str, Tensor | None]) -> None:
    global _warned_of_grad
    trains = any(p is not None and p.requires_grad for p in parameters.values())
    if trains and torch.is_grad_enabled() and not _warned_of_grad:
        _warned_of_grad = True
        warnings.warn(
            "zeroquant compiles for inference: outputs carry no grad. Call the model under torch.no_grad() to say so.",
            stacklevel=2,
        )


def compile_reports() -> list[Report]:
    """Reports of the graphs compiled in this process by the backend, newest last."""
    return list(_reports)


def release(model: torch.nn.Module) -> int:
    """Free the float weights of a compiled model that only integer kernels read any more; returns the bytes freed.

    The model's shapes and dtypes stay, its quantized weights' values are gone: it can run what is compiled and be
    compiled for new shapes, but not be saved, moved, or compiled with another recipe.

    Raises:
        ZQError: the model was not compiled with backend="zeroquant" yet.
    """
    weights = [p for p in model.parameters() if p in _quantized]
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
