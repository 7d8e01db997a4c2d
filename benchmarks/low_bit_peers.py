"""Perplexity of SmolLM2-135M in four bits, this package's beside torchao's, on one text in one run.

    python -m benchmarks.low_bit_peers [--tokens 8192] [--group 64] [--windows 32] [--gptqmodel path/to/venv/bin/python]

All linears but the output projection have INT4 weights, a scale for each group of input features. Bits count codes,
float16 scales and zero points, of torchao's four bits where they are integers and sixteen where floats. torchao's are
`IntxWeightOnlyConfig`, symmetric, asymmetric and with HQQ's scales, and HQQ itself, with float zero points, by the
function that its configurations for CUDA call. GPTQModel, in an environment of its own, is GPTQ with symmetric grids.
GPTQ, here and there, reads the articles that `benchmarks.perplexity` calibrates on; torchao reads none.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import zq_compiler
from benchmarks import perplexity
from benchmarks.accuracy import bits_per_weight
from benchmarks.real_models import smollm2, smollm2_folder
from zq_compiler.batches import Batches

OURS = ("", "+clip", "+lorc4", "+gptq", "-asym", "-asym+gptq")


def torchao_intx(group: int, **how: Any) -> Callable[[nn.Module], nn.Module]:
    """A model's copy under `IntxWeightOnlyConfig`."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    def quantized(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group), **how)  # type: ignore[attr-defined]
        quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        return model

    return quantized


def torchao_hqq(group: int) -> Callable[[nn.Module], nn.Module]:
    """A model's copy with the values that HQQ gives its weights."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    def values(w: Tensor) -> Tensor:
        codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
            w, nbits=4, group_size=group, axis=1, compute_dtype=torch.float32, device="cpu", raw_output=True
        )
        return ((codes.reshape(-1, group).float() - zero.reshape(-1, 1)) * scale.reshape(-1, 1)).reshape(w.shape)

    def quantized(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.weight.copy_(values(module.weight))
        return model

    return quantized


Peers = dict[str, tuple[float, Callable[[nn.Module], nn.Module]]]


def peers(group: int) -> Peers:
    """Bits a weight, and how a model is quantized; by name."""
    from torchao.quantization import MappingType

    symmetric, asymmetric = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
    hqq_scale = {"mapping_type": symmetric, "intx_choose_qparams_algorithm": "hqq_scale_only"}
    return {
        "torchao symmetric": (4 + 16 / group, torchao_intx(group, mapping_type=symmetric)),
        "torchao HQQ scales": (4 + 16 / group, torchao_intx(group, **hqq_scale)),
        "torchao asymmetric": (4 + 20 / group, torchao_intx(group, mapping_type=asymmetric)),
        "torchao HQQ": (4 + 32 / group, torchao_hqq(group)),
    }


_GPTQMODEL = """
import json, os, sys

os.cpu_count = lambda: max(8, len(os.sched_getaffinity(0)))  # of fewer cores it makes too few workers for itself
from gptqmodel import GPTQModel, QuantizeConfig

folder, out, calibration, group = sys.argv[1:]
model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=int(group), sym=True, device="cpu"))
windows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(open(calibration))]
model.quantize(windows, batch_size=1)
model.save(out)
"""


def gptqmodel(python: str, calibration: list[dict[str, Any]], group: int) -> Callable[[nn.Module], nn.Module]:
    """A model's copy with the values that GPTQModel gives its weights."""

    def quantized(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as scratch:
            windows, out = Path(scratch) / "windows.json", Path(scratch) / "out"
            windows.write_text(json.dumps([batch["input_ids"][0].tolist() for batch in calibration]))
            command = [python, "-c", _GPTQMODEL, str(smollm2_folder()), str(out), str(windows), str(group)]
            subprocess.run(command, check=True, cwd=scratch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stored = load_file(out / "model.safetensors")
        with torch.no_grad():
            for name, module in model.named_modules():
                if f"{name}.qweight" in stored:
                    module.weight.copy_(_values_of_gptq(*(stored[f"{name}.{part}"] for part in _GPTQ_PARTS)))
        return model

    return quantized


_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _values_of_gptq(packed: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """`[N, K]` from the format of AutoGPTQ: `[K / 8, N]` words of eight codes, `[G, N / 8]` of zero points less one."""
    shifts = torch.arange(0, 32, 4)
    codes = ((packed[:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)  # [K, N]
    zero = ((zeros[:, :, None] >> shifts) & 15).flatten(1) + 1  # [G, N]
    return ((codes - zero[groups]) * scales.float()[groups]).t()


def ours(suffix: str, group: int) -> zq_compiler.Recipe:
    """INT4 in groups, asymmetric or not, and methods."""
    grid, _, methods = suffix.partition("+")
    scheme = zq_compiler.QScheme(f"int4{grid.replace('-', '_')}", zq_compiler.Granularity.PER_GROUP, group)
    recipe = zq_compiler.load_recipe(f"w4a16-g64{grid}" + (f"+{methods}" if methods else ""))
    rules = [rule if rule.weight is None else replace(rule, weight=scheme) for rule in recipe.rules]
    return recipe.replace(name=f"zeroquant w4a16-g{group}{suffix}", rules=tuple(rules))


def main(
    tokens: Annotated[int, typer.Option(help="to score")] = 8192,
    group: Annotated[int, typer.Option(help="of input features that share a scale; divides 576 and 1536")] = 64,
    windows: Annotated[int, typer.Option(help="of calibration data, 512 tokens each")] = 32,
    gptqmodel_python: Annotated[str | None, typer.Option("--gptqmodel", help="a Python that has gptqmodel")] = None,
) -> None:
    """Prints the table."""
    tokenizer, model = smollm2()
    scored, calibration = perplexity.news_windows(tokenizer, tokens, windows)
    batches = Batches(calibration)
    bits: dict[str, float] = {"float32": 32.0}
    models: dict[str, Any] = {}
    others = peers(group)
    if gptqmodel_python is not None:
        others["GPTQModel"] = 4 + 20 / group, gptqmodel(gptqmodel_python, calibration, group)
    for name, (size, quantize) in others.items():
        bits[name], models[name] = size, quantize(model)
    for suffix in OURS:
        recipe = ours(suffix, group)
        quantized = zq_compiler.quantize(model, calibration[0], recipe=recipe, calibration=batches)
        bits[recipe.name], models[recipe.name] = bits_per_weight(quantized.report()), quantized
    scores = perplexity.measure(model, models, scored)
    table = Table(title=f"SmolLM2-135M, {scores['float32'].tokens} tokens of news, INT4 in groups of {group}")
    for column in ("weights", "bits", "perplexity", "to float", "KL"):
        table.add_column(column)
    for name, found in scores.items():
        ratio = found.perplexity / scores["float32"].perplexity
        cells = f"{bits[name]:.2f}", f"{found.perplexity:.3f}", f"{ratio:.3f}", f"{found.divergence / found.tokens:.4f}"
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
