"""The CUDA kernels at the shapes of real models, each beside what torch does in float16 in its place.

They are what `zq bench --device cuda` times and what docs/kernels.md describes. Arguments are made on any device, on
`meta` too, where they have shapes and no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import FORMATS, packed_size
from ..kernels.cached_attention import quantize_keys, quantize_values
from ..kernels.cuda import registration
from ..torch_private import pytree

HALF = torch.float16
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class KernelCase:
    """One op at one shape.

    Args:
        op: of `torch.ops.zq_cuda`.
        shape: in words.
        arguments: of the op, made on a device.
        floats: what torch does in float16 instead, and what makes its arguments.
        operations: of tensor cores, two a multiply-add.
        operands: of these, as a dtype's name.
        skipped: bytes of the arguments that need not be read: rows of a table that are not looked up.
    """

    op: str
    shape: str
    arguments: Callable[[str], Arguments]
    floats: tuple[Callable[..., Any], Callable[[str], Arguments]]
    operations: int = 0
    operands: str = "float16"
    skipped: int = 0

    def run(self, *arguments: Any) -> Any:
        """The op, by its host function."""
        return registration.HOSTS[self.op](*arguments)

    @property
    def bytes(self) -> int:
        """What must be moved at least: every argument read, every result written, once."""
        arguments = self.arguments("meta")
        results = getattr(getattr(torch.ops, registration.NAMESPACE), self.op)(*arguments)
        return _bytes(arguments, results) - self.skipped

    @property
    def float_bytes(self) -> int:
        """The same, of the float16 form."""
        call, make = self.floats
        arguments = make("meta")
        return _bytes(arguments, call(*arguments)) - 2 * self.skipped


def _bytes(*values: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def cases() -> Iterator[KernelCase]:
    """All of them: hidden sizes of BERT-base and Llama-7B, one row to 8,192, 16 sequences of 512 tokens."""
    registration.load()
    for m, k in ((512, 768), (8192, 768), (8192, 4096)):
        yield _quantize(m, k)
        yield _norm(m, k, rms=k == 4096)
    yield _embedding(8192, 768, 30522)
    yield _gelu(8192, 3072)
    yield _gelu_static(8192, 3072)
    yield _silu_mul(8192, 11008)
    for m, n, k in ((1, 4096, 4096), (16, 4096, 4096), (512, 768, 768), (512, 3072, 768), (8192, 3072, 768)):
        yield _int8(m, n, k)
    yield _int8(8192, 4096, 4096)
    yield _int8_gelu(8192, 3072, 768)
    yield _int8_low_rank(8192, 4096, 4096, 8)
    for m in (1, 16, 512):
        yield _w4a8(m, 4096, 4096, 128)
        yield _weight_only(m, 4096, 4096, "int4", 128)
    yield _weight_only(1, 4096, 4096, "fp6_e3m2", 128)
    yield _fp8(512, 4096, 4096)
    for m in (1, 8192):
        yield _low_rank(_w4a8(m, 4096, 4096, 128), m, 4096, 8)
        yield _low_rank(_weight_only(m, 4096, 4096, "int4", 128), m, 4096, 8)
    yield _low_rank(_fp8(8192, 4096, 4096), 8192, 4096, 8)
    yield _experts(8, 2048, 4096, 4096)
    yield _softmax(16, 12, 512)
    yield _attention(16, 12, 12, 512, 64, causal=False)
    yield _attention(4, 32, 8, 2048, 128, causal=True)
    yield _decode(8, 32, 8, 4096, 128)


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=HALF, device=device)


def _int8s(device: str, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)


def _steps(device: str, *shape: int) -> Tensor:
    return torch.rand(shape, device=device) / 100 + 0.001


def _quantize(m: int, k: int) -> KernelCase:
    return KernelCase(
        "quantize_per_token",
        f"{m} x {k}",
        lambda device: (_normal(device, m, k),),
        (lambda x: x.clone(), lambda device: (_normal(device, m, k),)),
    )


def _norm(m: int, k: int, rms: bool) -> KernelCase:
    def floats(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return h, F.rms_norm(h, (k,), weight) if rms else F.layer_norm(h, (k,), weight)

    def arguments(device: str) -> Arguments:
        bias = None if rms else _normal(device, k)
        return _normal(device, m, k), _normal(device, m, k), _normal(device, k), bias, 1e-5, rms, False, True

    name = "RMSNorm" if rms else "LayerNorm"
    return KernelCase(
        "norm_quantize",
        f"residual and {name}, {m} x {k}",
        arguments,
        (floats, lambda device: (_normal(device, m, k), _normal(device, m, k), _normal(device, k))),
    )


def _embedding(m: int, k: int, vocabulary: int) -> KernelCase:
    def ids(device: str) -> Tensor:
        return torch.randint(0, vocabulary, (m,), device=device)

    def arguments(device: str) -> Arguments:
        table = _int8s(device, vocabulary, k), _steps(device, vocabulary, 1)
        return ids(device), *table, _normal(device, m, k), _normal(device, k), _normal(device, k), 1e-5

    def floats(ids: Tensor, table: Tensor, others: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(F.embedding(ids, table) + others, (k,), weight, bias)

    def float_arguments(device: str) -> Arguments:
        table = _normal(device, vocabulary, k)
        return ids(device), table, _normal(device, m, k), _normal(device, k), _normal(device, k)

    skipped = (vocabulary - m) * (k + 4)
    shape = f"{m} of {vocabulary} rows of {k}"
    return KernelCase("embedding_layer_norm_quantize", shape, arguments, (floats, float_arguments), skipped=skipped)


def _gelu(m: int, k: int) -> KernelCase:
    return KernelCase(
        "gelu_quantize",
        f"{m} x {k}",
        lambda device: (_normal(device, m, k), "none"),
        (F.gelu, lambda device: (_normal(device, m, k),)),
    )


def _gelu_static(m: int, k: int) -> KernelCase:
    return KernelCase(
        "gelu_quantize_static",
        f"{m} x {k}, feature-wise",
        lambda device: (_normal(device, m, k), "none", _steps(device, 1, k)),
        (F.gelu, lambda device: (_normal(device, m, k),)),
    )


def _silu_mul(m: int, k: int) -> KernelCase:
    def pair(device: str) -> Arguments:
        return _normal(device, m, k), _normal(device, m, k)

    return KernelCase("silu_mul_quantize", f"{m} x {k}", pair, (lambda gate, up: F.silu(gate) * up, pair))


def _linear(op: str, m: int, n: int, k: int, what: str, arguments: Any, operands: str = "int8") -> KernelCase:
    floats = F.linear, lambda device: (_normal(device, m, k), _normal(device, n, k), _normal(device, n))
    shape = f"{m} x {n} x {k}{what}"
    return KernelCase(op, shape, arguments, floats, operations=2 * m * n * k, operands=operands)


def _int8_operands(device: str, m: int, n: int, k: int) -> Arguments:
    weight = _int8s(device, n, k), _steps(device, n, 1)
    return _int8s(device, m, k), _steps(device, m, 1), *weight, _normal(device, n)


def _int8(m: int, n: int, k: int) -> KernelCase:
    return _linear("int8_linear", m, n, k, "", lambda device: (*_int8_operands(device, m, n, k), HALF))


def _int8_gelu(m: int, n: int, k: int) -> KernelCase:
    def arguments(device: str) -> Arguments:
        return *_int8_operands(device, m, n, k), HALF, "none", _steps(device, 1, n)

    return _linear("int8_linear_gelu_quantize", m, n, k, "", arguments)


def _int8_low_rank(m: int, n: int, k: int, rank: int) -> KernelCase:
    def arguments(device: str) -> Arguments:
        branch = _normal(device, m, rank), _normal(device, n, rank), None
        return *_int8_operands(device, m, n, k), *branch, HALF

    return _linear("int8_linear_low_rank", m, n, k, f", rank {rank}", arguments)


def _codes(device: str, n: int, k: int, format: str, group: int) -> Arguments:
    size = packed_size(k, FORMATS[format].bits)
    codes = torch.randint(0, 256, (n, size), dtype=torch.uint8, device=device)
    if format == "fp8_e4m3":
        codes = codes & 0xBF  # of which none is NaN
    groups = -(-k // group)
    return codes, _steps(device, n, groups).to(HALF), format, group


def _laid_out(device: str, pack: Any, n: int, k: int, format: str, group: int, *others: Any) -> Arguments:
    """A random weight in its kernel's layout; on meta, empty ones of its shape."""
    codes, scale = pack(*_codes("cpu", n, k, format, group), k, *others)
    return codes.to(device), scale.to(device)


def _w4a8(m: int, n: int, k: int, group: int) -> KernelCase:
    def arguments(device: str) -> Arguments:
        from ..kernels.cuda.w4a8_linear import pack_w4a8

        weight = _laid_out(device, pack_w4a8, n, k, "int4", group)
        return _int8s(device, m, k), _steps(device, m, 1), *weight, _normal(device, n), "int4", group, HALF

    return _linear("w4a8_linear", m, n, k, f", groups of {group}", arguments)


def _weight_only(m: int, n: int, k: int, format: str, group: int) -> KernelCase:
    def arguments(device: str) -> Arguments:
        from ..kernels.cuda.weight_only_linear import pack_weight_only

        weight = _laid_out(device, pack_weight_only, n, k, format, group)
        return _normal(device, m, k), *weight, _normal(device, n), format, group

    return _linear("weight_only_linear", m, n, k, f", {format}, groups of {group}", arguments, "float16")


def _fp8(m: int, n: int, k: int) -> KernelCase:
    def arguments(device: str) -> Arguments:
        from ..kernels.cuda.fp8_linear import pack_fp8

        format = "fp8_e4m3"
        architecture = registration.architecture(torch.device(device))
        weight = _laid_out(device, pack_fp8, n, k, format, 128, architecture)
        x = _normal("cpu", m, k).to(torch.float8_e4m3fn).to(device)
        return x, _steps(device, m, 1), *weight, _normal(device, n), format, 128, HALF

    return _linear("fp8_linear", m, n, k, ", groups of 128", arguments, "float8_e4m3fn")


def _low_rank(case: KernelCase, m: int, n: int, rank: int) -> KernelCase:
    """With a branch added, given what its ranks see."""

    def arguments(device: str) -> Arguments:
        return *case.arguments(device), _normal(device, m, rank), _normal(device, n, rank)

    return replace(case, shape=f"{case.shape}, rank {rank}", arguments=arguments)


def _experts(experts: int, m: int, n: int, k: int) -> KernelCase:
    def ends(device: str) -> Tensor:
        return torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (m // experts)

    def arguments(device: str) -> Arguments:
        weights = _int8s(device, experts, n, k), _steps(device, experts, n)
        return _int8s(device, m, k), _steps(device, m, 1), *weights, ends(device), HALF

    def floats(x: Tensor, weights: Tensor) -> Tensor:
        return (x.unflatten(0, (experts, -1)) @ weights.transpose(1, 2)).flatten(0, 1)

    def float_arguments(device: str) -> Arguments:
        return _normal(device, m, k), _normal(device, experts, n, k)

    shape, operations = f"{experts} experts, {m} x {n} x {k}", 2 * m * n * k
    return KernelCase("grouped_int8_linear", shape, arguments, (floats, float_arguments), operations, "int8")


def _softmax(batch: int, heads: int, tokens: int) -> KernelCase:
    size = batch, heads, tokens, tokens
    return KernelCase(
        "softmax_quantize",
        " x ".join(map(str, size)),
        lambda device: (_normal(device, *size), None, False, torch.full((1, 1, 1, 1), 1 / 255, device=device)),
        (lambda x: x.softmax(-1), lambda device: (_normal(device, *size),)),
    )


def _attention(batch: int, heads: int, shared: int, tokens: int, features: int, causal: bool) -> KernelCase:
    def made(device: str, make: Any) -> Arguments:
        return tuple(make(device, batch, h, tokens, features) for h in (heads, shared, shared))

    def arguments(device: str) -> Arguments:
        one = torch.full((1, 1, 1, 1), 1e-4, device=device)
        return *made(device, _int8s), one, None, causal, None, one, HALF

    def floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != shared)

    operations = 4 * batch * heads * tokens * tokens * features // (2 if causal else 1)
    heads_text = f"{heads} heads" if heads == shared else f"{heads} heads on {shared}"
    shape = f"{batch} x {tokens}, {heads_text} of {features}{', causal' if causal else ''}"
    floats_too = floats, lambda device: made(device, _normal)
    return KernelCase("int8_attention", shape, arguments, floats_too, operations, "int8")


def _decode(batch: int, heads: int, shared: int, tokens: int, features: int) -> KernelCase:
    group, recent = 64, 64

    def arguments(device: str) -> Arguments:
        size = batch, shared, tokens - recent, features
        keys = [part.to(device) for part in quantize_keys(_normal("cpu", *size), 8, group)]
        values = [part.to(device) for part in quantize_values(_normal("cpu", *size), 8, group)]
        new = _normal(device, batch, shared, recent, features), _normal(device, batch, shared, recent, features)
        query = _normal(device, batch, heads, 1, features)
        return query, *keys, *values, *new, None, True, features**-0.5, 8, group

    def float_arguments(device: str) -> Arguments:
        cache = [_normal(device, batch, shared, tokens, features) for _ in range(2)]
        return _normal(device, batch, heads, 1, features), *cache

    def floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    shape = f"{batch} x 1 of {tokens}, {heads} heads on {shared} of {features}, 8 bits"
    operations = 4 * batch * heads * tokens * features
    return KernelCase("cached_attention", shape, arguments, (floats, float_arguments), operations)
