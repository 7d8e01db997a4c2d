"""What all passes that improve weights share: rows for the report, and what an interruption leaves."""

import pytest

import zq_compiler as zq
from tests.programs import after, captured, changes, decoder, randn
from zq_compiler.analysis.report import make_report
from zq_compiler.passes import gptq
from zq_compiler.program import constants

X = randn(2, 24, 32)


def test_ctrl_c_keeps_finished_layers(monkeypatch):
    calls = []
    original = gptq.gptq

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(gptq, "gptq", interrupted)
    program = after(captured(decoder, X, recipe="w4a16-g64+gptq"))
    monkeypatch.undo()
    assert [row.layer for row in program.refinements] == ["a", "b"] and changes(program, "gptq") == 2
    assert program.notes[0] == "GPTQ was interrupted: 5 of 7 layers are as they were before it"
    whole, none = (
        dict(constants(after(captured(decoder, X, recipe=f"w4a16-g64{suffix}")).gm)) for suffix in ("+gptq", "")
    )
    for name, constant in constants(program.gm):
        if name.endswith("weight_q"):
            kept = whole if name.startswith(("a.", "b.")) else none
            assert constant.equal(kept[name]), name


@pytest.mark.parametrize("method", ["lkd", "smooth0.5", "bias", "clip"])
def test_every_method_leaves_a_legal_graph_when_it_is_interrupted_at_once(method, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("zq_compiler.replay.Replay.advance", interrupt)
    monkeypatch.setattr("zq_compiler.weights.QuantizedWeight.choose", interrupt)
    program = after(captured(decoder, X, recipe=f"w4a16-g64+{method}"), check=True)
    assert any("was interrupted" in note for note in program.notes)


def test_the_report_sums_methods_up():
    program = after(captured(decoder, X, recipe="w4a16-g64+gptq+lorc4"))
    report = make_report(program)
    assert [row["method"] for row in report.refinements] == ["GPTQ"] * 7 + ["LoRC"] * 7
    text = str(report)
    assert "GPTQ: 7 of 7 improved, median 0.00" in text and "LoRC: 7 of 7 improved" in text
    assert report.layer("a").asked == "int4 per_group(64) static + GPTQ + LoRC of rank 4"


def test_methods_run_in_one_order_however_a_rule_names_them():
    rules = (zq.QRule(".*", zq.QScheme("int4", "per_group", 64), None, methods=("bias", "gptq", "clip")),)
    program = after(captured(decoder, X, recipe=zq.Recipe("mine", rules)), check=True)
    assert list(dict.fromkeys(row.method for row in program.refinements)) == ["clip search", "GPTQ", "bias correction"]
