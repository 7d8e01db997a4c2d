"""Looking at a graph while it runs: what the model computes is seen, and errors name the batch."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

from tests.programs import Block, captured, randn
from tests.test_statistics import content
from tests.test_statistics_files import everything
from tests.tiny_models import build
from zq_compiler import CalibrationError, WeightError
from zq_compiler.calibration import Collector, Watch, collect, structure_key
from zq_compiler.calling import CallingConvention
from zq_compiler.capture import capture_dynamo, capture_module
from zq_compiler.passes.canonicalize import Canonicalize
from zq_compiler.program import Program, get_constant, set_constant
from zq_compiler.recipe import PRESETS
from zq_compiler.statistics import ValueStatistics

aten = torch.ops.aten
X = randn(3, 32)
BATCHES = [randn(rows, 32, seed=rows) * rows for rows in (3, 1, 7, 4)]


class Model(nn.Module):
    """Two linears, an attention, and an option."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None):
        y = self.first(x).relu()
        q = y.reshape(1, -1, 4, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        y = self.second(y.transpose(1, 2).reshape(-1, 32))
        return {"y": y if mask is None else y * mask, "labels": labels}


def program_of(model: nn.Module, *args, **kwargs) -> tuple[Program, CallingConvention]:
    program = capture_module(model.eval(), args, kwargs, PRESETS["w8a8"])
    return program, CallingConvention.of(program)


MODEL = Model().eval()
PROGRAM, CONVENTION = program_of(MODEL, X)


def find(program: Program, target) -> list[torch.fx.Node]:
    return program.graph.find_nodes(op="call_function", target=target)


def probabilities(query, key, value, mask=None, dropout=0.0, is_causal=False, **_):
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf).softmax(-1)


def watches(program: Program = PROGRAM) -> list[Watch]:
    first, second = find(program, aten.linear.default)
    (attention,) = find(program, aten.scaled_dot_product_attention.default)
    return [
        Watch("first:input", first.args[0]),
        Watch("first:output", first, feature_bins=16),
        Watch("attention:probabilities", attention, probabilities, dim=1),
        Watch("second:input", second.args[0]),
    ]


def from_hooks() -> dict[str, ValueStatistics]:
    """The same values, taken from the model itself."""
    found = {w.name: ValueStatistics(w.name, dim=w.dim, feature_bins=w.feature_bins) for w in watches()}

    def first(module, args, y):
        found["first:input"].observe(args[0])
        found["first:output"].observe(y)
        q = y.relu().reshape(1, -1, 4, 8).transpose(1, 2)
        found["attention:probabilities"].observe(probabilities(q, q, q))

    def second(module, args, y):
        found["second:input"].observe(args[0])

    hooks = [MODEL.first.register_forward_hook(first), MODEL.second.register_forward_hook(second)]
    with torch.no_grad():
        for x in BATCHES:
            MODEL(x)
    for hook in hooks:
        hook.remove()
    return found


# --- what is seen --------------------------------------------------------------------------------------------------


def test_what_is_seen_is_what_the_model_computes():
    found = collect(PROGRAM, CONVENTION, BATCHES, watches())
    wanted = from_hooks()
    assert {name: content(value) for name, value in found.items()} == {k: content(v) for k, v in wanted.items()}
    assert found.batches == 4 and found["first:input"].rows == 15 and found["attention:probabilities"].features == 4


def forward_loop(model):
    for x in BATCHES:
        assert isinstance(model(x)["y"], torch.Tensor)


@pytest.mark.parametrize(
    "data",
    [
        [(x,) for x in BATCHES],
        [{"x": x, "mask": None} for x in BATCHES],
        (x for x in BATCHES),
        forward_loop,
        BATCHES[::-1],  # no order is preferred
    ],
    ids=["tuples", "dicts", "generator", "forward_loop", "reversed"],
)
def test_every_form_of_data_gives_the_same_statistics(data):
    assert everything(collect(PROGRAM, CONVENTION, data, watches())) == everything(
        collect(PROGRAM, CONVENTION, BATCHES, watches())
    )


def test_halves_merged_are_the_whole():
    first, second = (collect(PROGRAM, CONVENTION, half, watches()) for half in (BATCHES[:1], BATCHES[1:]))
    first.merge(second)
    assert everything(first) == everything(collect(PROGRAM, CONVENTION, BATCHES, watches()))


def test_a_layer_that_is_called_twice_has_one_name():
    program = captured(lambda self, x: self.a(self.a(x)), X)
    one, two = find(program, aten.linear.default)
    found = collect(program, CallingConvention.of(program), [X], [Watch("a:input", n.args[0]) for n in (one, two)])
    assert found["a:input"].rows == 6 and found.batches == 1
    with pytest.raises(CalibrationError, match="a:input: was collected with"):
        Collector(program, [Watch("a:input", one), Watch("a:input", two, dim=0)])


def test_values_are_seen_before_they_change_in_place():
    def forward(self, x):
        y = self.a(x)
        y.mul_(100)
        return y

    program = captured(forward, X)
    (linear,), (changed,) = find(program, aten.linear.default), find(program, aten.mul_.Tensor)
    found = collect(
        program,
        CallingConvention.of(program),
        [X],
        [Watch("a", linear), Watch("changed", changed), Watch("before", changed, lambda y, factor: y)],
    )
    assert content(found["a"]) == content(found["before"])
    assert torch.equal(found["changed"].max_abs, found["a"].max_abs * 100)


def test_neither_the_model_nor_the_batches_change():
    def forward(self, x):
        self.state.add_(1)
        x.mul_(2)
        return self.a(x) + self.state

    program, x = captured(forward, X), X.clone()
    found = collect(
        program, CallingConvention.of(program), [x, x], [Watch("y", program.graph.output_node().args[0][0])]
    )
    assert torch.equal(x, X)
    assert not any(t.any() for name, t in program.gm.named_buffers() if "state" in name)
    assert found["y"].rows == 6


def test_a_collector_takes_flat_inputs_and_gives_the_graphs_outputs():
    collector = Collector(PROGRAM, watches(), key="known")
    for x in BATCHES:
        assert torch.equal(collector(x)[0], MODEL(x)["y"].detach())
    whole = collect(PROGRAM, CONVENTION, BATCHES, watches())
    assert (collector.statistics.key, collector.statistics.batches) == ("known", 4)
    assert everything(collector.statistics)[2] == everything(whole)[2]


# --- refusals ------------------------------------------------------------------------------------------------------


def refused(batch, match, program=PROGRAM, convention=CONVENTION):
    with pytest.raises(CalibrationError, match=match):
        collect(program, convention, [X, batch], [])


def test_batches_that_differ_from_the_captured_inputs_are_named():
    refused(X.double(), r"^x: batch 1: expected float32 \[.*\], got float64 \[3, 32\]")
    refused(randn(3, 31), r"^x: batch 1: expected float32 \[.*, 32\], got float32 \[3, 31\]")
    refused(randn(1, 3, 32), r"^x: batch 1: expected .*, got float32 \[1, 3, 32\]")
    refused((X, X, X, X), r"^batch 1: the arguments do not fit x, mask, labels.*give batches as the model is called")
    refused({"mask": X}, r"batch 1 has mask, which the model was captured without.*leave it out: .*for k in \['x'\]")
    refused({"x": X, "labels": X}, r"batch 1 has labels, which the model was captured without.*leave it out")
    refused({"x": X, "typo": X}, r"batch 1 has typo, which the model was captured without.*leave it out")
    refused({}, r"batch 1: argument x is missing")
    refused({"x": [X, X]}, r"batch 1: the inputs are structured")
    refused("text", r"batch 1 is a value of type str")


def test_the_name_of_a_label_is_in_the_error_and_leaving_it_out_works():
    program, convention = program_of(Model(), x=X, mask=X)
    batches = [{"x": X, "mask": X, "labels": torch.ones(3)}]
    with pytest.raises(CalibrationError) as error:
        collect(program, convention, batches, [])
    repaired = eval(error.value.fix.removeprefix("leave it out: "), {"batches": batches})
    assert collect(program, convention, repaired, []).batches == 1


def test_no_batch_is_an_error():
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        collect(PROGRAM, CONVENTION, [], watches())


@pytest.mark.parametrize(("poison", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_batch_with_nan_is_named(poison, kind):
    bad = X.clone()
    bad[1, 5] = poison
    with pytest.raises(CalibrationError, match=rf"^first:input: holds {kind} \(batch 2\)"):
        collect(PROGRAM, CONVENTION, [X, X, bad, X], watches())


def test_a_batch_that_the_model_cannot_compute_is_named():
    ids = torch.tensor([[1, 2, 3]])
    program, convention = program_of(nn.Embedding(10, 8), ids)
    with pytest.raises(CalibrationError, match=r"^embedding: batch 1 cannot be computed: index out of range"):
        collect(program, convention, [ids, ids + 10], [])


def test_only_tensors_of_floats_are_watched():
    program = captured(lambda self, x: self.a(x).topk(2)[1], X)
    (topk,) = find(program, aten.topk.default)
    indices = program.graph.output_node().args[0][0]
    for node, what in [(topk, "is a .*, and only tensors have statistics"), (indices, "is int64, and only floats")]:
        with pytest.raises(CalibrationError, match=f"^value: {what}"):
            collect(program, CallingConvention.of(program), [X], [Watch("value", node)])


# --- the progress bar ----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_silence_elsewhere(monkeypatch, capsys):
    collect(PROGRAM, CONVENTION, BATCHES, [])
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    collect(PROGRAM, CONVENTION, BATCHES, [])
    assert "calibrating" in terminal.getvalue() and "4/4" in terminal.getvalue()
    assert capsys.readouterr().out == ""


# --- which graph statistics belong to ------------------------------------------------------------------------------


def key(forward, **changes) -> str:
    block = Block(forward).eval()
    with torch.no_grad():
        for name, change in changes.items():
            change(block.get_parameter(name.replace("_", ".")))
    return structure_key(captured(block, X))


def chain(self, x):
    return self.b(self.norm(self.a(x)).relu())


def test_one_model_has_one_key():
    assert key(chain) == key(chain)
    assert structure_key(captured(Block(chain).eval(), X, dynamic=True)) == key(chain)
    assert len(key(chain)) == 32


@pytest.mark.parametrize("name", ["a_weight", "a_bias", "b_weight", "norm_weight", "norm_bias"])
def test_one_bit_of_any_weight_changes_the_key(name):
    def last_bit(weight):
        flat = weight.data.view(-1)[-1:].view(torch.int32)
        flat ^= 1

    assert key(chain, **{name: last_bit}) != key(chain)


def test_names_dtypes_and_wiring_change_the_key():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Block(chain)

        def forward(self, x):
            return self.inner(x)

    others = [
        structure_key(captured(Renamed().eval(), X)),
        structure_key(captured(Block(chain).eval().bfloat16(), X.bfloat16())),
        key(lambda self, x: self.a(self.norm(self.b(x)).relu())),
        key(lambda self, x: self.b(self.norm(self.a(self.a(x))).relu())),
        key(lambda self, x: self.b(self.norm(self.a(x)) + x)),
        key(lambda self, x: self.b(self.norm(x) + self.a(x))),
    ]
    assert key(chain) not in others[:4]
    assert len(set(others)) == 6


def test_a_shape_alone_changes_the_key():
    flat, square = (captured(lambda self, x: x @ self.matrix, X) for _ in range(2))
    (name,) = (n.target for n in square.graph.find_nodes(op="get_attr"))
    assert structure_key(flat) == structure_key(square)
    set_constant(square.gm, name, get_constant(square.gm, name).reshape(64, 32))
    assert structure_key(flat) != structure_key(square)


def test_a_canonical_graph_keeps_its_key():
    program = captured(Block(chain).eval(), X)
    before = structure_key(program)
    Canonicalize()(program)
    assert structure_key(program) == before


def test_a_key_outlives_the_floats_it_was_taken_of():
    model, caches = Block(chain).eval(), {}
    program = captured(model, X)
    program.weight_cache = lambda name: caches.setdefault(name, {})
    before = structure_key(program)
    for weight in (model.a.weight, model.b.weight):
        weight.untyped_storage().resize_(0)  # taking the key has not pinned it
    assert structure_key(program) == before
    program.weight_cache = None
    with pytest.raises(WeightError, match=r"[ab]\.weight: the float weight was released"):
        structure_key(program)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "clip"])
def test_export_and_dynamo_agree_on_the_key(family):
    """Tied weights (gpt2), RMSNorm (llama), position ids in a buffer (bert, clip), a convolution (clip)."""
    model, inputs = build(family)
    captures = [capture_module(model, (), inputs, PRESETS["w8a8"])]

    def backend(gm, examples):
        captures.append(capture_dynamo(gm, examples, PRESETS["w8a8"])[0])
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(**inputs)
    assert len(captures) == 2
    for program in captures:
        Canonicalize()(program)
        program.graph.eliminate_dead_code()
    exported, traced = map(structure_key, captures)
    assert exported == traced
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "norm" in name.lower() or "ln" in name).add_(1)
    assert structure_key(captures[0]) != exported  # constants share memory with the model's own weights
