"""The one trace of an export: what in-place operations did is in the file, what a model keeps of its state is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor, nn

import zq_compiler as zq
from tests import onnx_runtime
from zq_compiler.numerics import sqnr

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


class InPlace(nn.Module):
    """A sum that is written into, an activation in place, and a count of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.up(x)
        h[:, 0] = 1.0
        y = self.down(torch.relu_(h))
        y += x
        return y * self.calls


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_what_is_computed_in_place(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = InPlace().eval()
    quantized = zq.quantize(model, torch.randn(4, 3, 32))
    calls = quantized.program.gm.calls.clone()
    report = quantized.export_onnx(tmp_path / "model.onnx", target=target)
    assert torch.equal(quantized.program.gm.calls, calls), "the export counted as a call"
    assert list(report.outputs) == ["output"], "the count came out"
    x = torch.randn(2, 5, 32)
    (got,) = onnx_runtime.session(report.path).run(None, {"x": x.numpy()})
    assert sqnr(quantized(x), torch.from_numpy(got)) > 35


def test_sizes_that_the_model_takes_for_equal_are_one_dimension(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, hidden: Tensor, other: Tensor) -> Tensor:
            return self.linear(hidden) + torch.cat([other, hidden], 1)[:, : hidden.shape[1]]

    quantized = zq.quantize(Sum().eval(), (torch.randn(2, 3, 32), torch.randn(2, 5, 32)))
    report = quantized.export_onnx(tmp_path / "model.onnx")
    assert report.inputs["hidden"] == "FLOAT [batch,sequence,32]"
    assert report.inputs["other"] == "FLOAT [batch,other_sequence,32]"
    for shape in ((1, 1), (3, 7)):
        x, y = torch.randn(*shape, 32), torch.randn(shape[0], 9, 32)
        (got,) = onnx_runtime.session(report.path).run(None, {"hidden": x.numpy(), "other": y.numpy()})
        np.testing.assert_allclose(got, quantized(x, y).numpy(), rtol=1e-4, atol=1e-4)
    shapes = [n for n in onnx.load(report.path).graph.node if n.op_type == "Shape"]
    assert len({(n.input[0], str(n.attribute)) for n in shapes}) == len(shapes), "a size is read twice"


def test_a_python_number_among_the_inputs_is_a_constant(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor, times: int) -> Tensor:
            return self.linear(x) * times

    quantized = zq.quantize(Scaled().eval(), (torch.randn(4, 32), 3))
    report = quantized.export_onnx(tmp_path / "model.onnx")
    assert list(report.inputs) == ["x"]
    x = torch.randn(2, 32)
    (got,) = onnx_runtime.session(report.path).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, quantized(x, 3).numpy(), rtol=1e-4, atol=1e-4)


def test_a_length_that_a_reshape_finds_by_the_number_of_elements(tmp_path: Path) -> None:
    """The integer attention's result, `[B, H, T, D]` with B and T open, is reshaped to `[B, T, -1]`."""

    class HiddenStates(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    model, text = tiny_models.build("bert")
    inputs = {name: text[name][:1] for name in ("input_ids", "attention_mask")}
    quantized = zq.quantize(HiddenStates(model).eval(), inputs, recipe="hero-m2", calibration=[inputs])
    report = quantized.export_onnx(tmp_path / "model.onnx")
    (got,) = onnx_runtime.session(report.path).run(None, {name: x.numpy() for name, x in inputs.items()})
    assert sqnr(quantized(**inputs), torch.from_numpy(got)) > 35
