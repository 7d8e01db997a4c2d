"""Quantize once, use twice: a saved folder for PyTorch and an ONNX file for ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime
import torch
import transformers

import zq_compiler as zq
from zq_compiler.numerics import sqnr


def main() -> None:
    """Quantize a small random BERT, save it, export it, and run all three."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1000, 2000, (2, 16))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    # check=True runs the model after every pass and holds each to its promise: exact, close, or lossy.
    quantized = zq.quantize(model, inputs, recipe="w8a8", check=True)
    for record in quantized.program.history:
        print(f"{record.name:20} {record.changes:4} changes, SQNR {record.sqnr:.1f} dB against the graph before it")

    with tempfile.TemporaryDirectory() as folder:
        quantized.save(Path(folder) / "bert-w8a8")
        loaded = zq.load(Path(folder) / "bert-w8a8")  # needs neither the model nor its class
        print(quantized.export_onnx(Path(folder) / "bert.onnx"))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # exact products on CPUs without VNNI too
        file = str(Path(folder) / "bert.onnx")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        # Another batch size and length than the example's: those dimensions stayed dynamic.
        ids = torch.randint(1000, 2000, (3, 21))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        reference = loaded(**inputs).last_hidden_state
        (actual,) = session.run(["last_hidden_state"], {name: value.numpy() for name, value in inputs.items()})
        print(f"INT8 against fp32:              {sqnr(expected, reference):6.1f} dB")
        print(f"ONNX Runtime against reference: {sqnr(reference, torch.from_numpy(actual)):6.1f} dB")


if __name__ == "__main__":
    main()
