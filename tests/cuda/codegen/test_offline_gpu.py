"""The GPUs that are not there: what is specialised, compiled, refused and noted for them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.errors import OutOfResources

from benchmarks.offline_gpu import ARCHITECTURES, LIMITS, Launch, occupancy, offline_gpu, report
from zq_compiler.kernels.cuda.matmul_configs import CHIPS


@triton.jit
def _copy(x_ptr, y_ptr, M, K, BLOCK: tl.constexpr):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * K + i
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=i < K), mask=i < K)


def copied(x: torch.Tensor, y: torch.Tensor | None = None, architecture: int = 90) -> Launch:
    with offline_gpu(architecture) as gpu:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if y is None else y
        _copy[x.shape[0], triton.cdiv(x.shape[1], 1024)](x, y, *x.shape, BLOCK=1024, num_warps=4)
    return gpu.launches[0]


def test_a_launch_is_noted_with_its_arguments_by_name():
    x, y = torch.randn(3, 2000), torch.zeros(3, 2000)
    launch = copied(x, y)
    assert (launch.kernel, launch.architecture, launch.grid, launch.programs) == ("_copy", 90, (3, 2, 1), 6)
    assert (launch.warps, launch.shared) == (4, 0)
    assert list(launch.arguments) == ["x_ptr", "y_ptr", "M", "K", "BLOCK"]
    assert [launch.arguments[name] for name in ("M", "K", "BLOCK")] == [3, 2000, 1024]
    assert launch.arguments["x_ptr"].shape == x.shape and launch.arguments["x_ptr"].is_meta
    assert not y.any(), "nothing may run"


def test_sizes_and_addresses_decide_how_wide_memory_is_read():
    read = {}
    for name, x in {
        "even": torch.empty(4, 2048),
        "odd": torch.empty(4, 2047),
        "shifted": torch.empty(1 + 4 * 2048)[1:].view(4, 2048),
        "on meta": torch.empty(4, 2048, device="meta"),
    }.items():
        seen = report(copied(x, torch.empty(x.shape, device=x.device)))
        read[name] = (seen.count("LDG.128"), seen.count("LDG"), seen.count("STG.128"))
    assert read["even"] == read["on meta"] == (2, 2, 2)
    assert read["odd"] == (0, 8, 0)
    assert read["shifted"] == (0, 8, 2)


def test_bytes_are_read_one_at_a_time_where_rows_are_odd():
    seen = report(copied(torch.empty(4, 1023, dtype=torch.int8)))
    assert (seen.count("LDG.8"), seen.count("STG.8")) == (8, 8)


@triton.jit
def _matmul(x_ptr, w_ptr, out_ptr, K, BLOCK: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    x_ptrs, w_ptrs = x_ptr + i[:, None] * K + k[None, :], w_ptr + i[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.int32)
    for _ in range(0, K, BLOCK):
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK
        w_ptrs += BLOCK
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], acc)


def multiplied(architecture: int, stages: int = 3) -> Launch:
    x, w = (torch.empty(128, 1024, dtype=torch.int8, device="meta") for _ in range(2))
    out = torch.empty(128, 128, dtype=torch.int32, device="meta")
    with offline_gpu(architecture) as gpu:
        _matmul[1,](x, w, out, 1024, BLOCK=128, num_warps=8, num_stages=stages)
    return gpu.launches[0]


@pytest.mark.parametrize(
    ("architecture", "instruction"), [(80, "IMMA"), (89, "IMMA"), (90, "IGMMA"), (100, "IMMA"), (120, "IMMA")]
)
def test_each_architecture_has_code_of_its_own(architecture, instruction):
    seen = report(multiplied(architecture))
    assert list(seen.tensor_cores) == [instruction]
    assert seen.count("LDGSTS.128") > 0 and seen.count("LDG", "LDL", "STL") == 0
    assert (seen.spill_stores, seen.spill_loads, seen.stack) == (0, 0, 0)
    loop = seen.loops[0]
    assert loop.count(instruction) == seen.count(instruction), "all products are in the loop"
    assert loop.instructions == loop.mix.total() < seen.instructions == seen.mix.total()


def test_a_kernel_that_asks_for_too_much_is_refused():
    assert CHIPS[89].shared < multiplied(90, stages=6).shared <= CHIPS[90].shared
    with pytest.raises(OutOfResources, match="shared memory"):
        multiplied(89, stages=6)
    with pytest.raises(OutOfResources, match="shared memory"):
        multiplied(89, stages=6)  # again, out of what Triton keeps


@triton.jit
def _all_at_once(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x * tl.sum(x))
    tl.store(y_ptr + BLOCK + i, x + tl.max(x))


def test_spills_are_reported():
    x = torch.empty(4096, device="meta")
    with offline_gpu(90) as gpu:
        _all_at_once[1,](x, torch.empty(8192, device="meta"), BLOCK=4096, num_warps=1, maxnreg=64)
    for _ in range(2):
        seen = report(gpu.launches[-1])
        assert seen.registers <= 64 and seen.spill_stores > 0 and seen.spill_loads > 0 and seen.stack > 0
        assert seen.count("STL") > 0 and seen.count("LDL") > 0
        with offline_gpu(90) as gpu:  # what Triton has kept is known as well
            _all_at_once[1,](x, torch.empty(8192, device="meta"), BLOCK=4096, num_warps=1, maxnreg=64)


def test_what_was_installed_is_taken_back():
    drivers = triton.runtime.driver

    def state():
        return drivers._active, knobs.cache.dir, knobs.compilation.always_compile, knobs.nvidia.dump_ptxas_log

    before = state()
    with offline_gpu(80) as gpu:
        assert drivers.active is gpu and state() != before
        with offline_gpu(90) as inner:
            assert drivers.active is inner
        assert drivers.active is gpu
    assert state() == before
    with pytest.raises(ZeroDivisionError), offline_gpu(80):
        raise ZeroDivisionError
    assert state() == before


def test_occupancy_by_what_runs_out_first():
    assert occupancy(90, registers=32, shared=0, warps=4).limit == "warps"
    assert occupancy(90, registers=16, shared=0, warps=1).limit == "blocks"
    limited = occupancy(89, registers=32, shared=50000, warps=4)
    assert (limited.blocks, limited.warps, limited.share, limited.limit) == (2, 8, 8 / 48, "shared memory")
    assert occupancy(80, registers=33, shared=0, warps=8).blocks == 6  # of 40 registers, as they are given out
    assert set(ARCHITECTURES) <= set(LIMITS) <= set(CHIPS)
    for architecture, limits in LIMITS.items():
        assert occupancy(architecture, 32, CHIPS[architecture].shared, 4).blocks == 1
        assert limits.shared - 1024 == CHIPS[architecture].shared


def test_no_grid_is_beyond_what_a_launch_takes() -> None:
    """65,535 along y and z: long rows of elements, and many queries of one key head."""
    from zq_compiler.kernels.cuda.cached_attention import cached_attention
    from zq_compiler.kernels.cuda.quantize_static import quantize_static

    def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    size, group = 64, 64
    codes, scales = meta(1, 1, group, size, dtype=torch.uint8), (meta(1, 1, 1, size), meta(1, 1, group, 1))
    keys, values = (codes, scales[0], scales[0]), (codes, scales[1], scales[1])
    new = meta(1, 1, 40000, size), meta(1, 1, 40000, size)
    with offline_gpu(90) as gpu:
        quantize_static(meta(1, 2**26), meta(1, dtype=torch.float32))
        cached_attention(meta(1, 64, 40000, size), *keys, *values, *new, None, True, 0.1, 8, group)
    for launch in gpu.launches:
        x, y, z = launch.grid
        assert x < 2**31 and y <= 65535 and z <= 65535, launch
