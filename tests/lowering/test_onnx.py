"""ONNX: each op's integers equal the reference's bit for bit, and the file is what was promised."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zq_compiler as zq
from zq_compiler import kernels, numerics
from zq_compiler.capture import capture_exported
from zq_compiler.program import Program, Stage, content_hash
from zq_compiler.recipe import preset

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from tests import onnx_runtime  # noqa: E402
from zq_compiler.lowering.onnx import export  # noqa: E402

LEVELS = onnx_runtime.LEVELS


def fused_program(module: nn.Module, *inputs: Tensor, dynamic: Sequence[Sequence[int]] | None = None) -> Program:
    """A Program whose graph is the module's own, dialect ops called by hand.

    Args:
        dynamic: dimensions of each input that may vary; all but the last where this is None.
    """
    dims = [range(x.dim() - 1) for x in inputs] if dynamic is None else dynamic
    shapes = tuple(dict.fromkeys(varying, torch.export.Dim.AUTO) for varying in dims)
    exported = torch.export.export(module.eval(), inputs, dynamic_shapes=(shapes,), strict=False)
    program = capture_exported(exported, preset("w8a8"), (inputs, {}))
    program.stage = Stage.FUSED
    return program


class Calls(nn.Module):
    """A function of its inputs, with tensors as buffers named `layer0.weight_q`, ...."""

    def __init__(self, function: Any, **constants: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def session(path: Path, level: str, extra: Sequence[str] = ()) -> Any:
    """A session at an optimization level, on one thread; `extra` operators' results become outputs too."""
    model = onnx.load(path)
    types = {"QuantizeLinear": _kind_of_integers(model)}
    for node in model.graph.node:
        if node.op_type in extra:
            kind = types.get(node.op_type, onnx.TensorProto.FLOAT)
            model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], kind, None))
    return onnx_runtime.session(model.SerializeToString(), level)


def _kind_of_integers(model: Any) -> int:
    """The type of what the file's QuantizeLinear write: that of their zero points, which are constants."""
    zeros = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    return next((t.data_type for t in model.graph.initializer if t.name in zeros), onnx.TensorProto.UINT8)


def run(path: Path, level: str, *inputs: Tensor, extra: Sequence[str] = ()) -> list[np.ndarray]:
    made = session(path, level, extra)
    return made.run(None, {i.name: x.numpy() for i, x in zip(made.get_inputs(), inputs, strict=True)})


def hard_rows(*shape: int) -> Tensor:
    """Random rows, and ones with zeros, a huge outlier, tiny values, one sign, values half-way between two steps."""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).reshape(-1, shape[-1])
    makers = [
        torch.zeros_like,
        lambda r: torch.cat([r[:-1], torch.full((1,), 3e37)]),
        lambda r: r * 1e-20,
        lambda r: r * 1e30,
        lambda r: r.abs() + 1,
        lambda r: torch.cat([torch.full((1,), 127.0), (torch.randint(-127, 127, r.shape) + 0.5)])[: len(r)],
        lambda r: torch.cat([torch.ones(1), (torch.randint(-127, 127, r.shape) + 0.5) * numerics.INT8_STEP])[: len(r)],
    ]
    rows = torch.randn(len(makers), shape[-1])
    return torch.cat([x, *(make(row)[None] for make, row in zip(makers, rows, strict=True))])


@pytest.mark.parametrize("k", [1, 3, 17, 64, 769])
def test_quantize_per_token_gives_the_reference_integers(tmp_path: Path, k: int) -> None:
    module = Calls(lambda _, x: torch.ops.zq.quantize_per_token(x))
    report = export(fused_program(module, torch.randn(4, k)), tmp_path / "q.onnx")
    assert report.nodes["QuantizeLinear"] == 1
    x = hard_rows(37, k)
    q, scale = numerics.quantize_per_token(x)
    for level in LEVELS:
        u8, got_scale = run(report.path, level, x)
        np.testing.assert_array_equal(u8.astype(np.int16) - 128, q.numpy())
        np.testing.assert_array_equal(got_scale, scale.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("k", "n", "bias"), [(16, 16, True), (33, 17, False), (768, 40, True)])
def test_int8_linear_gives_the_reference_sums_and_floats(
    tmp_path: Path, k: int, n: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(k)
    w_q, w_scale = numerics.quantize_per_channel(torch.randn(n, k))
    w_q[0] = 127
    constants = {"w_q": w_q, "w_scale": w_scale} | ({"bias": torch.randn(n).to(dtype)} if bias else {})

    def linear(m: Any, x: Tensor) -> Tensor:
        q, scale = torch.ops.zq.quantize_per_token(x)
        return torch.ops.zq.int8_linear(q, scale, m.w_q, m.w_scale, m.bias if bias else None, dtype)

    report = export(fused_program(Calls(linear, **constants), torch.randn(2, 3, k)), tmp_path / "linear.onnx")
    x = hard_rows(2, 5, k)[:, None]
    x = torch.where(x.abs() > 1e5, x * 1e-30, x) if dtype is torch.float16 else x
    q, scale = numerics.quantize_per_token(x)
    scaled_sums = (q.long() @ w_q.long().t()).float() * w_scale.t()
    want = kernels.reference_of(kernels.int8_linear)(q, scale, w_q, w_scale, constants.get("bias"), dtype)
    for level in LEVELS:
        got, products = run(report.path, level, x, extra=["MatMulIntegerToFloat"])
        np.testing.assert_array_equal(products, scaled_sums.numpy())
        np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [16, 48])
def test_a_poisoned_row_comes_out_as_nan_and_leaves_the_others_alone(tmp_path: Path, poison: float, k: int) -> None:
    w_q, w_scale = numerics.quantize_per_channel(torch.randn(8, k))

    def linear(m: Any, x: Tensor) -> Tensor:
        return torch.ops.zq.int8_linear(*torch.ops.zq.quantize_per_token(x), m.w_q, m.w_scale, None, torch.float32)

    report = export(fused_program(Calls(linear, w_q=w_q, w_scale=w_scale), torch.randn(2, k)), tmp_path / "p.onnx")
    clean = torch.randn(k + 1, k)
    x = clean.clone()
    x[torch.arange(k), torch.arange(k)] = poison  # every position once
    for level in LEVELS:
        (got,) = run(report.path, level, x)
        assert np.isnan(got[:k]).all()
        np.testing.assert_array_equal(got[k], run(report.path, level, clean)[0][k])


FUSED = {
    "layer_norm_quantize": lambda m, x, y: torch.ops.zq.layer_norm_quantize(x, m.w, m.b, 1e-5),
    "add_layer_norm_quantize": lambda m, x, y: torch.ops.zq.add_layer_norm_quantize(x, y, m.w, None, 1e-5),
    "rms_norm_quantize": lambda m, x, y: torch.ops.zq.rms_norm_quantize(x, m.w, 1e-6),
    "add_rms_norm_quantize": lambda m, x, y: torch.ops.zq.add_rms_norm_quantize(x, y, m.w, 1e-6),
    "gelu_quantize": lambda m, x, y: torch.ops.zq.gelu_quantize(x, "none"),
    "gelu_tanh_quantize": lambda m, x, y: torch.ops.zq.gelu_quantize(x, "tanh"),
    "silu_mul_quantize": lambda m, x, y: torch.ops.zq.silu_mul_quantize(x, y),
}


@pytest.mark.parametrize("op", FUSED)
def test_memory_bound_ops_quantize_their_own_float_value_exactly(tmp_path: Path, op: str) -> None:
    module = Calls(FUSED[op], w=torch.rand(48) + 0.5, b=torch.randn(48))
    report = export(fused_program(module, torch.randn(3, 48), torch.randn(3, 48)), tmp_path / "op.onnx")
    x, y = torch.randn(7, 48), torch.randn(7, 48)
    want = module(x, y)
    expected = {"layer": "LayerNormalization", "gelu": "Gelu"}
    for word, operator in expected.items():
        assert (word in op) == (operator in report.nodes), "the operator that ONNX Runtime fuses"
    for level in LEVELS:
        model = onnx.load(report.path)
        divided = next(n.input[0] for n in model.graph.node if n.op_type == "Div" and n.output[0] in _quantized(model))
        model.graph.output.append(onnx.helper.make_tensor_value_info(divided, onnx.TensorProto.FLOAT, None))
        onnx.save(model, tmp_path / "seen.onnx")
        got = run(tmp_path / "seen.onnx", level, *(t for t, _ in zip((x, y), report.inputs, strict=False)))
        q, scale = numerics.quantize_per_token(torch.from_numpy(got[-1]))  # teacher-forced: from ORT's own float value
        np.testing.assert_array_equal(got[0].astype(np.int16) - 128, q.numpy())
        np.testing.assert_array_equal(got[1], scale.numpy())
        assert np.abs(got[0].astype(int) - 128 - want[0].numpy()).max() <= 1
        for mine, theirs in zip(got[2:-1], want[2:], strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-5, atol=1e-5)


def _quantized(model: Any) -> set[str]:
    return {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}


def test_fused_rms_norm_is_one_operator_in_onnx_runtime(tmp_path: Path) -> None:
    module = Calls(FUSED["rms_norm_quantize"], w=torch.rand(48))
    report = export(fused_program(module, torch.randn(3, 48), torch.randn(3, 48)), tmp_path / "rms.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert "SimplifiedLayerNormalization" in {n.op_type for n in optimized.graph.node}


def test_a_tied_table_is_stored_once_as_the_linear_reads_it(tmp_path: Path) -> None:
    table, scale = numerics.quantize_per_channel(torch.randn(50, 16))

    def embed_and_project(m: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.ops.zq.int8_embedding(ids, m.table, m.scale, torch.float32)
        return x, torch.ops.zq.int8_linear(*torch.ops.zq.quantize_per_token(x), m.table, m.scale, None, torch.float32)

    module = Calls(embed_and_project, table=table, scale=scale)
    ids = torch.randint(0, 50, (2, 5))
    program = fused_program(module, ids)
    report = export(program, tmp_path / "tied.onnx")
    stored = [t.dims for t in onnx.load(report.path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert stored == [[16, 50]]
    for level in LEVELS:
        for want, got in zip(module(ids), run(report.path, level, ids), strict=True):
            np.testing.assert_array_equal(got, want.numpy())


def test_a_dequantized_weight_stays_integer_in_the_file(tmp_path: Path) -> None:
    w_q, w_scale = numerics.quantize_per_channel(torch.randn(32, 16))

    def linear(m: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.ops.zq.dequantize(m.w_q, m.w_scale, torch.float32))

    module = Calls(linear, w_q=w_q, w_scale=w_scale)
    x = torch.randn(3, 16)
    report = export(fused_program(module, x), tmp_path / "dq.onnx")
    floats = [t for t in onnx.load(report.path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(np.prod(t.dims) <= 32 for t in floats)
    np.testing.assert_allclose(run(report.path, "ORT_ENABLE_ALL", x)[0], module(x).numpy(), rtol=1e-5, atol=1e-5)


def test_dequantized_weights_of_one_shape_have_zero_points_of_their_own(tmp_path: Path) -> None:
    """Where two share one, ONNX Runtime fails under the option that makes its integer products exact."""
    constants = {}
    for name in ("first", "second"):
        constants[name], constants[f"{name}_scale"] = numerics.quantize_per_channel(torch.randn(32, 32))

    def linears(m: Any, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            w = torch.ops.zq.dequantize(getattr(m, name), getattr(m, f"{name}_scale"), torch.float32)
            x = nn.functional.linear(torch.tanh(x), w)
        return x

    module, x = Calls(linears, **constants), torch.randn(3, 32)
    report = export(fused_program(module, x), tmp_path / "two.onnx")
    graph = onnx.load(report.path).graph
    assert [n.input[2] for n in graph.node if n.op_type == "DequantizeLinear"] == [
        "first_zero_point",
        "second_zero_point",
    ]
    assert sum(np.prod(t.dims) == 32 and t.data_type == onnx.TensorProto.INT8 for t in graph.initializer) == 2
    for level in LEVELS:
        np.testing.assert_allclose(run(report.path, level, x)[0], module(x).numpy(), rtol=1e-4, atol=1e-4)


class SelfAttention(nn.Module):
    """Three projections of one normalised value, and an output that is also an input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 48)

    def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Any]:
        x = self.norm(hidden)
        pair = (self.query(x), self.key(x))
        return {"pair": pair, "hidden": hidden, "value": self.value(x), "mask_twice": mask + mask}


@pytest.fixture(scope="module")
def attention() -> zq.QuantizedModel:
    torch.manual_seed(0)
    return zq.quantize(SelfAttention().eval(), (torch.randn(2, 5, 32), torch.ones(2, 5)))


def test_what_three_projections_read_is_quantized_once(attention: zq.QuantizedModel, tmp_path: Path) -> None:
    report = attention.export_onnx(tmp_path / "attention.onnx")
    assert report.nodes["QuantizeLinear"] == 1 and report.nodes["MatMulIntegerToFloat"] == 3
    model = onnx.load(report.path)
    names = {t.name for t in model.graph.initializer}
    assert {"query.weight_q", "key.weight_q", "value.weight_q"} <= names
    assert "query/MatMulIntegerToFloat" in {n.name for n in model.graph.node}
    properties = {p.key: p.value for p in model.metadata_props}
    known = {"recipe": "w8a8", "hash": content_hash(attention.program)}
    known |= {"target": "onnxruntime", "float_dtype": "float32"}
    assert properties == {**known, "zq_compiler": zq.__version__, "torch": torch.__version__}
    assert model.ir_version == 10 and model.opset_import[0].version == 21
    assert b"/site-packages/" not in report.path.read_bytes(), "no paths of this machine in the file"


def test_inputs_and_outputs_keep_the_models_names(attention: zq.QuantizedModel, tmp_path: Path) -> None:
    report = attention.export_onnx(tmp_path / "attention.onnx")
    assert "session.x64quantprecision" in str(report)
    assert list(report.inputs) == ["hidden", "mask"]
    assert list(report.outputs) == ["pair.0", "pair.1", "hidden_out", "value", "mask_twice"]
    assert report.inputs["hidden"].startswith("FLOAT [batch,sequence,")
    hidden, mask = torch.randn(3, 9, 32), torch.ones(3, 9)
    want = attention(hidden, mask)
    flat = [*want["pair"], want["hidden"], want["value"], want["mask_twice"]]
    for level in LEVELS:
        for mine, theirs in zip(run(report.path, level, hidden, mask), flat, strict=True):
            assert numerics.sqnr(theirs, torch.from_numpy(mine)) > 35


def test_weights_go_beside_the_file_when_they_are_too_many(attention: zq.QuantizedModel, tmp_path: Path) -> None:
    inside = attention.export_onnx(tmp_path / "inside.onnx")
    beside = export(attention.program, tmp_path / "beside.onnx", inline_limit=1000)
    assert (tmp_path / "beside.onnx.data").exists() and not (tmp_path / "inside.onnx.data").exists()
    assert abs(beside.bytes_on_disk - inside.bytes_on_disk) < 2000  # the graph names file and offset of each weight
    x = {"hidden": torch.randn(2, 3, 32).numpy(), "mask": torch.ones(2, 3).numpy()}
    made = [onnx_runtime.session(r.path).run(None, x) for r in (inside, beside)]
    for a, b in zip(*made, strict=True):
        np.testing.assert_array_equal(a, b)


def test_export_needs_no_example_inputs(attention: zq.QuantizedModel, tmp_path: Path) -> None:
    kept, attention.program.example_inputs = attention.program.example_inputs, None
    try:
        report = attention.export_onnx(tmp_path / "no_examples.onnx")
    finally:
        attention.program.example_inputs = kept
    assert report.nodes["MatMulIntegerToFloat"] == 3


@pytest.mark.parametrize("opset", [20, 22])
def test_other_opsets(attention: zq.QuantizedModel, tmp_path: Path, opset: int) -> None:
    report = attention.export_onnx(tmp_path / "opset.onnx", opset=opset)
    assert onnx.load(report.path).opset_import[0].version == opset
    assert len(run(report.path, "ORT_ENABLE_ALL", torch.randn(1, 1, 32), torch.ones(1, 1))) == 5


def test_unknown_target_opset_and_stage_are_refused(attention: zq.QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(zq.ExportError, match=r"unknown target 'abacus'.*onnxruntime"):
        attention.export_onnx(tmp_path / "x.onnx", target="abacus")
    with pytest.raises(zq.ExportError, match=r"opset 7 is not supported.*21"):
        attention.export_onnx(tmp_path / "x.onnx", opset=7)
    with pytest.raises(zq.ExportError, match=r"opset 28 is not supported for onnxruntime.*use one of 20, 21, 22"):
        attention.export_onnx(tmp_path / "x.onnx", opset=28)  # ONNX Runtime would not load it
    attention.program.stage = Stage.QDQ
    try:
        with pytest.raises(zq.ExportError, match="stage QDQ"):
            attention.export_onnx(tmp_path / "x.onnx")
    finally:
        attention.program.stage = Stage.FUSED
    assert not list(tmp_path.iterdir())


@torch.library.custom_op("zq_test_onnx::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    return x.clone()


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.zq_test_onnx.strange(x)


def test_an_operation_without_onnx_form_is_named_with_its_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(Strange())).eval()
    quantized = zq.quantize(model, (torch.randn(2, 32),))
    with pytest.raises(zq.ExportError, match=r"^1\.0: zq_test_onnx\.strange\.default has no ONNX form.*To mend it"):
        quantized.export_onnx(tmp_path / "x.onnx")


def test_importing_the_package_does_not_import_the_exporter() -> None:
    code = "import sys, zq_compiler; sys.exit(any(m in sys.modules for m in ('onnxscript', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
