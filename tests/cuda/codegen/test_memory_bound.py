"""What memory-bound kernels compile to: 16 bytes an access, no spills, room for two programs, few instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.offline_gpu import Report, offline_gpu, report
from zq_compiler.kernels.cuda.activation_quantize import (
    gelu_quantize,
    gelu_quantize_static,
    silu_mul_quantize,
    silu_mul_quantize_static,
)
from zq_compiler.kernels.cuda.embedding import embedding_layer_norm_quantize, int8_embedding
from zq_compiler.kernels.cuda.norm_quantize import norm_quantize
from zq_compiler.kernels.cuda.quantize_int4_fp8 import quantize_per_token_fp8, quantize_per_token_int4
from zq_compiler.kernels.cuda.quantize_static import dequantize, quantize_static, quantize_static_fp8
from zq_compiler.kernels.cuda.softmax_quantize import softmax_quantize

M, EPS = 8192, 1e-5
HALF, INT8, FLOAT = torch.bfloat16, torch.int8, torch.float32


def meta(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(*shape, dtype=dtype or HALF, device="meta")


def floats(k: int) -> tuple[Tensor, Tensor, Tensor]:
    return meta(M, k), meta(k), meta(k)


def integers(k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x, x_scale, residual, residual_scale`."""
    return meta(M, k, dtype=INT8), meta(1, k, dtype=FLOAT), meta(M, k, dtype=INT8), meta(M, 1, dtype=FLOAT)


def layer_norm(k: int) -> Any:
    x, w, b = floats(k)
    return norm_quantize(x, None, w, b, EPS, False, True, False)


def add_layer_norm(k: int) -> Any:
    x, w, b = floats(k)
    return norm_quantize(x, x, w, b, EPS, False, True, True)


def add_layer_norm_alone(k: int) -> Any:
    x, w, b = floats(k)
    return norm_quantize(x, x, w, b, EPS, False, False, False)


def add_rms_norm(k: int, rotated: bool = False) -> Any:
    x, w, _ = floats(k)
    return norm_quantize(x, x, w, None, EPS, True, False, True, rotated)


def int8_layer_norm(k: int, rotated: bool = False) -> Any:
    (_, w, b), (x, x_scale, r, r_scale) = floats(k), integers(k)
    return norm_quantize(x, r, w, b, EPS, False, True, rotated, rotated, x_scale, r_scale, rotated, HALF)


def embedding(k: int) -> Any:
    ids, table, scale = meta(M, dtype=torch.int64), meta(30000, k, dtype=INT8), meta(30000, 1, dtype=FLOAT)
    return int8_embedding(ids, table, scale, HALF)


def embedding_norm(k: int) -> Any:
    ids, table, scale = meta(16, M // 16, dtype=torch.int64), meta(30000, k, dtype=INT8), meta(30000, 1, dtype=FLOAT)
    return embedding_layer_norm_quantize(ids, table, scale, meta(M // 16, k), meta(k), meta(k), EPS)


def softmax(k: int, mask: Tensor | None = None, is_causal: bool = False, static: bool = True) -> Any:
    scale = meta(1, 16, 1, 1, dtype=FLOAT) if static else None
    return softmax_quantize(meta(4, 16, M // 64, k, dtype=FLOAT), mask, is_causal, scale)


def scales(k: int) -> Tensor:
    return meta(1, k, dtype=FLOAT)


# By name: what is launched, and how many loads are of less than 16 bytes: of a row's scale, of an id.
KERNELS: dict[str, tuple[Callable[[int], Any], int]] = {
    "layer_norm": (layer_norm, 0),
    "add_layer_norm": (add_layer_norm, 0),
    "add_layer_norm alone": (add_layer_norm_alone, 0),
    "add_rms_norm": (add_rms_norm, 0),
    "add_rms_norm rotated": (lambda k: add_rms_norm(k, True), 0),
    "int8_layer_norm": (int8_layer_norm, 1),
    "int8_layer_norm rotated": (lambda k: int8_layer_norm(k, True), 1),
    "embedding": (embedding, 2),
    "embedding_norm": (embedding_norm, 2),
    "gelu": (lambda k: gelu_quantize(meta(M, k), "none"), 0),
    "gelu rotated": (lambda k: gelu_quantize(meta(M, k), "none", True), 0),
    "gelu tanh": (lambda k: gelu_quantize(meta(M, k), "tanh"), 0),
    "silu_mul": (lambda k: silu_mul_quantize(*meta(M, 2 * k).chunk(2, -1)), 0),
    "silu_mul rotated": (lambda k: silu_mul_quantize(*meta(M, 2 * k).chunk(2, -1), True), 0),
    "softmax": (softmax, 1),
    "softmax causal": (lambda k: softmax(k, is_causal=True), 1),
    "softmax masked, token-wise": (lambda k: softmax(k, meta(4, 1, 1, k, dtype=torch.bool), static=False), 0),
    "int4": (lambda k: quantize_per_token_int4(meta(M, k)), 0),
    "int4 rotated": (lambda k: quantize_per_token_int4(meta(M, k), True), 0),
    "fp8": (lambda k: quantize_per_token_fp8(meta(M, k)), 0),
    "gelu static": (lambda k: gelu_quantize_static(meta(M, k), "none", scales(k)), 0),
    "silu_mul static": (lambda k: silu_mul_quantize_static(*meta(M, 2 * k).chunk(2, -1), scales(k)), 0),
    "static": (lambda k: quantize_static(meta(M, k), scales(k)), 0),
    "static, one scale": (lambda k: quantize_static(meta(M, k), scales(1)), 1),
    "static fp8": (lambda k: quantize_static_fp8(meta(M, k), scales(k)), 0),
    "dequantize": (lambda k: dequantize(meta(M, k, dtype=INT8), meta(M, 1, dtype=FLOAT), HALF), 2),
    "dequantize rotated": (lambda k: dequantize(meta(M, k, dtype=INT8), meta(M, 1, dtype=FLOAT), HALF, True), 2),
}
OF_TILES = list(KERNELS)[list(KERNELS).index("gelu static") :]  # whatever K is
# Instructions of the whole kernel by architecture, as they were when this was written.
INSTRUCTIONS: dict[tuple[str, int], dict[int, int]] = {
    ("layer_norm", 768): {90: 1164},
    ("layer_norm", 4096): {80: 1159, 89: 1157, 90: 1169, 100: 975, 120: 1136},
    ("layer_norm", 16384): {90: 2054, 100: 1644, 120: 1977},
    ("add_layer_norm", 768): {90: 1272},
    ("add_layer_norm", 4096): {80: 1230, 89: 1229, 90: 1236, 100: 1041, 120: 1244},
    ("add_layer_norm", 16384): {90: 2196, 100: 1776, 120: 2205},
    ("add_layer_norm alone", 4096): {90: 1159},
    ("add_rms_norm", 4096): {90: 989},
    ("add_rms_norm rotated", 768): {90: 1172},
    ("add_rms_norm rotated", 4096): {80: 1143, 89: 1142, 90: 1149, 100: 1039, 120: 1163},
    ("add_rms_norm rotated", 16384): {90: 2016, 100: 1846, 120: 2039},
    ("int8_layer_norm", 4096): {90: 1424},
    ("int8_layer_norm", 16384): {90: 2526},
    ("int8_layer_norm rotated", 768): {90: 1808},
    ("int8_layer_norm rotated", 4096): {80: 1776, 89: 1774, 90: 1780, 100: 1606, 120: 1766},
    ("int8_layer_norm rotated", 16384): {90: 3383, 100: 3085, 120: 3107},
    ("embedding", 4096): {90: 176},
    ("embedding_norm", 4096): {90: 1347},
    ("embedding_norm", 16384): {90: 2358, 100: 1934},
    ("gelu", 768): {90: 1001},
    ("gelu", 4096): {80: 1016, 89: 1017, 90: 994, 100: 885, 120: 1006},
    ("gelu", 16384): {90: 1040, 100: 894, 120: 1049},
    ("gelu rotated", 4096): {90: 1154},
    ("gelu rotated", 16384): {90: 1197, 100: 1117},
    ("gelu tanh", 4096): {90: 1162},
    ("silu_mul", 768): {90: 1024},
    ("silu_mul", 4096): {80: 1050, 89: 1049, 90: 1048, 100: 939, 120: 1062},
    ("silu_mul", 16384): {90: 1062, 100: 949, 120: 1077},
    ("silu_mul rotated", 4096): {90: 1263},
    ("silu_mul rotated", 16384): {90: 1281, 100: 1220},
    ("softmax", 4096): {80: 867, 90: 882, 100: 753},
    ("softmax", 16384): {90: 899},
    ("softmax causal", 4096): {90: 995},
    ("softmax masked, token-wise", 4096): {90: 651},
    ("int4", 4096): {90: 555},
    ("int4 rotated", 4096): {90: 715},
    ("int4 rotated", 16384): {90: 1282, 100: 1189},
    ("fp8", 4096): {90: 752},
    ("fp8", 16384): {90: 1420},
    ("gelu static", 4096): {80: 1117, 90: 1084, 100: 1022},
    ("silu_mul static", 4096): {90: 1138},
    ("static", 4096): {80: 684, 90: 667, 100: 600},
    ("static, one scale", 4096): {90: 544},
    ("static fp8", 4096): {90: 693},
    ("dequantize", 4096): {90: 273},
    ("dequantize rotated", 4096): {90: 421},
}
# Bytes that a thread stores and loads again, of the longest rows: they barely fit into half of the registers there are.
SPILLED = {
    (100, "embedding_norm", 16384): (16, 16),
    (100, "int4 rotated", 16384): (8, 12),
    (100, "silu_mul rotated", 16384): (8, 12),
    (100, "gelu rotated", 16384): (8, 12),
    (90, "int8_layer_norm", 16384): (8, 8),
    (100, "add_rms_norm rotated", 16384): (12, 16),
    (100, "int8_layer_norm rotated", 16384): (12, 16),
    (120, "layer_norm", 16384): (12, 12),
}
CASES = [(architecture, *kernel) for kernel, counts in INSTRUCTIONS.items() for architecture in counts]


def compiled(architecture: int, name: str, k: int) -> Report:
    with offline_gpu(architecture) as gpu:
        KERNELS[name][0](k)
    (launch,) = gpu.launches
    return report(launch)


def check(seen: Report, name: str, k: int) -> None:
    assert seen.count("LDG.128") > 0 and seen.count("LDG") - seen.count("LDG.128") == KERNELS[name][1]
    row_scales = 0 if name in OF_TILES or name == "embedding" else 1
    assert seen.count("STG.128") > 0 and seen.count("STG") - seen.count("STG.128") == row_scales
    assert (seen.spill_stores, seen.spill_loads) == SPILLED.get((seen.architecture, name, k), (0, 0))
    assert seen.occupancy.blocks >= 2
    assert seen.shared <= 16 * 1024 + 64, (
        "a tile of floats passes through shared memory to be stored, nothing else does"
    )
    assert not seen.loops, "what is read is read once"
    assert seen.instructions <= 1.1 * INSTRUCTIONS[name, k][seen.architecture]


@pytest.mark.parametrize(("architecture", "name", "k"), CASES)
def test_kernel(architecture, name, k):
    check(compiled(architecture, name, k), name, k)


@pytest.mark.parametrize("name", ["add_layer_norm", "int8_layer_norm rotated", "gelu"])
def test_float16(name, monkeypatch):
    monkeypatch.setitem(globals(), "HALF", torch.float16)
    check(compiled(90, name, 4096), name, 4096)
