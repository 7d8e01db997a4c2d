"""The dialect's ops, one a file: reference, and the providers that are faster. They know torch.library, not FX."""

from .embedding import int8_embedding
from .gelu_quantize import gelu_quantize
from .int8_linear import int8_linear
from .norm_quantize import add_layer_norm_quantize, add_rms_norm_quantize, layer_norm_quantize, rms_norm_quantize
from .quantize import dequantize, quantize_per_channel, quantize_per_token
from .registry import NAMESPACE, OPS, DialectOp, dialect_op, reference_of
from .silu_mul_quantize import silu_mul_quantize

__all__ = [
    "NAMESPACE",
    "OPS",
    "DialectOp",
    "add_layer_norm_quantize",
    "add_rms_norm_quantize",
    "dequantize",
    "dialect_op",
    "gelu_quantize",
    "int8_embedding",
    "int8_linear",
    "layer_norm_quantize",
    "quantize_per_channel",
    "quantize_per_token",
    "reference_of",
    "rms_norm_quantize",
    "silu_mul_quantize",
]
