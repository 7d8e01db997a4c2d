"""Certificates: right files pass op by op, a wrong weight is found in its layer, files of other models are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import zq_compiler as zq
from tests import onnx_runtime

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from zq_compiler.analysis.certificate import _code_numbers, difference  # noqa: E402
from zq_compiler.kernels import OPS, reference_of  # noqa: E402
from zq_compiler.program import content_hash  # noqa: E402

NEEDS_VNNI = pytest.mark.skipif(
    not onnx_runtime.HAS_VNNI, reason="ONNX Runtime has no exact products of shared weights"
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: Any) -> tuple[zq.QuantizedModel, Path, Any]:
    """A model, its file, and the float model."""
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model, inputs)
    path = tmp_path_factory.mktemp("certificate") / "bert.onnx"
    quantized.export_onnx(path)
    return quantized, path, model


def test_every_result_of_every_op_agrees(bert: Any, tmp_path: Path) -> None:
    quantized, path, _ = bert
    certificate = quantized.certify(path)
    assert certificate.passed and certificate.complete
    linears = sum(n.target is OPS["int8_linear"].overload for n in quantized.program.graph.nodes)
    for lowering in ("inductor", "onnx"):
        for mode in ("teacher-forced", "free-running"):
            rows = [row for row in certificate.rows if (row.lowering, row.mode) == (lowering, mode)]
            assert min(certificate.outputs[lowering].values()) > 100
            assert sum(row.op == "int8_linear" for row in rows) == linears == 13
            assert len({row.result for row in rows}) == len(rows)
    forced = [row for row in certificate.rows if row.mode == "teacher-forced" and row.lowering == "onnx"]
    between = {row.result for row in forced if row.op == "between"}
    assert "pooler_output" in between and any("self/" in name for name in between), "attention was not compared"
    assert all(row.equal == row.values for row in forced if row.op == "int8_linear"), "sums differ"
    plain = zq.quantize(*tiny_models.build("bert"), recipe="w8a8-plain")
    plain.export_onnx(tmp_path / "plain.onnx")
    forced = [row for row in plain.certify(tmp_path / "plain.onnx").rows if row.mode == "teacher-forced"]
    assert all(row.equal == row.values for row in forced if row.integers and row.op == "quantize_per_token")
    printed = str(certificate)
    assert "passed" in printed and "onnx free-running: last_hidden_state" in printed
    certificate.save(tmp_path / "certificate.json")
    data = json.loads((tmp_path / "certificate.json").read_text())
    assert data["passed"] and len(data["rows"]) == len(certificate.rows) and data["rows"][0]["different"] == 0


def test_other_inputs_and_a_loaded_model(bert: Any, tmp_path: Path) -> None:
    quantized, path, _ = bert
    quantized.save(tmp_path / "saved")
    loaded = zq.load(tmp_path / "saved")
    assert content_hash(loaded.program) == content_hash(quantized.program)
    with pytest.raises(zq.CaptureError, match="holds no example inputs"):
        loaded.certify(path)
    certificate = loaded.certify(path, **tiny_models.text(3, 7))
    assert certificate.passed
    assert {row.values for row in certificate.rows if row.result.endswith("query/int8_linear")} == {3 * 7 * 64}


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("onnxruntime", None), ("onnxruntime", "float16"), ("tensorrt", None), ("tensorrt", "float16")],
)
def test_a_wrong_weight_is_found_in_its_layer(bert: Any, target: str, dtype: str | None, tmp_path: Path) -> None:
    quantized, _, _ = bert
    path = quantized.export_onnx(tmp_path / "right.onnx", target=target, float_dtype=dtype).path
    right = quantized.certify(path)
    assert right.passed, str(right)
    forced = [
        row for row in right.rows if (row.mode, row.lowering, row.op) == ("teacher-forced", "onnx", "int8_linear")
    ]
    assert len(forced) == 13 and not any(row.integers for row in forced)
    quantizes = [row for row in right.rows if row.integers and (row.mode, row.lowering) == ("teacher-forced", "onnx")]
    assert len(quantizes) == 9
    if dtype is None:  # operands are rounded in the other files
        assert all(row.equal >= 0.999 * row.values for row in quantizes)
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "encoder.layer.1.output.dense.weight_q")
    values = bytearray(weight.raw_data)
    values[5] ^= 64
    weight.raw_data = bytes(values)
    onnx.save(model, tmp_path / "wrong.onnx")
    certificate = quantized.certify(tmp_path / "wrong.onnx")
    assert not certificate.passed and "FAILED" in str(certificate)
    forced = [row for row in certificate.rows if row.mode == "teacher-forced" and row.different]
    assert {(row.lowering, row.layer, row.op) for row in forced} == {
        ("onnx", "encoder.layer.1.output.dense", "int8_linear")
    }
    assert f"differs: onnx {forced[0].result}" in str(certificate)
    if dtype is None:
        free = [row for row in certificate.rows if row.mode == "free-running" and row.different]
        assert any(row.layer == "pooler.dense" for row in free)


def test_attention_that_a_file_has_in_floats_is_not_certified(tmp_path: Path) -> None:
    """`hero-m3` has INT8 attention that TensorRT cannot fuse."""
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    quantized.export_onnx(tmp_path / "model.onnx", target="tensorrt")
    certificate = quantized.certify(tmp_path / "model.onnx")
    assert not certificate.complete and not certificate.passed
    apart = [note for note in certificate.notes if "computes in floats what the model does in integers" in note]
    names = [f"encoder.layer.{i}.attention.self/int8_attention" for i in (0, 1)]
    assert all(any(name in note for note in apart) for name in names)
    forced = [row for row in certificate.rows if (row.mode, row.lowering) == ("teacher-forced", "onnx")]
    assert sum(row.op == "int8_linear_quantize" for row in forced) == 4, "Q, K and V are no integers there"
    assert all(row.different == 0 for row in forced) and not any(row.op == "int8_attention" for row in forced)


def test_files_of_others_are_refused(bert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, path, model = bert
    other = zq.quantize(model, tiny_models.text(), recipe="w8a8-plain")
    with pytest.raises(zq.ExportError, match=r"bert.onnx: is of recipe w8a8, the model of w8a8-plain"):
        other.certify(path)
    with torch.no_grad():
        model.pooler.dense.weight[0, 0] += 1
    changed = zq.quantize(model, tiny_models.text())
    with pytest.raises(zq.ExportError, match=r"bert.onnx: is of another model.*export it again"):
        changed.certify(path)
    bare = onnx.load(path)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(zq.ExportError, match="says nothing of the model"):
        quantized.certify(tmp_path / "bare.onnx")
    quantized.export_onnx(tmp_path / "other.onnx", float_dtype="bfloat16")
    with pytest.raises(zq.ExportError, match=r"is in bfloat16.*no kernels.*certify a file in float32 or float16"):
        quantized.certify(tmp_path / "other.onnx")
    quantized.export_onnx(tmp_path / "new.onnx", target="tensorrt", opset=28)
    with pytest.raises(zq.ExportError, match=r"new.onnx: is of opset 28.*none above 26.*certify a file of opset 21"):
        quantized.certify(tmp_path / "new.onnx")
    for name in ("none.onnx", "text.onnx"):
        (tmp_path / "text.onnx").write_text("no ONNX")
        with pytest.raises(zq.ExportError, match=rf"{name}: cannot be read"):
            quantized.certify(tmp_path / name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(zq.ExportError, match="onnxruntime is not installed"):
        quantized.certify(path)


def test_a_result_that_is_an_output_too(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32)).eval()
    quantized = zq.quantize(model, torch.randn(4, 32))
    quantized.export_onnx(tmp_path / "model.onnx")
    certificate = quantized.certify(tmp_path / "model.onnx", torch.randn(7, 32))
    assert certificate.passed, str(certificate)
    rows = [row for row in certificate.rows if row.lowering == "onnx" and row.result == "output"]
    assert [(row.layer, row.op, row.values) for row in rows] == [("2", "int8_linear", 7 * 32)] * 2


def test_a_value_that_the_file_lacks_fails(bert: Any, tmp_path: Path) -> None:
    quantized, path, _ = bert
    model = onnx.load(path)
    name = "encoder.layer.0.attention.self.query/int8_linear"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{x}/renamed" if x == name else x for x in names]
    onnx.save(model, tmp_path / "renamed.onnx")
    certificate = quantized.certify(tmp_path / "renamed.onnx")
    assert not certificate.passed and not certificate.complete
    assert any(f"no value {name}" in note for note in certificate.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "recipe", "with_past", "target", "dtype"),
    [
        ("bert", "hero-m3", False, "onnxruntime", None),
        ("bert", "w8a8", False, "onnxruntime-cuda", None),
        ("gpt2", "hero-m3", False, "onnxruntime", None),
        ("llama", "hero-decoder", True, "onnxruntime", None),
        ("llama", "w8a8", True, "onnxruntime", None),
        ("mixtral", "w8a8", False, "onnxruntime", None),
        ("bert", "hero-m2-tensorrt", False, "tensorrt", None),
        ("bert", "hero-m3-tensorrt", False, "tensorrt", "float16"),
        ("gpt2", "hero-m3-tensorrt", False, "tensorrt", "float16"),
        ("gpt2", "hero-m3", False, "onnxruntime", "float16"),
        ("llama", "w8a8-plain", True, "tensorrt", None),
        pytest.param("albert", "w8a8", False, "onnxruntime", None, marks=NEEDS_VNNI),
    ],
)
def test_every_op_of_other_models(
    family: str, recipe: str, with_past: bool, target: str, dtype: str | None, tmp_path: Path
) -> None:
    model, inputs = tiny_models.build(family)
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    quantized = zq.quantize(model, inputs, recipe=recipe, calibration=calibration)
    quantized.export_onnx(tmp_path / "model.onnx", target, float_dtype=dtype, with_past=with_past)
    certificate = quantized.certify(tmp_path / "model.onnx")
    assert certificate.passed, str(certificate)
    ops = {n.target for n in quantized.program.graph.nodes if reference_of(n.target) is not None}
    seen = {row.op for row in certificate.rows if row.lowering == "onnx"}
    assert seen - {"between"} == {str(op).split(".")[1] for op in ops}


def test_without_vnni_onnx_runtime_refuses_shared_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    quantized = zq.quantize(*tiny_models.build("albert"))
    quantized.export_onnx(tmp_path / "model.onnx")
    with pytest.raises(zq.ExportError, match=r"model.onnx.*does not load it.*certify on a CPU that has it"):
        quantized.certify(tmp_path / "model.onnx")


def test_steps_of_integers_and_floats() -> None:
    want = torch.tensor([[1.0, 8.0], [float("nan"), float("inf")], [0.0, 0.0]])
    last_place = 8 * torch.finfo(torch.float32).eps
    got = torch.tensor([[1.0 + 4 * last_place, 8.0], [float("nan"), 1.0], [0.0, 1e-30]])
    steps = difference(want, got)
    assert steps[0].tolist() == [0.5, 0.0] and steps[1, 0] == 0 and steps[2, 0] == 0
    assert not steps[1, 1] <= 1 and not steps[2, 1] <= 1
    assert difference(torch.tensor([-128], dtype=torch.int8), torch.tensor([127], dtype=torch.int8)).tolist() == [255]


@pytest.mark.parametrize(
    "recipe",
    ["fp8+lorc", "fp8-static", "w4a16-g64+lorc", "w4a16-g64-asym", "fp6", "w8a8+lorc", "w4a8-g128", "w4a8-fp-m2"],
)
def test_weights_and_activations_of_other_formats(recipe: str, tmp_path: Path) -> None:
    """The bytes of FP8 are compared as numbers of values, a step apart where they are neighbours."""
    model, inputs = tiny_models.build("bert")
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    quantized = zq.quantize(model, inputs, recipe=recipe, calibration=calibration)
    quantized.export_onnx(tmp_path / "bert.onnx")
    certificate = quantized.certify(tmp_path / "bert.onnx")
    assert certificate.passed and certificate.complete, str(certificate)
    forced = [row for row in certificate.rows if (row.mode, row.lowering) == ("teacher-forced", "onnx")]
    quantizes = [row for row in forced if row.op in ("quantize_per_token_fp8", "quantize_static_fp8")]
    assert bool(quantizes) == recipe.startswith(("fp8", "w4a8-fp"))
    assert all(row.equal == row.values for row in quantizes if row.integers)
    linears = {"w8a8+lorc": "int8_linear", "w4a8-g128": "w4a8_linear"}
    linears |= dict.fromkeys(["fp8+lorc", "fp8-static", "w4a8-fp-m2"], "fp8_linear")
    linear = linears.get(recipe, "weight_only_linear")
    assert sum(row.op == linear for row in forced) == 13


def test_steps_of_fp8_are_between_neighbours() -> None:
    values = torch.tensor([1.0, 448.0, -0.001953125, 0.0]).to(torch.float8_e4m3fn)
    others = torch.tensor([1.125, 416.0, 0.001953125, -0.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    steps = difference(_code_numbers(values), _code_numbers(others))
    assert steps.tolist() == [1.0, 1.0, 2.0, 0.0]
