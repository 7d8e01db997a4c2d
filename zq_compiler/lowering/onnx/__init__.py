"""Program -> ONNX file, in the terms of the runtime that it is written for.

dialect       what the spellings of one runtime have in common; `onnxruntime`, `tensorrt` are the spellings
conversion    the graph in those terms, through torch's exporter
naming        names of values, axes and nodes
export        the whole way, and the report
"""

from .export import TARGETS, ExportReport, export

__all__ = ["TARGETS", "ExportReport", "export"]
