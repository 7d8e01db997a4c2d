"""The Program: a captured model on its way through the passes. Data only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx

from .errors import WeightError
from .recipe import Recipe, Role
from .schemes import QScheme
from .statistics import Statistics
from .torch_private import OpOverload, pytree, storage_key


class Stage(IntEnum):
    """How far a Program has come; what is legal at each is `verify.py`'s table."""

    FLOAT = 0  # ATen only
    QDQ = 1  # quantization is explicit: quantize and dequantize ops around float math
    FUSED = 2  # integer ops


NAMES_OF_METHODS = {"clip": "clip search", "gptq": "GPTQ", "lkd": "LKD", "bias": "bias correction"}


@dataclass
class LayerPlan:
    """What is to become of one layer, and why not when nothing is.

    Args:
        name: dotted name, from the weight's own name in the model.
        kind: `linear`, `lm_head`, `embedding`, `attention`, `conv` or `matmul`.
        shape: the weight's shape as the op reads it, `(N, K)` for a linear.
        constant: target of the constant that holds the weight; empty when it is computed at run time.
        float_bytes: bytes of the float weight.
        weight, input: schemes, or None for a layer left in float; an attention has an input scheme only.
        output: scheme of the integers that the layer writes, or None.
        lorc_rank: of the low-rank compensation of its weight's error; 0 for none, or `"auto"`.
        methods: that choose the weight's codes.
        smooth: alpha of SmoothQuant, or `"search"`.
        dtype: name of the float dtype that the layer runs in where that is not the model's own, or None.
        role: what the layer does in its block.
        reason: why it is left in float.
        requested: the recipe names this layer, so under `strict` leaving it in float is an error.
        calls: how often the graph calls it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    constant: str = ""
    float_bytes: int = 0
    weight: QScheme | None = None
    input: QScheme | None = None
    output: QScheme | None = None
    lorc_rank: int | str = 0
    methods: tuple[str, ...] = ()
    smooth: float | str | None = None
    dtype: str | None = None
    role: Role = Role.OTHER
    reason: str = ""
    requested: bool = False
    calls: int = 0

    @property
    def quantized(self) -> bool:
        """Whether the layer is to be quantized."""
        return self.input is not None or self.weight is not None

    def describe_schemes(self) -> str:
        """In words, `float` where there are none."""
        schemes = [scheme.describe() for scheme in (self.weight, self.input) if scheme is not None]
        writes = f" -> {self.output.describe()}" if self.output is not None else ""
        smooth = ["SmoothQuant"] if self.smooth is not None else []
        methods = [NAMES_OF_METHODS[method] for method in self.methods]
        lorc = [f"LoRC of rank {self.lorc_rank}"] if self.lorc_rank else []
        return (" + ".join([" x ".join(schemes) + writes, *smooth, *methods, *lorc])) or self.dtype or "float"

    @property
    def calibrated(self) -> bool:
        """Whether it has a static scale, which must come from calibration."""
        return any(scheme is not None and scheme.calibrated for scheme in (self.input, self.output))

    def leave_float(self, reason: str) -> None:
        """Not to be quantized or cast after all."""
        self.weight = self.input = self.output = self.dtype = None
        self.lorc_rank, self.methods, self.smooth = 0, (), None
        self.reason = reason


@dataclass
class PassRecord:
    """One run of a pass: rewrites made, wall seconds, and output SQNR in dB against the graph before it, if checked."""

    name: str
    changes: int
    seconds: float
    sqnr: float | None = None


@dataclass
class Refinement:
    """What a method did to one weight, or to the weights of one transformer layer.

    Args:
        layer: dotted name.
        method: as the report prints it.
        objective: what the method lessens, in words.
        before, after: the objective's value; where it would not have lessened it, nothing was changed and both are
            alike.
        seconds: that it took, data included.
    """

    layer: str
    method: str
    objective: str
    before: float
    after: float
    seconds: float


@dataclass
class NearMiss:
    """A rewrite that almost applied: the rule, the node it looked at, and the reason it refused."""

    rule: str
    node: str
    reason: str


@dataclass(frozen=True)
class OpTraffic:
    """Bytes that one operation moves.

    Args:
        layer: dotted name of the module it belongs to; empty where that is unknown.
        op: its short name.
        read, written: as they are.
        as_float: both together, were its integers values of the model's dtype.
    """

    layer: str
    op: str
    read: int
    written: int
    as_float: int

    @property
    def moved(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclass
class Program:
    """A graph with everything the passes and lowerings need to know about it.

    Args:
        gm: flat graph; inputs are placeholders, constants are `get_attr` nodes with dotted targets; every node
            carries a fake `meta["val"]`. Its output is a tuple.
        recipe: what to quantize.
        stage: how far it has come.
        example_inputs: one flat tuple of real inputs, or None (no numeric checks then).
        in_spec, out_spec: pytree specs of `(args, kwargs)` and of the output; None under Dynamo, which is flat.
        parameter_names: the model's own argument names, in order, for the positional ones.
        input_names, held_inputs: under Dynamo, what each input came from, and whether the model itself holds it.
        plan: layer -> decision, written by `annotate`.
        calibration: batches to calibrate with, or the Statistics of an earlier run.
        stats: ranges of the values that get static scales, by name, written by `calibrate`.
        history: what each pass did.
        refinements: what methods made of weights, one row a weight or transformer layer.
        near_misses: rewrites that almost applied.
        notes: sentences for the report.
        float_bytes: bytes of all constants before quantization.
        float_dtype, float_traffic: before quantization, the dtype of most values and the bytes of activations that
            each operation moved.
        weight_cache: gives a constant's mapping of what follows from its content (integers, its digest), shared with
            other graphs of the same model.
    """

    gm: fx.GraphModule
    recipe: Recipe
    stage: Stage = Stage.FLOAT
    example_inputs: tuple[Any, ...] | None = None
    in_spec: pytree.TreeSpec | None = None
    out_spec: pytree.TreeSpec | None = None
    parameter_names: tuple[str, ...] = ()
    input_names: tuple[str, ...] = ()
    held_inputs: tuple[bool, ...] = ()
    plan: dict[str, LayerPlan] = field(default_factory=dict)
    calibration: Any = None
    stats: Statistics | None = None
    history: list[PassRecord] = field(default_factory=list)
    refinements: list[Refinement] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    float_bytes: int = 0
    float_dtype: torch.dtype | None = None
    float_traffic: list[OpTraffic] = field(default_factory=list)
    weight_cache: Callable[[str], MutableMapping[Any, Any]] | None = None

    @property
    def graph(self) -> fx.Graph:
        """The FX graph, printable and runnable."""
        return self.gm.graph


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Own graph and module tree, same tensors; hooks and calling conventions of the original are gone."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def get_constant(gm: fx.GraphModule, target: str) -> Tensor:
    """The tensor behind a `get_attr` target."""
    owner: Any = gm
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def set_constant(gm: fx.GraphModule, target: str, value: Tensor) -> None:
    """Store a tensor as a buffer under a dotted target, making the modules on the way."""
    *path, leaf = target.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        if not isinstance(getattr(owner, part, None), torch.nn.Module):
            setattr(owner, part, torch.nn.Module())
        owner = getattr(owner, part)
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    owner.register_buffer(leaf, value)


def from_weight(program: Program, name: str, key: Any, compute: Callable[[], Any]) -> Any:
    """What `compute` makes of a float weight, once for all graphs of the model.

    Args:
        name: the weight's constant.
        key: what is made of it, hashable.

    Raises:
        WeightError: the weight was released before.
    """
    entries: MutableMapping[Any, Any] = program.weight_cache(name) if program.weight_cache else {}
    if key not in entries:
        weight = get_constant(program.gm, name)
        if weight.untyped_storage().size() == 0 and weight.numel() > 0:
            what = "the float weight was released"
            raise WeightError(what, where=name, fix="load the model again before a new shape")
        with torch.no_grad():
            entries[key] = compute()
    return entries[key]


def is_known(program: Program, name: str, key: Any) -> bool:
    """Whether `from_weight` has it already, from another graph of the model."""
    return program.weight_cache is not None and key in program.weight_cache(name)


def integer_name(weight: str, view: int, part: str) -> str:
    """Target of the constant that holds a weight's integers (`part` "q") or scales ("scale").

    Args:
        view: counts the parts or transposes of one weight that are quantized apart, from 0.

    >>> integer_name("mlp.weight", 0, "q"), integer_name("mlp.weight", 1, "scale")
    ('mlp.weight_q', 'mlp.weight_view1_scale')
    """
    return f"{weight}_view{view}_{part}" if view else f"{weight}_{part}"


def cast_name(weight: str, dtype: str) -> str:
    """Target of the constant that holds a weight in another float dtype.

    >>> cast_name("mlp.weight", "bfloat16")
    'mlp.weight_bfloat16'
    """
    return f"{weight}_{dtype}"


def scale_name(scale: str, suffix: str) -> str:
    """Target of a constant derived from a calibrated scale: laid out in another shape, or folded into something.

    >>> scale_name("attention.key_scale", "1x1x1"), scale_name("attention.key_scale_1x1x1", "weight")
    ('attention.key_scale_1x1x1', 'attention.key_scale_weight')
    """
    return f"{re.sub(r'_[0-9]+(x[0-9]+)*$', '', scale)}_{suffix}"


def weight_name(integers: str) -> str:
    """The weight that a constant of integers was made from.

    >>> weight_name("mlp.weight_q"), weight_name("mlp.weight_view1_q")
    ('mlp.weight', 'mlp.weight')
    """
    return re.sub(r"(_view[1-9]\d*)?_q$", "", integers)


def constants(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Every constant the graph reads, once, with its target."""
    seen: set[str] = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target not in seen:
            seen.add(node.target)
            value = get_constant(gm, node.target)
            if isinstance(value, Tensor):
                yield node.target, value


def constant_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all constants, tied ones counted once."""
    storages = {storage_key(t): t.numel() * t.element_size() for _, t in constants(gm)}
    return sum(storages.values())


def content_hash(program: Program) -> str:
    """Of a graph's structure, names and every byte of its constants; the same after `save` and `load`."""
    digest = hashlib.blake2b(digest_size=16)
    for node in program.graph.nodes:
        target = node.target if isinstance(node.target, str | OpOverload) else node.target.__name__
        digest.update(f"{node.name} {node.op} {target} {node.args} {node.kwargs}\n".encode())
    for name, constant in constants(program.gm):
        digest.update(f"{name} {constant.dtype} {list(constant.shape)}\n".encode())
        content = constant.detach().cpu().clone(memory_format=torch.contiguous_format)  # NumPy pins what it is shown
        digest.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fake_value(node: fx.Node) -> Any:
    """The fake tensor (or other value) that stands for a node's result."""
    return node.meta.get("val")


def size(dim: Any) -> int | str:
    """A dimension as a number, or its symbol's name; a symbol that the capture found to have one value is a number."""
    text = str(dim)
    return int(text) if text.isdecimal() else text


def describe(value: Any) -> str:
    """A value in a few characters: `f32[2, s0, 64]`.

    >>> describe(torch.zeros(2, 3, dtype=torch.int8))
    'i8[2, 3]'
    """
    if isinstance(value, torch.Tensor):
        short = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("uint", "u").replace("int", "i")
        return f"{short}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(describe(v) for v in value)})"
    return type(value).__name__
