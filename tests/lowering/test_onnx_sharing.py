"""Weights outside a file: beyond 2 GB, and those that it reads from a saved model, bit for bit what it would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

import zq_compiler as zq
from tests import onnx_runtime

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from zq_compiler.lowering.onnx import export  # noqa: E402
from zq_compiler.numerics import sqnr  # noqa: E402
from zq_compiler.program import constant_bytes  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[zq.QuantizedModel, Any, Path]:
    """BERT with INT8 tables, example inputs, and the folder of the saved one."""
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model, inputs, recipe=zq.load_recipe("w8a8-plain").replace(embedding="int8"))
    folder = tmp_path_factory.mktemp("model") / "saved"
    quantized.save(folder)
    return quantized, inputs, folder


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-cuda", "tensorrt"])
def test_integers_floats_and_tables_are_stored_once(saved: Any, target: str) -> None:
    quantized, inputs, folder = saved
    alone = quantized.export_onnx(folder.parent / "alone.onnx", target=target)
    shared = quantized.export_onnx(folder.parent / "shared.onnx", target=target, saved=folder)
    graphs = [onnx.load(r.path, load_external_data=False).graph for r in (alone, shared)]
    names = [{t.name for t in g.initializer if t.data_location == t.EXTERNAL} for g in graphs]
    assert not names[0]
    read = {str(n.target) for n in quantized.program.graph.find_nodes(op="get_attr")}
    weights = {name for name in read if name.endswith(".weight_q")}
    assert len(weights) == 16 and weights <= names[1] <= read, "13 linears and 3 tables"
    if target != "tensorrt":  # which has scales of its own
        assert {t.name for t in graphs[1].initializer} & read == names[1], "something is stored twice"
        assert shared.bytes_shared >= 0.9 * constant_bytes(quantized.program.gm)
    assert alone.bytes_on_disk - shared.bytes_on_disk > shared.bytes_shared * 0.9 and not alone.bytes_shared
    assert shared.bytes_on_disk == shared.path.stat().st_size
    assert "read from the saved model's weights" in str(shared) and "saved" not in str(alone)
    held, pointed = ({t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(r.path).graph.initializer}
                     for r in (alone, shared))  # fmt: skip
    assert held.keys() == pointed.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(pointed[name], value)
    if target != "onnxruntime-cuda":
        feeds = {name: value.numpy() for name, value in inputs.items()}
        made = [onnx_runtime.session(r.path).run(None, feeds) for r in (alone, shared)]
        for a, b in zip(*made, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("recipe", "shared"), [("w4a16-g64", True), ("w4a16-g128", False), ("w8a16", False)])
def test_packed_weights_are_stored_once_where_blocks_fill_rows(recipe: str, shared: bool, tmp_path: Path) -> None:
    """Rows are of 64 and 128 features here; ONNX Runtime's blocks for whole rows of 128."""
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model, inputs, recipe=recipe)
    quantized.save(tmp_path / "saved")
    loaded = zq.load(tmp_path / "saved")
    integers = {str(n.target) for n in quantized.program.graph.find_nodes(op="get_attr") if "weight_q" in str(n.target)}
    for name in integers:
        assert torch.equal(loaded.program.gm.get_buffer(name), quantized.program.gm.get_buffer(name))
    alone = quantized.export_onnx(tmp_path / "alone.onnx")
    report = loaded.export_onnx(tmp_path / "shared.onnx", saved=tmp_path / "saved")
    tensors = onnx.load(report.path, load_external_data=False).graph.initializer
    outside = {t.name.removesuffix("_onnxruntime") for t in tensors if t.data_location == t.EXTERNAL}
    assert len(integers) == 13 and (integers <= outside) == shared
    feeds = {name: value.numpy() for name, value in inputs.items()}
    for a, b in zip(*(onnx_runtime.session(r.path).run(None, feeds) for r in (alone, report)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_in_the_saved_folder_and_a_certificate(saved: Any) -> None:
    quantized, _, folder = saved
    report = zq.load(folder).export_onnx(folder / "model.onnx", saved=folder)
    assert report.bytes_shared >= 0.9 * constant_bytes(quantized.program.gm)
    assert quantized.certify(report.path).passed


def test_what_is_not_shared_may_go_beside_the_file(saved: Any) -> None:
    quantized, inputs, folder = saved
    path = folder.parent / "half.onnx"
    report = export(quantized.program, path, float_dtype="float16", saved=folder, inline_limit=100)
    data = path.with_name("half.onnx.data")
    assert report.bytes_on_disk == path.stat().st_size + data.stat().st_size
    locations = {
        entry.value
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"half.onnx.data", "saved/weights.safetensors"}
    feeds = {name: value.numpy() for name, value in inputs.items()}
    alone = export(quantized.program, folder.parent / "inside.onnx", float_dtype="float16")
    for a, b in zip(*(onnx_runtime.session(r.path).run(None, feeds) for r in (report, alone)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_folders_that_do_not_fit_are_refused(saved: Any, tmp_path: Path) -> None:
    quantized, _, folder = saved
    with pytest.raises(zq.ExportError, match=r"none.weights\.safetensors: is missing.*save\(\) of this model"):
        quantized.export_onnx(tmp_path / "x.onnx", saved=tmp_path / "none")
    with pytest.raises(zq.ExportError, match=r"is not below .*write the ONNX file into .*saved"):
        quantized.export_onnx(tmp_path / "x.onnx", saved=folder)
    model, inputs = tiny_models.build("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[3, 5] += 0.1
    other = zq.quantize(model, inputs, recipe=quantized.program.recipe)
    with pytest.raises(
        zq.ExportError, match=r"holds another encoder\.layer\.0\.output\.dense\.weight\w+ than the model"
    ):
        other.export_onnx(folder.parent / "x.onnx", saved=folder)
    stranger = zq.quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)).eval(), torch.randn(2, 32))
    with pytest.raises(zq.ExportError, match="holds no constant of the model"):
        stranger.export_onnx(folder.parent / "x.onnx", saved=folder)
    assert not list(tmp_path.iterdir()) and not (folder.parent / "x.onnx").exists()


def test_loaded_integers_lie_by_rows_and_tied_ones_stay_tied(saved: Any) -> None:
    """Though they are stored by columns, as the file reads them."""
    quantized, _, folder = saved
    loaded = zq.load(folder)
    for node in loaded.program.graph.find_nodes(op="get_attr"):
        constant = loaded.program.gm.get_buffer(str(node.target))
        assert constant.is_contiguous()
        assert torch.equal(constant, quantized.program.gm.state_dict()[str(node.target)])
    model, inputs = tiny_models.build("gpt2")
    tied = zq.quantize(model, inputs, recipe=zq.load_recipe("w8a8").replace(embedding="int8", lm_head="int8"))
    tied.save(folder.parent / "tied")
    assert constant_bytes(zq.load(folder.parent / "tied").program.gm) == constant_bytes(tied.program.gm)


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path: Path) -> None:
    """A float table of 2.46 GB: more than a protobuf holds, beside the file and in a saved model."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = torch.empty(600_000, 1024).uniform_(-1, 1)
            self.table = torch.nn.Embedding(*table.shape, _weight=table)
            self.up, self.down = torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 1024)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.table(ids)
            return h + self.down(torch.nn.functional.gelu(self.up(h)))

    ids = torch.randint(600_000, (2, 7))
    quantized = zq.quantize(Model().eval(), ids)
    beside = quantized.export_onnx(tmp_path / "beside.onnx")
    data = tmp_path / "beside.onnx.data"
    assert data.stat().st_size > 2**31 and beside.path.stat().st_size < 100_000
    (got,) = onnx_runtime.session(beside.path).run(None, {"ids": ids.numpy()})
    assert sqnr(quantized(ids), torch.from_numpy(got)) > 35
    data.unlink()
    quantized.save(tmp_path / "saved")
    shared = quantized.export_onnx(tmp_path / "shared.onnx", saved=tmp_path / "saved")
    assert shared.bytes_shared > 2**31 and shared.bytes_on_disk < 100_000
    (again,) = onnx_runtime.session(shared.path).run(None, {"ids": ids.numpy()})
    np.testing.assert_array_equal(again, got)
    (tmp_path / "saved" / "weights.safetensors").unlink()
