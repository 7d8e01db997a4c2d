"""Linear of FP8 E4M3 activations and weights that E4M3 holds: `group_products` of minifloats.

Tensor cores of E4M3 from sm_89 on, of float16 before: every E4M3 value is one. Products are exact; sums are float32 but
within the tensor cores, which keep fewer bits on sm_90, and are not left to sum more than 128 features.
Reads M*K + N*K*bits/8 bytes and the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import format_of, unpack
from .group_products import group_products
from .registration import cuda_op, leading
from .weight_layouts import layout_of, pack


def pack_fp8(
    w_packed: Tensor, w_scale: Tensor, format: str, group: int, features: int, architecture: int
) -> tuple[Tensor, Tensor]:
    """A weight of the dialect op in an architecture's layout: codes `[N, ...]`, int16 where the tensor cores multiply
    float16 and uint8 where they multiply E4M3, and scales `[G, N]`."""
    codes = unpack(w_packed, format_of(format).bits, features)
    return pack(codes, layout_of(format, group, 8 if architecture >= 89 else 16)), w_scale.t().contiguous()


def _fake(
    x_q: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, group: int,
    out_dtype: torch.dtype, *branch: Tensor | None,
) -> Tensor:  # fmt: skip
    return x_q.new_empty(leading(x_q, codes.shape[0]), dtype=out_dtype)


@cuda_op(_fake)
def fp8_linear(
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
    """`zq::fp8_linear` of what `pack_fp8` made of the weight, and a low-rank branch added.

    Args:
        hidden: `[..., r]` of `out_dtype`, what the branch's ranks see of x (see `low_rank_hidden`); None for no branch.
        u, u_scale: as `low_rank_linear` takes them.

    The other arguments are the dialect op's.
    """
    branch = hidden, u, u_scale
    return group_products("fp8_linear", x_q, x_scale, codes, scale, bias, format, group, out_dtype, branch)
