"""A Program's graph in a dialect's terms, as torch's exporter writes it."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnxscript import ir
from onnxscript import opset18 as op
from onnxscript.optimizer import optimize_ir
from torch import Tensor, fx

from ...errors import ExportError
from ...program import Program, copy_graph, fake_value, size
from ...torch_private import backed_size_oblivious, concrete
from ...traffic import model_dtype
from .dialect import Dialect, operator, share_tied_constants
from .float_dtype import cast_floats
from .naming import NAMED, boundary_names, take_names


class SpelledOut(torch.nn.Module):
    """A graph that runs, under the exporter, with the dialect's forms in place of the ops that they stand for.

    Args:
        gm: the graph, its constants laid out.
        dialect: the forms.
        names: node -> name that its value is to have in the file.
    """

    def __init__(self, gm: fx.GraphModule, dialect: Dialect, names: Mapping[str, str]) -> None:
        super().__init__()
        for name, child in gm.named_children():
            self.add_module(name, child)
        for name, value in (*gm.named_parameters(recurse=False), *gm.named_buffers(recurse=False)):
            self.register_buffer(name, value)
        self.graph = gm.graph
        self.dialect = dialect
        self.names = names

    def forward(self, *inputs: Any) -> Any:
        return _FormInterpreter(self).run(*inputs)


class _FormInterpreter(fx.Interpreter):
    def __init__(self, module: SpelledOut) -> None:
        super().__init__(module, graph=module.graph)
        self.dialect, self.names = module.dialect, module.names

    def run_node(self, n: fx.Node) -> Any:
        self.dialect.node = n
        result = super().run_node(n)
        if n.name not in self.names:
            return result
        return operator(NAMED, (result,), result.dtype, result.shape, {"name": self.names[n.name]})

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(self.dialect.form_of(target) or target, args, kwargs)


def prepared(program: Program, dialect: Dialect) -> fx.GraphModule:
    """A copy of the graph that is ready to be traced.

    Only tensors go in and come out, floats have the dialect's dtype, constants are laid out, tied ones under one name.
    """
    gm = copy_graph(program.gm)
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and not isinstance(fake_value(node), Tensor) and not node.users:
            gm.graph.erase_node(node)  # a Python value that the graph was captured with
        if node.op == "output":
            node.args = (tuple(y for y in node.args[0] if isinstance(y, fx.Node)),)
    share_tied_constants(gm)
    if dialect.dtype != model_dtype(program):
        cast_floats(gm, dialect.dtype)
    dialect.prepare(gm)
    return gm


def convert(program: Program, gm: fx.GraphModule, dialect: Dialect, opset: int) -> ir.Model:
    """The graph that `prepared` made as an ONNX model.

    Raises:
        ExportError: an operation has no ONNX form.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    with backed_size_oblivious(), torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(
                SpelledOut(gm, dialect, boundary_names(program)),
                tuple(_in_dtype(x, dialect.dtype) for x in _example_inputs(program, placeholders)),
                dynamic_shapes=(tuple(_dynamic_dims(fake_value(node)) for node in placeholders),),
                strict=False,
            )
            result = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                custom_translation_table=_translations(n.target for n in gm.graph.nodes),
            )
            assert result is not None
            take_names(result.model)
            # A transposed constant stays an operation on it: folded, a table tied to a linear would be stored twice.
            optimize_ir(result.model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        except ExportError:
            raise
        except Exception as error:
            raise _explained(error, program) from error
    return result.model


def _translations(targets: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Operators for torch's exporter to use where it knows none, among those that a graph holds."""
    return {target: _grouped_mm for target in targets if str(target) in _GROUPED_MM}


_GROUPED_MM = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}


def _grouped_mm(x: Any, weight: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Each expert's rows of `x [M, K]` times its matrix of `weight [E, K, N]`; those of expert e end at `ends[e]`."""
    if bias is not None or out_dtype is not None:
        raise ExportError("a grouped product with bias or another dtype has no ONNX form")
    first, one, results = op.Constant(value_int=0), op.Constant(value_int=1), []
    for expert in range(weight.shape[0]):
        index = op.Constant(value_int=expert)
        last = op.Cast(op.Gather(ends, index), to=onnx.TensorProto.INT64)
        rows = op.Gather(x, op.Range(first, last, one))
        results.append(op.MatMul(rows, op.Gather(weight, index)))
        first = last
    return op.Concat(*results, axis=0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _example_inputs(program: Program, placeholders: Sequence[fx.Node]) -> tuple[Any, ...]:
    """The real inputs of these placeholders, or zeros of the sizes that the graph was traced with."""
    if program.example_inputs is not None:
        everything = program.graph.find_nodes(op="placeholder")
        given = dict(zip((n.target for n in everything), program.example_inputs, strict=True))
        return tuple(given[node.target] for node in placeholders)
    fakes = [fake_value(node) for node in placeholders]
    return tuple(
        torch.zeros([concrete(d) for d in f.shape], dtype=f.dtype) if isinstance(f, Tensor) else concrete(f)
        for f in fakes
    )


def _in_dtype(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _dynamic_dims(fake: Any) -> dict[int, Any] | None:
    if not isinstance(fake, Tensor):
        return None
    return {i: torch.export.Dim.AUTO for i, dim in enumerate(fake.shape) if isinstance(size(dim), str)}


def _explained(error: Exception, program: Program) -> ExportError:
    """What torch's exporter could not do, and in which layer."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = str(chain[-1])
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", text):
        operation = f"{found[1]}.{found[2]}"
        node = next((n for n in program.graph.nodes if str(n.target) in (operation, found[1])), None)
        return ExportError(
            f"{operation} has no ONNX form",
            where=_layer(node) if node is not None else None,
            fix="write this part of the model with other operations, or run it through compile()",
        )
    return ExportError(f"torch's ONNX exporter failed: {type(chain[-1]).__name__}: {text.strip().splitlines()[0]}")


def _layer(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return node.meta.get("layer") or (stack[-1][0] if stack and stack[-1][0] else node.name)
