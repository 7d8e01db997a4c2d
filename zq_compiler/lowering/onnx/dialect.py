"""What the spellings of one runtime have in common: a method an op, named as the op, traced when a graph is exported.

A method stands in for its dialect op. What is memory-bound stays plain torch, which the exporter turns into operators
that runtimes know and fuse (LayerNormalization, Gelu); what concerns integers is written as ONNX operators by hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ... import kernels
from ...errors import ExportError
from ...kernels import NAMESPACE
from ...kernels.low_rank_linear import factor
from ...program import Program, get_constant, set_constant
from ...torch_private import OpOverload

# Argument positions of a weight's integers and scales.
PACKED = (kernels.weight_only_linear, kernels.w4a8_linear, kernels.fp8_linear)
LINEARS = (kernels.int8_linear, kernels.int8_linear_quantize, kernels.int8_linear_gelu_quantize)
_WEIGHTS = {
    **dict.fromkeys(LINEARS, (2, 3)),
    kernels.int8_embedding: (1, 2),
    kernels.embedding_layer_norm_quantize: (1, 2),
    kernels.dequantize: (0, 1),
}


class Dialect(ABC):
    """One runtime's spelling of a Program, for one export.

    Integers flow between methods in whatever form the dialect has for them. Weights are stored as products read them:
    integers `[K, N]`, scales `[N]`.

    Args:
        program: what is exported.
        dtype: of its floats.
        opset: of the file's standard operators, one of `opsets`.

    Attributes:
        node: the node whose form is being traced.
        notes: what whoever runs the file should know.
        elements_of: constants that are stored in an element type that torch has not, and the name of that format.
        opsets: those that files can be written in.
    """

    target: ClassVar[str]
    opsets: ClassVar[tuple[int, ...]] = (20, 21, 22)

    node: fx.Node

    def __init__(self, program: Program, dtype: torch.dtype, opset: int) -> None:
        self.program = program
        self.dtype = dtype
        self.opset = opset
        self.notes: list[str] = []
        self.elements_of: dict[str, str] = {}
        self.forms: dict[OpOverload, Callable[..., Any]] = {torch.ops.aten.rms_norm.default: self.rms_norm}

    @property
    def suffix(self) -> str:
        """Of the names of constants that this runtime reads in a form of its own."""
        return f"_{self.target.replace('-', '_')}"

    def form_of(self, target: Any) -> Callable[..., Any] | None:
        """What stands in for an operator; None where the exporter's own translation does.

        Raises:
            ExportError: a dialect op that this runtime has no form for.
        """
        if target in self.forms:
            return self.forms[target]
        if not isinstance(target, OpOverload) or target.namespace != NAMESPACE:
            return None
        form = getattr(self, target._opname, None)
        if form is None:
            raise ExportError(f"{target} has no form for {self.target}", where=self.node.name, fix="report it as a bug")
        return form

    def prepare(self, gm: fx.GraphModule) -> None:
        """Lay out the constants of a graph that is about to be traced."""
        lay_out_weights(gm)
        for node in list(gm.graph.nodes):
            if node.target in PACKED:
                self.store_packed(gm, node)

    # --- what is written by hand -------------------------------------------------------------------------------------

    @abstractmethod
    def quantize_per_token(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """`x [..., K]` float -> integers `[..., K]`, scale `[..., 1]` float32."""

    @abstractmethod
    def quantize_static(self, x: Tensor, scale: Tensor) -> Tensor:
        """The integers of `numerics.quantize_static`."""

    @abstractmethod
    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
        """Of activations, or of a weight (`q [N, K]`, `scale [N]`)."""

    @abstractmethod
    def int8_linear(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`kernels.int8_linear` with `w_q [K, N]`, `w_scale [N]`."""

    @abstractmethod
    def int8_linear_quantize(
        self, x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """`kernels.int8_linear_quantize`, operands as `int8_linear` has them."""

    @abstractmethod
    def int8_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_scale: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        probability_scale: Tensor | None,
        out_scale: Tensor,
        out_dtype: torch.dtype,
        signed_probabilities: bool = False,
    ) -> Tensor:
        """See `kernels.int8_attention`."""

    @abstractmethod
    def int8_embedding(self, ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """`kernels.int8_embedding`, `table_scale [V]`; a table tied to a linear is `[D, V]`, as that reads it."""

    @abstractmethod
    def store_packed(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Give a linear its packed weight and scales as the runtime reads them."""

    @abstractmethod
    def weight_only_linear(
        self, x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, format: str, group: int
    ) -> Tensor:
        """`kernels.weight_only_linear`, the weight as `store_packed` left it."""

    @abstractmethod
    def quantize_per_token_fp8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [..., K]` float -> E4M3 `[..., K]`, scale `[..., 1]` float32."""

    def low_rank_linear(
        self, y: Tensor, x: Tensor, v: Tensor, u: Tensor, v_scale: Tensor | None = None, u_scale: Tensor | None = None
    ) -> Tensor:
        """`kernels.low_rank_linear`, as two products and a sum."""
        hidden = torch.nn.functional.linear(x, factor(v, v_scale, x.dtype))
        return y + torch.nn.functional.linear(hidden, factor(u, u_scale, x.dtype))

    @abstractmethod
    def quantize_static_fp8(self, x: Tensor, scale: Tensor) -> Tensor:
        """`x` float -> E4M3 of its shape."""

    @abstractmethod
    def fp8_linear(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        format: str,
        group: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`kernels.fp8_linear`, the weight as `store_packed` left it."""

    @abstractmethod
    def quantize_per_token_int4(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """`x [..., K]` float -> integers of four bits `[..., K]`, scale `[..., 1]` float32."""

    @abstractmethod
    def w4a8_linear(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        w_packed: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        format: str,
        group: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """`kernels.w4a8_linear`, the weight as `store_packed` left it."""

    # --- what follows from it ----------------------------------------------------------------------------------------

    def int8_linear_gelu_quantize(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        approximate: str,
        out_scale: Tensor,
    ) -> Tensor:
        """`kernels.int8_linear_gelu_quantize`, operands as `int8_linear` has them."""
        y = self.int8_linear(x_q, x_scale, w_q, w_scale, bias, dtype)
        return self.gelu_quantize_static(y, approximate, out_scale)

    def embedding_layer_norm_quantize(
        self,
        ids: Tensor,
        table_q: Tensor,
        table_scale: Tensor,
        others: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotated: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.embedding_layer_norm_quantize`; the table as `int8_embedding` has it."""
        h = self.sum_before_norm(self.int8_embedding(ids, table_q, table_scale, others.dtype), others)
        return self.layer_norm_quantize(h, weight, bias, eps, rotated)

    def layer_norm_quantize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rotated: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.layer_norm_quantize`."""
        y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return (*self.quantize_per_token(y, rotated), y)

    def add_layer_norm_quantize(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotated: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `kernels.add_layer_norm_quantize`."""
        h = self.sum_before_norm(x, residual)
        return (*self.layer_norm_quantize(h, weight, bias, eps, rotated), h)

    def sum_before_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum of `x` and what broadcasts to its shape, which a norm reads."""
        return x + residual

    def int8_add_layer_norm_quantize(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_rotated: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotated: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `kernels.int8_add_layer_norm_quantize`."""
        summands = self._summands(x, x_scale, residual, residual_scale, residual_rotated, dtype)
        return self.add_layer_norm_quantize(*summands, weight, bias, eps, rotated)

    def int8_add_rms_norm_quantize(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_rotated: bool,
        weight: Tensor | None,
        eps: float,
        rotated: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `kernels.int8_add_rms_norm_quantize`."""
        summands = self._summands(x, x_scale, residual, residual_scale, residual_rotated, dtype)
        return self.add_rms_norm_quantize(*summands, weight, eps, rotated)

    def _summands(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_rotated: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x = x if x_scale is None else self.dequantize(x, x_scale, dtype)
        if residual_scale is not None:
            residual = self.dequantize(residual, residual_scale, dtype, residual_rotated)
        return x, residual

    def rms_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        """`aten.rms_norm`, over the last dimension spelled as ONNX Runtime's fusion into one operator wants it."""
        if len(shape) != 1:
            return torch.nn.functional.rms_norm(x, list(shape), weight, eps)
        wide, eps = x.float(), torch.finfo(x.dtype).eps if eps is None else eps
        y = (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
        return y if weight is None else y * weight

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.rms_norm_quantize`."""
        y = self.rms_norm(x, x.shape[-1:], weight, eps)
        return (*self.quantize_per_token(y, rotated), y)

    def add_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, rotated: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `kernels.add_rms_norm_quantize`."""
        h = self.sum_before_norm(x, residual)
        return (*self.rms_norm_quantize(h, weight, eps, rotated), h)

    def gelu_quantize(self, x: Tensor, approximate: str, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """See `kernels.gelu_quantize`."""
        return self.quantize_per_token(torch.nn.functional.gelu(x, approximate=approximate), rotated)

    def silu_mul_quantize(self, gate: Tensor, up: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """See `kernels.silu_mul_quantize`."""
        return self.quantize_per_token(torch.nn.functional.silu(gate) * up, rotated)

    def gelu_quantize_static(self, x: Tensor, approximate: str, scale: Tensor) -> Tensor:
        """See `kernels.gelu_quantize_static`."""
        return self.quantize_static(torch.nn.functional.gelu(x, approximate=approximate), scale)

    def silu_mul_quantize_static(self, gate: Tensor, up: Tensor, scale: Tensor) -> Tensor:
        """See `kernels.silu_mul_quantize_static`."""
        return self.quantize_static(torch.nn.functional.silu(gate) * up, scale)


def operator(
    name: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """An ONNX operator, `"domain::Name"` outside the standard, as a graph node; it can be exported, not computed."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Each head of `[B, H, S, D]` `groups` times."""
    if groups == 1:
        return x
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def share_tied_constants(gm: fx.GraphModule) -> None:
    """Constants that are one tensor under several names get one name."""
    names: dict[Any, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = get_constant(gm, node.target)
        if isinstance(value, Tensor):
            key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
            node.target = names.setdefault(key, node.target)


def lay_out_weights(gm: fx.GraphModule) -> None:
    """Integers `[N, K]` that a linear reads become `[K, N]`, scales `[N, 1]` become `[N]`."""
    read: dict[Any, tuple[set[Any], ...]] = {}
    for target, positions in _WEIGHTS.items():
        nodes = gm.graph.find_nodes(op="call_function", target=target)
        weights = [node for node in nodes if node.args[positions[0]].op == "get_attr"]  # not an activation's
        read[target] = tuple({node.args[i].target for node in weights} for i in positions)
    transposed = set().union(*(read[linear][0] for linear in LINEARS))
    if both := transposed & read[kernels.dequantize][0]:
        raise ExportError("is read both as integers and as floats", where=min(both), fix="report it as a bug")
    for name in set().union(*(scales for _, scales in read.values())):
        set_constant(gm, name, get_constant(gm, name).reshape(-1))
    for name in transposed:
        set_constant(gm, name, get_constant(gm, name).t().contiguous())
