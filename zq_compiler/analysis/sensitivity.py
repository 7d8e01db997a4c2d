"""Which layers a recipe hurts: each quantized alone, and what that does to the model's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..recipe import Role
from .simulation import Simulation


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer, and nothing else, costs.

    Args:
        layer: dotted name.
        kind: `linear`, `lm_head`, `embedding` or `attention`.
        role: what it does in its block.
        scheme: what it was quantized to, in words.
        sqnr: of the model's first output of floats, in dB; low where the layer is sensitive, `inf` where it does not
            reach that output.
        work: its share of the multiply-accumulates of all layers that the recipe quantizes.
    """

    layer: str
    kind: str
    role: Role
    scheme: str
    sqnr: float
    work: float

    def __str__(self) -> str:
        return f"{self.sqnr:6.1f} dB  {100 * self.work:5.2f} % of the work  {self.layer} ({self.role}): {self.scheme}"


def sensitivity(
    model: Any, batches: Any, recipe: Any = "hero-m3", *, calibration: Any = None
) -> list[LayerSensitivity]:
    """Layers by how much each alone disturbs the model's output, worst first.

    Runs the float model once and each layer's trial once on every batch; nothing of a batch is kept. Integers between
    float math stand for the kernels (see `simulation.py`).

    Args:
        model: a module in eval mode, or an ExportedProgram.
        batches: an iterable of batches, each a tensor, a tuple of positional or a dict of keyword arguments. A few are
            enough.
        recipe: what to quantize each layer to.
        calibration: data for static scales, as for `quantize`; by default the same batches.

    Raises:
        CalibrationError, CaptureError, RecipeError: as `quantize` raises them.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)).eval()
    >>> [row.layer for row in sorted(sensitivity(model, [torch.randn(8, 32)], "w8a8"), key=lambda row: row.layer)]
    ['0', '1']
    """
    simulation = Simulation(model, batches, recipe, calibration)
    layers = simulation.layers
    noises = simulation.compare([simulation.trial(only={plan.name}) for plan in layers], "quantizing layer by layer")
    work = simulation.work()
    total = sum(work[plan.name] for plan in layers) or 1
    rows = [
        LayerSensitivity(plan.name, plan.kind, plan.role, plan.describe_schemes(), noise.sqnr, work[plan.name] / total)
        for plan, noise in zip(layers, noises, strict=True)
    ]
    return sorted(rows, key=lambda row: row.sqnr)
