"""What recipes and weight methods cost real models in accuracy: one row a run, kept in a file, written up as a page.

    python -m benchmarks.accuracy run --model smollm2 --recipe w4a16-g64+gptq [--tokens 50000] [--windows 32]
    python -m benchmarks.accuracy write          # docs/accuracy.md, from benchmarks/accuracy.jsonl

A row that the file has is not run again. smollm2: perplexity of the first news articles, in windows of 512 tokens;
methods read other articles' windows. minilm and dinov2: cosine of embeddings to float32's, and what a linear probe that
was trained on float32's says of them (`benchmarks.hero_accuracy` says more on the data); methods read 100 batches of 16
training examples. Bits count codes, scales and factors of the quantized layers' weights. The reference ops are run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import zq_compiler
from benchmarks import hero_accuracy, perplexity
from benchmarks.real_models import smollm2
from zq_compiler.batches import Batches
from zq_compiler.formats import FORMATS

ROWS = Path(__file__).with_name("accuracy.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
TITLES = {"smollm2": "SmolLM2-135M", "minilm": "all-MiniLM-L6-v2", "dinov2": "DINOv2 ViT-S/14"}
COLUMNS = {
    "smollm2": {"perplexity": "perplexity", "ratio": "to float", "kl": "KL, nats", "top1": "same top 1, %"},
    "minilm": {"cosine": "cosine", "worst": "worst", "accuracy": "accuracy, %", "same": "same prediction, %"},
}
COLUMNS["dinov2"] = COLUMNS["minilm"]
HEADER = """# What recipes cost in accuracy

Written by `python -m benchmarks.accuracy write`, from the rows that `python -m benchmarks.accuracy run --model MODEL
--recipe RECIPE` adds. Without a suffix, weights are rounded to the nearest. *bits* are those of a weight of the
quantized layers, scales and factors counted; *data* the windows of 512 tokens, or batches of 16 examples, that methods
read. Runs are deterministic; the seed of LKD's order of batches is 0."""
Row = dict[str, Any]
app = typer.Typer(add_completion=False)


def bits_per_weight(report: Any) -> float:
    """Of the layers that hold codes, everything counted that stands for their weights."""
    rows = [row for row in report.layers if row.got in FORMATS and row.kind in ("linear", "lm_head")]
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    return 8 * sum(row.bytes_after for row in rows) / elements if elements else 32.0


def run_smollm2(recipe: zq_compiler.Recipe, size: int, windows: int) -> tuple[Row, Any]:
    """Perplexity over `size` tokens; methods read `windows` windows."""
    tokenizer, model = smollm2()
    scored, calibration = perplexity.news_windows(tokenizer, size, windows)
    quantized = zq_compiler.quantize(model, calibration[0], recipe=recipe, calibration=Batches(calibration))
    scores = perplexity.measure(model, {"it": quantized}, scored)
    floats, found = scores["float32"], scores["it"]
    row = {
        "perplexity": found.perplexity,
        "float": floats.perplexity,
        "ratio": found.perplexity / floats.perplexity,
        "kl": found.divergence / found.tokens,
        "top1": 100 * found.same / found.tokens,
        "tokens": found.tokens,
    }
    return row, quantized.report()


def run_encoder(model: str, recipe: zq_compiler.Recipe, size: int, windows: int) -> tuple[Row, Any]:
    """Over `size` test examples; methods read `windows` batches of 16."""
    task = hero_accuracy.TASKS[model](None, size)
    task = replace(task, calibration=task.calibration[:windows])
    quantized = zq_compiler.quantize(
        task.model, task.calibration[0], recipe=recipe, calibration=Batches(task.calibration)
    )
    w, b = hero_accuracy.probe_of(task)
    floats, found = hero_accuracy.Encoded(), hero_accuracy.Encoded()
    with torch.no_grad():
        for batch in task.test.batches:
            reference = task.model(**batch)
            floats.add(reference, reference, batch)
            found.add(quantized(**batch), reference, batch)
    cosine = (floats.embeddings * found.embeddings).sum(1)
    said, says = ((x.embeddings @ w + b).argmax(1) for x in (floats, found))
    right, right_now = ((x == task.test.labels).float() for x in (said, says))
    row = {
        "cosine": float(cosine.mean()),
        "worst": float(cosine.min()),
        "accuracy": 100 * float(right_now.mean()),
        "float": 100 * float(right.mean()),
        "same": 100 * float((said == says).float().mean()),
        "examples": len(task.test.labels),
    }
    return row, quantized.report()


RUNS: dict[str, tuple[Callable[..., tuple[Row, Any]], int]] = {
    "smollm2": (run_smollm2, 50000),
    "minilm": (lambda *a: run_encoder("minilm", *a), 2189),
    "dinov2": (lambda *a: run_encoder("dinov2", *a), 2000),
}


def rows() -> list[Row]:
    """What has been run."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


@app.command()
def run(
    model: Annotated[str, typer.Option(help=", ".join(RUNS))],
    recipe: Annotated[list[str], typer.Option(help="preset or JSON path")],
    size: Annotated[int | None, typer.Option("--tokens", "--examples", help="to score; all by default")] = None,
    windows: Annotated[int, typer.Option(help="of calibration data that methods read")] = 32,
) -> None:
    """Appends rows to the file."""
    if model not in RUNS:
        raise typer.BadParameter(f"no model {model}: use one of {', '.join(RUNS)}")
    measure, whole = RUNS[model]
    for name in recipe:
        chosen = zq_compiler.load_recipe(name)
        key = {"model": model, "recipe": chosen.name, "size": size or whole, "windows": windows}
        if any(all(row[k] == v for k, v in key.items()) for row in rows()):
            typer.echo(f"{key}: known")
            continue
        started = time.perf_counter()
        found, report = measure(chosen, size or whole, windows)
        refinements = [r for r in report.refinements if r["after"] < r["before"]]
        more = {
            "bits": bits_per_weight(report),
            "improved": len(refinements),
            "seconds": round(time.perf_counter() - started),
            "method_seconds": round(sum(r["seconds"] for r in report.refinements)),
            "versions": {"torch": torch.__version__, "zq_compiler": zq_compiler.__version__},
        }
        row = {**key, **found, **more}
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        typer.echo(json.dumps(row))


@app.command()
def write() -> None:
    """Writes the page."""
    PAGE.write_text("\n".join(page(rows())) + "\n")


def page(known: Sequence[Row]) -> Iterator[str]:
    """Lines of the page."""
    yield HEADER
    for model, title in TITLES.items():
        mine = [row for row in known if row["model"] == model]
        for size in sorted({row["size"] for row in mine}, reverse=True):
            some = [row for row in mine if row["size"] == size]
            unit = "tokens of news" if "tokens" in some[0] else "test examples"
            counted = some[0].get("tokens", some[0].get("examples"))
            of_float = "perplexity" if "tokens" in some[0] else "accuracy"
            yield from ("", f"## {title}, {counted:,} {unit}", "")
            yield f"float32: {of_float} {some[0]['float']:.3f}."
            yield ""
            columns = COLUMNS[model]
            yield f"| recipe | bits | {' | '.join(columns.values())} | data |"
            yield f"|---|---|{'---|' * len(columns)}---|"
            for row in sorted(some, key=lambda row: (row["recipe"].partition("+")[0], row["recipe"])):
                values = " | ".join(f"{row[key]:.4g}" if key == "kl" else f"{row[key]:.4f}" for key in columns)
                data = row["windows"] if zq_compiler.load_recipe(row["recipe"]).needs_data else ""
                yield f"| `{row['recipe']}` | {row['bits']:.2f} | {values} | {data} |"


if __name__ == "__main__":
    app()
