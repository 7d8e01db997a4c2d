"""Quantized weights at stage QDQ, as the passes that choose their codes see them.

    linear(x, dequantize(quantize(weight)))

The scales are constants to them: a method moves codes between the values of a grid, and leaves `chosen_weight` in the
quantize's place, so that nothing behind it chooses again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import WeightError
from .formats import FORMATS, Format, pack, unpack
from .kernels import chosen_weight, dequantize_weight, reference_of
from .numerics import rotate, scales_and_zeros
from .program import LayerPlan, Program
from .rewrite import Builder, arguments, constant_of, content_of, evaluate_constant, view_key

aten = torch.ops.aten


@dataclass(frozen=True)
class Grid:
    """The values that each element of a weight may take: those of a format, by the scale of its group.

    Args:
        format: of the codes.
        scale: `[N, G]` float32, G groups of input features.
        group: input features in a group, the last with what is left; 0 for all.
        rotated: its elements are those of `rotate(weight)`.
        zero: `[N, G]` float32 integers, which stand for zero, of an asymmetric format.
    """

    format: Format
    scale: Tensor
    group: int
    rotated: bool
    zero: Tensor | None = None

    def scale_of(self, columns: Tensor) -> Tensor:
        """Scales of some input features (int64 `[k]`): `[N, k]`."""
        return self.scale[:, self._groups(columns)]

    def places(self, w: Tensor, columns: Tensor | None = None) -> Tensor:
        """Where elements lie among the format's values: of `w [N, k]`, elements of some input features, or of all."""
        columns = torch.arange(w.shape[1], device=w.device) if columns is None else columns
        places = w / self.scale_of(columns)
        return places if self.zero is None else places + self.zero[:, self._groups(columns)]

    def at(self, places: Tensor, columns: Tensor | None = None) -> Tensor:
        """The inverse of `places`."""
        columns = torch.arange(places.shape[1], device=places.device) if columns is None else columns
        if self.zero is not None:
            places = places - self.zero[:, self._groups(columns)]
        return places * self.scale_of(columns)

    def nearest(self, w: Tensor, columns: Tensor) -> Tensor:
        """The nearest values to `w [N, k]`, which are the elements of some input features."""
        return self.at(self.format.decode(self.format.encode(self.places(w, columns))).to(w.dtype), columns)

    def codes(self, w: Tensor) -> Tensor:
        """Codes of the values nearest to `w [N, K]`: uint8 of that shape."""
        return self.format.encode(self.places(w))

    def values(self, codes: Tensor) -> Tensor:
        """What `codes [N, K]` stand for, in float32."""
        return self.at(self.format.decode(codes))

    def _groups(self, columns: Tensor) -> Tensor:
        return columns // self.group if self.group else torch.zeros_like(columns)


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight, and all linears that read it.

    Args:
        plan: of its layer.
        linears: in the graph's order.
        dequantize, quantize: the pair between the linears and the float weight.
        weight: its float value, a constant or computed from constants.
    """

    plan: LayerPlan
    linears: tuple[fx.Node, ...]
    dequantize: fx.Node
    quantize: fx.Node
    weight: fx.Node

    @property
    def name(self) -> str:
        """Dotted name of the layer."""
        return self.plan.name

    def floats(self, program: Program) -> Tensor:
        """The weight in the coordinates of its grid, rotated where that is: `[N, K]` float32.

        Raises:
            WeightError: it holds NaN or Inf.
        """
        value = evaluate_constant(program.gm, self.weight).detach().float()
        if not torch.isfinite(value).all():
            fix = "repair the checkpoint, or leave it in float"
            raise WeightError("the weight holds NaN or Inf", where=self.constant(program), fix=fix)
        return rotate(value) if self.rotated else value

    def stored(self, program: Program) -> tuple[Tensor, Tensor]:
        """What the quantize makes of it now: integers or packed codes, and scales."""
        operand = self.weight
        args = [evaluate_constant(program.gm, a) if isinstance(a, fx.Node) else a for a in self.quantize.args[1:]]
        return reference_of(self.quantize.target)(evaluate_constant(program.gm, operand), *args)  # type: ignore[misc]

    def grid(self, program: Program) -> tuple[Grid, Tensor]:
        """Its grid, and the codes on it now: uint8 `[N, K]`."""
        stored, scale = self.stored(program)
        if not self.packed:
            return Grid(FORMATS["int8"], scale.float(), 0, self.rotated), stored.view(torch.uint8)
        format, group, features = self.dequantize.args[2:5]
        fmt = FORMATS[format]  # type: ignore[index]
        scale, zero = scales_and_zeros(scale.float(), fmt.name)
        return Grid(fmt, scale, group, self.rotated, zero), unpack(stored, fmt.bits, features)  # type: ignore[arg-type]

    @property
    def packed(self) -> bool:
        """Whether codes are packed, as `quantize_weight` does, or int8, as `quantize_per_channel` does."""
        return self.dequantize.target is dequantize_weight

    @property
    def rotated(self) -> bool:
        """Whether the grid is one of the rotated weight."""
        return bool(arguments(self.dequantize)[6 if self.packed else 3])

    def constant(self, program: Program) -> str:
        """Target of the constant that the weight is, or is computed from."""
        source = constant_of(program.gm, self.weight)
        assert source is not None  # annotate planned constants only
        return str(source.target)

    def key(self, program: Program) -> tuple[Any, ...]:
        """What its integers follow from beside the constant's content, hashable; equal in other graphs of the model."""
        how = (
            content_of(evaluate_constant(program.gm, a)) if isinstance(a, fx.Node) else a
            for a in self.quantize.args[1:]
        )
        return (*view_key(program.gm, self.weight), str(self.quantize.target), *how)

    def pack(self, codes: Tensor) -> Tensor:
        """`codes [N, K]` uint8 as they are stored."""
        if not self.packed:
            return codes.view(torch.int8)
        return pack(codes, FORMATS[str(self.dequantize.args[2])].bits).contiguous()

    def choose(self, program: Program, q: Tensor, scale: Tensor) -> None:
        """Put codes and scales, both as they are stored, in place of what the quantize chooses."""
        build = Builder(program, self.quantize)
        parts = [build.constant(*pair) for pair in zip(self._targets(program), (q, scale), strict=True)]
        chosen = build.call(chosen_weight, self.weight, *parts, self.packed, self.rotated)
        self.quantize.replace_all_uses_with(chosen)
        program.graph.erase_node(self.quantize)

    def _targets(self, program: Program) -> tuple[str, str]:
        """Of the chosen codes and scales: those of an earlier choice, or new ones."""
        if self.quantize.target is chosen_weight:
            return str(self.quantize.args[1].target), str(self.quantize.args[2].target)  # type: ignore[union-attr]
        name = f"{self.constant(program)}_chosen"
        taken = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        index = next(i for i in itertools.count() if f"{name}{i}_q" not in taken)
        return f"{name}{index}_q", f"{name}{index}_scale"


def quantized_weights(program: Program, wanted: Callable[[LayerPlan], bool]) -> Iterator[QuantizedWeight]:
    """Quantized weights of the linears whose plan is `wanted`, in the graph's order."""
    by_quantize: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        plan = program.plan.get(node.meta.get("layer", ""))
        if plan is not None and plan.weight is not None and wanted(plan):
            by_quantize.setdefault(node.args[1].args[0].args[0], []).append(node)
    for quantize, linears in by_quantize.items():
        values, weight = linears[0].args[1], quantize.args[0]
        assert isinstance(values, fx.Node) and isinstance(weight, fx.Node)
        yield QuantizedWeight(program.plan[linears[0].meta["layer"]], tuple(linears), values, quantize, weight)
