"""GeMM of INT4 weights and INT8 activations (W4A8): `group_products` of integers, bit for bit the reference's.

A group's sum is exact, the sum over groups in their order, so that no parts of K are summed apart, but of whole rows,
whose sums are integers. Reads M*K + N*K/2 bytes (of two bits N*K/4) and the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .group_products import group_products
from .registration import cuda_op, leading
from .weight_layouts import layout_of, pack, signed_codes


def pack_w4a8(w_packed: Tensor, w_scale: Tensor, format: str, group: int, features: int) -> tuple[Tensor, Tensor]:
    """A weight of the dialect op in the kernel's layout: codes `[N, ...]` uint8 and scales `[G, N]`."""
    codes = signed_codes(w_packed, format, features)
    return pack(codes, layout_of(format, group, word=8)), w_scale.t().contiguous()


def _fake(
    x_q: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, group: int,
    out_dtype: torch.dtype, *branch: Tensor | None,
) -> Tensor:  # fmt: skip
    return x_q.new_empty(leading(x_q, codes.shape[0]), dtype=out_dtype)


@cuda_op(_fake)
def w4a8_linear(
    x_q: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    group: int,
    out_dtype: torch.dtype,
    hidden: Tensor | None = None,
    u: Tensor | None = None,
    u_scale: Tensor | None = None,
) -> Tensor:
    """`zq::w4a8_linear` of what `pack_w4a8` made of the weight, and a low-rank branch added.

    Args:
        hidden: `[..., r]` of `out_dtype`, what the branch's ranks see of x (see `low_rank_hidden`); None for no branch.
        u, u_scale: as `low_rank_linear` takes them.

    The other arguments are the dialect op's.
    """
    branch = hidden, u, u_scale
    return group_products("w4a8_linear", x_q, x_scale, codes, scale, bias, format, group, out_dtype, branch)
