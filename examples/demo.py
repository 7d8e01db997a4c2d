"""What quantizing a real sentence encoder gains and costs, measured on real sentences: the job of `make demo`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zq_compiler as zq
from zq_compiler.analysis.report import LayerReport, Report
from zq_compiler.program import constant_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no installed package
from benchmarks.real_models import ModelNotFetched, minilm, news_sentences

Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]  # last hidden state of a batch
SHAPES = ((1, 128), (32, 128))


@dataclass
class Row:
    """One way to run the model, and how it did."""

    name: str
    weight_bytes: int
    cosine_mean: float = 1.0
    cosine_worst: float = 1.0
    top1_same: float = 1.0
    top10_overlap: float = 1.0
    milliseconds: tuple[float, ...] = ()
    speedups: tuple[float, ...] = ()


def embed(run: Run, batches: Sequence[Batch]) -> Tensor:
    """Sentence vectors: the mean over each sentence's tokens, normalised to length 1."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"][..., None]
        rows.append(torch.nn.functional.normalize((run(batch) * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def compare(row: Row, actual: Tensor, reference: Tensor) -> None:
    """How near the vectors are to those of fp32, and whether they find the same neighbours."""
    cosines = (actual * reference).sum(1)
    row.cosine_mean, row.cosine_worst = cosines.mean().item(), cosines.min().item()
    ours, theirs = (_neighbours(vectors) for vectors in (actual, reference))
    row.top1_same = (ours[:, 0] == theirs[:, 0]).float().mean().item()
    row.top10_overlap = (ours[:, :, None] == theirs[:, None, :]).any(1).float().mean().item()


def _neighbours(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.t()).fill_diagonal_(-2).topk(10).indices


def latencies(runs: dict[str, Run], batch: Batch, rounds: int, budget: float = 30.0) -> dict[str, float]:
    """Median milliseconds of each, measured in turns so that whatever else the machine does falls on all alike.

    A slow or busy machine gets fewer rounds: no more are begun after `budget` seconds.
    """
    for run in runs.values():
        run(batch)  # compiles, where it must
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - begun > budget:
            break
        for name, run in runs.items():
            started = time.perf_counter()
            run(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def in_onnx_runtime(path: Path) -> Run:
    """The exported model, on as many threads as torch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact products on CPUs without VNNI too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(
        session.run(["last_hidden_state"], {name: value.numpy() for name, value in batch.items()})[0]
    )


def tokenized(tokenizer: Any, sentences: Sequence[str], batch: int = 32) -> list[Batch]:
    """Sentences in batches of like length, so that little is padding."""
    by_length = sorted(sentences, key=lambda s: len(tokenizer.tokenize(s)))
    parts = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt")) for part in parts]


def quantized_summary(report: Report) -> list[str]:
    """One line for what became INT8, one for each reason why something did not."""

    def described(layers: Sequence[LayerReport]) -> str:
        kinds = Counter(layer.kind for layer in layers)
        size = sum(layer.bytes_before for layer in layers) / 1e6
        return f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())} ({size:.1f} MB of fp32)"

    lines = [f"INT8   {described([layer for layer in report.layers if layer.got == 'int8'])}"]
    for reason in dict.fromkeys(layer.reason for layer in report.layers if layer.got == "float"):
        layers = [layer for layer in report.layers if layer.got == "float" and layer.reason == reason]
        lines.append(f"float  {described(layers)}: {reason}")
    return lines + [f"note   {note}" for note in report.notes]


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as text."""
    result = Table(title=title)
    columns = ["", "cosine\nmean", "cosine\nworst", "same\ntop 1", "top 10\noverlap"]
    columns += [f"{b} x {t}\n{what}" for b, t in SHAPES for what in ("ms", "speed-up")]
    for column in [*columns, "weights\nMB"]:
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        quality = [
            f"{row.cosine_mean:.5f}",
            f"{row.cosine_worst:.5f}",
            f"{row.top1_same:.1%}",
            f"{row.top10_overlap:.1%}",
        ]
        times = zip(row.milliseconds, row.speedups, strict=True)
        speed = [text for ms, speedup in times for text in (f"{ms:.1f}", f"{speedup:.2f}")]
        result.add_row(row.name, *quality, *speed, f"{row.weight_bytes / 1e6:.1f}")
    return result


def measure(sentences: int, rounds: int) -> tuple[list[Row], Report]:
    """Compile, export, embed and time."""
    tokenizer, model = minilm()
    batches = tokenized(tokenizer, news_sentences(sentences))
    # dynamic: one graph for every batch of more than one sentence, and one for a single sentence
    compiled = torch.compile(model, dynamic=True)
    zeroquant = torch.compile(model, backend="zeroquant", dynamic=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.onnx"
        _say("quantizing and exporting")
        quantized = zq.quantize(model, batches[0])
        exported = quantized.export_onnx(path, target="onnxruntime")
        runs: dict[str, Run] = {
            "fp32 eager": lambda batch: model(**batch).last_hidden_state,
            "fp32 torch.compile": lambda batch: compiled(**batch).last_hidden_state,
            "zeroquant": lambda batch: zeroquant(**batch).last_hidden_state,
            "zeroquant in ONNX Runtime": in_onnx_runtime(path),
        }
        float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        sizes = [float_bytes, float_bytes, constant_bytes(quantized.program.gm), exported.bytes_on_disk]
        rows = [Row(name, size) for name, size in zip(runs, sizes, strict=True)]
        vectors = []
        for name, run in runs.items():
            _say(f"embedding {sentences} sentences: {name}")
            vectors.append(embed(run, batches))
        for row, actual in zip(rows, vectors, strict=True):
            compare(row, actual, vectors[0])
        text = " ".join(news_sentences(64))
        for batch, tokens in SHAPES:
            _say(f"timing {batch} x {tokens}")
            one = tokenizer([text] * batch, truncation=True, max_length=tokens, return_tensors="pt")
            times = latencies(runs, dict(one), rounds * 4 if batch == 1 else rounds)
            for row in rows:
                row.milliseconds += (times[row.name],)
                row.speedups += (times[rows[0].name] / times[row.name],)
    return rows, zq.compile_reports()[0]


def _say(what: str) -> None:
    print(f"{time.process_time():5.0f} s CPU  {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=512, help="real sentences to embed")
    parser.add_argument(
        "--rounds", type=int, default=9, help="timed calls of the large batch; four times that of the small"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        with torch.no_grad():
            rows, report = measure(options.sentences, options.rounds)
    except ModelNotFetched as error:
        sys.exit(str(error))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        table(rows, f"all-MiniLM-L6-v2, {options.sentences} sentences of news, {torch.get_num_threads()} threads")
    )
    console.print("\n".join(quantized_summary(report)), highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        figures = {
            "sentences": options.sentences,
            "threads": torch.get_num_threads(),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps({**figures, "report": report.to_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
