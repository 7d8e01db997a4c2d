"""What recipes and weight methods cost real models in accuracy: one row a run, kept in a file, written up as a page.

    python -m benchmarks.accuracy run --model smollm2 --recipe w4a16-g64+gptq [--tokens 51200] [--device cuda]
    python -m benchmarks.accuracy write          # docs/accuracy.md, from benchmarks/accuracy.jsonl

A row that the file has is not run again. smollm2: perplexity of the first news articles, in windows of 512 tokens;
methods read other articles' windows. minilm and dinov2: cosine of embeddings to float32's, and what a linear probe that
was trained on float32's says of them (`benchmarks.hero_accuracy` says more on the data), over all test examples;
methods read batches of 16 training examples. whisper: divergence of the next token's distribution from float32's, along
the transcripts of five sentences; methods read eight commands by other speakers. Bits count codes, scales and factors
of the quantized layers' weights. On a CPU SmolLM2 and the encoders run compiled, elsewhere the reference ops are run:
the same integers.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils._pytree import tree_map_only

import zq_compiler
from benchmarks import hero_accuracy, perplexity
from benchmarks.real_models import Speech, read_speech, smollm2, spoken_commands, whisper
from zq_compiler.batches import Batches
from zq_compiler.formats import FORMATS
from zq_compiler.methods import GPTQ

ROWS = Path(__file__).with_name("accuracy.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
TITLES = {
    "smollm2": "SmolLM2-135M",
    "minilm": "all-MiniLM-L6-v2",
    "dinov2": "DINOv2 ViT-S/14",
    "whisper": "whisper-tiny.en",
}
UNITS = {"smollm2": "tokens of news", "minilm": "texts", "dinov2": "images", "whisper": "tokens of speech"}
COLUMNS = {
    "smollm2": {"perplexity": "perplexity", "ratio": "to float", "kl": "KL, nats", "top1": "same top 1, %"},
    "minilm": {"cosine": "cosine", "worst": "worst", "accuracy": "accuracy, %", "same": "same prediction, %"},
    "whisper": {"perplexity": "perplexity", "kl": "KL, nats", "top1": "same top 1, %"},
}
COLUMNS["dinov2"] = COLUMNS["minilm"]
LEADING = ("w48a8", "w4a16-g128", "w3a16-g64", "w4a8-fp")  # which every method is tried on
METHODS = ("+gptq", "+lkd", "+lorc4", "+lorc8", "+lorc32", "+gptq+lorc8")
OTHERS = (
    *("w8a8", "w8a8-plain", "w8a8+smooth", "fp8", "fp6", "w8a16", "w4a16-g64", "w4a8", "w4a8-g128"),
    *("w4a4", "w4a8-fp-m1", "w4a8-fp-m2", "w4a8+lorc", "w4a16-g64+gptq", "w4a16-g64+lorc"),
)
HEADER = """# What recipes cost in accuracy

Written by `python -m benchmarks.accuracy write`, from the rows that `python -m benchmarks.accuracy run --model MODEL
--recipe RECIPE` adds. Without a suffix, weights are rounded to the nearest. *bits* are those of a weight of the
quantized layers, scales and factors counted; *data* the windows of 512 tokens, or batches of 16 examples, that methods
read; of Whisper's spoken commands there are 8. Runs are deterministic; the seed of LKD's order of batches is 0."""
MAX_SAID = 40  # tokens of a spoken command
Row = dict[str, Any]
Found = tuple[Row, Any]  # and the report
Recipes = Sequence[zq_compiler.Recipe]
app = typer.Typer(add_completion=False)


def bits_per_weight(report: Any) -> float:
    """Of the layers that hold codes, everything counted that stands for their weights."""
    rows = [row for row in report.layers if row.got in FORMATS and row.kind in ("linear", "lm_head")]
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    return 8 * sum(row.bytes_after for row in rows) / elements if elements else 32.0


def moved(value: Any, device: str) -> Any:
    """Models and tensors, in whatever they lie in, on a device."""
    return tree_map_only((torch.Tensor, torch.nn.Module), lambda x: x.to(device), value)


def run_smollm2(recipes: Recipes, size: int, windows: int, device: str) -> list[Found]:
    """Perplexity over `size` tokens; methods read `windows` windows."""
    tokenizer, model = _smollm2(device)
    scored, calibration = moved(perplexity.news_windows(tokenizer, size, windows), device)
    batches = Batches(calibration)
    quantized = [zq_compiler.quantize(model, calibration[0], recipe=r, calibration=batches) for r in recipes]
    scores = perplexity.measure(model, {q.program.recipe.name: runnable(q, device) for q in quantized}, scored)
    return [(_divergence(scores["float32"], scores[q.program.recipe.name]), q.report()) for q in quantized]


def runnable(quantized: Any, device: str) -> Any:
    """Compiled where that is much faster."""
    return quantized.compile() if device == "cpu" else quantized


def _divergence(floats: perplexity.Score, found: perplexity.Score) -> Row:
    return {
        "perplexity": found.perplexity,
        "float": floats.perplexity,
        "ratio": found.perplexity / floats.perplexity,
        "kl": found.divergence / found.tokens,
        "top1": 100 * found.same / found.tokens,
        "scored": found.tokens,
    }


def run_whisper(recipes: Recipes, size: int, windows: int, device: str) -> list[Found]:
    """Of each recipe."""
    return [_run_whisper(recipe, size, windows, device) for recipe in recipes]


def _run_whisper(recipe: zq_compiler.Recipe, size: int, windows: int, device: str) -> Found:
    """Along the transcripts of the first `size` sentences; methods read the first `windows` commands."""
    tokenizer, model = moved(_whisper(), device)
    listen = Listener(tokenizer, model)
    calibration = [listen.guessed(speech) for speech in spoken_commands()[:windows]]
    quantized = zq_compiler.quantize(model, calibration[0], recipe=recipe, calibration=Batches(calibration))
    floats, found = perplexity.Score(), perplexity.Score()
    with torch.no_grad():
        for speech in read_speech()[:size]:
            batch = listen.told(speech)
            targets = batch["decoder_input_ids"][0, len(listen.prompt[0]) :]
            logits, others = (m(**batch).logits[0, -len(targets) - 1 : -1] for m in (model, quantized))
            reference = logits.log_softmax(-1)
            floats.add(reference, logits, targets)
            found.add(reference, others, targets)
    return _divergence(floats, found), quantized.report()


class Listener:
    """Makes the inputs of Whisper: what is said, and the tokens of a text so far."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        from transformers import WhisperFeatureExtractor

        self.tokenizer, self.model = tokenizer, model
        self.features = WhisperFeatureExtractor(feature_size=80)
        self.prompt = self._tokens("<|startoftranscript|><|notimestamps|>")

    def told(self, speech: Speech) -> Row:
        """With the transcript's tokens."""
        return self._inputs(speech, torch.cat([self.prompt, self._tokens(f" {speech.transcript}")], 1))

    def guessed(self, speech: Speech) -> Row:
        """With the tokens that the model itself finds likeliest, up to the end of its text."""
        inputs = self._inputs(speech, self.prompt)
        with torch.no_grad():
            heard = self.model.get_encoder()(inputs["input_features"])
            for _ in range(MAX_SAID):
                ids = inputs["decoder_input_ids"]
                next_one = self.model(encoder_outputs=heard, decoder_input_ids=ids).logits[:, -1:].argmax(-1)
                if next_one.item() == self.model.config.eos_token_id:
                    break
                inputs["decoder_input_ids"] = torch.cat([ids, next_one], 1)
        return inputs

    def _inputs(self, speech: Speech, ids: torch.Tensor) -> Row:
        heard = self.features(speech.samples.numpy(), sampling_rate=16000, return_tensors="pt").input_features
        inputs = {"input_features": heard, "decoder_input_ids": ids, "use_cache": False}
        return moved(inputs, self.model.device)

    def _tokens(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)


def run_encoder(model: str, recipes: Recipes, size: int, windows: int, device: str) -> list[Found]:
    """Of each recipe."""
    return [_run_encoder(model, recipe, size, windows, device) for recipe in recipes]


def _run_encoder(model: str, recipe: zq_compiler.Recipe, size: int, windows: int, device: str) -> Found:
    """Over `size` test examples; methods read `windows` batches of 16."""
    task, (w, b), floats = _task(model, size, device)
    batches = task.calibration[:windows]
    quantized = zq_compiler.quantize(task.model, batches[0], recipe=recipe, calibration=Batches(batches))
    found = _embeddings(runnable(quantized, device), task)
    cosine = (floats * found).sum(1)
    said, says = ((x @ w + b).argmax(1) for x in (floats, found))
    right, right_now = ((x == task.test.labels).float() for x in (said, says))
    row = {
        "cosine": float(cosine.mean()),
        "worst": float(cosine.min()),
        "accuracy": 100 * float(right_now.mean()),
        "float": 100 * float(right.mean()),
        "same": 100 * float((said == says).float().mean()),
        "scored": len(task.test.labels),
    }
    return row, quantized.report()


def _embeddings(model: Any, task: hero_accuracy.Task) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([hero_accuracy.embedding(model(**batch), batch) for batch in task.test.batches])


@functools.cache
def _task(model: str, size: int, device: str) -> tuple[hero_accuracy.Task, Any, torch.Tensor]:
    """The model and its data, the probe, and what float32 says."""
    task = hero_accuracy.TASKS[model](None, size)
    parts = {name: moved(getattr(task, name), device) for name in ("model", "train", "test", "calibration")}
    task = replace(task, **parts)
    return task, hero_accuracy.probe_of(task), _embeddings(task.model, task)


_smollm2 = functools.cache(lambda device: moved(smollm2(), device))
_whisper = functools.cache(whisper)


RUNS: dict[str, tuple[Callable[..., list[Found]], int]] = {
    "smollm2": (run_smollm2, 51200),
    "minilm": (functools.partial(run_encoder, "minilm"), 2189),
    "dinov2": (functools.partial(run_encoder, "dinov2"), 10000),
    "whisper": (run_whisper, 5),
}


def all_recipes() -> list[str]:
    """Those of the page: the dearest first."""
    return [f"{name}{method}" for method in (*METHODS, "") for name in LEADING] + list(OTHERS)


def rows() -> list[Row]:
    """What has been run."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


@app.command()
def run(
    model: Annotated[str, typer.Option(help=", ".join(RUNS))],
    recipe: Annotated[list[str] | None, typer.Option(help="preset or JSON path; all of the page by default")] = None,
    size: Annotated[int | None, typer.Option("--tokens", "--examples", help="to score; all by default")] = None,
    windows: Annotated[int, typer.Option(help="of calibration data that methods read")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    share: Annotated[str, typer.Option(help="I/N: of the recipes, every Nth from the Ith on")] = "0/1",
    together: Annotated[int, typer.Option(help="recipes that share a run of the float model", min=1)] = 1,
) -> None:
    """Appends rows to the file."""
    if model not in RUNS:
        raise typer.BadParameter(f"no model {model}: use one of {', '.join(RUNS)}")
    measure, whole = RUNS[model]
    start, step = map(int, share.split("/"))
    chosen = [zq_compiler.load_recipe(name) for name in (recipe or all_recipes())[start::step]]
    for first in range(0, len(chosen), together):
        group = chosen[first : first + together]
        keys = {r.name: {"model": model, "recipe": r.name, "size": size or whole, "windows": windows} for r in group}
        known = {n for n, key in keys.items() if any(all(row[k] == v for k, v in key.items()) for row in rows())}
        for name in sorted(known):
            typer.echo(f"{keys[name]}: known")
        if not (new := [r for r in group if r.name not in known]):
            continue
        started = time.perf_counter()
        for r, (found, report) in zip(new, measure(new, size or whole, windows, device), strict=True):
            refinements = [r for r in report.refinements if r["after"] < r["before"]]
            more = {
                "bits": bits_per_weight(report),
                "improved": len(refinements),
                "seconds": round((time.perf_counter() - started) / len(new)),
                "method_seconds": round(sum(r["seconds"] for r in report.refinements)),
                "device": torch.cuda.get_device_name() if device == "cuda" else device,
                "versions": {"torch": torch.__version__, "zq_compiler": zq_compiler.__version__},
            }
            row = {**keys[r.name], **found, **more}
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            typer.echo(json.dumps(row))


@app.command()
def damping() -> None:
    """Prints what GPTQ's damping does for Whisper, whose eight commands are little data: some minutes."""
    print("| recipe | damping | KL, nats |\n|---|---|---|")
    for name in ("w4a16-g128", "w3a16-g64"):
        for share in (None, 0.01, 0.1, 1.0):
            recipe = zq_compiler.load_recipe(name if share is None else f"{name}+gptq")
            recipe = recipe if share is None else recipe.replace(gptq=GPTQ(damping=share))
            ((found, _),) = run_whisper([recipe], RUNS["whisper"][1], 32, "cpu")
            print(f"| `{recipe.name}` | {share or ''} | {found['kl']:.4f} |", flush=True)


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
            yield from ("", f"## {title}, {some[0]['scored']:,} {UNITS[model]}", "")
            of_float = "perplexity" if "perplexity" in some[0] else "accuracy"
            places = sorted({f"{row['device']}, torch {row['versions']['torch']}" for row in some})
            yield f"float32: {of_float} {some[0]['float']:.3f}. Run on {'; '.join(places)}."
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
