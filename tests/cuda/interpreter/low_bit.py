"""What tests of low-bit linears share: tiles, and weights in every format."""

import torch

from zq_compiler.formats import FORMATS, pack

TILES = {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 2, "SPLIT_K": 1, "num_warps": 4, "num_stages": 2}
LARGE = {**TILES, "BLOCK_M": 256}
SPLIT = {**TILES, "SPLIT_K": 2}


def weight(n, k, name, group, seed=0):
    """`w_packed` and `w_scale` of the dialect: random codes, of which a row has all, and scales of several sizes."""
    torch.manual_seed(seed)
    fmt = FORMATS[name]
    known = torch.tensor([code for code, value in enumerate(fmt.values) if value == value], dtype=torch.uint8)
    codes = known[torch.randint(len(known), (n, k))]
    codes[0] = known[torch.arange(k) % len(known)]
    scale = torch.rand(n, -(-k // group) if group else 1) * 0.03 + 1e-3
    if group:
        scale = scale.half()
        scale[0, -1], scale[-1, 0] = 3e-6, 6e-8  # subnormal
    if fmt.asymmetric:
        zero = torch.randint(int(fmt.range[0]), int(fmt.range[1]) + 1, scale.shape)
        scale = torch.cat([scale, zero.to(scale.dtype)], 1)
    return pack(codes, fmt.bits).contiguous(), scale
