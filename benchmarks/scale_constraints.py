"""What powers of two in place of free scales cost FP4 weights: `python -m benchmarks.scale_constraints`, a table.

Of the linears of SmolLM2-135M, 128 features to a scale, in FP4 E2M1: the relative error `|W - Wq| / |W|`, of all
weights together and of the largest of each group alone, under each constraint of ZeroQuant-FP and each rounding of the
scales.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real_models import smollm2
from zq_compiler.numerics import SCALE_CONSTRAINTS, SCALE_ROUNDINGS, dequantize_weight, quantize_weight

GROUP = 128


def main() -> None:
    """Prints the table."""
    _, model = smollm2()
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    weights = [layer.weight.detach().float() for layer in layers]
    print("| constraint | rounding | error % | of the largest % |\n|---|---|---|---|")
    total = torch.stack([energies(w, w.abs()) for w in weights]).sum(0)
    for constraint in SCALE_CONSTRAINTS:
        for rounding in SCALE_ROUNDINGS if constraint != "none" else ("-",):
            noise = torch.zeros(2, dtype=torch.float64)
            for w in weights:
                packed, scale = quantize_weight(w, "fp4_e2m1", GROUP, False, constraint, rounding)
                noise += energies(dequantize_weight(packed, scale, "fp4_e2m1", GROUP, w.shape[1]) - w, w.abs())
            all_of_them, largest = (100 * (noise / total).sqrt()).tolist()
            print(f"| {constraint} | {rounding} | {all_of_them:.2f} | {largest:.2f} |", flush=True)


def energies(error: Tensor, magnitude: Tensor) -> Tensor:
    """Of `error [N, K]`: its squares' sum over all elements, and over those of the largest magnitude in each group."""
    groups, sizes = (F.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP)) for x in (error, magnitude))
    largest = groups.gather(-1, sizes.argmax(-1, keepdim=True))
    return torch.stack([error.double().square().sum(), largest.double().square().sum()])


if __name__ == "__main__":
    with torch.no_grad():
        main()
