"""What a quantized cache of keys and values costs a decoder, and saves: perplexity of SmolLM2-135M, and bytes.

    python -m benchmarks.kv_cache [--tokens 8192] [--length 1024] [--residual 128]

News text in windows of `length` tokens, fed in pieces of 64, each of which reads the earlier ones from the cache, as in
generation. Only the rest of a window is scored, where the cache is longer than its residual.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import zq_compiler
from benchmarks.perplexity import FIRST_CALIBRATION_ARTICLE
from benchmarks.real_models import news_articles, smollm2

PIECE = 64
FORMATS = ("int8", "int4", "int2")


def main(
    tokens: Annotated[int, typer.Option(help="to read")] = 8192,
    length: Annotated[int, typer.Option(help="of a window")] = 1024,
    residual: Annotated[int, typer.Option(help="newest tokens that stay in float32")] = 128,
    group: Annotated[int, typer.Option(help="that share a scale")] = 32,
) -> None:
    """Prints the table."""
    tokenizer, model = smollm2()
    text = "\n\n".join(article.text for article in news_articles()[:FIRST_CALIBRATION_ARTICLE])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    table = Table(title=f"SmolLM2-135M, {ids.shape[1]} tokens of news in windows of {length}, residual {residual}")
    for column in ("cache", "perplexity", "to float", "bytes a token", "of float32's"):
        table.add_column(column)
    first = 0.0
    for name in ("float32", *FORMATS):
        loss = count = held = whole = 0.0
        for window in ids.split(length, 1):
            cache = DynamicCache() if name == "float32" else zq_compiler.kv_cache(name, group=group, residual=residual)
            logits = []
            with torch.no_grad():
                for piece in window.split(PIECE, 1):
                    logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
            scored = slice(residual, window.shape[1] - 1)
            loss += F.cross_entropy(torch.cat(logits)[scored], window[0, residual + 1 :], reduction="sum").item()
            count += max(window.shape[1] - 1 - residual, 0)
            if name != "float32":
                held, whole = held + cache.nbytes, whole + cache.float_nbytes
            else:
                sizes = [x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)]
                held, whole = held + sum(sizes), whole + sum(sizes)
        perplexity = math.exp(loss / count)
        first = first or perplexity
        table.add_row(
            name, f"{perplexity:.3f}", f"{perplexity / first:.4f}", f"{held / ids.shape[1]:.0f}", f"{held / whole:.3f}"
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
