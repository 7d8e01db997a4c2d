"""The main job on the real all-MiniLM-L6-v2: 512 real sentences keep their embeddings in every lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zq_compiler
from benchmarks.minilm_accuracy import embed
from benchmarks.real_models import minilm, news_sentences
from tests import onnx_runtime

pytestmark = pytest.mark.slow
MEAN_COSINE, WORST_COSINE = 0.999, 0.998


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, list[str], Tensor]:
    tokenizer, model = minilm()
    sentences = news_sentences(512)
    with torch.no_grad():
        return tokenizer, model, sentences, embed(model, tokenizer, sentences)


def assert_close_to(case: tuple[Any, Any, list[str], Tensor], run: Callable[..., Any]) -> None:
    tokenizer, _, sentences, reference = case
    with torch.no_grad():
        cosine = (reference * embed(run, tokenizer, sentences)).sum(1)
    print(f"cosine mean {cosine.mean():.5f}, worst {cosine.min():.5f}")
    assert cosine.mean() >= MEAN_COSINE
    assert cosine.min() >= WORST_COSINE


def test_torch_compile(case):
    torch.compiler.reset()
    assert_close_to(case, torch.compile(case[1], backend="zeroquant", dynamic=True))


def test_onnx_runtime_and_size(case, tmp_path):
    pytest.importorskip("onnxruntime")
    tokenizer, model, sentences, _ = case
    q = zq_compiler.quantize(model, dict(tokenizer(sentences[:2], padding=True, return_tensors="pt")))
    path = tmp_path / "minilm.onnx"
    q.export_onnx(path, target="onnxruntime")
    assert abs(path.stat().st_size / q.report().bytes_after - 1) < 0.02
    session = onnx_runtime.session(path)
    names = [i.name for i in session.get_inputs()]

    def run(**batch: Tensor) -> list[Tensor]:
        return [torch.from_numpy(session.run(None, {n: batch[n].numpy() for n in names})[0])]

    assert_close_to(case, run)
