"""Program -> ONNX file, in the terms of the runtime that it is written for.

dialect       what the spellings of one runtime have in common; `onnxruntime`, `tensorrt` are the spellings
tracing       the graph in those terms, traced once
conversion    the trace as a model, through torch's exporter
naming        names of values, axes and nodes
export        the whole way, and the report
"""

from .export import TARGETS, ExportReport, export

__all__ = ["TARGETS", "ExportReport", "export"]
