"""Between a model's own signature and the flat inputs and outputs of a Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError
from .program import Program, fake_value, size
from .torch_private import pytree


@dataclass(frozen=True)
class InputSpec:
    """One flat input: its name, and either its dtype and dimensions (a name where dynamic) or its constant value."""

    name: str
    dtype: str | None = None
    dims: tuple[int | str, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class CallingConvention:
    """How to call a Program as its model was called.

    Args:
        in_spec, out_spec: pytree specs of `(args, kwargs)` and of the output.
        parameter_names: the model's argument names, in order.
        inputs: the flat inputs, in order.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameter_names: tuple[str, ...]
    inputs: tuple[InputSpec, ...]

    @classmethod
    def of(cls, program: Program) -> CallingConvention:
        """The convention a Program was captured with."""
        if program.in_spec is None or program.out_spec is None:
            raise CaptureError("a graph captured by Dynamo has no calling convention of its own")
        nodes = program.graph.find_nodes(op="placeholder")
        examples = program.example_inputs or (None,) * len(nodes)
        specs = [_input_spec(node.name, fake_value(node), value) for node, value in zip(nodes, examples, strict=True)]
        return cls(program.in_spec, program.out_spec, program.parameter_names, tuple(specs))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call.

        Raises:
            CaptureError: the call differs in structure, in a dimension that was captured as fixed, or in a value that
                is no tensor.
        """
        flat, spec = pytree.tree_flatten(self._as_captured(args, kwargs))
        if spec != self.in_spec:
            raise CaptureError(
                f"the inputs are structured {spec}, the captured ones {self.in_spec}", fix="quantize with such inputs"
            )
        for expected, value in zip(self.inputs, flat, strict=True):
            _check(expected, value)
        return flat

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The model's own output from the flat ones."""
        return pytree.tree_unflatten(outputs, self.out_spec)

    def _as_captured(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, keyword = self.in_spec.children()
        keys: list[str] = list(keyword.context or [])
        if not self.parameter_names:  # an ExportedProgram came without names, and `*args` have none
            _refuse_extra(set(kwargs) - set(keys))
            return tuple(args), {k: kwargs[k] for k in keys if k in kwargs}
        names = self.parameter_names[: positional.num_children]
        by_position = dict(zip(self.parameter_names, args, strict=False))
        if len(args) > len(by_position) or set(by_position) & set(kwargs):
            raise CaptureError(f"the arguments do not fit {', '.join(self.parameter_names)}")
        given = {**by_position, **kwargs}
        given = {k: v for k, v in given.items() if v is not None or k in (*names, *keys)}
        if missing := [n for n in (*names, *keys) if n not in given]:
            raise CaptureError(f"argument {missing[0]} is missing", fix=f"give {', '.join((*names, *keys))}")
        _refuse_extra(set(given) - {*names, *keys})
        return tuple(given[n] for n in names), {k: given[k] for k in keys}


def _refuse_extra(names: set[str]) -> None:
    if names:
        raise CaptureError(
            f"argument {min(names)} was not given when the model was captured",
            fix="put it into example_inputs or example_kwargs of quantize()",
        )


def _input_spec(name: str, fake: Any, value: Any) -> InputSpec:
    if isinstance(fake, Tensor):
        return InputSpec(name, str(fake.dtype).removeprefix("torch."), tuple(map(size, fake.shape)))
    return InputSpec(name, value=value)


def _check(expected: InputSpec, value: Any) -> None:
    if expected.dtype is None:
        if isinstance(value, Tensor) or value != expected.value:
            what = f"was {expected.value!r} when the model was captured"
            raise CaptureError(what, where=expected.name, fix="quantize with this value")
        return
    if not isinstance(value, Tensor):
        raise CaptureError(f"expected a tensor, got {type(value).__name__}", where=expected.name)
    fits = value.dim() == len(expected.dims) and all(
        isinstance(want, str) or want == have for want, have in zip(expected.dims, value.shape, strict=True)
    )
    if not fits or str(value.dtype) != f"torch.{expected.dtype}":
        raise CaptureError(
            f"expected {expected.dtype} [{', '.join(map(str, expected.dims))}],"
            f" got {str(value.dtype).removeprefix('torch.')} {list(value.shape)}",
            where=expected.name,
            fix="a dimension written as a number was fixed at capture; quantize with other dynamic_shapes or inputs",
        )


@dataclass(frozen=True)
class GraphInputs:
    """How to call the Program of a graph that Dynamo captured: by the names of what its inputs came from.

    Args:
        names: dotted name of each flat input.
        fakes: their fake values.
        held: values of inputs that the model itself holds (buffers), None for those a caller gives.
    """

    names: tuple[str, ...]
    fakes: tuple[Any, ...]
    held: tuple[Any, ...]

    @classmethod
    def of(cls, program: Program) -> GraphInputs:
        """The inputs of a Program that `capture_dynamo` made."""
        fakes = tuple(fake_value(node) for node in program.graph.find_nodes(op="placeholder"))
        examples = program.example_inputs or (None,) * len(fakes)
        held = tuple(x if kept else None for x, kept in zip(examples, program.held_inputs, strict=True))
        return cls(program.input_names, fakes, held)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs of a call. Sizes are read off the tensors.

        Raises:
            CaptureError: positional arguments, which have no names here; an input that the call does not give; a
                tensor of another dtype, or of sizes that the graph was not compiled for.
        """
        if args:
            raise CaptureError("positional arguments cannot be told apart here", fix="give dicts of keyword arguments")
        flat: list[Any] = []
        sizes: dict[str, int] = {}
        for name, fake, held in zip(self.names, self.fakes, self.held, strict=True):
            value = kwargs.get(name, held)
            if isinstance(fake, Tensor):
                if not isinstance(value, Tensor):
                    raise CaptureError(
                        "no batch gives this input of the graph; after a graph break it is computed by the part before",
                        where=name,
                        fix='name it in the batches, give "observe": 32 in place of calibration, which looks at what'
                        " the graph is called with, or remove the break (fullgraph=True shows where it is)",
                    )
                if value.dtype != fake.dtype or value.dim() != fake.dim():
                    wanted = f"{fake.dtype} of {fake.dim()} dimensions"
                    raise CaptureError(f"expected {wanted}, got {value.dtype} of {value.dim()}", where=name)
                fixed = [
                    (have, want) for have, want in zip(value.shape, fake.shape, strict=True) if isinstance(want, int)
                ]
                if any(have != want for have, want in fixed):
                    raise CaptureError(
                        f"is {list(value.shape)}, and this graph was compiled for {list(fake.shape)} only",
                        where=name,
                        fix="torch.compile(..., dynamic=True), or give the statistics of quantize(model, ...)",
                    )
                sizes.update(zip(map(str, fake.shape), value.shape, strict=True))
            flat.append(value)
        return [
            sizes.get(str(fake), value) if isinstance(fake, torch.SymInt) else value
            for fake, value in zip(self.fakes, flat, strict=True)
        ]

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The graph's own outputs."""
        return tuple(outputs)


def convention_of(program: Program) -> CallingConvention | GraphInputs:
    """How to call a Program: as its model, or, where Dynamo captured it, by its inputs' names."""
    return GraphInputs.of(program) if program.in_spec is None else CallingConvention.of(program)
