"""Where static scales saturate: values outside the range that calibration saw, on the inputs at hand.

Token-wise scales follow each row, so nothing of them can lie outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..calibration import run_batches
from ..calling import CallingConvention
from ..kernels import (
    gelu_quantize_static,
    int8_attention,
    int8_linear,
    int8_linear_gelu_quantize,
    int8_linear_quantize,
    quantize_static,
    quantize_static_fp8,
    reference_of,
    silu_mul_quantize_static,
)
from ..kernels.quantized_softmax_attention import softmax_numerators
from ..lowering.eager import ReferenceInterpreter
from ..mutation import state_kept
from ..program import Program
from ..rewrite import layer_name

# What is not worth a note: the share that a percentile cuts off on purpose, and the little by which the largest values
# of calibration, which saw floats, grow through the integers before them.
NEGLIGIBLE_SHARE, NEGLIGIBLE_EXCESS = 1e-3, 1.5


@dataclass(frozen=True)
class Saturation:
    """What one operation wrote outside its static range.

    Args:
        layer: dotted name.
        op: that writes the integers; an attention's softmax where probabilities have a calibrated scale.
        share: of the elements, 0 to 1.
        excess: largest magnitude, in units of the range; at most 1 where nothing lies outside.
    """

    layer: str
    op: str
    share: float
    excess: float

    def __str__(self) -> str:
        what = f"{100 * self.share:.2f} % of what {self.op} writes lies outside its calibrated range"
        return f"{self.layer}: {what}, up to {self.excess:.1f} times"


def saturation(program: Program, convention: CallingConvention, batches: Any) -> list[Saturation]:
    """What saturates when a quantized graph runs on `batches`, most first; a row for each operation that does.

    Raises:
        CalibrationError: a batch does not fit the model.
    """
    counter = _Counter(program)
    run_batches(program, convention, batches, counter.run, "looking for saturation")
    return counter.rows()


def saturation_notes(program: Program) -> list[str]:
    """Sentences for the report about what saturates on the program's own example inputs."""
    if program.example_inputs is None:
        return []
    counter = _Counter(program)
    with state_kept(program):
        counter.run(*(x.clone() if isinstance(x, Tensor) else x for x in program.example_inputs))
    return [str(row) for row in counter.rows() if row.share > NEGLIGIBLE_SHARE and row.excess > NEGLIGIBLE_EXCESS]


def _reference(op: Any) -> Callable[..., Any]:
    found = reference_of(op)
    assert found is not None
    return found


def _name(op: Any) -> str:
    return _reference(op).__name__


def _linear_steps(*operands: Any) -> Tensor:
    return _reference(int8_linear)(*operands, torch.float32)


def _within_half_a_step_of_e4m3(steps: Tensor) -> Tensor:
    """What rounds to the largest E4M3, whose neighbour below is 32 away, as that one."""
    return torch.where(steps.abs() <= 464, steps.clamp(-448, 448), steps)


def _linear_gelu_steps(*arguments: Any) -> Tensor:
    *operands, dtype, approximate, out_scale = arguments
    y = torch.nn.functional.gelu(_reference(int8_linear)(*operands, dtype), approximate=approximate)
    return y.float() / out_scale


def _attention_steps(*args: Any) -> Tensor | None:
    *operands, out_dtype = args[:9]
    return _reference(int8_attention)(*operands, torch.float32, *args[9:]) if out_dtype is torch.int8 else None


# op -> what it would write before rounding, in steps; None where this call writes no static integers
_STEPS: dict[Any, Callable[..., Tensor | None]] = {
    quantize_static: lambda x, scale, unsigned=False: None if unsigned else x.float() / scale,
    quantize_static_fp8: lambda x, scale: _within_half_a_step_of_e4m3(x.float() / scale),
    int8_linear_quantize: _linear_steps,
    int8_linear_gelu_quantize: _linear_gelu_steps,
    gelu_quantize_static: lambda x, how, scale: torch.nn.functional.gelu(x, approximate=how).float() / scale,
    silu_mul_quantize_static: lambda gate, up, scale: (torch.nn.functional.silu(gate) * up).float() / scale,
    int8_attention: _attention_steps,
}


def _probability_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_scale: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    probability_scale: Tensor | None,
    *_: Any,
) -> Tensor | None:
    """What INT8 attention with a calibrated scale of its probabilities rounds to integers of at most 255, or 127."""
    if probability_scale is None:
        return None
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-2, -1)
    numerators = softmax_numerators((query.double() @ keys.double()).float() * score_scale, mask, is_causal)
    return numerators / numerators.sum(-1, keepdim=True).clamp(min=1.0) / probability_scale


class _Counter(ReferenceInterpreter):
    """Counts, for each node that writes static integers, the elements that round beyond them."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.program = program
        self.elements: dict[tuple[fx.Node, str], int] = {}
        self.outside: dict[tuple[fx.Node, str], int] = {}
        self.largest: dict[tuple[fx.Node, str], float] = {}

    def run(self, *inputs: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().run(*inputs, **options)

    def run_node(self, n: fx.Node) -> Any:
        if n.target in _STEPS:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            low, high = (-448, 448) if n.target is quantize_static_fp8 else (-128, 127)
            self._count(n, _name(n.target), _STEPS[n.target](*args, **kwargs), low, high)
            if n.target is int8_attention:
                most = 127 if any(args[9:]) else 255
                self._count(n, f"{_name(n.target)}'s softmax", _probability_steps(*args), 0, most)
        return super().run_node(n)

    def _count(self, node: fx.Node, what: str, steps: Tensor | None, low: int, high: int) -> None:
        if steps is None or not steps.numel():
            return
        key, rounded = (node, what), steps.round()
        outside = int(((rounded > high) | (rounded < low)).sum())
        self.elements[key] = self.elements.get(key, 0) + steps.numel()
        self.outside[key] = self.outside.get(key, 0) + outside
        self.largest[key] = max(self.largest.get(key, 0.0), torch.nan_to_num(steps).abs().amax().item() / high)

    def rows(self) -> list[Saturation]:
        found = [
            Saturation(
                layer_name(self.program, node), what, count / self.elements[node, what], self.largest[node, what]
            )
            for (node, what), count in self.outside.items()
            if count
        ]
        return sorted(found, key=lambda row: row.share, reverse=True)
