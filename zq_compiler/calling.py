"""Between a model's own signature and the flat inputs and outputs of a Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
