"""Triton's interpreter, computing as a GPU does and watching memory.

`install()` turns Triton 3.7.1's interpreter, for the whole process, into one that

- casts to bfloat16 and FP8 by rounding half to even (FP8 saturates), computes in them, and multiplies matrices of them;
  drops NaN in `tl.maximum` and `tl.minimum`; rounds `tl.fma` once; drops the low bits of TF32 operands;
- makes a wrong number of what is undefined on a GPU: floats outside the integers that they are converted to, and what
  a load whose mask is false gives without `other`;
- raises `OutOfBoundsError` where an unmasked lane touches what no tensor argument of the kernel holds;
- raises `RaceError` where two programs store to one address, two lanes of one store do, or a program reads what another
  one stores. Atomics may meet; a launch that has any may also read what others have stored.

`counted()` tells which bytes launches moved. `poisoned()` fills memory that torch leaves uninitialised, so that what
no kernel writes shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

Array = np.ndarray[Any, np.dtype[Any]]
Handle = interpreter.TensorHandle

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
AS_BITS = {tl.bfloat16: torch.int16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}  # numpy has no such floats
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
POISON = 0x5A  # each byte of an undefined integer
FILLERS = ("empty", "empty_like", "empty_strided")


class OutOfBoundsError(AssertionError):
    """An unmasked lane touched what no tensor argument of its kernel holds."""


class RaceError(AssertionError):
    """What a launch leaves in memory depends on which program, or which lane, comes last."""


# Memory


@dataclass
class Storage:
    """The memory of arguments that share it, in granules: the size of their smallest element.

    Args:
        readers, writers: 1 + the program that read or stored a granule, 0 none, -1 several.
    """

    address: int
    size: int
    granule: int
    readers: Array = field(init=False)
    writers: Array = field(init=False)
    atomics: Array = field(init=False)

    def __post_init__(self) -> None:
        granules = -(-self.size // self.granule)
        self.readers, self.writers = np.zeros(granules, np.int32), np.zeros(granules, np.int32)
        self.atomics = np.zeros(granules, bool)

    def granules(self, lanes: Array, size: int) -> Array:
        """Those that elements of `size` bytes at these addresses lie in."""
        if size < self.granule:
            ratio, self.granule = self.granule // size, size
            self.readers, self.writers = self.readers.repeat(ratio), self.writers.repeat(ratio)
            self.atomics = self.atomics.repeat(ratio)
        first = (lanes - self.address) // self.granule
        if size == self.granule:
            return first
        return (first[:, None] + np.arange(size // self.granule)).ravel()

    def read(self, where: Array, program: int) -> int:
        """Returns a program that has stored there, 0 if none but the reader itself has."""
        known = self.readers[where]
        self.readers[where] = np.where((known == 0) | (known == program), program, -1)
        return _another(self.writers[where], program)

    def write(self, where: Array, program: int) -> tuple[int, int, bool]:
        """Returns another program that has stored there, one that has read there, and whether two lanes meet."""
        writer, reader = _another(self.writers[where], program), _another(self.readers[where], program)
        self.writers[where] = np.arange(where.size, dtype=np.int32)
        meet = bool((self.writers[where] != np.arange(where.size)).any())
        self.writers[where] = program
        return writer, reader, meet


def _another(programs: Array, program: int) -> int:
    others = programs[(programs != 0) & (programs != program)]
    return int(others[0]) if others.size else 0


@dataclass(frozen=True)
class Argument:
    """A tensor that a kernel was given: its extent in memory, and which bytes of that are its own if not all."""

    name: str
    low: int
    high: int
    own: Array | None
    storage: Storage

    def holds(self, lanes: Array, size: int) -> Array:
        """Which elements of `size` bytes at these addresses are its own."""
        inside = (lanes >= self.low) & (lanes + size <= self.high)
        if self.own is not None:
            offsets = np.where(inside, lanes - self.low, 0)
            inside &= self.own[offsets] & self.own[np.where(inside, offsets + size - 1, 0)]
        return inside


@dataclass
class Launch:
    """One kernel's launch, and by tensor argument the bytes that its unmasked lanes moved."""

    kernel: str
    grid: tuple[int, ...] = ()
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    unique_read: int = 0
    unique_written: int = 0
    arguments: list[Argument] = field(default_factory=list)
    storages: dict[int, Storage] = field(default_factory=dict)
    has_atomics: bool = False
    fault: AssertionError | None = None
    unordered: RaceError | None = None  # a fault unless atomics order the programs

    def add(self, value: Any, name: str) -> None:
        """Makes a tensor, or those of a tuple, known as an argument."""
        if isinstance(value, tuple):
            for item in value:
                self.add(item, name)
        elif hasattr(value, "data_ptr"):
            tensor = interpreter._unwrap_tensor(value)
            if tensor.numel():
                argument = self._argument(tensor, name)
                self.arguments.append(argument)

    def _argument(self, tensor: torch.Tensor, name: str) -> Argument:
        memory, size = tensor.untyped_storage(), tensor.element_size()
        storage = self.storages.get(memory.data_ptr())
        if storage is None or storage.granule > size:
            storage = self.storages[memory.data_ptr()] = Storage(memory.data_ptr(), memory.nbytes(), size)
            self.arguments = [_moved(argument, storage) for argument in self.arguments]
        spans = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        extent = (sum(spans) + 1) * size
        own = None
        if extent != tensor.numel() * size:
            own = np.zeros(extent, bool)
            strides = [stride * size for stride in tensor.stride()]
            np.lib.stride_tricks.as_strided(own, (*tensor.shape, size), (*strides, 1))[...] = True
        return Argument(name, tensor.data_ptr(), tensor.data_ptr() + extent, own, storage)

    def touch(self, builder: Builder, kind: str, pointers: Handle, mask: Any) -> None:
        """Checks and counts one load, store or atomic of a program."""
        addresses = np.asarray(pointers.data)
        mask = np.broadcast_to(np.asarray(mask if isinstance(mask, np.ndarray) else mask.data, bool), addresses.shape)
        lanes = addresses[mask].astype(np.int64)
        if not lanes.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        whole = [argument for argument in self.arguments if argument.low <= lanes[0] < argument.high]
        held = [argument for argument in whole if argument.holds(lanes, size).all()]
        if held:
            self._record(builder, kind, held[0], lanes, size)
            return
        for argument in self.arguments:
            inside = argument.holds(lanes, size)
            if inside.any():
                self._record(builder, kind, argument, lanes[inside], size)
                lanes = lanes[~inside]
        if lanes.size:
            self._fail(
                OutOfBoundsError(f"{self._where(builder, kind)}: {lanes.size} lanes {self._near(int(lanes[0]))}")
            )

    def _record(self, builder: Builder, kind: str, argument: Argument, lanes: Array, size: int) -> None:
        moved = self.read if kind == "load" else self.written
        moved[argument.name] += lanes.size * size
        storage, program = argument.storage, 1 + builder.program
        where = storage.granules(lanes, size)
        if kind == "atomic":
            self.has_atomics = True
            storage.atomics[where] = True
            return
        writer = reader = 0
        if kind == "load":
            writer = storage.read(where, program)
        else:
            other, reader, meet = storage.write(where, program)
            if meet:
                self._fail(
                    RaceError(f"{self._where(builder, kind)}: two lanes store to one address of {argument.name}")
                )
            if other:
                self._fail(
                    RaceError(f"{self._where(builder, kind)}: {_names(other)} stored there too, in {argument.name}")
                )
        if (writer or reader) and self.unordered is None:
            what = f"{_names(writer)} stored" if writer else f"{_names(reader)} read"
            self.unordered = RaceError(f"{self._where(builder, kind)}: {what} the same in {argument.name}, in no order")

    def _fail(self, fault: AssertionError) -> None:
        self.fault = fault
        raise fault

    def _where(self, builder: Builder, kind: str) -> str:
        return f"{self.kernel}, program {builder.grid_idx}, {kind}"

    def _near(self, address: int) -> str:
        if not self.arguments:
            return "of a kernel without tensors"
        nearest = min(self.arguments, key=lambda a: min(abs(address - a.low), abs(address - a.high)))
        if nearest.low <= address < nearest.high:
            return f"between the elements of {nearest.name}, at byte {address - nearest.low}"
        if address < nearest.low:
            return f"out of bounds, the first {nearest.low - address} bytes before {nearest.name}"
        return f"out of bounds, the first {address - nearest.high} bytes past the end of {nearest.name}"

    def finish(self) -> None:
        """Raises what only shows at the end, and lets go of the maps of memory."""
        if self.unordered is not None and not self.has_atomics:
            raise self.unordered
        for storage in self.storages.values():
            self.unique_read += int(np.count_nonzero(storage.readers)) * storage.granule
            self.unique_written += int(np.count_nonzero((storage.writers != 0) | storage.atomics)) * storage.granule
        self.arguments, self.storages = [], {}


def _moved(argument: Argument, storage: Storage) -> Argument:
    same = argument.storage.address == storage.address
    return Argument(argument.name, argument.low, argument.high, argument.own, storage) if same else argument


def _names(program: int) -> str:
    return f"program {program - 1}" if program > 0 else "programs"


@dataclass
class Traffic:
    """The bytes that launches moved: by all unmasked lanes, and without those that one launch moved before."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def read(self) -> int:
        return sum(launch.read.total() for launch in self.launches)

    @property
    def written(self) -> int:
        return sum(launch.written.total() for launch in self.launches)

    @property
    def unique_read(self) -> int:
        return sum(launch.unique_read for launch in self.launches)

    @property
    def unique_written(self) -> int:
        return sum(launch.unique_written for launch in self.launches)


_counting: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """What the launches within move."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


class Executor(interpreter.GridExecutor):
    """Runs a grid, watched."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        launch = Launch(self.fn.__name__)
        for name, value in (*zip(self.arg_names, args, strict=False), *kwargs.items()):
            launch.add(value, name)
        interpreter.interpreter_builder.launch = launch
        return args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        builder = interpreter.interpreter_builder
        try:
            with np.errstate(all="ignore"):  # a GPU does not tell of overflow
                super().__call__(*args, **kwargs)
        except InterpreterError:
            if builder.launch is not None and builder.launch.fault is not None:
                raise builder.launch.fault from None
            raise
        finally:
            launch, builder.launch = builder.launch, None
        launch.grid = builder.grid_dim
        launch.finish()
        for traffic in _counting:
            traffic.launches.append(launch)


# Numbers


def _tensor(handle: Handle) -> torch.Tensor:
    data, dtype = np.ascontiguousarray(handle.data), handle.dtype.scalar
    if dtype in AS_BITS:
        data = data.view(np.int16 if dtype == tl.bfloat16 else np.uint8)
        return torch.from_numpy(data).view(TORCH[dtype]).reshape(np.shape(handle.data))
    return torch.from_numpy(data).reshape(np.shape(handle.data))


def _handle(t: torch.Tensor, dtype: tl.dtype) -> Handle:
    if dtype in AS_BITS:
        bits = t.contiguous().view(AS_BITS[dtype]).numpy()
        return Handle(bits.view(np.uint16) if dtype == tl.bfloat16 else bits, dtype)
    return Handle(t.numpy(), dtype)


def _rounded(t: torch.Tensor, dtype: tl.dtype) -> Handle:
    """t in a dtype, half to even; FP8 saturates and keeps NaN, as `cvt.rn.satfinite` does."""
    if dtype in LARGEST:
        t = t.float().clamp(-LARGEST[dtype], LARGEST[dtype])
    return _handle(t.to(TORCH[dtype]), dtype)


def _to_integer(data: Array, dtype: np.dtype[Any]) -> Array:
    """Truncated; poison where no such integer exists."""
    limits = np.iinfo(dtype)
    exact = data.astype(np.float64)
    known = (exact > float(limits.min) - 1) & (exact < float(limits.max) + 1)
    poison = np.frombuffer(bytes([POISON] * dtype.itemsize), dtype)[0]
    return np.where(known, np.where(known, exact, 0).astype(dtype), poison)


def _fma(x: Array, y: Array, z: Array) -> Array:
    """x * y + z in float64, rounded to odd: so rounding to a shorter float is the only rounding."""
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    is_even = (total.view(np.int64) & 1) == 0
    towards = np.nextafter(total, np.copysign(np.inf, error))
    return np.where(is_even & (error != 0) & np.isfinite(total), towards, total)


COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, where a GPU's differ."""

    launch: Launch | None = None
    grid_idx: tuple[int, int, int]
    grid_dim: tuple[int, int, int]

    @property
    def program(self) -> int:
        (x, y, z), (_, ny, nz) = self.grid_idx, self.grid_dim
        return (x * ny + y) * nz + z

    # Memory
    def create_masked_load(
        self, ptrs: Handle, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: Any
    ) -> Handle:
        if self.launch is not None:
            self.launch.touch(self, "load", ptrs, mask)
        if other is None:
            dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
            other = Handle(_poison(ptrs.get_element_ty(), dtype, np.shape(ptrs.data)), ptrs.get_element_ty())
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(
        self, ptrs: Handle, value: Handle, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> Any:
        if self.launch is not None:
            self.launch.touch(self, "store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any) -> Handle:
        if self.launch is not None:
            self.launch.touch(self, "atomic", ptr, mask)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any) -> Handle:
        if self.launch is not None:
            self.launch.touch(self, "atomic", ptr, np.ones(np.shape(ptr.data), bool))
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    # Numbers
    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in TORCH and target in TORCH:
            return _rounded(_tensor(src), target)
        if source in TORCH and target != tl.int1:
            data = _tensor(src).float().numpy() if source in AS_BITS else src.data
            return Handle(_to_integer(data, interpreter._get_np_dtype(target)), target)
        if target in AS_BITS:
            return _rounded(torch.from_numpy(src.data.astype(np.float32)), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: Any) -> Handle:
        if rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., Array]) -> Handle:
        dtype = lhs.dtype.scalar
        if dtype not in AS_BITS or rhs.dtype.scalar not in AS_BITS:
            result = super().binary_op(lhs, rhs, op)
            return Handle(result.data, tl.int1) if op in COMPARISONS else result
        values = op(_tensor(lhs).float().numpy(), _tensor(rhs).float().numpy())
        return Handle(values, tl.int1) if op in COMPARISONS else _rounded(torch.from_numpy(values), dtype)

    def unary_op(self, arg: Handle, op: Callable[..., Array]) -> Handle:
        dtype = arg.dtype.scalar
        if dtype not in AS_BITS:
            return super().unary_op(arg, op)
        return _rounded(torch.from_numpy(op(_tensor(arg).float().numpy())), dtype)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        if propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE:
            return self.create_minnumf(self.create_maxnumf(arg, lo), hi)
        return self.create_minimumf(self.create_maximumf(arg, lo), hi)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        x, y, z_data = (_tensor(h).float().numpy() if h.dtype.scalar in AS_BITS else h.data for h in (x, y, z))
        if z.dtype.scalar == tl.float64:
            raise NotImplementedError("tl.fma of float64 cannot be rounded once here")
        return _rounded(torch.from_numpy(_fma(x, y, z_data)), z.dtype.scalar)

    def create_erf(self, arg: Handle) -> Handle:
        return _handle(torch.erf(_tensor(arg)), arg.dtype.scalar)

    def create_ashr(self, lhs: Handle, rhs: Handle) -> Handle:
        signed = (h.data.astype(interpreter._get_signed_np_dtype(h.data.dtype)) for h in (lhs, rhs))
        return Handle(np.right_shift(*signed), lhs.dtype.scalar)  # the stock one changes its operands

    def create_dot(self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: Any) -> Handle:
        if a.dtype.scalar.is_int():
            # Partial sums are exact in the float that holds the largest, and only floats multiply fast.
            exact = np.float32 if a.data.shape[-1] * 2**14 <= 2**24 else np.float64
            product = np.matmul(a.data.astype(exact), b.data.astype(exact)).astype(np.int32)
            return Handle(product + d.data, d.dtype.scalar)
        if a.dtype.scalar == tl.float64:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        x, y = _tensor(a).float().numpy(), _tensor(b).float().numpy()
        if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            x, y = (_tf32(t) for t in (x, y))
        return Handle((np.matmul(x, y) + d.data).astype(d.data.dtype), d.dtype.scalar)


def _tf32(x: Array) -> Array:
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _poison(dtype: tl.dtype, np_dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if dtype in TORCH:
        return np.broadcast_to(_handle(torch.full((1,), float("nan")).to(TORCH[dtype]), dtype).data, shape)
    if dtype == tl.int1:
        return np.ones(shape, bool)
    return np.full(shape, np.frombuffer(bytes([POISON] * np_dtype.itemsize), np_dtype)[0])


# Installation


def _poison_tensor(t: torch.Tensor) -> torch.Tensor:
    if type(t) is torch.Tensor and t.device.type == "cpu" and t.layout == torch.strided and t.numel():
        if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            t.view(torch.uint8).fill_(0x7F)  # NaN in both
        elif t.is_floating_point():
            t.fill_(float("nan"))
        elif t.dtype == torch.bool:
            t.fill_(True)
        elif not t.is_complex():
            t.fill_(int.from_bytes(bytes([POISON] * t.element_size()), "little"))
    return t


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: _poison_tensor(make(*args, **kwargs))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, what torch leaves uninitialised is NaN, or integers of `POISON` bytes."""
    patches = [patch.object(torch, name, _poisoning(getattr(torch, name))) for name in FILLERS]
    patches.append(patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty)))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def install() -> None:
    """Safe to call again. There is no way back."""
    builder = interpreter.interpreter_builder
    if isinstance(builder, Builder):
        return
    builder.__class__ = Builder
    # Overflow of int32 would be computed at every sum and then dropped.
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.GridExecutor = Executor
    # The stock interpreter puts its functions into triton.language at each call of each function, which is most of what
    # small kernels take. They are there once and for all now.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
