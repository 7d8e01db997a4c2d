"""Perplexity of SmolLM2-135M in four bits, this package's beside torchao's, on one text in one run.

    python -m benchmarks.low_bit_peers [--tokens 8192] [--group 64] [--windows 32]

All linears but the output projection have INT4 weights, a scale for each group of input features. Bits count codes,
float16 scales and zero points, of torchao's four bits where they are integers and sixteen where floats. torchao's are
`IntxWeightOnlyConfig`, symmetric, asymmetric and with HQQ's scales, and HQQ itself, with float zero points, by the
function that its configurations for CUDA call. Ours that read data read the articles that `benchmarks.perplexity`
calibrates on; torchao's read none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zq_compiler
from benchmarks import perplexity
from benchmarks.accuracy import bits_per_weight
from benchmarks.real_models import smollm2
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


def peers(group: int) -> dict[str, tuple[float, Callable[[nn.Module], nn.Module]]]:
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
) -> None:
    """Prints the table."""
    tokenizer, model = smollm2()
    scored, calibration = perplexity.news_windows(tokenizer, tokens, windows)
    batches = Batches(calibration)
    bits: dict[str, float] = {"float32": 32.0}
    models: dict[str, Any] = {}
    for name, (size, quantize) in peers(group).items():
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
