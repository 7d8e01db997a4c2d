"""The kernels are compiled once into the user's cache; what goes wrong is told as KernelBuildError."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from zq_compiler.errors import KernelBuildError
from zq_compiler.kernels.cache import cache_folder
from zq_compiler.kernels.cpu import build

needs_kernels = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

USE = "import torch; from zq_compiler.kernels.cpu import build; build.load(); print(torch.ops.zq_cpu.int8_linear)"


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=root, text=True, capture_output=True
    )


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_import_builds_nothing(tmp_path):
    code = "import torch; from zq_compiler.kernels.cpu import build; print(hasattr(torch.ops.zq_cpu, 'int8_linear'))"
    done = _python(code, ZQ_CACHE_DIR=str(tmp_path))
    assert done.stdout == "False\n", done.stderr
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_second_process_finds_the_library(tmp_path):
    """The second may ask the compiler its version; a compilation would fail."""
    first = _python(USE, ZQ_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    built = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.name for p in built] == ["zq_cpu.so"]  # and no temporary file left
    compiler = build._compiler()
    only_version = _script(tmp_path / "c++", f'[ "$1" = --version ] && exec {" ".join(compiler)} --version\nexit 1')
    second = _python(USE, ZQ_CACHE_DIR=str(tmp_path), CXX=str(only_version))
    assert second.returncode == 0, second.stderr


@needs_kernels
def test_load_is_idempotent_and_thread_safe():
    errors: list[BaseException] = []

    def load() -> None:
        try:
            build.load()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    build.load()
    assert not errors
    assert torch.ops.zq_cpu.int8_linear


@pytest.fixture
def unloaded(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr(build, "_loaded", False)
    monkeypatch.setenv("ZQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@needs_kernels
def test_broken_compiler(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelBuildError, match=r"(?s)compiler failed with status 1.*set CXX") as e:
        build.load()
    assert e.value.fix


@needs_kernels
def test_compiler_output_is_shown(unloaded, monkeypatch):
    says = _script(unloaded / "c++", '[ "$1" = --version ] && exit 0\necho "int8_linear.cpp:1: no such header"; exit 2')
    monkeypatch.setenv("CXX", f"{says}")
    with pytest.raises(KernelBuildError, match=r"(?s)status 2.*int8_linear.cpp:1: no such header"):
        build.load()
    assert not [p for p in (unloaded / "cache").rglob("*") if p.is_file()]


@needs_kernels
def test_broken_library(unloaded):
    library = build._library_path(build._compiler())
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    with pytest.raises(KernelBuildError, match="cannot load the compiled kernels"):
        build.load()


@needs_kernels
def test_unwritable_cache(unloaded, monkeypatch):
    (unloaded / "file").touch()
    monkeypatch.setenv("ZQ_CACHE_DIR", str(unloaded / "file"))
    with pytest.raises(KernelBuildError, match="set ZQ_CACHE_DIR to a writable folder"):
        build.load()


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("ZQ_CACHE_DIR", "/a")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("ZQ_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/b/zq_compiler")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/zq_compiler"


def test_unavailable_reasons(monkeypatch):
    monkeypatch.setattr(build, "isa", lambda: "default")
    assert build.unavailable_reason() == "neither AVX512-VNNI nor AVX2 with FMA and F16C on this CPU (default)"
    with pytest.raises(KernelBuildError, match="neither AVX512-VNNI nor AVX2"):
        monkeypatch.setattr(build, "_loaded", False)
        build.load()
    monkeypatch.setattr(build, "isa", lambda: "avx2")
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.unavailable_reason() == "no C++ compiler found: install g++ or set CXX"


AVX2 = {"avx2", "fma3", "f16c"}
AVX512 = AVX2 | {"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}
AMX = AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"}


@pytest.mark.parametrize(
    ("level", "have", "isa"),
    [
        ("AVX512", AMX, "amx_int8"),
        ("AVX512", AMX - {"amx_int8"}, "avx512_vnni"),
        ("AVX2", AMX, "avx2"),
        ("AVX512", AVX512 | {"avx512_vnni"}, "avx512_vnni"),
        ("AVX512", AVX512, "avx2"),
        ("AVX2", AVX512 | {"avx512_vnni"}, "avx2"),
        ("AVX2", AVX2, "avx2"),
        ("AVX2", AVX2 - {"f16c"}, "default"),
        ("DEFAULT", AVX512, "default"),
    ],
)
def test_isa(level, have, isa, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(have, True))
    assert build.isa() == isa


def test_each_instruction_set_has_a_library_of_its_own(monkeypatch):
    libraries = set()
    for isa in build.PACKING:
        monkeypatch.setattr(build, "isa", lambda isa=isa: isa)
        libraries.add(build._library_path(build._compiler()))
    assert len(libraries) == len(build.PACKING)


def test_isa_follows_the_capability_torch_runs_at():
    code = "from zq_compiler.kernels.cpu import build; print(build.isa())"
    for asked, isas in (("default", {"default"}), ("avx2", {"avx2"}), ("avx512", {"avx512_vnni", "avx2"})):
        if asked == "default" or build.isa() != "default":
            done = _python(code, ATEN_CPU_CAPABILITY=asked)
            assert done.stdout.strip() in isas, done.stderr
