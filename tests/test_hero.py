"""ZeroQuant-HERO's modes end to end: what is INT8 in each, the same answers in every lowering, and calibration."""

import pytest
import tiny_models
import torch
from torch.utils._pytree import tree_leaves

import zq_compiler as zq
from tests import onnx_runtime
from tests.programs import dialect
from zq_compiler.kernels import int8_linear, int8_linear_quantize
from zq_compiler.kernels.cpu import build
from zq_compiler.numerics import sqnr

MODES = ("hero-m1", "hero-m2", "hero-m3")
LAYERS = 2
MIN_SQNR_DB = 25.0
SAME_DB = 60.0  # the oracle and a lowering: single integers a step apart where norms round otherwise
# One encoder layer of each mode, and what the rest of BERT has once. The last norm's result leaves as floats, and the
# pooler reads its first token.
NORMS = {"embedding_layer_norm_quantize": 1, "int8_add_layer_norm_quantize": -1, "int8_embedding": 2}
ENCODER_LAYER = {
    "hero-m1": {"int8_linear": 4, "int8_add_layer_norm_quantize": 2},
    "hero-m2": {"int8_linear_quantize": 4, "int8_attention": 1, "int8_linear": 1, "int8_add_layer_norm_quantize": 2},
    "hero-m3": {
        "int8_linear_quantize": 5,
        "int8_attention": 1,
        "int8_linear_gelu_quantize": 1,
        "int8_add_layer_norm_quantize": 2,
    },
}
ONCE = {
    "hero-m1": {**NORMS, "int8_linear": 1, "quantize_per_token": 1, "dequantize": 1},
    "hero-m2": {**NORMS, "int8_linear": 1, "quantize_per_token": 1, "dequantize": 1},
    "hero-m3": {**NORMS, "int8_linear": 1, "quantize_per_token": 1, "dequantize": 2},
}


def quantized(family="bert", recipe="hero-m3", **options):
    model, inputs = tiny_models.build(family)
    return model, inputs, zq.quantize(model, inputs, recipe=recipe, calibration=[inputs], **options)


def floats(outputs):
    kept = {k: v for k, v in outputs.items() if k != "past_key_values"}
    return [t for t in tree_leaves(kept) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def worst(reference, actual):
    return min(sqnr(a, b) for a, b in zip(floats(reference), floats(actual), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_ops_of_an_encoder_layer(mode):
    layer, once = ENCODER_LAYER[mode], ONCE[mode]
    want = {name: LAYERS * layer.get(name, 0) + once.get(name, 0) for name in layer.keys() | once.keys()}
    _, _, q = quantized(recipe=mode, check=True)
    assert dialect(q.program) == want
    float_rows = {row.role for row in q.program.plan.values() if not row.quantized}
    assert float_rows == {"hero-m1": {"attention_output", "feed_forward_out"}, "hero-m2": {"feed_forward_out"}}.get(
        mode, set()
    )
    rows = {row.name: row for row in q.report().layers}
    assert all(row.got == "int8" or row.reason for row in rows.values())
    if mode != "hero-m1":
        assert rows["encoder.layer.0.attention.self"].got == "int8"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_answers_stay(family, mode):
    model, inputs, q = quantized(family, mode)
    with torch.no_grad():
        assert worst(model(**inputs), q(**inputs)) >= MIN_SQNR_DB


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f not in ("bert", "gpt2", "llama", "vit")])
def test_answers_of_every_family_stay(family):
    model, inputs, q = quantized(family, "hero-m3")
    with torch.no_grad():
        assert worst(model(**inputs), q(**inputs)) >= MIN_SQNR_DB
    assert q.report().operators.get("zq.int8_attention")


@pytest.mark.parametrize("mode", MODES)
def test_compiled_agrees_with_the_oracle_at_other_sizes(mode):
    _, inputs, q = quantized(recipe=mode)
    fast = q.compile(dynamic=True)
    longer = {**tiny_models.text(3, 21)}
    for call in (inputs, longer):
        assert worst(q(**call), fast(**call)) >= SAME_DB
    native = {choice["op"] for choice in q.report().providers if choice["provider"] == "native"}
    if build.unavailable_reason() is None:
        assert native >= set(ENCODER_LAYER[mode])


@pytest.mark.parametrize(("mode", "softmax"), [*((mode, "token") for mode in MODES), ("hero-m3", "static")])
def test_onnx_runtime_agrees_with_the_oracle(mode, softmax, tmp_path):
    pytest.importorskip("onnxruntime")
    _, inputs, q = quantized(recipe=zq.load_recipe(mode).replace(softmax=softmax))
    report = q.export_onnx(tmp_path / "m.onnx")
    products = {"int8_linear": 1, "int8_linear_quantize": 1, "int8_linear_gelu_quantize": 1, "int8_attention": 2}
    want = sum(products.get(name, 0) * count for name, count in dialect(q.program).items())
    assert report.nodes["MatMulIntegerToFloat"] == want
    session = onnx_runtime.session(report.path)
    for call in (inputs, tiny_models.text(3, 21)):
        names = [i.name for i in session.get_inputs()]
        got = session.run(None, {n: call.get(n, torch.ones_like(call["input_ids"])).numpy() for n in names})
        assert min(sqnr(a, torch.from_numpy(b)) for a, b in zip(floats(q(**call)), got, strict=True)) >= SAME_DB


def test_m1_needs_no_calibration_and_has_w8a8s_integers_on_equal_input():
    """Q, K, V and FC1 read the same integers and weights; only what comes before them differs."""
    model, inputs = tiny_models.build("bert")
    m1 = zq.quantize(model, inputs, recipe="hero-m1")
    w8a8 = zq.quantize(model, inputs, recipe="w8a8")
    x = torch.randn(2, 5, 64)
    layers = {n.args[2].target: n for n in w8a8.program.graph.find_nodes(op="call_function", target=int8_linear)}
    mine = m1.program.graph.find_nodes(op="call_function", target=int8_linear)
    assert len(mine) == 4 * LAYERS + 1
    q, scale = torch.ops.zq.quantize_per_token(x, True)
    for node in mine:
        results = []
        for program, call in ((m1.program, node), (w8a8.program, layers[node.args[2].target])):
            weight, weight_scale, bias = (program.gm.get_buffer(n.target) for n in call.args[2:5])
            results.append(torch.ops.zq.int8_linear(q, scale, weight, weight_scale, bias, torch.float32))
        assert torch.equal(*results)


@pytest.mark.parametrize(("family", "activation"), [("llama", "silu_mul_quantize"), ("gpt2", "gelu_quantize")])
def test_decoders_have_a_preset_of_their_own(family, activation):
    """As M3, every linear and attention is INT8, but FC2 reads token-wise integers."""
    model, inputs, q = quantized(family, "hero-decoder", check=True)
    plans = q.program.plan.values()
    assert {plan.kind for plan in plans if not plan.quantized} <= {"lm_head"}
    out = [plan for plan in plans if plan.role == "feed_forward_out"]
    assert len(out) == LAYERS and all(plan.input.dynamic and plan.output is None for plan in out)
    found = dialect(q.program)
    assert found["int8_attention"] == found[activation] == LAYERS and f"{activation}_static" not in found
    assert all(row.got == "int8" or row.kind == "lm_head" for row in q.report().layers)
    with torch.no_grad():
        assert worst(model(**inputs), q(**inputs)) >= MIN_SQNR_DB


def test_calibration_is_asked_for():
    model, inputs = tiny_models.build("bert")
    with pytest.raises(zq.CalibrationError, match=r"BertModel: recipe hero-m2 .*give calibration=batches"):
        zq.quantize(model, inputs, recipe="hero-m2")
    with pytest.raises(zq.CalibrationError, match="batch"):
        zq.quantize(model, inputs, recipe="hero-m2", calibration=[])
    bad = {**inputs, "input_ids": inputs["input_ids"].float()}
    with pytest.raises(zq.CalibrationError, match=r"batch 1.*int64"):
        zq.quantize(model, inputs, recipe="hero-m2", calibration=[inputs, bad])


def test_statistics_serve_other_modes_and_no_other_model(tmp_path):
    model, inputs, m3 = quantized(recipe="hero-m3")
    m3.statistics.save(tmp_path / "ranges.safetensors")
    again = zq.quantize(model, inputs, recipe="hero-m2", calibration=tmp_path / "ranges.safetensors")
    _, _, fresh = quantized(recipe="hero-m2")
    assert torch.equal(again(**inputs).last_hidden_state, fresh(**inputs).last_hidden_state)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.add_(1e-3)
    with pytest.raises(zq.CalibrationError, match="another model"):
        zq.quantize(model, inputs, recipe="hero-m2", calibration=tmp_path / "ranges.safetensors")


def test_saved_models_come_back_equal(tmp_path):
    _, inputs, q = quantized(recipe="hero-m3")
    q.save(tmp_path / "saved")
    loaded = zq.load(tmp_path / "saved")
    assert torch.equal(loaded(**inputs).last_hidden_state, q(**inputs).last_hidden_state)
    assert loaded.report().counts == q.report().counts


def test_a_layer_can_be_left_in_float_and_the_graph_around_it_stays_legal():
    recipe = zq.load_recipe("hero-m3").with_rules(zq.QRule.leave_float(r"encoder\.layer\.1\."))
    model, inputs, q = quantized(recipe=recipe, check=True)
    found = {row.name: row.got for row in q.report().layers if row.name.startswith("encoder.layer.1.")}
    assert set(found.values()) == {"float"} and len(found) == 7
    assert dialect(q.program)["int8_attention"] == 1
    with torch.no_grad():
        assert worst(model(**inputs), q(**inputs)) >= MIN_SQNR_DB


def test_scales_are_divided_out_of_weights_and_biases():
    """GeMM^quant teacher-forced: its integers are those of the float product, divided by the output's scale."""
    _, _, q = quantized(recipe="hero-m3")
    program = q.program
    node = next(n for n in program.graph.find_nodes(op="call_function", target=int8_linear_quantize) if not n.args[1])
    w_q, folded, bias = (program.gm.get_buffer(n.target).double() for n in node.args[2:])
    x = torch.randint(-128, 128, (50, w_q.shape[1]), dtype=torch.int8)
    exact = x.double() @ (w_q * folded).t() + bias
    got = torch.ops.zq.int8_linear_quantize(x, None, w_q.to(torch.int8), folded.float(), bias.float())
    difference = (got.double() - exact.clamp(-128, 127)).abs()
    assert difference.max() <= 0.5 + 1e-3  # half a step, and the rounding of float32 at a tie


def test_out_of_range_inputs_saturate():
    """Static scales know the calibrated range only: beyond it integers saturate, and nothing becomes NaN."""
    _, inputs, q = quantized(recipe="hero-m3")
    with torch.no_grad():
        table = q.program.gm.get_buffer("embeddings.word_embeddings.weight_scale")
        table.mul_(50)
    assert q(**inputs).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("mode", ["hero-m2", "hero-m3"])
def test_torch_compile_binds_batches_by_name(mode):
    """One run over a generator's batches serves the graph of a first size and the dynamic one."""
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    batches = zq.Batches(batch for batch in [inputs])
    options = {"recipe": mode, "calibration": batches, "lowering": "eager"}
    compiled = torch.compile(model, backend="zeroquant", options=options)
    q = zq.quantize(model, inputs, recipe=mode, calibration=[inputs])
    before = len(zq.compile_reports())
    with torch.no_grad():
        for call in (inputs, tiny_models.text(3, 21), tiny_models.text(2, 9), tiny_models.text(4, 12)):
            assert worst(q(**call), compiled(**call)) >= SAME_DB
    report = zq.compile_reports()[-1]
    assert report.operators["zq.int8_attention"] == LAYERS
    assert len(zq.compile_reports()) - before == 2  # for one size, and for all others
    assert {row.name for row in report.layers} == {row.name for row in q.report().layers}
    (collected,) = batches.collected.values()
    assert collected.key == q.statistics.key and set(collected) == set(q.statistics)
    for name, value in q.statistics.items():
        torch.testing.assert_close(collected[name].max_abs, value.max_abs, rtol=1e-5, atol=0)


def test_release_after_calibration_frees_and_new_sizes_still_compile():
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    options = {"recipe": "hero-m3", "calibration": q.statistics, "lowering": "eager"}
    compiled = torch.compile(model, backend="zeroquant", options=options)
    with torch.no_grad():
        compiled(**inputs)
        assert zq.release(model) > 0
        call = tiny_models.text(3, 21)
        assert worst(q(**call), compiled(**call)) >= SAME_DB


def test_torch_compile_takes_statistics_where_batches_do_not_fit_the_first_graph():
    """Dynamo's first graph is for one size. The other door's statistics fit it, as they are of the same model."""
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    call = tiny_models.text(2, 9)
    options = {"recipe": "hero-m3", "lowering": "eager"}
    with torch.no_grad():
        with pytest.raises(Exception, match=r"batch 0: is \[2, 16\].*dynamic=True"):
            torch.compile(model, backend="zeroquant", options={**options, "calibration": [inputs]})(**call)
        for given, dynamic in ((q.statistics, None), ([inputs], True)):
            torch.compiler.reset()
            chosen = {**options, "calibration": given}
            got = torch.compile(model, backend="zeroquant", dynamic=dynamic, options=chosen)(**call)
            assert worst(q(**call), got) >= SAME_DB


def test_torch_compile_names_what_calibration_does_not_reach():
    torch.compiler.reset()

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, _ = tiny_models.build("bert")

        def forward(self, input_ids):
            hidden = self.bert.embeddings(input_ids)
            torch._dynamo.graph_break()
            return self.bert.encoder(hidden).last_hidden_state

    ids = tiny_models.text(2, 8)["input_ids"]
    compiled = torch.compile(
        Broken().eval(), backend="zeroquant", options={"recipe": "hero-m3", "calibration": [{"input_ids": ids}]}
    )
    with pytest.raises(Exception, match="graph break"), torch.no_grad():
        compiled(input_ids=ids)
    with pytest.raises(Exception, match="give calibration=batches"), torch.no_grad():
        torch.compile(Broken().eval(), backend="zeroquant", options={"recipe": "hero-m3"})(input_ids=ids)
