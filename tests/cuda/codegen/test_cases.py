"""The shapes of docs/kernels.md on every architecture: tiles that the formulas choose there spill nothing."""

from __future__ import annotations

import pytest

from benchmarks.kernel_cards import reports
from benchmarks.offline_gpu import ARCHITECTURES
from zq_compiler.analysis.kernel_cases import KernelCase, cases
from zq_compiler.kernels.cuda.matmul_configs import CHIPS

# Shapes between those that the kernels' own tests compile.
CASES = {
    f"{case.op} {case.shape}": case
    for case in cases()
    if case.op.endswith(("linear", "low_rank", "attention")) or case.op == "int8_linear_gelu_quantize"
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_spills(case: KernelCase, architecture: int) -> None:
    found = reports(case, architecture)
    assert found
    for launch in found:
        assert launch.spill_stores == launch.spill_loads == 0, launch
        assert launch.shared <= CHIPS[architecture].shared and launch.occupancy.blocks >= 1
