"""`observe=N` where a model is many graphs: behind graph breaks, an attention alone, prefill and decode."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

import zq_compiler as zq
from tests.test_hero import LAYERS, SAME_DB
from tests.test_observe import CALLS, LATER, Compiled, fresh_dynamo, observations  # noqa: F401  a fixture is used by name
from tests.tolerances import ROUNDING_DB
from zq_compiler.numerics import sqnr


class Embeddings(nn.Module):
    def __init__(self, bert):
        super().__init__()
        self.embeddings = bert.embeddings

    def forward(self, input_ids):
        return self.embeddings(input_ids)


class Encoder(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Broken(nn.Module):
    """BERT with a graph break between its parts."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("every_layer", [False, True], ids=["embeddings", "every layer"])
def test_graphs_behind_a_break_observe_what_reaches_them(every_layer):
    bert, _ = tiny_models.build("bert")
    layers = list(bert.encoder.layer)
    parts = [Encoder(layer) for layer in layers] if every_layer else [Encoder(*layers)]
    fast = Compiled(Broken(Embeddings(bert), *parts).eval(), len(CALLS))
    # The oracle: each part by itself, calibrated with what it is given while all of them observe.
    embeddings = zq.quantize(
        Embeddings(bert).eval(),
        CALLS[0]["input_ids"],
        recipe="hero-m3",
        calibration=[CALLS[0]["input_ids"]],
    )
    hidden = [embeddings(call["input_ids"]) for call in CALLS]
    oracle = []
    for part in parts:
        oracle.append(zq.quantize(part.eval(), hidden[0], recipe="hero-m3", calibration=hidden))
        hidden = [part(x) for x in hidden]
    for call, expected in zip(CALLS, hidden, strict=True):
        assert sqnr(expected, fast(call["input_ids"])) >= ROUNDING_DB
    graphs = fast.graphs
    assert len(fast.reports) == graphs and "nothing needed to be observed" in fast.notes[0]
    found = [o for part in parts for o in observations(part)]
    assert len(found) == len(parts) and {o.statistics.batches for o in found} == {len(CALLS)}
    for observation, q in zip(found, oracle, strict=True):
        ranges = sorted(v.max_abs.max().item() for v in q.statistics.values())
        assert sorted(v.max_abs.max().item() for v in observation.statistics.values()) == pytest.approx(ranges)
    for call in LATER:
        expected = embeddings(call["input_ids"])
        for q in oracle:
            expected = q(expected)
        assert sqnr(expected, fast(call["input_ids"])) >= SAME_DB
    assert fast.graphs == graphs
    quantized = [report for report in fast.reports if "zq.int8_attention" in report.operators]
    assert sum(report.operators["zq.int8_attention"] for report in quantized) == LAYERS
    assert not any("observ" in note for report in quantized for note in report.notes)


def test_an_attention_without_weights_is_observed_too():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x)

    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    model = Model().eval()
    fast = Compiled(model, 1)
    assert sqnr(model(x), fast(x)) >= ROUNDING_DB
    assert 20 < sqnr(model(x), fast(x)) < ROUNDING_DB
    assert fast.reports[0].counts == {"int8": 1} and fast.graphs == 1
    torch.compiler.reset()
    with torch.enable_grad(), pytest.raises(Exception, match="requires grad"):
        Compiled(model, 1)(x.clone().requires_grad_())


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_prefill_and_decode_count_together(family):
    model, inputs = tiny_models.build(family)
    ids, same = inputs["input_ids"][:1], copy.deepcopy(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    float_logits = torch.stack(model.generate(ids, **settings).logits)
    fast = Compiled(model.forward, observe=5)
    model.forward = fast.run
    assert sqnr(float_logits, torch.stack(model.generate(ids, **settings).logits)) >= ROUNDING_DB
    (observation,) = observations(model)
    assert observation.remaining == 0 and len(observation._graphs) > 1
    graphs = fast.graphs
    got = model.generate(ids, **settings)
    same.forward = Compiled(same.forward, observe=None, calibration=observation.statistics).run
    expected = same.generate(ids, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert sqnr(torch.stack(expected.logits), torch.stack(got.logits)) >= SAME_DB
    assert sqnr(float_logits, torch.stack(got.logits)) < ROUNDING_DB
    assert fast.graphs == graphs
    longer = torch.cat([ids, ids], 1)[:, :-7]  # the first prefill was of one size, and Dynamo asks for another graph
    logits = (torch.stack(run.generate(longer, **settings).logits) for run in (same, model))
    assert sqnr(*logits) >= SAME_DB
    assert not any("observing" in note for note in fast.notes)
