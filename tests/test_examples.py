"""Every example runs from a shell, and prints what it is there to show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "compile_model": ["SQNR against fp32", "7 int8", "released"],
    "export_model": ["insert_qdq", "bert.onnx: onnxruntime", "ONNX Runtime against reference"],
    "custom_pass": ["cheap_activation       1 changes", "aten.relu", "refused: cheap_activation: SQNR"],
    "inspect_pass": [
        "18_cleanup.txt",
        "+layer_norm_quantize_default",
        "FuseGelu at",
        "its float output has other readers",
    ],
}


def _run(name: str, *arguments: str, models: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"ZQ_CACHE_DIR": models} if models else {})}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SHOWN, "demo", "generate_onnx"}


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str):
    done = _run(name)
    assert done.returncode == 0, done.stderr
    assert [text for text in SHOWN[name] if text not in done.stdout] == [], done.stdout
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_generate_onnx(tmp_path: Path):
    import tiny_models
    import torch

    import zq_compiler as zq

    model, inputs = tiny_models.build("llama")
    zq.export_onnx(model, inputs, tmp_path / "llama.onnx", with_past=True)
    done = _run("generate_onnx", str(tmp_path / "llama.onnx"), "--ids", "5", "17", "42", "--new", "3")
    assert done.returncode == 0, done.stderr
    ids = [int(token) for token in done.stdout.split()]
    quantized = zq.quantize(model, inputs)
    for length in (3, 4, 5):
        given = torch.tensor([ids[:length]])
        logits = quantized(input_ids=given, attention_mask=torch.ones_like(given)).logits
        assert ids[length] == logits[0, -1].argmax()
    assert len(ids) == 6 and ids[:3] == [5, 17, 42]
    words = {"[UNK]": 0, "once": 1, **{f"w{i}": i for i in range(2, 99)}}
    lookup = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": lookup}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--prompt", "once w5"]
    done = _run("generate_onnx", str(tmp_path / "llama.onnx"), *given, "--new", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("once w5 w") and len(done.stdout.split()) == 5


def test_demo(tmp_path: Path):
    done = _run("demo", "--sentences", "64", "--rounds", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert "zeroquant in ONNX Runtime" in done.stdout and "embedding tables stay in float" in done.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "figures.json").read_text())["rows"]}
    assert rows["fp32 torch.compile"]["cosine_worst"] > 0.9999
    for name in ("zeroquant", "zeroquant in ONNX Runtime"):
        assert rows[name]["cosine_worst"] > 0.97 and rows[name]["top10_overlap"] > 0.85
        assert rows[name]["weight_bytes"] < 0.7 * rows["fp32 eager"]["weight_bytes"]


def test_demo_without_its_model(tmp_path: Path):
    done = _run("demo", models=str(tmp_path))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("run `make models-minilm` first")
