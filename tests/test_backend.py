"""The torch.compile door: binding, dynamic shapes, staleness, errors. Models are tiny; compilation is real."""

import functools
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import zq_compiler
from zq_compiler import CaptureError, RecipeError, StrictError, WeightError, backend
from zq_compiler.capture import dotted_name
from zq_compiler.numerics import sqnr

EAGER = {"lowering": "eager"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model, **options):
    keywords = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(model, backend="zeroquant", options={**EAGER, **options}, **keywords)


def cause(error: pytest.ExceptionInfo) -> BaseException:
    """The backend's own exception, under Dynamo's wrapping."""
    return getattr(error.value, "inner_exception", error.value)


def mlp(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)).eval()


def test_is_found_by_entry_point():
    assert "zeroquant" in torch._dynamo.list_backends()


def test_inductor_runs_integer_kernels_and_agrees_with_the_oracle():
    model, x = mlp(), torch.randn(5, 32)
    with torch.no_grad():
        oracle = compiled(model)(x)
        torch.compiler.reset()
        fast = torch.compile(model, backend="zeroquant")(x)
    assert sqnr(oracle, fast) > 100
    assert sqnr(model(x), fast) > 30
    report = zq_compiler.compile_reports()[-1]
    assert report.counts == {"int8": 2}
    assert {choice["op"] for choice in report.providers} == {"int8_linear", "gelu_quantize", "quantize_per_token"}


def test_dynamic_shapes_compile_once():
    model = compiled(mlp(), dynamic=True)
    before = len(zq_compiler.compile_reports())
    with torch.no_grad():
        for rows in (3, 7, 64):
            assert model(torch.randn(rows, 32)).shape == (rows, 32)
    assert len(zq_compiler.compile_reports()) == before + 1


def test_automatic_dynamic_compiles_at_most_twice():
    model = compiled(mlp())
    before = len(zq_compiler.compile_reports())
    with torch.no_grad():
        for rows in (3, 7, 64, 5):
            model(torch.randn(rows, 32))
    assert len(zq_compiler.compile_reports()) == before + 2


@dataclass
class Output:
    hidden: torch.Tensor
    pooled: torch.Tensor | None = None


class KeywordModel(nn.Module):
    """Keyword arguments, an optional mask, a buffer, a float attribute, a dataclass out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32, eps=0.1)
        self.register_buffer("offset", torch.zeros(32))

    def forward(self, x, *, mask=None):
        y = self.norm(self.layer(x) + self.offset)
        return Output(hidden=y if mask is None else y * mask)


def test_kwargs_none_mask_buffers_and_dataclass_outputs():
    model = KeywordModel().eval()
    fast = compiled(model, fullgraph=True, dynamic=True)
    x = torch.randn(4, 32)
    with torch.no_grad():
        assert sqnr(model(x).hidden, fast(x).hidden) > 30
        masked = fast(x, mask=torch.zeros(4, 1))
        assert isinstance(masked, Output)
        assert masked.hidden.abs().sum() == 0
        model.offset.add_(5.0)  # buffers are inputs: never stale
        assert sqnr(model(x).hidden, fast(x).hidden) > 30


def test_graph_breaks_give_one_report_a_graph():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(), mlp()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model, x = Broken().eval(), torch.randn(4, 32)
    before = len(zq_compiler.compile_reports())
    with torch.no_grad():
        assert sqnr(model(x), compiled(model)(x)) > 30
    new = zq_compiler.compile_reports()[before:]
    assert [r.counts for r in new] == [{"int8": 2}, {"int8": 2}]
    assert new[0].layers[0].name == "a.0"


def test_weight_changed_in_place_is_an_error_not_a_stale_answer():
    model, x = mlp(), torch.randn(2, 32)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model[2].weight.mul_(2)
        with pytest.raises(WeightError, match=r"2\.weight: the weight changed"):
            fast(x)


def test_weight_replaced_is_an_error_or_compiled_anew():
    model, x = mlp(), torch.randn(2, 32)
    fast = compiled(model)
    with torch.no_grad():
        fast(x)
        model[0].weight.data = torch.randn(64, 32)
        with pytest.raises(WeightError, match=r"0\.weight"):
            fast(x)


def test_tied_and_shared_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 32)
            self.block = nn.Linear(32, 32)
            self.head = nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.block(self.block(self.table(ids))))

    model, ids = Tied().eval(), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        assert sqnr(model(ids), compiled(model)(ids)) > 30
    report = zq_compiler.compile_reports()[-1]
    assert report.layer("block").calls == 2
    assert {r.name: r.kind for r in report.layers} == {"table": "embedding", "block": "linear", "head": "lm_head"}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_contexts(context):
    model, x = mlp(), torch.randn(2, 32)
    with context():
        assert sqnr(model(x), compiled(model)(x)) > 30


def test_plain_call_carries_no_grad_and_warns_once(monkeypatch):
    monkeypatch.setattr(backend, "_warned_of_grad", False)
    fast = compiled(mlp())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = fast(torch.randn(2, 32))
        fast(torch.randn(9, 32))
    assert not y.requires_grad
    assert sum("compiles for inference" in str(w.message) for w in caught) == 1


def test_input_that_needs_grad_is_refused():
    with pytest.raises(Exception, match="requires grad") as error:
        compiled(mlp())(torch.randn(2, 32, requires_grad=True))
    assert isinstance(cause(error), CaptureError)


def test_active_dropout_is_refused():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5)).train()
    with torch.no_grad(), pytest.raises(Exception, match=r"dropout of 0\.5 is active") as error:
        compiled(model)(torch.randn(2, 32))
    assert isinstance(cause(error), CaptureError)


@pytest.mark.parametrize(
    ("options", "names"), [({"recip": "w8a8"}, "recipe, strict, check, dump"), ({"recipe": "w9a9"}, "w8a8")]
)
def test_bad_options_name_the_valid_ones(options, names):
    with pytest.raises(Exception, match=names) as error:
        torch.compile(mlp(), backend="zeroquant", options=options)(torch.randn(2, 32))
    assert isinstance(cause(error), RecipeError)


def test_strict_raises_where_something_stays_in_float():
    class RunTimeWeight(nn.Module):
        def forward(self, x, w):
            return nn.functional.linear(x, w)

    with torch.no_grad():
        compiled(mlp(), strict=True)(torch.randn(2, 32))
        model = nn.Sequential(nn.Linear(32, 32).double())
        with pytest.raises(Exception, match="stayed in float") as error:
            compiled(model, strict=True)(torch.randn(2, 32, dtype=torch.float64))
    assert isinstance(cause(error), StrictError)


def test_nothing_to_quantize_compiles_as_torch_compile_would():
    def f(x):
        return torch.sin(x) * 2

    x = torch.randn(4, requires_grad=True)
    y = torch.compile(f, backend="zeroquant")(x)
    y.sum().backward()
    assert torch.allclose(x.grad, 2 * torch.cos(x))
    assert "nothing was quantized" in zq_compiler.compile_reports()[-1].notes[-1]


def test_nan_weight_is_named():
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 3] = float("nan")
        with pytest.raises(Exception, match=r"0\.weight: the weight holds NaN") as error:
            compiled(model)(torch.randn(2, 32))
    assert isinstance(cause(error), WeightError)


def test_release_frees_quantized_weights_and_new_shapes_still_compile():
    model, x = mlp(256), torch.randn(3, 256)
    fast = compiled(model)
    with torch.no_grad():
        before = fast(x)
        freed = zq_compiler.release(model)
        assert freed == sum(model[i].weight.numel() * 4 for i in (0, 2))
        assert torch.equal(fast(x), before)
        assert torch.equal(fast(torch.cat([x, x]))[:3], before)
        assert zq_compiler.release(model) == 0


def test_release_before_compiling_is_an_error():
    with pytest.raises(zq_compiler.ZQError, match="run the compiled model once"):
        zq_compiler.release(mlp())


def test_graphs_of_one_model_share_their_integers():
    model = mlp()
    fast = compiled(model, dynamic=False)
    with torch.no_grad():
        fast(torch.randn(2, 32))
        entries = backend._entries(model[0].weight)
        first = next(iter(entries.values()))[0]
        fast(torch.randn(3, 32))
        assert next(iter(backend._entries(model[0].weight).values()))[0] is first


def test_dotted_names():
    assert dotted_name("L['fn'].__closure__[0].cell_contents._modules['a']._parameters['weight']") == "a.weight"
    assert dotted_name("G['model']._modules['h']._modules['3']._buffers['mask']") == "h.3.mask"


def test_a_mode_is_inductors_and_constants_stay_where_they_are(monkeypatch):
    """What a CUDA graph needs, as far as a machine without CUDA shows it."""
    from torch._inductor import compile_fx, config

    seen = []

    def inner(gm, inputs, **options):
        seen.append((config.triton.cudagraphs, len(options["static_input_idxs"]), len(inputs)))
        return compile_fx.compile_fx_inner(gm, inputs, **options)

    monkeypatch.setattr(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=inner))
    model, x = mlp(), torch.randn(5, 32)
    # Not by monkeypatch: what takes an alias of torch's config back hides the name from then on.
    with config.patch(force_disable_caches=True), torch.no_grad():
        expected = torch.compile(model, backend="zeroquant")(x)
        torch.compiler.reset()
        by_mode = torch.compile(model, backend="zeroquant", mode="reduce-overhead")(x)
        torch.compiler.reset()
        by_option = torch.compile(model, backend="zeroquant", options={"mode": "reduce-overhead"})(x)
    assert torch.equal(by_mode, expected) and torch.equal(by_option, expected)
    constants = seen[0][1]
    assert constants > 0
    assert seen == [(graphs, constants, constants + 1) for graphs in (False, True, True)]
    with pytest.raises(Exception) as error:
        torch.compile(model, backend="zeroquant", options={"mode": "fast"})(torch.randn(4, 4, 32))
    assert isinstance(cause(error), RecipeError) and "max-autotune" in str(cause(error))
