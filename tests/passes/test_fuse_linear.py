"""Linears between dequantizes become integer ops, table lookups too; biases, dtypes and leftovers."""

import pytest
import torch
from torch import nn

from tests.programs import after, captured, changes, dialect, ops, randn, run
from tests.tolerances import BF16_DB, ROUNDING_DB
from zq_compiler import load_recipe
from zq_compiler.kernels import int8_linear
from zq_compiler.numerics import sqnr
from zq_compiler.passes.fuse_linear import FuseLinear
from zq_compiler.program import Stage

X = randn(3, 32)


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linears(bias, dtype, recipe):
    torch.manual_seed(0)
    program = captured(nn.Sequential(nn.Linear(32, 48, bias=bias)).to(dtype), X.to(dtype), recipe=recipe)
    after(program, "move_quantize")
    explicit = run(program, X.to(dtype))[0]
    FuseLinear()(program)
    program.stage = Stage.FUSED
    program.graph.eliminate_dead_code()
    program.gm.recompile()
    assert dialect(program) == {"quantize_per_token": 1, "int8_linear": 1}
    assert "aten.linear" not in ops(program)
    (linear,) = program.graph.find_nodes(op="call_function", target=int8_linear)
    assert (linear.args[4] is not None) == bias and linear.args[5] is dtype
    fused = run(program, X.to(dtype))[0]
    assert fused.dtype is dtype
    assert sqnr(explicit, fused) > (ROUNDING_DB if dtype is torch.float32 else BF16_DB)
    assert FuseLinear()(program) == 0


def test_float_linears_stay():
    program = after(captured(lambda self, x: self.a(x) + x @ x.t() @ x, X, recipe="float"))
    assert ops(program)["aten.linear"] == 1 and dialect(program) == {}


def test_tables():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 32, padding_idx=3)

        def forward(self, ids):
            return self.table(ids)

    model, ids = Model(), torch.tensor([[1, 3], [39, 0]])
    program = after(captured(model, ids, recipe=load_recipe("w8a8").replace(embedding="int8")))
    assert dialect(program) == {"int8_embedding": 1} and changes(program, "fuse_linear") == 1
    rows = model(ids).detach()
    error = (program.gm(ids)[0] - rows).abs()
    assert (error <= rows.abs().amax(-1, keepdim=True) / 127 * 0.51).all()
    assert torch.equal(program.gm(ids)[0][0, 1], torch.zeros(32))
