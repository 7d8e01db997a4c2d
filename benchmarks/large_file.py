"""An ONNX file above 2 GB, the most that protobuf holds: written, checked, loaded and run.

    python -m benchmarks.large_file [--layers 1] [--recipe w8a8]

A Llama as wide as Llama-3.2-1B, random weights, its table of tokens and its projection onto the vocabulary untied and
in float32: 2.1 GB by themselves. Prints each step's seconds and the process's peak memory up to its end, the sizes of
both files, and how far ONNX Runtime's logits are from the eager reference's, and those from the float model's. The
files are deleted in the end. One layer is above the limit; with more, an integer that rounds the other way is many at
the end, and the last figure says less.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import onnx
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import zq_compiler as zq
from benchmarks.onnx_peers import session
from zq_compiler.numerics import sqnr

VOCABULARY, TOKENS = 128256, 16
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}


def llama(layers: int) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **SHAPE)
    return transformers.LlamaForCausalLM(config).eval()


def peak() -> float:
    """The most memory that this process ever had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(
    layers: Annotated[int, typer.Option(help="Of the decoder; each adds 61 MB in INT8.")] = 1,
    recipe: Annotated[str, typer.Option(help="Of a recipe without calibration.")] = "w8a8",
) -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("step", "seconds", "peak GB")

    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        table.add_row(name, f"{time.perf_counter() - started:.1f}", f"{peak():.1f}")

    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    inputs = {"input_ids": ids, "use_cache": False}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with step("make the float model"):
            model = llama(layers)
        with step("its logits"):
            floats = model(**inputs).logits
        with step("quantize"):
            quantized = zq.quantize(model, inputs, recipe=recipe)
            del model
        with step("the eager reference's logits"):
            want = quantized(**inputs).logits
        with step("export, onnx.checker by path included"):
            report = quantized.export_onnx(Path(folder) / "model.onnx")
        del quantized
        with step("onnx.checker by path, once more"):
            onnx.checker.check_model(str(report.path), full_check=True)
        with step("load in ONNX Runtime"):
            loaded = session(report.path, exact=True)
        with step("run"):
            (got,) = loaded.run(None, {"input_ids": ids.numpy()})
        sizes = {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name}: {size / 1e6:,.1f} MB" for name, size in sizes.items()))
    console.print(f"logits, SQNR: the eager reference against the float model {sqnr(floats, want):.1f} dB,")
    console.print(f"ONNX Runtime against the eager reference {sqnr(want, torch.from_numpy(got)):.1f} dB")
    if sizes.get("model.onnx.data", 0) <= 2**31:
        raise SystemExit("the weights are not above 2 GB: use more layers")


if __name__ == "__main__":
    typer.run(main)
