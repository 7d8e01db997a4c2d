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
LLAMA = (
    # q, k, v, o, gate, up, down
    {"int8_linear": 7, "add_rms_norm_quantize": 2, "silu_mul_quantize": 1, "quantize_per_token": 1},
    # the first norm has no residual before it
    {"rms_norm_quantize": 1, "add_rms_norm_quantize": -1},
)


@pytest.mark.parametrize(("family", "counts"), [("bert", BERT), ("gpt2", GPT2), ("llama", LLAMA)])
def test_ops_of_a_whole_model(family, counts):
    per_layer, once = counts
    names = per_layer.keys() | once.keys()
    want = {name: LAYERS * per_layer.get(name, 0) + once.get(name, 0) for name in names}
    model, inputs = build(family)
    q = quantize(model, inputs)
    assert dialect(q.program) == {name: count for name, count in want.items() if count}
    left = {row.kind for row in q.report().layers if row.got == "float"}
    assert left <= {"embedding", "lm_head"}
