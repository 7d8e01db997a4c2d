"""Three ways in, one Program out: a module, an ExportedProgram, or the graph Dynamo hands a backend.

All three give pre-dispatch ATen, in which linear, layer_norm, gelu and scaled_dot_product_attention stand whole.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .errors import CaptureError, WeightError
from .mutation import Mutations
from .program import Program, constant_bytes, copy_graph, get_constant, set_constant
from .recipe import Recipe
from .torch_private import (
    FakeTensorMode,
    OpOverload,
    TracingContext,
    backed_size_oblivious,
    concrete,
    make_fx,
    pytree,
)

aten = torch.ops.aten


# --- nn.Module and ExportedProgram ---------------------------------------------------------------------------------


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    recipe: Recipe,
    dynamic_shapes: Any = None,
) -> Program:
    """A Program from a model in eval mode and the arguments of one call, or from an ExportedProgram, which needs none.

    Raises:
        CaptureError: the model is in training mode or cannot be exported, or there are no arguments.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return capture_exported(model, recipe, (tuple(args), dict(kwargs)) if args or kwargs else None)
    name = type(model).__name__
    if model.training:
        raise CaptureError("the model is in training mode", where=name, fix="call model.eval() first")
    if not args and not kwargs:
        raise CaptureError("no example inputs were given", where=name, fix="give one call's arguments")
    return capture_module(model, args, kwargs, recipe, dynamic_shapes)


def capture_module(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    recipe: Recipe,
    dynamic_shapes: Any = None,
) -> Program:
    """Export `model` on example inputs.

    Args:
        dynamic_shapes: as `torch.export.export` takes it; None makes every dimension of every tensor input dynamic
            as far as the model itself allows.

    Raises:
        CaptureError: the model cannot be exported, dropout is active, or an input needs grad.
    """
    with _exportable(model):  # caches among the inputs are pytrees from here on
        # The same tensor given twice would be captured as one input, and calls with two would read the first for both.
        example = pytree.tree_map_only(Tensor, _another_object, (tuple(args), dict(kwargs or {})))
        with _explicit_keywords(model, example[1]):
            return _capture_module(model, example, recipe, dynamic_shapes)


def _capture_module(model: torch.nn.Module, example: Any, recipe: Recipe, dynamic_shapes: Any) -> Program:
    for path, leaf in pytree.tree_flatten_with_path(example)[0]:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise CaptureError("an example input requires grad", where=pytree.keystr(path), fix="detach it")
    choices = _dynamic_shapes(model, example) if dynamic_shapes is None else [dynamic_shapes]
    exported, failure = None, None
    with backed_size_oblivious(), torch.no_grad():
        for choice in choices:
            try:
                exported = torch.export.export(model, *example, dynamic_shapes=choice, strict=False)
                break
            except Exception as error:
                failure = failure or error
    if exported is None:
        raise CaptureError(
            f"torch.export failed: {type(failure).__name__}: {_first_lines(failure)}",
            where=type(model).__name__,
            fix='use torch.compile(model, backend="zeroquant"), which splits what cannot be captured whole',
        ) from failure
    program = capture_exported(exported, recipe, example, _parameter_names(model))
    if choice is not choices[0]:
        program.notes.append("dimensions of size 1 in the example inputs are fixed, because the model broadcasts them")
    refuse_training(program)
    return program


def capture_exported(
    exported: torch.export.ExportedProgram,
    recipe: Recipe,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    parameter_names: tuple[str, ...] = (),
) -> Program:
    """A Program from an ExportedProgram; weights are shared with it, not copied."""
    example = example or exported.example_inputs
    exported_module = exported.module(check_guards=False)
    assert isinstance(exported_module, fx.GraphModule)
    program = Program(
        copy_graph(exported_module),  # flat in, flat out; pytrees are the caller's business
        recipe,
        example_inputs=tuple(pytree.tree_leaves(example)) if example else None,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        parameter_names=parameter_names,
    )
    return _prepared(program)


def _another_object(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach()


def _dynamic_shapes(model: torch.nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """What to try: every dimension dynamic; then size 1 fixed, for broadcasting, but for the batch; then all size 1."""
    args, kwargs = example
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        what = f"the example inputs do not fit its forward: {error}"
        raise CaptureError(what, where=type(model).__name__) from None
    choices: list[Any] = []
    for may_change in (lambda dim, size: True, lambda dim, size: dim == 0 or size > 1, lambda dim, size: size > 1):
        shapes = torch.export.ShapesCollection()
        for leaf in pytree.tree_leaves(example):
            if isinstance(leaf, Tensor):
                shapes[leaf] = {d: torch.export.Dim.AUTO for d, n in enumerate(leaf.shape) if may_change(d, n)}
        choice = shapes.dynamic_shapes(model, args, kwargs)
        if choice not in choices:
            choices.append(choice)
    return choices


@contextlib.contextmanager
def _explicit_keywords(model: torch.nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """torch.export cannot make tensors in `**kwargs` dynamic; meanwhile, `forward` has a parameter for each."""
    original = model.forward
    signature = inspect.signature(original)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in kwargs if k not in signature.parameters]
    if not extra or len(plain) == len(signature.parameters):
        yield
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*plain, *extra])  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _parameter_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Empty where positional arguments have no names (`*args`)."""
    parameters = inspect.signature(model.forward).parameters
    return () if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()) else tuple(parameters)


def _first_lines(error: BaseException | None, count: int = 6) -> str:
    return "\n".join(str(error).strip().splitlines()[:count])


@contextlib.contextmanager
def _exportable(model: torch.nn.Module) -> Iterator[None]:
    """What transformers itself does around an export of its models: cache pytrees, export-safe forms of some code."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        yield
        return
    try:
        from transformers.exporters import exporter_dynamo
        from transformers.exporters.utils import apply_patches
    except ImportError as error:
        raise CaptureError(
            "this transformers has no exporters", where=type(model).__name__, fix="install transformers>=5.23"
        ) from error
    exporter_dynamo.register_cache_pytrees_for_model(model)
    with apply_patches("dynamo"), exporter_dynamo.reset_model_state(model):
        yield


# --- Dynamo --------------------------------------------------------------------------------------------------------


@dataclass
class DynamoBinding:
    """How the flat arguments of a Dynamo graph reach a Program, and what was taken for constant.

    Args:
        kept: positions of the arguments that stay inputs.
        weights: position, reference, version and address of each parameter taken for constant.
        scalars: position and value of each float attribute of a module taken for constant.
        names: dotted name of each position.
        needing_grad: names of inputs that require grad.
    """

    kept: list[int] = field(default_factory=list)
    weights: list[tuple[int, weakref.ref[Tensor], int | None, int]] = field(default_factory=list)
    scalars: list[tuple[int, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    needing_grad: list[str] = field(default_factory=list)

    def inputs(self, args: Sequence[Any]) -> list[Any]:
        """The Program's inputs among Dynamo's arguments.

        Raises:
            WeightError: a parameter was replaced or changed in place since the graph was compiled.
        """
        for index, reference, version, address in self.weights:
            weight: Tensor = args[index]
            if reference() is not weight or version_of(weight) != version or not _same_memory(weight, address):
                raise WeightError(
                    "the weight changed after its graph was compiled",
                    where=self.names[index],
                    fix="call torch.compiler.reset() and run the model again, so that it is quantized anew",
                )
        for index, value in self.scalars:
            if float(args[index]) != value:
                raise WeightError(
                    f"was {value} when the graph was compiled and is {float(args[index])} now",
                    where=self.names[index],
                    fix="call torch.compiler.reset() and run the model again",
                )
        return [args[index] for index in self.kept]


def version_of(tensor: Tensor) -> int | None:
    """The in-place version counter; None for an inference tensor, which has none."""
    return None if tensor.is_inference() else tensor._version


def _same_memory(tensor: Tensor, address: int) -> bool:
    return tensor.data_ptr() == address or tensor.untyped_storage().size() == 0  # released weights are empty


def capture_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe) -> tuple[Program, DynamoBinding]:
    """A Program from the graph that Dynamo hands a backend, and the binding of its arguments.

    Parameters, and buffers used as weights, become constants with their dotted names; other buffers stay inputs, so
    that they are never stale. Python floats that modules hold (`eps`) become literals.

    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [node.meta["example_value"] for node in placeholders]
    sources = [_source_name(node) for node in placeholders]
    traced = _trace(gm, fakes)
    mutations = Mutations(traced.graph)
    binding = DynamoBinding(names=[dotted_name(s) for s in sources])
    inputs = []
    for index, (node, value) in enumerate(zip(traced.graph.find_nodes(op="placeholder"), example_inputs, strict=True)):
        is_weight = isinstance(value, torch.nn.Parameter) or (isinstance(value, Tensor) and _is_weight(node))
        if is_weight and not mutations.of(node):
            _guard_owner(placeholders[index])
            binding.weights.append((index, weakref.ref(value), version_of(value), value.data_ptr()))
            _make_constant(traced, node, binding.names[index] or node.name, value.detach())
        elif _is_module_float(placeholders[index], value, sources[index]):
            _guard_owner(placeholders[index])
            binding.scalars.append((index, float(value)))
            _make_literal(node, float(value))
        else:
            binding.kept.append(index)
            inputs.append(concrete(value))
            if isinstance(value, Tensor) and value.requires_grad:
                binding.needing_grad.append(binding.names[index])
            node.target = node.name = _identifier(placeholders[index].name)
    program = Program(
        traced,
        recipe,
        example_inputs=tuple(inputs),
        input_names=tuple(binding.names[index] for index in binding.kept),
        held_inputs=tuple("._buffers[" in sources[i] or "._modules[" in sources[i] for i in binding.kept),
    )
    return _prepared(program), binding


def _trace(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None) or FakeTensorMode()
    # A vmap leaves its nesting in a pre-dispatch graph, as calls on which nothing depends; below, it is gone.
    whole = not any("_vmap_" in getattr(node.target, "__name__", "") for node in gm.graph.nodes)
    allowed, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        with mode, torch.no_grad(), fx.traceback.preserve_node_meta():
            return make_fx(lambda *xs: fx.Interpreter(gm).run(*xs), tracing_mode="real", pre_dispatch=whole)(*fakes)
    finally:
        mode.allow_non_fake_inputs = allowed


def _guard_owner(placeholder: fx.Node) -> None:
    """Have Dynamo compile anew for another module of the same class.

    It passes weights as inputs, so behind a graph break one graph would serve every layer; here it holds one's weights.
    """
    source, context = getattr(placeholder, "_dynamo_source", None), TracingContext.try_get()
    if context is None or not hasattr(source, "get_base"):
        return
    owner = source.get_base()  # type: ignore[union-attr]
    if re.match(r"\._(modules|parameters|buffers)\[", source.name.removeprefix(owner.name)):  # type: ignore[union-attr]
        context.guards_context.dynamo_guards.add(owner.make_guard(_same_object))


def _same_object(builder: Any, guard: Any) -> None:
    builder.ID_MATCH(guard)


def _source_name(placeholder: fx.Node) -> str:
    source = getattr(placeholder, "_dynamo_source", None)
    return source.name if source is not None else placeholder.name


def dotted_name(source: str) -> str:
    """A Dynamo source as the name users know.

    >>> dotted_name("L['self']._modules['encoder']._modules['0']._parameters['weight']")
    'encoder.0.weight'
    >>> dotted_name("L['input_ids']")
    'input_ids'
    """
    parts = re.findall(r"\['([^']*)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]", source)
    words = [a or b or c for a, b, c in parts]
    holders = {"_modules", "_parameters", "_buffers"}
    first = next((i for i, w in enumerate(words) if w in holders), None)
    words = words[first:] if first is not None else words[-1:]
    return ".".join(w for w in words if w not in holders)


def _is_module_float(placeholder: fx.Node, value: Any, source: str) -> bool:
    """A Python float attribute of a module, which Dynamo passes as a 0-dim float64 tensor."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 0
        and value.dtype is torch.float64
        and "._modules[" in source
        and "._buffers[" not in source
        and all(user.target in (aten.item.default, "item") or user.op == "call_method" for user in placeholder.users)
    )


_WEIGHT_POSITION = {
    aten.linear.default: (1,),
    aten.mm.default: (1,),
    aten.matmul.default: (1,),
    aten.addmm.default: (2,),
    aten.embedding.default: (0,),
}


def holds_layers(program: Program) -> bool:
    """Whether the graph holds any layer that its recipe could speak of."""
    attention = (aten.scaled_dot_product_attention.default,) if program.recipe.quantizes_attention else ()
    return any(is_op(node, *_WEIGHT_POSITION, *attention) for node in program.graph.nodes)


def _is_weight(node: fx.Node) -> bool:
    """A buffer that is used as the weight of a linear or the table of an embedding."""
    for user in node.users:
        if user.target in (aten.t.default, aten.transpose.int, aten.numpy_T.default):
            if _is_weight(user):
                return True
        elif any(user.args[i] is node for i in _WEIGHT_POSITION.get(user.target, ())):  # type: ignore[call-overload]
            return True
    return False


def _make_constant(gm: fx.GraphModule, placeholder: fx.Node, name: str, value: Tensor) -> None:
    set_constant(gm, name, value)
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        constant = gm.graph.get_attr(name)
    constant.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(constant)
    gm.graph.erase_node(placeholder)


def _make_literal(placeholder: fx.Node, value: float) -> None:
    for item in list(placeholder.users):
        for user in list(item.users):
            literal = lambda n, item=item: value if n is item else n  # noqa: E731
            user.args = fx.node.map_arg(user.args, literal)
            user.kwargs = fx.node.map_arg(user.kwargs, literal)
        item.graph.erase_node(item)
    placeholder.graph.erase_node(placeholder)


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


# --- what every capture ends with ----------------------------------------------------------------------------------


def _prepared(program: Program) -> Program:
    gm = program.gm
    mode = next((n.meta["val"].fake_mode for n in gm.graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    mode = mode or FakeTensorMode()
    for node in gm.graph.find_nodes(op="get_attr"):
        value = get_constant(gm, node.target)
        if isinstance(value, Tensor):
            set_constant(gm, node.target, value.detach())  # constants, not parameters: no grad, nothing to train
            node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
    for node in gm.graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    program.float_bytes = constant_bytes(gm)
    return program


_DROPOUT = {aten.dropout.default: (1, 2), aten.dropout_.default: (1, 2), aten.native_dropout.default: (1, 2)}


def refuse_training(program: Program, inputs_needing_grad: Sequence[str] = ()) -> None:
    """Quantized integer operations have no gradient and dropout no place in inference.

    Raises:
        CaptureError: an input requires grad while grad mode is on, or dropout is active.
    """
    if inputs_needing_grad and torch.is_grad_enabled():
        raise CaptureError(
            "this input requires grad, and quantized integer operations have no gradient",
            where=inputs_needing_grad[0],
            fix="detach it, or call the model under torch.no_grad()",
        )
    for node in program.graph.nodes:
        p, train = 0.0, True
        if node.target in _DROPOUT:
            p, train = (node.args[i] for i in _DROPOUT[node.target])
        elif node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4:
            p = node.args[4]
        if train and isinstance(p, float) and p > 0.0:
            raise CaptureError(
                f"dropout of {p} is active", where=layer_of(node) or node.name, fix="call model.eval() first"
            )


def layer_of(node: fx.Node) -> str:
    """Dotted name of the module a node was traced in, or an empty string when it is unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return dotted_name(path) if "._modules[" in path else re.sub(r"^[LG]\['\w+'\]\.?", "", path)


def is_op(node: Any, *targets: OpOverload) -> bool:
    """Whether a node is a call to one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
