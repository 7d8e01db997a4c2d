"""The view of a file: what lies beside it, inside functions and bodies, and what is not ONNX."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

import zq_compiler as zq
from tests.lowering.lint.graphs import INTEGERS, SCALES, attention, linear, quantized
from zq_compiler.cli import app
from zq_compiler.lowering.lint import graph as view
from zq_compiler.lowering.lint.attention import attentions, head_size, output_quantizer, sequence_length


def rules(report: zq.LintReport) -> list[str]:
    return [finding.rule for finding in report.findings]


def test_weights_are_not_read_and_scales_are_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    large = np.resize(INTEGERS, (128, 64))
    model = linear(k=128, w=large, ws=np.r_[SCALES[1:], 0].astype(np.float16))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    read: list[str] = []
    to_array = onnx.numpy_helper.to_array
    monkeypatch.setattr(view.numpy_helper, "to_array", lambda t, *args: read.append(t.name) or to_array(t, *args))
    report = zq.lint(path)
    assert rules(report) == ["TRT003"] and not report.ok
    assert "ws" in read and "w" not in read


def test_missing_data_is_an_error_that_names_it(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    with pytest.raises(zq.LintError, match="keep the data files beside the model"):
        zq.lint(path)


def test_a_model_in_memory_whose_data_is_elsewhere_is_an_error(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(zq.LintError, match="give the model's path"):
        zq.lint(onnx.load(path, load_external_data=False))


def test_bodies_are_linted_and_know_what_is_around_them():
    """A linear in both branches of an If, its constants outside."""
    model = linear(z=np.int8(3))
    body = onnx.GraphProto(name="body", node=model.graph.node, output=model.graph.output)
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.ClearField("node")
    model.graph.output[0].name = "out"
    model.graph.node.append(helper.make_node("If", ["c"], ["out"], then_branch=body, else_branch=body))
    onnx.checker.check_model(model, full_check=True)
    assert rules(zq.lint(model)) == ["TRT001"] * 4


def test_functions_are_linted_as_if_inlined():
    model = linear(z=np.int8(3))
    names = ["x", "s", "z", "w", "ws"]
    function = helper.make_function("own", "Linear", names, ["y"], list(model.graph.node), list(model.opset_import))
    model.graph.ClearField("node")
    model.graph.node.append(helper.make_node("Linear", names, ["y"], domain="own"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.checker.check_model(model)
    assert rules(zq.lint(model)) == ["TRT001"] * 2


def test_constants_may_be_nodes_and_behind_identities():
    constant = "zc = Constant<value = int8 {3}>()  zi = Identity(zc)  "
    report = zq.lint(linear(constant + quantized("x").replace(", z)", ", zi)")))
    assert rules(report) == ["TRT001", "TRT001"]


def test_an_operand_is_followed_to_its_quantization():
    moved = (
        quantized("x", out="x1") + "x2 = Transpose<perm = [0, 1, 2]>(x1)  x3 = Mul(half, x2)  xd = Cast<to = 10>(x3)"
    )
    (graph,) = view.read(linear(moved)).graphs
    (product,) = graph.products
    assert product.left.dequantize is not None and product.left.dequantize.outputs == ("x1",)
    assert [node.op for node in product.left.path] == ["Transpose", "Mul", "Cast"]
    assert product.weight is product.right and product.activation is product.left
    assert graph.scale_axis(product.right) == -1 and product.right.contracted == -2


@pytest.mark.parametrize("guard", [False, True])
def test_attention_is_recognised(guard):
    (graph,) = view.read(attention(guard=guard, heads=32, length=128, scores=True)).graphs
    (found,) = attentions(graph)
    assert (head_size(graph, found), sequence_length(graph, found)) == (32, 128)
    assert all(x.dequantize for x in (*found.inputs.values(), found.probabilities))
    assert (found.guard is not None) == guard and found.scores_quantizer is not None
    assert (found.scores.node.outputs, found.context.node.outputs) == (("t",), ("c",))
    quantizer = output_quantizer(graph, found)
    assert quantizer is not None and quantizer.outputs == ("cq",)


def test_what_cannot_be_typed_is_noted_and_the_rest_is_linted():
    model = linear(z=np.int8(3))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64  # a lie
    report = zq.lint(model)
    assert "TRT001" in rules(report)


@pytest.mark.parametrize("content", [b"not ONNX", b"", None])
def test_a_file_that_is_not_onnx_is_an_error_of_one_line(tmp_path: Path, content: bytes | None):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(zq.LintError, match="To mend it"):
        zq.lint(path)
    result = CliRunner().invoke(app, ["lint", str(path)])
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1


def test_an_unknown_target_is_an_error():
    with pytest.raises(zq.LintError, match="use one of tensorrt, onnxruntime, onnxruntime-cuda"):
        zq.lint(linear(), "coreml")


def test_the_command_prints_a_table_and_fails_like_a_linter(tmp_path: Path):
    good, bad, slow = (tmp_path / f"{name}.onnx" for name in ("good", "bad", "slow"))
    onnx.save(linear(), good)
    onnx.save(linear(z=np.int8(3), dtype="float"), bad)
    onnx.save(linear("", y="y = MatMul(x, wd)"), slow)
    runner = CliRunner(env={"COLUMNS": "200"})
    assert runner.invoke(app, ["lint", str(good)]).exit_code == 0
    assert runner.invoke(app, ["lint", str(slow)]).exit_code == 0  # slow is not wrong
    result = runner.invoke(app, ["lint", str(bad), "--target", "tensorrt"])
    assert result.exit_code == 1
    for part in (
        "TRT001",
        "zero-point-not-zero",
        "refused",
        "its zero point is 3",
        "quantize symmetrically",
        "2 refused",
    ):
        assert part in result.stdout.replace("\n", " ")
    data = json.loads(runner.invoke(app, ["lint", str(bad), "--json"]).stdout)
    assert data["ok"] is False and [f["rule"] for f in data["findings"]] == ["TRT001"] * 2
    assert data["findings"][0]["severity"] == "refused" and data["findings"][0]["node"] == "QuantizeLinear_0"
    assert runner.invoke(app, ["lint", str(bad), "--target", "onnxruntime"]).exit_code == 0


def test_linting_needs_onnx_and_numpy_only():
    allowed = {*sys.stdlib_module_names, "onnx", "numpy", "google", "rich"}
    for module in Path(view.__file__).parent.glob("*.py"):
        tree = ast.parse(module.read_text())
        used = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        absolute = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        assert used | {str(n.module).split(".")[0] for n in absolute} <= allowed, module
        above = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 1]
        assert set(above) <= {"errors"}, module
