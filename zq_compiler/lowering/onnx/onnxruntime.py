"""ONNX Runtime's terms: integer operators, whose activations are unsigned on the CPU and signed on CUDA.

    a = max(|row|);  u8 = QuantizeLinear(x / a, 1/127, 128)
    y = MatMulIntegerToFloat(u8, s8, 1, weight_scale, 128) * row_scale + bias

On the CPU activations are stored as unsigned integers, `u8 = s8 + 128`, because ONNX Runtime's x86 kernels are ten
times slower on signed ones, and `com.microsoft::MatMulIntegerToFloat` scales sums before they go to memory. Its CUDA
kernels know signed integers and `MatMulInteger` only. The products are the same integers. On the CPU they are exact
where there is VNNI; with the older AVX2 and AVX-512 instructions they are under the session option
`session.x64quantprecision`, and may saturate otherwise.

Float attention is `com.microsoft::MultiHeadAttention`, one operator: ONNX Runtime's own optimizer recognises no
attention in the graphs that torch exports.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ... import kernels
from ...errors import ExportError
from ...formats import FORMATS, pack
from ...numerics import AMAX_FLOOR, FP8_STEP, INT4_STEP, INT8_STEP, ROTATION, rotate, scales_and_zeros
from ...program import Program, fake_value, get_constant, size
from ...torch_private import concrete
from .dialect import Dialect, operator, repeat_heads
from .packed_weights import (
    Storage,
    nibble_blocks,
    packed_operands,
    replace_constants,
    storage_of,
    stored_values,
    unsigned,
)

_ROTATION_MATRIX = rotate(torch.eye(ROTATION))
_SATURATION = (
    "on x86 without VNNI, set the session option session.x64quantprecision to 1: ONNX Runtime's integer products"
    " saturate there otherwise"
)


_FLOATS_IN_MEMORY = (
    "ONNX Runtime makes floats of FP8 weights when it loads them: the file is small, memory is not saved"
)
_INT4_IN_FLOATS = (
    "ONNX Runtime has no product of INT4 weights and INT8 activations: it reads the weights packed and multiplies in"
    " floats"
)
_FP8_IN_FLOATS = "ONNX Runtime computes products of FP8 in floats"
ROW_BLOCK = 128  # of MatMulNBits, which has a scale a block, where a weight has one a row


class OnnxRuntime(Dialect):
    """For ONNX Runtime on the CPU."""

    target = "onnxruntime"
    integers: ClassVar[torch.dtype] = torch.uint8
    zero_point: ClassVar[int] = 128  # what stands for 0 in an activation: u8 = s8 + 128
    probability_zero_point: ClassVar[int] = 0
    elements: ClassVar[tuple[str, ...]] = ("int2", "int4", "int8", "fp8_e4m3", "fp8_e5m2")  # of packed weights

    def __init__(self, program: Program, dtype: torch.dtype, opset: int) -> None:
        super().__init__(program, dtype, opset)
        self.zero_points: dict[str, Tensor] = {}  # of packed weights, by the node that reads them
        self.forms[torch.ops.aten.add.Tensor] = self.add
        self.forms[torch.ops.aten.scaled_dot_product_attention.default] = self.attention
        if any(str(n.target).startswith("zq.int8_") for n in program.graph.nodes):
            self.notes.append(_SATURATION)

    def quantize_per_token(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """`x [..., K] float -> integers [..., K], scale [..., 1] float32`, those of `numerics.quantize_per_token`.

        A rotation is one product with a 16 x 16 matrix: it sums in another order than `numerics.rotate`.
        """
        return self._token_wise(x, rotated, INT8_STEP)

    def quantize_per_token_int4(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """Those of `numerics.quantize_per_token_int4`, in eight bits."""
        return self._token_wise(x, rotated, INT4_STEP)

    def _token_wise(self, x: Tensor, rotated: bool, step: float) -> tuple[Tensor, Tensor]:
        normalised, a = self._normalised(rotated_blocks(x.float()) if rotated else x.float())
        constants = torch.tensor(step), torch.tensor(self.zero_point, dtype=self.integers)
        return operator("QuantizeLinear", (normalised, *constants), self.integers, x.shape), a * step

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in [-1, 1], and their largest magnitude; NaN for a row that holds NaN or Inf."""
        a = x.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
        normalised = x / a
        # ONNX Runtime's ReduceMax loses NaN, its ReduceSum keeps it; the sum of a row in [-1, 1] cannot overflow.
        poison = normalised.sum(-1, keepdim=True)
        return normalised, a + (poison - poison)

    def quantize_static(self, x: Tensor, scale: Tensor) -> Tensor:
        """The integers of `numerics.quantize_static`; one division whatever the layout of the scales."""
        return self._rounded(x.float() / scale, self.zero_point)

    def add(self, x: Tensor, y: Any, *, alpha: Any = 1) -> Tensor:
        """`aten.add.Tensor`, where a norm reads it as `sum_before_norm` has it."""
        norms = torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default
        alike = alpha == 1 and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
        if alike and any(user.target in norms for user in self.node.users):
            return self.sum_before_norm(x, y)
        return torch.add(x, y, alpha=alpha)

    def sum_before_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `Sum`: ONNX Runtime would fuse `Add` and the norm into one operator, which takes six times their time."""
        return operator("Sum", (x, residual), x.dtype, x.shape)

    def _rounded(self, x: Tensor, zero_point: int) -> Tensor:
        """Integers nearest to `x + zero_point`, half to even, saturated."""
        one, zero = torch.tensor(1.0), torch.tensor(zero_point, dtype=self.integers)
        return operator("QuantizeLinear", (x, one, zero), self.integers, x.shape)

    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
        """Of activations (`scale [..., 1]`), or of a weight (`q [N, K]`, `scale [N]`)."""
        if scale.ndim == q.ndim:
            x = self._steps(q) * scale
        else:  # as an operator: arithmetic on a constant would be folded, and the file would hold a float copy
            zeros = torch.zeros(
                q.shape[0], dtype=torch.int8
            )  # ONNX Runtime puts a wrong one where it has none to shift
            x = operator("DequantizeLinear", (q, scale, zeros), torch.float32, q.shape, {"axis": 0})
        return (rotated_blocks(x) if rotated else x).to(dtype)

    def _steps(self, q: Tensor) -> Tensor:
        """An activation's integers, or E4M3 values, as float32, in one pass."""
        if q.is_floating_point():
            return q.float()
        one, zero = torch.tensor(1.0), torch.tensor(self.zero_point, dtype=self.integers)
        return operator("DequantizeLinear", (q, one, zero), torch.float32, q.shape)

    def int8_linear(
        self,
        x_q: Tensor,
        x_scale: Tensor | None,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return self._linear(x_q, x_scale, w_q, w_scale, bias).to(out_dtype)

    def int8_linear_quantize(
        self, x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self._rounded(self._linear(x_q, x_scale, w_q, w_scale, bias), self.zero_point)

    def _linear(self, x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        if x_q.dtype is not self.integers:
            raise ExportError("an INT8 linear reads integers that no quantize made", fix="report this graph as a bug")
        y = self._product(x_q, w_q, w_scale, self.zero_point)
        if x_scale is not None:
            y = y * x_scale
        return y if bias is None else y + bias.float()

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
        """`kernels.int8_attention`; an INT8 result has the zero point that activations have."""
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        one, zero = torch.tensor(1.0), self.zero_point
        per_head = score_scale.numel() > 1
        a = self._product(query, key.transpose(-2, -1), one if per_head else score_scale.reshape(()), zero, zero)
        a = a * score_scale if per_head else a
        if mask is not None:
            a = a + (torch.where(mask, 0.0, -torch.inf) if mask.dtype is torch.bool else mask.float())
        if is_causal:
            a = a + torch.where(torch.ones(a.shape[-2:], dtype=torch.bool).tril(), 0.0, -torch.inf)
        top = a.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # -Inf less -Inf is NaN
        e = torch.exp(a - top)
        total = e.sum(-1, keepdim=True).clamp(min=1.0)  # exp(0) is in it, unless the row is wholly masked
        zero = self.probability_zero_point
        p = e * 255 if probability_scale is None else e / total / probability_scale
        if signed_probabilities:
            p = p.clamp(max=127)
        out = self._product(self._rounded(p, zero), value, one, zero, self.zero_point) * out_scale
        if probability_scale is None:
            out = out * (1 / (255 * total))
        return self._rounded(out, self.zero_point) if out_dtype is torch.int8 else out.to(out_dtype)

    def _product(self, a: Tensor, b: Tensor, scale: Tensor, a_zero: int, b_zero: int | None = None) -> Tensor:
        """`float(sums) * scale` of integers `a [..., M, K]`, `b [..., K, N]` less their zero points, as float32.

        `scale` has no dimension, or is `[N]`.
        """
        zeros = [torch.tensor(zero, dtype=self.integers) for zero in (a_zero, b_zero) if zero is not None]
        inputs = (a, b, torch.tensor(1.0), scale, *zeros)
        shape = (*a.shape[:-1], b.shape[-1])
        return operator("com.microsoft::MatMulIntegerToFloat", inputs, torch.float32, shape)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`aten.scaled_dot_product_attention` of four dimensions as MultiHeadAttention; others as torch has them."""
        if query.ndim != 4 or dropout:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        batch, length = query.shape[0], query.shape[2]
        heads, groups = concrete(query.shape[1]), concrete(query.shape[1]) // concrete(key.shape[1])
        rows = [x.transpose(1, 2).flatten(2) for x in (query, repeat_heads(key, groups), repeat_heads(value, groups))]
        seen = None  # [.., T, 1]: rows that see any key
        if is_causal:  # the lower triangle; the operator's own causal masks are aligned to the last key
            mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril()
        if mask is not None:
            if mask.dtype is torch.bool:
                seen = mask.any(-1, keepdim=True) if not is_causal else None
                mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
            mask = mask.to(query.dtype).expand(*((1,) * (4 - mask.ndim)), *mask.shape) if mask.ndim < 4 else mask
            mask = mask.expand(-1, -1, length, key.shape[2])
        attributes = {"num_heads": heads} | ({} if scale is None else {"scale": float(scale)})
        inputs: list[Tensor | None] = [*rows, None, None, mask] if mask is not None else [*rows]
        out = operator(
            "com.microsoft::MultiHeadAttention",
            inputs,
            query.dtype,
            (batch, length, heads * value.shape[-1]),
            attributes,
        )
        out = out.unflatten(2, (heads, value.shape[-1])).transpose(1, 2)
        return out if seen is None else torch.where(seen, out, 0.0)

    # --- weights of a few bits ---------------------------------------------------------------------------------------

    def store_packed(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Integers as MatMulNBits reads them, in blocks along a row; FP8 as `[K, N]`."""
        weight, scales, format, group = packed_operands(node)
        packed, scale = (get_constant(gm, str(node.args[i].target)) for i in (weight, scales))  # type: ignore[union-attr]
        features = size(fake_value(node.args[0]).shape[-1])  # type: ignore[arg-type]
        assert isinstance(features, int)
        storage = self._stored_as(format)
        values = stored_values(packed, format, features, storage)
        scale, zero = scales_and_zeros(scale, format)
        alone = node.target is kernels.weight_only_linear
        scale = (scale.float() / storage.factor).to(self.dtype if alone else torch.float32)
        if not alone:
            self.notes.append(_INT4_IN_FLOATS if node.target is kernels.w4a8_linear else _FP8_IN_FLOATS)
        if values.is_floating_point():
            self.notes.append(_FLOATS_IN_MEMORY)
            laid_out = values.t().contiguous(), scale.t().contiguous() if group else scale.reshape(-1)
        else:
            block = group or ROW_BLOCK
            scale = scale if group else scale.expand(-1, -(-features // block)).contiguous()
            bits = FORMATS[storage.element].bits
            laid_out = nibble_blocks(values, bits, block), scale
            if zero is not None:
                zero = zero if group else zero.expand(-1, -(-features // block))
                self.zero_points[node.name] = pack(unsigned(zero, bits), bits)
        replace_constants(gm, node, self.suffix, dict(zip((weight, scales), laid_out, strict=True)))

    def weight_only_linear(
        self, x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, format: str, group: int
    ) -> Tensor:
        y = self._packed_product(x, w_packed, w_scale, format, group)
        return y if bias is None else y + bias

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
        """The integers as floats, times the packed weight."""
        y = self._packed_product(self._steps(x_q), w_packed, w_scale, format, group) * x_scale
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def _packed_product(self, x: Tensor, w_packed: Tensor, w_scale: Tensor, format: str, group: int) -> Tensor:
        """`com.microsoft::MatMulNBits`, whose own accuracy level leaves the activations as they are."""
        if w_packed.is_floating_point():
            return x @ self._fp8_values(w_packed, w_scale, x.dtype, group)
        bits = FORMATS[self._stored_as(format).element].bits
        attributes = {"K": concrete(x.shape[-1]), "N": w_packed.shape[0], "bits": bits}
        attributes["block_size"] = group or ROW_BLOCK
        shape = *x.shape[:-1], w_packed.shape[0]
        zeros = [self.zero_points[self.node.name]] if self.node.name in self.zero_points else []
        return operator("com.microsoft::MatMulNBits", (x, w_packed, w_scale, *zeros), x.dtype, shape, attributes)

    def _stored_as(self, format: str) -> Storage:
        storage = storage_of(format, self.elements)
        assert storage is not None  # every format is held by one of these
        return storage

    def _fp8_values(self, w: Tensor, scale: Tensor, dtype: torch.dtype, group: int) -> Tensor:
        """As an operator: arithmetic on a constant would be folded, and the file would hold a float copy."""
        attributes = {"axis": 0, "block_size": group} if group else {"axis": 1}
        return operator("DequantizeLinear", (w, scale.to(dtype)), dtype, w.shape, attributes)

    def quantize_per_token_fp8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `numerics.quantize_per_token_fp8`."""
        normalised, a = self._normalised(x.float())
        return (normalised / FP8_STEP).clamp(-448, 448).to(torch.float8_e4m3fn), a * FP8_STEP

    def quantize_static_fp8(self, x: Tensor, scale: Tensor) -> Tensor:
        """Those of `numerics.quantize_static_fp8`."""
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

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
        """In floats, which FP8 weights become when the file is loaded: the CPU has no products of FP8."""
        y = self._packed_product(x_q.float(), w_packed, w_scale, format, group) * x_scale
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def int8_embedding(self, ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        if table_q.shape[0] == table_scale.shape[0]:
            rows = torch.nn.functional.embedding(ids, table_q)
        else:  # a table tied to a linear is stored once, as the linear reads it
            rows = table_q.index_select(1, ids.reshape(-1)).t().reshape(*ids.shape, table_q.shape[0])
        scales = table_scale.index_select(0, ids.reshape(-1)).reshape(*ids.shape, 1)
        return (rows.float() * scales).to(out_dtype)


class OnnxRuntimeCuda(OnnxRuntime):
    """For ONNX Runtime on CUDA, whose MatMulInteger multiplies signed integers."""

    target = "onnxruntime-cuda"
    integers = torch.int8
    zero_point = 0
    probability_zero_point = -128  # the probabilities' 0 to 255
    elements = ("int4", "int8", "fp8_e4m3", "fp8_e5m2")  # MatMulNBits is known there with 4 and 8 bits

    def __init__(self, program: Program, dtype: torch.dtype, opset: int) -> None:
        super().__init__(program, dtype, opset)
        self.notes.clear()

    def sum_before_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """As `Add`: on CUDA it is fast fused with the norm."""
        return x + residual

    def _product(self, a: Tensor, b: Tensor, scale: Tensor, a_zero: int, b_zero: int | None = None) -> Tensor:
        zeros = [torch.tensor(zero, dtype=self.integers) for zero in (a_zero, b_zero) if zero is not None]
        shape = (*a.shape[:-1], b.shape[-1])
        return operator("MatMulInteger", (a, b, *zeros), torch.int32, shape).float() * scale


def rotated_blocks(x: Tensor) -> Tensor:
    """`numerics.rotate` as one product with a 16 x 16 matrix; it sums in another order."""
    return (x.unflatten(-1, (x.shape[-1] // ROTATION, ROTATION)) @ _ROTATION_MATRIX).flatten(-2)
