"""TensorRT's terms: standard operators, quantization explicit as Q/DQ pairs of constant symmetric scales.

TensorRT multiplies integers where both operands of a product come from a DequantizeLinear, and nowhere else; a scale
must be a constant, and an activation has one for the whole tensor. Every integer of the Program fits that, because a
value is divided by its own scale first:

    q = QuantizeLinear(n * c, c),  n = x / scale (as a float),  c a power of two

and whoever reads q multiplies by what `DequantizeLinear(q, c)` leaves out, in float32, behind the product:

    token-wise     n = (x / a) / (1/127);  y = MatMul(DQ(q, c), DQ(w)) * (a/127 / c) + b
    feature-wise   n = x / f, f in the weight already;  y = MatMul(DQ(q, c), DQ(w)) / c + b

A power of two changes no digit, so these are the reference's integers. It keeps sums within float16, in which TensorRT
holds `sum * c` before it multiplies by the weight's scales: at most 65504.

INT8 attention is the five pairs around two products that TensorRT fuses into one kernel (query, key, probabilities,
value, result), where its conditions hold, and attention in floats where they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ... import kernels
from ...formats import FORMATS
from ...kernels import NAMESPACE
from ...numerics import AMAX_FLOOR, FP8_STEP, INT4_STEP, INT8_STEP, dequantize_weight
from ...program import Program, fake_value, get_constant, set_constant, size
from ...rewrite import arguments
from ...torch_private import OpOverload
from .dialect import LINEARS, Dialect, operator, repeat_heads
from .onnxruntime import rotated_blocks
from .packed_weights import (
    NATIVE_FLOATS,
    as_rows_of_e4m3,
    packed_operands,
    replace_constants,
    storage_of,
    stored_values,
)

FLOAT16_MAX = 65504.0
HEAD_SIZES = (16, 32, 64)  # of the fused INT8 attention
MAX_TOKENS = 512
_LOOKUPS = (kernels.int8_embedding, kernels.embedding_layer_norm_quantize)
ROW_BLOCK = 128  # of an INT4 weight with one scale a row
MIN_BLOCK = 16
NATIVE_OPSET = 28  # the first whose DequantizeLinear reads FP6
OPERAND_STEP = 2.0**-5  # of what no linear reads: the scores of 256 features stay within float16

_INT4_IN_FLOATS = (
    "TensorRT has no product of INT4 weights and INT8 activations: it dequantizes the integers and multiplies in"
    " floats, the weights packed"
)
_ROTATED = (
    "rotations are small matrix products here: a recipe without them is faster (w8a8-plain, hero-m2-tensorrt,"
    " hero-m3-tensorrt)"
)
_NO_RUNTIME = (
    "weights are stored in ONNX's own FP6, which neither ONNX Runtime 1.31 nor TensorRT-RTX 1.7 reads: a file of opset"
    " 21 has the same values in types that they read"
)


@dataclass(frozen=True)
class _Fused:
    """Steps of an INT8 attention: of the integers of its values, of its probabilities, of its result."""

    value: float
    probabilities: float
    out: float


class TensorRT(Dialect):
    """For TensorRT, strongly typed."""

    target = "tensorrt"
    opsets = (*Dialect.opsets, NATIVE_OPSET)

    def __init__(self, program: Program, dtype: torch.dtype, opset: int) -> None:
        super().__init__(program, dtype, opset)
        self.forms[torch.ops.aten.scaled_dot_product_attention.default] = self.attention
        self._exponents: dict[str, int] = {}
        self._steps: dict[fx.Node, float] = {}
        self._fused: dict[fx.Node, _Fused | None] = {}
        self._blocks: dict[fx.Node, int] = {}  # of packed weights, in input features; 0 for one a row

    def store_packed(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """As `[K, N]` of INT4, INT8 or E4M3, in blocks of features that divide K; in floats where there are none.

        From opset 28 on FP6 and FP4 E2M1 have types of their own.
        """
        weight, scales, format, group = packed_operands(node)
        packed, scale = (get_constant(gm, _target(node.args[i])) for i in (weight, scales))
        features, least = size(fake_value(node.args[0]).shape[-1]), torch.finfo(self.dtype).smallest_normal  # type: ignore[arg-type]
        assert isinstance(features, int)
        fp8 = node.target is kernels.fp8_linear
        rows = as_rows_of_e4m3(packed, scale, format, group, features) if fp8 and group else None
        if rows is not None:  # one scale a row, and the product is of FP8
            scale, group = rows[1], 0
        native = NATIVE_FLOATS if self.opset >= NATIVE_OPSET else ()
        storage = storage_of(format, ("fp8_e4m3",) if fp8 else ("int4", *native, "int8", "fp8_e4m3"))
        block = math.gcd(features, group) if group else 0
        if storage is not None and storage.element == "int4" and not group:  # its kernels want blocks
            block = math.gcd(features, ROW_BLOCK)
            storage, block = (storage, block) if block >= MIN_BLOCK else (storage_of(format, ("int8",)), 0)
        if FORMATS[format].asymmetric:
            storage = None
        layer = _target(node.args[weight]).removesuffix(".weight_q")
        if storage is None or 0 < block < MIN_BLOCK:
            why = (
                f"TensorRT has no {format}"
                if storage is None
                else f"no block of {MIN_BLOCK} or more divides {features}"
            )
            self.notes.append(f"{layer}: its weight is stored in floats: {why}")
            values = dequantize_weight(packed, scale, format, group, features, self.dtype).t().contiguous()
            replace_constants(gm, node, self.suffix, {weight: values})
            return
        if storage.element == "fp4_e2m1" or (block and storage.element in ("int8", "fp8_e4m3")):
            form = f"{storage.element} in blocks" if block else storage.element
            self.notes.append(f"{layer}: TensorRT dequantizes {form} ahead of the product")
        if node.target is kernels.w4a8_linear:
            self.notes.append(_INT4_IN_FLOATS)
        scale = scale.float().repeat_interleave(group // block, 1) if group else scale.float()
        scale = scale.expand(-1, features // block) if block and not group else scale
        scale = scale[:, : features // block] if block else scale
        values = stored_values(packed, format, features, storage) if rows is None else rows[0]
        values = values.t().contiguous()
        if not fp8 or block:
            scale = (scale / storage.factor).clamp(min=least).to(self.dtype)
        laid_out = {weight: values, scales: scale.t().contiguous() if block else scale.reshape(-1)}
        stored, _ = replace_constants(gm, node, self.suffix, laid_out)
        if storage.element in ("int4", *NATIVE_FLOATS):
            self.elements_of[stored] = storage.element
        if storage.element.startswith("fp6"):
            self.notes.append(_NO_RUNTIME)
        if storage.element == "fp8_e4m3":
            self.notes.append("FP8 needs a GPU of compute capability 8.9 or newer")
        self._blocks[node] = block

    def prepare(self, gm: fx.GraphModule) -> None:
        super().prepare(gm)
        for node in list(gm.graph.nodes):
            if node.target in (*LINEARS, *_LOOKUPS) or self._multiplies_fp8(node):
                self._store_scales(gm, node)
            if node.target is kernels.int8_attention:
                reason = self._why_not_int8(gm, node)
                self._fused[node] = self._attention_steps(gm, node) if reason is None else None
                if reason is not None:
                    layer = node.meta.get("layer", node.name)
                    self.notes.append(f"{layer}: attention in {str(self.dtype).removeprefix('torch.')}: {reason}")

    def _multiplies_fp8(self, node: fx.Node) -> bool:
        """Whether a linear's weight is E4M3 with a scale a row: with other scales it is dequantized first."""
        return node.target is kernels.fp8_linear and self._blocks.get(node) == 0

    def _store_scales(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """A weight's scales in the file's dtype.

        They are small, and float16 holds few digits of small numbers: a linear's are stored 2^e times larger. The
        largest is at most 1 then, so that a sum within float16 stays within it. A channel whose scale is next to
        nothing even so gets the least scale that has all its digits, and its integers are rounded to that.
        """
        linear = node.target not in _LOOKUPS
        weight, position = (2, 3) if linear else (1, 2)
        names = [_target(node.args[i]) for i in (weight, position)]
        stored = [f"{name}_{self.target}" + "_table" * (not linear) for name in names]
        if stored[1] not in self._exponents:
            q, scale = (get_constant(gm, name) for name in names)
            exponent = -math.ceil(math.log2(scale.max().item())) if linear else 0
            scale = scale.float() * 2.0**exponent
            least = torch.finfo(self.dtype).smallest_normal
            if (scale < least).any():
                shrink = (scale / least).clamp(max=1)
                shrunk = q.float() * (shrink if q.shape[-1] == scale.numel() else shrink[:, None])
                q = (shrunk if q.is_floating_point() else shrunk.round()).to(q.dtype)
            for name, value in zip(stored, (q, scale.clamp(min=least).to(self.dtype)), strict=True):
                set_constant(gm, name, value)
            self._exponents[stored[1]] = exponent
        if get_constant(gm, stored[0]) is get_constant(gm, names[0]):
            stored[0] = names[0]
        with gm.graph.inserting_before(node):
            for argument, name in zip((weight, position), stored, strict=True):
                constant = gm.graph.get_attr(name)
                constant.meta = {**node.args[argument].meta}  # type: ignore[union-attr]
                node.update_arg(argument, constant)

    # --- integers, and their steps -----------------------------------------------------------------------------------

    def _integers(self, n: Tensor) -> Tensor:
        """What the traced node hands on of `n`, its value in steps of 1: int8, or floats for an attention in floats."""
        step = self._step(self.node)
        if self._stays_float(self.node):
            return (n * step).to(self.dtype)
        return self._quantized(n.float() * step, step)

    def _quantized(self, x: Tensor, step: float, dtype: torch.dtype = torch.int8) -> Tensor:
        constants = torch.tensor(step, dtype=x.dtype), torch.zeros((), dtype=dtype)
        return operator("QuantizeLinear", (x, *constants), dtype, x.shape)

    def _floats(self, q: Tensor, argument: int) -> tuple[Tensor, float]:
        """An integer argument of the traced node, as a product's operand and the step it is in."""
        producer = _producer(self.node.args[argument])
        step = self._step(producer)
        return (q if q.dtype is self.dtype else self._dequantized(q, step)), step

    def _dequantized(self, q: Tensor, step: float) -> Tensor:
        constants = torch.tensor(step, dtype=self.dtype), torch.zeros((), dtype=q.dtype)
        return operator("DequantizeLinear", (q, *constants), self.dtype, q.shape)

    def _step(self, producer: fx.Node) -> float:
        """What one step of a node's integers is in the file."""
        if producer not in self._steps:
            self._steps[producer] = self._choose_step(producer)
        return self._steps[producer]

    def _choose_step(self, producer: fx.Node) -> float:
        fused = self._fused.get(producer)
        if fused is not None:
            return fused.out
        steps = [OPERAND_STEP]
        for reader, argument in _readers(producer):
            if reader.target in LINEARS:
                steps.append(_linear_step(reader))
            elif reader.target is kernels.fp8_linear:
                steps.append(step_within_float16(fake_value(reader.args[0]).shape[-1], largest=448 * 448))  # type: ignore[arg-type]
            elif argument == 2 and (attention := self._fused.get(reader)) is not None:
                steps.append(attention.value)
        return min(steps)

    def _stays_float(self, producer: fx.Node) -> bool:
        """Whether only attentions in floats read it: pairs in front of those would keep them from being fused."""
        readers = [reader for reader, _ in _readers(producer)]
        return bool(readers) and all(r.target is kernels.int8_attention and self._fused.get(r) is None for r in readers)

    # --- ops ---------------------------------------------------------------------------------------------------------

    def quantize_per_token(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """`x [..., K]` float -> int8 `[..., K]`, scale `[..., 1]` float32, those of `numerics.quantize_per_token`."""
        return self._token_wise(x, rotated, INT8_STEP)

    def quantize_per_token_int4(self, x: Tensor, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """Those of `numerics.quantize_per_token_int4`, in eight bits."""
        return self._token_wise(x, rotated, INT4_STEP)

    def _token_wise(self, x: Tensor, rotated: bool, step: float) -> tuple[Tensor, Tensor]:
        if rotated:
            self.notes.append(_ROTATED)
            x = rotated_blocks(x.float())
        x = x.float()
        a = x.abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
        return self._integers(x / a / step), a * step

    def quantize_static(self, x: Tensor, scale: Tensor) -> Tensor:
        """`x` float -> int8, the integers of `numerics.quantize_static`."""
        return self._integers(x.float() / scale)

    def dequantize(self, q: Tensor, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
        """Of activations (`scale [..., 1]`), or of a weight (`q [N, K]`, `scale [N]`)."""
        if scale.ndim == q.ndim:
            return self._scaled(q, 0, scale, dtype, rotated)
        zeros = torch.zeros(q.shape[0], dtype=torch.int8)
        x = operator("DequantizeLinear", (q, scale, zeros), torch.float32, q.shape, {"axis": 0})
        return (rotated_blocks(x) if rotated else x).to(dtype)

    def _scaled(self, q: Tensor, argument: int, scale: Tensor, dtype: torch.dtype, rotated: bool = False) -> Tensor:
        """The real values of an integer argument."""
        x, step = self._floats(q, argument)
        x = x.float() * (scale * (1 / step))
        return (rotated_blocks(x) if rotated else x).to(dtype)

    def _summands(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        residual: Tensor,
        residual_scale: Tensor | None,
        residual_rotated: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if x_scale is not None:
            x = self._scaled(x, 0, x_scale, dtype)
        if residual_scale is not None:
            residual = self._scaled(residual, 2, residual_scale, dtype, residual_rotated)
        return x, residual

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
        return self._integers(self._linear(x_q, x_scale, w_q, w_scale, bias))

    def _linear(self, x_q: Tensor, x_scale: Tensor | None, w_q: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
        x, step = self._floats(x_q, 0)
        zeros = torch.zeros(w_q.shape[1], dtype=w_q.dtype)
        w = operator("DequantizeLinear", (w_q, w_scale, zeros), self.dtype, w_q.shape, {"axis": 1})
        y = (x @ w).float()
        factor = 2.0 ** -self._exponents[_target(self.node.args[3])] / step
        y = y * (x_scale * factor if x_scale is not None else factor)
        return y if bias is None else y + bias.float()

    def quantize_per_token_fp8(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of `numerics.quantize_per_token_fp8`, times the step that sums want."""
        a = x.float().abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
        step = self._step(self.node)
        return self._quantized(x.float() / a / FP8_STEP * step, step, torch.float8_e4m3fn), a * FP8_STEP

    def quantize_static_fp8(self, x: Tensor, scale: Tensor) -> Tensor:
        """Those of `numerics.quantize_static_fp8`, times the step that sums want."""
        step = self._step(self.node)
        return self._quantized(x.float() / scale * step, step, torch.float8_e4m3fn)

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
        """A product of E4M3, as `int8_linear` is one of integers; of floats where the weight has scales of groups."""
        if not self._multiplies_fp8(self.node):
            return self.w4a8_linear(x_q, x_scale, w_packed, w_scale, bias, format, group, out_dtype)
        return self._linear(x_q, x_scale, w_packed, w_scale, bias).to(out_dtype)

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
        """The activations' real values, times the weight as `weight_only_linear` has it.

        With the scales behind the product, TensorRT-RTX would plan a product of INT8 that has no scales of blocks.
        """
        y = self._scaled(x_q, 0, x_scale, self.dtype) @ self._values(w_packed, w_scale)
        return (y if bias is None else y + bias.to(y.dtype)).to(out_dtype)

    def weight_only_linear(
        self, x: Tensor, w_packed: Tensor, w_scale: Tensor, bias: Tensor | None, format: str, group: int
    ) -> Tensor:
        y = x @ self._values(w_packed, w_scale)
        return y if bias is None else y + bias

    def _values(self, w: Tensor, scale: Tensor) -> Tensor:
        """A packed weight's, `[K, N]`: its DequantizeLinear is part of TensorRT's product."""
        if w.dtype is self.dtype:  # stored in floats
            return w
        block = self._blocks[self.node]
        attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
        return operator("DequantizeLinear", (w, scale), self.dtype, w.shape, attributes)

    def int8_embedding(self, ids: Tensor, table_q: Tensor, table_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        """TensorRT folds the table into floats: it has no lookup of integers with scales of their own."""
        axis = 0 if table_q.shape[0] == table_scale.shape[0] else 1
        zeros = torch.zeros(table_scale.shape[0], dtype=torch.int8)
        table = operator("DequantizeLinear", (table_q, table_scale, zeros), self.dtype, table_q.shape, {"axis": axis})
        return torch.nn.functional.embedding(ids, table.t() if axis else table).to(out_dtype)

    # --- attention ---------------------------------------------------------------------------------------------------

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
        """`aten.scaled_dot_product_attention` as the products and the softmax that TensorRT fuses."""
        groups = query.shape[1] // key.shape[1] if query.ndim == 4 else 1
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query * scale) @ key.transpose(-2, -1)
        return torch.softmax(_masked(scores, mask, is_causal), -1) @ value

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
        groups = query.shape[1] // key.shape[1]
        (query, query_step), (key, key_step), (value, value_step) = (
            self._floats(x, i) for i, x in enumerate((query, key, value))
        )
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        scores = (query @ key.transpose(-2, -1)) * (score_scale / (query_step * key_step)).to(self.dtype)
        p = torch.softmax(_masked(scores, mask, is_causal), -1)
        fused = self._fused.get(self.node)
        if fused is not None:
            p = self._dequantized(self._quantized(p, fused.probabilities), fused.probabilities)
            return self._quantized(p @ value, fused.out)
        if probability_scale is not None:
            out_scale = out_scale / probability_scale
        out = (p @ value).float() * (out_scale / value_step)
        return self._integers(out) if out_dtype is torch.int8 else out.to(out_dtype)

    def _why_not_int8(self, gm: fx.GraphModule, node: fx.Node) -> str | None:
        """What TensorRT's fused INT8 attention needs and this one has not, in words; None where it has everything."""
        _, key, _, _, _, _, probability_scale, out_scale, out_dtype, *signed = arguments(node)

        _, _, length, width = fake_value(key).shape
        if probability_scale is None:
            return "its probabilities have no scale known beforehand (recipe: softmax='static_signed')"
        if not any(signed):
            return (
                "its probabilities are unsigned, and TensorRT's integers are signed (recipe: softmax='static_signed')"
            )
        if out_dtype is not torch.int8:
            return "its result is not quantized, and the fused kernel writes integers"
        values = get_constant(gm, _target(out_scale))
        if (values != values.flatten()[0]).any():
            return "its result has a scale a feature, and TensorRT's activations have one scale (rule: INT8_TENSOR)"
        if size(width) not in HEAD_SIZES:
            return f"its heads are {size(width)} wide, and the fused kernel knows {', '.join(map(str, HEAD_SIZES))}"
        if isinstance(size(length), int) and length > MAX_TOKENS:
            return f"it sees {length} tokens, and the fused kernel at most {MAX_TOKENS}"
        if self.dtype is torch.bfloat16:
            return "the fused kernel has no bfloat16"
        return None

    def _attention_steps(self, gm: fx.GraphModule, node: fx.Node) -> _Fused:
        probability_scale, out_scale = (get_constant(gm, _target(node.args[i])) for i in (6, 7))
        probabilities = probability_scale.flatten()[0].to(self.dtype).item()
        factor = (out_scale.flatten()[0] / probability_scale.flatten()[0]).item()  # result = P v * factor, in steps
        limit = min([OPERAND_STEP, *(_linear_step(r) for r, _ in _readers(node) if r.target in LINEARS)])
        value = 2.0 ** math.floor(math.log2(limit * factor))
        return _Fused(value, probabilities, torch.tensor(value / factor).to(self.dtype).item())


def step_within_float16(features: int, largest: int = 128 * 127) -> float:
    """The largest power of two, times which no sum of this many products of up to `largest` exceeds float16.

    >>> step_within_float16(768) * 128 * 127 * 768
    48768.0
    """
    return 2.0 ** math.floor(math.log2(FLOAT16_MAX / (largest * features)))


def _linear_step(linear: fx.Node) -> float:
    weight = linear.args[2]
    assert isinstance(weight, fx.Node)
    return step_within_float16(fake_value(weight).shape[1])


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores `[..., T, S]` with a mask added; the least float stands for -Inf, which would make NaN of a whole row."""
    least = torch.finfo(scores.dtype).min
    if is_causal:
        tokens, keys = (torch.arange(n) for n in scores.shape[-2:])
        scores = scores + torch.where(keys <= tokens[:, None], 0.0, least).to(scores.dtype)
    if mask is not None:
        added = torch.where(mask, 0.0, least) if mask.dtype is torch.bool else mask.clamp(min=least)
        scores = scores + added.to(scores.dtype)
    return scores


def _target(constant: Any) -> str:
    return str(constant.target)


def _is_dialect(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == NAMESPACE


def _producer(value: Any) -> fx.Node:
    """The dialect op whose integers a value is, moved."""
    while not _is_dialect(value):
        value = value.args[0][0] if isinstance(value.args[0], list | tuple) else value.args[0]
    return value


def _readers(producer: fx.Node) -> list[tuple[fx.Node, int]]:
    """The dialect ops that read a node's integers, and as which argument."""
    found, pending = [], [producer]
    while pending:
        value = pending.pop()
        for user in value.users:
            fake = fake_value(user)
            if _is_dialect(user):
                if value is not producer or not isinstance(fake_value(producer), tuple):
                    found += [(user, i) for i, argument in enumerate(user.args) if argument is value]
            elif isinstance(fake, Tensor) and fake.dtype in (torch.int8, torch.float8_e4m3fn):
                pending.append(user)
    return found
