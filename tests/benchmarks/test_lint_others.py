"""The lint on files of other tools, against what the runtimes make of them; and the document it is described in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zq_compiler as zq
from benchmarks import lint_others
from tests import tensorrt_rtx
from tests.lowering.lint.test_rules import optimized

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
SHAPES = dict.fromkeys(lint_others.inputs(), ((1, 1), (2, 32), (8, 64)))


def test_the_document_has_the_rules_of_the_code():
    document = Path(__file__).parents[2] / "docs" / "lint.md"
    assert lint_others.rules_table() in document.read_text(), "run `python -m benchmarks.lint_others --rules`"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX Runtime's files of a BERT, by the name of the way."""
    folder = tmp_path_factory.mktemp("bert")
    lint_others.export_bert(folder / "bert.onnx")
    written = lint_others.onnxruntime_files(folder / "bert.onnx", folder)
    return {name.split("quantize_")[1]: path for name, path in written}


def names(path: Path, target: str) -> set[str]:
    """Names of the rules that a file breaks, but for what is slow or a note."""
    report = zq.lint(path, target)
    return {finding.name for finding in report.findings if finding.severity not in ("slow", "note")}


@pytest.mark.slow
def test_files_of_onnxruntime_for_tensorrt(files):
    assert {"zero-point-not-zero", "integer-operator"} <= names(files["dynamic"], "tensorrt")
    assert {"zero-point-not-zero", "scores-quantized"} <= names(files["static U8S8"], "tensorrt")
    assert names(files["static S8S8 symmetric"], "tensorrt") == {"scores-quantized"}


@pytest.mark.slow
@pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)
def test_tensorrt_agrees(files):
    assert not tensorrt_rtx.build(files["dynamic"], shapes=SHAPES).parsed
    assert not tensorrt_rtx.build(files["static U8S8"], shapes=SHAPES).parsed
    signed = tensorrt_rtx.build(files["static S8S8 symmetric"], shapes=SHAPES)
    # Two layers of Q, K, V in one product, output, FC1, FC2, and the two products of an attention that fell apart.
    assert (signed.int8_gemms, signed.float_gemms, signed.int8_mhas, signed.half_mhas) == (2 * 6, 0, 0, 0)


@pytest.mark.slow
def test_onnxruntime_agrees_about_its_own_files(files, tmp_path):
    assert names(files["dynamic"], "onnxruntime") == names(files["static U8S8"], "onnxruntime") == set()
    unsigned = optimized(files["static U8S8"], tmp_path)
    assert unsigned["QLinearMatMul"] == 2 * 8 and "MatMul" not in unsigned
    findings = [f for f in zq.lint(files["static S8S8 symmetric"], "onnxruntime").findings if f.severity == "unfused"]
    assert {f.name for f in findings} == {"signed-and-shared"}
    signed = optimized(files["static S8S8 symmetric"], tmp_path)
    assert signed["MatMul"] == len({f.node for f in findings}) == 8


@pytest.mark.slow
def test_our_own_file_is_for_onnxruntime(tmp_path):
    quantized = zq.quantize(torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(), (torch.randn(3, 64),))
    quantized.export_onnx(tmp_path / "linear.onnx", target="onnxruntime")
    assert names(tmp_path / "linear.onnx", "onnxruntime") == set()
    assert names(tmp_path / "linear.onnx", "tensorrt") == {"zero-point-not-zero", "vendor-operator"}
