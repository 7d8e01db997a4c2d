"""What TensorRT makes of a model, float and quantized: the kernels of the engine that TensorRT-RTX plans, by kind.

    python -m benchmarks.tensorrt_plan [--layers 12]

Random weights in the shapes of BERT-base, GPT-2 and a Llama, float16. No GPU is needed, and no time is measured: the
engine is planned for three architectures and cannot run here. Needs requirements/trt-check.txt.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import zq_compiler as zq
from tests import tensorrt_rtx

RECIPES = ("float", "w8a8-plain", "w8a8", "hero-m2-tensorrt", "hero-m3-tensorrt")
VOCABULARY = 8000  # smaller than the real ones: it changes one kernel's size, and none's kind


def models(layers: int) -> dict[str, torch.nn.Module]:
    """The shapes, by name."""
    torch.manual_seed(0)
    llama = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    return {
        "BERT-base": hf.BertModel(hf.BertConfig(num_hidden_layers=layers, vocab_size=VOCABULARY)).eval(),
        "GPT-2": hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=layers, **tokens)).eval(),
        "Llama": hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=layers, **llama, **tokens)).eval(),
    }


def row(name: str, model: torch.nn.Module, recipe: str, folder: Path) -> str:
    ids = torch.randint(0, VOCABULARY, (2, 32))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name != "BERT-base":
        inputs["use_cache"] = False
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    quantized = zq.quantize(model, inputs, recipe=recipe, calibration=calibration)
    path = folder / "model.onnx"
    quantized.export_onnx(path, target="tensorrt", float_dtype="float16")
    build = tensorrt_rtx.build(path, compute_capabilities=("SM80", "SM89", "SM120"))
    if not build.built:
        return f"| {name} | `{recipe}` | not built: {build.errors[0]} | | | | | |"
    counts = (build.int8_gemms, build.float_gemms, build.int8_mhas, build.half_mhas, build.stray_quantizes)
    return f"| {name} | `{recipe}` | {' | '.join(map(str, counts))} | {len(build.kernels)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    if tensorrt_rtx.MISSING:
        raise SystemExit(tensorrt_rtx.SKIP_REASON)
    print("| shape | recipe | INT8 GEMMs | float GEMMs | INT8 MHA | float16 MHA | lone Q/DQ | kernels |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models(layers).items():
            for recipe in RECIPES:
                print(row(name, model, recipe, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
