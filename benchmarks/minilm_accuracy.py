"""How far w8a8 is from float on real MiniLM embeddings, and what each idea for coming closer is worth.

    python -m benchmarks.minilm_accuracy

Simulated in float (quantize, dequantize) on every linear, so that a variant is one function: the paper's token-wise
form, weights alone, activations alone, and four ideas that need no calibration data: fold the norm's bias or its weight
into the linear, asymmetric ranges, and the rotation of blocks of 16 features that recipe `w8a8` has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.real_models import minilm, news_sentences
from zq_compiler.numerics import dequantize, quantize_per_channel, quantize_per_token, rotate

SENTENCES = 512
Linear = Callable[[Tensor, nn.Linear, nn.LayerNorm | None], Tensor]


def int8_weight(w: Tensor) -> Tensor:
    return dequantize(*quantize_per_channel(w))


def int8_token(x: Tensor) -> Tensor:
    return dequantize(*quantize_per_token(x))


def nine_bit_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 255
    return (x / scale).round() * scale


def asymmetric_token(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return int8_token(x - (low + high) / 2) + (low + high) / 2


def without_norm_bias(x: Tensor, layer: nn.Linear, norm: nn.LayerNorm | None) -> Tensor:
    if norm is None:
        return F.linear(int8_token(x), int8_weight(layer.weight), layer.bias)
    bias = layer.bias + layer.weight @ norm.bias
    return F.linear(int8_token(x - norm.bias), int8_weight(layer.weight), bias)


def without_norm_weight(x: Tensor, layer: nn.Linear, norm: nn.LayerNorm | None) -> Tensor:
    gain = norm.weight if norm is not None else torch.ones(x.shape[-1])
    return F.linear(int8_token(x / gain), int8_weight(layer.weight * gain), layer.bias)


VARIANTS: dict[str, Linear] = {
    "w8a8-plain": lambda x, m, _: F.linear(int8_token(x), int8_weight(m.weight), m.bias),
    "weights only": lambda x, m, _: F.linear(x, int8_weight(m.weight), m.bias),
    "activations only": lambda x, m, _: F.linear(int8_token(x), m.weight, m.bias),
    "9-bit activations": lambda x, m, _: F.linear(nine_bit_token(x), int8_weight(m.weight), m.bias),
    "norm bias folded away": without_norm_bias,
    "norm weight folded away": without_norm_weight,
    "asymmetric activations": lambda x, m, _: F.linear(asymmetric_token(x), int8_weight(m.weight), m.bias),
    "w8a8 (rotated)": lambda x, m, _: F.linear(int8_token(rotate(x)), int8_weight(rotate(m.weight)), m.bias),
}


def embed(model: nn.Module, tokenizer: Callable[..., dict[str, Tensor]], sentences: list[str]) -> Tensor:
    """Mean-pooled, normalised embeddings, `[sentences, features]`."""
    rows = []
    for start in range(0, len(sentences), 32):
        batch = tokenizer(
            sentences[start : start + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch)[0]
        rows.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def norms_before(model: Any) -> dict[str, nn.LayerNorm]:
    """For each linear that reads a norm's output, that norm."""
    layers = model.encoder.layer
    found: dict[str, nn.LayerNorm] = {}
    for i, layer in enumerate(layers):
        before = model.embeddings.LayerNorm if i == 0 else layers[i - 1].output.LayerNorm
        for name in ("query", "key", "value"):
            found[f"encoder.layer.{i}.attention.self.{name}"] = before
        found[f"encoder.layer.{i}.intermediate.dense"] = layer.attention.output.LayerNorm
    return found


def _forward(linear: Linear, layer: nn.Linear, norm: nn.LayerNorm | None, x: Tensor) -> Tensor:
    return linear(x, layer, norm)


def main() -> None:
    torch.set_num_threads(1)
    tokenizer, model = minilm()
    sentences = news_sentences(SENTENCES)
    norms = norms_before(model)
    table = Table(title=f"all-MiniLM-L6-v2, {SENTENCES} news sentences: cosine to float32")
    for column in ("variant", "mean", "worst"):
        table.add_column(column)
    with torch.no_grad():
        reference = embed(model, tokenizer, sentences)
        for name, linear in VARIANTS.items():
            for path, module in model.named_modules():
                if isinstance(module, nn.Linear):
                    module.forward = partial(_forward, linear, module, norms.get(path))  # type: ignore[method-assign]
            cosine = (reference * embed(model, tokenizer, sentences)).sum(1)
            table.add_row(name, f"{cosine.mean():.5f}", f"{cosine.min():.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
