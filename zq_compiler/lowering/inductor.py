"""Inductor on the CPU: our C++ kernels where the machine has AVX512-VNNI or AVX2, plain torch for what is left.

For every dialect node one provider is chosen:

    native     our C++ kernel, an opaque op; a weight is repacked for it
    inline     the reference itself, which Inductor traces into and fuses with its neighbours
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .. import kernels
from ..formats import FORMATS, unpack
from ..kernels import reference_of
from ..kernels.cpu import build as native_kernels
from ..kernels.low_rank_linear import factor
from ..program import Program, copy_graph, fake_value, get_constant, set_constant, size
from ..rewrite import arguments

aten = torch.ops.aten


@dataclass
class ProviderChoice:
    """Which provider runs an op, how often, and why not the native one."""

    op: str
    provider: str
    reason: str = ""
    count: int = 0


@dataclass
class Lowered:
    """A graph that Inductor compiles, and the choices made."""

    gm: fx.GraphModule
    providers: list[ProviderChoice] = field(default_factory=list)


def lower(program: Program, native: bool = True) -> Lowered:
    """Choose a provider for each dialect node, on a copy of the graph; constants are shared with the Program.

    Args:
        native: False inlines every op, for tests and comparisons.

    Raises:
        KernelBuildError: this machine should run the native kernels and they do not compile.
    """
    lowered = Lowered(copy_graph(program.gm))
    graph = lowered.gm.graph
    choices: dict[tuple[str, str, str], ProviderChoice] = {}
    missing = native_kernels.unavailable_reason() if native else "native kernels were switched off"
    for node in list(graph.nodes):
        reference = reference_of(node.target)
        if reference is None:
            continue
        reason = _why_inline(node, missing)
        if reason is None:
            native_kernels.load()
            _NATIVE[node.target](lowered.gm, node)
        else:
            node.target = reference
        key = reference.__name__, "inline" if reason else "native", reason or ""
        choices.setdefault(key, ProviderChoice(*key)).count += 1
    lowered.providers = list(choices.values())
    graph.eliminate_dead_code()
    lowered.gm.delete_all_unused_submodules()
    lowered.gm.recompile()
    return lowered


def _why_inline(node: fx.Node, missing: str | None) -> str | None:
    """Why a node cannot have a native kernel; None when it can."""
    if node.target not in _NATIVE:
        return "no native kernel: Inductor fuses it"
    value = fake_value(node.args[3 if node.target is kernels.embedding_layer_norm_quantize else 0])  # type: ignore[arg-type]
    if value.device.type != "cpu":
        return f"the native kernels run on the CPU, not on {value.device.type}"
    if missing is not None:
        return missing
    given = [a for a in node.args if isinstance(a, torch.dtype)]
    dtype = given[-1] if given else value.dtype
    integers = node.target is kernels.int8_linear_quantize or (
        node.target is kernels.int8_attention and dtype is torch.int8
    )
    if not integers and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the native kernels have no {dtype}"
    return None


# --- native forms: each replaces a dialect node in place -----------------------------------------------------------


def _same_signature(gm: fx.GraphModule, node: fx.Node) -> None:
    """The kernel has the dialect op's name and arguments."""
    node.target = getattr(torch.ops.zq_cpu, node.target._opname).default  # type: ignore[union-attr]


def _native_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    """The four norms are one kernel. It writes `y` and `h` only where something reads them."""
    x, *rest = arguments(node)
    with_add = node.target in (kernels.add_layer_norm_quantize, kernels.add_rms_norm_quantize)
    residual = rest.pop(0) if with_add else None
    rms = node.target in (kernels.rms_norm_quantize, kernels.add_rms_norm_quantize)
    weight, bias, eps, rotated = (rest[0], None, *rest[1:]) if rms else rest
    read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    node.target = torch.ops.zq_cpu.norm_quantize.default
    node.args = (x, residual, weight, bias, eps, rms, 2 in read, 3 in read, rotated)


def _native_integer_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    """The same kernel, which dequantizes its summands as it reads them."""
    x, x_scale, residual, residual_scale, residual_rotated, weight, *rest = arguments(node)
    rms = node.target is kernels.int8_add_rms_norm_quantize
    bias, eps, rotated, dtype = (None, *rest) if rms else rest
    read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    node.target = torch.ops.zq_cpu.norm_quantize.default
    scales = (x_scale, residual_scale, residual_rotated, dtype)
    node.args = (x, residual, weight, bias, eps, rms, 2 in read, 3 in read, rotated, *scales)


def _native_embedding(gm: fx.GraphModule, node: fx.Node) -> None:
    """The lookup and the sum are Inductor's, the norm and the quantize are our kernel's."""
    ids, table_q, table_scale, others, weight, bias, eps, rotated = arguments(node)
    lookup = reference_of(kernels.int8_embedding)
    assert lookup is not None
    with gm.graph.inserting_before(node):
        rows = gm.graph.call_function(lookup, (ids, table_q, table_scale, fake_value(others).dtype))
        total = gm.graph.call_function(torch.ops.aten.add.Tensor, (rows, others))
    read = {user.args[1] for user in node.users if user.target is operator.getitem and user.users}
    node.target = torch.ops.zq_cpu.norm_quantize.default
    node.args = (total, None, weight, bias, eps, False, 2 in read, False, rotated)


def _native_linear(gm: fx.GraphModule, node: fx.Node) -> None:
    x_q, x_scale, w_q, w_scale, bias, *rest = node.args
    gelu = node.target is kernels.int8_linear_gelu_quantize
    target = torch.ops.zq_cpu.int8_linear_gelu_quantize if gelu else torch.ops.zq_cpu.int8_linear
    name = str(w_q.target)  # type: ignore[union-attr]
    packed, colsum = _once(_packed, get_constant(gm, name))
    with gm.graph.inserting_before(node):
        constants = _set_constants(gm, name, packed=packed, colsum=colsum)
        arguments = (x_q, x_scale, constants[0], w_scale, constants[1], bias, *(rest or [torch.int8]))
        call = gm.graph.call_function(target.default, arguments)
    _replace(gm, node, call)


def _native_weight_only(gm: fx.GraphModule, node: fx.Node) -> None:
    x, w_packed, w_scale, bias, format, group = node.args
    name = str(w_packed.target)  # type: ignore[union-attr]
    packed, scale = get_constant(gm, name), get_constant(gm, str(w_scale.target))  # type: ignore[union-attr]
    codes, scales = _once(torch.ops.zq_cpu.pack_codes, packed, scale, format)
    with gm.graph.inserting_before(node):
        constants = _set_constants(gm, name, codes=codes, scales=scales)
        arguments = (x, *constants, bias, format, group, packed.shape[0])
        call = gm.graph.call_function(torch.ops.zq_cpu.weight_only_linear.default, arguments)
    _replace(gm, node, call)


def _native_fp8(gm: fx.GraphModule, node: fx.Node) -> None:
    """The values of FP8 in floats, times the packed weight; scale and bias are Inductor's."""
    x_q, x_scale, w_packed, w_scale, bias, format, group, dtype = node.args
    name = str(w_packed.target)  # type: ignore[union-attr]
    packed, scale = get_constant(gm, name), get_constant(gm, str(w_scale.target))  # type: ignore[union-attr]
    codes, scales = _once(torch.ops.zq_cpu.pack_codes, packed, scale, format)
    with gm.graph.inserting_before(node):
        constants = _set_constants(gm, name, codes=codes, scales=scales)
        x = gm.graph.call_function(aten.to.dtype, (x_q, torch.float32))
        arguments = (x, *constants, None, format, group, packed.shape[0])
        y = gm.graph.call_function(torch.ops.zq_cpu.weight_only_linear.default, arguments)
        y = gm.graph.call_function(aten.mul.Tensor, (y, x_scale))
        if bias is not None:
            offset = gm.graph.call_function(aten.to.dtype, (bias, torch.float32))
            y = gm.graph.call_function(aten.add.Tensor, (y, offset))
        call = gm.graph.call_function(aten.to.dtype, (y, dtype))
    _replace(gm, node, call)


def _native_w4a8(gm: fx.GraphModule, node: fx.Node) -> None:
    x_q, x_scale, w_packed, w_scale, bias, format, group, dtype = node.args
    name = str(w_packed.target)  # type: ignore[union-attr]
    packed, scale = get_constant(gm, name), get_constant(gm, str(w_scale.target))  # type: ignore[union-attr]
    features = size(fake_value(x_q).shape[-1])  # type: ignore[arg-type]
    codes, scales = _once(_nibbles, packed, scale, format, features)
    with gm.graph.inserting_before(node):
        constants = _set_constants(gm, name, codes=codes, scales=scales)
        arguments = (x_q, x_scale, *constants, bias, group, packed.shape[0], dtype)
        call = gm.graph.call_function(torch.ops.zq_cpu.w4a8_linear.default, arguments)
    _replace(gm, node, call)


def _native_low_rank(gm: fx.GraphModule, node: fx.Node) -> None:
    y, x, v, u, v_scale, u_scale = arguments(node)
    factors = [get_constant(gm, str(f.target)) for f in (v, u)]
    scales = [None if s is None else get_constant(gm, str(s.target)) for s in (v_scale, u_scale)]
    down, up = _once(_ranks_first, factors[0], factors[1], *scales, fake_value(y).dtype)
    with gm.graph.inserting_before(node):
        constants = _set_constants(gm, str(v.target), down=down, up=up)
        call = gm.graph.call_function(torch.ops.zq_cpu.low_rank_linear.default, (y, x, *constants))
    _replace(gm, node, call)


def _ranks_first(
    v: Tensor, u: Tensor, v_scale: Tensor | None, u_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both factors as the kernel reads them: float16 as stored, the values of integers in float32."""
    u = u.t().contiguous()
    if v_scale is None or u_scale is None:
        return v, u
    return factor(v, v_scale, dtype).float(), factor(u, u_scale.t(), dtype).float()


def _nibbles(packed: Tensor, scale: Tensor, format: str, features: int) -> tuple[Tensor, Tensor]:
    """Codes in the kernel's layout: a format of fewer bits takes four too."""
    fmt = FORMATS[format]
    values = fmt.decode(unpack(packed, fmt.bits, features)).to(torch.int8)
    return torch.ops.zq_cpu.pack_nibbles(values, scale)


def _set_constants(gm: fx.GraphModule, name: str, **values: Tensor) -> list[fx.Node]:
    """Constants made of another one, named after it."""
    for suffix, value in values.items():
        set_constant(gm, f"{name}_{suffix}", value)
    return [gm.graph.get_attr(f"{name}_{suffix}") for suffix in values]


def _replace(gm: fx.GraphModule, node: fx.Node, call: fx.Node) -> None:
    """A call in a node's place; constants that only the node read are gone with it."""
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    constants = [n for n in node.all_input_nodes if n.op == "get_attr"]
    gm.graph.erase_node(node)
    for constant in constants:
        if not constant.users:
            gm.graph.erase_node(constant)
            owner, _, buffer = str(constant.target).rpartition(".")
            gm.get_submodule(owner)._buffers.pop(buffer, None)


def _packed(w_q: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in the kernel's layout and its column sums."""
    return torch.ops.zq_cpu.pack_weight(w_q), w_q.sum(1, dtype=torch.int32)


_made: dict[tuple[int, Callable[..., Any]], tuple[weakref.ref[Tensor], tuple[Tensor, Tensor]]] = {}


def _once(make: Callable[..., tuple[Tensor, Tensor]], constant: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """What is made of a constant, once for all graphs that share it; the others always come with it."""
    key = id(constant), make
    known = _made.get(key)
    if known is None or known[0]() is not constant:
        made = _made  # at exit, globals go first
        reference = weakref.ref(constant, lambda _: made.pop(key, None))
        known = _made[key] = reference, make(constant, *others)
    return known[1]


# Every dialect op with a native kernel; the others are inlined.
_NATIVE: dict[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    kernels.int8_linear: _native_linear,
    kernels.int8_linear_quantize: _native_linear,
    kernels.int8_linear_gelu_quantize: _native_linear,
    kernels.weight_only_linear: _native_weight_only,
    kernels.w4a8_linear: _native_w4a8,
    kernels.fp8_linear: _native_fp8,
    kernels.low_rank_linear: _native_low_rank,
    kernels.int8_add_layer_norm_quantize: _native_integer_norm,
    kernels.int8_add_rms_norm_quantize: _native_integer_norm,
    kernels.embedding_layer_norm_quantize: _native_embedding,
    kernels.quantize_per_token: _same_signature,
    kernels.layer_norm_quantize: _native_norm,
    kernels.add_layer_norm_quantize: _native_norm,
    kernels.rms_norm_quantize: _native_norm,
    kernels.add_rms_norm_quantize: _native_norm,
    kernels.gelu_quantize: _same_signature,
    kernels.silu_mul_quantize: _same_signature,
    kernels.gelu_quantize_static: _same_signature,
    kernels.silu_mul_quantize_static: _same_signature,
    kernels.int8_attention: _same_signature,
}
