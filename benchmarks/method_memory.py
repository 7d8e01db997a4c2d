"""Peak memory of the methods that choose weights by data: `python -m benchmarks.method_memory table`.

Llamas of random weights, 768 wide, of 6 and of 12 layers, in `w4a16-g64` and with a method behind it; each in a process
of its own. *model* is what its float weights take. *peak* is the most that is resident during `quantize()` beyond what
was before it, the copy of the weights and the calibration data included. Methods hold all windows at one point of the
graph, so their share must grow with the windows and not with the layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import Annotated

import typer

METHODS = ("", "+clip", "+lorc", "+gptq", "+lkd")
WIDTH, TOKENS, VOCABULARY = 768, 512, 2048
app = typer.Typer(add_completion=False)


def resident() -> float:
    """Of this process now, in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1e3


@app.command(hidden=True)
def measure(method: str, layers: int, windows: int) -> None:
    """One row, as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import zq_compiler
    from zq_compiler.methods import LKD

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, VOCABULARY, (1, TOKENS)), "use_cache": False} for _ in range(windows)]
    recipe = zq_compiler.load_recipe(f"w4a16-g64{method}").replace(lkd=LKD(steps=4))
    before, peak, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    quantized = zq_compiler.quantize(model, data[0], recipe=recipe, calibration=data)
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in model.parameters()) / 1e6
    print(
        json.dumps({"model": weights, "peak": max(peak, resident()) - before, "layers": len(quantized.report().layers)})
    )


@app.command()
def table(windows: Annotated[list[int], typer.Option(help="of 512 tokens")] = [8, 32]) -> None:  # noqa: B006
    """Prints the table."""
    print("| method | layers | windows | model, MB | peak, MB |\n|---|---|---|---|---|")
    for method in METHODS:
        for layers in (6, 12):
            for count in windows:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.method_memory",
                    "measure",
                    "--",
                    method,
                    *map(str, (layers, count)),
                ]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row = json.loads(out.splitlines()[-1])
                name = f"w4a16-g64{method}"
                print(f"| `{name}` | {layers} | {count} | {row['model']:.0f} | {row['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    app()
