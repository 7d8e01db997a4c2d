"""The memory that calibration takes, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEMORY = """
import json, sys, torch
from torch import nn
from zq_compiler.calibration import Watch, collect
from zq_compiler.calling import CallingConvention
from zq_compiler.capture import capture_module
from zq_compiler.recipe import PRESETS

torch.set_num_threads(1)
form, count = sys.argv[1], int(sys.argv[2])

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(256, 64, generator=generator) * 10

def loop(model):
    for x in batches():
        model(x)

class Again:
    def __iter__(self):
        return batches()

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
program = capture_module(model, (next(batches()),), {}, PRESETS["w8a8"])
watches = [Watch(n.name, n, feature_bins=64) for n in program.graph.nodes if n.op in ("call_function", "placeholder")]
data = {"generator": batches(), "iterable": Again(), "forward_loop": loop}[form]
found = collect(program, CallingConvention.of(program), data, watches)
# Not getrusage: what it says is at least the peak of the process that started this one.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([peak, found.batches, found["gelu"].rows]))
"""


def peak_memory(form: str, count: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, form, str(count)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    peak, batches, rows = json.loads(done.stdout)
    assert (batches, rows) == (count, 256 * count)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("form", ["generator", "iterable"])
def test_memory_does_not_grow_with_the_number_of_batches(form):
    """Keeping only the inputs of a thousand batches would take 66 MB, more than 5 %."""
    few, many = peak_memory(form, 10), peak_memory(form, 1000)
    assert 0.05 * few < 1000 * 256 * 64 * 4
    assert many < 1.05 * few, (few, many)
