"""Memory of a quantized model in a fresh process: `python -m benchmarks.memory`.

Prints resident memory (MB, above what the imports take) with the float model, after `quantize(); del model`, and the
bytes of weights on both sides; then the same for `torch.compile` and `release`. BERT-base shape, random weights.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

import zq_compiler

INPUTS = {"input_ids": torch.ones(1, 16, dtype=torch.int64)}


def resident() -> float:
    """Resident memory in MB, once freed pages are given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def quantize_and_delete(model: transformers.PreTrainedModel) -> list[object]:
    """What `del model` leaves behind."""
    return [zq_compiler.quantize(model, INPUTS)]


def compile_and_release(model: transformers.PreTrainedModel) -> list[object]:
    """What stays under torch.compile, where the user's module lives on."""
    compiled = torch.compile(model, backend="zeroquant", options={"lowering": "eager"})
    with torch.no_grad():
        compiled(**INPUTS)
    zq_compiler.release(model)
    return [compiled, model]


def measure(door: Callable[[transformers.PreTrainedModel], list[object]], results: multiprocessing.Queue) -> None:
    """Runs in a fresh process: MB above the start with the float model, and with what the door leaves."""
    warm = BertModel(
        BertConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    ).eval()
    del door(warm)[:]  # what the first use imports is no weight
    del warm
    start = resident()
    model = BertModel(BertConfig()).eval()
    with_float = resident() - start
    kept = door(model)
    del model
    results.put((with_float, resident() - start, len(kept)))


def main() -> None:
    """Prints the table."""
    table = Table(title="BERT-base, resident memory above the imports, MB")
    for column in ("door", "float model", "left"):
        table.add_column(column)
    context = multiprocessing.get_context("spawn")
    for door in (quantize_and_delete, compile_and_release):
        results = context.Queue()
        process = context.Process(target=measure, args=(door, results))
        process.start()
        with_float, left, _ = results.get()
        process.join()
        table.add_row(door.__name__, f"{with_float:.0f}", f"{left:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
