"""A rotating sample of the zoo of model types (docs/models.md has them all), and the builder of tiny models."""

import os
import re
from datetime import date

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import zoo, zoo_models

SAMPLE = 20


def sample() -> list[str]:
    """Types that docs/models.md has as compiled; which ones changes with the day, or with ZQ_ZOO_ROTATION."""
    if not zoo.DOCUMENT.exists():
        return ["bert", "gpt2", "vit"]
    rows = re.findall(r"^\| (\S+) \| \S+ \| (ok|ok \(sensitive\)|left in float) \|", zoo.DOCUMENT.read_text(), re.M)
    known = set(zoo_models.model_types())
    types = [name for name, _ in rows if name in known]
    rotation = int(os.environ.get("ZQ_ZOO_ROTATION", date.today().timetuple().tm_yday))
    stride = max(1, len(types) // SAMPLE)
    return types[rotation % stride :: stride][:SAMPLE]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sample())
def test_compiles_to_right_outputs(model_type: str) -> None:
    row = zoo.examine(model_type)
    assert row.verdict in zoo.ACCEPTED, row
    if row.graphs == 1:  # between several graphs, Dynamo leaves code in Python
        assert not [name for name in row.unseen if matters(model_type, name)], row


def matters(model_type: str, linear: str) -> bool:
    """Whether the outputs depend on a linear at all: torch.compile drops what is computed for nothing."""
    model, inputs = zoo_models.build(model_type)
    before = zoo.outputs_of(model, inputs)
    torch.nn.init.normal_(model.get_submodule(linear).weight)
    return zoo.worst_sqnr(before, zoo.outputs_of(model, inputs)) < 200


def test_rows_survive_the_file(tmp_path) -> None:
    file = tmp_path / "zoo.json"
    file.write_text('{"model_type": "a", "verdict": "error"}\n{"model_type": "a", "verdict": "ok", "int8": 3}\n')
    assert zoo.read_rows(file) == {"a": zoo.Row("a", "ok", int8=3)}


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5", "vit", "clip", "mixtral", "deepseek_v3"])
def test_tiny_configurations_keep_what_divides(model_type: str) -> None:
    config = zoo_models.tiny_config(model_type)
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "model_type"))):
        heads, groups = getattr(part, "num_attention_heads", None), getattr(part, "num_key_value_heads", None)
        if heads:
            assert part.hidden_size % heads == 0
            assert heads % (groups or heads) == 0
        assert getattr(part, "num_hidden_layers", 1) <= 4
        assert getattr(part, "vocab_size", 0) <= zoo_models.VOCAB
        if hasattr(part, "patch_size"):
            assert part.image_size % part.patch_size == 0


def test_special_tokens_are_inside_the_vocabulary_and_alike_in_sub_configurations() -> None:
    config = zoo_models.tiny_config("qwen2_vl")
    assert config.image_token_id < zoo_models.VOCAB
    assert config.image_token_id != config.video_token_id


def test_rotary_sections_fill_the_small_head() -> None:
    assert sum(zoo_models.tiny_config("qwen2_vl_text").rope_parameters["mrope_section"]) == zoo_models.HEAD // 2


def test_layer_types_keep_one_of_each_kind() -> None:
    assert set(zoo_models.tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}


def test_the_control_restores_the_weights() -> None:
    model, inputs = zoo_models.build("bert")
    before = zoo.outputs_of(model, inputs)
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    with zoo.fake_quantized(model, names):
        rounded = zoo.outputs_of(model, inputs)
    assert 20 < zoo.worst_sqnr(before, rounded) < 60
    assert zoo.worst_sqnr(before, zoo.outputs_of(model, inputs)) == 200


def test_errors_in_the_table_name_no_folder_of_a_machine() -> None:
    error = ValueError("no A in <module 'a' from '/home/me/.venv/lib/a/__init__.py'> nor 3/4\nmore")
    assert zoo_models.first_line(error) == "ValueError: no A in <module 'a' from '__init__.py'> nor 3/4"
