"""Calibration by the calls themselves: a graph that Dynamo captured runs its first calls in float, then in INT8.

Batches reach a graph by the names of its inputs, and behind a graph break inputs have none. What calls a graph brings
along everything it needs, so it can be calibrated wherever it lies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx

from .calibration import Collector, structure_key
from .capture import DynamoBinding
from .errors import CalibrationError, CaptureError
from .passes.calibrate import watched
from .program import Program, fake_value
from .statistics import Statistics
from .torch_private import LateGuards


class Observation:
    """What the graphs of one part of a model (for other sizes, for prefill and decode) see together.

    Args:
        key: `calibration.structure_key` of the part.
        calls: how many are looked at.

    Attributes:
        statistics: of the calls so far; those that raised an error left nothing.
        quantized: whether one of the graphs is.
        lock: held by a graph while it looks at a call, and while it is quantized.
    """

    def __init__(self, key: str, calls: int) -> None:
        self.calls = calls
        self.statistics = Statistics({}, key)
        self.quantized = False
        self.lock = threading.Lock()
        self._graphs: weakref.WeakSet[ObservedGraph] = weakref.WeakSet()

    @property
    def remaining(self) -> int:
        """How many calls are still to be looked at."""
        return self.calls - self.statistics.batches

    @property
    def pending(self) -> bool:
        """Whether a graph waits for further calls."""
        return self.remaining > 0 and len(self._graphs) > 0

    def join(self, graph: ObservedGraph) -> None:
        """Count `graph` among those that see."""
        self._graphs.add(graph)


def observation_of(program: Program, calls: int, caches: Iterable[MutableMapping[Any, Any]]) -> Observation | None:
    """The observation that a graph shares with the others of its part; None where it needs no static scale.

    Graphs share where structure, watched values, recipe and number of calls are the same. So two compiled forms of one
    model with other recipes or numbers do not disturb each other.

    Args:
        program: planned, and still float.
        calls: how many are looked at.
        caches: of the graph's weights, in which observations are kept: they live as long as those.
    """
    if not any(plan.calibrated for plan in program.plan.values()):
        return None
    caches, part = list(caches), structure_key(program)
    key = "observation", part, frozenset(watch.name for watch in watched(program)), program.recipe, calls
    observation = next((cache[key] for cache in caches if key in cache), None) or Observation(part, calls)
    for cache in caches:
        cache[key] = observation
    return observation


class ObservedGraph:
    """What Dynamo calls: the float graph at first, and what `quantize` makes of it from then on.

    Args:
        program: planned, and still float.
        binding: of Dynamo's arguments.
        observation: which counts the calls and takes in what they show.
        quantize: given the Program with its statistics, a function of its inputs.
    """

    def __init__(
        self,
        program: Program,
        binding: DynamoBinding,
        observation: Observation,
        quantize: Callable[[Program], Callable[..., Any]],
    ) -> None:
        self._program: Program | None = program  # until it is quantized
        self._binding, self._observation, self._quantize = binding, observation, quantize
        self._guards = LateGuards([fake_value(node) for node in program.graph.find_nodes(op="placeholder")])
        self._quantized: Callable[..., Any] | None = None
        self._failure: Exception | None = None
        observation.join(self)

    @property
    def note(self) -> str | None:
        """For the report until it is quantized; None where another graph serves the part, and it may never be."""
        calls = self._observation.remaining
        if not calls:
            return None if self._observation.quantized else "observed: the next call quantizes this graph"
        return f"observing: runs in float for {calls} more call{'s' if calls > 1 else ''}"

    def __call__(self, *args: Any) -> Any:
        """Run Dynamo's arguments.

        Raises:
            CalibrationError: a watched value holds NaN or Inf.
            WeightError: a weight changed since the graph was compiled.
            CaptureError: the sizes are not as the integer graph has them.
            ZQError: it cannot be quantized, or with `strict` not all of it; every call says so again.
        """
        inputs = self._binding.inputs(args)
        if self._quantized is None:
            with self._observation.lock:
                if self._program is not None and self._observation.remaining:
                    return self._observe(self._program, inputs)
                if self._quantized is None:
                    self._quantized = self._switch()
        if not self._guards.hold(inputs):
            raise CaptureError(
                "the sizes of the inputs differ in another way than when this graph was quantized",
                fix="torch.compile(..., dynamic=False), or give calibration in place of observe",
            )
        with torch.no_grad():
            return self._quantized(*inputs)

    def _observe(self, program: Program, inputs: list[Any]) -> tuple[Any, ...]:
        statistics = self._observation.statistics
        collector = Collector(program, watched(program), statistics.key, batches=False)  # a call that fails leaves none
        try:
            outputs = collector(*inputs)
        except CalibrationError as error:
            what = f"{error.what} in call {statistics.batches} of this part of the model, the first being 0"
            fix = "leave it out, or run the model in a wider dtype"
            raise CalibrationError(what, where=error.where, fix=fix) from error
        with torch.inference_mode(False):  # they outlive the caller's mode
            statistics.merge(collector.statistics)
        return outputs

    def _switch(self) -> Callable[..., Any]:
        program, self._program = self._program, None  # passes work in place: there is no second try
        if program is None:
            assert self._failure is not None
            raise self._failure
        program.calibration = self._observation.statistics
        try:
            quantized = self._quantize(program)
        except Exception as error:
            self._failure = error
            raise
        self._guards.close()
        self._observation.quantized = True
        return quantized


def is_symbolic(placeholder: fx.Node) -> bool:
    """Whether an input is, or has, a size that may differ between calls."""
    value = fake_value(placeholder)
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, torch.SymInt) for size in sizes)
