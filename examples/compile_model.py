"""The torch.compile door: one argument more, and the linears of a model run in INT8."""

from __future__ import annotations

import torch
import transformers

import zq_compiler as zq
from zq_compiler.numerics import sqnr


def main() -> None:
    """Compile a small random BERT, compare it with fp32, and say what was quantized."""
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=512)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(1000, 2000, (4, 32))

    # Installing zq_compiler registers the backend; importing it is not needed for this line.
    fast = torch.compile(model, backend="zeroquant", options={"recipe": "w8a8"})
    with torch.no_grad():
        expected, actual = model(ids).last_hidden_state, fast(ids).last_hidden_state
    print(f"SQNR against fp32: {sqnr(expected, actual):.1f} dB")

    # One report for every graph that Dynamo found in the model; a BERT is one graph.
    for report in zq.compile_reports():
        print(report)

    # The float copies of quantized weights are still there, for other shapes and recipes; this lets go of them.
    print(f"released {zq.release(model) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
