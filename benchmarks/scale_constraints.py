"""What powers of two in place of free scales cost FP4 weights: `python -m benchmarks.scale_constraints`, a table.

Of the linears of SmolLM2-135M, 128 features to a scale, in FP4 E2M1: the relative error `|W - Wq| / |W|`, of all
weights together, under each constraint of ZeroQuant-FP and each rounding of the scales.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from benchmarks.real_models import smollm2
from zq_compiler.numerics import SCALE_CONSTRAINTS, SCALE_ROUNDINGS, dequantize_weight, quantize_weight

GROUP = 128


def main() -> None:
    """Prints the table."""
    _, model = smollm2()
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    weights = [layer.weight.detach().float() for layer in layers]
    print("| constraint | rounding | error % |\n|---|---|---|")
    total = sum(w.square().sum().item() for w in weights)
    for constraint in SCALE_CONSTRAINTS:
        for rounding in SCALE_ROUNDINGS if constraint != "none" else ("-",):
            noise = 0.0
            for w in weights:
                packed, scale = quantize_weight(w, "fp4_e2m1", GROUP, False, constraint, rounding)
                noise += (dequantize_weight(packed, scale, "fp4_e2m1", GROUP, w.shape[1]) - w).square().sum().item()
            print(f"| {constraint} | {rounding} | {100 * math.sqrt(noise / total):.2f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
