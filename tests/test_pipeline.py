"""The driver: order, records, dumps, and contracts held against passes that were made to break them."""

import math

import pytest
import torch

from tests.programs import captured, randn
from zq_compiler import VerificationError
from zq_compiler.pipeline import Contract, Pass, PassPipeline, readable
from zq_compiler.program import Stage, describe, set_constant

aten = torch.ops.aten


def make_pass(name="planted", change=lambda program: None, contract=Contract.EXACT, stages=(Stage.FLOAT, Stage.FLOAT)):
    class Planted(Pass):
        requires, produces = stages

        def __call__(self, program):
            change(program)
            return 1

    Planted.name, Planted.contract = name, contract
    return Planted()


def program(forward=lambda self, x: (x * 2, x.argmax(-1), self.a(x)), x=None):
    return captured(forward, randn(3, 32) if x is None else x)


def scale_first(factor):
    """A pass body that multiplies the first output."""

    def change(program):
        output = program.graph.find_nodes(op="output")[0]
        with program.graph.inserting_before(output):
            wrong = program.graph.call_function(aten.mul.Tensor, (output.args[0][0], factor))
        wrong.meta["val"] = output.args[0][0].meta["val"]
        output.args = ((wrong, *output.args[0][1:]),)

    return change


def test_stages_must_fit_together():
    quantizes = make_pass("one", stages=(Stage.FLOAT, Stage.QDQ))
    wants_fused = make_pass("two", stages=(Stage.FUSED, Stage.FUSED))
    with pytest.raises(ValueError, match="two requires FUSED but one produces QDQ"):
        PassPipeline([quantizes, wants_fused])
    with pytest.raises(VerificationError, match="two: requires stage FUSED, got FLOAT"):
        PassPipeline([wants_fused]).run(program())


def test_a_run_is_recorded_and_sets_the_stage():
    p = program()
    PassPipeline([make_pass("one"), make_pass("two", stages=(Stage.FLOAT, Stage.QDQ))]).run(p)
    assert [(r.name, r.changes, r.sqnr) for r in p.history] == [("one", 1, None), ("two", 1, None)]
    assert all(0 <= r.seconds < 60 for r in p.history)
    assert p.stage is Stage.QDQ


def test_checked_records_carry_the_sqnr():
    p = program()
    quantizing = make_pass("lossy", scale_first(1.1), Contract.LOSSY)
    PassPipeline([make_pass("same"), quantizing]).run(p, check=True)
    assert p.history[0].sqnr == math.inf
    assert math.isclose(p.history[1].sqnr, 20.0, abs_tol=0.01)


@pytest.mark.parametrize(
    ("contract", "factor", "caught"),
    [
        (Contract.EXACT, 1 + 2**-20, True),
        (Contract.EXACT, math.nan, True),
        (Contract.CLOSE, 1 + 2**-20, False),
        (Contract.CLOSE, 1.02, True),  # 34 dB
        (Contract.CLOSE, math.nan, True),
        (Contract.CLOSE, math.inf, True),
        (Contract.LOSSY, 1.02, False),
    ],
)
def test_contracts(contract, factor, caught):
    pipeline = PassPipeline([make_pass("harmless"), make_pass("planted", scale_first(factor), contract)])
    if caught:
        with pytest.raises(VerificationError, match=r"^planted: "):
            pipeline.run(program(), check=True)
    pipeline.run(program(), check=not caught)


def test_exact_holds_integers_and_output_count_and_dtype():
    def shift_tokens(p):
        output = p.graph.find_nodes(op="output")[0]
        with p.graph.inserting_before(output):
            wrong = p.graph.call_function(aten.add.Tensor, (output.args[0][1], 1))
        wrong.meta["val"] = output.args[0][1].meta["val"]
        output.args = ((output.args[0][0], wrong, output.args[0][2]),)

    def drop_one(p):
        output = p.graph.find_nodes(op="output")[0]
        output.args = (output.args[0][:2],)

    def to_half(p):
        output = p.graph.find_nodes(op="output")[0]
        with p.graph.inserting_before(output):
            wrong = p.graph.call_function(aten.to.dtype, (output.args[0][0], torch.float16))
        wrong.meta["val"] = output.args[0][0].meta["val"].half()
        output.args = ((wrong, *output.args[0][1:]),)

    for change, message in [
        (shift_tokens, "must not change"),
        (drop_one, "3 outputs became 2"),
        (to_half, r"output 0 was torch\.float32 \(3, 32\), is torch\.float16"),
    ]:
        with pytest.raises(VerificationError, match=message):
            PassPipeline([make_pass(change=change)]).run(program(), check=True)


def test_infinities_that_a_model_outputs_are_no_violation():
    def masked(self, x):
        return self.a(x).masked_fill(x > 0, -math.inf)

    PassPipeline([make_pass(contract=Contract.CLOSE)]).run(program(masked), check=True)
    with pytest.raises(VerificationError):
        PassPipeline([make_pass(change=scale_first(-1.0), contract=Contract.CLOSE)]).run(program(masked), check=True)


def test_checking_leaves_inputs_and_running_state_alone():
    def counting(self, x):
        self.state.add_(1)
        x.mul_(2)
        return x * self.state

    x = randn(3, 32)
    p = program(counting, x)
    before = x.clone()
    PassPipeline([make_pass(), make_pass("again")]).run(p, check=True)
    assert torch.equal(x, before)
    assert p.gm.state.count_nonzero() == 0


def test_checking_needs_example_inputs():
    p = program()
    p.example_inputs = None
    with pytest.raises(VerificationError, match="needs example inputs"):
        PassPipeline([]).run(p, check=True)


def test_a_pass_that_leaves_an_illegal_graph_is_named():
    def break_constant(p):
        set_constant(p.gm, "a.weight", torch.zeros(3, 3))

    with pytest.raises(VerificationError, match=r"after planted: constant a.weight is f32"):
        PassPipeline([make_pass(change=break_constant)]).run(program())


def test_dead_nodes_are_removed_but_in_place_operations_stay():
    p = captured(lambda self, x: (self.state.add_(1), x.mul_(2), x + 1)[2], randn(3, 32))
    PassPipeline([make_pass(change=lambda p: p.graph.call_function)]).run(p)
    targets = [n.target for n in p.graph.nodes]
    assert aten.add_.Tensor in targets and aten.mul_.Tensor in targets


def test_dump_writes_the_graph_before_and_after_each_pass(tmp_path):
    p = program()
    PassPipeline([make_pass("one"), make_pass("two", scale_first(3), Contract.LOSSY)]).run(p, dump=tmp_path / "new")
    files = sorted(f.name for f in (tmp_path / "new").iterdir())
    assert files == ["00_captured.txt", "01_one.txt", "02_two.txt"]
    captured_text, last = ((tmp_path / "new" / f).read_text() for f in (files[0], files[2]))
    assert (
        "aten.linear(inputs_0, a_weight, a_bias)" in captured_text
        and "a_weight: f32[32, 32] = get_attr a.weight" in last
    )
    assert last.count("aten.mul.Tensor") == captured_text.count("aten.mul.Tensor") + 1
    assert last == readable(p)


@pytest.mark.parametrize("check", [False, True])
def test_a_run_until_a_pass_and_one_since_it_are_one_run(tmp_path, check):
    def steps():
        lossy = make_pass("three", scale_first(3), Contract.LOSSY, (Stage.FLOAT, Stage.QDQ))
        return [make_pass("one"), make_pass("two", scale_first(2), Contract.LOSSY), lossy]

    whole, parts = program(), program()
    PassPipeline(steps()).run(whole, check=check, dump=tmp_path / "whole")
    PassPipeline(steps()).run(parts, until="three", check=check, dump=tmp_path / "parts")
    assert [r.name for r in parts.history] == ["one", "two"] and parts.stage is Stage.FLOAT
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["00_captured.txt", "01_one.txt", "02_two.txt"]
    PassPipeline(steps()).run(parts, since="three", check=check, dump=tmp_path / "parts")
    assert [(r.name, r.changes, r.sqnr) for r in parts.history] == [(r.name, r.changes, r.sqnr) for r in whole.history]
    assert parts.stage is whole.stage and readable(parts) == readable(whole)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / file.name).read_text() == file.read_text()
    with pytest.raises(VerificationError, match="one: requires stage FLOAT, got QDQ"):
        PassPipeline(steps()).run(parts)


def test_there_must_be_such_a_pass():
    for names in ({"since": "none"}, {"until": "none"}):
        with pytest.raises(ValueError, match="none"):
            PassPipeline([make_pass("one")]).run(program(), **names)


def test_readable_shows_symbolic_shapes_and_integers():
    text = readable(captured(lambda self, x: x.argmax(-1), randn(3, 32), dynamic=True))
    assert text.startswith("# stage FLOAT, recipe w8a8, ")
    rows = next(line for line in text.splitlines() if line.startswith("argmax"))
    assert rows.startswith("argmax: i64[s") and rows.endswith("aten.argmax(inputs_0, -1)")
    assert describe((torch.zeros(2, dtype=torch.uint8), None, torch.zeros((), dtype=torch.bfloat16))) == (
        "(u8[2], NoneType, bf16[])"
    )
