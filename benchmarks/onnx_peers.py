"""Quantized ONNX files side by side in ONNX Runtime on the CPU: its own quantizers, ModelOpt and this package.

    python -m benchmarks.onnx_peers [--shape minilm] [--batch 1 --batch 8] [--modelopt path/to/venv/bin/python]

Real weights for MiniLM, random ones for the other shapes. All files of a row group run in one process, in turn, on one
thread; a row has the median of the process's CPU time and the signal-to-noise ratio against torch's float32 output.
Static recipes are calibrated on other inputs than those that are timed. Without VNNI, files of this package run with
`session.x64quantprecision`, as their export report asks; the others with the default options, with which integer
products may lose sums there. `--exact` runs all with it, `--inexact` ours without it as well.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zq_compiler as zq
from benchmarks.real_models import minilm, news_articles

SEQUENCE, VOCABULARY = 128, 8000
CALIBRATION_BATCHES = 8
Feed = dict[str, Tensor]
OURS = ("w8a8", "w8a8-plain", "hero-m2", "hero-m3")
MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
source, target = sys.argv[1:]
quantize(source, quantize_mode="int8", calibration_data=dict(np.load(source + ".npz")), output_path=target,
         calibration_method="max", calibration_eps=["cpu"], high_precision_dtype="fp32", opset=21)
"""


class FirstOutput(nn.Module):
    """A model as a function of token ids and mask that returns one tensor: hidden states, or logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


@dataclass
class Task:
    """A model, a batch to time, others to calibrate on."""

    model: FirstOutput
    timed: Feed
    calibration: list[Feed]


def encode(tokenizer: Any, texts: list[str]) -> Feed:
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=SEQUENCE, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def real_minilm(batch: int) -> Task:
    tokenizer, model = minilm()
    texts = [article.text for article in news_articles()][: batch * (CALIBRATION_BATCHES + 1)]
    batches = [encode(tokenizer, texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return Task(FirstOutput(model), batches[0], batches[1:])


def random_shape(make: Callable[[Any], nn.Module]) -> Callable[[int], Task]:
    def task(batch: int) -> Task:
        import transformers

        torch.manual_seed(0)
        model = make(transformers).eval()
        model.config.use_cache = False  # type: ignore[union-attr]
        ids = [torch.randint(3, VOCABULARY, (batch, SEQUENCE)) for _ in range(CALIBRATION_BATCHES + 1)]
        batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
        return Task(FirstOutput(model), batches[0], batches[1:])

    return task


def _bert(hf: Any) -> nn.Module:
    return hf.BertModel(hf.BertConfig(vocab_size=VOCABULARY), add_pooling_layer=False)


def _gpt2(hf: Any) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0))


def _llama(hf: Any) -> nn.Module:  # SmolLM2-135M's shape, at half of its depth
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=15, **shape))


TASKS: dict[str, Callable[[int], Task]] = {
    "minilm": real_minilm,
    "bert-base": random_shape(_bert),
    "gpt2": random_shape(_gpt2),
    "llama": random_shape(_llama),
}


def float_file(task: Task, path: Path) -> Path:
    """What torch's exporter writes: the file that a user of the other quantizers starts from."""
    length, batch = torch.export.Dim("tokens", max=512), torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            task.model,
            kwargs=task.timed,
            dynamo=True,
            opset_version=21,
            dynamic_shapes={
                name: {0: batch if len(task.timed["input_ids"]) > 1 else torch.export.Dim.STATIC, 1: length}
                for name in task.timed
            },
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    return path


def peers(task: Task, folder: Path, modelopt: str | None) -> Iterator[tuple[str, Path]]:
    """Files of the other quantizers, made from the same float file."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = float_file(task, folder / "float.onnx")
    yield "float32", source
    prepared = folder / "prepared.onnx"
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        for name, activations in (
            ("quantize_static U8S8", QuantType.QUInt8),
            ("quantize_static S8S8", QuantType.QInt8),
        ):
            path = folder / f"{name.replace(' ', '_')}.onnx"
            quantize_static(
                str(prepared),
                str(path),
                _Reader(task.calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                activation_type=activations,
                weight_type=QuantType.QInt8,
            )
            yield name, path
        path = folder / "dynamic.onnx"
        quantize_dynamic(str(prepared), str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
        yield "quantize_dynamic", path
    if modelopt is not None:
        arrays: dict[str, Any] = {name: x.numpy() for name, x in _stacked(task.calibration).items()}
        np.savez(f"{prepared}.npz", **arrays)
        path = folder / "modelopt.onnx"
        subprocess.run([modelopt, "-c", MODELOPT, str(prepared), str(path)], check=True, capture_output=True)
        yield "ModelOpt int8", path


class _Reader:
    """Calibration batches as ONNX Runtime reads them."""

    def __init__(self, batches: list[Feed]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.rest, None)
        return {name: x.numpy() for name, x in batch.items()} if batch is not None else None


def _stacked(batches: list[Feed]) -> Feed:
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def ours(task: Task, folder: Path) -> Iterator[tuple[str, Path]]:
    for recipe in OURS:
        calibration = task.calibration if zq.load_recipe(recipe).calibrated else None
        quantized = zq.quantize(task.model, task.timed, recipe=recipe, calibration=calibration)
        path = folder / f"{recipe}.onnx"
        quantized.export_onnx(path)
        yield f"zeroquant {recipe}", path


def session(path: Path, exact: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass
class Row:
    """One file's figures."""

    name: str
    median: float  # milliseconds
    sqnr: float  # dB
    megabytes: float


def measure(task: Task, files: dict[str, Path], rounds: int, exact: bool = False, inexact: bool = False) -> list[Row]:
    """All files in turn, round by round; those of other tools that ONNX Runtime refuses are named and left out."""
    with torch.no_grad():
        want = task.model(**task.timed)
    saturates = not torch.cpu.get_capabilities().get("avx512_vnni", False)
    sessions = {}
    for name, path in files.items():
        is_ours = name.startswith("zeroquant")
        if is_ours and inexact and saturates:
            sessions[f"{name}, inexact"] = session(path, False)
        try:
            sessions[name] = session(path, saturates and (exact or is_ours))
        except Fail as error:
            if is_ours:
                raise
            print(f"{name} is not loaded: {error}")
    feed = {name: x.numpy() for name, x in task.timed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    results: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        for name, made in sessions.items():
            started = time.process_time()
            results[name] = made.run(None, feed)[0]
            if number:  # the first is a warm-up
                seconds[name].append(time.process_time() - started)
    mask = task.timed["attention_mask"].bool()
    return [
        Row(
            name,
            1e3 * statistics.median(seconds[name]),
            float(_sqnr(want[mask], torch.from_numpy(results[name])[mask])),
            files[name.removesuffix(", inexact")].stat().st_size / 1e6,
        )
        for name in sessions
    ]


def _sqnr(want: Tensor, got: Tensor) -> Tensor:
    return 10 * torch.log10(want.pow(2).sum() / (want - got).pow(2).sum())


def dominated(rows: list[Row]) -> list[str]:
    """Of our files, those that some other quantizer's is both faster and more accurate than."""
    others = [r for r in rows if not r.name.startswith(("zeroquant", "float32"))]
    mine = [r for r in rows if r.name.startswith("zeroquant")]
    return [f"{m.name} by {o.name}" for m in mine for o in others if o.median < m.median and o.sqnr > m.sqnr]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main(
    shape: Annotated[list[str], typer.Option(help=f"Of {', '.join(TASKS)}.")] = list(TASKS),  # noqa: B006
    batch: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed runs of each file.")] = 15,
    exact: Annotated[bool, typer.Option(help="Run the other tools' files with x64quantprecision too.")] = False,
    inexact: Annotated[bool, typer.Option(help="Run this package's files without x64quantprecision as well.")] = False,
    modelopt: Annotated[str | None, typer.Option(help="A Python that has nvidia-modelopt[onnx].")] = None,
) -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    console = Console()
    for name in shape:
        for size in batch:
            with tempfile.TemporaryDirectory() as scratch:
                task = TASKS[name](size)
                files = {
                    n: p for make in (peers(task, Path(scratch), modelopt), ours(task, Path(scratch))) for n, p in make
                }
                rows = measure(task, files, rounds, exact, inexact)
            fastest = min(r.median for r in rows if not r.name.startswith(("zeroquant", "float32")))
            table = Table(
                "file", "ms", "of the fastest INT8 peer", "SQNR dB", "MB", title=f"{name}, {size} x {SEQUENCE}"
            )
            for r in rows:
                table.add_row(
                    r.name, f"{r.median:.1f}", f"{r.median / fastest:.2f}", f"{r.sqnr:.1f}", f"{r.megabytes:.1f}"
                )
            console.print(table)
            console.print(f"dominated: {', '.join(dominated(rows)) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
