"""The TensorRT target: the reference's integers in ONNX Runtime, INT8 kernels in the engine that TensorRT-RTX plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zq_compiler as zq
from zq_compiler import kernels, numerics
from zq_compiler.kernels.cpu import build as native_kernels
from zq_compiler.recipe import QRule, Role
from zq_compiler.schemes import INT8_FEATURE, INT8_WEIGHT

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
from tests import tensorrt_rtx  # noqa: E402
from tests.lowering.test_onnx import Calls, fused_program, hard_rows  # noqa: E402
from zq_compiler.lowering.onnx import export  # noqa: E402

needs_builder = pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)
CAPABILITIES = ("SM80", "SM89", "SM120")


def run(path: Path, level: str, *inputs: Tensor, extra: Sequence[str] = ()) -> list[np.ndarray]:
    """What the file computes on the CPU, with signed integers; `extra` operators' results are outputs too."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    values = {v.name: v for v in model.graph.value_info}
    wanted = [n.output[0] for n in model.graph.node if n.op_type in extra]
    model.graph.output.extend(values[name] for name in wanted if name in values)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})


def reference(op: Any) -> Any:
    found = kernels.reference_of(op)
    assert found is not None
    return found


# --- integers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 17, 64, 769, 4096])
def test_token_wise_integers_are_the_references(tmp_path: Path, k: int) -> None:
    """And products of integers with scales that are powers of two are exact, so the linear is bit-equal too."""
    torch.manual_seed(k)
    w_q = torch.randint(-127, 128, (24, k), dtype=torch.int8)
    w_scale = 2.0 ** torch.randint(-9, -4, (24, 1)).float()

    def linear(m: Any, x: Tensor) -> Tensor:
        q, scale = torch.ops.zq.quantize_per_token(x)
        return torch.ops.zq.int8_linear(q, scale, m.w_q, m.w_scale, None, torch.float32)

    module = Calls(linear, w_q=w_q, w_scale=w_scale)
    report = export(fused_program(module, torch.randn(2, k)), tmp_path / "linear.onnx", target="tensorrt")
    x = hard_rows(9, k)
    q, scale = numerics.quantize_per_token(x)
    want = reference(kernels.int8_linear)(q, scale, w_q, w_scale, None, torch.float32)
    got, integers = run(report.path, "ORT_DISABLE_ALL", x, extra=["QuantizeLinear"])
    np.testing.assert_array_equal(integers, q.numpy())
    if k < 1024:  # beyond, float32 does not hold every sum
        np.testing.assert_array_equal(got, want.numpy())
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5 * float(want.abs().nan_to_num().max()))


def test_feature_wise_integers_and_sums_are_the_references(tmp_path: Path) -> None:
    torch.manual_seed(0)
    f, steps = torch.rand(1, 64) + 0.1, 2.0**-6
    w_q = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    w_scale, bias = torch.full((32, 1), steps), torch.randn(32)

    def linear(m: Any, x: Tensor) -> Tensor:
        q = torch.ops.zq.quantize_static(x, m.f)
        return torch.ops.zq.int8_linear_quantize(q, None, m.w_q, m.w_scale, m.bias)

    module = Calls(linear, f=f, w_q=w_q, w_scale=w_scale, bias=bias)

    def and_floats(m: Any, x: Tensor) -> Tensor:  # an op must read the integers: they have no meaning outside
        q = linear(m, x)
        return torch.ops.zq.dequantize(q, m.out, torch.float32)

    module = Calls(and_floats, f=f, w_q=w_q, w_scale=w_scale, bias=bias, out=torch.ones(1, 32))
    report = export(fused_program(module, torch.randn(2, 64)), tmp_path / "linear.onnx", target="tensorrt")
    x = hard_rows(9, 64)
    want = linear(module, x)
    got, *integers = run(report.path, "ORT_DISABLE_ALL", x, extra=["QuantizeLinear"])
    np.testing.assert_array_equal(integers[0], numerics.quantize_static(x, f).numpy())
    np.testing.assert_array_equal(integers[1], want.numpy())
    np.testing.assert_array_equal(got, want.float().numpy())


@pytest.mark.parametrize("k", [768, 3072, 16384])
@pytest.mark.parametrize("static", [False, True])
def test_no_sum_leaves_float16(tmp_path: Path, k: int, static: bool) -> None:
    w_q, w_scale = torch.full((16, k), 127, dtype=torch.int8), torch.full((16, 1), 3e-4)
    w_scale[3] = 1e-12  # next to nothing: it must not become a scale of 0, nor something

    def linear(m: Any, x: Tensor) -> Tensor:
        if static:
            q, scale = torch.ops.zq.quantize_static(x, m.f), None
        else:
            q, scale = torch.ops.zq.quantize_per_token(x)
        return torch.ops.zq.int8_linear(q, scale, m.w_q, m.w_scale, None, torch.float16)

    module = Calls(linear, w_q=w_q, w_scale=w_scale, f=torch.full((1, 1), 0.01))
    x = torch.full((2, k), 1.27 / k, dtype=torch.float16) * (100 if static else 1)
    program = fused_program(module, x)
    report = export(program, tmp_path / "linear.onnx", target="tensorrt", float_dtype="float16")
    scales = [t for t in onnx.load(report.path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert all((onnx.numpy_helper.to_array(t) > 0).all() for t in scales if t.dims)
    (got,) = run(report.path, "ORT_DISABLE_ALL", x)
    want = module(x)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[:, :3], want[:, :3].numpy(), rtol=2e-3)
    assert np.abs(got[:, 3]).max() == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_attention_is_the_references_to_a_step(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    names = {"score": 2e-4, "probabilities": 0.6 / 127, "out": 0.004}
    scales = {name: torch.full((1, 1, 1, 1), value) for name, value in names.items()}

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = torch.ones(1, 1, 1, 1)
        q, k, v = (torch.ops.zq.quantize_static(x, one) for x in (q, k, v))
        out = torch.ops.zq.int8_attention(q, k, v, m.score, None, False, m.probabilities, m.out, torch.int8, True)
        return torch.ops.zq.dequantize(out, one, torch.float32)

    inputs = [torch.randint(-127, 128, (2, 4, 24, 32)).float() for _ in range(3)]
    module = Calls(attend, **scales)
    program = fused_program(module, *inputs, dynamic=[(0, 2)] * 3)
    report = export(program, tmp_path / "attention.onnx", target="tensorrt", float_dtype=dtype)
    assert report.notes == []
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 5
    (got,) = run(report.path, "ORT_DISABLE_ALL", *(x.to(getattr(torch, dtype)) for x in inputs))
    want = module(*inputs).numpy()
    apart = np.abs(np.rint(got.astype(np.float32)) - want)
    print(f"{(apart > 0).mean():.2%} of the integers differ")
    assert apart.max() <= 1 and (apart > 0).mean() < (0.002 if dtype == "float32" else 0.02)


def test_probabilities_beyond_the_calibrated_range_saturate_alike(tmp_path: Path) -> None:
    """The reference's signed probabilities end at 127, as those of a signed QuantizeLinear do."""
    q = torch.full((1, 1, 4, 16), 127, dtype=torch.int8)
    k = torch.cat([q[:, :, :1], -q[:, :, :3]], 2)  # the first key takes everything: probability 1
    v = torch.full((1, 1, 4, 16), 50, dtype=torch.int8)
    one = torch.ones(1, 1, 1, 1)
    call = (q, k, v, one * 1e-3, None, False, one * 0.5 / 127, one * 0.5 / 127, torch.int8)
    assert reference(kernels.int8_attention)(*call, True).unique().tolist() == [25]  # 127 steps of 0.5 / 127
    assert reference(kernels.int8_attention)(*call, False).unique().tolist() == [50]


# --- what the engine is made of --------------------------------------------------------------------------------------


def bert(layers: int, **config: Any) -> tuple[Any, dict[str, Tensor]]:
    import transformers as hf

    torch.manual_seed(0)
    config = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 512, **config}
    model = hf.BertModel(hf.BertConfig(num_hidden_layers=layers, **config)).eval()
    return model, tokens()


def gpt2(layers: int) -> tuple[Any, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(n_layer=layers, n_embd=256, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)
    return hf.GPT2LMHeadModel(config).eval(), {**tokens(), "use_cache": False}


def llama(layers: int) -> tuple[Any, dict[str, Any]]:
    import transformers as hf

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(num_hidden_layers=layers, vocab_size=512, **shape)
    return hf.LlamaForCausalLM(config).eval(), {**tokens(), "use_cache": False}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(0, 500, (2, 32))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


FAMILIES = {"bert": bert, "gpt2": gpt2, "llama": llama}
RECIPES = ("w8a8-plain", "hero-m2-tensorrt", "hero-m3-tensorrt")


def quantized(model: Any, inputs: dict[str, Any], recipe: Any) -> zq.QuantizedModel:
    calibration = [inputs] if zq.load_recipe(recipe).calibrated else None
    return zq.quantize(model, inputs, recipe=recipe, calibration=calibration)


def linears_in_int8(build: tensorrt_rtx.Build) -> set[str]:
    """Layers whose product is inside an INT8 GEMM; one kernel may hold several."""
    return {
        node.rpartition("/")[0] for k in build.gemms("Int8") for node in k.nodes if node.rpartition("/")[2] == "MatMul"
    }


def planned(model: zq.QuantizedModel) -> set[str]:
    return {plan.name for plan in model.program.plan.values() if plan.kind in ("linear", "lm_head") and plan.quantized}


def check_engine(model: zq.QuantizedModel, path: Path, recipe: str, layers: int) -> None:
    report = model.export_onnx(path, target="tensorrt", float_dtype="float16")
    build = tensorrt_rtx.build(path, compute_capabilities=CAPABILITIES)
    assert build.built, str(build)
    assert linears_in_int8(build) == planned(model)
    assert build.stray_quantizes == 0
    static = "hero" in recipe
    assert (build.int8_mhas, build.half_mhas) == ((layers, 0) if static else (0, layers))
    assert report.notes == []
    assert zq.lint(path, "tensorrt").findings == []
    assert not [n for n in onnx.load(path, load_external_data=False).graph.node if n.domain not in ("", "ai.onnx")]


@needs_builder
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_attention_becomes_an_int8_kernel(family: str, recipe: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family](2)
    check_engine(quantized(model, inputs, recipe), tmp_path / "model.onnx", recipe, 2)


@needs_builder
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8-plain", "hero-m3-tensorrt"])
def test_bert_base_has_twelve_fused_attentions(recipe: str, tmp_path: Path) -> None:
    model, inputs = bert(12, hidden_size=768, num_attention_heads=12, intermediate_size=3072, vocab_size=8000)
    check_engine(quantized(model, inputs, recipe), tmp_path / "model.onnx", recipe, 12)


@needs_builder
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_float_dtypes_keep_their_int8_products(dtype: str, tmp_path: Path) -> None:
    model, inputs = bert(1)
    q = quantized(model, inputs, "hero-m3-tensorrt")
    report = q.export_onnx(tmp_path / "model.onnx", target="tensorrt", float_dtype=dtype)
    build = tensorrt_rtx.build(report.path)
    assert linears_in_int8(build) == planned(q)
    if dtype == "bfloat16":
        assert build.int8_mhas == 0 and len(build.mhas("BFloat16")) == 1
        assert report.notes == [
            "encoder.layer.0.attention.self: attention in bfloat16: the fused kernel has no bfloat16"
        ]
    else:
        assert build.int8_mhas == 1


def test_its_recipes_run_through_inductor_too(tmp_path: Path) -> None:
    """With the same integers, the native attention's signed probabilities among them."""
    model, inputs = bert(1, vocab_size=64, hidden_size=64, intermediate_size=128)
    inputs["input_ids"] %= 64
    q = quantized(model, inputs, "hero-m3-tensorrt")
    got = q.compile()(**inputs).last_hidden_state
    assert numerics.sqnr(q(**inputs).last_hidden_state, got) >= 40
    choices = [c for c in q.report().providers if c["op"] == "int8_attention"]
    native = native_kernels.unavailable_reason() is None
    assert [c["provider"] for c in choices] == ["native" if native else "inline"]


# --- what cannot be had, and why --------------------------------------------------------------------------------------

FEATURE_WISE_CONTEXT = QRule(".*", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE, roles=(Role.ATTENTION_OUTPUT,))
UNFUSED = {
    "token-wise probabilities": ({"softmax": "token"}, (), {}, "no scale known beforehand"),
    "unsigned probabilities": ({"softmax": "static"}, (), {}, "unsigned"),
    "feature-wise result": ({}, (FEATURE_WISE_CONTEXT,), {}, "a scale a feature"),
    "float result": ({}, (QRule.leave_float(r".*attention\.output\.dense"),), {}, "not quantized"),
    "head size": ({}, (), {"num_attention_heads": 2}, "128 wide"),
}


@needs_builder
@pytest.mark.parametrize("case", UNFUSED)
def test_an_attention_that_cannot_be_int8_is_fused_in_floats_with_the_reason(case: str, tmp_path: Path) -> None:
    settings, rules, config, reason = UNFUSED[case]
    model, inputs = bert(1, **config)
    recipe = zq.load_recipe("hero-m3-tensorrt").replace(**settings).with_rules(*rules)
    q = quantized(model, inputs, recipe)
    report = q.export_onnx(tmp_path / "model.onnx", target="tensorrt", float_dtype="float16")
    assert len(report.notes) == 1
    assert (
        report.notes[0].startswith("encoder.layer.0.attention.self: attention in float16: ")
        and reason in report.notes[0]
    )
    build = tensorrt_rtx.build(report.path)
    # A scale a feature is divided out behind the attention, by a kernel that does nothing else.
    assert (build.int8_mhas, build.half_mhas, build.stray_quantizes) == (0, 1, int(case == "feature-wise result"))
    assert linears_in_int8(build) == planned(q)
    want = q(**inputs).last_hidden_state
    got = run(report.path, "ORT_ENABLE_BASIC", inputs["input_ids"], inputs["attention_mask"])[0]
    assert numerics.sqnr(want, torch.from_numpy(got).float()) >= 35


def test_rotations_are_noted(tmp_path: Path) -> None:
    model, inputs = bert(1)
    report = zq.quantize(model, inputs, recipe="w8a8").export_onnx(tmp_path / "model.onnx", target="tensorrt")
    assert [note for note in report.notes if "w8a8-plain" in note and "rotations" in note]


# --- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["w8a8-plain", "hero-m3-tensorrt"])
def test_a_float16_file_agrees_with_the_float32_oracle(family: str, recipe: str, tmp_path: Path) -> None:
    model, inputs = FAMILIES[family](2)
    q = quantized(model, inputs, recipe)
    report = q.export_onnx(tmp_path / "model.onnx", target="tensorrt", float_dtype="float16")
    masked = inputs["attention_mask"].clone()
    masked[1, :9] = 0  # padding on the left: whole rows of the causal mask see nothing
    ids = inputs["input_ids"]
    got = run(report.path, "ORT_ENABLE_BASIC", ids, masked)[0]
    assert got.dtype == np.float16 and np.isfinite(got).all()
    want = q(**{**inputs, "attention_mask": masked})[0]
    seen = masked.bool()
    assert numerics.sqnr(want[seen], torch.from_numpy(got).float()[seen]) >= 30


def test_angles_of_positions_stay_float32(tmp_path: Path) -> None:
    model, inputs = llama(1)
    q = quantized(model, inputs, "w8a8-plain")
    report = q.export_onnx(tmp_path / "model.onnx", target="tensorrt", float_dtype="float16")
    inferred = onnx.shape_inference.infer_shapes(onnx.load(report.path), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    angles = [types[n.input[0]] for n in inferred.node if n.op_type in ("Cos", "Sin")]
    assert len(angles) == 2 and set(angles) == {onnx.TensorProto.FLOAT}


def test_an_unknown_float_dtype_is_refused(tmp_path: Path) -> None:
    model, inputs = bert(1)
    q = zq.quantize(model, inputs)
    with pytest.raises(zq.ExportError, match=r"unknown float_dtype 'float8'.*float16"):
        q.export_onnx(tmp_path / "model.onnx", target="tensorrt", float_dtype="float8")


def test_steps_of_a_linear_fill_float16_but_do_not_exceed_it() -> None:
    from zq_compiler.lowering.onnx.tensorrt import FLOAT16_MAX, step_within_float16

    for features in (1, 16, 64, 768, 3072, 4096, 65536):
        step = step_within_float16(features)
        assert math.log2(step).is_integer()
        assert 128 * 127 * features * step <= FLOAT16_MAX < 128 * 127 * features * step * 2
