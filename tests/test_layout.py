"""The structure of the package, by its syntax trees: which module may import which, and where torch's privates live."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tolerances import IMPORT_SECONDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zq_compiler"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = {
    5: {"api", "backend", "observe", "cli", "analysis", "zoo", "__main__"},
    4: {"lowering"},
    3: {"passes"},
    2: {
        "program",
        "mutation",
        "rewrite",
        "pipeline",
        "verify",
        "capture",
        "calling",
        "decoding",
        "serialize",
        "options",
        "calibration",
        "roles",
        "traffic",
        "weights",
        "replay",
        "kv_cache",
    },
    1: {"kernels"},
    0: {
        "schemes",
        "recipe",
        "numerics",
        "formats",
        "errors",
        "torch_private",
        "histogram",
        "statistics",
        "batches",
        "methods",
        "progress",
    },
}
# Underscored attributes of torch objects that are in common use and have no public spelling.
ATTRIBUTES = {
    *("_schema", "_opname", "_overloadname"),  # of an operator
    *("_version", "_cdata"),  # of a tensor and its storage
    *("_parameters", "_buffers", "_modules"),  # of a module
    *("_erased", "_dynamo_source"),  # of a graph's node
    *(
        "_unsafe_view",
        "_to_copy",
        "_assert_tensor_metadata",
        "_grouped_mm",
        "_assert_scalar",
    ),  # names of ATen operators
}
PRIVATE_FAMILIES = ("torch.fx.experimental", "torch.multiprocessing.reductions")


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def floor(module: str) -> int:
    part = module.split(".")[1]
    return next(number for number, parts in FLOORS.items() if part in parts)


def imports(module: str) -> Iterator[str]:
    """Absolute names of everything a module imports, inside functions too; not what only type checkers see."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    unseen = {
        id(inner)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(module)):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            for alias in node.names:
                yield f"{base}.{alias.name}"


def own_module(name: str) -> str | None:
    """The module of this package that an imported name lies in."""
    while name.startswith("zq_compiler."):
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


INNER = [m for m in MODULES if m != "zq_compiler"]


def test_every_module_has_a_floor_and_the_parser_sees_imports():
    assert [m for m in INNER if not any(m.split(".")[1] in parts for parts in FLOORS.values())] == []
    assert "zq_compiler.lowering.onnx.export" in set(imports("zq_compiler.api"))  # function-local, relative
    assert own_module("zq_compiler.kernels.registry.OPS") == "zq_compiler.kernels.registry"


@pytest.mark.parametrize("module", INNER)
def test_imports_go_down_or_stay_on_their_floor(module):
    used = {m for name in imports(module) if (m := own_module(name)) is not None}
    assert {m for m in used if floor(m) > floor(module)} == set()


@pytest.mark.parametrize("module", [m for m in INNER if m.startswith("zq_compiler.passes.")])
def test_a_pass_never_imports_another(module):
    assert {m for name in imports(module) if (m := own_module(name)) and m.startswith("zq_compiler.passes")} == set()


@pytest.mark.parametrize("module", [m for m in INNER if m.startswith("zq_compiler.kernels")])
def test_kernels_do_not_know_fx(module):
    assert [name for name in imports(module) if name == "torch.fx" or name.startswith("torch.fx.")] == []


def private_names(module: str) -> set[str]:
    found = {n for n in imports(module) if n.startswith("torch") and ("._" in n or n.startswith(PRIVATE_FAMILIES))}
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.Attribute):
            continue
        dotted = ast.unparse(node)
        if dotted.startswith(PRIVATE_FAMILIES):
            found.add(dotted)
        elif node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in ATTRIBUTES:
            owner = dotted.split(".")[0]
            if owner not in ("self", "cls") and not owner.startswith("_"):
                found.add(dotted)
    return found


@pytest.mark.parametrize("module", [m for m in INNER if m != "zq_compiler.torch_private"])
def test_private_names_of_torch_live_in_one_file(module):
    assert private_names(module) == set()


def test_the_detector_of_private_names_works():
    assert {"torch._ops.OpOverload", "torch._int_mm"} <= private_names("zq_compiler.torch_private")


PROBE = """
import json, sys, time, torch
before, started = set(sys.modules), time.process_time()
import zq_compiler
seconds = time.process_time() - started
print(json.dumps([seconds, sorted({m.split(".")[0] for m in set(sys.modules) - before}), "sympy" in sys.modules]))
"""


def probe() -> tuple[float, list[str], bool]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROBE]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    seconds, modules, symbolic = json.loads(out.stdout)
    return seconds, modules, symbolic


@pytest.fixture(scope="module")
def probes() -> list[tuple[float, list[str], bool]]:
    """The first writes bytecode, as an installation does; the others read it."""
    return [probe() for _ in range(3)]


def test_import_leaves_the_heavy_libraries_alone(probes):
    for _, modules, _ in probes:
        assert "zq_compiler" in modules
        assert not {"transformers", "onnxruntime", "onnxscript", "onnx", "typer", "triton"} & set(modules)


def test_import_takes_little_time(probes):
    assert not any(symbolic for _, _, symbolic in probes), "sympy is imported, which takes most of a second"
    assert min(seconds for seconds, _, _ in probes) < IMPORT_SECONDS


def test_native_sources_are_package_data():
    import tomllib

    root = Path(__file__).parents[1]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "zq_compiler" / "kernels" / "cpu"
    sources = {p.name for p in folder.iterdir() if p.suffix in (".cpp", ".h")}
    shipped = {p.name for pattern in declared["zq_compiler.kernels.cpu"] for p in folder.glob(pattern)}
    assert sources and sources <= shipped
