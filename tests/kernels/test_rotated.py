"""Every fused op with `rotated=True` quantizes the rotation of what it quantizes without."""

import pytest
import torch

from tests.kernels.formulas import data
from zq_compiler.kernels import OPS
from zq_compiler.numerics import quantize_per_token, rotate

X, R, V = data((3, 32)), data((3, 32), seed=1), data((32,), seed=2)
Q, SCALE = quantize_per_token(R)
CASES = {
    "layer_norm_quantize": ((X, V, V, 0.1), 2),
    "add_layer_norm_quantize": ((X, R, V, V, 0.1), 2),
    "rms_norm_quantize": ((X, V, 0.1), 2),
    "add_rms_norm_quantize": ((X, R, V, 0.1), 2),
    "int8_add_layer_norm_quantize": ((X, None, Q, SCALE, True, V, V, 0.1), 2),
    "int8_add_rms_norm_quantize": ((X, None, Q, SCALE, True, V, 0.1), 2),
    "embedding_layer_norm_quantize": ((torch.tensor([2, 0, 1]), Q, SCALE, X, V, V, 0.1), 2),
    "gelu_quantize": ((X, "tanh"), None),
    "silu_mul_quantize": ((X, R), None),
}
EXPLICIT = {  # what they are made of: `tests/test_numerics.py` has them
    *("quantize_per_token", "quantize_per_token_int4", "quantize_per_channel", "dequantize"),
    *("quantize_weight", "dequantize_weight", "chosen_weight"),
}
FLOAT = {
    "gelu_quantize": torch.nn.functional.gelu(X, approximate="tanh"),
    "silu_mul_quantize": torch.nn.functional.silu(X) * R,
}


@pytest.mark.parametrize("name", CASES)
def test_rotated(name):
    arguments, y_index = CASES[name]
    dtype = (torch.float32,) if name.startswith("int8_add") else ()
    plain, rotated = (OPS[name].overload(*arguments, flag, *dtype) for flag in (False, True))
    y = FLOAT[name] if y_index is None else plain[y_index]
    want_q, want_scale = quantize_per_token(rotate(y))
    assert torch.equal(rotated[0], want_q) and torch.equal(rotated[1], want_scale)
    assert not torch.equal(rotated[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(rotated[2:], plain[2:], strict=True))


def test_every_op_that_can_rotate_is_here():
    fused = {n for n, op in OPS.items() if any(a.name == "rotated" for a in op.overload._schema.arguments)}
    assert fused - EXPLICIT == set(CASES)
