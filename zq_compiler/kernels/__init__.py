"""The dialect's ops, one a file: reference, and the providers that are faster. They know torch.library, not FX."""

from .cached_attention import cached_attention
from .embedding import embedding_layer_norm_quantize, int8_embedding
from .fp8_linear import fp8_linear
from .gelu_quantize import gelu_quantize, gelu_quantize_static
from .int8_attention import int8_attention
from .int8_linear import int8_linear, int8_linear_gelu_quantize, int8_linear_quantize
from .low_rank_linear import low_rank_linear
from .norm_quantize import (
    add_layer_norm_quantize,
    add_rms_norm_quantize,
    int8_add_layer_norm_quantize,
    int8_add_rms_norm_quantize,
    layer_norm_quantize,
    rms_norm_quantize,
)
from .quantize import (
    chosen_weight,
    dequantize,
    dequantize_weight,
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_fp8,
    quantize_per_token_int4,
    quantize_static,
    quantize_static_fp8,
    quantize_weight,
)
from .quantized_softmax_attention import quantized_softmax_attention
from .registry import NAMESPACE, OPS, DialectOp, dialect_op, reference_of
from .silu_mul_quantize import silu_mul_quantize, silu_mul_quantize_static
from .w4a8_linear import w4a8_linear
from .weight_only_linear import weight_only_linear

__all__ = [
    "NAMESPACE",
    "OPS",
    "DialectOp",
    "add_layer_norm_quantize",
    "add_rms_norm_quantize",
    "cached_attention",
    "chosen_weight",
    "dequantize",
    "dequantize_weight",
    "dialect_op",
    "embedding_layer_norm_quantize",
    "fp8_linear",
    "gelu_quantize",
    "gelu_quantize_static",
    "int8_add_layer_norm_quantize",
    "int8_add_rms_norm_quantize",
    "int8_attention",
    "int8_embedding",
    "int8_linear",
    "int8_linear_gelu_quantize",
    "int8_linear_quantize",
    "layer_norm_quantize",
    "low_rank_linear",
    "quantize_per_channel",
    "quantize_per_token",
    "quantize_per_token_fp8",
    "quantize_per_token_int4",
    "quantize_static",
    "quantize_static_fp8",
    "quantize_weight",
    "quantized_softmax_attention",
    "reference_of",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "silu_mul_quantize_static",
    "w4a8_linear",
    "weight_only_linear",
]
