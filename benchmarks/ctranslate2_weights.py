"""Weights of Whisper, read from the binary file that CTranslate2 keeps them in.

The file, little-endian: version u32, name of the specification, revision u32, number of variables u32, and for each
its name, rank u8, dimensions u32, dtype u8, bytes u32, content. A string is a length u16 with a terminating zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)


def read_variables(path: Path) -> dict[str, Tensor]:
    """All variables of the file by their names.

    Raises:
        ValueError: the file holds another model than Whisper.
    """
    with path.open("rb") as file:
        _integer(file, "I")
        if (specification := _string(file)) != "WhisperSpec":
            raise ValueError(f"{path} holds a {specification}: only Whisper's files are read")
        _integer(file, "I")
        return dict(_variable(file) for _ in range(_integer(file, "I")))


def whisper_weights(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of transformers' `WhisperForConditionalGeneration`, in float32.

    Projections of one input lie stacked in the file: Q, K and V of an attention over itself, K and V of the decoder's
    over the encoder. K has no bias in the model; the file has zeros for it.
    """
    found: dict[str, Tensor] = {}
    for name, value in variables.items():
        side, *inner, last = name.split("/")
        if side not in ("encoder", "decoder") or not inner or last not in _ENDINGS:
            continue  # settings, such as num_heads
        for module, part in _modules(side, inner, value):
            found[f"model.{side}.{module}.{_ENDINGS[last]}"] = part.float().contiguous()
    biases = [name for name in found if name.endswith("k_proj.bias")]
    if any(found.pop(name).any() for name in biases):
        raise ValueError("a key projection has a bias, which Whisper's have not")
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    return found


_ENDINGS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "encodings": "weight"}
_NAMES = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
_BLOCKS = {  # what a layer's block is called, its norm, and the stacked linears of it
    "self_attention": ("self_attn", "self_attn_layer_norm", (("q_proj", "k_proj", "v_proj"), ("out_proj",))),
    "attention": ("encoder_attn", "encoder_attn_layer_norm", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))),
    "ffn": ("", "final_layer_norm", (("fc1",), ("fc2",))),
}


def _modules(side: str, inner: list[str], value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if len(inner) == 1:
        yield _NAMES[inner[0]], value
        return
    layer, block, part = inner
    prefix = f"layers.{layer.removeprefix('layer_')}"
    owner, norm, linears = _BLOCKS[block]
    if part == "layer_norm":
        yield f"{prefix}.{norm}", value
        return
    stacked = linears[int(part.removeprefix("linear_"))]
    for name, piece in zip(stacked, value.chunk(len(stacked)), strict=True):
        yield ".".join(filter(None, (prefix, owner, name))), piece


def _integer(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0])


def _string(file: BinaryIO) -> str:
    return file.read(_integer(file, "H")).rstrip(b"\0").decode()


def _variable(file: BinaryIO) -> tuple[str, Tensor]:
    name = _string(file)
    shape = [_integer(file, "I") for _ in range(_integer(file, "B"))]
    dtype = _DTYPES[_integer(file, "B")]
    content = bytearray(file.read(_integer(file, "I")))
    return name, torch.frombuffer(content, dtype=dtype).view(shape)
