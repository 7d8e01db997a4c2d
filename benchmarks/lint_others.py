"""What the lint finds in files that other tools write: a small BERT, quantized by ONNX Runtime and by NVIDIA ModelOpt.

    python -m benchmarks.lint_others
    python -m benchmarks.lint_others --modelopt path/to/venv/bin/python    # an environment with nvidia-modelopt[onnx]
    python -m benchmarks.lint_others --rules                               # the table of rules in docs/lint.md

The weights are random: it is the graph that is linted.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import zq_compiler as zq

BATCH, TOKENS, VOCABULARY = 2, 32, 100
MODELOPT = """
import sys, numpy as np
from modelopt.onnx.quantization import quantize
source, target, mode = sys.argv[1:]
quantize(source, quantize_mode=mode, calibration_data=dict(np.load(source + ".npz")), output_path=target,
         calibration_method="max", calibration_eps=["cpu"], high_precision_dtype="fp16", opset=21)
"""


def inputs() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, TOKENS))
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}


def export_bert(path: Path, attention: str = "eager") -> None:
    """A BERT of 2 layers, 4 heads of 32, written by torch's exporter."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        attn_implementation=attention,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    example = {name: torch.from_numpy(x) for name, x in inputs().items()}
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs=example,
            dynamo=True,
            opset_version=21,
            dynamic_shapes={key: {0: batch, 1: tokens} for key in example},
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def onnxruntime_files(source: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """What ONNX Runtime's quantizer makes of a file."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([inputs()])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    prepared = folder / "prepared.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)

    def static(activation: QuantType, **options: Any) -> Callable[[Path], None]:
        kinds = {
            "activation_type": activation,
            "weight_type": QuantType.QInt8,
            "per_channel": True,
            "extra_options": options,
        }
        return lambda path: quantize_static(
            str(prepared),
            str(path),
            Once(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            **kinds,
        )

    ways: dict[str, Callable[[Path], None]] = {
        "quantize_dynamic": lambda path: quantize_dynamic(str(prepared), str(path)),
        "quantize_static U8S8": static(QuantType.QUInt8),
        "quantize_static S8S8 symmetric": static(QuantType.QInt8, ActivationSymmetric=True),
    }
    for index, (name, write) in enumerate(ways.items()):
        path = folder / f"onnxruntime{index}.onnx"
        write(path)
        yield f"ONNX Runtime {name}", path


def modelopt_files(python: str, source: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """What ModelOpt makes of a file, in the environment of another Python."""
    np.savez(f"{source}.npz", **inputs())  # type: ignore[arg-type]
    for mode in ("int8", "fp8"):
        path = folder / f"modelopt_{mode}.onnx"
        subprocess.run([python, "-c", MODELOPT, str(source), str(path), mode], check=True, capture_output=True)
        yield f"ModelOpt {mode}", path


def rules_table() -> str:
    """The rules, as Markdown."""
    from zq_compiler.lowering.lint.rules import RULES

    lines = ["| rule | for | what happens | to mend it | shown by |", "|---|---|---|---|---|"]
    for rule in RULES:
        targets = ", ".join(rule.targets)
        shown = rule.source or (
            "tests, with the runtime" if len(rule.targets) > 1 else f"tests, with {rule.targets[0]}"
        )
        name = f"{rule.id} `{rule.name}`"
        lines.append(f"| {name} | {targets} | **{rule.severity}**: {rule.title} | {rule.mend} | {shown} |")
    return "\n".join(lines)


def findings_table(files: list[tuple[str, Path]]) -> str:
    """Counts by rule for each file, as Markdown."""
    lines = ["| file | target | refused, wrong, unfused | slow, notes |", "|---|---|---|---|"]
    for name, path in files:
        for target in ("tensorrt", "onnxruntime"):
            found = zq.lint(path, target).by_rule().values()
            cells = [
                ", ".join(f"{len(f)} {f[0].rule} `{f[0].name}`" for f in found if (f[0].severity in mild) == late)
                for mild in [("slow", "note")]
                for late in (False, True)
            ]
            lines.append(f"| {name} | {target} | {cells[0] or 'none'} | {cells[1] or 'none'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelopt", metavar="PYTHON", help="a Python with nvidia-modelopt[onnx]")
    parser.add_argument("--rules", action="store_true", help="print the table of rules, and nothing else")
    arguments = parser.parse_args()
    if arguments.rules:
        print(rules_table())
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files: list[tuple[str, Path]] = []
        for attention in ("eager", "sdpa"):
            source = folder / f"{attention}.onnx"
            export_bert(source, attention)
            files += [
                (f"{attention}: {tool}", path) for tool, path in onnxruntime_files(source, _make(folder / attention))
            ]
            if arguments.modelopt:
                written = modelopt_files(arguments.modelopt, source, _make(folder / f"{attention}_modelopt"))
                files += [(f"{attention}: {tool}", path) for tool, path in written]
        print(findings_table(files))


def _make(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
