"""Quantize joins norms, residual adds, GELU and SwiGLU, and its other readers are served."""

import pytest
import torch
from torch.nn import functional as F

from tests.programs import after, captured, dialect, ops, randn, reasons, run
from tests.tolerances import ROUNDING_DB
from zq_compiler import QRule, load_recipe
from zq_compiler.kernels import OPS
from zq_compiler.numerics import sqnr
from zq_compiler.passes.fuse_memory_bound import FuseMemoryBound
from zq_compiler.schemes import INT8_FEATURE, INT8_WEIGHT

X = randn(2, 3, 32)


def fused(forward, *inputs, recipe="w8a8"):
    """The Program after the pass; it computes what the graph before it computed."""
    inputs = inputs or (X,)
    program = after(captured(forward, *inputs, recipe=recipe), "fuse_linear")
    before = run(program, *inputs)
    FuseMemoryBound()(program)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.gm.recompile()
    for b, a in zip(before, run(program, *inputs), strict=True):
        assert sqnr(b, a) > ROUNDING_DB
    assert FuseMemoryBound()(program) == 0
    return program


def call(program, name):
    (node,) = program.graph.find_nodes(op="call_function", target=OPS[name].overload)
    return node


def test_layer_norm_keeps_its_parameters_and_eps():
    program = fused(lambda self, x: self.a(self.norm(x)))
    assert dialect(program) == {"layer_norm_quantize": 1, "int8_linear": 1}
    _, weight, bias, eps, rotated = call(program, "layer_norm_quantize").args
    assert (weight.target, bias.target, eps, rotated) == ("norm.weight", "norm.bias", 0.1, True)


def test_rms_norm_keeps_its_eps_and_its_default_is_the_dtypes():
    program = fused(lambda self, x: self.a(self.rms(x)))
    assert call(program, "rms_norm_quantize").args[1].target == "rms.weight"
    assert call(program, "rms_norm_quantize").args[2] == 1e-3
    program = fused(lambda self, x: self.a(F.rms_norm(x * 1e-4, (32,))))
    assert call(program, "rms_norm_quantize").args[1:3] == (None, torch.finfo(torch.float32).eps)


def pre_norm(self, x):
    h = x + self.c(x)
    return h + self.a(self.norm(h))


def post_norm(self, x):
    y = self.norm(x + self.c(x))
    return self.norm2(y + self.a(y))


def pre_rms(self, x):
    h = x + self.c(x)
    return h + self.a(self.rms(h))


@pytest.mark.parametrize(
    ("block", "op", "index"),
    [
        (pre_norm, "add_layer_norm_quantize", 3),
        (post_norm, "add_layer_norm_quantize", 2),
        (pre_rms, "add_rms_norm_quantize", 3),
    ],
)
def test_residual_blocks_read_the_sum_or_the_norm_from_the_fused_op(block, op, index):
    program = fused(block)
    assert dialect(program) == {"quantize_per_token": 1, op: 1, "int8_linear": 2}
    assert index in {user.args[1] for user in call(program, op).users}
    assert ops(program)["aten.add.Tensor"] == 1  # the second residual; the first is inside


def test_the_add_joins_only_for_equal_shapes_and_dtypes():
    broadcast = fused(lambda self, x: self.a(self.norm(x + self.scale)))
    assert dialect(broadcast) == {"layer_norm_quantize": 1, "int8_linear": 1}
    scaled = fused(lambda self, x: self.a(self.norm(torch.add(x, x * 2, alpha=3))))
    assert dialect(scaled) == {"layer_norm_quantize": 1, "int8_linear": 1}
    number = fused(lambda self, x: self.a(self.norm(x + 1)))
    assert dialect(number) == {"layer_norm_quantize": 1, "int8_linear": 1}
    mixed = fused(lambda self, x: self.a(self.norm(x + x.bfloat16())))
    assert dialect(mixed) == {"layer_norm_quantize": 1, "int8_linear": 1}


def test_readers_before_the_fused_op_keep_the_original():
    def forward(self, x):
        h = x + x.sin()
        early = h.cos()
        y = self.norm(h)
        return self.a(y), early, h.tan(), y.tan()

    program = fused(forward)
    assert dialect(program) == {"add_layer_norm_quantize": 1, "int8_linear": 1}
    assert {u.args[1] for u in call(program, "add_layer_norm_quantize").users} == {0, 1, 2, 3}


def test_two_norms_of_one_value_are_not_confused():
    def forward(self, x):
        first, second = self.norm(x), self.norm2(x)
        # the second is quantized first, because the first is read through a view that comes later
        a = self.a(second)
        return a, self.b(first.sin() + first), first.tan(), second.tan()

    def late(self, x):
        x = x * self.scale
        first, second = self.norm(x), self.norm2(x)
        a = self.a(second.view(-1, 32))
        return a, self.b(first.view(-1, 32)), first.tan(), second.tan()

    fused(forward)
    assert dialect(fused(late)) == {"layer_norm_quantize": 2, "int8_linear": 2}


def test_norms_over_several_dimensions_are_refused():
    def forward(self, x):
        return self.a(F.layer_norm(x, (3, 32)))

    program = after(captured(forward, X, recipe="w8a8"), "fuse_linear")
    assert FuseMemoryBound()(program) == 0
    assert ("FuseNorm", "it normalises over 2 dimensions") in reasons(program)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    program = fused(lambda self, x: self.a(F.gelu(x, approximate=approximate)))
    assert dialect(program) == {"gelu_quantize": 1, "int8_linear": 1}
    assert call(program, "gelu_quantize").args[1:] == (approximate, True)


def test_gelu_with_another_float_reader_is_refused():
    def forward(self, x):
        y = F.gelu(x)
        return self.a(y), y.sin()

    program = fused(forward)
    assert dialect(program) == {"quantize_per_token": 1, "int8_linear": 1}
    assert ("FuseGelu", "its float output has other readers, so fusing would compute it twice") in reasons(program)


def test_gelus_of_one_value_are_judged_apart():
    def forward(self, x):
        erf, tanh = F.gelu(x), F.gelu(x, approximate="tanh")
        return self.a(erf), self.b(tanh), tanh.sin()

    assert dialect(fused(forward)) == {"gelu_quantize": 1, "quantize_per_token": 1, "int8_linear": 2}


@pytest.mark.parametrize(
    "gated", [lambda g, u: F.silu(g) * u, lambda g, u: u * F.silu(g)], ids=["gate first", "gate second"]
)
def test_swiglu_in_both_orders(gated):
    program = fused(lambda self, x: self.c(gated(self.a(x), self.b(x))))
    assert dialect(program) == {"quantize_per_token": 1, "silu_mul_quantize": 1, "int8_linear": 3}
    gate, up, _ = call(program, "silu_mul_quantize").args
    assert [n.args[2].target for n in (gate, up)] == ["a.weight_q", "b.weight_q"]


@pytest.mark.parametrize(
    ("gated", "reason"),
    [
        (lambda self, g, u: F.silu(g) * self.scale, "gate and up differ in shape"),
        (lambda self, g, u: F.silu(g) * 2.0, "gate and up differ in shape"),
    ],
)
def test_other_products_of_silu_are_refused(gated, reason):
    program = fused(lambda self, x: self.c(gated(self, self.a(x), x)))
    assert "silu_mul_quantize" not in dialect(program)
    assert ("FuseSiluMul", reason) in reasons(program)


def test_a_product_with_another_float_reader_is_refused():
    def forward(self, x):
        y = F.silu(x) * x
        return self.a(y), y.sin()

    assert dialect(fused(forward)) == {"quantize_per_token": 1, "int8_linear": 1}


# --- integers in, static scales out --------------------------------------------------------------------------------

HERO = load_recipe("hero-m3")
STATIC = HERO.replace(rules=(*HERO.rules, QRule("c", INT8_WEIGHT, INT8_FEATURE, INT8_FEATURE)))


@pytest.mark.parametrize("norm", ["norm2", "rms"])
@pytest.mark.parametrize("x_integer", [True, False])
@pytest.mark.parametrize("residual_integer", [True, False])
def test_summands_of_a_norm_may_be_integers(residual_integer, x_integer, norm):
    def forward(self, x):
        y = self.norm(x * 2)
        return self.b(getattr(self, norm)(self.c(y.sin()) + y)), self.a(y)

    recipe = STATIC.replace(residual="int8" if residual_integer else "float")
    recipe = recipe if x_integer else recipe.replace(rules=HERO.rules)
    program = fused(forward, recipe=recipe)
    integers = f"int8_add_{'rms' if norm == 'rms' else 'layer'}_norm_quantize"
    if not (x_integer or residual_integer):
        assert integers not in dialect(program)
        return
    x, x_scale, residual, residual_scale, rotated, *_, dtype = call(program, integers).args
    assert (x_scale is not None, residual_scale is not None) == (x_integer, residual_integer)
    assert [n.meta["val"].dtype is torch.int8 for n in (x, residual)] == [x_integer, residual_integer]
    assert dtype is torch.float32
    if x_integer:
        assert x_scale.target == "c.output_scale"
    if residual_integer:
        assert rotated is residual.args[0].args[-1]  # as the norm before wrote them


class Embeddings(torch.nn.Module):
    def __init__(self, stream):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.places = torch.nn.Embedding(40, 32), torch.nn.Embedding(8, 32)
        self.norm, self.a = torch.nn.LayerNorm(32, eps=0.1), torch.nn.Linear(32, 32)
        self.stream = stream

    def forward(self, ids):
        h = self.table(ids) + self.places(ids % 8)
        y = self.a(self.norm(h))
        return y + h if self.stream else y


@pytest.mark.parametrize("stream", [False, True])
def test_embeddings_and_the_first_norm(stream):
    program = fused(Embeddings(stream).eval(), torch.tensor([[1, 2, 39]]), recipe=HERO)
    name = "embedding_layer_norm_quantize"
    assert (name in dialect(program)) != stream
    if stream:
        assert ("FuseEmbedding", "the sum is a residual stream: it has other readers") in reasons(program)
    else:
        assert {n.target for n in call(program, name).args[1:3]} in (
            {"table.weight_q", "table.weight_scale"},
            {"places.weight_q", "places.weight_scale"},
        )
        assert call(program, name).args[6:] == (0.1, True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_static_gelu(approximate):
    """In the epilogue of an INT8 linear; behind a float one, an op of its own."""

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=approximate))

    program = fused(forward, recipe=HERO)
    assert dialect(program) == {
        "quantize_per_token": 1,
        "int8_linear_gelu_quantize": 1,
        "int8_linear_quantize": 1,
        "dequantize": 1,
    }
    *_, dtype, how, scale = call(program, "int8_linear_gelu_quantize").args
    assert (dtype, how, scale.target) == (torch.float32, approximate, "down.input_scale")

    program = fused(forward, recipe=HERO.with_rules(QRule.leave_float("up")))
    _, how, scale = call(program, "gelu_quantize_static").args
    assert (how, scale.target) == (approximate, "down.input_scale")
    assert "quantize_static" not in dialect(program)


def test_gelu_stays_out_of_a_linear_that_others_read():
    def forward(self, x):
        y = self.up(x)
        return self.down(F.gelu(y)), y.sin()

    program = fused(forward, recipe=HERO)
    reason = "the linear's output has other readers, so fusing would compute it twice"
    assert ("FuseLinearGelu", reason) in reasons(program)
    assert dialect(program)["gelu_quantize_static"] == 1


@pytest.mark.parametrize("gated", [lambda g, u: F.silu(g) * u, lambda g, u: u * F.silu(g)])
def test_static_swiglu(gated):
    program = fused(lambda self, x: self.down(gated(self.gate(x), self.up(x))), recipe=HERO)
    gate, up, scale = call(program, "silu_mul_quantize_static").args
    assert [n.args[2].target for n in (gate, up)] == ["gate.weight_q", "up.weight_q"]
    assert scale.target == "down.input_scale"


def test_static_producers_with_another_float_reader_are_refused():
    def forward(self, x):
        y = F.gelu(self.up(x))
        return self.down(y), y.sin()

    program = fused(forward, recipe=HERO)
    reason = "its float output has other readers, so fusing would compute it twice"
    assert ("FuseGeluStatic", reason) in reasons(program)
    assert dialect(program)["quantize_static"] == 1
