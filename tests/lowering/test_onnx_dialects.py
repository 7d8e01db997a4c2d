"""What differs between ONNX Runtime's targets: attention as one operator, signed integers for CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zq_compiler as zq
from tests.lowering.test_onnx import Calls, fused_program, hard_rows, run, session
from zq_compiler import kernels, numerics
from zq_compiler.lowering.onnx import export

onnx = pytest.importorskip("onnx")

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

    module = Calls(attend)
    # As in a model, heads are the second dimension of four; torch's own `heads` fixture keeps them dynamic: fix them.
    example = inputs(5, 5)
    dims = tuple(
        {i: torch.export.Dim.AUTO for i in (range(x.dim()) if x.dim() == 2 else (2,)) if x.shape[i] > 1} for x in example
    )
    if x4 := (example[3] if made is not None and example[3].dim() == 4 else None):
        dims = (*dims[:3], {i: torch.export.Dim.AUTO for i in (2, 3) if x4.shape[i] > 1})
    exported = torch.export.export(module.eval(), tuple(example), dynamic_shapes=(dims,), strict=False)
    from zq_compiler.capture import capture_exported
    from zq_compiler.program import Stage
    from zq_compiler.recipe import preset

    program = capture_exported(exported, preset("float"), (tuple(example), {}))
    program.stage = Stage.FUSED
    report = export(program, tmp_path / "attention.onnx")
    assert report.nodes["MultiHeadAttention"] == 1 and "Softmax" not in report.nodes
    for t in (5, 9):
        call = inputs(t, t)
        want = module(*call)
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            (got,) = run(report.path, level, *call)
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
