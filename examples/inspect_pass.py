"""See what a pass does: the graph before and after it, line by line, and the rewrites it did not make, with reasons."""

from __future__ import annotations

import difflib
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import zq_compiler as zq

PASS = "fuse_memory_bound"


class Block(nn.Module):
    """A residual block; its GELU's output is read twice, so the quantize after it cannot simply swallow the GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(hidden), hidden.mean(-1)


def main() -> None:
    """Quantize with `dump`, and compare two of the files."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quantized = zq.quantize(Block().eval(), torch.randn(2, 8, 64), dump=folder)
        dumps = sorted(Path(folder).iterdir())
        print("dumped:", *(path.name for path in dumps))
        index = next(i for i, path in enumerate(dumps) if path.stem.endswith(PASS))
        before, after = (path.read_text().splitlines() for path in dumps[index - 1 : index + 1])
    print(f"\n--- what {PASS} changed")
    changed = difflib.unified_diff(before, after, lineterm="", n=0)
    print("\n".join(line for line in changed if not line.startswith(("---", "+++", "@@"))))

    print("\n--- rewrites that almost applied")
    for miss in quantized.program.near_misses:
        print(f"{miss.rule} at {miss.node}: {miss.reason}")

    print("\n--- all passes")
    for record in quantized.program.history:
        print(f"{record.name:20} {record.changes:3} changes  {record.seconds * 1000:6.1f} ms")


if __name__ == "__main__":
    main()
