"""Meta-tests over every op of the dialect."""

import inspect

import pytest
import torch

from tests.kernels.formulas import data
from zq_compiler.kernels import NAMESPACE, OPS, dialect_op, reference_of
from zq_compiler.kernels.cached_attention import quantize_keys, quantize_values
from zq_compiler.numerics import quantize_weight

K = 16


def integers(*shape):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


SCALE, W_SCALE = torch.rand(2, 3, 1) + 0.1, torch.rand(5, 1) + 0.1
X, R, V = data((2, 3, K)), data((2, 3, K), seed=1), data((K,))
QKV_8, ONE = [integers(2, h, 3, K) for h in (4, 2, 2)], torch.ones(1, 1, 1, 1)
Q, KV = data((2, 4, 3, K)), data((2, 2, 3, K), seed=2)
PACKED = quantize_weight(data((5, 40)), "int4", 16)  # 3 groups, the last with 8
FP8_WEIGHT = quantize_weight(data((5, K)), "fp8_e4m3")[0]
K_OF_8 = data((2, 2, 8, K), seed=3)
HELD = *quantize_keys(K_OF_8, 4, 8), *quantize_values(K_OF_8, 4, 8)
ARGUMENTS = {
    "quantize_per_token": [(X,), (X.bfloat16(),), (X[:0],), (X.transpose(0, 1),), (X, True)],
    "quantize_per_channel": [(X,), (X[0],), (X, True)],
    "dequantize": [(integers(2, 3, K), SCALE, d, r) for d in (torch.float32, torch.bfloat16) for r in (False, True)],
    "int8_linear": [
        (integers(2, 3, K), SCALE, integers(5, K), W_SCALE, data((5,)), torch.float32),
        (integers(3, K), SCALE[0], integers(5, K), W_SCALE, None, torch.bfloat16),
        (integers(0, K), SCALE[0, :0], integers(5, K), W_SCALE, None, torch.float32),
    ],
    "int8_embedding": [(torch.tensor([[0, 4, 4]]), integers(5, K), W_SCALE, torch.float16)],
    "layer_norm_quantize": [
        (X, V, V, 0.1),
        (X, None, None, 1e-5, True),
        (X.bfloat16(), V.bfloat16(), V.bfloat16(), 0.1),
    ],
    "add_layer_norm_quantize": [(X, R, V, V, 0.1), (X, R, None, None, 1e-5, True)],
    "rms_norm_quantize": [(X, V, 0.1), (X, None, 1e-5, True)],
    "add_rms_norm_quantize": [(X, R, V, 0.1), (X, R, V, 0.1, True)],
    "int8_linear_quantize": [
        (integers(2, 3, K), SCALE / 100, integers(5, K), W_SCALE, data((5,))),
        (integers(2, 3, K), None, integers(5, K), W_SCALE / 1000, None),
    ],
    "int8_linear_gelu_quantize": [
        (
            integers(2, 3, K),
            SCALE,
            integers(5, K),
            W_SCALE,
            data((5,)),
            torch.float32,
            "none",
            W_SCALE.reshape(1, 1, 5),
        ),
        (integers(3, K), None, integers(5, K), W_SCALE, None, torch.bfloat16, "tanh", torch.ones(1, 1)),
    ],
    "int8_add_layer_norm_quantize": [
        (integers(2, 3, K), V.abs()[None, None], integers(2, 3, K), SCALE, True, V, V, 0.1, True, torch.float32),
        (integers(2, 3, K), V.abs()[None, None], R.bfloat16(), None, False, None, None, 0.1, False, torch.bfloat16),
    ],
    "int8_add_rms_norm_quantize": [(X, None, integers(2, 3, K), SCALE, True, V, 0.1, False, torch.float32)],
    "embedding_layer_norm_quantize": [(torch.tensor([[0, 4, 4]]), integers(5, K), W_SCALE, X, V, V, 0.1, True)],
    "quantize_static": [(X, torch.tensor([[[0.1]]])), (X.bfloat16(), V.abs()[None, None])],
    "gelu_quantize_static": [(X, "none", torch.tensor([[[0.1]]])), (X, "tanh", V.abs()[None, None])],
    "silu_mul_quantize_static": [(X, R, V.abs()[None, None])],
    "cached_attention": [
        (Q, *HELD, KV, KV, None, True, 0.5, 4, 8),
        (Q.half(), *HELD, KV.half(), KV.half(), torch.rand(3, 8 + KV.shape[2]) > 0.2, False, 0.5, 4, 8),
    ],
    "int8_attention": [
        (*QKV_8, torch.full((1, 1, 1, 1), 1e-3), None, True, None, V.abs()[None, None, None], torch.int8),
        (*QKV_8, torch.rand(1, 4, 1, 1) / 1e3, torch.rand(3, 3) > 0.2, False, ONE / 255, ONE / 255, torch.bfloat16),
    ],
    "quantized_softmax_attention": [
        (Q, KV, KV, None, True, None, None),
        (Q, KV, KV, torch.rand(3, 3) > 0.2, False, 0.5, torch.full((1, 1, 1, 1), 1 / 255)),
    ],
    "gelu_quantize": [(X, "none"), (X, "tanh", True)],
    "silu_mul_quantize": [(X, R), (X, R, True)],
    "quantize_weight": [
        (X[0], "int4", 0),
        (X[0], "int4", 0, True),
        (data((5, 40)), "fp4_e2m1", 16, False, "pow2", "ceil"),
        (X[0].bfloat16(), "fp6_e3m2", 16),
        (data((5, 41)), "int3", 32),
    ],
    "dequantize_weight": [
        *((*PACKED, "int4", 16, 40, d) for d in (torch.float32, torch.bfloat16)),
        (*quantize_weight(data((5, 48)), "int4", 16, True), "int4", 16, 48, torch.float32, True),
    ],
    "weight_only_linear": [
        (data((2, 3, 40)), *PACKED, data((5,)), "int4", 16),
        (data((3, 40)).bfloat16(), *PACKED, None, "int4", 16),
        (data((0, 40)), *PACKED, None, "fp4_e2m1", 16),
    ],
    "w4a8_linear": [
        (integers(2, 3, 40), SCALE, *PACKED, data((5,)), "int4", 16, torch.float32),
        (integers(3, 40), SCALE[0], PACKED[0], W_SCALE, None, "int4", 0, torch.bfloat16),
        (integers(0, 40), SCALE[0, :0], *PACKED, None, "int4", 16, torch.float32),
    ],
    "low_rank_linear": [
        (data((2, 3, 5)), data((2, 3, 40)), data((4, 40)).half(), data((5, 4)).half()),
        (
            data((3, 5)).bfloat16(),
            data((3, 40)).bfloat16(),
            integers(4, 40),
            integers(5, 4),
            SCALE[0, :1].expand(4, 1),
            V[None, :4],
        ),
        (data((0, 5)), data((0, 40)), data((4, 40)).half(), data((5, 4)).half()),
    ],
    "chosen_weight": [
        (data((5, 40)), *PACKED, True, False),
        (data((5, 48)).bfloat16(), integers(5, 48), W_SCALE, False, True),
    ],
    "quantize_static_fp8": [(X, SCALE), (X.bfloat16(), SCALE), (X[:0], SCALE[:0])],
    "quantize_per_token_int4": [(X,), (X.bfloat16(), True), (X[:0],), (X.transpose(0, 1),)],
    "quantize_per_token_fp8": [(X,), (X.bfloat16(),), (X[:0],)],
    "fp8_linear": [
        (X.to(torch.float8_e4m3fn), SCALE, FP8_WEIGHT, W_SCALE, data((5,)), "fp8_e4m3", 0, torch.float32),
        (X[0].to(torch.float8_e4m3fn), SCALE[0], FP8_WEIGHT, W_SCALE, None, "fp8_e4m3", 0, torch.bfloat16),
        (data((3, 40)).to(torch.float8_e4m3fn), SCALE[0], *PACKED, None, "fp4_e2m1", 16, torch.float32),
    ],
}
EVERY = [(name, arguments) for name, several in ARGUMENTS.items() for arguments in several]


def test_every_op_is_tested_here():
    assert set(ARGUMENTS) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_the_schema_is_the_references_signature(name):
    op = OPS[name]
    parameters = inspect.signature(op.reference).parameters
    assert op.name == name == op.reference.__name__ == op.overload._opname
    assert op.overload.namespace == NAMESPACE
    assert [a.name for a in op.overload._schema.arguments] == list(parameters)
    annotation = str(inspect.signature(op.reference).return_annotation)
    assert len(op.overload._schema.returns) == annotation.count("Tensor")
    assert not op.overload._schema.is_mutable


@pytest.mark.parametrize("name", OPS)
def test_the_reference_says_what_shapes_it_takes_and_gives(name):
    doc = inspect.getdoc(OPS[name].reference)
    assert doc and ("[" in doc or "`layer_norm_quantize`" in doc or "`rms_norm_quantize`" in doc)


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_fake_values_and_schemas_are_true(name, arguments):
    # the other checks of opcheck compile each op and cost seconds; tests/test_backend.py compiles whole models
    schema = () if name == "fp8_linear" else ("test_schema",)  # it multiplies its operands; torch multiplies no float8
    torch.library.opcheck(OPS[name].overload, arguments, test_utils=(*schema, "test_faketensor"))


@pytest.mark.parametrize(("name", "arguments"), EVERY)
def test_calling_the_op_is_calling_the_reference(name, arguments):
    op = OPS[name]
    by_op, by_reference = op.overload(*arguments), op.reference(*arguments)
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (by_op, by_reference)), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and a.dtype == b.dtype and a.stride() == b.stride()
    assert reference_of(op.overload) is op.reference


def test_an_op_is_registered_once():
    def dequantize(q: torch.Tensor) -> torch.Tensor:
        return q

    with pytest.raises(ValueError, match="zq::dequantize is registered twice"):
        dialect_op(dequantize)
    with pytest.raises(ValueError):
        dialect_op(lambda x: x)  # no types, no schema


def test_other_targets_have_no_reference():
    assert reference_of(torch.ops.aten.add.Tensor) is None
    assert reference_of("weight") is None
