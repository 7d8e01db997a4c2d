"""zq_compiler: transformer models made small and fast by post-training quantization, the ZeroQuant way."""

from .analysis.report import Report
from .analysis.saturation import Saturation
from .analysis.search import SearchResult, Trial, search
from .analysis.sensitivity import LayerSensitivity, sensitivity
from .api import CompiledModel, QuantizedModel, export_onnx, load, quantize
from .backend import compile_reports, release
from .batches import Batches
from .errors import (
    CalibrationError,
    CaptureError,
    ExportError,
    KernelBuildError,
    LintError,
    RecipeError,
    StrictError,
    VerificationError,
    WeightError,
    ZQError,
)
from .kv_cache import kv_cache
from .lowering.lint import LintReport, lint
from .recipe import QRule, Recipe, list_recipes, load_recipe
from .schemes import Granularity, QScheme
from .statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "CalibrationError",
    "CaptureError",
    "CompiledModel",
    "ExportError",
    "Granularity",
    "KernelBuildError",
    "LayerSensitivity",
    "LintError",
    "LintReport",
    "QRule",
    "QScheme",
    "QuantizedModel",
    "Recipe",
    "RecipeError",
    "Report",
    "Saturation",
    "SearchResult",
    "Statistics",
    "StrictError",
    "Trial",
    "VerificationError",
    "WeightError",
    "ZQError",
    "compile_reports",
    "export_onnx",
    "kv_cache",
    "lint",
    "list_recipes",
    "load",
    "load_recipe",
    "quantize",
    "release",
    "search",
    "sensitivity",
]
