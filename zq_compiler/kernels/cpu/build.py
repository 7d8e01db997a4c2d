"""Compile the C++ kernels once per machine, keep the library in the user's cache, load it when first asked for.

    $ZQ_CACHE_DIR or $XDG_CACHE_HOME/zq_compiler or ~/.cache/zq_compiler
      kernels/<hash of sources, torch, compiler, flags, instruction set>/zq_cpu.so

Nothing is compiled or loaded at import. The sources are written over sixteen lanes (`simd.h`) and compiled for AMX and
AVX512-VNNI, for AVX512-VNNI alone, or for AVX2 with FMA and F16C; torch's own `ATEN_CPU_CAPABILITY=avx512` or `avx2`
makes a machine use less than it has. The ops after `load()` compute the same on all. How a weight is packed,
`BLOCK, GROUP = PACKING[isa()]`, is between them:

    zq_cpu::pack_weight(w_q [N, K] int8) -> [ceil(N/BLOCK), ceil(K/GROUP), BLOCK, GROUP] int8
    zq_cpu::int8_linear(x_q [..., K] int8, x_scale [..., 1] f32 or None, w_packed, w_scale [N, 1] f32,
                        w_colsum [N] int32, bias [N] float or None, out_dtype) -> [..., N] out_dtype; int8 rounds
    zq_cpu::int8_linear_gelu_quantize(as int8_linear, dtype, approximate, out_scale [..., N] or one element)
                                      -> [..., N] int8
    zq_cpu::pack_codes(w_packed [N, bytes] uint8, w_scale [N, G] f16|f32, format)
                       -> codes [ceil(N/16), words, 16] int16, scale [ceil(N/16), G, 16]
    zq_cpu::weight_only_linear(x [..., K] f32|bf16|f16, codes, scale, bias [N] float or None, format, group, n)
                               -> [..., N] of x's dtype
    zq_cpu::pack_nibbles(w_q [N, K] int8 in [-8, 7], w_scale [N, G] f16|f32)
                         -> codes [ceil(N/16), ceil(K/8), 16, 4] uint8, scale [ceil(N/16), G, 16]
    zq_cpu::w4a8_linear(x_q [..., K] int8, x_scale [..., 1] f32, codes, scale, bias [N] float or None, group, n,
                        out_dtype) -> [..., N] out_dtype
    zq_cpu::low_rank_linear(y [..., N], x [..., K], v [r, K] f16|f32, u [r, N] f16|f32) -> [..., N] of y's dtype
    zq_cpu::int8_attention(query [B, H, T, D] int8, key [B, Hkv, S, D] int8, value of the key's shape, score_scale,
                           mask or None, is_causal, probability_scale or None, out_scale, out_dtype,
                           signed_probabilities=False)
                           -> [B, H, T, D] out_dtype, a view of [B, T, H, D]; scales as kernels/int8_attention.py
    zq_cpu::quantize_per_token(x [..., K] f32|bf16|f16) -> q [..., K] int8, scale [..., 1] f32
    zq_cpu::norm_quantize(x [..., K], residual [..., K] or None, weight [K] or None, bias [K] or None, eps, rms,
                          want_y, want_h) -> q, scale, y = norm(h), h = x + residual; y and h are [0] when not wanted;
                          x may be int8 with x_scale [K], residual int8 with residual_scale [..., 1]
    zq_cpu::gelu_quantize(x [..., K], approximate "none" or "tanh") -> q, scale
    zq_cpu::silu_mul_quantize(gate [..., K], up [..., K]) -> q, scale
    zq_cpu::gelu_quantize_static(x [..., K], approximate, scale [..., K] or one element) -> q
    zq_cpu::silu_mul_quantize_static(gate [..., K], up [..., K], scale) -> q
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from ...errors import KernelBuildError
from ...formats import FORMATS
from ..cache import cache_folder

# Output features of a packed weight block, and values of K that one instruction sums: kBlock, kGroup in int8_product.h.
PACKING = {"amx_int8": (64, 4), "avx512_vnni": (64, 4), "avx2": (16, 2)}

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in (
        *("int8_linear", "int8_attention", "quantize_per_token", "norm_quantize", "activation_quantize"),
        *("weight_only_linear", "w4a8_linear", "low_rank_linear"),
    )
)
_HEADERS = tuple(
    Path(__file__).with_name(f"{name}.h") for name in ("simd", "rows", "int8_product", "int8_tiles", "gelu")
)
# What each instruction set needs, in torch's spelling.
_VNNI = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni")
_CPU_FEATURES = {
    "amx_int8": (*_VNNI, "amx_tile", "amx_int8"),
    "avx512_vnni": _VNNI,
    "avx2": ("avx2", "fma3", "f16c"),
}
# The kernels are bit-equal to their references only without contraction to FMA. The headers need -fopenmp to run
# at::parallel_for in parallel.
_FLAGS = (
    *("-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-DAT_PER_OPERATOR_HEADERS", "-w"),
)

_FLAG_OF = {"fma3": "fma", "amx_tile": "amx-tile", "amx_int8": "amx-int8"}  # where it is not the feature's name

_lock = threading.Lock()
_loaded = False


def isa() -> str:
    """What the kernels are compiled for: "amx_int8", "avx512_vnni" or "avx2"; "default" where torch runs at less."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    have = torch.cpu.get_capabilities()
    for name, features in _CPU_FEATURES.items():
        if name == "amx_int8" and os.environ.get("ATEN_CPU_CAPABILITY") == "avx512":
            continue
        if (level.startswith("avx512") or level == name) and all(have.get(f, False) for f in features):
            return name
    return "default"


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used on this machine, as a sentence; None when they can."""
    if sys.platform != "linux":
        return f"the native kernels are built on Linux only, this is {sys.platform}"
    if isa() not in PACKING:
        return f"neither AVX512-VNNI nor AVX2 with FMA and F16C on this CPU ({isa()})"
    if shutil.which(_compiler()[0]) is None:
        return "no C++ compiler found: install g++ or set CXX"
    return None


def load() -> None:
    """Make `torch.ops.zq_cpu` available: compile if this machine has not yet, load, register the fake kernels.

    Safe to call again, from several threads and from several processes.

    Raises:
        KernelBuildError: the machine cannot run the kernels, or the compiler or the loader failed.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        if reason := unavailable_reason():
            raise KernelBuildError(reason, where="native CPU kernels")
        compiler = _compiler()
        library = _library_path(compiler)
        if not library.exists():
            _build(library, compiler)
        try:
            torch.ops.load_library(library)
        except OSError as e:
            raise KernelBuildError(
                f"cannot load the compiled kernels: {e}", where=str(library), fix="delete the file; it is built again"
            ) from e
        _register_fakes()
        _loaded = True


def _compiler() -> list[str]:
    """`$CXX`, which may carry arguments ("ccache g++"), else g++."""
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _flags() -> list[str]:
    features = _CPU_FEATURES[isa()]
    return [*_FLAGS, *(f"-m{_FLAG_OF.get(feature, feature.replace('_', ''))}" for feature in features)]


def _library_path(compiler: list[str]) -> Path:
    """Where the library for this machine, torch, compiler and these sources is, or will be."""
    key = hashlib.sha256()
    for part in (torch.__version__, _run([*compiler, "--version"]), shlex.join(_flags()), isa()):
        key.update(part.encode() + b"\0")
    for source in (*_SOURCES, *_HEADERS):
        key.update(source.read_bytes() + b"\0")
    return cache_folder() / "kernels" / key.hexdigest()[:16] / "zq_cpu.so"


def _build(library: Path, compiler: list[str]) -> None:
    """Compile the sources side by side and link them. Processes may race: each builds its own, the last one stays."""
    # Here, because it takes a second to import and only a build needs it.
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-isystem{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            objects = [Path(folder, source.stem + ".o") for source in _SOURCES]
            compile_ = [*compiler, *_flags(), *includes, "-c"]
            _run(*([*compile_, str(s), "-o", str(o)] for s, o in zip(_SOURCES, objects, strict=True)))
            linked = Path(folder, library.name)
            link = [*compiler, "-shared", "-fopenmp", *map(str, objects)]
            _run([*link, *libraries, "-lc10", "-ltorch_cpu", "-o", str(linked)])
            os.replace(linked, library)
    except OSError as e:
        raise KernelBuildError(
            f"cannot write the compiled kernels: {e}", where=str(library), fix="set ZQ_CACHE_DIR to a writable folder"
        ) from e


def _run(*commands: list[str]) -> str:
    """Run the commands at the same time; what they printed."""
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        for c in commands
    ]
    printed = [process.communicate()[0] for process in processes]
    for command, process, text in zip(commands, processes, printed, strict=True):
        if process.returncode:
            last = "\n".join(text.strip().splitlines()[-20:]) or "(it printed nothing)"
            raise KernelBuildError(
                f"the C++ compiler failed with status {process.returncode}: {shlex.join(command)}\n{last}",
                where="native CPU kernels",
                fix="install g++ 11 or newer, or set CXX to one",
            )
    return "".join(printed)


def _register_fakes() -> None:
    """Shapes and dtypes of the ops, so that torch.compile can trace them with symbolic sizes."""

    @torch.library.register_fake("zq_cpu::pack_weight")
    def _(w_q: Tensor) -> Tensor:
        n, k = w_q.shape
        block, group = PACKING[isa()]
        return w_q.new_empty(((n + block - 1) // block, (k + group - 1) // group, block, group))

    @torch.library.register_fake("zq_cpu::int8_linear")
    def _(
        x_q: Tensor,
        x_scale: Tensor | None,
        w_packed: Tensor,
        w_scale: Tensor,
        w_colsum: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)

    @torch.library.register_fake("zq_cpu::int8_linear_gelu_quantize")
    def _(
        x_q: Tensor,
        x_scale: Tensor | None,
        w_packed: Tensor,
        w_scale: Tensor,
        w_colsum: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        approximate: str,
        out_scale: Tensor,
    ) -> Tensor:
        return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=torch.int8)

    @torch.library.register_fake("zq_cpu::pack_codes")
    def _(w_packed: Tensor, w_scale: Tensor, format: str) -> tuple[Tensor, Tensor]:
        (n, size), bits = w_packed.shape, FORMATS[format].bits
        blocks, words = (n + 15) // 16, (size + 2 * bits - 1) // (2 * bits) * bits
        codes = w_packed.new_empty((blocks, words, 16), dtype=torch.int16)
        return codes, w_scale.new_empty((blocks, w_scale.shape[1], 16))

    @torch.library.register_fake("zq_cpu::weight_only_linear")
    def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, format: str, group: int, n: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], n))

    @torch.library.register_fake("zq_cpu::pack_nibbles")
    def _(w_q: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
        blocks, steps = (w_q.shape[0] + 15) // 16, (w_q.shape[1] + 7) // 8
        codes = w_q.new_empty((blocks, steps, 16, 4), dtype=torch.uint8)
        return codes, w_scale.new_empty((blocks, w_scale.shape[1], 16))

    @torch.library.register_fake("zq_cpu::w4a8_linear")
    def _(
        x_q: Tensor,
        x_scale: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        group: int,
        n: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return x_q.new_empty((*x_q.shape[:-1], n), dtype=out_dtype)

    @torch.library.register_fake("zq_cpu::low_rank_linear")
    def _(y: Tensor, x: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return y.new_empty(y.shape)

    @torch.library.register_fake("zq_cpu::int8_attention")
    def _(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_scale: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        probability_scale: Tensor | None,
        out_scale: Tensor,
        out_dtype: torch.dtype,
        signed_probabilities: bool = False,
    ) -> Tensor:
        b, h, t, d = query.shape
        return query.new_empty((b, t, h, d), dtype=out_dtype).transpose(1, 2)

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)

    @torch.library.register_fake("zq_cpu::quantize_per_token")
    def _(x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        return quantized(x)

    @torch.library.register_fake("zq_cpu::norm_quantize")
    def _(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        want_y: bool,
        want_h: bool,
        rotated: bool = False,
        x_scale: Tensor | None = None,
        residual_scale: Tensor | None = None,
        residual_rotated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, h = (x.new_empty(x.shape if wanted else (0,), dtype=dtype or x.dtype) for wanted in (want_y, want_h))
        return *quantized(x), y, h

    @torch.library.register_fake("zq_cpu::gelu_quantize")
    def _(x: Tensor, approximate: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
        return quantized(x)

    @torch.library.register_fake("zq_cpu::silu_mul_quantize")
    def _(gate: Tensor, up: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        return quantized(gate)

    @torch.library.register_fake("zq_cpu::gelu_quantize_static")
    def _(x: Tensor, approximate: str, scale: Tensor) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.int8)

    @torch.library.register_fake("zq_cpu::silu_mul_quantize_static")
    def _(gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        return gate.new_empty(gate.shape, dtype=torch.int8)
