"""Attention between quantizes becomes one op: integers in, integers or floats out, and the scales that it is given."""

import pytest
import torch

from tests.programs import after, attend, captured, changes, decoder, dialect, encoder, randn, reasons, run
from zq_compiler import QRule, load_recipe
from zq_compiler.kernels import int8_attention
from zq_compiler.passes.fuse_attention import FuseAttention
from zq_compiler.recipe import Role
from zq_compiler.schemes import INT8_TENSOR

aten = torch.ops.aten
X = randn(2, 4, 32)
M3 = load_recipe("hero-m3")
ALONE = M3.replace(rules=(QRule(".*", None, INT8_TENSOR, roles=(Role.ATTENTION,)),))
READERS = "its float output has other readers, so fusing would compute it twice"


def projected(self, x, *mask, **options):
    mask = {"attn_mask": mask[0]} if mask else {}
    return self.out(attend(self.a(x), self.b(x), self.c(x), **mask, **options))


def fused(forward, *inputs, recipe=M3):
    """The Program after the pass; outputs stay close, which the contract's check holds."""
    program = after(captured(forward, *(inputs or (X,)), recipe=recipe), "fuse_attention", check=True)
    assert FuseAttention()(program) == 0
    return program


def attention(program):
    (node,) = program.graph.find_nodes(op="call_function", target=int8_attention)
    return node


def constant(program, node):
    return program.gm.get_buffer(node.target)


def steps(program):
    """Scales of query, key, value and probabilities, from the statistics."""
    stats = {name.rsplit(":", 1)[1]: value for name, value in program.stats.items() if not name.startswith("out")}
    found = [stats[part].max_abs / 127 for part in ("query", "key", "value")]
    return [*found, stats["probabilities"].maximum / 255 if "probabilities" in stats else None]


def of_heads(features):
    """`[H * D]`, laid out for `[B, H, T, D]`."""
    return features.reshape(1, -1, 1, 8)


@pytest.mark.parametrize("softmax", ["token", "static"])
@pytest.mark.parametrize("writes", ["integers", "floats"])
def test_scales(writes, softmax):
    recipe = (M3 if writes == "integers" else ALONE).replace(softmax=softmax)
    program = fused(projected, recipe=recipe)
    *operands, score, mask, causal, probability, out, dtype = attention(program).args
    assert [n.meta["val"].dtype for n in operands] == [torch.int8] * 3
    assert (mask, causal) == (None, False)
    q, k, v, p = steps(program)
    torch.testing.assert_close(constant(program, score), (q * k / 8**0.5).reshape(1, 1, 1, 1))
    assert (probability is None) == (softmax == "token")
    want = v.reshape(1, 1, 1, 1)
    if softmax == "static":
        torch.testing.assert_close(constant(program, probability), p.reshape(1, 1, 1, 1))
        want = want * p
    if writes == "integers":
        want = want / of_heads(program.stats["out:input"].scale(granularity="per_feature"))
    assert dtype is (torch.int8 if writes == "integers" else torch.float32)
    torch.testing.assert_close(constant(program, out), want)
    assert "quantized_softmax_attention" not in dialect(program) and changes(program, "fuse_attention") == 1


def test_integers_are_a_step_at_most_from_the_explicit_ones():
    program = after(captured(projected, X, recipe=M3), "fuse_linear")
    marked = next(n for n in program.graph.nodes if str(n.target) == "zq.quantize_static.default" and _reads(n))
    explicit = _value(program, marked)
    after_pass = fused(projected)
    integers = _value(after_pass, attention(after_pass))
    assert integers.dtype is explicit.dtype is torch.int8
    assert (integers.int() - explicit.int()).abs().max() <= 1 and explicit.unique().numel() > 100


def _reads(node):
    return "quantized_softmax_attention" in str(node.args[0].target)


def _value(program, node):
    """What a node of the graph computes from X."""
    values = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Watching(program.gm).run(X)
    return values[node.name]


def test_what_stands_around_it():
    """Q, K and V come as integers of their GeMMs, and the projection reads integers."""
    assert dialect(fused(encoder)) == {
        "quantize_per_token": 2,
        "int8_linear_quantize": 5,
        "int8_attention": 1,
        "int8_linear": 1,
        "quantize_static": 1,  # GELU's
        "dequantize": 3,  # of two sublayers' results, and of a norm's
    }
    assert dialect(fused(projected, recipe=ALONE)) == {"quantize_static": 3, "int8_attention": 1}


def test_masks_are_passed_on():
    for mask in (randn(2, 1, 4, 4) > -1, randn(2, 1, 4, 4)):
        node = attention(fused(projected, X, mask))
        assert node.args[4].op == "placeholder" and node.args[5] is False


def test_causality_and_the_scale_of_scores():
    assert attention(fused(decoder)).args[4:6] == (None, True)
    program = fused(lambda self, x: projected(self, x, scale=0.3))
    q, k, *_ = steps(program)
    torch.testing.assert_close(constant(program, attention(program).args[3]), (q * k * 0.3).reshape(1, 1, 1, 1))


def test_one_key_head_for_several_queries():
    def forward(self, x):
        q, k = self.a(x).view(2, 4, 4, 8).transpose(1, 2), self.b(x)[..., :16].view(2, 4, 2, 8).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(2, 4, 32))

    query, key, *_ = attention(fused(forward)).args
    assert (query.meta["val"].shape[1], key.meta["val"].shape[1]) == (4, 2)


def test_floats_that_others_read_are_not_computed_twice():
    def forward(self, x):
        y = attend(self.a(x), self.b(x), self.c(x))
        return self.out(y), y.sin()

    program = fused(forward)
    assert attention(program).args[8] is torch.float32
    assert ("AttentionToInt8Quantize", READERS) in reasons(program)
    assert dialect(program)["quantize_static"] == 1  # what the projection reads


def test_the_layers_name_stays_for_the_report():
    program = fused(encoder)
    (name,) = (name for name, plan in program.plan.items() if plan.kind == "attention")
    assert attention(program).meta["layer"] == name
    assert [n.target for n in (attention(program).args[i] for i in (3, 7))] == [
        f"{name}.score_scale",
        f"{name}.out_scale",
    ]


def test_float_attention_stays():
    program = after(captured(encoder, X, recipe="hero-m1"), "fuse_attention", check=True)
    assert changes(program, "fuse_attention") == 0
    assert run(program, X)[0].isfinite().all()
    assert program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
