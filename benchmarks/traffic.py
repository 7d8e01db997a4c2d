"""Bytes of activations that one encoder layer of BERT-base in float16 reads and writes, in each recipe.

    python -m benchmarks.traffic [--batch 8] [--tokens 128]

Counted off the graphs, on random weights: `zq_compiler/traffic.py` says how. The layer has another behind it, so its
last norm writes integers.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import zq_compiler

RECIPES = ("w8a8", "hero-m1", "hero-m2", "hero-m3")


def main(
    batch: Annotated[int, typer.Option(help="sequences")] = 8,
    tokens: Annotated[int, typer.Option(help="of a sequence")] = 128,
) -> None:
    """Prints the table."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=2, vocab_size=100)).eval().half()
    ids = torch.randint(100, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    table = Table(title=f"BERT-base layer in float16, batch {batch}, {tokens} tokens, MB of activations")
    for column in ("recipe", "op by op", "fused alike", "now", "now / fused alike", "now / op by op"):
        table.add_column(column)
    for name in RECIPES:
        calibration = [inputs] if zq_compiler.load_recipe(name).calibrated else None
        report = zq_compiler.quantize(model, inputs, recipe=name, calibration=calibration).report()
        moved = report.moved("encoder.layer.0.")
        megabytes = (f"{count / 1e6:.1f}" for count in (moved.op_by_op, moved.fused_alike, moved.now))
        shares = (f"{100 * moved.now / count:.1f} %" for count in (moved.fused_alike, moved.op_by_op))
        table.add_row(name, *megabytes, *shares)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
