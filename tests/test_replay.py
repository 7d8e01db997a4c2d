"""Batches that go through a graph piece by piece: the same values as in one go, and as little held as that takes."""

import pytest
import torch
from torch import nn

import zq_compiler as zq
from tests.programs import Block, after, captured, decoder, encoder, randn, run
from zq_compiler import CalibrationError
from zq_compiler.batches import Batches
from zq_compiler.numerics import sqnr
from zq_compiler.replay import Replay, batches_of

X = randn(2, 5, 32)
DATA = [randn(2, 5, 32, seed=i) for i in range(3)]


def replayed(program, **options):
    """The program's first output on each batch."""
    replay = Replay(program, Batches(DATA), **options)
    output = program.graph.output_node()
    replay.advance(output)
    return list(replay.inputs(output.args[0][0]))


@pytest.mark.parametrize("forward", [encoder, decoder])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-g64", "hero-m3", "fp8", "fp8-static", "w4a8", "w4a4"])
def test_it_computes_what_the_graph_does(forward, recipe):
    program = after(captured(forward, X, recipe=recipe), "insert_qdq")
    for x, y in zip(DATA, replayed(program), strict=True):
        assert torch.equal(y, run(program, x)[0])


@pytest.mark.parametrize("forward", [encoder, decoder])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain", "w4a16-g64", "hero-m3", "fp8", "w4a8", "w4a4"])
@pytest.mark.parametrize("until", ["insert_qdq", "absorb_scales", "gptq"])
def test_as_float_it_is_the_model_before_quantization(forward, recipe, until):
    block = Block(forward)
    program = after(captured(block, X, recipe=recipe + ("+gptq" if until == "gptq" else "")), until)
    for x, y in zip(DATA, replayed(program, as_float=True), strict=True):
        with torch.no_grad():
            assert sqnr(block(x), y) > 100
        assert sqnr(run(program, x)[0], y) < 60  # the graph itself is quantized


def test_what_exceeds_the_limit_goes_to_files_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = after(captured(decoder, X, recipe="w8a8"), "insert_qdq")
    in_memory = replayed(program)
    replay = Replay(program, Batches(DATA), limit=0)
    output = program.graph.output_node()
    replay.advance(output)
    assert len(list(tmp_path.rglob("*.pt"))) == len(DATA)
    assert all(map(torch.equal, in_memory, replay.inputs(output.args[0][0])))
    del replay
    assert not list(tmp_path.rglob("*.pt"))


def test_only_what_is_still_read_is_held():
    program = after(captured(lambda self, x: self.c(self.b(self.a(x)).relu()), X, recipe="w4a16-g64"), "insert_qdq")
    replay = Replay(program, Batches(DATA))
    for linear in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        replay.advance(linear)
        assert [value.shape for value in replay.values(0).values()] == [X.shape]


def test_one_weight_at_a_time_is_in_floats(monkeypatch):
    """All are quantized at the top of the graph; each is dequantized for its own product only."""
    program = after(captured(decoder, X, recipe="w4a16-g64"), "insert_qdq")
    counts = []
    constant_values = zq.replay.constant_values

    def counting(*args):
        values = constant_values(*args)
        counts.append(sum(str(node.target).startswith("zq.dequantize_weight") for node in values))
        return values

    monkeypatch.setattr(zq.replay, "constant_values", counting)
    replayed(program)
    assert max(counts) == 1 and sum(counts) == 7


def test_a_forward_loop_sees_outputs():
    seen = []

    def loop(model):
        for x in DATA:
            seen.append(model(x))

    block = Block(lambda self, x: self.a(x))
    program = after(captured(block, X, recipe="w4a16-g64"), "insert_qdq")
    replay = Replay(program, Batches(loop))
    assert len(replay) == 3 and all(y.shape == x.shape for y, x in zip(seen, DATA, strict=True))


def test_changes_in_place_stay_visible_through_views():
    def forward(self, x):
        y = self.a(x)
        view = y[:, 1:]
        y.add_(1)
        return self.b(view)

    program = after(captured(forward, X, recipe="w4a16-g64"), "insert_qdq")
    for x, y in zip(DATA, replayed(program, limit=0), strict=True):
        assert torch.equal(y, run(program, x)[0])


def test_a_graph_with_a_state_is_refused():
    def forward(self, x):
        self.state.add_(1)
        return self.a(x + self.state)

    program = after(captured(forward, X, recipe="w4a16-g64"), "insert_qdq")
    with pytest.raises(CalibrationError, match="changes its own state"):
        Replay(program, Batches(DATA))


def test_data_that_is_missing_or_does_not_fit_is_named():
    model = nn.Linear(32, 32).eval()
    with pytest.raises(CalibrationError, match="give calibration=batches"):
        zq.quantize(model, (X,), recipe="w4a16-g64+gptq")
    with pytest.raises(CalibrationError, match="batch 1"):
        zq.quantize(model, (X,), recipe="w4a16-g64+gptq", calibration=[X, randn(2, 5, 31)])
    program = captured(decoder, X)
    program.calibration = None
    with pytest.raises(CalibrationError, match="no calibration data was given"):
        batches_of(program, "GPTQ")
    program.calibration = zq.Statistics({})
    with pytest.raises(CalibrationError, match="statistics of activations are not enough"):
        batches_of(program, "GPTQ")
