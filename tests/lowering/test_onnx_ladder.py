"""Files for ONNX Runtime's CPU, rung by rung: the checker, strict shape inference, and what runs when all is optimized.

Teacher-forced equality at each level is in `test_onnx.py` and `tests/analysis/test_certificate.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch.utils._pytree import tree_leaves

import zq_compiler as zq
from tests import onnx_runtime
from zq_compiler.numerics import sqnr

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

MIN_SQNR_DB = 35.0  # as in test_onnx_models.py
LAYERS = 2

# What the optimized file runs: of a layer, and of the rest of the model. BERT's embedding norm and pooler, and the last
# norm of decoders are the rest; their projections onto the vocabulary stay in floats. MatMul (rotations), Sum, Add and
# the like are in every file, and are not counted.
BERT = Counter(LayerNormalization=1, MatMulIntegerToFloat=1, Tanh=1)
GPT2, LLAMA = Counter(LayerNormalization=1), Counter(SimplifiedLayerNormalization=1)
FUSED = {
    "bert": (BERT, {"LayerNormalization": 2, "BiasGelu": 1}, {"token": 6, "hero": 8}),
    "gpt2": (GPT2, {"LayerNormalization": 2, "Gelu": 1}, {"token": 4, "hero": 6}),
    "llama": (LLAMA, {"SimplifiedLayerNormalization": 2, "QuickGelu": 1}, {"token": 7, "hero": 9}),
}
COUNTED = {
    *("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "MultiHeadAttention"),
    "MatMulNBits",
    *("LayerNormalization", "SkipLayerNormalization"),
    *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    *("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Tanh", "Sigmoid"),
    *("Erf", "ReduceMean", "Softmax", "Pow"),  # what norms, GELU and attention fall apart into
}
RECIPES = ("w8a8", "w8a8-plain", "hero-m3", "w4a8-g128", "w4a16-g64-asym")
PACKED = ("w4a8-g128", "w4a16-g64-asym")  # products are MatMulNBits in place of MatMulIntegerToFloat
FAST = {("bert", "w8a8"), ("bert", "hero-m3"), ("gpt2", "w8a8-plain"), ("llama", "w8a8"), ("bert", "w4a8-g128")}
CASES = [
    pytest.param((family, recipe), id=f"{family}-{recipe}", marks=() if (family, recipe) in FAST else pytest.mark.slow)
    for family in FUSED
    for recipe in RECIPES
]


@dataclass
class Exported:
    """A quantized model, an example call, its file, and the one that ONNX Runtime makes of it."""

    family: str
    recipe: str
    model: zq.QuantizedModel
    inputs: dict[str, torch.Tensor]
    path: Path
    optimized: Any
    outputs: list[Any]


@pytest.fixture(scope="module", params=CASES)
def exported(request: Any, tmp_path_factory: Any) -> Exported:
    family, recipe = request.param
    folder = tmp_path_factory.mktemp("ladder")
    model, inputs = tiny_models.build(family)
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    quantized = zq.quantize(model, inputs, recipe=recipe, calibration=calibration)
    path = quantized.export_onnx(folder / "model.onnx").path
    session = onnx_runtime.session(path, optimized=folder / "optimized.onnx")
    outputs = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    return Exported(family, recipe, quantized, inputs, path, onnx.load(folder / "optimized.onnx"), outputs)


def test_strict_inference_finds_the_shapes_that_the_file_states(exported: Exported) -> None:
    """Inference has no schema of `com.microsoft`: what the file states of their results is kept, the rest taken out."""
    onnx.checker.check_model(exported.path, full_check=True)
    model = onnx.load(exported.path)
    stated = {value.name: value.type.tensor_type for value in model.graph.value_info}
    foreign = {name for node in model.graph.node if node.domain for name in node.output}
    assert foreign <= stated.keys() and all(stated[name].HasField("shape") for name in foreign)
    kept = [value for value in model.graph.value_info if value.name in foreign]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    found = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    made = {name for node in model.graph.node for name in node.output} - {y.name for y in model.graph.output}
    assert made <= found.keys()
    for name in made & stated.keys():
        assert found[name].elem_type == stated[name].elem_type, name
        if found[name].HasField("shape") and stated[name].HasField("shape"):
            pairs = zip(found[name].shape.dim, stated[name].shape.dim, strict=True)
            assert all(a.dim_value == b.dim_value for a, b in pairs if a.dim_value and b.dim_value), name


def test_the_optimized_file_holds_fused_operators_and_no_others(exported: Exported) -> None:
    rest, layer, products = FUSED[exported.family]
    hero = exported.recipe.startswith("hero")
    of_layer = Counter(layer, MatMulIntegerToFloat=products["hero" if hero else "token"])
    if not hero:  # there it is integer products, Exp and QuantizeLinear
        of_layer["MultiHeadAttention"] = 1
    want = Counter(rest)
    for _ in range(LAYERS):
        want += of_layer
    if exported.recipe in PACKED:
        want["MatMulNBits"] = want.pop("MatMulIntegerToFloat")
    assert Counter(n.op_type for n in exported.optimized.graph.node if n.op_type in COUNTED) == want


def test_fully_optimized_outputs_are_the_oracles(exported: Exported) -> None:
    want = [y for y in tree_leaves(exported.model(**exported.inputs)) if isinstance(y, torch.Tensor)]
    for mine, theirs in zip(exported.outputs, want, strict=True):
        assert sqnr(theirs, torch.from_numpy(mine)) >= MIN_SQNR_DB
