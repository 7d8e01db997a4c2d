"""What kernels share, as functions on tiles in registers. All of it is float32.

Kernels are launched with `**EXACT`: no product and sum are contracted to one rounding unless the code says `tl.fma`,
so that integers are those of the reference wherever only sums of integers and correctly rounded steps lie between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...numerics import AMAX_FLOOR, FP8_STEP, INT4_STEP, INT8_STEP

EXACT = {"enable_fp_fusion": False}
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves a rounded integer in a float's lowest bits
_STEP = tl.constexpr(INT8_STEP)
_INT4_STEP = tl.constexpr(INT4_STEP)
_FP8_STEP = tl.constexpr(FP8_STEP)
_FLOOR = tl.constexpr(AMAX_FLOOR)
FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def divide(x, divisor, reciprocal):
    """The correctly rounded x / divisor, by its rounded reciprocal (Markstein 1990): what torch divides to.

    Three instructions where a division takes ten. Holds where the quotient and the reciprocal are normal numbers.
    """
    q = x * reciprocal
    return tl.fma(tl.fma(q, -divisor, x), reciprocal, q)  # -divisor: of rows, not of elements


@triton.jit
def round_to_int8(x):
    """Half to even, of what lies within [-128.5, 127.5]; without a conversion, which runs at a quarter of the rate."""
    return (x + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def round_to_uint8(x):
    """Half to even, of what lies within [-0.5, 255.5]."""
    return (x + _MAGIC).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def saturate_to_int8(x):
    """Half to even, saturated to [-128, 127]; NaN is 0."""
    clamped = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return round_to_int8(tl.where(x == x, clamped, 0.0))


@triton.jit
def saturate_to_fp8(x):
    """E4M3, half to even, saturated to [-448, 448]; NaN is 0. Compiles from sm_89 on."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), 0.0).to(tl.float8e4nv)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as a tensor of DTYPE between two ops would hold it."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def row_steps(y, STEP: tl.constexpr):
    """`(y / range) / STEP` of a tile `[M, K]` whose rows are whole, zeros where there is no feature.

    Returns the steps, zeros in a row with NaN or Inf, and `scale [M]`, NaN there. The range is the largest of the
    magnitudes' bits, as integers: Inf and NaN exceed all finite ones, where a maximum of floats would lose NaN.
    """
    bits = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = bits < 0x7F800000
    amax = tl.where(finite, tl.maximum(bits.to(tl.float32, bitcast=True), _FLOOR), 1.0)
    reciprocal = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), amax)
    steps = divide(divide(y, amax[:, None], reciprocal[:, None]), STEP, 1.0 / STEP)
    return tl.where(finite[:, None], steps, 0.0), tl.where(finite, amax * STEP, float("nan"))


@triton.jit
def quantize_rows(y):
    """`numerics.quantize_per_token` of whole rows: `q [M, K]` int8 and `scale [M]`."""
    steps, scale = row_steps(y, _STEP)
    return round_to_int8(steps), scale


@triton.jit
def quantize_rows_int4(y):
    """`numerics.quantize_per_token_int4` of whole rows: `q [M, K]` int8 in [-7, 7] and `scale [M]`."""
    steps, scale = row_steps(y, _INT4_STEP)
    return round_to_int8(steps), scale


@triton.jit
def quantize_rows_fp8(y):
    """`numerics.quantize_per_token_fp8` of whole rows: `q [M, K]` float8e4nv and `scale [M]`."""
    steps, scale = row_steps(y, _FP8_STEP)
    return saturate_to_fp8(steps), scale


@triton.jit
def static_steps(y, scale, reciprocal):
    """The correctly rounded y / scale where that is at most 1024 in size, beyond it something beyond; all broadcast."""
    q = tl.minimum(tl.maximum(y * reciprocal, -1024.0), 1024.0)  # an infinite quotient has no remainder
    return tl.fma(tl.fma(q, -scale, y), reciprocal, q)


@triton.jit
def quantize_static(y, scale, reciprocal):
    """`numerics.quantize_static`, given the scale's rounded reciprocal; all of them broadcast."""
    return saturate_to_int8(static_steps(y, scale, reciprocal))


@triton.jit
def rotate(x, M: tl.constexpr, K: tl.constexpr):
    """`numerics.rotate` of a tile `[M, K]`: the same sums and differences in the same order."""
    for stage in tl.static_range(4):
        pairs = tl.permute(tl.reshape(x, (M, K // (2 << stage), 2, 1 << stage)), (0, 1, 3, 2))
        first, second = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (M, K))
    return x * 0.25


@triton.jit
def exp(x):
    """What tl.exp computes, without the three instructions that it takes for results under 2^-126: these are 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def normal_cdf(x):
    """Phi(x), for a third of the instructions of an error function, whose tail cancels.

    Phi(-t) = 2^p(t) for t >= 0, where p is of degree 8: the minimax fit of log2 Phi(-t) on [0, 6] that makes t Phi(-t)
    accurate, relatively above 0.02 and absolutely below. Beyond 6 it falls on.
    """
    t = tl.abs(x)
    p = tl.fma(t, -1.4258520e-06, 2.1744358e-05)
    p = tl.fma(p, t, -9.8159922e-05)
    p = tl.fma(p, t, -3.6166119e-04)
    p = tl.fma(p, t, 7.3757800e-03)
    p = tl.fma(p, t, -5.2728031e-02)
    p = tl.fma(p, t, -4.5912498e-01)
    p = tl.fma(p, t, -1.1511165)
    p = tl.fma(p, t, -0.99999976)
    tail = tl.exp2(p)
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU by the normal distribution or, as torch approximates it, by tanh."""
    if TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + exp(-2.0 * inner))  # x * (1 + tanh(inner)) / 2
    return x * normal_cdf(x)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + exp(-x))
