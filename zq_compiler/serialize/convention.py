"""What is no graph: how the model is called, its plan and its history."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import fx

from ..calling import CallingConvention, InputSpec
from ..errors import ZQError
from ..program import LayerPlan, NearMiss, OpTraffic, PassRecord, Program, Stage
from ..recipe import Recipe, Role
from ..schemes import QScheme
from ..torch_private import pytree
from .arguments import decode, encode

_SCHEMES = ("weight", "input", "output")  # of a layer's plan


def program_out(program: Program, convention: CallingConvention) -> dict[str, Any]:
    """Pytree specs, plan and history.

    Raises:
        ZQError: an input or output is of a type that torch cannot write down.
    """
    try:
        specs = {key: pytree.treespec_dumps(getattr(convention, key)) for key in ("in_spec", "out_spec")}
    except (NotImplementedError, TypeError) as error:
        what = f"its inputs or outputs are of a type that cannot be written: {error}"
        raise ZQError(what, fix="give the type a serialized_type_name when you register it as a pytree") from None
    return {
        **{key: json.loads(text) for key, text in specs.items()},
        "parameter_names": list(convention.parameter_names),
        "stage": program.stage.name,
        "float_bytes": program.float_bytes,
        "float_dtype": encode(program.float_dtype),
        "float_traffic": [asdict(row) for row in program.float_traffic],
        "plan": [
            {**asdict(plan), **{k: s.to_dict() if (s := getattr(plan, k)) else None for k in _SCHEMES}}
            for plan in program.plan.values()
        ],
        "history": [{**asdict(record), "sqnr": encode(record.sqnr)} for record in program.history],
        "near_misses": [asdict(miss) for miss in program.near_misses],
        "notes": list(program.notes),
    }


def program_in(gm: fx.GraphModule, recipe: Recipe, data: Mapping[str, Any], convention: CallingConvention) -> Program:
    """The Program around a loaded graph."""
    plan = {}
    for row in data["plan"]:
        schemes = {key: QScheme(**row[key]) if row[key] else None for key in _SCHEMES}
        others = {"role": Role(row["role"]), "shape": tuple(row["shape"])}
        plan[row["name"]] = LayerPlan(**{**row, **schemes, **others})
    return Program(
        gm,
        recipe,
        stage=Stage[data["stage"]],
        in_spec=convention.in_spec,
        out_spec=convention.out_spec,
        parameter_names=convention.parameter_names,
        plan=plan,
        history=[PassRecord(**{**row, "sqnr": decode(row["sqnr"])}) for row in data["history"]],
        near_misses=[NearMiss(**row) for row in data["near_misses"]],
        notes=list(data["notes"]),
        float_bytes=data["float_bytes"],
        float_dtype=decode(data.get("float_dtype")),
        float_traffic=[OpTraffic(**row) for row in data.get("float_traffic", [])],
    )


def convention_in(
    data: Mapping[str, Any], inputs: tuple[InputSpec, ...], outputs: int
) -> tuple[CallingConvention, list[str]]:
    """How to call the model, and notes on types that are not known here."""
    notes: list[str] = []
    in_spec, out_spec = (_known_spec(data[key], notes) for key in ("in_spec", "out_spec"))
    if (in_spec.num_leaves, out_spec.num_leaves) != (len(inputs), outputs):
        raise ZQError("it belongs to another graph: the numbers of inputs and outputs differ")
    return CallingConvention(in_spec, out_spec, tuple(data["parameter_names"]), inputs), notes


def _known_spec(written: list[Any], notes: list[str]) -> pytree.TreeSpec:
    protocol, tree = written
    return pytree.treespec_loads(json.dumps([protocol, _known_types(tree, notes)]))


def _known_types(tree: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The spec with every type whose library is not installed as a plain dict or tuple."""
    tree = {**tree, "children_spec": [_known_types(child, notes) for child in tree["children_spec"]]}
    name = tree["type"]
    if name is None or _is_registered(name):
        return tree
    keys = json.loads(tree["context"]) if tree["context"] else None
    named = isinstance(keys, list) and len(keys) == len(tree["children_spec"]) and all(isinstance(k, str) for k in keys)
    plain = "dict" if named else "tuple"
    notes.append(f"{name} is not known here: a {plain} takes its place; import what registers it before loading")
    return {**tree, "type": f"builtins.{plain}", "context": tree["context"] if named else "null"}


def _is_registered(name: str) -> bool:
    """Whether torch knows how to build this type, once the module that defines it is imported."""
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return True
    module, _, cls = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls, None)
    except ImportError:
        return False
    if isinstance(found, type) and module.startswith("transformers."):  # its caches are registered by its exporter only
        from transformers.exporters.exporter_dynamo import register_pytree_node

        if found not in pytree.SUPPORTED_NODES:
            register_pytree_node(found)
    return name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
