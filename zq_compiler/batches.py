"""Calibration data of whatever form, as calls of the model that can be made as often as needed."""

from __future__ import annotations

import itertools
import json
import operator
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CalibrationError

SPOOL_LIMIT = 2 * 2**30
_FORMS = (
    "give an iterable (a list, a DataLoader) of tensors, of tuples of positional arguments or of dicts of keyword"
    " arguments"
)


class Batches:
    """Calibration data of any form, which can be read as often as needed.

    Args:
        data: an iterable of calls of the model (a DataLoader, a list, a generator), or a `forward_loop(model)` that
            is given a function with the model's signature and calls it. A call is a tensor, a tuple or list of
            positional arguments, or a mapping of keyword arguments. What can be read only once, a generator, is
            copied to a temporary folder while it is read for the first time; the folder goes when this object does.
        limit: bytes that the copy may take.

    Attributes:
        collected: statistics taken from these batches, by `calibration.structure_key` of the graph: a graph that is
            compiled again for other sizes is not calibrated again.

    Raises:
        CalibrationError: the data is none of these.

    >>> calls = []
    >>> Batches(x for x in torch.arange(2)).feed(calls.append)
    2
    >>> calls
    [tensor(0), tensor(1)]
    """

    def __init__(self, data: Any, *, limit: int = SPOOL_LIMIT) -> None:
        if isinstance(data, Tensor | Mapping):
            raise CalibrationError("the calibration data is one batch, not several", fix="give [batch]")
        if isinstance(data, str | PathLike | torch.nn.Module) or not (isinstance(data, Iterable) or callable(data)):
            raise CalibrationError(f"the calibration data is {_kind(data)}", fix=f"{_FORMS}, or a forward_loop(model)")
        self.collected: dict[str, Any] = {}
        self._data = data
        self._rest = iter(data) if isinstance(data, Iterator) else None
        self._spool = _Spool(limit) if isinstance(data, Iterator) else None

    @property
    def count(self) -> int | None:
        """How many there are, where that is known before they are read."""
        return operator.length_hint(self._data) or None

    @property
    def has_own_loop(self) -> bool:
        """Whether they are a forward_loop, which calls the model itself and sees what it returns."""
        return not isinstance(self._data, Iterable)

    def first(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the first batch, as an example.

        Raises:
            CalibrationError: there is none, or it is no call; a forward_loop has its own to itself.
        """
        if self.has_own_loop:
            raise CalibrationError("a forward_loop gives no example", fix=_FORMS)
        for batch in self._read():
            return _call_of(batch, 0)
        raise CalibrationError("the calibration data is empty", fix="give at least one batch")

    def feed(self, call: Callable[..., Any]) -> int:
        """Call `call(*args, **kwargs)` with each batch in order; returns how many there were.

        Raises:
            CalibrationError: there are none, one is no call, or a generator's exceed the limit.
        """
        number = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            result = call(*args, **kwargs)
            number += 1
            return result

        if self.has_own_loop:
            self._data(counted)
            if number == 0:
                raise CalibrationError("the forward_loop never called the model", fix="call what it is given")
            return number
        for batch in self._read():
            args, kwargs = _call_of(batch, number)
            counted(*args, **kwargs)
        if number == 0:
            raise CalibrationError(
                "the calibration data is empty", fix="give at least one batch; a generator that was read is empty"
            )
        return number

    def _read(self) -> Iterator[Any]:
        if self._spool is None or self._rest is None:
            yield from self._data
            return
        yield from self._spool
        for batch in self._rest:
            try:
                self._spool.add(batch)
            except CalibrationError:
                self._rest = itertools.chain([batch], self._rest)  # a second reading must not skip it
                raise
            yield batch


class _Spool:
    """Batches in a temporary folder, a safetensors file each: no pickle, and tensors keep their dtype."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.count = limit, 0, 0
        self.folder = Path(tempfile.mkdtemp(prefix="zq_calibration_"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def add(self, batch: Any) -> None:
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(self._encode(batch, tensors))
        size = sum(t.nbytes for t in tensors.values())
        if self.bytes + size > self.limit:
            raise CalibrationError(
                f"batch {self.count} of a generator exceeds the {self.limit:,} bytes that may be copied to disk",
                fix="give a list or a DataLoader, which can be read again, fewer batches, or Batches(..., limit=bytes)",
            )
        save_file(tensors, self.folder / f"{self.count}.safetensors", {"structure": structure})
        self.bytes, self.count = self.bytes + size, self.count + 1

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            with safe_open(self.folder / f"{number}.safetensors", framework="pt") as file:
                batch = self._decode(json.loads(file.metadata()["structure"]), file.get_tensor)
            yield batch

    def _encode(self, value: Any, tensors: dict[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # none may share memory
            return {"tensor": key, "device": str(value.device)}
        if isinstance(value, Mapping):
            return {"dict": [[k, self._encode(v, tensors)] for k, v in value.items()]}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self._encode(v, tensors) for v in value]}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        raise CalibrationError(
            f"batch {self.count} of a generator holds {_kind(value)}, which cannot be copied to disk",
            fix="give a list or a DataLoader, which can be read again",
        )

    def _decode(self, entry: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Any:
        match entry:
            case {"tensor": key, "device": device}:
                return tensor(key).to(device)
            case {"dict": pairs}:
                return {k: self._decode(v, tensor) for k, v in pairs}
            case {"tuple": items}:
                return tuple(self._decode(v, tensor) for v in items)
            case {"list": items}:
                return [self._decode(v, tensor) for v in items]
        return entry["value"]


def _call_of(batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    match batch:
        case Tensor():
            return (batch,), {}
        case Mapping():
            return (), dict(batch)
        case tuple() | list():
            return tuple(batch), {}
    raise CalibrationError(f"batch {number} is {_kind(batch)}", fix=_FORMS)


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
