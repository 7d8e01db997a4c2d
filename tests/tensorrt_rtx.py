"""What TensorRT-RTX makes of an ONNX file: accepted or refused, and the kernels of the engine it plans.

What this proves: the parser of TensorRT's family takes the file, an engine can be built for a GPU architecture, and
which kernels it consists of, with their element types: whether a Linear became an INT8 GEMM, and an attention one fused
kernel. What it cannot prove: the numbers and the speed, for the engine is planned without a GPU and cannot run here;
nor what TensorRT proper does, which shares parser and graph compiler with TensorRT-RTX but has kernels of its own.

A build runs in a process of its own, for a file can crash the library. `make test` installs it, or, by hand:

    pip install --no-deps -r requirements/trt-check.txt
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

Kind = Literal["gemm", "mha", "other"]
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]

MISSING = [
    name
    for name in ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")
    if importlib.util.find_spec(name) is None
]
SKIP_REASON = f"{' and '.join(MISSING)} not installed: pip install --no-deps -r requirements/trt-check.txt"
HALF = ("Half", "BFloat16")
FLOATS = ("Float", *HALF)  # the widest first
# A quantize or dequantize alone; beside other arithmetic it costs nothing.
_ONLY_QUANTIZES = re.compile(r"__myl_(Mul|Div|Min|Max|Roun|Cast|Resh|Move|Tran|Bcst|Repl|Conc)+_")


@dataclass(frozen=True)
class Kernel:
    """A kernel of the plan.

    Args:
        kind: a matrix product, a fused attention, or anything else.
        inputs, constants, outputs: element types, in TensorRT's words: Float, Half, BFloat16, Int8, FP8, ....
        nodes: names of the ONNX nodes it computes.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> str:
        """The element type that a GEMM or a fused attention multiplies."""
        # The matrix leads the constants. In a fusion, "Cast" ahead of "Fc" makes floats of the integers first.
        if self.kind == "mha":
            return Counter(t for t in self.inputs if t != "Bool").most_common(1)[0][0]  # of three; a mask may be beside
        operands = (*self.inputs, *self.constants[: len(self.inputs) == 1])
        if re.search("Cast.*Fc", self.name):
            operands = tuple(t for t in (*self.inputs, *self.constants) if t in FLOATS)
        return next((t for t in FLOATS if t in operands), operands[0])


@dataclass(frozen=True)
class Build:
    """The outcome of a build.

    Args:
        parsed: the parser took the file.
        built: an engine was planned.
        errors: of the parser and the builder.
        warnings: of both.
        kernels: of the engine, in order; without those that only compute shapes or synchronise streams.
    """

    parsed: bool
    built: bool
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    def gemms(self, *types: str) -> list[Kernel]:
        """Matrix products, those whose operands have one of the types if any are given."""
        return [k for k in self.kernels if k.kind == "gemm" and (not types or k.multiplies in types)]

    def mhas(self, *types: str) -> list[Kernel]:
        """Fused attentions, those whose operands have one of the types if any are given."""
        return [k for k in self.kernels if k.kind == "mha" and (not types or k.multiplies in types)]

    @property
    def int8_gemms(self) -> int:
        return len(self.gemms("Int8"))

    @property
    def float_gemms(self) -> int:
        """Matrix products of floats; a weight that is stored as integers may be dequantized inside."""
        return len(self.gemms(*FLOATS))

    @property
    def int8_mhas(self) -> int:
        return len(self.mhas("Int8"))

    @property
    def half_mhas(self) -> int:
        return len(self.mhas(*HALF))

    @property
    def stray_quantizes(self) -> int:
        """Kernels that quantize or dequantize and do nothing else."""
        lone = [k for k in self.kernels if k.kind == "other" and _ONLY_QUANTIZES.match(k.name)]
        return sum(("Int8" in k.inputs) != ("Int8" in k.outputs) for k in lone)

    def __str__(self) -> str:
        if not self.built:
            return "\n".join(["parsed, not built" if self.parsed else "not parsed", *self.errors])
        return "\n".join(
            f"{k.kind:5} {'/'.join(k.inputs)} x {'/'.join(k.constants)} -> {'/'.join(k.outputs)}  {k.name}"
            for k in self.kernels
        )


def build(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    compute_capabilities: Sequence[str] = ("SM89",),
    shapes: Shapes | None = None,
    timeout: float = 300,
) -> Build:
    """Parse an ONNX model and plan an engine, strongly typed.

    Args:
        model: a path (external data is found beside it), the bytes of a model, or a model.
        compute_capabilities: SM75, SM80, SM86, SM89, SM120 or SM121; one engine serves all.
        shapes: smallest, usual and largest shape of inputs; dynamic dimensions of others are between 1 and 8, of
            the first, and between 1 and 512, of any later.

    Raises:
        subprocess.TimeoutExpired: the library took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if isinstance(model, onnx.ModelProto):
            model = model.SerializeToString()
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            path = Path(model)
        request = {"path": str(path), "capabilities": list(compute_capabilities), "shapes": dict(shapes or {})}
        answer = Path(folder) / "answer.json"
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(request), str(answer)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if not answer.exists():
            what = f"the library ended with status {done.returncode}: {done.stderr[-2000:]}"
            return Build(parsed=False, built=False, errors=(what,), warnings=(), kernels=())
        found = json.loads(answer.read_text())
    return Build(
        parsed=found["parsed"],
        built=found["built"],
        errors=tuple(found["errors"]),
        warnings=tuple(found["warnings"]),
        kernels=tuple(_kernels(found["layers"])),
    )


def _kernels(dump: str) -> list[Kernel]:
    """The kernels in a dump of an engine's layers, which has one a line."""
    line = re.compile(
        r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
        r"Outputs: (?P<outputs>.*?), TacticName: .*?, StreamId: .*?, Metadata: (?P<nodes>.*)$",
        re.M,
    )
    kernels = []
    for found in line.finditer(dump):
        name, layer = found["name"], found["type"]
        if layer in ("shape_call", "signal", "wait"):
            continue
        types = {key: tuple(re.findall(r"Datatype: (\w+)", found[key])) for key in ("inputs", "constants", "outputs")}
        # "Fc" in a fusion's name is a product with a constant matrix, "Mma" one of two activations.
        product = layer == "gemm" or (layer == "runtime_fusion" and re.search("Fc|Mma|[Gg]emm", name) is not None)
        kind: Kind = "mha" if "mha" in name else "gemm" if product else "other"
        nodes = tuple(re.findall(r"\[ONNX Layer: (.*?)\]", found["nodes"]))
        kernels.append(Kernel(name, kind, **types, nodes=nodes))
    return kernels


# --- in the other process ------------------------------------------------------------------------------------------


def _main(request: dict, answer: Path) -> None:
    import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401 - loads the libraries that the bindings need
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: trt.ILogger.Severity, message: str) -> None:
            self.lines.append((int(severity), message))

        def of(self, lowest: trt.ILogger.Severity, highest: trt.ILogger.Severity) -> list[str]:
            return [text for severity, text in self.lines if int(lowest) <= severity <= int(highest)]

    log = Log()
    severity = trt.ILogger.Severity
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(request["path"])
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    errors = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in found]
    plan = None
    if parsed:
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = len(request["capabilities"])
        for i, name in enumerate(request["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
        profile, dynamic = builder.create_optimization_profile(), False
        for i in range(network.num_inputs):
            value = network.get_input(i)
            if -1 in (shape := list(value.shape)):
                dynamic = True
                default = [
                    [d if d != -1 else limits[0 if axis == 0 else 1] for axis, d in enumerate(shape)]
                    for limits in ((1, 1), (4, 128), (8, 512))
                ]
                profile.set_shape(value.name, *request["shapes"].get(value.name, default))
        if dynamic:
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            errors += log.of(severity.INTERNAL_ERROR, severity.ERROR)
    result = {
        "parsed": parsed,
        "built": plan is not None,
        "errors": errors,
        "warnings": log.of(severity.WARNING, severity.WARNING),
        "layers": "\n".join(m for m in log.of(severity.VERBOSE, severity.VERBOSE) if m.startswith("Layers:")),
    }
    answer.write_text(json.dumps(result))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
