"""A Program's graph in a dialect's terms, as torch's exporter writes it."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import onnx
import torch
from onnx_ir.passes import common
from onnxscript import ir, rewriter
from onnxscript import opset18 as op
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import _DEFAULT_REWRITE_RULES
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, fx

from ...errors import ExportError
from ...program import Program, copy_graph, fake_value
from ...torch_private import concrete
from ...traffic import model_dtype
from .dialect import Dialect, share_tied_constants
from .float_dtype import cast_floats
from .naming import boundary_names, take_names
from .tracing import SpelledOut


def prepared(program: Program, dialect: Dialect) -> fx.GraphModule:
    """A copy of the graph that is ready to be traced.

    Only tensors go in and come out, floats have the dialect's dtype, constants are laid out, tied ones under one name.
    """
    gm = copy_graph(program.gm)
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and not isinstance(fake_value(node), Tensor):
            _make_literal(node)
        if node.op == "output":
            node.args = (tuple(y for y in node.args[0] if isinstance(y, fx.Node)),)
    share_tied_constants(gm)
    if dialect.dtype != model_dtype(program):
        cast_floats(gm, dialect.dtype)
    dialect.prepare(gm)
    return gm


def _make_literal(placeholder: fx.Node) -> None:
    """A Python value that the graph was captured with is that value."""
    value = concrete(fake_value(placeholder))
    for user in list(placeholder.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda x: value if x is placeholder else x)
    placeholder.graph.erase_node(placeholder)


def convert(program: Program, gm: fx.GraphModule, dialect: Dialect, opset: int) -> ir.Model:
    """The graph that `prepared` made as an ONNX model.

    Raises:
        ExportError: an operation has no ONNX form.
    """
    spelled = SpelledOut(gm, dialect, boundary_names(program))
    with torch.no_grad(), _quiet():
        try:
            result = torch.onnx.export(
                spelled,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=min(opset, _TRANSLATED_OPSET),
                custom_translation_table=_translations(n.target for n in gm.graph.nodes),
            )
            assert result is not None
            result.model.opset_imports[""] = opset  # what it adds to the operators of the older are types
            take_names(result.model)
            _optimize(result.model)
        except ExportError:
            raise
        except Exception as error:
            raise _explained(error, program) from error
    return result.model


_TRANSLATED_OPSET = 22  # the newest that torch's exporter is asked for

# Without the one for two neighbouring slices, which looks at all pairs of them anew for each node of a graph.
_RULES = [rule for rule in _DEFAULT_REWRITE_RULES if rule is not slice_split_rule]
_ROUNDS = 2


def _optimize(model: ir.Model) -> None:
    """What `onnxscript.optimizer.optimize_ir` does, in a time that grows with the graph and not with its square."""
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        # A transposed constant stays an operation on it: folded, a table tied to a linear would be stored twice.
        folded = fold_constants_ir(
            model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type == "Transpose" else None
        )
        rewritten = rewriter.RewritePass(_RULES)(model)
        unused = common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        if not (folded.modified or rewritten.modified or unused.modified):
            break
    for finish in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        finish(model)
    _separate_zero_points(model.graph)
    common.RemoveUnusedNodesPass()(model)


def _separate_zero_points(graph: ir.Graph) -> None:
    """Each weight gets its own: where two share one, ONNX Runtime fails under `session.x64quantprecision`."""
    for node in graph.all_nodes():
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        weight, _, zero = node.inputs
        if weight is None or zero is None or not weight.is_initializer():
            continue
        name = f"{weight.name}_zero_point"
        if name not in graph.initializers:
            own = ir.Value(name=name, type=zero.type, shape=zero.shape, const_value=zero.const_value)
            graph.register_initializer(own)
        node.replace_input_with(2, graph.initializers[name])


def _translations(targets: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Operators for torch's exporter to use where it knows none; those that the trace adds, and among the targets."""
    grouped = {target: _grouped_mm for target in targets if str(target) in _GROUPED_MM}
    return {torch.ops.aten.sym_numel.default: _size, **grouped}


_GROUPED_MM = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}


def _size(x: Any) -> Any:
    """How many elements a value has: by it `reshape` finds a length that is left open."""
    return op.Size(x)


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
