"""Weights of a few bits in ONNX: the values of the file are the references, and runtimes compute with them packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.tolerances import BF16_DB, ROUNDING_DB
from zq_compiler import QRule, QScheme, Recipe
from zq_compiler.formats import FORMATS
from zq_compiler.numerics import (
    dequantize_weight,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static_fp8,
    quantize_weight,
    sqnr,
)

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from onnx.reference import ReferenceEvaluator  # noqa: E402

from tests import tensorrt_rtx  # noqa: E402
from zq_compiler.lowering.onnx.packed_weights import as_rows_of_e4m3, nibble_blocks, storage_of  # noqa: E402

needs_builder = pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)


class Linears(nn.Module):
    """A linear in each format, all of the same input."""

    def __init__(self, features: int, formats: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(features)
        for name in formats:
            self.add_module(name, nn.Linear(features, 48))
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


def exported(
    path: Path, formats: Sequence[str], group: int, target: str, features: int, opset: int = 21
) -> tuple[Any, Any, torch.Tensor, Any]:
    """The model, the export's report, some rows, and what the eager reference computes of them."""
    model, x = Linears(features, formats), torch.randn(3, features)
    shared = "per_group" if group else "per_channel"
    rules = tuple(QRule(f"{name}$", QScheme(name, shared, group), None) for name in formats)
    q = zq.quantize(model, (x,), recipe=Recipe("packed", rules))
    return model, q.export_onnx(path, target=target, opset=opset), x, q(x)


def run(path: Path, x: torch.Tensor, level: str = "ORT_DISABLE_ALL") -> list[torch.Tensor]:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = getattr(ort.GraphOptimizationLevel, level), 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def matrices_of(path: Path) -> dict[str, np.ndarray]:
    """The weights `[K, N]` that a TensorRT file stores, by ONNX's own reference of DequantizeLinear; by layer."""
    model, found = onnx.load(path), {}
    for node in (n for n in model.graph.node if n.op_type == "DequantizeLinear"):
        constants = [i for i in model.graph.initializer if i.name in node.input]
        value = onnx.helper.make_empty_tensor_value_info(node.output[0])
        alone = onnx.helper.make_graph([node], "weight", [], [value], constants)
        evaluator = ReferenceEvaluator(onnx.helper.make_model(alone, opset_imports=model.opset_import))
        found[constants[0].name.partition(".")[0]] = evaluator.run(None, {})[0]
    return found


def element_types(path: Path) -> dict[str, str]:
    """Of the weights in a file, by layer."""
    weights = [i for i in onnx.load(path).graph.initializer if ".weight_q" in i.name]
    return {i.name.partition(".")[0]: onnx.TensorProto.DataType.Name(i.data_type) for i in weights}


IN_TENSORRT = {name: "INT8" for name in ("int8", "fp6_e2m3", "fp4_e2m1", "fp4_e3m0")} | {
    **dict.fromkeys(["int4", "int3", "int2", "ternary", "binary"], "INT4"),
    **dict.fromkeys(["fp8_e4m3", "fp6_e3m2"], "FLOAT8E4M3FN"),
    **dict.fromkeys(["fp8_e5m2", "int4_asym", "int3_asym", "int2_asym"], "FLOAT"),
}
NOT_IN_TENSORRT = tuple(name for name, element in IN_TENSORRT.items() if element == "FLOAT")
FLOAT8 = ("fp8_e4m3", "fp6_e3m2", "fp8_e5m2")


@pytest.mark.parametrize("group", [0, 32])
def test_every_format_in_onnx_runtimes_terms(tmp_path: Path, group: int) -> None:
    _, report, x, want = exported(tmp_path / "m.onnx", list(FORMATS), group, "onnxruntime", 96)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        got = run(report.path, x, level)
        assert all(sqnr(w, y) > ROUNDING_DB for w, y in zip(want, got, strict=True))
    assert report.nodes["MatMulNBits"] == len(FORMATS) - len(FLOAT8)
    assert report.nodes["MatMul"] == report.nodes["DequantizeLinear"] == len(FLOAT8)
    assert element_types(report.path) == {
        name: ("FLOAT8E5M2" if name == "fp8_e5m2" else "FLOAT8E4M3FN") if name in FLOAT8 else "UINT8"
        for name in FORMATS
    }
    assert any("memory is not saved" in note for note in report.notes)


def test_files_for_cuda_have_no_products_of_two_bits(tmp_path: Path) -> None:
    _, report, x, want = exported(tmp_path / "m.onnx", ["int2", "binary", "int8"], 32, "onnxruntime-cuda", 96)
    products = [n for n in onnx.load(report.path).graph.node if n.op_type == "MatMulNBits"]
    bits = [next(a.i for a in n.attribute if a.name == "bits") for n in products]
    assert bits == [4, 4, 8]
    assert all(sqnr(w, y) > ROUNDING_DB for w, y in zip(want, run(report.path, x), strict=True))


@pytest.mark.parametrize("group", [0, 32, 128])
def test_tensorrts_values_are_the_references_bit_for_bit(tmp_path: Path, group: int) -> None:
    model, report, x, want = exported(tmp_path / "m.onnx", list(FORMATS), group, "tensorrt", 96)
    got = run(report.path, x)
    assert all(sqnr(w, y) > ROUNDING_DB for w, y in zip(want, got, strict=True))
    assert element_types(report.path) == IN_TENSORRT
    assert any("fp8_e5m2: its weight is stored in floats: TensorRT has no fp8_e5m2" in n for n in report.notes)
    stored = matrices_of(report.path)
    assert set(stored) == set(FORMATS) - set(NOT_IN_TENSORRT)
    assert any("int4_asym: its weight is stored in floats: TensorRT has no int4_asym" in n for n in report.notes)
    for name, matrix in stored.items():  # 96: a ragged group of 128
        packed, scale = quantize_weight(getattr(model, name).weight.detach(), name, group)
        np.testing.assert_array_equal(matrix, dequantize_weight(packed, scale, name, group, 96).numpy().T)


IN_OPSET_28 = IN_TENSORRT | {
    **dict.fromkeys(["fp6_e3m2", "fp4_e3m0"], "FLOAT6E3M2"),
    **{"fp6_e2m3": "FLOAT6E2M3", "fp4_e2m1": "FLOAT4E2M1"},
}


@pytest.mark.parametrize("group", [0, 32, 128])
def test_opset_28_has_types_of_its_own(tmp_path: Path, group: int) -> None:
    """No runtime reads FP6: ONNX's own reference computes the values, and the whole file."""
    model, report, x, want = exported(tmp_path / "m.onnx", list(FORMATS), group, "tensorrt", 96, opset=28)
    file = onnx.load(report.path)
    assert (file.opset_import[0].version, file.ir_version) == (28, 14)
    assert element_types(report.path) == IN_OPSET_28
    stored = matrices_of(report.path)
    assert set(stored) == set(FORMATS) - set(NOT_IN_TENSORRT)
    assert any("int4_asym: its weight is stored in floats: TensorRT has no int4_asym" in n for n in report.notes)
    for name, matrix in stored.items():
        packed, scale = quantize_weight(getattr(model, name).weight.detach(), name, group)
        np.testing.assert_array_equal(matrix, dequantize_weight(packed, scale, name, group, 96).numpy().T)
    got = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x.numpy()})
    assert all(sqnr(w, torch.from_numpy(y)) > ROUNDING_DB for w, y in zip(want, got, strict=True))
    assert sum("neither ONNX Runtime 1.31 nor TensorRT-RTX 1.7 reads" in note for note in report.notes) == 1
    ahead = "fp4_e2m1 in blocks" if group else "fp4_e2m1"
    assert f"fp4_e2m1: TensorRT dequantizes {ahead} ahead of the product" in report.notes


def test_fp6_takes_six_bits_in_opset_28(tmp_path: Path) -> None:
    sizes = {}
    for opset in (21, 28):
        path = exported(tmp_path / f"{opset}.onnx", ["fp6_e3m2"], 0, "tensorrt", 1024, opset)[1].path
        (weight,) = [i for i in onnx.load(path).graph.initializer if ".weight_q" in i.name]
        sizes[opset] = len(weight.raw_data)
    assert sizes == {21: 48 * 1024, 28: 48 * 1024 * 6 // 8}


def test_onnx_runtime_does_not_read_opset_28(tmp_path: Path) -> None:
    report = exported(tmp_path / "fp6.onnx", ["fp6_e3m2"], 0, "tensorrt", 64, opset=28)[1]
    with pytest.raises(Exception, match="Unsupported model IR version: 14"):
        ort.InferenceSession(report.path)


@needs_builder
@pytest.mark.parametrize(("name", "built"), [("fp6_e2m3", False), ("fp6_e3m2", False), ("fp4_e2m1", True)])
def test_tensorrt_reads_fp4_and_not_fp6(tmp_path: Path, name: str, built: bool) -> None:
    model, x = Linears(64, [name]), torch.randn(4, 64)
    q = zq.quantize(model, (x,), recipe=Recipe("one", (QRule(r".*", QScheme(name, "per_channel"), None),)))
    report = q.export_onnx(tmp_path / "m.onnx", target="tensorrt", opset=28, float_dtype="float16")
    build = tensorrt_rtx.build(report.path, compute_capabilities=("SM120",))
    assert build.built == built
    if built:
        assert any("FP4E2M1" in kernel.constants for kernel in build.kernels), str(build)
    else:
        assert any("Failed to import initializer" in error for error in build.errors), build.errors


def test_two_weights_that_are_equal(tmp_path: Path) -> None:
    """Small equal constants become one, which has one of the two names."""
    model, x = Linears(16, ["int4", "int3"]), torch.randn(2, 16)
    model.int3.weight = nn.Parameter(model.int4.weight.detach().clone())
    q = zq.quantize(model, (x,), recipe="w4a16-g64")
    report = q.export_onnx(tmp_path / "m.onnx", target="tensorrt")
    assert list(element_types(report.path).values()) == ["INT4"]
    assert all(sqnr(w, y) > ROUNDING_DB for w, y in zip(q(x), run(report.path, x), strict=True))


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("features", [41, 576])
def test_features_that_no_block_divides(tmp_path: Path, features: int, group: int, target: str) -> None:
    formats = ["int4", "int8", "fp6_e3m2"]
    _, report, x, want = exported(tmp_path / "m.onnx", formats, group, target, features)
    assert all(sqnr(w, y) > ROUNDING_DB for w, y in zip(want, run(report.path, x), strict=True))
    in_floats = {note for note in report.notes if "stored in floats" in note}
    expected = set()
    if target == "tensorrt" and features == 41 and group:
        why = "its weight is stored in floats: no block of 16 or more divides 41"
        expected = {f"{name}: {why}" for name in formats}
    assert in_floats == expected


def test_blocks_are_filled_up_with_zeros() -> None:
    values = torch.tensor([[1, -2, 7, -8, 3]], dtype=torch.int8)
    assert nibble_blocks(values, 4, 4).tolist() == [[[0x69, 0x0F], [0x8B, 0x88]]]
    assert nibble_blocks(values, 8, 4).tolist() == [[[129, 126, 135, 120], [131, 128, 128, 128]]]
    assert storage_of("fp8_e5m2", ("int4", "int8", "fp8_e4m3")) is None


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", ["w4a16-g64", "fp6", "fp8"])
def test_half_precision_files(tmp_path: Path, name: str, target: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 64)).eval(), torch.randn(4, 128)
    q = zq.quantize(model, (x,), recipe=name)
    report = q.export_onnx(tmp_path / "m.onnx", target=target, float_dtype="float16")
    initializers = onnx.load(report.path).graph.initializer
    assert not any(i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) >= 64 * 64 for i in initializers)
    assert sqnr(q(x), run(report.path, x.half())[0].float()) > BF16_DB


# --- FP8 activations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("features", [33, 4096])
@pytest.mark.parametrize("recipe", ["fp8", "fp8-static"])
def test_fp8_activations_are_the_references(tmp_path: Path, features: int, target: str, recipe: str) -> None:
    """Fed to the quantize alone, by an extra output of the file: the same bytes, times the step that TensorRT wants."""
    torch.manual_seed(features)
    model = nn.Sequential(nn.Linear(features, 32)).eval()
    x = torch.randn(5, features) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    q = zq.quantize(model, (x,), recipe=recipe, calibration=[x / 2] if recipe == "fp8-static" else None)
    report = q.export_onnx(tmp_path / "m.onnx", target=target)
    graph = onnx.shape_inference.infer_shapes(onnx.load(report.path))
    types = {v.name: v.type.tensor_type.elem_type for v in graph.graph.value_info}
    quantized = [n.output[0] for n in graph.graph.node if types.get(n.output[0]) == onnx.TensorProto.FLOAT8E4M3FN]
    graph.graph.node.append(onnx.helper.make_node("Cast", quantized, ["bytes"], to=onnx.TensorProto.FLOAT))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("bytes", onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, stored = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = quantize_per_token_fp8(x)[0] if recipe == "fp8" else quantize_static_fp8(x, (x / 2).abs().max() / 448)
    np.testing.assert_array_equal(stored, want.float().numpy())
    assert sqnr(q(x), torch.from_numpy(y)) > ROUNDING_DB


def test_a_poisoned_row_stays_poisoned_in_onnx_runtime(tmp_path: Path) -> None:
    x = torch.randn(3, 64)
    q = zq.quantize(nn.Sequential(nn.Linear(64, 32)).eval(), (x,), recipe="fp8")
    path = q.export_onnx(tmp_path / "m.onnx").path
    x[1, 5] = torch.nan
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        assert run(path, x, level)[0].isnan().all(-1).tolist() == [False, True, False]


# --- packed weights and quantized activations ------------------------------------------------------------------------

W4A8 = ("w4a8", "w4a8-g128", "w48a8", "w4a4", "w4a8-fp", "w4a8-fp-m1", "w4a8-fp-m2")
IN_FLOATS = {
    ("onnxruntime", "int"): "ONNX Runtime has no product of INT4 weights and INT8 activations",
    ("onnxruntime-cuda", "int"): "ONNX Runtime has no product of INT4 weights and INT8 activations",
    ("tensorrt", "int"): "TensorRT has no product of INT4 weights and INT8 activations",
    ("onnxruntime", "fp"): "ONNX Runtime computes products of FP8 in floats",
    ("onnxruntime-cuda", "fp"): "ONNX Runtime computes products of FP8 in floats",
    ("tensorrt", "fp"): "TensorRT dequantizes fp8_e4m3 in blocks ahead of the product",
}


class MLP(nn.Module):
    """A ragged group of 128, and features that neither 128 nor 64 divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(272, 176), nn.Linear(176, 64)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-cuda", "tensorrt"])
@pytest.mark.parametrize("recipe", W4A8)
def test_packed_weights_and_quantized_activations(tmp_path: Path, recipe: str, target: str) -> None:
    model, x = MLP(), torch.randn(5, 272)
    q = zq.quantize(model, (x,), recipe=recipe)
    report = q.export_onnx(tmp_path / "m.onnx", target=target)
    onnx.checker.check_model(report.path, full_check=True)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        if target == "onnxruntime" or level == "ORT_DISABLE_ALL":
            assert sqnr(q(x), run(report.path, x, level)[0]) > ROUNDING_DB
    fp, constrained = "-fp" in recipe, recipe.endswith(("m1", "m2"))
    note = IN_FLOATS[target, "fp" if fp else "int"]
    assert any(note in n for n in report.notes) == (target != "tensorrt" or not constrained)
    if target != "tensorrt":
        assert report.nodes["MatMulNBits"] == 2
        assert set(element_types(report.path).values()) == {"UINT8"}
    else:
        assert set(element_types(report.path).values()) == {"FLOAT8E4M3FN" if fp else "INT4"}


def test_tensorrt_stores_fp4_under_a_constraint_as_fp8_with_a_scale_a_row(tmp_path: Path) -> None:
    model, x = MLP(), torch.randn(5, 272)
    for constraint in ("pow2", "group_pow2"):
        report = zq.quantize(model, (x,), recipe=f"w4a8-fp-m{1 + (constraint != 'pow2')}").export_onnx(
            tmp_path / "m.onnx", target="tensorrt"
        )
        stored = {i.name: i for i in onnx.load(report.path).graph.initializer if ".weight_" in i.name}
        for name, linear in (("up", model.up), ("down", model.down)):
            weight = linear.weight.detach()
            packed, scale = quantize_weight(weight, "fp4_e2m1", 128, False, constraint)
            values, rows = as_rows_of_e4m3(packed, scale, "fp4_e2m1", 128, weight.shape[1])
            assert torch.equal(rows, scale.float().amax(1, keepdim=True)) and values.dtype is torch.float8_e4m3fn
            assert torch.equal(
                values.float() * rows, dequantize_weight(packed, scale, "fp4_e2m1", 128, weight.shape[1])
            )
            (q,) = (i for n, i in stored.items() if n.startswith(f"{name}.weight_q") and len(i.dims) == 2)
            assert q.raw_data == values.t().contiguous().view(torch.uint8).numpy().tobytes()
        free = quantize_weight(weight, "fp4_e2m1", 128)
        assert as_rows_of_e4m3(*free, "fp4_e2m1", 128, weight.shape[1]) is None


@pytest.mark.parametrize("recipe", ["w4a8-g128", "w4a8-fp", "w4a8-fp-m2"])
def test_features_without_blocks_are_stored_in_floats_beside_quantized_activations(tmp_path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(137, 32)).eval(), torch.randn(5, 137)
    q = zq.quantize(model, (x,), recipe=recipe)
    report = q.export_onnx(tmp_path / "m.onnx", target="tensorrt")
    assert sqnr(q(x), run(report.path, x)[0]) > ROUNDING_DB
    in_floats = any("stored in floats: no block of 16 or more divides 137" in n for n in report.notes)
    assert in_floats == (recipe != "w4a8-fp-m2")  # one scale a row needs no blocks


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_int4_activations_are_the_references_integers(tmp_path: Path, target: str) -> None:
    x = torch.randn(5, 32) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    q = zq.quantize(nn.Sequential(nn.Linear(32, 32)).eval(), (x,), recipe=zq.Recipe("plain", (PLAIN_W4A4,)))
    path = q.export_onnx(tmp_path / "m.onnx", target=target).path
    model = onnx.load(path)
    (quantize,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear")
    element = onnx.TensorProto.UINT8 if target == "onnxruntime" else onnx.TensorProto.INT8
    model.graph.output.append(onnx.helper.make_tensor_value_info(quantize.output[0], element, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    stored = session.run([quantize.output[0]], {session.get_inputs()[0].name: x.numpy()})[0].astype(np.int64)
    zero = 128 if target == "onnxruntime" else 0
    np.testing.assert_array_equal(stored - zero, quantize_per_token_int4(x)[0].numpy())


PLAIN_W4A4 = QRule(".*", QScheme("int4"), QScheme("int4", "per_token", dynamic=True))


# --- the engines that are planned ------------------------------------------------------------------------------------


@needs_builder
@pytest.mark.parametrize("features", [256, 576])
@pytest.mark.parametrize(
    ("name", "multiplied", "stored"),
    [
        ("w8a16", "Half", "Int8"),
        ("w4a16-g64", "Half", "Int4"),
        ("w4a16-g128", "Half", "Int4"),
        ("w3a16-g64", "Half", "Int4"),
        ("fp6", "Half", "FP8"),
        ("fp8", "FP8", "FP8"),
        ("fp8-static", "FP8", "FP8"),
        ("w4a8-g128", "Half", "Int4"),
        ("w4a8-fp-m2", "FP8", "FP8"),
    ],
)
def test_tensorrt_multiplies_packed_weights(
    tmp_path: Path, name: str, multiplied: str, stored: str, features: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    batch = torch.export.Dim("batch", min=1, max=32)
    x = torch.randn(4, features)
    data = [x] if zq.load_recipe(name).calibrated else None
    q = zq.quantize(model, (x,), recipe=name, calibration=data, dynamic_shapes=({0: batch},))
    report = q.export_onnx(tmp_path / "m.onnx", target="tensorrt", float_dtype="float16")
    (given,) = onnx.load(report.path).graph.input
    shapes = {given.name: ((1, features), (8, features), (32, features))}
    build = tensorrt_rtx.build(report.path, compute_capabilities=("SM89",), shapes=shapes)
    assert build.built, build.errors
    gemms = build.gemms()
    assert len(gemms) == 2 and all(stored in k.constants for k in gemms), str(build)
    assert len(build.gemms(multiplied)) == 2, str(build)
    assert build.stray_quantizes == 0, str(build)
