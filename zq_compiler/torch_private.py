"""Every private name of torch that the package uses. A new torch version is tried by reading this one file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as _symbolic_shapes_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "LateGuards",
    "OpOverload",
    "TracingContext",
    "backed_size_oblivious",
    "concrete",
    "decomposing",
    "functionalized",
    "inductor_compile",
    "int_mm",
    "make_fx",
    "new_symbol",
    "pytree",
    "storage_key",
    "subclass_functions_off",
    "symbolic_fake_mode",
    "symbolic_sizes_allowed",
]


_HAS_VNNI: bool = torch.cpu._is_vnni_supported()
_EXACT_K = 1024  # float32 holds every sum of this many products exactly: 1024 * 128 * 128 = 2^24


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact INT8 matrix product, `[M, K] x [K, N] -> [M, N]` int32."""
    if b.shape[0] == 1:  # on the CPU torch 2.13 then returns whatever the memory held
        return a.int() * b.int()
    # An autocast would round the float operands: there, torch's own integers.
    if (
        a.is_cpu and not _HAS_VNNI and not torch.is_autocast_enabled("cpu")
    ):  # torch then goes through a loop that is 20 times slower than a float product
        pieces = zip(a.split(_EXACT_K, 1), b.split(_EXACT_K, 0), strict=True)
        return sum((x.float() @ y.float()).int() for x, y in pieces)
    if a.is_cuda:
        return _int_mm_cuda(a, b)
    return torch._int_mm(a, b)


def _int_mm_cuda(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cuBLAS takes more than 16 rows, and multiples of 8 otherwise: zeros up to there change no sum."""
    (m, k), n = a.shape, b.shape[1]
    if isinstance(a, FakeTensor):  # of sizes that may be symbols, which nothing can be padded by
        return a.new_zeros((m, n), dtype=torch.int32)
    if m > 16 and k % 8 == n % 8 == 0:
        return torch._int_mm(a, b)
    a = torch.nn.functional.pad(a, (0, -k % 8, 0, max(17 - m, 0)))
    b = torch.nn.functional.pad(b.t(), (0, -k % 8, 0, -n % 8)).t()
    return torch._int_mm(a, b)[:m, :n]


def concrete(value: Any) -> Any:
    """The number a symbolic size stood for when it was traced, without a guard on it; other values as they are."""
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value


def backed_size_oblivious() -> Any:
    """Context in which an example dimension of size 1 does not become the constant 1."""
    return _symbolic_shapes_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def subclass_functions_off() -> Any:
    """Context in which tensors of subclasses are computed with as plain ones: for use in `__torch_function__`."""
    return torch._C.DisableTorchFunctionSubclass()


def symbolic_sizes_allowed() -> Any:
    """Context in which ops that the dispatcher knows for concrete sizes only (baddbmm, pad, upsample) take symbols."""
    from torch._dispatch.python import enable_python_dispatcher  # imports sympy

    return enable_python_dispatcher()


def symbolic_fake_mode() -> FakeTensorMode:
    """A fake mode of its own, in which equal sizes are not taken for one symbol."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # imports sympy, which takes most of a second

    return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))


def new_symbol(mode: FakeTensorMode, hint: int) -> int | torch.SymInt:
    """A symbolic size that was `hint` when it was seen."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(hint, device="meta"), symbolic_context=context).shape[0]


@contextlib.contextmanager
def decomposing(table: Mapping[Any, Callable[..., Any]]) -> Iterator[dict[Any, Callable[..., Any]]]:
    """Context in which a trace decomposes what `ExportedProgram.run_decompositions(table)` does.

    Yields:
        The part of the table that the trace itself is to be given; composite operators are none of its business.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.export import exported_program  # imports sympy, which takes most of a second

    composite, functions = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(table))
    with exported_program._override_composite_implicit_decomp(composite), enable_python_dispatcher():
        yield functions


def functionalized(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors whose trace computes anew what the function changes in place, its arguments included."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    return dispatch_functionalize(function, FunctionalTensorMode())


class LateGuards:
    """What is found out about symbolic sizes from now on, when Dynamo's own guards can no longer be added to.

    Args:
        values: fake tensors and numbers, of a graph's inputs.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        sizes = [((i, d), size) for i, value in enumerate(values) for d, size in enumerate(_sizes(value))]
        sizes = [(place, size) for place, size in sizes if isinstance(size, torch.SymInt)]
        self._places, self._symbolic = [place for place, _ in sizes], [size for _, size in sizes]
        self._env: Any = None
        if self._symbolic:
            self._env = self._symbolic[0].node.shape_env
            self._known = len(self._env.guards)
        self._code: Any = None

    def close(self) -> None:
        """What was found out by now is what `hold` looks at."""
        if self._env is not None and len(self._env.guards) > self._known:
            code = self._env.produce_guards_expression(self._symbolic, ignore_static=False)
            self._code = code and compile(code, "guards on sizes", "eval")

    def hold(self, inputs: Sequence[Any]) -> bool:
        """Whether real inputs are as they were found to be."""
        if self._code is None:
            return True
        return self._env.evaluate_guards_expression(self._code, [_sizes(inputs[i])[d] for i, d in self._places])


def _sizes(value: Any) -> Sequence[Any]:
    return value.shape if isinstance(value, torch.Tensor) else [value]


def storage_key(tensor: torch.Tensor) -> StorageWeakRef:
    """Equal for tensors that share memory; hashable, and never reused for another storage."""
    return StorageWeakRef(tensor.untyped_storage())


def inductor_compile(gm: torch.fx.GraphModule, example_inputs: Any, mode: str | None = None) -> Any:
    """Inductor's own backend function; imported late because it is slow to import.

    Args:
        mode: as `torch.compile` takes it. Under `"reduce-overhead"`, a graph on CUDA becomes a CUDA graph.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    # A graph that has this does not change its constants: else a CUDA graph would copy them to a place of its own at
    # each call.
    gm.meta.setdefault("dynamo_compile_id", None)
    return compile_fx(gm, example_inputs, config_patches=list_mode_options(mode) if mode else None)
