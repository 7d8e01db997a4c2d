"""What a runtime will refuse, compute in floats or get wrong in a quantized ONNX file, whoever wrote it.

graph       an indexed view of the file: makers, readers, constants, types
attention   attentions, among the products and softmaxes of a graph
rule        what a rule is, and the list of them
qdq, tensorrt, onnxruntime    the rules
report      what is found

Only the file's structure and its scales are read; weights are not, inside the file or beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import LintError
from .report import Finding, LintReport, Severity

if TYPE_CHECKING:
    import onnx

__all__ = ["TARGETS", "Finding", "LintReport", "Severity", "lint"]

TARGETS = ("tensorrt", "onnxruntime", "onnxruntime-cuda")


def lint(model: str | Path | onnx.ModelProto, target: str = "tensorrt") -> LintReport:
    """Find what a runtime will not run as the quantized ONNX file means it.

    Args:
        model: the file's path, whose external data lies beside it, or a model in memory.
        target: `tensorrt`, `onnxruntime` (its CPU kernels) or `onnxruntime-cuda`.

    Raises:
        LintError: the target is unknown, or the file is not ONNX, or lacks a part.

    >>> from onnx import parser
    >>> model = parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
    ... example (float[8,64] x) => (float[8,64] y) <float s = {0.1}, int8 z = {3}> {
    ...     q = QuantizeLinear(x, s, z)
    ...     y = DequantizeLinear(q, s, z)
    ... }''')
    >>> report = lint(model, "tensorrt")
    >>> [(f.rule, f.op, f.why) for f in report.findings]
    [('TRT001', 'QuantizeLinear', 'its zero point is 3'), ('TRT001', 'DequantizeLinear', 'its zero point is 3')]
    >>> report.ok, lint(model, "onnxruntime").ok
    (False, True)
    """
    if target not in TARGETS:
        raise LintError(f"unknown target {target!r}", fix=f"use one of {', '.join(TARGETS)}")
    from .graph import read
    from .rules import RULES

    file = read(model)
    findings = [
        Finding(rule.id, rule.name, rule.severity, node.label, node.op, why, rule.mend)
        for rule in RULES
        if target in rule.targets
        for graph in file.graphs
        for node, why in rule.check(graph)
    ]
    name = str(model) if isinstance(model, (str, Path)) else file.name
    return LintReport(name, target, findings, nodes=sum(len(g.nodes) for g in file.graphs), notes=file.notes)
