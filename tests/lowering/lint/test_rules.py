"""Every rule finds its bad graph and leaves the good one alone; and the runtime itself shows that the rule is true."""

from __future__ import annotations

import collections
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import zq_compiler as zq
from tests import onnx_runtime, tensorrt_rtx
from tests.lowering.lint.cases import CASES, Case
from zq_compiler.lowering.lint import TARGETS
from zq_compiler.lowering.lint.rules import RULES

ort = pytest.importorskip("onnxruntime")
BY_ID = {rule.id: rule for rule in RULES}
# What no test here can show: it is about accuracy, time, the file's size, or a machine that is not here.
STATED = {
    *("QDQ005", "QDQ006", "TRT028", "TRT030", "ORT010", "ORT023", "ORT025"),
    *("CUDA001", "CUDA002", "CUDA003", "CUDA004"),
}
PROVEN = [case for case in CASES if case.rule not in STATED]


def rules_of(model: onnx.ModelProto, target: str) -> set[str]:
    return {finding.rule for finding in zq.lint(model, target).findings}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_finds_what_breaks_it_and_nothing_else(case):
    onnx.checker.check_model(case.bad())  # not even an invalid file
    assert case.rule in rules_of(case.bad(), case.target)
    assert case.rule not in rules_of(case.good(), case.target)


def test_every_rule_has_cases_for_all_its_targets():
    assert len(BY_ID) == len(RULES) >= 50
    assert len({rule.name + rule.id[:3] for rule in RULES}) == len(RULES)
    assert {(c.rule, c.target) for c in CASES} == {(r.id, target) for r in RULES for target in r.targets}


def test_a_rule_without_proof_states_its_source():
    assert {rule.id for rule in RULES if rule.source} == STATED
    assert all(case.proof for case in PROVEN) and not any(case.proof for case in CASES if case.rule in STATED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_says_what_and_how_to_mend_it(rule):
    assert rule.title.endswith(".") and rule.mend and not rule.mend.endswith(".")
    assert rule.targets and set(rule.targets) <= set(TARGETS)


# --- TensorRT ---------------------------------------------------------------------------------------------------------


@functools.cache
def built(model: bytes) -> tensorrt_rtx.Build:
    return tensorrt_rtx.build(model)


@pytest.mark.skipif(bool(tensorrt_rtx.MISSING), reason=tensorrt_rtx.SKIP_REASON)
@pytest.mark.parametrize("case", [c for c in PROVEN if c.target == "tensorrt"], ids=str)
def test_tensorrt_does_what_the_rule_says(case: Case):
    bad, good = (built(model().SerializeToString()) for model in (case.bad, case.good))
    assert good.built, good
    if case.proof == "refused":
        assert not bad.built
        return
    assert bad.built, bad
    counts = {
        "int8_gemms": lambda b: b.int8_gemms,
        "int8_mhas": lambda b: b.int8_mhas,
        "half_mhas": lambda b: b.half_mhas,
        "fp8_mhas": lambda b: len(b.mhas("FP8")),
    }
    if case.proof in counts:
        count = counts[case.proof]
        assert count(bad) == 0 and count(good) == 1
    elif case.proof == "warned":
        assert any("UINT8" in warning for warning in bad.warnings)
        assert not any("UINT8" in warning for warning in good.warnings)
    elif case.proof == "dequantizes":  # ahead of the product, in a kernel of its own, rather than inside
        lone = [[k for k in b.kernels if k.kind == "other" and {"Int8", "Int4"} & {*k.constants}] for b in (bad, good)]
        assert len(lone[0]) == 1 and lone[1] == []
    else:
        assert case.proof == "accepted"  # as INT8, for all that is wrong
        assert bad.int8_gemms == good.int8_gemms == 1


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def optimized(model: onnx.ModelProto | Path, folder: Path) -> collections.Counter[str]:
    """How many of each operator ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def run(model: onnx.ModelProto, session: Any = None) -> np.ndarray:
    """The first output for random inputs, dynamic dimensions being 3; in a plain session unless one is given."""
    session = session or ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    inputs = {
        x.name: random.standard_normal([d if isinstance(d, int) else 3 for d in x.shape]).astype(types[x.type])
        for x in session.get_inputs()
    }
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("case", [c for c in PROVEN if c.target != "tensorrt"], ids=str)
def test_onnxruntime_does_what_the_rule_says(case: Case, tmp_path: Path):
    """The rules that hold for CUDA too are about the file, so the CPU shows them as well."""
    if case.proof == "refused":
        run(case.good())
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            run(case.bad())
    elif case.proof == "finite":
        assert np.isfinite(run(case.good())).all()
        bad = run(case.bad())
        assert np.isnan(bad).any() or not bad.any()
    elif case.proof == "exact":  # optimized as not optimized
        for model, same in ((case.good(), True), (case.bad(), False)):
            levels = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
            plain, fused = (run(model, onnx_runtime.session(model.SerializeToString(), level)) for level in levels)
            assert (np.abs(plain - fused).max() < 1e-4 * np.abs(plain).max()) == same
    else:
        bad, good = optimized(case.bad(), tmp_path), optimized(case.good(), tmp_path)
        assert bad[case.proof] == 0 and good[case.proof] >= 1
