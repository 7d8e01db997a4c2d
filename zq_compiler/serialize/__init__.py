"""A quantized model as a folder: plain JSON and safetensors, no pickle, no need of the model's own class.

    graph.json           every node, the inputs, and which view of which stored tensor each constant is
    weights.safetensors  every storage the graph reads, once; the integers of linears as ONNX products read them
    program.json         calling convention, plan and history
    recipe.json          the recipe
    report.json          the report, for people and other tools

Symbolic shapes are not read back but computed anew: the loaded graph runs on fake tensors whose sizes are symbols where
the inputs are dynamic. What comes out must agree with the dtypes and dimensions in the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import fx

from ..calling import CallingConvention
from ..errors import ZQError
from ..program import Program
from ..recipe import Recipe
from .constants import load_constants, store_constants
from .convention import convention_in, program_in, program_out
from .graph import inputs_in, inputs_out, nodes_in, nodes_out, rebuild_fake_values

FORMAT = "zq_compiler model"
VERSION = 3
_WHOLE = "copy the whole folder again, or save the model again"


def save(program: Program, convention: CallingConvention, directory: str | Path, report: Mapping[str, Any]) -> None:
    """Write a Program as a folder, all of it or nothing.

    Args:
        report: `Report.to_dict()`, stored as it is.

    Raises:
        ZQError: the folder exists and is none of ours, or the graph holds what cannot be written.
    """
    folder = Path(directory)
    if folder.exists() and not is_saved_model(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ZQError("exists and is no saved model", where=str(folder), fix="give another folder, or remove this one")
    tensors, described, views = store_constants(program.gm)
    graph = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "tensors": described,
        "constants": views,
        "inputs": inputs_out(program, convention),
        "nodes": nodes_out(program.gm),
    }
    files = {"graph": graph, "program": program_out(program, convention), "recipe": program.recipe.to_dict()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        for name, content in {**files, "report": _finite(report)}.items():
            (partial / f"{name}.json").write_text(_text(content))
        save_file(tensors, partial / "weights.safetensors", {"format": "pt"})
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(directory: str | Path) -> tuple[Program, CallingConvention, dict[str, Any]]:
    """Read a folder that `save` wrote.

    Returns:
        The Program (without example inputs), how to call it, and the report that was stored with it.

    Raises:
        ZQError: naming the file that is missing, damaged or of a newer version, and the mend.
    """
    folder = Path(directory)
    graph = _read(folder, "graph")
    data, recipe, report = (_read(folder, name) for name in ("program", "recipe", "report"))
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    with _blaming(folder / "weights.safetensors"):
        load_constants(gm, graph, folder / "weights.safetensors")
    with _blaming(folder / "graph.json"):
        gm.graph = nodes_in(graph["nodes"])
        rebuild_fake_values(gm, graph)
        inputs = inputs_in(graph["inputs"], gm.graph)
    with _blaming(folder / "recipe.json"):
        chosen = Recipe.from_dict(recipe)
    with _blaming(folder / "program.json"):
        convention, notes = convention_in(data, inputs, len(gm.graph.output_node().args[0]))  # type: ignore[arg-type]
        program = program_in(gm, chosen, data, convention)
    program.notes += [note for note in notes if note not in program.notes]
    return program, convention, report


def read_report(directory: str | Path) -> dict[str, Any]:
    """Only the report of a saved model, without its weights.

    Raises:
        ZQError: as `load`.
    """
    _read(Path(directory), "graph")
    return _read(Path(directory), "report")


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of this file, and the error says so."""
    try:
        yield
    except FileNotFoundError:
        raise ZQError("is missing", where=str(path), fix=_WHOLE) from None
    except ZQError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise ZQError(error.what, where=where, fix=error.fix or _WHOLE) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, SafetensorError) as error:
        raise ZQError(f"is damaged: {type(error).__name__}: {error}", where=str(path), fix=_WHOLE) from error


def _text(content: Mapping[str, Any]) -> str:
    """JSON with one line an entry: readable, and a node or a layer a line in a diff."""
    entries = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            value_text = "[\n" + ",\n".join(f"  {json.dumps(v, allow_nan=False)}" for v in value) + "\n ]"
        elif isinstance(value, dict) and value:
            rows = (f"  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in value.items())
            value_text = "{\n" + ",\n".join(rows) + "\n }"
        else:
            value_text = json.dumps(value, allow_nan=False)
        entries.append(f" {json.dumps(key)}: {value_text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _finite(value: Any) -> Any:
    """With infinities (the SQNR of a pass that changed nothing) as words, because JSON has none."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_saved_model(folder: Path) -> bool:
    """Whether `save` wrote this folder, in whatever version."""
    try:
        return json.loads((folder / "graph.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    old = partial.with_name(f"{partial.name}.old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _read(folder: Path, name: str) -> Any:
    path = folder / f"{name}.json"
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():
            raise ZQError("is missing", where=str(path), fix=_WHOLE) from None
        raise ZQError("there is no such folder", where=str(folder), fix="give a folder that save() wrote") from None
    except ValueError as error:
        raise ZQError(f"is no JSON: {error}", where=str(path), fix=_WHOLE) from None
    if not isinstance(content, dict) or (name == "graph" and content.get("format") != FORMAT):
        raise ZQError("was not written by zq_compiler", where=str(path), fix="give a folder that save() wrote")
    if name == "graph" and content.get("version") != VERSION:
        raise ZQError(
            f"is of format version {content.get('version')}, this package reads {VERSION}",
            where=str(path),
            fix="use the zq_compiler that wrote it, or save the model again with this one",
        )
    return content
