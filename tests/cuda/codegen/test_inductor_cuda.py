"""What Inductor writes for a quantized BERT layer on GPUs that are not there: our ops, and kernels between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


def compiled(*options: str) -> dict[str, Any]:
    """In a process of its own, which believes in the GPU."""
    command = [sys.executable, "-m", "benchmarks.inductor_cuda", "--hidden", "128", "--rows", "32", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def kernels(found: dict[str, Any], *words: str) -> list[str]:
    """Inductor's kernels that compute something of each word, each with a cubin."""
    assert all(size > 1000 for size in found["kernels"].values())
    return [name for name in found["kernels"] if all(word in name for word in words)]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_w8a8(architecture):
    found = compiled("--recipe", "w8a8", "--architecture", architecture)
    ours = dict(quantize_per_token=2, int8_linear=5, int8_linear_add=1, norm_quantize=1, gelu_quantize=1)
    assert found["ours"] == ours
    assert found["others"] == {"bmm": 2}, "the attention's two products, in floats"
    assert len(kernels(found, "softmax")) == 1
    assert len(kernels(found, "native_layer_norm")) == 1, "the last norm is not quantized"
    assert not kernels(found, "gelu") and not kernels(found, "amax")


def test_hero_m3_leaves_nothing_but_its_ends():
    found = compiled("--recipe", "hero-m3", "--architecture", "90")
    ours = dict(
        quantize_per_token=1, int8_linear_quantize=5, int8_attention=1, norm_quantize=1, int8_linear_gelu_quantize=1
    )
    assert found["ours"] == ours
    assert found["others"] == {}
    assert kernels(found) == kernels(found, "add"), "the last residual is dequantized, added and normalised"
    assert kernels(found, "native_layer_norm")


def test_below_compute_capability_8_9_inductor_quantizes_to_fp8():
    found = compiled("--recipe", "fp8", "--architecture", "80")
    assert found["ours"] == {"fp8_linear": 6}
    assert len(kernels(found, "abs", "amax")) == 4, "each quantize, fused with what it reads"
    assert kernels(found, "gelu", "amax") and kernels(found, "native_layer_norm", "amax")


def test_without_kernels_everything_is_inductors():
    found = compiled("--recipe", "w8a8-plain", "--architecture", "90", "--inline")
    assert found["ours"] == {}
    assert found["others"] == {"_int_mm": 6, "bmm": 2}
    assert kernels(found, "amax") and kernels(found, "gelu")
