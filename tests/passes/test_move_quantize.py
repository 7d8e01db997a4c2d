"""Quantize moves up through what moves whole rows, and through nothing else."""

import pytest
import torch

from tests.programs import after, captured, changes, dialect, randn, run
from zq_compiler import QRule, load_recipe
from zq_compiler.capture import layer_of
from zq_compiler.kernels import quantize_per_token, quantize_static
from zq_compiler.passes.move_quantize import MoveQuantize
from zq_compiler.program import fake_value
from zq_compiler.recipe import Role
from zq_compiler.schemes import INT8_FEATURE, INT8_TENSOR, INT8_WEIGHT

aten = torch.ops.aten
X = randn(2, 3, 32)


def moved(forward, *inputs, recipe="w8a8"):
    """The Program after the pass; that outputs stay bit for bit is held by the contract's check."""
    program = after(captured(forward, *(inputs or (X,)), recipe=recipe), "move_quantize", check=True)
    assert MoveQuantize()(program) == 0  # a second run finds nothing
    return program


def sources(program, target=quantize_per_token):
    quantizes = program.graph.find_nodes(op="call_function", target=target)
    return {str(getattr(q.args[0].target, "_opname", q.args[0].op)) for q in quantizes}


@pytest.mark.parametrize(
    "step",
    [
        lambda h: h.view(-1, 32),
        lambda h: h.reshape(6, 32),
        lambda h: h.reshape(-1, 1, 32),
        lambda h: h.transpose(0, 1),
        lambda h: h.transpose(1, 0).reshape(-1, 32).view(2, 3, 32),
        lambda h: h.transpose(-2, 0),
        lambda h: h.unsqueeze(1),
        lambda h: h.unsqueeze(-2),
    ],
)
def test_through_everything_that_moves_whole_rows(step):
    program = moved(lambda self, x: self.a(step(torch.sin(x * self.scale))))
    assert sources(program) == {"sin"}
    assert changes(program, "move_quantize") >= 1


@pytest.mark.parametrize(
    ("step", "source"),
    [
        (lambda h: h.transpose(1, 2).reshape(2, -1, 32), "reshape"),
        (lambda h: h.view(2, 3, 2, 16).transpose(1, 2).reshape(4, 3, 16).reshape(-1, 32), "reshape"),
        (lambda h: h.view(2, 96)[:, :32], "slice"),
        (lambda h: h.unsqueeze(-1).transpose(-1, -2)[..., 0, :], "select"),
        (lambda h: h.transpose(-1, 0).transpose(0, -1), "transpose"),
        (lambda h: h * 2, "mul"),
    ],
)
def test_not_where_rows_change(step, source):
    assert sources(moved(lambda self, x: self.a(step(torch.sin(x * self.scale))))) == {source}


def test_quantizes_that_meet_become_one():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        return self.a(h), self.b(h.view(-1, 32)), self.c(h.transpose(0, 1))

    program = moved(forward)
    assert dialect(program)["quantize_per_token"] == 1
    assert changes(program, "move_quantize") == 4  # two moves, two merges


def test_a_symbolic_last_dimension_that_the_model_fixes_counts_as_fixed():
    def forward(self, x):
        return self.a(x.view(-1, 32)), x * self.scale

    assert sources(after(captured(forward, X, dynamic=True), "move_quantize")) == {"placeholder"}
    free = captured(lambda self, x: self.a(x.view(-1, 32)), X, dynamic=True)
    assert sources(after(free, "move_quantize")) == {"view"}  # rows of 64 would do as well


@pytest.mark.parametrize("change", [lambda h: h.mul_(3), lambda h: h.view(-1)[:5].zero_()])
def test_not_across_an_in_place_change(change):
    def forward(self, x):
        h = torch.sin(x * self.scale)
        copy = h.transpose(0, 1).reshape(-1, 32)
        change(h)
        return self.a(copy), self.b(h), self.c(copy)

    program = captured(forward, X)
    want = run(after(program, "fold_quantize"), X)
    after_move = run_pass(program)
    for w, y in zip(want, run(program, X), strict=True):
        assert torch.equal(w, y)
    assert dialect(program)["quantize_per_token"] == 2
    assert after_move >= 0


def run_pass(program):
    count = MoveQuantize()(program)
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    return count


def test_equal_quantizes_are_not_merged_across_a_change():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        same_memory = h.view(-1)
        first = self.a(h)
        same_memory.add_(1)
        return first, self.b(h)

    assert dialect(moved(forward))["quantize_per_token"] == 2


# --- static scales -------------------------------------------------------------------------------------------------

FEATURE_WISE = load_recipe("w8a8").replace(rules=(QRule("a", INT8_WEIGHT, INT8_FEATURE),))
ONE_SCALE = load_recipe("w8a8").replace(rules=(QRule(".*", None, INT8_TENSOR, roles=(Role.ATTENTION,)),))


def moved_static(step, *shape):
    """What the quantize of `step`'s result reads behind the pass, and the shape of its scales."""
    program = moved(lambda self, x: self.a(step(torch.sin(x))), randn(*shape), recipe=FEATURE_WISE)
    (node,) = program.graph.find_nodes(op="call_function", target=quantize_static)
    (source,) = sources(program, quantize_static)
    return source, tuple(program.gm.get_buffer(node.args[1].target).shape)


@pytest.mark.parametrize(
    ("step", "shape", "scales"),
    [
        (lambda h: h.view(-1, 32), (2, 3, 32), (1, 1, 32)),
        (lambda h: h.view(2, 3, 32), (6, 32), (1, 32)),
        (lambda h: h.transpose(0, 1), (2, 3, 32), (1, 1, 32)),
        (lambda h: h.transpose(0, 1).contiguous(), (2, 3, 32), (1, 1, 32)),
        (lambda h: h.transpose(1, 2), (2, 32, 3), (1, 32, 1)),
        (lambda h: h.transpose(-1, 0), (32, 3, 2), (32, 1, 1)),
        (lambda h: h.permute(0, 2, 1), (2, 32, 3), (1, 32, 1)),
        (lambda h: h.permute(1, -1, 0), (32, 2, 3), (32, 1, 1)),
        (lambda h: h.clone(), (2, 3, 32), (1, 1, 32)),
        (lambda h: h.reshape(2, 3, 32), (2, 3, 4, 8), (1, 1, 4, 8)),
        (lambda h: h.flatten(-2), (2, 3, 4, 8), (1, 1, 4, 8)),
        (lambda h: h.transpose(1, 2).reshape(2, 3, 32), (2, 4, 3, 8), (1, 4, 1, 8)),  # heads are merged
        (lambda h: h.transpose(1, 2).contiguous().view(-1, 32), (2, 4, 3, 8), (1, 4, 1, 8)),
        (lambda h: h.permute(0, 3, 1, 2).reshape(2, 3, 32), (2, 4, 8, 3), (1, 4, 8, 1)),
        (lambda h: h.permute(3, 0, 2, 1).reshape(2, 3, 32), (3, 4, 8, 2), (1, 4, 8, 1)),
        (lambda h: h.permute(2, 0, 3, 1).reshape(2, 3, 32), (3, 4, 2, 8), (1, 4, 1, 8)),
    ],
)
def test_static_scales_are_laid_out_as_their_values_are(step, shape, scales):
    assert moved_static(step, *shape) == ("sin", scales)


@pytest.mark.parametrize(
    ("step", "shape", "source"),
    [
        (lambda h: h.view(2, 3, 32), (2, 96), "reshape"),  # one row holds several feature vectors
        (lambda h: h.view(6, 32), (12, 16), "reshape"),  # two rows share one
        (lambda h: h.reshape(6, 32), (2, 32, 3), "reshape"),
        (lambda h: h.transpose(-1, -2).reshape(2, 3, 32), (2, 3, 2, 4, 4), "transpose"),  # only the order changes
        (lambda h: h.permute(0, 1, 2, 4, 3).reshape(2, 3, 32), (2, 3, 2, 4, 4), "permute"),
        (lambda h: h * 2, (2, 3, 32), "mul"),
        (lambda h: h[:, :2], (2, 3, 32), "slice"),
    ],
)
def test_static_ones_stay_where_scales_cannot_be_laid_out(step, shape, source):
    assert moved_static(step, *shape)[0] == source


def test_one_scale_passes_through_every_move():
    """Key heads repeated for groups of queries: integers are what is expanded."""

    def forward(self, x):
        h = torch.sin(x)
        heads = h.view(2, 3, 4, 8).transpose(1, 2)
        repeated = h[..., :16].cos().view(2, 3, 2, 8).transpose(1, 2)[:, :, None].expand(2, 2, 2, 3, 8)
        keys = repeated.reshape(2, 4, 3, 8)
        return torch.nn.functional.scaled_dot_product_attention(heads, keys, keys)

    program = moved(forward, recipe=ONE_SCALE)
    quantizes = program.graph.find_nodes(op="call_function", target=quantize_static)
    assert [tuple(q.meta["val"].shape) for q in quantizes] == [(2, 3, 32), (2, 3, 16)]  # keys are values
    assert all(program.gm.get_buffer(q.args[1].target).shape == (1,) * q.meta["val"].ndim for q in quantizes)
    expands = program.graph.find_nodes(op="call_function", target=aten.expand.default)
    assert {node.meta["val"].dtype for node in expands} == {torch.int8}


def test_equal_static_quantizes_that_meet_become_one():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        return self.a(h), self.a(h.transpose(0, 1)), h.cos()

    program = moved(forward, recipe=FEATURE_WISE)
    assert dialect(program)["quantize_static"] == 1
    assert changes(program, "move_quantize") == 2  # one move, one merge


def test_static_quantizes_of_other_scales_stay_apart():
    def forward(self, x):
        h = torch.sin(x * self.scale)
        return self.a(h), self.b(h.transpose(0, 1))

    rules = tuple(QRule(name, INT8_WEIGHT, INT8_FEATURE) for name in "ab")
    assert dialect(moved(forward, recipe=FEATURE_WISE.replace(rules=rules)))["quantize_static"] == 2


@pytest.mark.parametrize("change", [lambda h: h.mul_(3), lambda h: h.view(-1)[:5].zero_()])
def test_static_ones_do_not_cross_an_in_place_change(change):
    def forward(self, x):
        h = torch.sin(x * self.scale)
        rows = h.transpose(0, 1).reshape(-1, 32)
        change(h)
        return self.a(rows), self.a(h.view(-1, 32))

    program = moved(forward, recipe=FEATURE_WISE)
    assert dialect(program)["quantize_static"] == 2


def test_one_scale_moves_through_a_split_of_heads():
    def block(self, x):
        heads = self.a(x).unflatten(-1, (4, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    assert sources(moved(block, randn(2, 3, 32), recipe=ONE_SCALE), quantize_static) == {"linear"}


@pytest.mark.parametrize("recipe", ["w8a8", FEATURE_WISE], ids=["token-wise", "feature-wise"])
def test_a_move_stays_in_its_own_module(recipe):
    """Not in that of the linear that reads it, for which the quantize is."""
    program = moved(lambda self, x: self.a(torch.sin(x * self.scale).view(6, 32)), recipe=recipe)
    moves = [node for node in program.graph.nodes if node.target in (aten.view.default, aten.reshape.default)]
    assert torch.int8 in {fake_value(node).dtype for node in moves}
    assert [layer_of(node) for node in moves] == [""] * len(moves)
