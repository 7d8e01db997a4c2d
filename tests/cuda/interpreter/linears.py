"""Operands of INT8 linears, and tiles that their tests choose."""

import torch

TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "SPLIT_K": 1, "num_warps": 4, "num_stages": 3}
SPLIT = {**TILES, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "SPLIT_K": 2}


def force(monkeypatch, module, tiles):
    """Let a module's ops run with these tiles, as a row of a file would."""
    monkeypatch.setattr(module, "choose", lambda *_: dict(tiles))


def integers(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def operands(m, n, k, scale, bias, spread=1.0):
    """`x_q, x_scale, w_q, w_scale, bias` of a linear whose results are about `spread`."""
    torch.manual_seed(m * n * k)
    step = (spread / (73 * 73 * k**0.5)) ** 0.5
    x_scale = {"rows": step * (torch.rand(m, 1) + 0.5), "one": torch.tensor([[step]]), "none": None}[scale]
    w_scale = (step if scale != "none" else step**2) * (torch.rand(n, 1) + 0.5)
    b = None if bias is None else (spread * torch.randn(n)).to(bias)
    return integers(m, k), x_scale, integers(n, k), w_scale, b
