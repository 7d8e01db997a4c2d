"""Constants: one stored tensor a storage, so that tied weights lie in the file once, and views of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, fx

from ..errors import ZQError
from ..kernels import int8_linear, int8_linear_gelu_quantize, int8_linear_quantize, weight_only_linear
from ..program import constants, set_constant

_LINEARS = (int8_linear, int8_linear_quantize, int8_linear_gelu_quantize)
_SIGN_BITS = {"int2": 0xAA, "int2_asym": 0xAA, "int4": 0x88, "int4_asym": 0x88, "int8": 0x80}  # of a byte's codes


def store_constants(gm: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors for the file, one a storage; what they are; and how each constant is seen in them.

    What an ONNX file reads in another form is stored in that one, so that it may read it from here: the integers `[N,
    K]` of a linear as `[K, N]`, and packed ones with their sign bits flipped, which makes them unsigned.
    """
    linears = [n for target in _LINEARS for n in gm.graph.find_nodes(op="call_function", target=target)]
    multiplied = {n.args[2].target for n in linears if n.args[2].op == "get_attr"}
    packed = gm.graph.find_nodes(op="call_function", target=weight_only_linear)
    flips = {n.args[1].target: _SIGN_BITS.get(n.args[4], 0) for n in packed if n.args[1].op == "get_attr"}
    groups: dict[tuple[int, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, tensor in constants(gm):
        groups.setdefault((tensor.untyped_storage()._cdata, tensor.dtype), []).append((name, tensor))
    tensors, described, views = {}, {}, {}
    for (storage, dtype), members in groups.items():
        key, first = members[0]
        start = min(t.storage_offset() for _, t in members)
        end = max(t.storage_offset() + _extent(t) for _, t in members)
        # One contiguous tensor keeps its shape in the file; anything else is views of a flat one.
        whole = first.is_contiguous() and first.numel() == end - start
        stored = (first if whole else first.as_strided((end - start,), (1,), start)).detach()
        turned = any(name in multiplied for name, _ in members)
        turned &= all(t.is_contiguous() and t.shape == first.shape and first.ndim == 2 for _, t in members)
        if turned:
            stored = stored.t().contiguous()
        flip = flips.get(key, 0) if len({flips.get(name, 0) for name, _ in members}) == 1 else 0
        if flip:
            stored = stored ^ flip
        under_two_dtypes = sum(other == storage for other, _ in groups) > 1
        tensors[key] = stored.clone() if under_two_dtypes else stored  # safetensors refuses shared storages
        described[key] = {"dtype": short(dtype), "shape": list(stored.shape), "device": str(stored.device)}
        for name, t in members:
            offset = t.storage_offset() - start
            stride = [1, t.shape[0]] if turned else list(t.stride())
            views[name] = {"tensor": key, "shape": list(t.shape), "stride": stride, "offset": offset}
            if flip:
                views[name]["flip"] = flip
    return tensors, described, views


def _extent(t: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def load_constants(gm: fx.GraphModule, graph: Mapping[str, Any], path: Path) -> None:
    """Put every constant of the graph into the module.

    Raises:
        ZQError: a tensor is missing, or is not what the graph says it is.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())
        for key, expected in graph["tensors"].items():
            if key not in present:
                raise ZQError(f"lacks tensor {key}")
            tensors[key] = _expect(file.get_tensor(key), expected, key)
    rows: dict[str, Tensor] = {}  # what is stored by columns, tied constants once
    flipped: dict[str, Tensor] = {}
    for name, view in graph["constants"].items():
        tensor, layout = tensors[view["tensor"]], [view["shape"], view["stride"], view["offset"]]
        if flip := view.get("flip", 0):
            tensor = flipped.setdefault(view["tensor"], tensor ^ flip)
        if layout == [list(tensor.shape), list(tensor.stride()), 0]:
            constant = tensor
        elif tensor.ndim == 2 and layout == [list(tensor.t().shape), list(tensor.t().stride()), 0]:
            constant = rows.setdefault(view["tensor"], tensor.t().contiguous())
        else:
            constant = tensor.as_strided(*layout)  # checks the bounds itself
        set_constant(gm, name, constant)


def stored_at(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file lies: name -> offset and length in bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _expect(tensor: Tensor, expected: Mapping[str, Any], key: str) -> Tensor:
    if [short(tensor.dtype), list(tensor.shape)] != [expected["dtype"], expected["shape"]]:
        raise ZQError(
            f"tensor {key} is {short(tensor.dtype)} {list(tensor.shape)},"
            f" the graph wants {expected['dtype']} {expected['shape']}"
        )
    if torch.device(expected["device"]).type == "cuda" and not torch.cuda.is_available():
        raise ZQError("the model was saved from a GPU, and there is none here", fix="save it from the CPU")
    return tensor.to(expected["device"])


def short(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
