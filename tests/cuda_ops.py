"""A case of every dialect op that CUDA has a kernel for, and Programs of one op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from zq_compiler import kernels, numerics
from zq_compiler.kernels.cached_attention import quantize_keys, quantize_values
from zq_compiler.program import Program, Stage, set_constant
from zq_compiler.recipe import load_recipe
from zq_compiler.torch_private import FakeTensorMode

K, N = 64, 48
Operands = tuple[list[Any], tuple[int, ...]]  # of an op, and which of them are constants


def lone(
    target: Any, operands: list[Any], constants: tuple[int, ...], mode: FakeTensorMode, fake: Callable[[Tensor], Tensor]
) -> Program:
    """A Program of one dialect op, whose tensors are those that `fake` makes in `mode`."""
    graph = fx.Graph()
    gm, nodes = fx.GraphModule({}, graph), []
    for index, operand in enumerate(operands):
        if not isinstance(operand, Tensor):
            nodes.append(operand)
            continue
        name = f"operand{index}"
        if index in constants:
            set_constant(gm, f"layer.{name}", operand)
        nodes.append(graph.get_attr(f"layer.{name}") if index in constants else graph.placeholder(name))
        with mode:
            nodes[-1].meta["val"] = fake(operand)
    call = graph.call_function(target, tuple(nodes))
    with mode:
        call.meta["val"] = results = target(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in nodes))
    outputs = [call]
    if isinstance(results, tuple):
        outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
        for node, result in zip(outputs, results, strict=True):
            node.meta["val"] = result
    graph.output(tuple(outputs))
    gm.recompile()
    return Program(gm, load_recipe("w8a8"), Stage.FUSED)


def cases(dtype: torch.dtype, transposed: bool = False) -> dict[Any, Operands]:
    """Operands of each op.

    Args:
        dtype: of floats.
        transposed: features are not next to one another.
    """
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) + 0.1

    def integers(*shape: int, top: int = 128) -> Tensor:
        return torch.randint(1 - top, top, shape, generator=g, dtype=torch.int8)

    def rows(make: Callable[..., Tensor], features: int = K) -> Tensor:
        return make(2, features, 3).transpose(1, 2) if transposed else make(2, 3, features)

    def packed(format: str, group: int) -> tuple[Tensor, Tensor]:
        return numerics.quantize_weight(randn(N, K).float(), format, group)

    x, y, q = rows(randn), rows(randn), rows(integers)
    scale, feature = rand(2, 3, 1) / 127, rand(1, 1, K) / 32
    weight, bias, out_bias = randn(K), randn(K), randn(N)
    linear = [q, scale, integers(N, K), rand(N, 1) / 127, out_bias]
    integer_linear = [q, scale, integers(N, K), rand(N, 1) / 8, out_bias]
    gelu_linear = [*linear, dtype, "none", rand(1, 1, N) / 8]
    heads = [integers(2, 5, 4, 32).transpose(1, 2) for _ in range(3)]
    attention_scales = rand(1, 4, 1, 1) / 5000, rand(1, 4, 1, 32) / 127
    table = [torch.randint(9, (2, 3), generator=g), integers(9, K), rand(9, 1) / 127]
    keys, values = randn(2, 2, 35, 32), randn(2, 2, 35, 32)
    cache = [*quantize_keys(keys[:, :, :32], 4, 16), *quantize_values(values[:, :, :32], 4, 16)]
    cached = [randn(2, 4, 5, 32), *cache, keys[:, :, 32:].contiguous(), values[:, :, 32:].contiguous()]
    factors = [(randn(4, K) / 8).half(), randn(N, 4).half()]
    return {
        kernels.quantize_per_token: ([x, True], ()),
        kernels.quantize_per_token_int4: ([x, False], ()),
        kernels.quantize_per_token_fp8: ([x], ()),
        kernels.quantize_static: ([x, feature], (1,)),
        kernels.quantize_static_fp8: ([x, feature], (1,)),
        kernels.gelu_quantize: ([x, "none", True], ()),
        kernels.gelu_quantize_static: ([x, "tanh", feature], (2,)),
        kernels.silu_mul_quantize: ([x, y, False], ()),
        kernels.silu_mul_quantize_static: ([x, y, feature], (2,)),
        kernels.layer_norm_quantize: ([x, weight, bias, 1e-5, True], (1, 2)),
        kernels.add_layer_norm_quantize: ([x, y, weight, bias, 1e-5], (2, 3)),
        kernels.rms_norm_quantize: ([x, weight, 1e-5], (1,)),
        kernels.add_rms_norm_quantize: ([x, y, weight, 1e-5, True], (2,)),
        kernels.int8_add_layer_norm_quantize: (
            [q, feature, rows(integers), scale, True, weight, bias, 1e-5, True, dtype], (1, 5, 6),
        ),
        kernels.int8_add_rms_norm_quantize: ([x, None, q, scale, False, weight, 1e-5, False, dtype], (5,)),
        kernels.int8_embedding: ([*table, dtype], (1, 2)),
        kernels.embedding_layer_norm_quantize: ([*table, randn(3, K), weight, bias, 1e-5, True], (1, 2, 4, 5)),
        kernels.int8_linear: ([*linear, dtype], (2, 3, 4)),
        kernels.int8_linear_quantize: (integer_linear, (2, 3, 4)),
        kernels.int8_linear_gelu_quantize: (gelu_linear, (2, 3, 4, 7)),
        kernels.low_rank_linear: ([rows(randn, N), x, *factors], (2, 3)),
        kernels.w4a8_linear: ([q, scale, *packed("int4", 16), out_bias, "int4", 16, dtype], (2, 3, 4)),
        kernels.weight_only_linear: ([x, *packed("int3", 32), out_bias, "int3", 32], (1, 2, 3)),
        kernels.fp8_linear: (
            [x.to(torch.float8_e4m3fn), scale, *packed("fp8_e4m3", 0), out_bias, "fp8_e4m3", 0, dtype], (2, 3, 4),
        ),
        kernels.int8_attention: (
            [*heads, attention_scales[0], None, True, None, attention_scales[1], dtype], (3, 7),
        ),
        kernels.cached_attention: ([*cached, None, True, 32**-0.5, 4, 16], ()),
    }  # fmt: skip
