"""Layers in another float dtype: the same as casting by hand, with no more casts than that takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zq_compiler as zq
from tests import onnx_runtime, tiny_models
from tests.programs import Block, after, attend, captured, changes, dialect, ops, randn, run
from tests.tolerances import W8A8_DB
from zq_compiler.numerics import sqnr
from zq_compiler.passes.cast_layers import CastLayers
from zq_compiler.program import constants

X = randn(4, 5, 32)
FLOAT = zq.load_recipe("float")


def recipe(*patterns, dtype="bfloat16", base=FLOAT):
    return base.with_rules(*(zq.QRule(pattern, dtype=dtype) for pattern in patterns))


def casts(program):
    return ops(program).get("aten.to.dtype", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casts_between_two_layers_cancel(dtype):
    block = Block(lambda self, x: self.b(self.a(x).view(-1, 32)))
    program = after(captured(block, X, recipe=recipe("a", "b", dtype=dtype)), "cast_layers", check=True)
    assert changes(program, "cast_layers") == 2
    assert casts(program) == 2
    low = getattr(torch, dtype)
    by_hand = F.linear(X.to(low), block.a.weight.to(low), block.a.bias.to(low))
    by_hand = F.linear(by_hand.view(-1, 32), block.b.weight.to(low), block.b.bias.to(low)).float()
    assert torch.equal(run(program, X)[0], by_hand)
    assert CastLayers()(program) == 0


def test_float_weights_go():
    program = after(captured(lambda self, x: self.b(self.a(x)), X, recipe=recipe("a", "b")))
    assert casts(program) == 2
    assert {name for name, _ in constants(program.gm)} == {
        f"{layer}.{part}_bfloat16" for layer in ("a", "b") for part in ("weight", "bias")
    }


def test_one_cast_of_a_value_that_several_layers_read():
    program = after(captured(lambda self, x: self.a(x) + self.b(x), X, recipe=recipe("a|b")), check=True)
    assert casts(program) == 3


def test_attention_between_its_linears():
    def forward(self, x):
        return self.out(attend(self.a(x), self.b(x), self.c(x), is_causal=True)).sin()

    by_role = FLOAT.with_rules(
        zq.QRule("a|b|c|out", dtype="bfloat16"), zq.QRule(".*", roles=("attention",), dtype="bfloat16")
    )
    block = Block(forward)
    program = after(captured(block, X, recipe=by_role), check=True)
    assert casts(program) == 2
    attention = program.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert [n.meta["val"].dtype for n in attention] == [torch.bfloat16]
    with torch.no_grad():
        (want,) = run(captured(block, X), X)
        low = block.to(torch.bfloat16)(X.bfloat16())
    assert sqnr(want, run(program, X)[0]) == pytest.approx(sqnr(want, low.float()), abs=3)


def test_float_masks_are_cast_and_bool_masks_are_not():
    def forward(self, x, mask):
        return attend(x, x, x, attn_mask=mask)

    rule = FLOAT.with_rules(zq.QRule(".*", roles=("attention",), dtype="float16"))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask in (allowed, torch.zeros(5, 5).masked_fill(~allowed, -torch.inf)):
        program = captured(forward, X, mask, recipe=rule)
        (want,) = run(program, X, mask)
        after(program, check=True)
        assert changes(program, "cast_layers") == 1
        assert sqnr(want, run(program, X, mask)[0]) > 50


def test_neighbours_stay_integers():
    mixed = recipe("b", base=zq.load_recipe("w8a8"))
    program = captured(lambda self, x: self.c(F.gelu(self.b(self.norm(self.a(x))))), X, recipe=mixed)
    (want,) = run(program, X)
    after(program, check=True)
    assert dialect(program) == {"quantize_per_token": 1, "int8_linear": 2, "gelu_quantize": 1}
    assert sqnr(want, run(program, X)[0]) > W8A8_DB


def test_tables_and_transposed_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.w = nn.Embedding(9, 32), nn.Parameter(torch.randn(32, 32))

        def forward(self, ids):
            return self.table(ids) @ self.w

    model, ids = Model().eval(), torch.tensor([[0, 3, 8]])
    program = after(captured(model, ids, recipe=recipe("table", "w")), check=True)
    assert {name for name, _ in constants(program.gm)} == {"table.weight_bfloat16", "w_bfloat16"}
    want = (model.table.weight.bfloat16()[ids] @ model.w.bfloat16()).float()
    assert torch.equal(run(program, ids)[0], want)


def test_a_value_that_changes_in_place_is_cast_as_each_reader_finds_it():
    def forward(self, x):
        y = x * 2
        first = self.a(y)
        y.add_(1)
        return first + self.b(y)

    block = Block(forward)
    program = after(captured(block, X, recipe=recipe("a", "b")), check=True)
    w, v = block.a, block.b
    low = [t.bfloat16() for t in (w.weight, w.bias, v.weight, v.bias)]
    y = X * 2
    want = F.linear(y.bfloat16(), *low[:2]).float() + F.linear((y + 1).bfloat16(), *low[2:]).float()
    assert torch.equal(run(program, X)[0], want)


def test_the_models_own_dtype_is_no_cast():
    program = after(captured(lambda self, x: self.a(x), X, recipe=recipe("a", dtype="float32")), check=True)
    assert casts(program) == 0 and program.plan["a"].reason == "the recipe runs it in float32"
    program = captured(Block(lambda self, x: self.a(x)).half(), X.half(), recipe=recipe("a", dtype="float32"))
    after(program, check=True)
    assert casts(program) == 2 and run(program, X.half())[0].dtype is torch.float16


@pytest.mark.parametrize("pattern", [r"encoder\.layer\.1\..*", r"embeddings\.word_embeddings", r"encoder\.layer\..*"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_any_part_of_a_model_may_be_cast_in_every_mode(pattern, dtype, tmp_path):
    model, inputs = tiny_models.build("bert")
    mode = recipe(pattern, dtype=dtype, base=zq.load_recipe("hero-m3"))
    q = zq.quantize(model, inputs, recipe=mode, calibration=[inputs], check=True)
    got = {row.name: row for row in q.report().layers}
    cast = {name for name, row in got.items() if row.got == dtype}
    assert cast and all(row.got == "int8" for name, row in got.items() if name not in cast)
    row = next(row for name, row in got.items() if name in cast and row.bytes_before)
    assert row.bytes_after == row.bytes_before // 2 and row.reason == f"the recipe runs it in {dtype}"
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
    assert sqnr(want, q(**inputs).last_hidden_state) > 25
    q.save(tmp_path / "saved")
    loaded = zq.load(tmp_path / "saved")
    assert torch.equal(loaded(**inputs).last_hidden_state, q(**inputs).last_hidden_state)
    assert loaded.report().counts == q.report().counts


@pytest.mark.slow
def test_cast_layers_reach_both_lowerings(tmp_path):
    pytest.importorskip("onnxruntime")
    model, inputs = tiny_models.build("bert")
    mode = recipe(r"encoder\.layer\.1\..*", dtype="float16", base=zq.load_recipe("hero-m3"))
    q = zq.quantize(model, inputs, recipe=mode, calibration=[inputs])
    want = q(**inputs).last_hidden_state
    assert sqnr(want, q.compile()(**inputs).last_hidden_state) > 50
    session = onnx_runtime.session(q.export_onnx(tmp_path / "m.onnx").path)
    names = [i.name for i in session.get_inputs()]
    (got, *_) = session.run(None, {n: inputs.get(n, torch.ones_like(inputs["input_ids"])).numpy() for n in names})
    assert sqnr(want, torch.from_numpy(got)) > 50


def test_torch_compile_casts_too():
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    options = {"recipe": recipe(r"encoder\.layer\..*"), "lowering": "eager"}
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        got = torch.compile(model, backend="zeroquant", options=options)(**inputs).last_hidden_state
    assert 40 < sqnr(want, got) < 100
    assert zq.compile_reports()[-1].counts["bfloat16"] == 14


def test_a_weight_beyond_the_dtype_is_refused():
    block = Block(lambda self, x: self.a(x))
    with torch.no_grad():
        block.a.weight[0, 0] = 1e6
    with pytest.raises(zq.WeightError, match=r"a\.weight: .*float16 holds.*use bfloat16"):
        zq.quantize(block.eval(), X, recipe=recipe("a", dtype="float16"))
    zq.quantize(block.eval(), X, recipe=recipe("a"))


def test_the_report_counts_the_casts_and_not_before():
    plain = zq.quantize(Block(lambda self, x: self.a(x)).eval(), X, recipe="float").report()
    report = zq.quantize(Block(lambda self, x: self.a(x)).eval(), X, recipe=recipe("a")).report()
    assert report.moved().op_by_op == plain.moved().op_by_op and report.dtype == plain.dtype == "float32"
    row, rows = report.layer("a"), 4 * 5 * 32
    assert (row.moved_before, row.moved_after) == (rows * (4 + 4), rows * ((4 + 2) + (2 + 2) + (2 + 4)))
    assert "nothing was quantized: 1 layers run in another float dtype" in report.notes
    half = Block(lambda self, x: self.a(x)).half()
    wide = zq.quantize(half.eval(), X.half(), recipe=recipe("a", dtype="float32")).report()
    assert wide.dtype == "float16" and wide.layer("a").moved_after > wide.layer("a").moved_before


def test_a_layer_in_another_dtype_is_released():
    torch.compiler.reset()
    model = Block(lambda self, x: self.b(self.a(x))).eval()
    options = {"recipe": recipe("b", base=zq.load_recipe("w8a8")), "lowering": "eager"}
    compiled = torch.compile(model, backend="zeroquant", options=options)
    with torch.no_grad():
        want = compiled(X)
        zq.release(model)
        assert model.a.weight.untyped_storage().size() == model.b.weight.untyped_storage().size() == 0
        assert torch.equal(compiled(X), want)


def test_a_graph_that_observes_reports_layers_to_be_cast():
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    mode = recipe(r"encoder\.layer\.1\..*", base=zq.load_recipe("hero-m3"))
    options = {"recipe": mode, "observe": 1, "lowering": "eager"}
    compiled = torch.compile(model, backend="zeroquant", options=options)
    with torch.no_grad():
        compiled(**inputs)
        assert "float" in zq.compile_reports()[-1].counts and zq.compile_reports()[-1].moved().op_by_op > 0
        compiled(**inputs)
    assert zq.compile_reports()[-1].counts == {"int8": 11, "bfloat16": 7}


@pytest.mark.slow
def test_a_tied_table_in_another_dtype_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    model, inputs = tiny_models.build("gpt2")
    q = zq.quantize(model, inputs, recipe=recipe(".*"))
    assert "bfloat16 values" in str(q.export_onnx(tmp_path / "m.onnx"))
