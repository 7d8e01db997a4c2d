"""The guard against fusions that get lost silently: exact op counts for whole models of three families."""

import pytest

from tests.programs import dialect
from tests.tiny_models import build
from zq_compiler import quantize

LAYERS = 2
# A layer's own ops, and what the rest of the model has once.
BERT = (
    # attention output and MLP input: post-norm; the second norm's quantize feeds the next layer's q, k, v
    {"int8_linear": 6, "add_layer_norm_quantize": 2, "gelu_quantize": 1, "quantize_per_token": 1},
    # the embeddings' norm feeds the first layer; the last norm feeds the pooler through a slice of its first token
    {"int8_linear": 1, "layer_norm_quantize": 1, "add_layer_norm_quantize": -1, "quantize_per_token": 1},
)
GPT2 = (
    # fused q/k/v, projection, MLP up and down; ln_1 and ln_2 are pre-norm
    {"int8_linear": 4, "add_layer_norm_quantize": 2, "gelu_quantize": 1, "quantize_per_token": 1},
    # the first norm's sum broadcasts the positions over the batch; the last norm feeds the float LM head
    {"layer_norm_quantize": 1, "add_layer_norm_quantize": -1},
)
HERO_GPT2 = (
    {
        "int8_linear": 2,  # fused q/k/v, because their integers have three scales, and MLP up
        "quantize_static": 3,  # q, k, v
        "int8_attention": 1,
        "int8_linear_quantize": 2,  # projection and MLP down, whose integers the norms add
        "int8_add_layer_norm_quantize": 2,
        "gelu_quantize_static": 1,
    },
    # the last norm feeds the float LM head: its sum reads integers through a dequantize
    {"int8_embedding": 2, "layer_norm_quantize": 1, "int8_add_layer_norm_quantize": -1, "dequantize": 1},
)
HERO_LLAMA = (
    {
        "int8_linear": 5,  # q, k (rotary comes between), v (the cache takes its floats), gate, up
        "quantize_static": 3,
        "int8_attention": 1,
        "int8_linear_quantize": 2,
        "int8_add_rms_norm_quantize": 2,
        "silu_mul_quantize_static": 1,
    },
    {"int8_embedding": 1, "rms_norm_quantize": 1, "int8_add_rms_norm_quantize": -1, "dequantize": 1},
)
LLAMA = (
    # q, k, v, o, gate, up, down
    {"int8_linear": 7, "add_rms_norm_quantize": 2, "silu_mul_quantize": 1, "quantize_per_token": 1},
    # the first norm has no residual before it
    {"rms_norm_quantize": 1, "add_rms_norm_quantize": -1},
)


def total(counts):
    per_layer, once = counts
    want = {name: LAYERS * per_layer.get(name, 0) + once.get(name, 0) for name in per_layer.keys() | once.keys()}
    return {name: count for name, count in want.items() if count}


@pytest.mark.parametrize(("family", "counts"), [("bert", BERT), ("gpt2", GPT2), ("llama", LLAMA)])
def test_ops_of_a_whole_model(family, counts):
    model, inputs = build(family)
    q = quantize(model, inputs)
    assert dialect(q.program) == total(counts)
    left = {row.kind for row in q.report().layers if row.got == "float"}
    assert left <= {"embedding", "lm_head"}


@pytest.mark.parametrize(("family", "counts"), [("gpt2", HERO_GPT2), ("llama", HERO_LLAMA)])  # BERT: test_hero.py
def test_ops_of_a_whole_model_in_hero_m3(family, counts):
    model, inputs = build(family)
    assert dialect(quantize(model, inputs, recipe="hero-m3", calibration=[inputs]).program) == total(counts)
