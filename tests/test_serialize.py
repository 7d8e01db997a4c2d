"""Saved models come back: the same numbers in another process, weights once in the file, and clear errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import zq_compiler as zq
from benchmarks import zoo_models
from zq_compiler import ZQError
from zq_compiler.pipeline import readable
from zq_compiler.serialize import load as load_program

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
SIZES = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=128))


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=200, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, intermediate_size=128)
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(40).reshape(2, 20) % 200
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def _quantized(name: str) -> zq.QuantizedModel:
    torch.manual_seed(0)
    return zq.quantize(MODELS[name]().eval(), _inputs())


@functools.cache
def _linear() -> zq.QuantizedModel:
    torch.manual_seed(0)
    return zq.quantize(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval(), torch.randn(3, 32))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _linear().save(tmp_path / "model")
    return tmp_path / "model"


def _flat(output: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(output)


def _python(code: str, *arguments: Path) -> str:
    """Run code in a second process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- round trips ---------------------------------------------------------------------------------------------------

SECOND_PROCESS = """
import sys, torch
import zq_compiler as zq
from zq_compiler.numerics import sqnr
from safetensors.torch import load_file
assert "transformers" not in sys.modules
q = zq.load(sys.argv[1])
given = load_file(sys.argv[2])
inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
leaves = torch.utils._pytree.tree_leaves
eager = leaves(q(**inputs))
assert all(torch.equal(y, given[f"out{i}"]) for i, y in enumerate(eager)), "eager outputs differ"
fast = leaves(q.compile()(**inputs))
print(type(q(**inputs)).__name__, min(sqnr(a, b) for a, b in zip(eager, fast)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_second_process_computes_the_same(name: str, tmp_path: Path):
    quantized, inputs = _quantized(name), _inputs()
    quantized.save(tmp_path / "model")
    outputs = {f"out{i}": y.contiguous() for i, y in enumerate(_flat(quantized(**inputs)))}
    save_file({**inputs, **outputs}, tmp_path / "expected.safetensors")
    cls, decibels = _python(SECOND_PROCESS, tmp_path / "model", tmp_path / "expected.safetensors").split()
    assert cls == type(quantized(**inputs)).__name__
    assert float(decibels) > 100


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_in_this_process(name: str, tmp_path: Path):
    """Outputs to the bit, the graph up to the names of symbols, and the report."""
    quantized, inputs = _quantized(name), _inputs()
    quantized.save(tmp_path / "model")
    loaded = zq.load(tmp_path / "model")
    before, after = quantized(**inputs), loaded(**inputs)
    assert type(after) is type(before)
    assert all(torch.equal(a, b) for a, b in zip(_flat(before), _flat(after), strict=True))
    assert _anonymous(readable(loaded.program)) == _anonymous(readable(quantized.program))
    assert str(loaded.report()) == str(quantized.report())
    assert loaded.report().to_dict() == quantized.report().to_dict()
    assert _anonymous(str(loaded.convention.inputs)) == _anonymous(str(quantized.convention.inputs))
    sizes = [{dim for spec in q.convention.inputs for dim in spec.dims} for q in (quantized, loaded)]
    assert len(sizes[0]) == len(sizes[1])  # what was one symbol is one symbol


def _anonymous(text: str) -> str:
    """Without the numbers of symbols, which are given anew; products of symbols are printed in their order."""
    return re.sub(r"\bs\d+\b", "s", text)


def test_a_loaded_model_takes_other_sizes(tmp_path: Path):
    _quantized("bert").save(tmp_path / "model")
    inputs = {"input_ids": torch.ones(1, 7, dtype=torch.int64), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
    loaded = zq.load(tmp_path / "model")
    assert torch.equal(loaded(**inputs)[0], _quantized("bert")(**inputs)[0])


@pytest.mark.parametrize("family", ["bloom", "dpt", "yolos", "pvt", pytest.param("swin", marks=pytest.mark.slow)])
def test_ops_that_need_help_with_symbolic_sizes(family: str, tmp_path: Path):
    """baddbmm, pad and both upsamplings; PVT reports a position table resized to sizes that are symbols."""
    model, inputs = zoo_models.build(family)
    quantized = zq.quantize(model, inputs)
    quantized.save(tmp_path / "model")
    loaded = zq.load(tmp_path / "model")
    for a, b in zip(_flat(quantized(**inputs)), _flat(loaded(**inputs)), strict=True):
        assert torch.equal(a, b)
    assert loaded.report().to_dict() == quantized.report().to_dict()


def test_saving_a_loaded_model_writes_the_same_files(saved: Path, tmp_path: Path):
    zq.load(saved).save(tmp_path / "again")
    for file in saved.iterdir():
        written, again = file.read_bytes(), (tmp_path / "again" / file.name).read_bytes()
        if file.name == "graph.json":  # symbols are numbered anew
            written, again = (_anonymous(text.decode()).encode() for text in (written, again))
        assert written == again, file.name


def test_bfloat16(tmp_path: Path):
    torch.manual_seed(0)
    quantized = zq.quantize(_llama().to(torch.bfloat16).eval(), _inputs())
    quantized.save(tmp_path / "model")
    before, after = quantized(**_inputs()), zq.load(tmp_path / "model")(**_inputs())
    assert before.logits.dtype is torch.bfloat16 and torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("recipe", ["w4a8", "w4a8-g128", "w48a8", "w4a4", "w4a8-fp-m2"])
def test_packed_weights_are_stored_packed(recipe: str, tmp_path: Path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(144, 64), nn.GELU(), nn.Linear(64, 32)).eval(), torch.randn(3, 144)
    quantized = zq.quantize(model, x, recipe=recipe)
    quantized.save(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "weights.safetensors")
    assert stored["0.weight_q"].dtype is torch.uint8 and stored["0.weight_q"].nbytes == 64 * 144 // 2
    loaded = zq.load(tmp_path / "model")
    constants = dict(loaded.program.gm.named_buffers())
    for name, value in quantized.program.gm.named_buffers():
        assert torch.equal(constants[name], value) and constants[name].dtype is value.dtype
    assert torch.equal(loaded(x), quantized(x))
    assert loaded.program.recipe == zq.load_recipe(recipe) and str(loaded.report()) == str(quantized.report())


def test_constant_inputs_and_infinite_constants(tmp_path: Path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None, scale: float) -> dict[str, Any]:
            y = self.linear(x).masked_fill(x > 0, float("-inf")) * scale
            return {"y": y, "mask": mask, "list": [x]}

    x = torch.randn(2, 32)
    quantized = zq.quantize(Masked().eval(), (x, None, 0.5))
    quantized.save(tmp_path / "model")
    loaded = zq.load(tmp_path / "model")
    assert torch.equal(loaded(x, None, 0.5)["y"], quantized(x, None, 0.5)["y"])
    with pytest.raises(zq.CaptureError, match=r"was 0\.5 when"):
        loaded(x, None, 0.25)


def test_tied_weights_lie_in_the_file_once(tmp_path: Path):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=4000, bos_token_id=0, eos_token_id=0)
    quantized = zq.quantize(transformers.GPT2LMHeadModel(config).eval(), _inputs())
    quantized.save(tmp_path / "model")
    size = (tmp_path / "model" / "weights.safetensors").stat().st_size
    table = 4000 * 64 * 4
    assert table < size < 1.5 * table
    assert size < quantized.report().bytes_after + 10_000  # the header


def test_views_of_one_storage(tmp_path: Path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(48, 32)
            self.register_buffer("a", whole[:16])
            self.register_buffer("b", whole[32:].t())
            self.register_buffer("c", torch.randn(1, 16).expand(32, 16))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x + self.a.sum(), x + self.b, x * self.c

    quantized = zq.quantize(Views().eval(), torch.randn(32, 16), recipe="float")
    quantized.save(tmp_path / "model")
    loaded = zq.load(tmp_path / "model")
    x = torch.randn(32, 16)
    assert all(torch.equal(p, q) for p, q in zip(quantized(x), loaded(x), strict=True))
    assert sum(t.numel() for t in load_file(tmp_path / "model" / "weights.safetensors").values()) == 48 * 32 + 16


def test_types_of_a_missing_library_become_plain(tmp_path: Path):
    _quantized("gpt2").save(tmp_path / "model")
    code = """
import sys
sys.modules["transformers"] = None
import torch, zq_compiler as zq
q = zq.load(sys.argv[1])
ids = torch.ones(1, 4, dtype=torch.int64)
y = q(input_ids=ids, attention_mask=ids)
print(type(y).__name__, list(y), type(y["past_key_values"]).__name__, len(y["past_key_values"]))
print(*(n for n in q.report().notes if "is not known here" in n), sep="\\n")
"""
    first, *notes = _python(code, tmp_path / "model").splitlines()
    assert first == "dict ['logits', 'past_key_values'] tuple 2"
    assert len(notes) == 2 and "CausalLMOutputWithCrossAttentions is not known here: a dict takes its place" in "".join(
        notes
    )


# --- what can be wrong with a folder -------------------------------------------------------------------------------


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({name: value})


def _node(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["nodes"][index].update(changes)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("graph", _set("format", "other"), "was not written by zq_compiler"),
        ("graph", _set("version", 99), "format version 99, this package reads 3"),
        ("graph", _set("nodes", []), "its last node is no output"),
        ("graph", _set("inputs", []), "is damaged: KeyError: 'input_1'"),
        (
            "program",
            _set("out_spec", [1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]),
            "another graph",
        ),
        ("graph", _node(-2, target="aten.no_such_op.default"), "calls aten.no_such_op.default, which is unknown here"),
        ("graph", _node(-2, target="os.system"), "calls os.system, which is unknown here"),
        ("graph", _node(-2, args={"tuple": [{"node": "nobody"}]}), "is damaged: KeyError: 'nobody'"),
        ("graph", _node(-2, val={"dtype": "float32", "dims": [1, 7]}), "the file says"),
        ("graph", _node(-2, args={"tuple": [1, 2]}), "cannot be evaluated"),
        ("program", _set("plan", [{"name": "x"}]), "is damaged: KeyError"),
        ("program", _set("stage", "LATE"), "is damaged: KeyError: 'LATE'"),
        ("recipe", _set("colour", "red"), "unknown recipe key colour"),
    ],
)
def test_damaged_json_names_the_file(saved: Path, file: str, change: Callable[..., None], message: str):
    _edit(saved / f"{file}.json", change)
    with pytest.raises(ZQError, match=re.escape(message)) as caught:
        zq.load(saved)
    assert str(saved / f"{file}.json") in str(caught.value) and "To mend it" in str(caught.value)


@pytest.mark.parametrize("name", ["graph.json", "program.json", "recipe.json", "report.json", "weights.safetensors"])
def test_a_missing_or_cut_file_is_named(saved: Path, name: str):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ZQError, match=f"{re.escape(name)}: is (no JSON|damaged)"):
        zq.load(saved)
    (saved / name).unlink()
    with pytest.raises(ZQError, match=f"{re.escape(name)}: is missing. To mend it: copy the whole folder"):
        zq.load(saved)


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(ZQError, match=r"there is no such folder\. To mend it: give a folder that save"):
        zq.load(tmp_path / "nowhere")


def test_a_tensor_of_the_wrong_shape(saved: Path):
    path = saved / "weights.safetensors"
    tensors = load_file(path)
    save_file({k: v.t().contiguous() if k == "0.weight_q" else v for k, v in tensors.items()}, path)
    with pytest.raises(ZQError, match=r"tensor 0.weight_q is int8 \[64, 32\], the graph wants int8 \[32, 64\]"):
        zq.load(saved)
    save_file({k: v for k, v in tensors.items() if k != "0.weight_q"}, path)
    with pytest.raises(ZQError, match=r"lacks tensor 0\.weight_q"):
        zq.load(saved)


def test_saving_replaces_a_saved_model_and_nothing_else(saved: Path, tmp_path: Path):
    _linear().save(saved)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # nothing left beside it
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").touch()
    with pytest.raises(ZQError, match=r"exists and is no saved model\. To mend it: give another folder"):
        _linear().save(foreign)
    assert [p.name for p in foreign.iterdir()] == ["cat.jpg"]


def test_a_failed_save_leaves_the_old_model(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise OSError("no space left")

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr("zq_compiler.serialize.save_file", full)
    with pytest.raises(OSError, match="no space"):
        _linear().save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_unregistered_outputs_are_refused(tmp_path: Path):
    @dataclasses.dataclass
    class Pair:
        first: Any

    torch.utils._pytree.register_pytree_node(Pair, lambda p: ([p.first], None), lambda v, _: Pair(*v))

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Pair:
            return Pair(x + 1)

    quantized = zq.quantize(Model().eval(), torch.randn(2, 2))
    with pytest.raises(ZQError, match="of a type that cannot be written"):
        quantized.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_control_flow_is_refused_at_save(tmp_path: Path):
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,))

    quantized = zq.quantize(Branches().eval(), torch.randn(2, 2))
    with pytest.raises(ZQError, match="cannot be saved"):
        quantized.save(tmp_path / "model")


def test_the_report_comes_along(saved: Path):
    _, _, report = load_program(saved)
    assert report["counts"] == {"int8": 2} and report["layers"][0]["name"] == "0"
    assert json.loads((saved / "report.json").read_text()) == report
