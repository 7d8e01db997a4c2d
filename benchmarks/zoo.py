"""The zoo: every model type of the installed transformers, tiny and random, through `backend="zeroquant"`.

    python -m benchmarks.zoo run --out zoo.json     appends a row a model; a second run goes on where the first stopped
    python -m benchmarks.zoo write zoo.json         writes docs/models.md

Each model runs in float and compiled with the oracle lowering, in a worker process with a time limit. Where the two
differ much, an independent control decides whether INT8 as such or this compiler is the cause: the float model with
hooks that fake-quantize the same linears.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing.connection
import platform
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from . import zoo_models

GOOD_DB = 20.0  # above this an output is taken for right without a control
CONTROL_DB = 6.0  # and below it, when it is no further than this from the control
ACCEPTED = ("ok", "ok (sensitive)", "left in float")
DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"


@dataclass
class Row:
    """What became of one model type.

    Args:
        verdict: `ok`, `ok (sensitive)`, `left in float`, `wrong`, `error`, `timeout`, `not captured`,
            `float model not comparable` or `cannot be built`.
        int8, linears: layers of all graphs: in INT8, and all linears (vocabulary projections included).
        sqnr, control: worst output against float eager, ours and the control's; None where there is none.
        graphs: graphs that Dynamo gave the backend.
        reasons: why layers stayed in float -> how many.
        unseen: linears that ran but stand in no report: Dynamo left them outside its graphs.
        detail: the error, or why it cannot be built.
    """

    model_type: str
    verdict: str
    model_class: str = ""
    int8: int = 0
    linears: int = 0
    sqnr: float | None = None
    control: float | None = None
    graphs: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    detail: str = ""


def examine(model_type: str) -> Row:
    """Build, run in float, compile, run, compare."""
    try:
        model, inputs = zoo_models.build(model_type)
    except Exception as error:
        return Row(model_type, "cannot be built", detail=zoo_models.first_line(error).removeprefix("CannotBuild: "))
    return compare(model_type, model, inputs)


def compare(model_type: str, model: torch.nn.Module, inputs: dict[str, Any]) -> Row:
    """Float against the backend's oracle."""
    from zq_compiler import compile_reports

    row = Row(model_type, "ok", type(model).__name__)
    with _calls_of_linears(model) as called:
        reference = outputs_of(model, inputs)
    again = outputs_of(model, inputs)
    if not reference or len(again) != len(reference) or worst_sqnr(reference, again) < 60:
        row.verdict, row.detail = "float model not comparable", "two float runs differ, or give no finite float output"
        return row
    torch.compiler.reset()
    before = len(compile_reports())
    try:
        with mock.patch("zq_compiler.backend.inductor_compile", lambda gm, *_: gm.forward):
            # a graph without linears would go through Inductor as it is: slow, and nothing to learn here
            compiled = torch.compile(model, backend="zeroquant", options={"lowering": "eager"})
            actual = outputs_of(compiled, inputs)
    except Exception as error:
        row.verdict = _whose_error(model, inputs)
        row.detail = zoo_models.first_line(getattr(error, "inner_exception", None) or error)
        return row
    reports = compile_reports()[before:]
    layers = [layer for report in reports for layer in report.layers]
    dense = [layer for layer in layers if layer.kind in ("linear", "lm_head")]
    quantized = {layer.name for layer in dense if layer.got == "int8"}
    row.graphs, row.linears = len(reports), len(dense)
    row.int8 = sum(layer.got == "int8" for layer in dense)
    row.reasons = dict(Counter(f"{layer.kind}: {layer.reason}" for layer in layers if layer.got != "int8"))
    row.unseen = _unseen(called, layers)
    row.sqnr = worst_sqnr(reference, actual)
    if not row.sqnr >= GOOD_DB:
        captured = _passed_through(model, inputs)
        if worst_sqnr(reference, captured) < 60:
            row.detail = "compared with torch.compile's pass-through backend, which differs from eager here"
        row.sqnr = worst_sqnr(captured, actual)
        if not row.sqnr >= GOOD_DB:
            controls = []
            for jitter in (0.0, 1e-3, 2e-3, 3e-3):
                with fake_quantized(model, quantized, jitter):
                    controls.append(outputs_of(model, inputs))
            control = min(controls, key=lambda c: worst_sqnr(reference, c))
            row.control = worst_sqnr(reference, control)
            row.verdict = "ok (sensitive)" if no_worse((captured, actual), (reference, control)) else "wrong"
            return row
    if not quantized:
        row.verdict = "left in float"
    return row


def _passed_through(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs under torch.compile's own backend that does nothing: what Dynamo makes of the model."""
    torch.compiler.reset()
    return outputs_of(torch.compile(model, backend="eager"), inputs)


def _whose_error(model: torch.nn.Module, inputs: dict[str, Any]) -> str:
    """`not captured` when torch.compile fails with its own pass-through backend too."""
    try:
        _passed_through(model, inputs)
    except Exception:
        return "not captured"
    return "error"


def outputs_of(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """All float tensors that a call returns, in order; caches are not outputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return [t.detach().float().clone() for t in _tensors(result) if t.is_floating_point() and t.numel()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if "past_key_values" not in str(key) and "cache" not in str(key):
                yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))


def worst_sqnr(reference: list[Tensor], actual: list[Tensor]) -> float:
    """The lowest SQNR over outputs, at most 200 dB; NaN where shapes differ or numbers are not finite."""
    if [t.shape for t in reference] != [t.shape for t in actual]:
        return math.nan
    figures = [_sqnr(r, a) for r, a in zip(reference, actual, strict=True)]
    return math.nan if any(map(math.isnan, figures)) else min(figures, default=200.0)


def _sqnr(reference: Tensor, actual: Tensor) -> float:
    """As `zq_compiler.numerics.sqnr`, over the elements that are finite in the reference (masks hold -inf)."""
    finite = reference.isfinite()
    if not torch.equal(reference[~finite].nan_to_num(), actual[~finite].nan_to_num()):
        return math.nan
    signal, noise = reference[finite].double(), (reference - actual)[finite].double()
    if not noise.isfinite().all():
        return math.nan
    power = noise.square().sum().item() / max(signal.square().sum().item(), 1e-30)
    return min(200.0, -10 * math.log10(power)) if power > 0 else 200.0


def no_worse(ours: tuple[list[Tensor], list[Tensor]], control: tuple[list[Tensor], list[Tensor]]) -> bool:
    """Of (reference, result) pairs: each output of ours is good, or about as far off as the control's."""
    shapes = [[[t.shape for t in side] for side in pair] for pair in (ours, control)]
    if shapes[0][0] != shapes[0][1]:
        return shapes[1][0] != shapes[1][1]
    if shapes[1][0] != shapes[1][1]:
        return all(bool(t.isfinite().all()) for t in ours[1])
    for r, a, control_r, c in zip(*ours, *control, strict=True):
        mine, theirs = _sqnr(r, a), _sqnr(control_r, c)
        if math.isnan(mine) != math.isnan(theirs) or mine < min(GOOD_DB, theirs - CONTROL_DB):
            return False
    return True


# --- the control ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_quantized(model: torch.nn.Module, names: set[str], jitter: float = 0.0) -> Iterator[None]:
    """INT8 rounding of the named linears' weights and inputs; `jitter`: small noise, so that routing flips too."""
    restore: list[tuple[Tensor, Tensor]] = []
    hooks = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module) and any(_is_called(name, reported) for reported in names):
            weight = module.weight
            assert isinstance(weight, Tensor)
            if any(weight is known for known, _ in restore):
                continue
            restore.append((weight, weight.detach().clone()))
            rows = weight.detach() if isinstance(module, torch.nn.Linear) else weight.detach().t()
            rounded = _rounded(rows) * (1 + jitter * torch.randn_like(rows))
            with torch.no_grad():
                weight.copy_(rounded if isinstance(module, torch.nn.Linear) else rounded.t())
            hooks.append(module.register_forward_pre_hook(lambda _, args: (_rounded(args[0]), *args[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for weight, original in restore:
                weight.copy_(original)


def _rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / step).round() * step


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


@contextlib.contextmanager
def _calls_of_linears(model: torch.nn.Module) -> Iterator[list[set[str]]]:
    """All names of each linear that is called."""
    names: dict[torch.nn.Module, set[str]] = {}
    weights: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_linear(module):
            names.setdefault(module, weights.setdefault(id(module.weight), set())).add(name)
    called: dict[torch.nn.Module, set[str]] = {}
    found: list[set[str]] = []

    def note(module: torch.nn.Module, _: Any) -> None:
        called[module] = names[module]

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        yield found
    finally:
        found.extend(called.values())
        for hook in hooks:
            hook.remove()


def _unseen(called: list[set[str]], layers: list[Any]) -> list[str]:
    reported = {layer.name for layer in layers}
    return sorted(min(names) for names in called if not any(_is_called(n, r) for n in names for r in reported))


def _is_called(name: str, reported: str) -> bool:
    """Behind a graph break, a report knows a layer by its name inside the module whose frame the graph is."""
    return f".{name}".endswith(f".{reported}")


# --- the worker ----------------------------------------------------------------------------------------------------


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    while (model_type := pipe.recv()) is not None:
        pipe.send(dataclasses.asdict(examine(model_type)))


class Worker:
    """One process that examines models; a new one after a crash, a timeout, or many models."""

    def __init__(self, timeout: float, models: int = 60) -> None:
        self.timeout, self.models = timeout, models
        self.process: Any = None
        self.served = 0

    def examine(self, model_type: str) -> Row:
        """As `examine`, and a row for a crash or a timeout."""
        if self.process is None or self.served >= self.models:
            self.close()
            self.pipe, theirs = multiprocessing.Pipe()
            self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
            self.served = 0
        self.served += 1
        try:
            self.pipe.send(model_type)
            if self.pipe.poll(self.timeout + (30 if self.served == 1 else 0)):
                return Row(**self.pipe.recv())
            row = Row(model_type, "timeout", detail=f"over {self.timeout:.0f} s")
        except (EOFError, OSError):
            row = Row(model_type, "error", detail="the process died")
        self.close()
        return row

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# --- commands ------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False)


def read_rows(file: Path) -> dict[str, Row]:
    """Rows by model type; a later line for a type replaces an earlier one."""
    rows = [Row(**json.loads(line)) for line in (file.read_text().splitlines() if file.exists() else [])]
    return {row.model_type: row for row in rows}


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="these model types, again if they have a row")] = None,
    out: Annotated[Path, typer.Option(help="rows, one JSON object a line")] = Path("zoo.json"),
    limit: Annotated[int | None, typer.Option(help="stop after so many models")] = None,
    timeout: Annotated[float, typer.Option(help="seconds a model")] = 90.0,
) -> None:
    """Examine every model type that has no row in the file yet."""
    done = read_rows(out)
    todo = only or [t for t in zoo_models.model_types() if t not in done]
    worker = Worker(timeout)
    for model_type in todo[:limit]:
        row = worker.examine(model_type)
        with out.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        print(f"{model_type:32} {row.verdict:16} {row.int8}/{row.linears} {_db(row.sqnr)} {row.detail}", flush=True)
    worker.close()


@app.command()
def write(file: Path) -> None:
    """Write docs/models.md from the rows."""
    import transformers

    rows = sorted(read_rows(file).values(), key=lambda r: r.model_type.lower())
    counts = Counter(row.verdict for row in rows)
    order = [*ACCEPTED, *sorted(set(counts) - set(ACCEPTED))]
    lines = [
        "# Model types",
        "",
        "Generated by `python -m benchmarks.zoo run` and `python -m benchmarks.zoo write`; do not edit. Every model",
        f"type of transformers {transformers.__version__} as a tiny model with random weights, compiled with",
        f'`torch.compile(model, backend="zeroquant")` (oracle lowering) on torch {torch.__version__},',
        f"Python {platform.python_version()}, CPU. `SQNR` is the worst float output against the float model. A row is",
        "*sensitive* when the SQNR is low and an independent fake-quantized float model (`control`) is as far off:",
        "routing, codebooks and the like flip on random weights. Embeddings, convolutions, projections onto the",
        "vocabulary and linears under 16 features stay in float by the recipe; the last column says what else did.",
        "",
        *(f"- {verdict}: {counts[verdict]}" for verdict in order if counts[verdict]),
        f"- no row yet: {len(set(zoo_models.model_types()) - {row.model_type for row in rows})}",
        "",
        "| type | class | verdict | INT8 / linears | SQNR dB | control | graphs | in float, and why |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_table_row(row) for row in rows if row.verdict != "cannot be built"),
        "",
        "## Not built",
        "",
        "No tiny model, no inputs or a missing package: this says nothing about the compiler.",
        "",
        "| type | why |",
        "| --- | --- |",
        *(f"| {r.model_type} | {r.detail.replace('|', ' ')} |" for r in rows if r.verdict == "cannot be built"),
    ]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


def _table_row(row: Row) -> str:
    told = {r: n for r, n in row.reasons.items() if not (row.int8 and r.startswith(("embedding", "conv")))}
    why = "; ".join(f"{count} {reason}" for reason, count in sorted(told.items()))
    outside = f"{len(row.unseen)} linears unused or outside Dynamo's graphs" if row.unseen else ""
    note = "; ".join(part for part in (row.detail, outside, why) if part).replace("|", "\\|")
    ratio = f"{row.int8} / {row.linears}" if row.linears else ""
    cells = [
        row.model_type,
        row.model_class,
        row.verdict,
        ratio,
        _db(row.sqnr),
        _db(row.control),
        str(row.graphs or ""),
    ]
    return f"| {' | '.join([*cells, note])} |"


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    app()
