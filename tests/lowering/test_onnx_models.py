"""ONNX files of whole models: ONNX Runtime agrees with the oracle at every shape, and each weight is stored once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch.utils._pytree import tree_leaves

import zq_compiler as zq
from tests import onnx_runtime
from zq_compiler.kernels import OPS, int8_linear
from zq_compiler.lowering.eager import ReferenceInterpreter
from zq_compiler.numerics import sqnr
from zq_compiler.program import constant_bytes

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

# Where ONNX Runtime's floats round as torch's do, the SQNR is 130 dB and more. A last-place difference ahead of a
# quantize moves single integers by one step: 44 dB was the lowest seen over 16 families.
MIN_SQNR_DB = 35.0
# CLIP's logits are cosines times exp(2.6592). Random embeddings are nearly orthogonal: a cosine is what is left of a
# sum that cancels, and an SQNR of it means nothing. They are held to the file's own embeddings, which meet the bound.
CLIP_LOGIT_SCALE = math.exp(2.6592)
CORE = ("bert", "gpt2", "llama", "t5", "vit", "mixtral")
FAMILIES = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in tiny_models.FAMILIES]


@dataclass
class Exported:
    """A quantized model, an example call, and its file."""

    model: zq.QuantizedModel
    inputs: dict[str, torch.Tensor]
    report: Any

    def session(self, level: str, path: Path | None = None) -> Any:
        return onnx_runtime.session(path or self.report.path, level)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: Any, tmp_path_factory: Any) -> Iterator[Exported]:
    if request.param == "albert" and not onnx_runtime.HAS_VNNI:
        pytest.skip("without VNNI, ONNX Runtime 1.31 has no exact products of a weight that several nodes share")
    model, inputs = tiny_models.build(request.param)
    quantized = zq.quantize(model, inputs)
    yield Exported(quantized, inputs, quantized.export_onnx(tmp_path_factory.mktemp("onnx") / f"{request.param}.onnx"))


def resized(inputs: dict[str, torch.Tensor], batch: int, length: int) -> dict[str, torch.Tensor]:
    """Other inputs of the same kind: batch and, for token ids, length differ."""
    torch.manual_seed(batch * 100 + length)
    made = {}
    for name, value in inputs.items():
        if value.dtype is torch.int64:
            made[name] = torch.randint(3, 99, (batch, length))
        else:
            made[name] = torch.randn(batch, *value.shape[1:])
    if "attention_mask" in made:
        made["attention_mask"] = torch.ones_like(made["attention_mask"])
    return made


def test_onnx_runtime_agrees_with_the_oracle_at_every_shape(exported: Exported) -> None:
    calls = [exported.inputs, *(resized(exported.inputs, b, s) for b, s in ((1, 1), (2, 16), (3, 31)))]
    for level in onnx_runtime.LEVELS:
        session = exported.session(level)
        assert [i.name for i in session.get_inputs()] == list(exported.report.inputs)
        for call in calls:
            want = [y for y in tree_leaves(exported.model(**call)) if isinstance(y, torch.Tensor)]
            got = session.run(None, {i.name: call[i.name].numpy() for i in session.get_inputs()})
            outputs = dict(zip(exported.report.outputs, got, strict=True))
            for (name, mine), theirs in zip(outputs.items(), want, strict=True):
                assert mine.shape == tuple(theirs.shape)
                if name == "logits_per_image":
                    cosines = outputs["image_embeds"] @ outputs["text_embeds"].T
                    np.testing.assert_allclose(mine, CLIP_LOGIT_SCALE * cosines, rtol=0, atol=1e-4)
                elif name == "logits_per_text":
                    np.testing.assert_array_equal(mine, outputs["logits_per_image"].T)
                elif theirs.is_floating_point():
                    assert sqnr(theirs, torch.from_numpy(mine)) >= MIN_SQNR_DB, name
                else:
                    np.testing.assert_array_equal(mine, theirs.numpy())


def test_first_integers_differ_by_one_step_at_most(exported: Exported, tmp_path: Path) -> None:
    program = exported.model.program
    quantizers = [op.overload for op in OPS.values() if op.name.endswith("quantize") or op.name == "quantize_per_token"]
    first = next(n for n in program.graph.nodes if n.target in quantizers)
    seen: dict[str, torch.Tensor] = {}

    def observe(node: Any, value: Any) -> None:
        if node is first:
            seen["q"] = value[0]

    with torch.no_grad():
        ReferenceInterpreter(program, observe).run(*exported.model.convention.flatten((), exported.inputs))
    model = onnx.load(exported.report.path)
    quantizes = [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in quantizes]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    onnx.save(model, tmp_path / "integers.onnx")
    session = exported.session("ORT_ENABLE_ALL", tmp_path / "integers.onnx")
    feeds = {i.name: exported.inputs[i.name].numpy() for i in session.get_inputs()}
    integers = [u8.astype(np.int16) - 128 for u8 in session.run(None, feeds)]
    q = seen["q"].numpy().astype(np.int16)
    alike = [np.abs(u - q) for u in integers if u.shape == q.shape]
    closest = min(alike, key=lambda d: d.max())  # the exporter may order independent branches otherwise
    print(f"{(closest > 0).mean():.2%} of the first integers differ")
    assert closest.max() <= 1 and (closest > 0).mean() < 0.01


def test_each_weight_is_stored_once_as_integers(exported: Exported) -> None:
    program = exported.model.program
    linears = program.graph.find_nodes(op="call_function", target=int8_linear)
    assert exported.report.nodes.get("MatMulIntegerToFloat", 0) == len(linears)
    quantizes = {n.args[0] for n in linears}
    assert exported.report.nodes.get("QuantizeLinear", 0) <= len(quantizes)
    graph = onnx.load(exported.report.path).graph
    int8 = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sorted(int8) == sorted({str(n.args[2].target) for n in linears})
    stored = sum(len(t.raw_data) for t in graph.initializer)
    assert stored <= constant_bytes(program.gm) * 1.02
    assert exported.report.bytes_predicted == constant_bytes(program.gm)


def test_the_lint_has_nothing_to_say_but_what_the_report_says(exported: Exported) -> None:
    report = zq.lint(exported.report.path, "onnxruntime")
    assert report.ok and {finding.name for finding in report.findings} <= {"saturating-product"}


def test_a_model_loaded_from_disk_exports_the_same_file(tmp_path: Path) -> None:
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model, inputs, recipe=zq.load_recipe("w8a8").replace(embedding="int8"))
    quantized.save(tmp_path / "saved")
    first = quantized.export_onnx(tmp_path / "first.onnx")
    second = zq.load(tmp_path / "saved").export_onnx(tmp_path / "second.onnx")
    assert second.nodes == first.nodes and second.inputs == first.inputs and second.outputs == first.outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype, tmp_path: Path) -> None:
    """ONNX Runtime's CPU kernels know no bfloat16: there the file is only checked."""
    model, inputs = tiny_models.build("bert")
    quantized = zq.quantize(model.to(dtype), inputs)
    report = quantized.export_onnx(tmp_path / "half.onnx")
    assert report.nodes["MatMulIntegerToFloat"] == 13
    if dtype is torch.float16:
        session = onnx_runtime.session(report.path)
        got = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
        want = quantized(**inputs)
        assert sqnr(want.last_hidden_state, torch.from_numpy(got[0])) >= MIN_SQNR_DB


@pytest.mark.slow
def test_a_file_of_real_size_has_the_predicted_bytes(tmp_path: Path) -> None:
    import transformers as hf

    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(num_hidden_layers=2, vocab_size=8000)).eval()
    report = zq.quantize(model, tiny_models.text()).export_onnx(tmp_path / "bert.onnx")
    assert abs(report.bytes_on_disk - report.bytes_predicted) <= 0.02 * report.bytes_predicted
