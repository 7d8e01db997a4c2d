"""One spelling for each thing: what models write, the canonical graph, and the numbers it gives."""

import math

import pytest
import torch
from torch import nn

from tests.programs import Block, after, captured, changes, ops, randn, reasons, run
from tests.tolerances import BF16_DB, ROUNDING_DB
from zq_compiler.numerics import sqnr
from zq_compiler.passes.canonicalize import Canonicalize
from zq_compiler.rewrite import constant_of, evaluate_constant

aten = torch.ops.aten
X = randn(3, 32)
COMPUTE = {
    *("aten.linear", "aten.rms_norm", "aten.gelu", "aten.layer_norm", "aten.matmul", "aten.mm", "aten.addmm"),
    *("aten.add.Tensor", "aten.mul.Tensor", "aten.pow.Tensor_Scalar", "aten.rsqrt", "aten.mean.dim"),
    *("aten.tanh", "aten.erf", "aten.div.Tensor", "aten.to.dtype", "aten.dropout", "aten.add_.Tensor"),
}


def canonical(model, *inputs):
    """The captured and canonicalized Program; numerics and idempotence are held on the way."""
    inputs = inputs or (X,)
    module = model if isinstance(model, nn.Module) else Block(model)
    if inputs[0].is_floating_point():
        module = module.to(inputs[0].dtype)
    program = captured(module, *inputs)
    before = run(program, *inputs)
    after(program, "canonicalize", check=True)
    floor = BF16_DB if inputs[0].dtype is torch.bfloat16 else ROUNDING_DB
    for b, a in zip(before, run(program, *inputs), strict=True):
        assert a.dtype == b.dtype and sqnr(b, a) > floor
    assert Canonicalize()(program) == 0  # a second run finds nothing
    return program


def compute(program):
    return {k: v for k, v in ops(program).items() if k in COMPUTE}


# --- linears -------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in GPT-2: weights stored `[K, N]`."""

    def __init__(self, n=64, k=32):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(k, n)), nn.Parameter(torch.randn(n))

    def forward(self, x):
        rows = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], self.weight.shape[1])


LINEARS = {
    "linear": lambda self, x: self.a(x),
    "mm of a transposed weight": lambda self, x: torch.mm(x, self.a.weight.t()) + self.a.bias,
    "mm of transpose(0, 1)": lambda self, x: torch.mm(x, self.a.weight.transpose(0, 1)) + self.a.bias,
    "matmul operator, bias first": lambda self, x: self.a.bias + x @ self.a.weight.T,
    "addmm": lambda self, x: torch.addmm(self.a.bias, x, self.a.weight.t()),
    "linear without bias and an add": lambda self, x: nn.functional.linear(x, self.a.weight) + self.a.bias,
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_linears_are_one_linear_with_weight_n_by_k_and_bias(spelling):
    program = canonical(LINEARS[spelling])
    assert compute(program) == {"aten.linear": 1}
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert constant_of(program.gm, linear.args[1]).target == "a.weight"
    assert torch.equal(evaluate_constant(program.gm, linear.args[1]), program.gm.a.weight)
    assert linear.args[2].target == "a.bias"


def test_a_constant_matrix_of_its_own():
    program = canonical(lambda self, x: x @ self.matrix)
    (linear,) = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert torch.equal(evaluate_constant(program.gm, linear.args[1]), program.gm.matrix.t())


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32), (2, 2, 3, 32)])
@pytest.mark.parametrize("model", [nn.Linear(32, 64), Conv1D(), lambda self, x: x @ self.matrix])
def test_inputs_of_two_to_four_dimensions(model, shape):
    assert compute(canonical(model, randn(*shape))) == {"aten.linear": 1}


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D as Original

    torch.manual_seed(0)
    program = canonical(Original(64, 32), randn(2, 3, 32))
    assert compute(program) == {"aten.linear": 1}


@pytest.mark.parametrize(
    ("forward", "rule", "reason"),
    [
        (lambda self, x: x @ x.t(), "MatmulToLinear", "the second operand is computed at run time"),
        (
            lambda self, x: x.view(1, 3, 32) @ self.matrix.view(1, 32, 64),
            "MatmulToLinear",
            "constant operand has 3 dim",
        ),
        (lambda self, x: torch.addmm(x, x, self.a.weight), "AddmmToLinear", "the added term is no bias vector"),
        (lambda self, x: torch.addmm(self.a.bias[:1], x, self.a.weight), "AddmmToLinear", "the added term is no bias"),
        (lambda self, x: nn.functional.linear(x, self.a.weight) + x, "AddBiasToLinear", "not a constant bias"),
        (
            lambda self, x: nn.functional.linear(x, self.a.weight) + self.matrix[:3, :32],
            "AddBiasToLinear",
            "the added constant is no bias vector",
        ),
        (
            lambda self, x: (lambda y: (y + self.a.bias, y * 2))(nn.functional.linear(x, self.a.weight)),
            "AddBiasToLinear",
            "has other readers",
        ),
    ],
)
def test_what_only_looks_like_a_linear_is_refused_with_a_reason(forward, rule, reason):
    found = reasons(canonical(forward))
    assert any(r == rule and reason in why for r, why in found), found


def test_scaled_products_are_no_linears():
    assert "aten.addmm" in ops(canonical(lambda self, x: torch.addmm(self.a.bias, x, self.a.weight, alpha=2)))
    program = canonical(lambda self, x: torch.add(nn.functional.linear(x, self.a.weight), self.a.bias, alpha=2))
    assert compute(program) == {"aten.linear": 1, "aten.add.Tensor": 1}


def test_a_bias_added_in_place_stays_where_it_is():
    def forward(self, x):
        y = nn.functional.linear(x, self.a.weight)
        y += self.a.bias
        return y

    assert compute(canonical(forward)) == {"aten.linear": 1, "aten.add_.Tensor": 1}


# --- RMSNorm -------------------------------------------------------------------------------------------------------


def llama(self, x, eps=0.1):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return self.scale * h.to(x.dtype)


def t5(self, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 0.1)
    return self.scale * (h.to(self.scale.dtype) if self.scale.dtype is torch.bfloat16 else h)


def gemma(self, x):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 0.1)
    return (h * (1.0 + self.scale.float())).type_as(x)


def with_square(self, x):
    return x * torch.rsqrt((x * x).mean(-1, True) + 0.1) * self.scale


def torch_module(self, x):
    self.rms.eps = 0.1
    return self.rms(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [llama, t5, gemma, torch_module])
def test_rms_norms(form, dtype):
    program = canonical(form, randn(2, 3, 32).to(dtype))
    (norm,) = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)
    assert norm.args[1] == [32] and norm.args[3] == 0.1  # eps is kept
    assert {"aten.rsqrt", "aten.mean.dim", "aten.pow.Tensor_Scalar"}.isdisjoint(ops(program))
    casts = 3 if form is gemma and dtype is torch.bfloat16 else 0  # Gemma multiplies by 1 + w in float32, between casts
    assert sum(v for k, v in ops(program).items() if k in ("aten.to.dtype", "aten.type_as")) - casts <= (form is gemma)


def test_rms_norm_squared_by_a_product_and_weight_on_the_right():
    assert compute(canonical(with_square)) == {"aten.rms_norm": 1}


@pytest.mark.parametrize(
    ("forward", "rule", "reason"),
    [
        (lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 0.1) * x, "RmsNorm", "no weight vector"),
        (lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 0.1) * 3.0, "RmsNorm", "eps or the weight"),
        (
            lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + x.abs()) * self.scale,
            "RmsNorm",
            "eps or the weight",
        ),
    ],
)
def test_what_only_looks_like_rms_norm(forward, rule, reason):
    program = canonical(forward)
    assert "aten.rsqrt" in ops(program)
    assert any(r == rule and reason in why for r, why in reasons(program)), reasons(program)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 0.1) * self.scale,
        lambda self, x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 0.1) * self.scale,
        lambda self, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 0.1) * self.scale,
    ],
)
def test_other_norms_are_not_rms_norm(forward):
    assert "aten.rms_norm" not in ops(canonical(forward))


# --- GELU ----------------------------------------------------------------------------------------------------------

SLOPE = math.sqrt(2 / math.pi)
GELUS = {
    "new": (lambda self, x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.044715 * torch.pow(x, 3.0)))), "tanh"),
    "fast": (lambda self, x: 0.5 * x * (1.0 + torch.tanh(x * SLOPE * (1.0 + 0.044715 * x * x))), "tanh"),
    "fast, rounded slope": (
        lambda self, x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        "tanh",
    ),
    "erf": (lambda self, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "none"),
    "tanh of torch": (lambda self, x: nn.functional.gelu(x, approximate="tanh"), "tanh"),
    "erf of torch": (lambda self, x: nn.functional.gelu(x), "none"),
}


@pytest.mark.parametrize("spelling", GELUS)
def test_gelus(spelling):
    forward, approximate = GELUS[spelling]
    program = canonical(forward)
    assert compute(program) == {"aten.gelu": 1}
    (gelu,) = program.graph.find_nodes(op="call_function", target=aten.gelu.default)
    assert gelu.kwargs.get("approximate", "none") == approximate


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: 0.5 * x * (1.0 + torch.tanh(SLOPE * (x + 0.05 * torch.pow(x, 3.0)))), "cubic is 0.05"),
        (lambda self, x: 0.5 * x * (1.0 + torch.tanh(0.5 * (x + 0.044715 * torch.pow(x, 3.0)))), "slope is 0.5"),
        (lambda self, x: x * 0.5 * (1.0 + torch.erf(x / 1.5)), "root is 1.5"),
    ],
)
def test_other_constants_are_no_gelu(forward, reason):
    program = canonical(forward)
    assert "aten.gelu" not in ops(program)
    assert any(reason in why for _, why in reasons(program))


# --- identities ----------------------------------------------------------------------------------------------------


def test_inactive_dropout_and_idle_casts_and_slices_are_removed():
    program = canonical(lambda self, x: self.drop(x.to(torch.float32))[:, :].detach() + 1)
    assert compute(program) == {"aten.add.Tensor": 1}
    assert changes(program, "canonicalize") >= 3
    assert set(ops(program)) == {"aten.add.Tensor"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.to(torch.float64) + 1,
        lambda self, x: x.to(torch.float32, copy=True).add_(1) + x,
        lambda self, x: x[1:] + 1,
        lambda self, x: x[::2] + 1,
    ],
)
def test_what_changes_something_stays(forward):
    program = canonical(forward)
    assert {"aten.to.dtype", "aten.slice.Tensor", "aten.add_.Tensor"} & set(ops(program))


def test_reads_are_not_carried_across_in_place_changes():
    def forward(self, x):
        x = x + 0
        square = x.pow(2).mean(-1, keepdim=True)
        x.mul_(2)
        return x * torch.rsqrt(square + 0.1) * self.scale

    program = canonical(forward)
    assert "aten.rms_norm" not in ops(program)
