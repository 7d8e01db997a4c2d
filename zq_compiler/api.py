"""`quantize()` and what it returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .analysis.report import Report, make_report, require_all
from .analysis.saturation import Saturation, saturation, saturation_notes
from .analysis.sensitivity import LayerSensitivity, sensitivity
from .calling import CallingConvention
from .capture import capture
from .decoding import inputs_with_past, takes_past
from .errors import CaptureError, WeightError, ZQError
from .lowering import eager, inductor
from .mutation import Mutations
from .options import Options, require_calibration
from .passes import default_pipeline
from .program import Program, constants
from .recipe import Recipe
from .serialize import load as _load_folder
from .serialize import save as _save_folder
from .statistics import Statistics

if TYPE_CHECKING:
    from .analysis.certificate import Certificate
    from .lowering.onnx import ExportReport


class QuantizedModel:
    """A quantized model: run it, compile it, export it, save it, ask what happened.

    Calling it runs the reference implementation of every op, slowly and exactly: the oracle.
    """

    def __init__(self, program: Program, convention: CallingConvention, model: Any = None) -> None:
        self.program = program
        self.convention = convention
        self._providers: list[Any] = []
        self._model = weakref.ref(model) if model is not None else None  # it may go: nothing here needs its weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = eager.lower(self.program)(*self.convention.flatten(args, kwargs))
        return self.convention.unflatten(outputs)

    def compile(self, **torch_compile_options: Any) -> CompiledModel:
        """Lower to Inductor and native kernels.

        Args:
            torch_compile_options: passed to `torch.compile`, for example `dynamic=True`.

        Returns:
            A callable with the model's own signature and outputs.
        """
        lowered = inductor.lower(self.program)
        self._providers = lowered.providers
        fast = torch.compile(lowered.gm, fullgraph=True, **torch_compile_options)
        return CompiledModel(fast, self.convention, self.program)

    def export_onnx(
        self,
        path: str | Path,
        target: str = "onnxruntime",
        opset: int = 21,
        float_dtype: str | torch.dtype | None = None,
        with_past: bool = False,
        saved: str | Path | None = None,
    ) -> ExportReport:
        """Write an ONNX file, its dynamic dimensions kept; weights beyond 2 GB go to `<path>.data`.

        Args:
            target: the runtime that the file is written for: `"onnxruntime"` (on the CPU), `"onnxruntime-cuda"` or
                `"tensorrt"`.
            opset: of the standard ONNX operators, 20, 21 or 22; for `"tensorrt"` also 28, whose own types FP6 and FP4
                E2M1 weights get. No runtime reads FP6 yet, and ONNX Runtime no such file.
            float_dtype: of the file's floats, inputs and outputs included: `"float16"`, `"bfloat16"` or `"float32"`;
                None for the model's own.
            with_past: for a causal language model of transformers: keys and values of earlier tokens go in and those of
                all tokens come out, so that each step of generation reads its new tokens only. One file serves prefill
                (a past of length 0) and decoding. Names are Optimum's: `input_ids [B, T]`, `attention_mask [B, S + T]`
                and `position_ids [B, T]`, int64, the last two where the model takes them, and for each layer
                `past_key_values.0.key [B, kv_heads, S, head_dim]` and `.value`, in the model's dtype; `logits
                [B, T, V]`, `present.0.key [B, kv_heads, S + T, head_dim]` and `.value`. That is another graph than
                this one, unless this one was captured with a cache: it is captured and quantized from the float model,
                with the same recipe, the same statistics, and what methods chose by data here.
            saved: the folder that `save` of this model wrote, which must be the folder of `path` or in it. The file
                then reads constants from its `weights.safetensors`, as far as it has them as they are there.

        Raises:
            ExportError: target, opset or dtype is unknown, an operation of the model has no ONNX form, the saved folder
                is elsewhere, has no weights or those of another model, or, with a past, the model keeps it as something
                else than one key and one value a layer.
            ZQError: with a past, the float model is gone, or was never here (`load`).
        """
        from .lowering.onnx import export  # imported late: onnxscript is slow to import

        return export(self._with_past() if with_past else self.program, path, target, opset, float_dtype, saved)

    def _with_past(self) -> Program:
        if takes_past(self.program.in_spec):
            return self.program
        model = self._float_model(
            "from which a graph with a cache is captured",
            "keep the model, or call zq_compiler.export_onnx(model, ..., with_past=True)",
        )
        options = Options.parse({"recipe": self.program.recipe, "calibration": self._data})
        program = capture(model, (), inputs_with_past(model), options.recipe)
        program.weight_cache = self.program.weight_cache  # what methods chose for a weight is chosen for this graph too
        return _run_passes(program, options)

    @property
    def _data(self) -> Any:
        """What another graph of the model is calibrated with."""
        return self.program.calibration if self.program.recipe.methods_with_data else self.statistics

    def certify(self, path: str | Path, *args: Any, **kwargs: Any) -> Certificate:
        """Compare the reference, the ops that Inductor is given and an exported ONNX file, dialect op by dialect op.

        Each op is fed the reference's own operands (teacher-forced), and each lowering runs by itself (free-running).
        A file with a past is of a second graph, which is made again from the float model. Files for any target are run
        by ONNX Runtime on the CPU; in one of another float dtype, operands are rounded to it and a step is of it.

        Args:
            path: what `export_onnx` wrote.
            args, kwargs: one call of the model; the example inputs by default. Small ones do.

        Raises:
            ExportError: onnxruntime is missing, or the file is of another model, or in bfloat16.
            CaptureError: the call is not as the model was captured, or there is none and no example inputs are held.
        """
        from .analysis.certificate import certify, has_past  # imported late: onnxscript is slow to import

        program = self._with_past() if has_past(path) else self.program
        if args or kwargs:
            inputs: Sequence[Any] = CallingConvention.of(program).flatten(args, kwargs)
        elif program.example_inputs is None:
            raise CaptureError(
                "a loaded model holds no example inputs", fix="give the arguments of a call to certify()"
            )
        else:
            inputs = program.example_inputs
        return certify(program, path, inputs)

    def report(self) -> Report:
        """What was quantized, what was not, and why."""
        return make_report(self.program, self._providers)

    def saturation(self, batches: Any) -> list[Saturation]:
        """What lies outside its calibrated range on these batches, most first: static integers saturate there.

        Args:
            batches: as for `calibration=`.

        Raises:
            CalibrationError: a batch does not fit the model.
        """
        return saturation(self.program, self.convention, batches)

    def sensitivity(self, batches: Any) -> list[LayerSensitivity]:
        """Layers by how much each alone, quantized as here, disturbs the model's output on `batches`; worst first.

        Args:
            batches: as for `calibration=`.

        Raises:
            ZQError: the float model is gone, or was never here (`load`).
            CalibrationError: a batch does not fit the model.
        """
        model = self._float_model(
            "with which layers are compared",
            "keep the model, or call zq_compiler.sensitivity(model, batches, recipe)",
        )
        return sensitivity(model, batches, self.program.recipe, calibration=self._data)

    def _float_model(self, what_for: str, fix: str) -> Any:
        model = self._model() if self._model is not None else None
        if model is None:
            raise ZQError(f"the float model, {what_for}, is gone", where=self.program.recipe.name, fix=fix)
        return model

    @property
    def statistics(self) -> Statistics | None:
        """What calibration saw, to `save` and to give to another recipe; None for recipes that need none."""
        return self.program.stats

    def save(self, directory: str | Path) -> None:
        """Write graph, weights, recipe and report as a folder of JSON and safetensors; `load` reads it.

        Raises:
            ZQError: the folder exists and is no saved model, or something in the graph cannot be written.
        """
        _save_folder(self.program, self.convention, directory, self.report().to_dict())


class CompiledModel(torch.nn.Module):
    """A compiled quantized model, called like the original."""

    def __init__(self, fast: Callable[..., Any], convention: CallingConvention, program: Program) -> None:
        super().__init__()
        self._fast = [fast]  # in a list: its constants are not parameters of this module
        self.convention = convention
        mutations = Mutations(program.graph)
        # A model's running state, which its own graph changes, is no sign of a changed weight.
        own = {n.target for n in program.graph.find_nodes(op="get_attr") if mutations.of(n)}
        fixed = [(name, t) for name, t in constants(program.gm) if name not in own and not t.is_inference()]
        self._versions = [(name, t, t._version) for name, t in fixed]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise WeightError("the weight changed after the model was quantized", where=name, fix="quantize again")
        with torch.no_grad():
            return self.convention.unflatten(self._fast[0](*self.convention.flatten(args, kwargs)))


def load(directory: str | Path) -> QuantizedModel:
    """Read a folder that `QuantizedModel.save` wrote. The model's own class is not needed.

    Raises:
        ZQError: naming the file that is missing or damaged, and the mend.
    """
    program, convention, _ = _load_folder(directory)
    return QuantizedModel(program, convention)


def quantize(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    calibration: Any = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    check: bool = False,
    dump: str | None = None,
) -> QuantizedModel:
    """Quantize a model after training.

    Args:
        model: a module in eval mode, or an ExportedProgram.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments (what a
            tokenizer returns). Every dimension becomes dynamic as far as the model allows, size 1 too.
        example_kwargs: further keyword arguments.
        recipe: a preset's name (see `list_recipes()`), a JSON path, a dict or a Recipe.
        calibration: data for recipes with static scales (`hero-m2`, `hero-m3`): an iterable of batches, each a
            tensor, a tuple of positional arguments or a dict of keyword arguments; a function that is given the model
            and calls it; `Statistics` of an earlier run, or the path of their file.
        dynamic_shapes: as for `torch.export.export`; None for all dynamic.
        strict: raise when anything the recipe names was not quantized.
        check: hold every pass to its numerics contract on the example inputs (runs the model after each pass), and
            name in the report what saturates on them.
        dump: directory that receives the readable graph after each pass.

    Raises:
        CalibrationError: the recipe needs calibration data and there is none, or it does not fit the model.
        CaptureError: the model cannot be captured, is in training mode, or an input needs grad.
        RecipeError: the recipe is malformed, or a rule matches no layer.
        WeightError: a weight holds NaN or Inf.
        StrictError: with `strict`, something stayed in float.
    """
    options = Options.parse(
        {"recipe": recipe, "calibration": calibration, "strict": strict, "check": check, "dump": dump}
    )
    args, kwargs = _as_call(example_inputs, example_kwargs)
    require_calibration(options, _name(model))
    program = capture(model, args, kwargs, options.recipe, dynamic_shapes)
    convention = CallingConvention.of(program)
    if calibration is not None and not options.recipe.needs_data:
        program.notes.append(f"calibration data was not needed: recipe {options.recipe.name} chooses nothing by data")
    if options.recipe.methods_with_data:
        chosen: dict[str, dict[Any, Any]] = {}
        program.weight_cache = lambda name: chosen.setdefault(name, {})
    return QuantizedModel(_run_passes(program, options), convention, model)


def _run_passes(program: Program, options: Options) -> Program:
    program.calibration = options.calibration
    default_pipeline().run(program, check=options.check, dump=options.dump)
    if options.check:
        program.notes += saturation_notes(program)
    if options.strict:
        require_all(program)
    return program


def export_onnx(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    path: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe = "w8a8",
    calibration: Any = None,
    target: str = "onnxruntime",
    opset: int = 21,
    float_dtype: str | torch.dtype | None = None,
    with_past: bool = False,
) -> ExportReport:
    """Quantize a model and write it as an ONNX file.

    Args:
        model, example_inputs, recipe, calibration: as for `quantize`; the inputs need no cache, also `with_past`.
        path, target, opset, float_dtype, with_past: as for `QuantizedModel.export_onnx`.

    Raises:
        ZQError: as `quantize` and `QuantizedModel.export_onnx` raise it.
    """
    quantized = quantize(model, example_inputs, recipe=recipe, calibration=calibration)
    return quantized.export_onnx(path, target, opset, float_dtype, with_past)


def _name(model: object) -> str:
    return type(model).__name__


def _as_call(inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), dict(kwargs or {})
    if isinstance(inputs, Mapping):
        return (), {**inputs, **(kwargs or {})}
    return tuple(inputs), dict(kwargs or {})
