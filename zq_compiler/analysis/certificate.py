"""Whether three lowerings of a Program compute the same: the reference, the ops Inductor is given, and an ONNX file.

*Teacher-forced*: each dialect op is fed the reference's own operands, and in the file so is the float math between two
of them, which together is the whole file. *Free-running*: each lowering goes on from its own values; a step early in a
deep model is many steps at its end. The reference runs node by node; its values are compared as they come and dropped.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, fx

from ..errors import ExportError
from ..kernels import reference_of
from ..lowering import inductor
from ..lowering.eager import ReferenceInterpreter
from ..lowering.lint.onnxruntime import NEWEST_OPSET
from ..lowering.onnx.dialect import LINEARS
from ..lowering.onnx.naming import boundary_names, input_names, output_names, results
from ..mutation import state_kept
from ..numerics import sqnr
from ..program import Program, Stage, content_hash, fake_value
from ..rewrite import layer_name
from ..traffic import model_dtype

# A step of floats: what a few roundings of a row's largest value come to. By about that, norms, exp and GELU of two
# runtimes differ, and sums in another order.
ROUNDINGS = 8
# Where attention and float linears add thousands of products, and where ONNX Runtime does for TensorRT, which would
# multiply the integers: the root of 4096 roundings.
SUM_ROUNDINGS = 64
BETWEEN = (
    "between"  # in place of an op's name: operators of torch that lead from dialect ops to the next, or to outputs
)


Lowering = Literal["inductor", "onnx"]
Mode = Literal["teacher-forced", "free-running"]


@dataclass(frozen=True)
class Agreement:
    """One result of one dialect op, or of the float math before it, in one lowering, against the reference.

    Args:
        lowering: `inductor` or `onnx`.
        mode: what its operands were.
        layer, op: dotted name, and the op; `between` for what no dialect op computes.
        result: name of the value, as in the file.
        values: how many.
        equal, within: how many are the same, and how many differ by a step at most: 1 of integers, for floats
            `ROUNDINGS` last places of the row's largest value, `SUM_ROUNDINGS` between dialect ops.
        worst: largest difference, in steps; NaN where only one of the two is.
        integers: rather than floats.
    """

    lowering: Lowering
    mode: Mode
    layer: str
    op: str
    result: str
    values: int
    equal: int
    within: int
    worst: float
    integers: bool

    @property
    def different(self) -> int:
        """How many differ by more than a step."""
        return self.values - self.equal - self.within


@dataclass
class Certificate:
    """How far lowerings agree with the reference on given inputs.

    Args:
        recipe, hash: of the Program.
        file: the ONNX file.
        rows: in the graph's order.
        outputs: lowering -> output -> SQNR in dB of the free-running one; `inf` where it is equal.
        notes: what was not compared, and why.
        complete: whether every result of every dialect op was found in the file.
    """

    recipe: str
    hash: str
    file: str
    rows: list[Agreement] = field(default_factory=list)
    outputs: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = True

    @property
    def passed(self) -> bool:
        """Teacher-forced, everything was compared and nothing differs by more than a step."""
        return self.complete and all(row.different == 0 for row in self.rows if row.mode == "teacher-forced")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [{**asdict(row), "different": row.different} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed}

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{self.file}, recipe {self.recipe}: {'passed' if self.passed else 'FAILED'}"]
        groups: dict[tuple[str, ...], list[Agreement]] = {}
        for row in self.rows:
            kind = "integers" if row.integers else "floats"
            groups.setdefault((row.lowering, row.mode, row.op, kind), []).append(row)
        width = max((len(op) for _, _, op, _ in groups), default=0)
        columns = f"{'results':>16}{'equal':>12}{'one step':>10}{'more':>8}{'worst':>9}"
        lines.append(f"{'lowering':9}{'operands':15}{'op':{width}}  {columns}")
        for (lowering, mode, op, kind), rows in sorted(groups.items(), key=lambda item: item[0][:2]):
            sums = [sum(getattr(row, name) for row in rows) for name in ("equal", "within", "different")]
            worst = max(rows, key=lambda row: (row.worst != row.worst, row.worst)).worst
            lines.append(
                f"{lowering:9}{mode:15}{op:{width}}  {f'{len(rows)} of {kind}':>16}"
                f"{sums[0]:>12}{sums[1]:>10}{sums[2]:>8}{worst:>9.3g}"
            )
        for lowering, outputs in self.outputs.items():
            lines += [f"{lowering} free-running: {name} {value:.1f} dB" for name, value in outputs.items()]
        failed = [row for row in self.rows if row.mode == "teacher-forced" and row.different]
        lines += [f"differs: {row.lowering} {row.result}: {row.different} of {row.values}" for row in failed[:10]]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def certify(program: Program, path: str | Path, inputs: Sequence[Any]) -> Certificate:
    """Compare the lowerings of a fused Program on its flat inputs.

    The file's own session holds its weights once more, and what the free-running lowerings compute is held until the
    reference is there too, so give small inputs. Teacher-forced, one op at a time is held.

    Raises:
        ExportError: onnxruntime is missing, or the file is of another Program.
    """
    file = OnnxFile(path, program)
    made = Certificate(program.recipe.name, content_hash(program), str(path))
    lowerings: dict[Lowering, Any] = {"inductor": InductorOps(program), "onnx": file}
    with torch.no_grad():
        free = {name: lowering.run(inputs) for name, lowering in lowerings.items()}
        with state_kept(program):
            outputs = _Comparison(program, made, lowerings, free, inputs).run(*inputs)
    for name, lowering in lowerings.items():
        pairs = zip(output_names(program), _tensors(outputs), lowering.outputs, strict=True)
        made.outputs[name] = {output: sqnr(x, y) for output, x, y in pairs if x.is_floating_point()}
    made.notes += [note for lowering in lowerings.values() for note in lowering.notes]
    made.complete = not file.missing
    return made


def has_past(path: str | Path) -> bool:
    """Whether a key-value cache goes into a file.

    Raises:
        ExportError: there is no such file, or it is no ONNX.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise ExportError(
            f"cannot be read: {error}", where=str(path), fix="give a file that export_onnx wrote"
        ) from None
    return any(value.name.startswith("past_key_values.") for value in model.graph.input)


class _Comparison(ReferenceInterpreter):
    """The reference, which at each dialect op asks the other lowerings for theirs."""

    def __init__(
        self,
        program: Program,
        made: Certificate,
        lowerings: Mapping[Lowering, Any],
        free: Mapping[Lowering, dict[str, Tensor]],
        inputs: Sequence[Any],
    ) -> None:
        super().__init__(program)
        self.program, self.made, self.lowerings, self.free, self.inputs = program, made, lowerings, free, inputs
        self.names, self.file = boundary_names(program), lowerings["onnx"]
        self.kept: dict[str, Tensor] = {}  # what cuts of the file have yet to be fed
        self.needed = Counter(name for lowering in lowerings.values() for name in lowering.needs())

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = self.names.get(n.name, "")
        if name in self.needed and isinstance(result, Tensor):
            self.kept[name] = result
        if reference_of(n.target) is not None:
            self._compare(n, result)
        elif n.name in self.file.between:
            for value, got in self.file.forced(n, {}, self.kept, self.inputs).items():
                self.made.rows.append(self._agreement("onnx", "teacher-forced", n, value, result, got))
            self._drop(self.file.needs(n))
        return result

    def _drop(self, used: Sequence[str]) -> None:
        """What a cut was fed, unless another has yet to be."""
        for name in used:
            self.needed[name] -= 1
            if not self.needed[name]:
                self.kept.pop(name, None)

    def _compare(self, node: fx.Node, result: Any) -> None:
        nodes = results(node)
        wanted = [result] if nodes == [node] else [result[x.args[1]] for x in nodes]
        operands = {x: self.env[x] for x in node.all_input_nodes}
        for name, lowering in self.lowerings.items():
            found: dict[Mode, dict[str, Tensor]] = {
                "teacher-forced": lowering.forced(node, operands, self.kept, self.inputs),
                "free-running": self.free[name],
            }
            for x, want in zip(nodes, wanted, strict=True):
                for mode, values in found.items():
                    got = values.pop(self.names[x.name], None)
                    if got is not None:
                        self.made.rows.append(self._agreement(name, mode, node, self.names[x.name], want, got))
            self._drop(lowering.needs(node))

    def _agreement(
        self, lowering: Lowering, mode: Mode, node: fx.Node, value: str, want: Tensor, got: Tensor
    ) -> Agreement:
        between = reference_of(node.target) is None
        if want.dtype is torch.float8_e4m3fn:  # its codes are what a step is of
            want, got = _code_numbers(want), _code_numbers(got)
        in_file = lowering == "onnx"
        sums = between or (in_file and self.file.target == "tensorrt" and node.target in LINEARS)
        coarsest = self.file.dtype if in_file and self.file.dtype != model_dtype(self.program) else None
        steps = difference(want, got, SUM_ROUNDINGS if sums else ROUNDINGS, coarsest)
        equal = int((steps == 0).sum())
        within = int(((steps > 0) & (steps <= 1)).sum())
        worst = float(steps.max()) if steps.numel() else 0.0
        op = BETWEEN if between else str(node.target).split(".")[1]
        layer = layer_name(self.program, node)
        integers = not want.is_floating_point()
        return Agreement(lowering, mode, layer, op, value, steps.numel(), equal, within, worst, integers)


def _code_numbers(codes: Tensor) -> Tensor:
    """FP8 values, or their bytes, as integers that count values: neighbours are a step apart."""
    bytes = codes.view(torch.uint8).short()
    return torch.where(bytes >= 128, 128 - bytes, bytes)


def difference(want: Tensor, got: Tensor, roundings: int = ROUNDINGS, coarsest: torch.dtype | None = None) -> Tensor:
    """`|got - want|` in steps, float64: of 1 for integers, else of `roundings` last places of a row's largest value.

    Last places are those of `want`'s dtype, or of the dtype that the values went through, where it has fewer digits.
    NaN where one of the two is NaN or they differ by infinity.

    >>> difference(torch.tensor([3, 4]), torch.tensor([3, 6])).tolist()
    [0.0, 2.0]
    """
    apart = (got.double() - want.double()).abs()
    same = (got == want) | (got.isnan() & want.isnan())
    if want.is_floating_point():
        largest = want.double().abs().nan_to_num(nan=0.0, posinf=0.0)
        row = largest.amax(-1, keepdim=True) if want.ndim else largest
        last_place = max(torch.finfo(dtype).eps for dtype in (want.dtype, coarsest or want.dtype))
        apart = apart / (row * last_place * roundings)
    return torch.where(same, 0.0, apart)


class InductorOps:
    """The graph that Inductor is given, run op by op: native kernels where the machine has them.

    Attributes:
        outputs: of the last run.
        notes: which ops are the reference's own.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = boundary_names(program)
        self.outputs: list[Tensor] = []
        inlined = [choice for choice in inductor.lower(program).providers if choice.provider == "inline"]
        self.notes = [f"inductor runs {x.count} x {x.op} as the reference: {x.reason}" for x in inlined]
        self._lowered: dict[str, Callable[..., Any]] = {}

    def needs(self, node: fx.Node | None = None) -> list[str]:
        """Nothing but operands."""
        return []

    def run(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Free-running: the results of every dialect op by name."""
        runner = _OpByOp(self)
        with state_kept(self.program):
            self.outputs = _tensors(runner.run(*inputs))
        return runner.found

    def forced(self, node: fx.Node, operands: Mapping[fx.Node, Any], kept: Any, inputs: Any) -> dict[str, Tensor]:
        """The results of one op by name, of given operands."""
        if node.name not in self._lowered:
            self._lowered[node.name] = _one_op(self.program, node)
        given = [operands[x] for x in node.all_input_nodes if x.op != "get_attr"]
        return {self.names[x.name]: y for x, y in zip(results(node), self._lowered[node.name](*given), strict=True)}


class _OpByOp(fx.Interpreter):
    def __init__(self, ops: InductorOps) -> None:
        super().__init__(ops.program.gm)
        self.ops = ops
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if reference_of(n.target) is None:
            return super().run_node(n)
        values = self.ops.forced(n, {x: self.env[x] for x in n.all_input_nodes}, {}, ())
        self.found |= values
        nodes, names = results(n), self.ops.names
        return values[names[n.name]] if nodes == [n] else {x.args[1]: values[names[x.name]] for x in nodes}


def _tensors(outputs: Sequence[Any]) -> list[Tensor]:
    return [y for y in outputs if isinstance(y, Tensor)]


def _one_op(program: Program, node: fx.Node) -> Callable[..., Any]:
    """One op as Inductor is given it; a function of its operands that are no constants."""
    graph, env = fx.Graph(), {}
    for x in node.all_input_nodes:
        if x.op != "get_attr":
            env[x] = graph.placeholder(x.name)
            env[x].meta = dict(x.meta)
    for x in node.all_input_nodes:
        if x.op == "get_attr":
            env[x] = graph.node_copy(x)
    env[node] = graph.node_copy(node, env.__getitem__)
    nodes = results(node)
    graph.output(tuple(env[node] if x is node else graph.node_copy(x, env.__getitem__) for x in nodes))
    return inductor.lower(Program(fx.GraphModule(program.gm, graph), program.recipe, stage=Stage.FUSED)).gm


_FLOATS: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
}


class OnnxFile:
    """An ONNX file in ONNX Runtime, whole or cut around one dialect op.

    Attributes:
        target, dtype: what it is written for, and of its floats.
        results, between: names of what each dialect op computes, and of what other operators compute for them.
        outputs: of the last run.
        missing: results of dialect ops that the file has no value for, or not the one of the reference.

    Raises:
        ExportError: onnxruntime is missing, or the file is of another Program.
    """

    def __init__(self, path: str | Path, program: Program) -> None:
        self.path, self.program, self.ort = Path(path), program, _onnxruntime()
        self.model = onnx.load(str(self.path))
        self.target, self.dtype = _require_same(self.model, program, self.path)
        graph = self.model.graph
        self.producers = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self.outputs: list[Tensor] = []
        names = input_names(program)
        placeholders = program.graph.find_nodes(op="placeholder")
        self.positions = {names[str(node.target)]: i for i, node in enumerate(placeholders)}
        self.names = boundary_names(program)
        self.results: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.missing: list[str] = []
        self.between: dict[str, list[str]] = {}
        of_ops: set[str] = set()
        in_floats = self._in_floats()
        self.stops = {name for name in self.names.values() if name in self.producers} - in_floats
        for node in program.graph.nodes:
            if reference_of(node.target) is not None:
                made = [self.names[x.name] for x in results(node)]
                of_ops |= {x.name for x in results(node)}
                alike = in_floats.isdisjoint([*made, *(self.names.get(x.name) for x in node.all_input_nodes)])
                self.results[node.name] = [name for name in made if alike and name in self.producers]
                absent = [name for name in made if name not in self.results[node.name]]
                why = (
                    "the file has no value" if alike else "the file computes in floats what the model does in integers,"
                )
                self.notes += [f"{why} {name}: it was not compared" for name in absent]
                self.missing += absent
            elif node.name not in of_ops and self.names.get(node.name) in self.stops:  # else folded into the next
                self.between[node.name] = [self.names[node.name]]
        self.cuts = {name: self._cut(made) for name, made in (self.results | self.between).items()}

    def needs(self, node: fx.Node | None = None) -> list[str]:
        """Names that cuts, or that around one op, read."""
        cuts = self.cuts.values() if node is None else [self.cuts[node.name]]
        return [name for _, feeds in cuts for name in feeds if name not in self.positions]

    def run(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Free-running: the results of every dialect op by name."""
        wanted = [name for made in self.results.values() for name in made]
        model = onnx.load(str(self.path), load_external_data=False)
        outputs = [value.name for value in model.graph.output]
        model.graph.output.extend(self.types[name] for name in wanted if name not in outputs)
        read = {value.name for value in model.graph.input}
        feeds = {name: self._given(name, inputs[i]) for name, i in self.positions.items() if name in read}
        if any(tensor.data_location == tensor.EXTERNAL for tensor in model.graph.initializer):
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".onnx") as beside:  # its weights stay there
                onnx.save(model, beside.name)
                session = self._session(beside.name)
        else:
            session = self._session(model.SerializeToString())
        self.outputs = [torch.from_numpy(value) for value in session.run(outputs, feeds)]
        return {n: self._signed(n, x) for n, x in zip(wanted, session.run(wanted, feeds), strict=True)}

    def forced(
        self, node: fx.Node, operands: Any, kept: Mapping[str, Tensor], inputs: Sequence[Any]
    ) -> dict[str, Tensor]:
        """The results of one op by name, of the part of the file between them and the named values before them."""
        made = (self.results | self.between)[node.name]
        if not made:
            return {}
        numbers, feeds = self.cuts[node.name]
        graph = self.model.graph
        nodes = [graph.node[i] for i in numbers]
        weights = [
            self.weights[name] for name in dict.fromkeys(x for n in nodes for x in n.input) if name in self.weights
        ]
        cut = onnx.helper.make_graph(
            nodes, node.name, [self.types[name] for name in feeds], [self.types[name] for name in made], weights
        )
        model = onnx.helper.make_model(cut, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        given = {
            name: self._given(name, inputs[self.positions[name]] if name in self.positions else kept[name])
            for name in feeds
        }
        found = self._session(model.SerializeToString()).run(made, given)
        return {name: self._signed(name, value) for name, value in zip(made, found, strict=True)}

    def _cut(self, made: Sequence[str]) -> tuple[list[int], list[str]]:
        """The nodes behind these values, back to named ones and inputs, and the names of those."""
        stops = self.stops - set(made)
        numbers: set[int] = set()
        feeds: dict[str, None] = {}
        waiting = list(made)
        while waiting:
            name = waiting.pop()
            if name in self.positions or name in stops:
                feeds[name] = None
            elif name in self.producers and self.producers[name] not in numbers:
                numbers.add(self.producers[name])
                waiting += [x for x in self.model.graph.node[self.producers[name]].input if x]
        return sorted(numbers), list(feeds)

    def _in_floats(self) -> set[str]:
        """Names of integers that the file has floats in place of: TensorRT's attention where it cannot be INT8."""
        integers = [n for n in self.program.graph.nodes if getattr(fake_value(n), "dtype", None) is torch.int8]
        named = {self.names[n.name] for n in integers if n.name in self.names} & self.types.keys()
        return {name for name in named if self._type(name) not in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)}

    def _type(self, name: str) -> int:
        return self.types[name].type.tensor_type.elem_type

    def _unsigned(self, name: str) -> bool:
        return self._type(name) == onnx.TensorProto.UINT8

    def _given(self, name: str, value: Tensor) -> Any:
        """A value as the file has it: `u8 = s8 + 128` in the dialect of ONNX Runtime's CPU kernels, floats rounded."""
        if self._unsigned(name) and value.dtype is torch.int8:
            value = (value.short() + 128).to(torch.uint8)
        if value.dtype is torch.float8_e4m3fn:  # which NumPy does not have
            codes = value.contiguous().view(torch.uint8).numpy()
            return self.ort.OrtValue.ortvalue_from_numpy_with_onnx_type(codes, onnx.TensorProto.FLOAT8E4M3FN)
        if value.is_floating_point():
            value = value.to(_FLOATS[self._type(name)])
        return value.contiguous().numpy()

    def _signed(self, name: str, value: Any) -> Tensor:
        made = torch.from_numpy(value)
        return (made.short() - 128).to(torch.int8) if self._unsigned(name) else made

    def _session(self, model: Any) -> Any:
        options = self.ort.SessionOptions()
        if not torch.cpu.get_capabilities().get("avx512_vnni", False):
            # Products would saturate; with it, ONNX Runtime refuses weights that several nodes share.
            options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 4  # what it refuses comes as an exception
        if self.target == "tensorrt":  # as written: fused pairs would be other arithmetic
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self.ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except self.ort.capi.onnxruntime_pybind11_state.Fail as error:
            what = f"ONNX Runtime {self.ort.__version__} does not load it: {str(error).splitlines()[0]}"
            fix = "without AVX512-VNNI it loads no model that calls a layer several times: certify on a CPU that has it"
            raise ExportError(what, where=str(self.path), fix=fix) from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ExportError("onnxruntime is not installed", fix="pip install onnxruntime") from None
    return onnxruntime


def _require_same(model: Any, program: Program, path: Path) -> tuple[str, torch.dtype]:
    """The target of a file of this Program, and the dtype of its floats."""
    found = {entry.key: entry.value for entry in model.metadata_props}
    if "hash" not in found:
        raise ExportError("says nothing of the model it was made of", where=str(path), fix="export it again")
    if found.get("recipe") != program.recipe.name:
        what = f"is of recipe {found.get('recipe')}, the model of {program.recipe.name}"
        raise ExportError(what, where=str(path), fix="certify it by the model that exported it")
    if found["hash"] != content_hash(program):
        what = "is of another model: graph or weights differ"
        raise ExportError(what, where=str(path), fix="export it again, or certify it by the model that exported it")
    if found["float_dtype"] == "bfloat16":
        what = "is in bfloat16, for which ONNX Runtime has no kernels on the CPU"
        raise ExportError(what, where=str(path), fix="certify a file in float32 or float16")
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset > NEWEST_OPSET:
        what = f"is of opset {opset}, and ONNX Runtime reads none above {NEWEST_OPSET}"
        raise ExportError(what, where=str(path), fix="certify a file of opset 21")
    return found["target"], getattr(torch, found["float_dtype"])
