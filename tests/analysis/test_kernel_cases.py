"""The cases that kernels are timed and described at: what they move, and that no kernel is without one."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the CUDA kernels need Triton")

from benchmarks.kernel_cards import FORMULAS
from zq_compiler.analysis.kernel_cases import KernelCase, cases
from zq_compiler.kernels.cuda import registration

# Without a case of their own: what these do, a case of another op does too.
COVERED = {
    "int8_linear_quantize": "int8_linear",
    "int8_linear_add": "int8_linear",
    "low_rank_linear": "int8_linear_low_rank",
    "low_rank_hidden": "int8_linear_low_rank",
    "quantize_per_token_int4": "quantize_per_token",
    "quantize_per_token_fp8": "quantize_per_token",
    "quantize_static": "gelu_quantize_static",
    "quantize_static_fp8": "gelu_quantize_static",
    "dequantize": "gelu_quantize_static",
    "silu_mul_quantize_static": "gelu_quantize_static",
    "int8_embedding": "embedding_layer_norm_quantize",
}


def case(op: str, shape: str) -> KernelCase:
    return next(c for c in cases() if (c.op, c.shape) == (op, shape))


def test_every_kernel_has_a_case_and_a_formula() -> None:
    ops = {c.op for c in cases()}
    assert ops == set(FORMULAS) and set(COVERED.values()) <= ops
    assert ops | set(COVERED) == set(registration.HOSTS) and not ops & set(COVERED)


def test_bytes_are_those_of_operands_and_results() -> None:
    m, n, k = 512, 3072, 768
    linear = case("int8_linear", f"{m} x {n} x {k}")
    assert linear.bytes == m * k + n * k + 4 * m + 4 * n + 2 * n + 2 * m * n
    assert linear.float_bytes == 2 * (m * k + n * k + n + m * n) and linear.operations == 2 * m * n * k
    m, k = 8192, 4096
    norm = case("norm_quantize", f"residual and RMSNorm, {m} x {k}")
    assert norm.bytes == 2 * m * k * 2 + 2 * k + m * k + 4 * m + 2 * m * k  # x, residual; weight; q; scale; h
    m, k = 8192, 768
    embedding = case("embedding_layer_norm_quantize", f"{m} of 30522 rows of {k}")
    assert embedding.bytes == 8 * m + m * (k + 4) + 2 * m * k + 4 * k + m * k + 4 * m + 2 * m * k


def test_packed_weights_take_their_bits() -> None:
    four = case("weight_only_linear", "1 x 4096 x 4096, int4, groups of 128")
    six = case("weight_only_linear", "1 x 4096 x 4096, fp6_e3m2, groups of 128")
    assert six.bytes - four.bytes == 4096 * 4096 * 2 // 8
    assert four.float_bytes / four.bytes == pytest.approx(16 / (4 + 32 / 128), rel=0.01)
