"""The quantized cache: its numbers by formula, its bookkeeping by `generate`."""

import inspect
import sys

import pytest
import torch
import transformers

import zq_compiler as zq
from benchmarks import zoo_models
from tests import tiny_models
from zq_compiler import RecipeError
from zq_compiler.kernels.cached_attention import (
    cached_attention,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from zq_compiler.numerics import sqnr


@pytest.fixture(autouse=True)
def _seed():
    """Of the models' weights: INT8 may turn a near tie between two tokens."""
    torch.manual_seed(0)


X = torch.randn(2, 3, 64, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_have_a_scale_for_each_channel_and_values_one_for_each_token(bits):
    steps = 2**bits - 1
    packed = quantize_keys(X, bits, 32)
    assert packed[0].shape == (2, 3, 64, 16 * bits // 8) and packed[1].shape == packed[2].shape == (2, 3, 2, 16)
    error = (dequantize_keys(packed, bits, 32, 16, torch.float32) - X).abs()
    groups = X.unflatten(2, (2, 32))
    span = (groups.amax(3) - groups.amin(3)).repeat_interleave(32, 2)
    assert (error <= span / steps * 0.51 + span * 1e-3).all()
    packed = quantize_values(X, bits, 8)
    assert packed[0].shape == (2, 3, 64, 16 * bits // 8) and packed[1].shape == packed[2].shape == (2, 3, 64, 2)
    error = (dequantize_values(packed, bits, 8, 16, torch.float32) - X).abs()
    groups = X.unflatten(3, (2, 8))
    span = (groups.amax(4) - groups.amin(4)).repeat_interleave(8, 3)
    assert (error <= span / steps * 0.51 + span * 1e-3).all()


def test_a_channel_without_a_span_is_kept():
    x = torch.full((1, 1, 32, 8), 3.0)
    assert torch.equal(dequantize_keys(quantize_keys(x, 4, 32), 4, 32, 8, torch.float32), x)
    zeros = torch.zeros(1, 1, 32, 8)
    assert torch.equal(dequantize_values(quantize_values(zeros, 2, 8), 2, 8, 8, torch.float32), zeros)


def fill(cache, tokens, chunk, heads=2, width=32):
    x = torch.randn(1, heads, tokens, width, generator=torch.Generator().manual_seed(1))
    for part in x.split(chunk, 2):
        keys, values = cache.update(part, -part, 0)
    return x, keys, values


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_newest_stay_and_older_ones_are_quantized_once(chunk):
    cache = zq.kv_cache("int2", group=16, residual=20)
    x, keys, values = fill(cache, 100, chunk)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 100 and layer.packed_keys[0].shape[2] % 16 == 0
    assert 20 <= layer.new_keys.shape[2] < 36
    assert layer.keys.shape == layer.values.shape == x.shape  # read past the cache, all of them
    assert torch.equal(keys[:, :, -20:], x[:, :, -20:]) and torch.equal(values[:, :, -20:], -x[:, :, -20:])
    assert keys.shape == x.shape
    if chunk < 100:  # a prefill attends to itself in floats, what comes later to codes
        assert not torch.equal(keys[:, :, :16], x[:, :, :16])
        once = dequantize_keys(quantize_keys(x[:, :, :16], 2, 16), 2, 16, 32, torch.float32)
        assert torch.equal(keys[:, :, :16], once)
    else:
        assert torch.equal(keys, x)


def test_bytes_are_those_of_codes_and_scales():
    cache = zq.kv_cache("int4", group=32, residual=32)
    fill(cache, 1024, 128)
    packed = 1024 - 32
    codes, scales = packed * 2 * 32 // 2 * 2, (packed // 32 * 32 + packed * 1) * 2 * 2 * 2
    assert cache.nbytes == codes + scales + 32 * 2 * 32 * 4 * 2
    assert cache.float_nbytes == 1024 * 2 * 32 * 4 * 2
    assert cache.nbytes < 0.22 * cache.float_nbytes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_uses_it(name):
    """INT8 gives the float cache's tokens; heads that share keys store them once."""
    model = getattr(tiny_models, name)().eval()
    prompt = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(2))
    width = model.config.hidden_size // model.config.num_attention_heads
    cache = zq.kv_cache("int8", group=min(8, width), residual=16)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    want = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), want)
    heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    assert cache.layers[0].packed_keys[0].shape[1] == heads and cache.get_seq_length() == want.shape[1] - 1
    assert cache.nbytes < cache.float_nbytes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packed", [0, 32])
@pytest.mark.parametrize("masked", ["causal", "bool", "float", "none"])
def test_the_op_attends_to_what_the_codes_stand_for(bits, packed, masked):
    """Beside torch's attention of repeated heads."""
    g = torch.Generator().manual_seed(3)
    query, keys, values = (torch.randn(2, h, t, w, generator=g) for h, t, w in ((6, 3, 16), (3, 45, 16), (3, 45, 32)))
    old = quantize_keys(keys[:, :, :packed], bits, 16), quantize_values(values[:, :, :packed], bits, 16)
    new = keys[:, :, packed:], values[:, :, packed:]
    seen = torch.rand(2, 1, 3, 45, generator=g) < 0.7
    seen[1, :, 2] = False
    mask = {"bool": seen, "float": torch.zeros(2, 1, 3, 45).masked_fill(~seen, -torch.inf)}.get(masked)
    got = cached_attention(query, *old[0], *old[1], *new, mask, masked == "causal", 0.3, bits, 16)
    stands_for = [
        torch.cat([dequantize_keys(old[0], bits, 16, 16, torch.float32), new[0]], 2),
        torch.cat([dequantize_values(old[1], bits, 16, 32, torch.float32), new[1]], 2),
    ]
    repeated = [x.repeat_interleave(2, 1) for x in stands_for]
    if masked == "causal":
        mask = torch.ones(3, 45, dtype=torch.bool).tril(42)
    want = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_reads_the_codes_where_the_model_is_given(name, rows):
    """The same tokens; rows padded on the left too."""
    model = getattr(tiny_models, name)().eval()
    prompt = torch.randint(1, 90, (rows, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompt)
    mask[1:, :7] = 0
    width = model.config.hidden_size // model.config.num_attention_heads
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    arguments = {"group": min(8, width), "residual": 16}
    want = model.generate(prompt, past_key_values=zq.kv_cache("int4", **arguments), **options)
    cache, calls = zq.kv_cache("int4", model=model, **arguments), []
    assert model.config._attn_implementation == "zeroquant"
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["zq_compiler.kv_cache"]  # the package's attribute is the function
        patch.setattr(module, "cached_attention", lambda *a: calls.append(a) or cached_attention(*a))
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), want)
    assert len(calls) == 23 * model.config.num_hidden_layers  # the prompt is read in floats
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, **options))  # without it: torch's


def test_other_readers_of_codes_get_an_error_not_numbers():
    model = tiny_models.llama().eval()
    cache = zq.kv_cache("int4", group=8, residual=16, model=model)
    _, keys, values = fill(cache, 40, 39, width=8)  # the last is one token
    assert keys.shape == values.shape == (1, 2, 40, 8) and keys.dtype is torch.float32
    assert keys.to(torch.float32) is keys, "what changes nothing is allowed"
    for compute in (lambda: keys + 1, lambda: torch.cat([values, values], 1), lambda: values.repeat(1, 2, 1, 1)):
        with pytest.raises(RecipeError, match=r"changes keys or values between.*leave model out"):
            compute()
    query = torch.randn(1, 4, 1, 8)
    attend = transformers.AttentionInterface()["zeroquant"]
    for others in ((keys, torch.zeros(1, 2, 40, 8)), (torch.zeros(1, 2, 40, 8), values)):
        with pytest.raises(RecipeError, match="LlamaForCausalLM attends to other keys or values than its cache gave"):
            attend(model, query, *others, None)


@pytest.mark.parametrize("family", ["diffllama", "deepseek_v3"])
def test_models_that_change_what_the_cache_gives_are_refused(family):
    """DiffLlama regroups values, DeepSeek expands keys: neither can be read from codes, and NaN would be no answer."""
    model = transformers.AutoModelForCausalLM.from_config(zoo_models.tiny_config(family)).eval()
    ids = torch.randint(3, 90, (2, 40))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with torch.no_grad():
        model.generate(ids, **settings, past_key_values=zq.kv_cache("int8", group=4, residual=4))
        with pytest.raises(RecipeError, match="leave model out"):
            given = zq.kv_cache("int8", group=4, residual=4, model=model)
            model.generate(ids, **settings, past_key_values=given)


def test_mixtures_of_experts_read_codes_too():
    model, _ = tiny_models.build("mixtral")
    ids = torch.randint(3, 90, (2, 40))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain, own = (
            model.generate(ids, **settings, past_key_values=zq.kv_cache("int8", group=8, residual=8, **given))
            for given in ({}, {"model": model})
        )
    assert sqnr(torch.stack(plain.logits), torch.stack(own.logits)) > 80


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize(("bits", "floor"), [(8, 40), (4, 15)])
def test_small_values_keep_their_digits(bits, floor, size):
    """Whose scales are below float16's normal numbers."""
    x = X[..., :8] / X[..., :8].abs().amax((0, 1, 2)) * size
    keys = dequantize_keys(quantize_keys(x, bits, 32), bits, 32, 8, torch.float32)
    values = dequantize_values(quantize_values(x, bits, 8), bits, 8, 8, torch.float32)
    assert min(sqnr(x, keys), sqnr(x, values)) > (floor if size > 1e-5 else 15)


@pytest.mark.parametrize("value", [1e6, torch.nan])
def test_what_float16_cannot_hold_is_an_error(value):
    cache = zq.kv_cache("int8", group=8, residual=8)
    x = torch.ones(1, 2, 32, 8)
    x[0, 1, 3] = value
    with pytest.raises(RecipeError, match=r"keys or values are NaN, or beyond what float16 holds"):
        cache.update(torch.ones_like(x), -x, 0)


def test_models_that_would_not_follow_are_refused_and_left_alone():
    with pytest.raises(RecipeError, match=r"Linear is no model of transformers.*leave model out"):
        zq.kv_cache("int4", model=torch.nn.Linear(2, 2))
    model = tiny_models.llama().eval()
    model.set_attn_implementation("eager")
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM is eager, and must be sdpa.*set_attn_implementation"):
        zq.kv_cache("int4", model=model)
    assert model.config._attn_implementation == "eager"
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    ).eval()
    with pytest.raises(RecipeError, match=r"attentions of FalconForCausalLM cannot be exchanged"):
        zq.kv_cache("int4", model=model)
    assert model.config._attn_implementation == "sdpa"


def test_what_an_attention_asks_for_beyond_the_op_is_an_error():
    model = tiny_models.llama().eval()
    cache = zq.kv_cache("int4", group=8, residual=16, model=model)
    _, keys, values = fill(cache, 40, 39, width=8)
    query = torch.randn(1, 4, 1, 8)
    attend = transformers.AttentionInterface()["zeroquant"]
    out, _ = attend(model, query, keys, values, None, scaling=0.5, dropout=0.0)
    assert out.shape == (1, 1, 4, 8) and out.isfinite().all()
    with pytest.raises(RecipeError, match="no attention over codes knows s_aux"):
        attend(model, query, keys, values, None, s_aux=torch.zeros(4))


def test_keys_read_past_the_cache_are_all_of_them():
    """As encoder-decoders read what they cross-attend to, from the second token on."""
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    ids, start = torch.randint(3, 99, (1, 60)), torch.tensor([[2]])
    with torch.no_grad():
        encoded = model.get_encoder()(ids)
        caches = [
            transformers.EncoderDecoderCache(make(), make())
            for make in (transformers.DynamicCache, lambda: zq.kv_cache("int8", group=8, residual=8))
        ]
        for _ in range(2):
            want, got = (
                model(encoder_outputs=encoded, decoder_input_ids=start, past_key_values=cache).logits
                for cache in caches
            )
    assert sqnr(want, got) > 35


@pytest.mark.parametrize("family", ["t5", "whisper"])
@pytest.mark.parametrize("reads_codes", [False, True])
def test_encoder_decoders_have_a_cache_for_each_attention(family, reads_codes):
    """One for both would mix a decoder's tokens with an encoder's outputs, and give other tokens without a word."""
    model, inputs = tiny_models.build(family)
    model.generation_config.update(forced_decoder_ids=None, suppress_tokens=None, begin_suppress_tokens=None)
    own = inspect.signature(model.get_encoder().forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in own}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    given = {"group": 8, "residual": 64, **({"model": model} if reads_codes else {})}
    with torch.no_grad():
        want = model.generate(**inputs, **settings)
        pair = transformers.EncoderDecoderCache(zq.kv_cache("int4", **given), transformers.DynamicCache())
        assert torch.equal(model.generate(**inputs, **settings, past_key_values=pair), want)
        refused = pytest.raises(RecipeError, match=r"two attentions of layer 1 .*EncoderDecoderCache\(kv_cache")
        with refused if family != "t5" else pytest.raises(RuntimeError):  # whose mask does not fit even before that
            model.generate(**inputs, **settings, past_key_values=zq.kv_cache("int4", **given))


def test_autocast_leaves_it_alone():
    model = tiny_models.llama().eval()
    prompt = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        cache = zq.kv_cache("int8", group=8, residual=16)
        model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert cache.get_seq_length() == 47


def test_beams_are_reordered():
    model = tiny_models.llama().eval()
    prompt = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(2))
    width = model.config.hidden_size // model.config.num_attention_heads
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cache = zq.kv_cache("int8", group=min(8, width), residual=16)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), model.generate(prompt, **options))


def test_bad_arguments_are_named():
    for arguments, message in (
        ({"format": "int3"}, "no KV cache in 'int3'"),
        ({"group": 0}, "group=0"),
        ({"residual": 1.5}, r"residual=1\.5"),
    ):
        with pytest.raises(RecipeError, match=message):
            zq.kv_cache(**arguments)
    with pytest.raises(RecipeError, match=r"heads of 20 channels do not divide by group=16.*group=10"):
        fill(zq.kv_cache("int4", group=16), 4, 4, width=20)


def test_on_cuda_attention_over_the_cache_is_the_kernels() -> None:
    from zq_compiler.kernels.cached_attention import cached_attention

    module = sys.modules["zq_compiler.kv_cache"]  # the package has the function of that name
    assert module._op(torch.device("cpu")) is cached_attention
    assert module._op(torch.device("cuda")).namespace == "zq_cuda"
