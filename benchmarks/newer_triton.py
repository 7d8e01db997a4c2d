"""Whether a newer Triton compiles the CUDA kernels worse than the pinned one.

    python -m benchmarks.newer_triton compare

Installs the newest release into a temporary folder, compiles the same kernels with both, and compares what comes out.
Ends with 1 where a loop got a tenth longer, a spill or a failure appeared: nothing depends on it but what the pin may
become.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Annotated, Any

import typer

CASES = {
    "int8_linear": "512 x 3072 x 768",
    "w4a8_linear": "512 x 4096 x 4096, groups of 128",
    "norm_quantize": "residual and LayerNorm, 8192 x 768",
    "int8_attention": "16 x 512, 12 heads of 64",
}
ARCHITECTURES = (80, 89, 90)
ALLOWED = 1.1  # times the instructions
app = typer.Typer(add_completion=False)


@app.command(hidden=True)
def measure() -> None:
    """Figures of each kernel with the Triton that is imported, as JSON."""
    import triton

    from benchmarks.kernel_cards import reports
    from zq_compiler.analysis.kernel_cases import cases

    found: dict[str, Any] = {}
    for case in cases():
        if CASES.get(case.op) != case.shape:
            continue
        for architecture in ARCHITECTURES:
            name = f"{case.op} sm_{architecture}"
            try:
                launches = reports(case, architecture)
            except Exception as error:  # whatever a version that was never tried raises is a finding
                found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            found[name] = {
                "longest loop": sum(r.loops[0].instructions if r.loops else 0 for r in launches),
                "instructions": sum(r.instructions for r in launches),
                "spilled bytes": sum(r.spill_stores + r.spill_loads for r in launches),
            }
    print(json.dumps({"version": triton.__version__, "kernels": found}))


@app.command()
def compare(newest: Annotated[str, typer.Option(help="requirement to install")] = "triton") -> None:
    """Prints what differs between the installed Triton and the newest."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, newest]
        subprocess.run(install, check=True)
        pinned, new = (
            _measured({}),
            _measured({"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}),
        )
    print(f"| kernel | figure | triton {pinned['version']} | triton {new['version']} |\n|---|---|---|---|")
    worse = False
    for name, figures in pinned["kernels"].items():
        others = new["kernels"][name]
        if "error" in others:
            print(f"| {name} | error | | {others['error']} |")
            worse |= "error" not in figures
            continue
        for figure, value in figures.items():
            print(f"| {name} | {figure} | {value} | {others[figure]} |")
            worse |= others[figure] > ALLOWED * value
    raise typer.Exit(int(worse))


def _measured(environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.newer_triton", "measure"]
    run = subprocess.run(command, env={**os.environ, **environment}, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
