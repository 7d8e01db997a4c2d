"""What differs between ONNX Runtime's targets: attention as one operator, signed integers for CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("onnxruntime")
from tests.lowering.test_onnx import Calls, fused_program, hard_rows, run
from zq_compiler import kernels, numerics
from zq_compiler.lowering.onnx import export

HEADS = {"same": (4, 4), "grouped": (4, 2)}
MASKS: dict[str, Any] = {
    "none": None,
    "padding": lambda b, t, s: torch.arange(s).expand(b, 1, 1, s) < torch.tensor([s, s - 2])[:, None, None, None],
    "wholly masked rows": lambda b, t, s: (torch.arange(s) < torch.arange(t)[:, None]).expand(b, 1, t, s),
    "added": lambda b, t, s: torch.randn(1, 4, t, s),
    "two dimensions": lambda b, t, s: torch.ones(t, s, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", [*MASKS, "causal"])
def test_attention_is_one_operator_with_torchs_result(tmp_path: Path, kind: str, heads: str) -> None:
    causal, made = kind == "causal", MASKS.get(kind)
    h, h_kv = HEADS[heads]

    def attend(_: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        given = mask[0] if mask else None
        return F.scaled_dot_product_attention(q, k, v, given, is_causal=causal, scale=0.3, enable_gqa=h != h_kv)

    def inputs(t: int, s: int) -> list[Tensor]:
        torch.manual_seed(t)
        qkv = [torch.randn(2, h, t, 16), torch.randn(2, h_kv, s, 16), torch.randn(2, h_kv, s, 16)]
        return qkv if made is None else [*qkv, made(2, t, s)]

    module, example = Calls(attend), inputs(5, 5)
    lengths = [[i for i in range(x.dim()) if x.shape[i] == 5] for x in example]
    report = export(fused_program(module, *example, dynamic=lengths), tmp_path / "attention.onnx")
    assert report.nodes["MultiHeadAttention"] == 1 and "Softmax" not in report.nodes
    for t in (5, 9):
        call = inputs(t, t)
        want = module(*call)
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            (got,) = run(report.path, level, *call)
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


def test_cuda_reads_signed_integers(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has kernels for both signs, so the same integers can be seen here."""
    torch.manual_seed(0)
    w_q, w_scale = numerics.quantize_per_channel(torch.randn(24, 48))

    def linear(m: Any, x: Tensor) -> Tensor:
        q, scale = torch.ops.zq.quantize_per_token(x)
        return torch.ops.zq.int8_linear(q, scale, m.w_q, m.w_scale, None, torch.float32)

    program = fused_program(Calls(linear, w_q=w_q, w_scale=w_scale), torch.randn(2, 3, 48))
    report = export(program, tmp_path / "linear.onnx", target="onnxruntime-cuda")
    x = hard_rows(2, 5, 48)[:, None]
    q, scale = numerics.quantize_per_token(x)
    want = kernels.reference_of(kernels.int8_linear)(q, scale, w_q, w_scale, None, torch.float32)
    got, integers = run(report.path, "ORT_ENABLE_ALL", x, extra=["QuantizeLinear"])
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(integers, q.numpy())
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_cuda_has_the_probabilities_of_the_reference(tmp_path: Path, per_head: bool, static: bool) -> None:
    torch.manual_seed(0)

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = torch.ones(1, 1, 1, 1)
        q, k, v = (torch.ops.zq.quantize_static(x, one) for x in (q, k, v))
        probabilities = m.probabilities if static else None
        return torch.ops.zq.int8_attention(q, k, v, m.score, None, False, probabilities, m.out, torch.float32)

    scales = {"score": 1e-3, "probabilities": 1 / 255, "out": 0.01}
    constants = {name: torch.full((1, 1, 1, 1), value) for name, value in scales.items()}
    constants["score"] = torch.tensor([1.0, 0.5, 2.0, 1.5])[:, None, None] * 1e-3 if per_head else constants["score"]
    module = Calls(attend, **constants)
    inputs = [torch.randint(-127, 128, (2, 4, 6, 16)).float() for _ in range(3)]
    program = fused_program(module, *inputs, dynamic=[(0, 2)] * 3)
    got = [
        run(export(program, tmp_path / f"{target}.onnx", target=target).path, "ORT_ENABLE_ALL", *inputs)[0]
        for target in ("onnxruntime", "onnxruntime-cuda")
    ]
    np.testing.assert_array_equal(*got)
    np.testing.assert_allclose(got[0], module(*inputs).numpy(), rtol=1e-5, atol=0.02)  # at most a step of a probability
