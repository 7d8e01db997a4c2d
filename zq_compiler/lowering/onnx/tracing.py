"""One trace of a graph in a dialect's terms, in the form in which torch's exporter takes programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from ...mutation import Mutations
from ...program import constants, fake_value, size
from ...torch_private import (
    FakeTensorMode,
    backed_size_oblivious,
    concrete,
    decomposing,
    functionalized,
    make_fx,
    new_symbol,
    symbolic_fake_mode,
)
from .dialect import Dialect, operator
from .naming import NAMED


class SpelledOut(ExportedProgram):
    """A graph for torch's exporter, with the dialect's forms in place of the ops that they stand for.

    The exporter has an ExportedProgram traced again, to decompose what it cannot translate. This one is traced then and
    never before: one trace, rather than one for the forms and a second one, twice as long, of what came out.

    Args:
        gm: the graph, its constants laid out.
        dialect: the forms.
        names: node -> name that its value is to have in the file.
    """

    def __init__(self, gm: fx.GraphModule, dialect: Dialect, names: Mapping[str, str]) -> None:
        self._spelled = gm, dialect, names

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, **_: Any
    ) -> ExportedProgram:
        """The trace, with these operators decomposed."""
        gm, dialect, names = self._spelled
        held = {name: constant.detach() for name, constant in constants(gm)}
        mode = symbolic_fake_mode()
        mode.allow_non_fake_inputs = True
        with backed_size_oblivious():
            inputs = _fake_inputs(gm.graph, dialect.dtype, mode)
            fakes = [mode.from_tensor(constant, static_shapes=True) for constant in held.values()]

            def run(*values: Any) -> Any:
                given = dict(zip(held, values[len(inputs) :], strict=True))
                return _FormInterpreter(gm, dialect, names, given).run(*values[: len(inputs)])

            functional = functionalized(run) if Mutations(gm.graph).any else run  # ONNX changes nothing in place
            with decomposing(decomp_table or {}) as functions, mode, torch.no_grad():
                traced = make_fx(functional, functions, "real")(*inputs, *fakes)
        return _as_program(traced, len(inputs), held, mode)


class _FormInterpreter(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, dialect: Dialect, names: Mapping[str, str], constants: Mapping[str, Tensor]
    ) -> None:
        super().__init__(gm)
        self.dialect, self.names, self.constants = dialect, names, constants

    def run_node(self, n: fx.Node) -> Any:
        self.dialect.node = n
        result = super().run_node(n)
        if n.name not in self.names:
            return result
        return operator(NAMED, (result,), result.dtype, result.shape, {"name": self.names[n.name]})

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.constants[target] if target in self.constants else super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(self.dialect.form_of(target) or target, args, kwargs)


def _fake_inputs(graph: fx.Graph, dtype: torch.dtype, mode: FakeTensorMode) -> list[Tensor]:
    """Floats of the file's dtype; sizes that the graph calls by one name are one symbol."""
    symbols: dict[str, Any] = {}
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        fake = fake_value(node)
        for dim in fake.shape:
            if isinstance(size(dim), str) and str(dim) not in symbols:
                symbols[str(dim)] = new_symbol(mode, concrete(dim))
        dims = [symbols.get(str(dim), dim) for dim in fake.shape]
        with mode:
            inputs.append(torch.empty(dims, dtype=dtype if fake.is_floating_point() else fake.dtype))
    return inputs


def _as_program(
    traced: fx.GraphModule, inputs: int, held: Mapping[str, Tensor], mode: FakeTensorMode
) -> ExportedProgram:
    """A trace whose first placeholders are inputs, and whose others are constants."""
    graph = traced.graph
    placeholders = graph.find_nodes(op="placeholder")
    sizes: dict[str, fx.Node] = {}
    for node in list(graph.nodes):  # equal sizes are computed once
        if isinstance(fake_value(node), torch.SymInt):
            first = sizes.setdefault(str(fake_value(node)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
    kinds = [(InputKind.USER_INPUT, None)] * inputs + [(InputKind.BUFFER, name) for name in held]
    lifted: dict[str, Any] = {}
    for node in graph.find_nodes(op="get_attr"):  # tensors that forms make of numbers
        with graph.inserting_before(placeholders[0]):
            constant = graph.placeholder(f"{node.name}_lifted")
        lifted[constant.name] = getattr(traced, str(node.target))
        constant.meta["val"] = mode.from_tensor(lifted[constant.name], static_shapes=True)
        node.replace_all_uses_with(constant)
        graph.erase_node(node)
        kinds.insert(len(lifted) - 1, (InputKind.CONSTANT_TENSOR, constant.name))
    outputs: Any = graph.output_node().args[0]
    signature = ExportGraphSignature(
        [
            InputSpec(kind, TensorArgument(node.name), target, True if kind is InputKind.BUFFER else None)
            for (kind, target), node in zip(kinds, graph.find_nodes(op="placeholder"), strict=True)
        ],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(y.name), None) for y in outputs],
    )
    return ExportedProgram(traced, graph, signature, dict(held), {}, [ModuleCallEntry("")], constants=lifted)
