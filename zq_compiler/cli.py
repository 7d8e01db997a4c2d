"""The command line: `zq` with `quantize`, `export`, `certify`, `report`, `lint`, `sensitivity`, `search`, `bench`..."""

from __future__ import annotations

import inspect
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .analysis.bench import bench as time_model
from .analysis.bench import bench_kernels, device_milliseconds, environment, markdown
from .analysis.report import LayerReport, Report
from .analysis.search import search as search_recipe
from .analysis.sensitivity import sensitivity as measure_sensitivity
from .api import QuantizedModel, load
from .api import export_onnx as export_model
from .api import quantize as quantize_model
from .errors import CaptureError, ZQError
from .lowering import inductor
from .lowering.lint import lint as lint_file
from .program import fake_value
from .recipe import QRule, Recipe, list_recipes, load_recipe
from .serialize import is_saved_model, read_report
from .torch_private import concrete


class _Group(TyperGroup):
    """Shows our own errors as one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ZQError as error:
            if ctx.params["traceback"]:
                raise
            line = " ".join(str(error).split())
            Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Quantize transformer models after training, the ZeroQuant way."""


ModelPath = Annotated[Path, typer.Argument(help="Local folder of a transformers model, or a torch.export .pt2 file.")]
RecipeName = Annotated[str, typer.Option(help="A name from `zq recipes`, or a recipe's JSON file.")]
Patterns = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Layers to leave in float, by dotted name; repeatable.")
]
Table8 = Literal["float", "int8"]
Texts = Annotated[list[str] | None, typer.Option(help="Text for the example inputs, through the folder's tokenizer.")]

Calibration = Annotated[
    Path | None,
    typer.Option(help="Text file, a text a line, for the folder's tokenizer; or .safetensors of statistics."),
]


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    table = Table("recipe", "what it does")
    for name, description in list_recipes().items():
        table.add_row(name, description)
    Console().print(table)


@app.command()
def quantize(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    recipe: RecipeName = "w8a8",
    leave_float: Patterns = None,
    embedding: Annotated[Table8 | None, typer.Option(help="How embedding tables are stored.")] = None,
    lm_head: Annotated[Table8 | None, typer.Option(help="How the projection onto the vocabulary is computed.")] = None,
    text: Texts = None,
    calibration: Calibration = None,
    statistics: Annotated[Path | None, typer.Option(help="File to write what calibration saw to.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the example inputs.")] = 2,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the example inputs.")] = 16,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when a layer the recipe names stays in float.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Hold every pass to its numerics contract.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Folder for the readable graph after each pass.")] = None,
) -> None:
    """Quantize a model, save it as a folder, and print what happened."""
    chosen = _recipe(recipe, leave_float, embedding, lm_head)
    float_model, inputs = _float_model(model, text, batch, seq_len)
    quantized = quantize_model(
        float_model,
        inputs,
        recipe=chosen,
        calibration=_calibration(calibration, model, inputs),
        strict=strict,
        check=check,
        dump=str(dump) if dump else None,
    )
    quantized.save(out)
    if statistics is not None and quantized.statistics is not None:
        quantized.statistics.save(statistics)
    Console().print(quantized.report())
    print(f"saved: {out}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A saved model; or a float model, as for `zq quantize`.")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    target: Annotated[str, typer.Option(help="onnxruntime, onnxruntime-cuda or tensorrt.")] = "onnxruntime",
    recipe: Annotated[str | None, typer.Option(help="For a float model; w8a8 unless given.")] = None,
    float_dtype: Annotated[str | None, typer.Option(help="Of the file's floats: float16, bfloat16, float32.")] = None,
    calibration: Calibration = None,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="A key-value cache goes in and out, for generation.")
    ] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Read weights from the saved model, which is in the folder of OUT.")
    ] = False,
) -> None:
    """Write an ONNX file."""
    if not is_saved_model(model):
        if share:
            raise ZQError("is no saved model", where=str(model), fix="leave --share out, or run zq quantize first")
        float_model, inputs = _float_model(model, None, 2, 16)
        data = _calibration(calibration, model, inputs)
        print(
            export_model(
                float_model,
                inputs,
                out,
                recipe=recipe or "w8a8",
                calibration=data,
                target=target,
                float_dtype=float_dtype,
                with_past=with_past,
            )
        )
        return
    _refuse_for_saved(model, recipe, calibration)
    saved = model if share else None
    print(load(model).export_onnx(out, target=target, float_dtype=float_dtype, with_past=with_past, saved=saved))


@app.command()
def certify(
    model: Annotated[Path, typer.Argument(help="What the file was exported from: a saved model, or a float model.")],
    file: Annotated[Path, typer.Argument(help="ONNX file that `zq export` wrote.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write the certificate to.")] = None,
    recipe: Annotated[str | None, typer.Option(help="For a float model; w8a8 unless given.")] = None,
    calibration: Calibration = None,
) -> None:
    """Compare the reference, Inductor's ops and an ONNX file op by op; fails where they differ."""
    if is_saved_model(model):
        _refuse_for_saved(model, recipe, calibration)
        quantized = load(model)
        inputs = _inputs_of(quantized)
    else:
        float_model, inputs = _float_model(model, None, 2, 16)
        data = _calibration(calibration, model, inputs)
        quantized = quantize_model(float_model, inputs, recipe=recipe or "w8a8", calibration=data)
        inputs = {}  # the quantized model holds them, also those of a graph with a cache
    certificate = quantized.certify(file, **inputs)
    print(certificate)
    if out is not None:
        certificate.save(out)
    if not certificate.passed:
        raise typer.Exit(1)


def _inputs_of(quantized: QuantizedModel) -> dict[str, torch.Tensor]:
    """Inputs of the sizes that a saved model was captured with: ones for integers, which are legal ids and masks."""
    generator, inputs = torch.Generator().manual_seed(0), {}
    for node in quantized.program.graph.find_nodes(op="placeholder"):
        fake = fake_value(node)
        if not isinstance(fake, torch.Tensor):
            raise ZQError("takes an input that is no tensor", where=node.name, fix="call certify() from Python")
        shape = [concrete(size) for size in fake.shape]
        noise = torch.randn(shape, generator=generator)
        inputs[str(node.target)] = (
            noise.to(fake.dtype) if fake.is_floating_point() else torch.ones_like(noise).to(fake.dtype)
        )
    return inputs


def _refuse_for_saved(model: Path, recipe: str | None, calibration: Path | None) -> None:
    if given := [f"--{name}" for name, x in (("recipe", recipe), ("calibration", calibration)) if x is not None]:
        raise ZQError("is quantized already", where=str(model), fix=f"leave {given[0]} out, or give the float model")


@app.command()
def report(
    saved: Annotated[Path, typer.Argument(help="Folder that `zq quantize` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the report of a saved model."""
    data = read_report(saved)
    if as_json:
        print(json.dumps(data, indent=2))
        return
    layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in data["layers"]]
    Console().print(Report(**{**{k: v for k, v in data.items() if k != "counts"}, "layers": layers}))


@app.command()
def lint(
    model: Annotated[Path, typer.Argument(help="ONNX file, written by any tool.")],
    target: Annotated[str, typer.Option(help="tensorrt, onnxruntime or onnxruntime-cuda.")] = "tensorrt",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what a runtime will refuse, get wrong or compute in floats; fail if there is any."""
    found = lint_file(model, target)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        Console().print(found)
    if not found.ok:
        raise typer.Exit(1)


TextFile = Annotated[Path, typer.Argument(help="Text file, a text a line, for the folder's tokenizer.")]
Batches = Annotated[int, typer.Option(min=1, help="How many batches of 16 texts to measure on.")]


@app.command()
def sensitivity(model: ModelPath, texts: TextFile, recipe: RecipeName = "hero-m3", batches: Batches = 2) -> None:
    """Rank the layers by what each alone, quantized as the recipe has it, does to the model's output."""
    float_model, inputs = _float_model(model, None, 2, 16)
    data = _batches(texts, model, inputs)
    rows = measure_sensitivity(float_model, data[:batches], recipe, calibration=data)
    table = Table("layer", "role", "scheme", "SQNR, dB", "% of the work")
    for row in rows:
        table.add_row(row.layer, row.role.value, row.scheme, f"{row.sqnr:.1f}", f"{100 * row.work:.2f}")
    Console().print(table)


@app.command()
def search(
    model: ModelPath,
    texts: TextFile,
    out: Annotated[Path, typer.Argument(help="Recipe to write, as JSON.")],
    budget: Annotated[float, typer.Option(help="Least SQNR of the model's first output of floats, in dB.")],
    recipe: RecipeName = "hero-m3",
    batches: Batches = 2,
) -> None:
    """Find the recipe with the most INT8 whose output stays within a budget."""
    float_model, inputs = _float_model(model, None, 2, 16)
    data = _batches(texts, model, inputs)
    found = search_recipe(float_model, data[:batches], budget=budget, recipe=recipe, calibration=data)
    found.recipe.save(out)
    print(found)
    print(f"saved: {out}")


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Local folder of a transformers model; a BERT-base of random weights without.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe's name or file; repeatable.  [default: w8a8]")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the inputs.")] = 1,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the inputs.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each contestant.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
) -> None:
    """Time a model as it is, under torch.compile, and quantized, side by side; on CUDA each kernel too."""
    what, recipes = environment(device), [load_recipe(name) for name in recipe or ["w8a8"]]
    if model is None:
        float_model = _random_bert()
        inputs, name = example_inputs(float_model, batch, seq_len), "BERT-base of random weights"
    elif model.suffix == ".pt2":
        raise ZQError("bench times modules", where=str(model), fix="give the folder of a transformers model")
    else:
        (float_model, inputs), name = _float_model(model, None, batch, seq_len), model.name
    with _page(out or Path(os.devnull)) as page:

        def say(*lines: str) -> None:  # at once: a run may be cut off, and kernels take minutes
            for line in lines:
                print(line, flush=True)
                print(line, file=page, flush=True)

        say(f"# {name}, batch {batch}, {seq_len} tokens", "", what, "")
        tell = partial(print, file=sys.stderr, flush=True)
        say(*markdown(time_model(float_model, inputs, recipes, device, rounds, tell)))
        if device == "cuda":
            say("", "# Kernels", "")
            for line in bench_kernels():
                say(line)


def _page(path: Path) -> TextIO:
    try:
        return path.open("w")
    except OSError as error:
        raise ZQError(f"cannot be written: {error.strerror}", where=str(path), fix="give a file in a folder") from error


@app.command()
def tune(
    model: Annotated[
        Path | None, typer.Argument(help="Local folder of a transformers model; a BERT-base of random weights without.")
    ] = None,
    recipe: RecipeName = "w8a8",
    rows: Annotated[
        list[int] | None, typer.Option(help="Tokens to tune for; repeatable.  [default: 1, 16, 128, 512, 2048, 8192]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; by default the one that is read from then on.")] = None,
) -> None:
    """Time tiles of the CUDA kernels that a model runs, in float16, and keep the fastest."""
    if not torch.cuda.is_available():
        raise ZQError("no CUDA device is available", where="zq tune", fix="run it on a machine with an NVIDIA GPU")
    from .analysis.tune import Tuner, save  # imported late: it needs Triton
    from .kernels.cuda import configs, registration

    float_model = (_random_bert() if model is None else _float_model(model, None, 2, 16)[0]).half().to("cuda")

    def inputs(batch: int, seq_len: int) -> dict[str, Any]:
        return {name: value.to("cuda") for name, value in example_inputs(float_model, batch, seq_len).items()}

    quantized = quantize_model(float_model, inputs(2, 16), recipe=recipe)
    tuner = Tuner(inductor.lower(quantized.program).gm, device_milliseconds)
    path = out or configs.tuned_file(registration.architecture(torch.device("cuda")))
    for count in rows or (1, 16, 128, 512, 2048, 8192):
        batch = -(-count // 128)
        with torch.no_grad():
            tuner.run(*quantized.convention.flatten((), inputs(batch, -(-count // batch))))
        save(tuner.tuned, path, torch.cuda.get_device_name())
    table = Table("op", "m", "n", "k", "tiles", "ms", "before", "tried", "refused")
    for row in tuner.tuned:
        tiles = " ".join(f"{name} {value}" for name, value in row.config.items())
        sizes = map(str, (row.m, row.n, row.k))
        table.add_row(
            row.op, *sizes, tiles, f"{row.milliseconds:.4f}", f"{row.before:.4f}", str(row.tried), str(row.refused)
        )
    Console().print(table)
    print(f"saved: {path}")


def _random_bert() -> Any:
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise ZQError(
            "transformers is not installed", where="zq bench", fix="pip install 'zq-compiler[demo]'"
        ) from None
    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


def _batches(texts: Path, model: Path, inputs: dict[str, Any]) -> Any:
    """Batches from a text file."""
    if texts.suffix == ".safetensors":
        raise ZQError("holds no texts", where=str(texts), fix="give a text file, a text a line")
    return _calibration(texts, model, inputs)


def _recipe(name: str, leave_float: list[str] | None, embedding: str | None, lm_head: str | None) -> Recipe:
    changes = {key: value for key, value in (("embedding", embedding), ("lm_head", lm_head)) if value is not None}
    rules = [QRule.leave_float(p, f"--leave-float {p}") for p in leave_float or ()]
    return load_recipe(name).with_rules(*rules).replace(**changes)


# --- float models and their example inputs -------------------------------------------------------------------------


def _float_model(path: Path, text: list[str] | None, batch: int, seq_len: int) -> tuple[Any, dict[str, Any]]:
    """The model behind a path, and inputs to capture it with."""
    if path.suffix == ".pt2" and path.is_file():
        if text is not None:
            raise ZQError("--text is for folders with a tokenizer", where=str(path), fix="leave it out")
        return torch.export.load(path), {}  # it was captured already
    if not (path / "config.json").is_file():
        raise ZQError(
            "is neither a folder of a transformers model nor a .pt2 file of torch.export",
            where=str(path),
            fix="give a local folder with config.json and weights, as save_pretrained writes; nothing is fetched",
        )
    # transformers reads this when it is imported, and would otherwise ask its hub about local folders too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        raise ZQError("transformers is not installed", where=str(path), fix="pip install 'zq-compiler[demo]'") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        architecture = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        model_class = getattr(transformers, architecture, transformers.AutoModel)
        model = model_class.from_pretrained(path, local_files_only=True).eval()
        if text is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            encoded = tokenizer(text, padding=len(text) > 1, return_tensors="pt")
    except (OSError, ValueError) as error:
        raise ZQError(
            f"transformers cannot load it: {error}", where=str(path), fix="check the folder's files"
        ) from error
    inputs = example_inputs(model, batch, seq_len)
    if text is None:
        return model, inputs
    if "input_ids" not in inputs:
        raise ZQError("--text is for models that read text", where=architecture, fix="leave it out")
    return model, {**inputs, **{name: encoded[name] for name in inputs if name in encoded}}


CALIBRATION_BATCH, CALIBRATION_TOKENS = 16, 128  # as ZeroQuant-HERO calibrates


def _calibration(file: Path | None, model: Path, inputs: dict[str, Any]) -> Any:
    """A list of batches from a text file, or the path of saved statistics."""
    if file is None or file.suffix == ".safetensors":
        return file
    if "input_ids" not in inputs:
        raise ZQError("--calibration is for models that read text", where=str(model), fix="calibrate from Python")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ZQError(f"cannot be read: {error}", where=str(file), fix="give a text file, a text a line") from None
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for start in range(0, len(lines), CALIBRATION_BATCH):
        texts = lines[start : start + CALIBRATION_BATCH]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=CALIBRATION_TOKENS, return_tensors="pt")
        batches.append({name: tokens[name] for name in inputs if name in tokens})
    return batches


def example_inputs(model: Any, batch: int = 2, seq_len: int = 16) -> dict[str, torch.Tensor]:
    """Inputs of the kinds that a transformers model reads, made up from its config.

    Raises:
        CaptureError: the model reads something that a config does not describe.
    """
    config, main = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=model.dtype)

    def tokens() -> torch.Tensor:
        vocabulary = config.get_text_config().vocab_size
        return torch.randint(vocabulary // 2, vocabulary, (batch, seq_len), generator=generator)  # no special tokens

    kinds = {"pixel_values", main} & set(parameters)  # a model of images and text calls the text its main input
    inputs: dict[str, torch.Tensor] = {}
    try:
        if "input_ids" in kinds:
            inputs["input_ids"] = tokens()
            if "attention_mask" in parameters:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "pixel_values" in kinds:
            vision = getattr(config, "vision_config", config)
            size = vision.image_size
            inputs["pixel_values"] = noise(vision.num_channels, *((size, size) if isinstance(size, int) else size))
        if "input_features" in kinds:
            inputs["input_features"] = noise(config.num_mel_bins, 2 * config.max_source_positions)
        if "input_values" in kinds:  # spectrograms, or the sound itself
            spectrogram = hasattr(config, "num_mel_bins")
            inputs["input_values"] = noise(config.max_length, config.num_mel_bins) if spectrogram else noise(16000)
        if "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = tokens()
    except AttributeError as error:
        raise _no_inputs(model, f"its config has no {error.name}") from None
    if main not in inputs:
        raise _no_inputs(model, f"its main input is {main}")
    return inputs


def _no_inputs(model: Any, why: str) -> CaptureError:
    return CaptureError(
        f"no example inputs can be made up: {why}",
        where=type(model).__name__,
        fix="call zq_compiler.quantize(model, example_inputs) from Python, then save()",
    )
