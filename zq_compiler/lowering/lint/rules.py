"""The rules, in the order of their ids."""

from . import onnxruntime, qdq, tensorrt
from .rule import REGISTERED, Rule

__all__ = ["RULES", "Rule"]

MODULES = (qdq, tensorrt, onnxruntime)  # importing one registers its rules
_FAMILIES = ("QDQ", "TRT", "ORT", "CUDA")
RULES: tuple[Rule, ...] = tuple(sorted(REGISTERED, key=lambda rule: (_FAMILIES.index(rule.id[:-3]), rule.id)))
