"""What each recipe costs a decoder: perplexity of SmolLM2-135M on news text.

    python -m benchmarks.perplexity [--tokens 20000] [--recipe hero-m3 --recipe recipe.json ...]

Text: the first news articles, in windows of 512 tokens, each predicted from its own window alone. Calibration: 32
such windows of the articles from the 200th on. `KL` is the divergence of a recipe's next-token distribution from that
of float32, in nats, `same top 1` how often both predict the same token. The reference ops are run, not compiled ones:
the same integers, and nothing to compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import zq_compiler
from benchmarks.real_models import news_articles, smollm2
from zq_compiler.batches import Batches

RECIPES = ["w8a8", "hero-m1", "hero-m2", "hero-m3", "hero-decoder"]
WINDOW = 512
FIRST_CALIBRATION_ARTICLE = 200
CALIBRATION_WINDOWS = 32


@dataclass
class Score:
    """Sums over scored tokens."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count one window: log-probabilities of float32 and logits, both `[T, V]`, and the tokens that came, `[T]`."""
        found = logits.log_softmax(-1)
        self.tokens += len(targets)
        self.loss += F.nll_loss(found, targets, reduction="sum").item()
        self.divergence += F.kl_div(found, reference, reduction="sum", log_target=True).item()
        self.same += int((found.argmax(-1) == reference.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        """Of the next token, given its window so far."""
        return math.exp(self.loss / self.tokens)


def windows(tokenizer: Any, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    """The first `tokens` tokens of the joined texts as a decoder's inputs, `[1, 512]` each; the last may be shorter."""
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[:, :tokens]
    return [{"input_ids": part, "use_cache": False} for part in ids.split(WINDOW, 1)]


def news_windows(tokenizer: Any, tokens: int, calibration_windows: int) -> tuple[list[dict[str, Any]], ...]:
    """Windows to score, and others to calibrate on."""
    texts = [article.text for article in news_articles()]
    scored = windows(tokenizer, texts[:FIRST_CALIBRATION_ARTICLE], tokens)
    return scored, windows(tokenizer, texts[FIRST_CALIBRATION_ARTICLE:][:100], calibration_windows * WINDOW)


def measure(model: Any, others: dict[str, Any], scored: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Of a float32 model, as `float32`, and of others like it, by their names."""
    scores = {name: Score() for name in ("float32", *others)}
    for window in scored:
        targets = window["input_ids"][0, 1:]
        with torch.no_grad():
            logits = model(**window).logits[0, :-1]
            reference = logits.log_softmax(-1)
            for name, result in scores.items():
                found = logits if name == "float32" else others[name](**window).logits[0, :-1]
                result.add(reference, found, targets)
    return scores


def score(recipes: Sequence[str | zq_compiler.Recipe], tokens: int) -> dict[str, Score]:
    """Of float32 and of each recipe, by its name."""
    tokenizer, model = smollm2()
    scored, calibration = news_windows(tokenizer, tokens, CALIBRATION_WINDOWS)
    batches = Batches(calibration)  # what one recipe takes from them serves the others
    quantized = [zq_compiler.quantize(model, calibration[0], recipe=r, calibration=batches) for r in recipes]
    return measure(model, {q.program.recipe.name: q for q in quantized}, scored)


def main(
    tokens: Annotated[int, typer.Option(help="to score", min=2)] = 20000,
    recipe: Annotated[list[str] | None, typer.Option(help="preset or JSON path, instead of w8a8 and the modes")] = None,
) -> None:
    """Prints the table."""
    scores = score(recipe or RECIPES, tokens)
    table = Table(title=f"SmolLM2-135M, {scores['float32'].tokens} tokens of news")
    for column in ("recipe", "perplexity", "to float", "KL", "same top 1 %"):
        table.add_column(column)
    for name, found in scores.items():
        table.add_row(
            name,
            f"{found.perplexity:.3f}",
            f"{found.perplexity / scores['float32'].perplexity:.4f}",
            f"{found.divergence / found.tokens:.4f}",
            f"{100 * found.same / found.tokens:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
