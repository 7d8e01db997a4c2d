"""Side-by-side CPU latency of one encoder under every compiler we know of, in one run with alternating rounds.

Every contestant lives in a process of its own, because torch, Inductor and oneDNN keep global settings; the parent lets
them run one after another, round by round, so that noise from the machine falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

SHAPES = {  # hidden size, layers, heads
    "bert-base": (768, 12, 12),
    "minilm-l6": (384, 6, 12),
    "bert-tiny": (128, 2, 2),
}
Inputs = tuple[torch.Tensor, torch.Tensor]
Runner = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What every contestant has to run."""

    model: str
    batch: int
    seq: int
    threads: int
    folder: str  # scratch, for exported graphs and for each contestant's output


class Encoder(nn.Module):
    """BERT as one function of two tensors, which is what exporters want."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        hidden, layers, heads = SHAPES[shape]
        config = BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


def encoder_and_inputs(job: Job) -> tuple[Encoder, Inputs]:
    """The same weights and tokens in every process."""
    torch.manual_seed(0)
    encoder = Encoder(job.model).eval()
    ids = torch.randint(1000, 30000, (job.batch, job.seq))
    return encoder, (ids, torch.ones_like(ids))


def torch_runner(model: Callable[..., torch.Tensor], inputs: Inputs) -> Runner:
    return lambda: model(*inputs).float().numpy()


def inductor(model: nn.Module, inputs: Inputs) -> Runner:
    """Frozen weights: Inductor then prepacks them and finds its int8 patterns."""
    import torch._inductor.config as inductor_config

    inductor_config.freezing = True
    return torch_runner(torch.compile(model), inputs)


def eager_fp32(job: Job) -> Runner:
    return torch_runner(*encoder_and_inputs(job))


def compile_fp32(job: Job) -> Runner:
    return inductor(*encoder_and_inputs(job))


def compile_bf16(job: Job) -> Runner:
    encoder, inputs = encoder_and_inputs(job)
    return inductor(encoder.bfloat16(), inputs)


def torchao_int8(job: Job) -> Runner:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    encoder, inputs = encoder_and_inputs(job)
    quantize_(encoder, Int8DynamicActivationInt8WeightConfig())
    return inductor(encoder, inputs)


def torchao_pt2e(job: Job) -> Runner:
    """Static activation scales, calibrated on the very input that is timed: the best case for a static scheme."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    encoder, inputs = encoder_and_inputs(job)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(encoder, inputs).module(), quantizer)
    prepared(*inputs)
    return inductor(move_exported_model_to_eval(convert_pt2e(prepared)), inputs)


def onnx_graph(job: Job) -> tuple[str, dict[str, np.ndarray]]:
    """The encoder in ONNX with ONNX Runtime's own transformer fusions."""
    from onnxruntime.transformers import optimizer

    encoder, inputs = encoder_and_inputs(job)
    # Two contestants export, in processes of their own: each gets a folder.
    path = f"{tempfile.mkdtemp(dir=job.folder)}/encoder.onnx"
    # The optimizer's patterns are written for what the TorchScript exporter emits, and for unfused attention.
    encoder.bert.config._attn_implementation = "eager"
    torch.onnx.export(encoder, inputs, path, input_names=["ids", "mask"], opset_version=17, dynamo=False)
    hidden, _, heads = SHAPES[job.model]
    optimizer.optimize_model(path, "bert", heads, hidden, opt_level=0).save_model_to_file(path)
    return path, {"ids": inputs[0].numpy(), "mask": inputs[1].numpy()}


def ort_session(path: str, feed: dict[str, np.ndarray], threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def ort_fp32(job: Job) -> Runner:
    return ort_session(*onnx_graph(job), job.threads)


def ort_int8(job: Job) -> Runner:
    """Dynamic uint8 activations: signed ones fall to a slow loop on x86."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, feed = onnx_graph(job)
    # The fused operators have no shape inference, so the quantizer has to be told that their outputs are float.
    told = {"DefaultTensorType": 1}
    quantize_dynamic(path, path + ".int8", weight_type=QuantType.QInt8, per_channel=True, extra_options=told)
    return ort_session(path + ".int8", feed, job.threads)


def openvino_runner(job: Job, precision: str | None, quantize: bool = False) -> Runner:
    import openvino

    encoder, inputs = encoder_and_inputs(job)
    model = openvino.convert_model(encoder, example_input=inputs)
    feed = [tensor.numpy() for tensor in inputs]
    if quantize:
        import nncf

        model = nncf.quantize(model, nncf.Dataset([feed]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.compile_model(model, "CPU", config)
    return lambda: compiled(feed)[0]


def openvino_fp32(job: Job) -> Runner:
    return openvino_runner(job, "f32")


def openvino_int8(job: Job) -> Runner:
    """What is not quantized runs in OpenVINO's default precision: bf16 where the processor has it."""
    return openvino_runner(job, None, quantize=True)


def zeroquant(job: Job) -> Runner:
    import zq_compiler.backend

    # Installed, the backend has a name; from a bare checkout the function itself does.
    named = "zeroquant" in torch._dynamo.list_backends(exclude_tags=())
    encoder, inputs = encoder_and_inputs(job)
    return torch_runner(torch.compile(encoder, backend="zeroquant" if named else zq_compiler.backend.zeroquant), inputs)


def zeroquant_hero(job: Job) -> Runner:
    """Static scales, calibrated on the very input that is timed, as the other static schemes here are."""
    import zq_compiler

    encoder, inputs = encoder_and_inputs(job)
    quantized = zq_compiler.quantize(encoder, inputs, recipe="hero-m3", calibration=[inputs])
    return torch_runner(quantized.compile(), inputs)


EAGER, OURS = "torch eager fp32", ("zq_compiler w8a8", "zq_compiler hero-m3")
CONTESTANTS: dict[str, Callable[[Job], Runner]] = {
    EAGER: eager_fp32,
    "torch.compile fp32": compile_fp32,
    "torch.compile bf16": compile_bf16,
    "torchao int8 dynamic": torchao_int8,
    "torchao int8 static (PT2E)": torchao_pt2e,
    "ONNX Runtime fp32": ort_fp32,
    "ONNX Runtime int8 dynamic": ort_int8,
    "OpenVINO fp32": openvino_fp32,
    "OpenVINO int8 (NNCF)": openvino_int8,
    OURS[0]: zeroquant,
    OURS[1]: zeroquant_hero,
}


def worker(name: str, job: Job) -> None:
    """Builds one contestant, then times calls whenever the parent writes how many it wants."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like; only answers go to the parent
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.threads)
    clock = time.process_time if job.threads == 1 else time.perf_counter
    with torch.no_grad():
        try:
            started = time.perf_counter()
            run = CONTESTANTS[name](job)
            for _ in range(3):  # the first calls compile
                output = run()
            built = time.perf_counter() - started
            np.save(Path(job.folder) / f"{name}.npy", output)
            print(json.dumps({"built_s": built}), file=answers, flush=True)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            print(json.dumps({"error": f"{type(error).__name__}: {reason}"}), file=answers, flush=True)
            return
        for request in sys.stdin:
            times = []
            for _ in range(int(request)):
                started = clock()
                run()
                times.append((clock() - started) * 1e3)
            print(json.dumps(times), file=answers, flush=True)


@dataclass
class Contestant:
    """The parent's end of one worker, and what came of it."""

    name: str
    job: Job
    times: list[float] = field(default_factory=list)
    built_s: float = 0.0
    cosine: float = float("nan")
    not_run: str | None = None

    def start(self) -> None:
        threads = str(self.job.threads)
        log = (Path(self.job.folder) / f"{self.name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", "--worker", self.name, json.dumps(asdict(self.job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        )
        answer = self.ask()
        self.built_s = answer.get("built_s", 0.0)
        self.not_run = answer.get("error")
        if self.not_run is None:
            self.output = np.load(Path(self.job.folder) / f"{self.name}.npy").astype(np.float64).ravel()

    def ask(self, calls: int | None = None) -> Any:
        """The worker's next answer, after asking for `calls` timed calls; a dead worker answers with its last words."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            if calls:
                print(calls, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        log = (Path(self.job.folder) / f"{self.name}.log").read_text().split("\n")
        return {"error": next((text for text in reversed(log) if text.strip()), "the worker ended without a word")}

    def round(self, calls: int) -> None:
        answer = self.ask(calls)
        if isinstance(answer, list):
            self.times += answer
        else:
            self.not_run = answer["error"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def machine() -> dict[str, str]:
    """Processor, instruction sets that matter for int8, and versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(re.findall(r"\b(?:avx2|avx512f|avx_vnni|avx512_vnni|avx512_bf16|amx_int8|amx_bf16)\b", cpuinfo))
    name = re.search(r"model name\s*: (.*)", cpuinfo)
    facts = {"cpu": name[1] if name else platform.processor(), "isa": " ".join(sorted(flags))}
    for package in ("torch", "transformers", "torchao", "onnxruntime", "openvino", "nncf", "zq-compiler"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    return facts


def report(contestants: list[Contestant], job: Job, console: Console) -> list[dict[str, Any]]:
    """Prints the table; returns its rows."""
    ran = {c.name: c for c in contestants if c.not_run is None}
    median = {name: statistics.median(c.times) for name, c in ran.items()}
    peers = {name: value for name, value in median.items() if name not in (*OURS, EAGER)}
    best = min(peers, key=peers.__getitem__, default=None)
    clock = "process CPU time" if job.threads == 1 else "wall time"
    title = f"{job.model}, batch {job.batch}, {job.seq} tokens, {job.threads} thread(s): ms per call, {clock}"
    table = Table("", "median", "min", "x eager fp32", "x best peer", "cosine", title=title)
    rows: list[dict[str, Any]] = []
    for c in contestants:
        row: dict[str, Any] = {"name": c.name, "not_run": c.not_run}
        if c.not_run is None:
            row |= {"median_ms": median[c.name], "min_ms": min(c.times), "cosine": c.cosine, "built_s": c.built_s}
            row["speedup_over_eager"] = median[EAGER] / median[c.name] if EAGER in median else None
            row["speedup_over_best_peer"] = median[best] / median[c.name] if best else None
            speedups = (row["speedup_over_eager"], row["speedup_over_best_peer"])
            ratios = [f"{speedup:.2f}" if speedup else "-" for speedup in speedups]
            style = "bold" if c.name in OURS else "green" if c.name == best else ""
            cells = [f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}", *ratios, f"{c.cosine:.5f}"]
            table.add_row(c.name, *cells, style=style)
        else:
            table.add_row(c.name, "not run", style="dim")
        rows.append(row)
    console.print(table)
    for c in contestants:
        if c.not_run:
            console.print(f"{c.name}: not run: {c.not_run}", style="dim", markup=False)
    return rows


def main(
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(SHAPES)}.")] = "bert-base",
    batch: int = 1,
    seq: int = 128,
    threads: int = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; contestants alternate within each.")] = 8,
    calls: Annotated[int, typer.Option(help="Timed calls per contestant and round.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Contestants with this in their name.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
) -> None:
    """Times every compiler on the same encoder."""
    if model not in SHAPES:
        raise typer.BadParameter(f"choose from {', '.join(SHAPES)}", param_hint="--model")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, batch, seq, threads, folder)
        names = [name for name in CONTESTANTS if name == EAGER or not only or any(part in name for part in only)]
        contestants = [Contestant(name, job) for name in names]
        try:
            for c in contestants:
                with console.status(f"building {c.name}"):
                    c.start()
                if c.not_run is None and contestants[0].not_run is None:
                    a, b = c.output, contestants[0].output
                    c.cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
            for turn in range(rounds):
                for c in contestants:
                    if c.not_run is None:
                        with console.status(f"round {turn + 1} of {rounds}: {c.name}"):
                            c.round(calls)
        finally:
            for c in contestants:
                if hasattr(c, "process"):
                    c.stop()
        rows = report(contestants, job, console)
        facts = machine()
        console.print(", ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
        if json_file:
            settings = {key: value for key, value in asdict(job).items() if key != "folder"}
            settings |= {"rounds": rounds, "calls": calls}
            json_file.write_text(json.dumps({"settings": settings, "machine": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Job(**json.loads(sys.argv[3])))
    else:
        typer.run(main)
