"""`observe=N`: N calls run in float and are looked at, then every graph is INT8, and Dynamo is not asked again."""

import copy
import gc
import threading
import weakref

import pytest
import tiny_models
import torch
from torch import nn

import zq_compiler as zq
from tests.test_hero import LAYERS, SAME_DB, worst
from tests.tolerances import ROUNDING_DB
from zq_compiler import backend
from zq_compiler.numerics import sqnr
from zq_compiler.observe import Observation
from zq_compiler.passes import PASSES
from zq_compiler.torch_private import LateGuards, new_symbol, storage_key, symbolic_fake_mode

CALLS = [tiny_models.text(2, 16), tiny_models.text(3, 21), tiny_models.text(2, 9)]
LATER = [tiny_models.text(4, 12), tiny_models.text(2, 16), tiny_models.text(3, 7)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


class Compiled:
    """A compiled model that knows how many graphs Dynamo handed to the backend."""

    def __init__(self, model, observe=3, recipe="hero-m3", lowering="eager", dynamic=None, **options):
        self.first, captured = len(zq.compile_reports()), []
        options = {"recipe": recipe, "observe": observe, "lowering": lowering, **options}

        def counting(gm, inputs):
            captured.append(None)
            return backend.zeroquant(gm, inputs, options=options)

        self.run, self._captured = torch.compile(model, backend=counting, dynamic=dynamic), captured

    def __call__(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    @property
    def graphs(self):
        return len(self._captured)

    @property
    def reports(self):
        return zq.compile_reports()[self.first :]

    @property
    def notes(self):
        return [note for report in self.reports for note in report.notes]


def observations(model):
    """All of a model, each once."""
    found = [v for p in model.parameters() for v in backend._entries(p).values() if isinstance(v, Observation)]
    return list(dict.fromkeys(found))


def mlp(width=32):
    """Its second linear reads what a GELU writes, which `hero-m3` gives a static scale."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)).eval()


def rows(count, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


# --- a model in one piece ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hero-m2", "hero-m3"])
def test_float_at_first_and_then_what_calibration_with_the_same_calls_gives(mode, monkeypatch):
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe=mode, calibration=CALLS)
    lowered, lower = [], backend._lower
    monkeypatch.setattr(backend, "_lower", lambda *given: lowered.append(given) or lower(*given))
    fast = Compiled(model, len(CALLS), mode)
    for number, call in enumerate(CALLS, start=1):
        assert worst(model(**call), fast(**call)) >= ROUNDING_DB
        left = len(CALLS) - number
        assert fast.notes[-1].startswith(f"observing: runs in float for {left} more" if left else "observed")
        assert fast.reports[-1].counts.keys() == {"float"}
    (observation,) = observations(model)
    assert observation.statistics.key == q.statistics.key and observation.statistics.batches == len(CALLS)
    assert set(observation.statistics) == set(q.statistics)
    for name, value in q.statistics.items():
        torch.testing.assert_close(observation.statistics[name].max_abs, value.max_abs, rtol=1e-5, atol=0)
    graphs = fast.graphs
    assert graphs == 2 and not lowered  # for one size, and for all others
    for call in LATER:
        assert worst(q(**call), fast(**call)) >= SAME_DB
    assert fast.graphs == graphs
    assert len(lowered) == len(fast.reports) == 1  # the graph for one size is not called again
    assert fast.notes == q.report().notes
    assert fast.reports[-1].operators["zq.int8_attention"] == LAYERS
    assert [p["name"] for p in fast.reports[-1].passes] == [p["name"] for p in q.report().passes]
    assert observation.statistics.batches == len(CALLS)


@pytest.mark.slow
def test_inductor_switches_and_serves_all_sizes_with_one_graph():
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=CALLS)
    fast = Compiled(model, len(CALLS), lowering="inductor", dynamic=True)
    for call in CALLS:
        assert worst(model(**call), fast(**call)) >= ROUNDING_DB
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for call in LATER:
        assert worst(q(**call), fast(**call)) >= SAME_DB
    assert fast.graphs == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # the integer graph's own
    assert {choice["op"] for choice in fast.reports[0].providers} == {c["op"] for c in _providers(q)}


def _providers(q):
    q.compile()
    return q.report().providers


def test_a_size_that_comes_after_the_switch_is_quantized_at_once():
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    fast = Compiled(model, 1, dynamic=False)
    fast(**inputs)
    fast(**inputs)
    call = tiny_models.text(3, 5)
    assert worst(q(**call), fast(**call)) >= SAME_DB
    assert fast.graphs == 2 and [report.counts for report in fast.reports] == [q.report().counts] * 2


def test_a_graph_that_came_during_observation_needs_no_calls_of_its_own():
    model = mlp()
    fast = Compiled(model, 2, dynamic=False)
    q = zq.quantize(model, rows(3), recipe="hero-m3", calibration=[rows(3), rows(5)])
    fast(rows(3))
    fast(rows(5))
    for x in (rows(5), rows(3)):
        assert sqnr(q(x), fast(x)) >= SAME_DB
    assert fast.graphs == 2


def test_the_pipeline_is_one_run_that_pauses(tmp_path):
    fast = Compiled(mlp(), 1, check=True, dump=tmp_path)
    fast(rows(3))
    assert sorted(file.name for file in tmp_path.iterdir())[-1] == "02_annotate.txt"
    fast(rows(3))
    names = [step.name for step in PASSES]
    files = [f"{number:02d}_{name}.txt" for number, name in enumerate(["captured", *names])]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    assert [record["name"] for record in fast.reports[0].passes] == names
    assert all(record["sqnr"] is not None for record in fast.reports[0].passes)


# --- what happens meanwhile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "(NaN|Inf)")])
def test_nan_is_named_with_its_call_and_leaves_nothing(value, kind):
    model, bad = mlp(), rows(3)
    bad[1, 1] = value
    fast = Compiled(model, 2)
    fast(rows(3))
    (observation,) = observations(model)
    seen = {name: value.elements for name, value in observation.statistics.items()}
    with pytest.raises(zq.CalibrationError, match=rf"^2:input: holds {kind} in call 1"):
        fast(bad)
    assert observation.remaining == 1
    assert {name: value.elements for name, value in observation.statistics.items()} == seen
    fast(rows(3))
    q = zq.quantize(model, rows(3), recipe="hero-m3", calibration=[rows(3), rows(3)])
    assert sqnr(q(rows(4)), fast(rows(4))) >= SAME_DB


def test_errors_of_the_model_itself_stay_as_they_are():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rest = nn.Embedding(10, 32), mlp()

        def forward(self, ids):
            return self.rest(self.table(ids))

    fast = Compiled(Lookup().eval(), 3)
    fast(torch.tensor([1, 2]))
    with pytest.raises(IndexError, match="out of range"):
        fast(torch.tensor([1, 20]))


def test_what_a_graph_changes_in_place_changes_as_in_float():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.register_buffer("calls", torch.zeros(32))

        def forward(self, x, cache):
            self.calls.add_(1)
            cache[:, :2] = x[:, :2]
            return self.body(x) * self.calls + cache

    model = Counting().eval()
    other, fast = copy.deepcopy(model), Compiled(model, 2)
    for number in range(1, 4):
        mine, theirs = torch.zeros(3, 32), torch.zeros(3, 32)
        assert sqnr(other(rows(3), theirs), fast(rows(3), mine)) >= (ROUNDING_DB if number < 3 else 25)
        assert torch.equal(mine, theirs)
        assert torch.equal(model.calls, torch.full((32,), float(number)))


@pytest.mark.parametrize("calls_before", [1, 2], ids=["while observing", "at the switch"])
def test_a_weight_changed_before_the_switch_is_an_error(calls_before):
    model = mlp()
    fast = Compiled(model, 2)
    for _ in range(calls_before):
        fast(rows(3))
    model[2].weight.mul_(2)
    for _ in range(2):
        with pytest.raises(zq.WeightError, match=r"^2\.weight: the weight changed"):
            fast(rows(3))


def test_strict_raises_at_the_switch_and_ever_after():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.wide = mlp(), nn.Linear(32, 32).double()

        def forward(self, x):
            return self.wide(self.body(x).double())

    recipe = zq.load_recipe("hero-m3").with_rules(zq.QRule("wide"))
    fast = Compiled(Mixed().eval(), 1, recipe, strict=True)
    fast(rows(3))
    for _ in range(2):
        with pytest.raises(zq.StrictError, match=r"wide: 1 of the layers .* stayed in float"):
            fast(rows(3))


def test_release_waits_for_the_switch():
    model = mlp(256)
    fast = Compiled(model, 2)
    fast(rows(3, 256))
    with pytest.raises(zq.ZQError, match="Sequential: graphs of it still observe and run in float, for 1 more"):
        zq.release(model)
    fast(rows(3, 256))
    with pytest.raises(zq.ZQError, match="run the compiled model once"):
        zq.release(model)
    before = fast(rows(3, 256))
    assert zq.release(model) == sum(model[i].weight.numel() * 4 for i in (0, 2))
    assert torch.equal(fast(rows(3, 256)), before)
    assert torch.equal(fast(torch.cat([rows(3, 256)] * 2))[:3], before)  # a new graph, of weights that are gone
    assert fast.graphs == 2


def test_a_graph_that_is_gone_holds_up_no_release_and_has_no_report():
    model = mlp()
    waits = Compiled(model, 5)
    waits(rows(3))
    assert len(waits.reports) == 1
    torch.compiler.reset()
    assert waits.reports == []
    fast = Compiled(model, 1)
    fast(rows(3))
    fast(rows(3))
    assert zq.release(model) > 0


def test_other_recipes_and_numbers_observe_for_themselves():
    model = mlp()
    percentile = zq.load_recipe("hero-m3").replace(range_method="percentile")
    for number, recipe in ((1, "hero-m3"), (3, "hero-m3"), (1, percentile)):
        torch.compiler.reset()
        fast = Compiled(model, number, recipe)
        xs = [rows(3 + i) * (i + 1) for i in range(number)]
        for x in xs:
            assert sqnr(model(x), fast(x)) >= ROUNDING_DB
        q = zq.quantize(model, xs[0], recipe=recipe, calibration=xs)
        assert sqnr(q(rows(9)), fast(rows(9))) >= SAME_DB
    assert len(observations(model)) == 3
    torch.compiler.reset()
    again = Compiled(model, 3)  # what was observed stays, as long as the model does
    assert sqnr(model(rows(4)), again(rows(4))) < ROUNDING_DB


def test_observations_go_with_the_model_and_do_not_hold_it():
    model = mlp()
    fast = Compiled(model, 1)
    fast(rows(3))
    fast(rows(3))
    (observation,) = observations(model)
    kept = weakref.ref(observation), weakref.ref(model[0].weight)
    memory = storage_key(model[0].weight)
    del observation, model, fast
    gc.collect()
    assert [reference() for reference in kept] == [None, None] and memory.expired()


def test_a_graph_that_observes_does_not_hold_the_weights_of_a_model_that_is_gone():
    model, inputs = tiny_models.build("bert")
    fast = Compiled(model, 5)
    fast(**inputs)
    memory = storage_key(model.encoder.layer[0].intermediate.dense.weight)
    del model, fast
    gc.collect()
    gc.collect()  # Dynamo lets go of the graph once the model was collected
    assert memory.expired()


def test_threads_switch_once(monkeypatch):
    model = mlp()
    fast, lowered, lower, alone = Compiled(model, 2), [], backend._lower, threading.Lock()

    def lower_once(*given):
        lowered.append(given)
        run, providers = lower(*given)

        def one_at_a_time(*inputs):  # the oracle is one thread's
            with alone:
                return run(*inputs)

        return one_at_a_time, providers

    monkeypatch.setattr(backend, "_lower", lower_once)
    fast(rows(3))
    barrier, answers = threading.Barrier(4), []

    def call():
        barrier.wait()
        with torch.no_grad():
            answers.append(fast(rows(3)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    in_float = [sqnr(model(rows(3)), answer) >= ROUNDING_DB for answer in answers]
    assert sorted(in_float) == [False, False, False, True]  # the second call of two, and all others
    assert len(lowered) == 1


# --- what needs no observation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8", "hero-m1"])
def test_recipes_without_static_scales_quantize_at_once(recipe):
    model = mlp()
    fast = Compiled(model, 5, recipe)
    assert sqnr(model(rows(3)), fast(rows(3))) < ROUNDING_DB
    assert "nothing needed to be observed: no layer of this graph has a static scale" in fast.notes
    assert fast.reports[0].counts["int8"] and observations(model) == []


def test_a_graph_without_layers_runs_as_torch_compile_would_run_it():
    fast = Compiled(lambda x: torch.sin(x) * 2, 5)
    with torch.enable_grad():
        x = torch.randn(4, requires_grad=True)
        fast(x).sum().backward()
    assert torch.allclose(x.grad, 2 * torch.cos(x))
    assert any("nothing was quantized" in note for note in fast.notes)


# --- sizes ---------------------------------------------------------------------------------------------------------


def test_late_guards_hold_inputs_to_what_was_found_out():
    def guards(find_out):
        mode = symbolic_fake_mode()
        first, second = new_symbol(mode, 4), new_symbol(mode, 4)
        with mode:
            x, y = torch.empty(first, 8), torch.empty(second, 8)
            late = LateGuards([x, y])
            find_out(x, y)
        late.close()
        return lambda a, b: late.hold([torch.empty(a, 8)[:, 1:], torch.empty(b, 8)])

    nothing = guards(lambda x, y: x * 2)
    assert nothing(4, 4) and nothing(5, 6)
    equal = guards(lambda x, y: x + y)
    assert equal(4, 4) and equal(5, 5) and not equal(5, 4)
    fixed = guards(lambda x, y: bool(x.shape[0] == 4))
    assert fixed(4, 9) and not fixed(5, 9)
    assert not guards(lambda x, y: bool(x.shape[0] % 2 == 0))(5, 5)


def test_a_size_that_a_pass_takes_for_a_number_at_the_switch_is_no_silent_assumption(monkeypatch):
    finish = backend._finish

    def assuming(program, options):
        x = program.graph.find_nodes(op="placeholder")[-1].meta["val"]
        assert x.shape[0] == 4
        finish(program, options)

    monkeypatch.setattr(backend, "_finish", assuming)
    fast = Compiled(mlp(), 1, dynamic=True)
    fast(rows(4))
    fast(rows(4))
    with pytest.raises(zq.CaptureError, match="sizes of the inputs differ"):
        fast(rows(5))
    assert fast(rows(4)).shape == (4, 32)
