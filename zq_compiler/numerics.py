"""The arithmetic of quantization, in plain torch: the one definition that every lowering agrees with.

Rounding is half to even. Quantizing divides by the scale (ONNX does; multiplying by a reciprocal differs by
one step now and then). Scales are float32 whatever the tensor's dtype. INT8 is symmetric, [-127, 127].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formats import Format, format_of, pack, unpack

INT8_MAX = 127
INT8_STEP = torch.tensor(1.0 / 127.0, dtype=torch.float32).item()  # 1/127 rounded to float32, once
FP8_STEP = torch.tensor(1.0 / 448.0, dtype=torch.float32).item()  # of E4M3, whose largest value is 448
INT4_STEP = torch.tensor(
    1.0 / 7.5, dtype=torch.float32
).item()  # its reciprocal is just under 7.5, which rounds to 7: both ends are half a step off
SCALE_CONSTRAINTS = ("none", "pow2", "group_pow2")
SCALE_ROUNDINGS = ("ceil", "nearest", "floor")
MAX_SHIFT = 8  # of scales under a constraint, from the largest of a row: E4M3 holds E2M1 values times 2^-8
WHOLE = -1  # in place of a group's size: all of a weight
ROTATION = 16  # features that one rotation mixes
AMAX_FLOOR = 1e-12  # an all-zero row quantizes to zeros with this range, never to 0/0


def row_range(x: Tensor) -> Tensor:
    """Largest magnitude of each row, floored at `AMAX_FLOOR`; NaN for a row that holds NaN or Inf.

    Args:
        x: `[..., K]`, any float dtype.

    Returns:
        `[..., 1]` float32.
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    # (amax - amax) is 0 for a finite row, NaN otherwise: a poisoned row must not become plausible numbers.
    return amax.clamp(min=AMAX_FLOOR) + (amax - amax)


def rotate(x: Tensor) -> Tensor:
    """Walsh-Hadamard rotation of each block of 16 features (QuaRot, 2404.00456), orthonormal and its own inverse.

    It spreads an outlier over its block, so that a row's range is set by many features instead of one. Rotating both
    operands of a product leaves the product as it is. Sums and differences only, in a fixed order, and a quarter.

    Args:
        x: `[..., K]` float, K a multiple of 16.

    Returns:
        `[..., K]` float32.

    >>> rotate(torch.eye(16)[0]).tolist() == [0.25] * 16
    True
    """
    blocks = x.float().unflatten(-1, (-1, ROTATION))
    y = blocks.reshape(-1, ROTATION).t()  # what is added lies along whole rows
    for half in (1, 2, 4, 8):
        first, second = y.unflatten(0, (-1, 2, half)).unbind(1)
        y = torch.stack((first + second, first - second), 1).flatten(0, 2)
    return (y.t() * 0.25).contiguous().reshape(x.shape)


def quantize_per_token(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Token-wise symmetric INT8 with the range taken at run time (TWQ; ZeroQuant, section 4).

    `a = max(|row|)`, `q = round((x / a) / (1/127))`, `scale = a * (1/127)`, all in float32. The normalised form
    is the one that TensorRT, ONNX Runtime and a kernel can all compute alike.

    Args:
        x: `[..., K]`, any float dtype.
        rotated: quantize `rotate(x)` instead of x.

    Returns:
        `q [..., K]` int8 in [-127, 127] and `scale [..., 1]` float32, real value per step. A row with NaN or
        Inf gets a NaN scale and zeros.

    >>> q, scale = quantize_per_token(torch.tensor([[1.0, -0.5, 0.25]]))
    >>> q.tolist()
    [[127, -64, 32]]
    """
    x = rotate(x) if rotated else x
    a = row_range(x)
    q = (x.float() / a / INT8_STEP).round()
    return torch.nan_to_num(q, nan=0.0).to(torch.int8), a * INT8_STEP


def quantize_per_channel(w: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Symmetric INT8 weights, one scale per output channel (row): `q = round(w / s)`, `s = max(|row|) / 127`.

    Args:
        w: `[..., N, K]` or `[N, K]`, any float dtype, finite.
        rotated: quantize `rotate(w)` instead of w.

    Returns:
        `q` int8 of the same shape, in [-127, 127], and `scale [..., N, 1]` float32.
    """
    w = rotate(w) if rotated else w
    scale = w.abs().amax(-1, keepdim=True).float().clamp(min=AMAX_FLOOR) / INT8_MAX
    return (w.float() / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def quantize_weight(
    w: Tensor,
    format: str,
    group: int = 0,
    rotated: bool = False,
    scale_constraint: str = "none",
    scale_rounding: str = "ceil",
) -> tuple[Tensor, Tensor]:
    """A weight in a few bits, `code = nearest(w / s)` (ZeroQuant, 2206.01861, section 3; ZeroQuant-V2's fine-grained
    quantization, 2303.08302): `s` is the least by which a group lies within `Format.reach`, for INT4 the larger of
    `max(group) / 7.5` and `-min(group) / 8`; for binary and ternary, a mean of magnitudes (XTC, 2206.01859).

    Args:
        w: `[N, K]`, any float dtype, finite.
        format: one of `formats.FORMATS`.
        group: input features that share a scale, the last group with what is left; 0 for a whole row, `WHOLE` for all
            rows, which then have the same.
        rotated: quantize `rotate(w)` instead of w.
        scale_constraint, scale_rounding: see `constrained_scales`.

    Returns:
        `packed [N, ceil(K * bits / 8)]` uint8, and scales: float32 `[N, 1]` of rows, float16 `[N, ceil(K / group)]` of
        groups, rounded up before codes are chosen; Inf where float16 cannot hold one. Of an asymmetric format, whose
        grid reaches from the least to the largest of a group and zero, as many zero points lie behind the scales.

    >>> packed, scale = quantize_weight(torch.tensor([[7.5, -8.0, 1.0, 0.0]]), "int4", group=2)
    >>> unpack(packed, 4, 4).tolist(), scale.tolist()
    ([[7, 8, 7, 0]], [[1.0, 0.1334228515625]])
    """
    fmt, w = format_of(format), rotate(w) if rotated else w.float()
    whole, group = group == WHOLE, max(group, 0)
    groups = _grouped(w.reshape(1, -1) if whole else w, group)
    scale = _group_scale(groups, fmt, w.numel() if whole else w.shape[1])
    if group:
        half = scale.to(torch.float16)
        scale = (half.view(torch.int16) + (half.float() < scale)).view(torch.float16)
    if scale_constraint != "none":
        scale = constrained_scales(scale.float(), scale_constraint, scale_rounding).to(scale.dtype)
    places = groups / scale.float()[..., None]
    if fmt.asymmetric:
        zero = (fmt.range[0] - places.amin(-1).clamp(max=0)).round().clamp(*fmt.range)
        places, scale = places + zero[..., None], torch.cat([scale, zero.to(scale.dtype)], 1)
    codes = fmt.encode(places)
    if whole:
        codes, scale = codes.reshape(w.shape), scale.expand(w.shape[0], -1).contiguous()
    return pack(codes.flatten(1)[:, : w.shape[1]], fmt.bits).contiguous(), scale


def scales_and_zeros(scale: Tensor, format: str) -> tuple[Tensor, Tensor | None]:
    """A weight's scales as they are stored, apart: `[N, G]` scales and zero points, None of a symmetric format."""
    if not format_of(format).asymmetric:
        return scale, None
    scale, zero = scale.chunk(2, 1)
    return scale, zero


def constrained_scales(scale: Tensor, constraint: str, rounding: str) -> Tensor:
    """Scales whose ratios in a row are powers of two, so that codes of another group of the row, and FP4 in FP8, are a
    shift of the exponent (ZeroQuant-FP, 2307.09782: M1 and M2).

        pow2        S' = 2^round(log2 S)                          (M1)
        group_pow2  S' = S_max * 2^round(log2(S / S_max))         (M2: S_max, the row's largest, stays)

    No scale is less than `2^-MAX_SHIFT` of its row's largest. S_max is rounded up by so many of float16's last places
    that float16 holds the others too, subnormal ones.

    Args:
        scale: `[N, G]` float32, positive, of values that float16 holds or Inf.
        constraint: `"pow2"` or `"group_pow2"`.
        rounding: of the scale itself: `"ceil"`, under which nothing saturates, `"nearest"` (of the logarithm), or
            `"floor"`, under which the largest of a group loses up to half of itself.

    Returns:
        `[N, G]` float32, exact in float16.

    >>> constrained_scales(torch.tensor([[1.5, 0.7, 0.4]]), "pow2", "ceil").tolist()
    [[2.0, 1.0, 0.5]]
    >>> constrained_scales(torch.tensor([[1.5, 0.7, 0.4]]), "group_pow2", "floor").tolist()
    [[1.5, 0.375, 0.375]]
    """
    if constraint == "pow2":
        scale = _power_of_two(scale, rounding)
        return torch.maximum(scale, scale.amax(-1, keepdim=True) * 2.0**-MAX_SHIFT)
    top = scale.amax(-1, keepdim=True)
    ratio = _power_of_two(scale / top, rounding).clamp(2.0**-MAX_SHIFT, 1.0)
    last_place = 2.0**-24 / ratio.amin(-1, keepdim=True)  # float16's, where the least scale has it
    return (top / last_place).ceil() * last_place * ratio


def _power_of_two(x: Tensor, rounding: str) -> Tensor:
    """`2^round(log2 x)`, without a logarithm: x is a mantissa in [1/2, 1) times a power of two."""
    mantissa, exponent = torch.frexp(x)
    stays = {"ceil": 0.5, "nearest": math.sqrt(0.5), "floor": 1.0}[rounding]
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa <= stays).int())


def dequantize_weight(
    packed: Tensor,
    scale: Tensor,
    format: str,
    group: int,
    features: int,
    dtype: torch.dtype = torch.float32,
    rotated: bool = False,
) -> Tensor:
    """The values of a weight that `quantize_weight` packed, multiplied in float32, rotated back where they were
    rotated: `[N, features]` of `dtype`."""
    fmt = format_of(format)
    groups = _grouped(fmt.decode(unpack(packed, fmt.bits, features)), group)
    scale, zero = scales_and_zeros(scale.float(), format)
    if zero is not None:
        groups = groups - zero[..., None]
    w = (groups * scale[..., None]).flatten(1)[:, :features]
    return (rotate(w) if rotated else w).to(dtype)


def _group_scale(groups: Tensor, fmt: Format, features: int) -> Tensor:
    """Of each group of `[N, G, group]`; the last has less than `group`.

    XTC's formats have the mean of what is not rounded to zero (2206.01859; ternary: what exceeds 0.7 of the mean).
    """
    most, least = groups.amax(-1).clamp(min=0), groups.amin(-1).clamp(max=0)
    low, high = fmt.reach
    if fmt.name in ("binary", "ternary"):
        size = groups.abs()
        count = torch.full_like(size[0, :, 0], groups.shape[-1])
        count[-1] = features - (groups.shape[1] - 1) * groups.shape[-1]
        scale = size.sum(-1) / count
        if fmt.name == "ternary":
            kept = size > 0.7 * scale[..., None]
            scale = (size * kept).sum(-1) / kept.sum(-1).clamp(min=1)
    elif fmt.asymmetric:
        scale = (most / 2 - least / 2) / fmt.half_span  # the whole may overflow
    else:
        scale = torch.maximum(most / high, least / low)
    return scale.clamp(min=AMAX_FLOOR / fmt.half_span)


def _grouped(w: Tensor, group: int) -> Tensor:
    """`[N, K]` as `[N, groups, group]`, the last one filled up with zeros."""
    group = group or w.shape[1]
    return torch.nn.functional.pad(w, (0, -w.shape[1] % group)).unflatten(1, (-1, group))


def quantize_per_token_int4(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Token-wise INT4 with the range taken at run time (W4A4; Understanding INT4 Quantization, 2301.12017).

    As `quantize_per_token` normalises: `q = round((x / a) / (1/7.5))`, `scale = a * (1/7.5)`: both ends are half a step
    off, which is the most that any value is.

    Args:
        x: `[..., K]`, any float dtype.
        rotated: quantize `rotate(x)` instead of x.

    Returns:
        `q [..., K]` int8 in [-7, 7] and `scale [..., 1]` float32. A row with NaN or Inf gets a NaN scale and zeros.

    >>> q, scale = quantize_per_token_int4(torch.tensor([[1.0, -1.0, 0.3]]))
    >>> q.tolist()
    [[7, -7, 2]]
    """
    x = rotate(x) if rotated else x
    a = row_range(x)
    q = (x.float() / a / INT4_STEP).round()
    return torch.nan_to_num(q, nan=0.0).to(torch.int8), a * INT4_STEP


def quantize_per_token_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Token-wise FP8 E4M3 with the range taken at run time (ZeroQuant-FP, 2307.09782).

    As `quantize_per_token` normalises: `q = e4m3((x / a) / (1/448))`, `scale = a * (1/448)`.

    Args:
        x: `[..., K]`, any float dtype.

    Returns:
        `q [..., K]` float8_e4m3fn and `scale [..., 1]` float32. A row with NaN or Inf gets a NaN scale and zeros.

    >>> q, scale = quantize_per_token_fp8(torch.tensor([[2.0, -1.0, 0.3]]))
    >>> q.float().tolist()
    [[448.0, -224.0, 64.0]]
    """
    a = row_range(x)
    q = torch.nan_to_num(x.float() / a / FP8_STEP, nan=0.0).clamp(-448, 448)
    return q.to(torch.float8_e4m3fn), a * FP8_STEP


def quantize_static_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """FP8 E4M3 with a scale known ahead of time: `q = e4m3(x / scale)`, saturated.

    Args:
        x: any shape, any float dtype.
        scale: float32 that broadcasts against x.

    Returns:
        float8_e4m3fn of x's shape. Inf saturates. NaN becomes 0: a static scale cannot carry it.

    >>> quantize_static_fp8(torch.tensor([0.3, -90.0]), torch.tensor([0.1])).float().tolist()
    [3.0, -448.0]
    """
    return torch.nan_to_num(x.float() / scale, nan=0.0).clamp(-448, 448).to(torch.float8_e4m3fn)


def quantize_static(x: Tensor, scale: Tensor, unsigned: bool = False) -> Tensor:
    """INT8 with a scale known ahead of time: `q = round(x / scale)`, saturated (SQ and FWQ of ZeroQuant-HERO).

    Args:
        x: any shape, any float dtype.
        scale: float32 that broadcasts against x: one element (SQ) or one a feature (FWQ).
        unsigned: the integers are [0, 255] instead of [-128, 127].

    Returns:
        int8, or uint8, of x's shape. Inf saturates. NaN becomes 0: a static scale cannot carry it.

    >>> quantize_static(torch.tensor([0.5, -9.0, 3.0]), torch.tensor([0.1, 0.01, 1.0])).tolist()
    [5, -128, 3]
    """
    low, high, dtype = (0, 255, torch.uint8) if unsigned else (-128, 127, torch.int8)
    return torch.nan_to_num((x.float() / scale).round(), nan=0.0).clamp(low, high).to(dtype)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, rotated: bool = False) -> Tensor:
    """`q * scale` in float32, rotated back where it was rotated, cast to `dtype`; `scale` broadcasts against `q`."""
    x = q.float() * scale
    return (rotate(x) if rotated else x).to(dtype)


def sqnr(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization-noise ratio in dB, over all elements; `inf` when equal, NaN when either is not finite.

    >>> sqnr(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    inf
    """
    signal = reference.detach().double()
    noise = signal - actual.detach().double()
    signal_power, noise_power = signal.square().sum().item(), noise.square().sum().item()
    if noise_power == 0:
        return math.inf
    if not math.isfinite(signal_power) or not math.isfinite(noise_power):
        return math.nan
    return 10 * math.log10(signal_power / noise_power) if signal_power > 0 else -math.inf
