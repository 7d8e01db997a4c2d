"""Formats: every code's value, rounding against ml_dtypes and torch, packing against bits counted one by one."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zq_compiler import RecipeError
from zq_compiler.formats import FORMATS, format_of, from_planes, pack, packed_size, to_planes, unpack

# What others call the same grid. Casts of ml_dtypes and torch overflow to NaN or Inf where ours saturate.
PEERS = {
    "int4": ml_dtypes.int4,
    "int2": ml_dtypes.int2,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
MINIFLOATS = [name for name in FORMATS if name.startswith("fp")]
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def codes_of(name):
    return torch.arange(2 ** FORMATS[name].bits, dtype=torch.uint8)


@pytest.mark.parametrize("name", PEERS)
def test_every_code_has_the_value_that_ml_dtypes_gives_it(name):
    expected = codes_of(name).numpy().view(PEERS[name]).astype(np.float32)
    infinite = np.isinf(expected)  # E5M2's infinities are no numbers here
    ours = FORMATS[name].decode(codes_of(name)).numpy()
    assert np.array_equal(ours[~infinite], expected[~infinite], equal_nan=True)
    assert np.isnan(ours[infinite]).all()
    assert list(map(float, FORMATS[name].values)) == pytest.approx(ours.tolist(), nan_ok=True, abs=0)


def test_grids_that_ml_dtypes_lacks():
    assert FORMATS["fp4_e3m0"].values[:8] == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    assert FORMATS["int8"].range == (-127.0, 127.0) and math.isnan(FORMATS["int8"].values[128])
    assert FORMATS["int3"].values == (0.0, 1.0, 2.0, 3.0, -4.0, -3.0, -2.0, -1.0)
    assert FORMATS["ternary"].range == (-1.0, 1.0) and FORMATS["binary"].values == (1.0, -1.0)


@pytest.mark.parametrize("name", FORMATS)
def test_each_value_is_encoded_as_itself(name):
    fmt, codes = FORMATS[name], codes_of(name)
    values = fmt.decode(codes)
    known = ~torch.tensor(fmt.values).isnan()
    again = fmt.decode(fmt.encode(values[known]))
    assert torch.equal(again, values[known])  # -0.0 equals 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_picks_the_nearest_value_and_the_even_code_halfway(name):
    fmt = FORMATS[name]
    grid = sorted({v for v in fmt.values if not math.isnan(v)})
    halfway = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    around = [(np.float32(h), np.float32(to)) for h in halfway if h for to in (-math.inf, math.inf)]
    ulps = [float(np.nextafter(*pair)) for pair in around]
    x = torch.tensor([*grid, *halfway, *ulps, 2 * grid[0], 2 * grid[-1], 1e-30, -1e-30])
    codes = fmt.encode(x)
    for value, code in zip(x.tolist(), codes.tolist(), strict=True):
        distance = {c: abs(Fraction(v) - Fraction(value)) for c, v in enumerate(fmt.values) if not math.isnan(v)}
        nearest = min(distance.values())
        candidates = [c for c, d in distance.items() if d == nearest and not (fmt.values[c] == 0 and c)]
        assert code in candidates and (len(candidates) == 1 or code % 2 == 0), (value, code, candidates)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("seed", range(3))
def test_casts_equal_ml_dtypes_on_random_floats(name, seed):
    fmt = FORMATS[name]
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(seed)) * fmt.range[1] / 3
    x = torch.cat([x, x * 1e-3]).clamp(*fmt.range)  # within its range, where casts agree on what to do
    peer = x.numpy().astype(PEERS[name]) if name.startswith("fp") else x.round().numpy().astype(PEERS[name])
    assert np.array_equal(fmt.decode(fmt.encode(x)).numpy(), peer.astype(np.float32))


@pytest.mark.parametrize("name", TORCH)
def test_casts_are_torchs_float8_saturated(name):
    fmt = FORMATS[name]
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(1)) * fmt.range[1]
    codes = fmt.encode(x)
    expected = x.clamp(*fmt.range).to(TORCH[name])
    zero = expected.float() == 0
    assert torch.equal(codes[~zero], expected.view(torch.uint8)[~zero])
    assert (codes[zero] == 0).all()  # never -0: all-zero groups are zero bytes


@pytest.mark.parametrize("name", MINIFLOATS)
def test_reduced_precision_inputs_are_rounded_from_their_own_values(name):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(FORMATS[name].encode(x.to(dtype)), FORMATS[name].encode(x.to(dtype).float()))


@given(bits=st.integers(1, 8), rows=st.integers(1, 3), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_puts_bit_b_of_code_k_at_bit_k_times_bits_plus_b(bits, rows, count, seed):
    codes = torch.randint(2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_size(count, bits)) and packed.dtype is torch.uint8
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (k * bits) for k, code in enumerate(row))
        assert number == int.from_bytes(bytes(stored), "little")
    assert torch.equal(unpack(packed, bits, count), codes)


def test_four_bits_lie_as_onnx_has_them():
    import onnx

    values = torch.tensor([[3, -8, 7, -1], [0, 1, -2, 5]])
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, values.shape, values.flatten().tolist())
    raw = onnx.numpy_helper.to_array(tensor)
    codes = FORMATS["int4"].encode(values.float())
    assert np.array_equal(raw.astype(np.int8), values.numpy())
    again = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT4, dims=values.shape)
    again.raw_data = pack(codes, 4).numpy().tobytes()
    assert np.array_equal(onnx.numpy_helper.to_array(again), raw)


@pytest.mark.parametrize("count", [1, 4, 63, 64])
def test_planes_of_six_bits_round_trip(count):
    codes = torch.randint(64, (5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    high, low = to_planes(codes)
    assert high.shape == (5, packed_size(count, 2)) and low.shape == (5, packed_size(count, 4))
    assert torch.equal(from_planes(high, low, count), codes)
    assert (unpack(high, 2, count) >= 2).equal(FORMATS["fp6_e3m2"].decode(codes).signbit())


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(RecipeError, match="fp6_e3m2"):
        format_of("int5")
