"""Generate from a file that `export_onnx(..., with_past=True)` wrote, with NumPy and ONNX Runtime alone.

python examples/generate_onnx.py model.onnx --ids 5 17 42 --new 64
python examples/generate_onnx.py model.onnx --tokenizer path/to/tokenizer.json --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(path: str | Path) -> ort.InferenceSession:
    """A session on the CPU, with exact integer products where there is no VNNI too."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def generate(session: Any, ids: np.ndarray, mask: np.ndarray, new: int) -> np.ndarray:
    """The likeliest `new` tokens behind `ids [B, T]`, padded on the left where `mask [B, T]` is 0; `[B, T + new]`."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    past = {}
    for name, value in inputs.items():
        if name.startswith("past_key_values."):
            _, heads, _, width = value.shape
            past[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros((len(ids), heads, 0, width), KINDS[value.type]))
    step = ids
    for _ in range(new):
        given = {"input_ids": step, "attention_mask": mask}
        if "position_ids" in inputs:
            given["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, -step.shape[1] :]
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(given[name]) for name in given if name in inputs}
        results = dict(zip(outputs, session.run_with_ort_values(outputs, feeds | past), strict=True))
        # What came out goes in again as it is: keys and values never become NumPy arrays.
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        step = results["logits"].numpy()[:, -1].argmax(-1)[:, None]
        ids, mask = np.concatenate([ids, step], 1), np.concatenate([mask, np.ones_like(step)], 1)
    return ids


def main() -> None:
    """Generate behind token ids, or behind a text where a tokenizer is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=int, nargs="+", default=[1])
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, read by the package tokenizers")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--new", type=int, default=32, help="how many tokens to generate")
    given = parser.parse_args()
    tokenizer = None
    if given.tokenizer is not None:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(given.tokenizer))
    ids = np.array([tokenizer.encode(given.prompt).ids if tokenizer else given.ids], np.int64)
    found = generate(open_session(given.model), ids, np.ones_like(ids), given.new)[0].tolist()
    print(tokenizer.decode(found) if tokenizer else " ".join(map(str, found)))


if __name__ == "__main__":
    main()
