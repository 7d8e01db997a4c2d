"""The module door and the ExportedProgram door; tests/test_backend.py has Dynamo's."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._pytree import register_dataclass

from tests.programs import Block, captured, ops, randn
from tests.tolerances import W8A8_DB
from zq_compiler import CaptureError, quantize
from zq_compiler.capture import capture_exported, capture_module, dotted_name, holds_layers, layer_of
from zq_compiler.numerics import sqnr
from zq_compiler.program import Stage, constants, fake_value
from zq_compiler.recipe import PRESETS

W8A8 = PRESETS["w8a8"]


@dataclass
class Output:
    hidden: torch.Tensor
    pooled: torch.Tensor | None = None


register_dataclass(Output)


class Keywords(nn.Module):
    """Keyword arguments, None inputs, a buffer, a dataclass out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("offset", torch.ones(32))

    def forward(self, x, *, mask=None, other=None):
        y = self.layer(x) + self.offset
        return Output(hidden=y if mask is None else y * mask)


def shape(program, index=0):
    return fake_value(program.graph.find_nodes(op="placeholder")[index]).shape


def test_what_a_program_holds():
    model = Keywords().eval()
    program = capture_module(model, (randn(2, 32),), {"mask": randn(2, 1), "other": None}, W8A8)
    assert program.stage is Stage.FLOAT and program.recipe is W8A8
    assert ops(program) == {"aten.linear": 1, "aten.add.Tensor": 1, "aten.mul.Tensor": 1}
    assert {name for name, _ in constants(program.gm)} == {"layer.weight", "layer.bias", "offset"}
    assert program.float_bytes == 4 * (32 * 32 + 32 + 32)
    assert program.parameter_names == ("x", "mask", "other")
    assert len(program.example_inputs) == 3 and program.example_inputs[2] is None
    assert all(not t.requires_grad for _, t in constants(program.gm))
    assert program.gm.layer.weight.data_ptr() == model.layer.weight.data_ptr()  # shared, not copied
    assert isinstance(program.gm(*program.example_inputs), tuple)
    assert all("val" in n.meta for n in program.graph.nodes if n.op != "output")


def test_kwargs_none_and_dataclasses_come_out_as_they_went_in():
    model, x = Keywords().eval(), randn(2, 32)
    q = quantize(model, x, {"mask": torch.full((2, 1), 2.0), "other": None})
    out = q(x, mask=torch.full((2, 1), 3.0), other=None)
    assert type(out) is Output and out.pooled is None
    assert sqnr(model(x, mask=torch.full((2, 1), 3.0)).hidden, out.hidden) > W8A8_DB


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_every_dimension_is_dynamic_even_when_its_example_is_one(rows):
    program = captured(lambda self, x: self.a(x).sum(-1), randn(rows, 1, 32), dynamic=True)
    batch, length, width = shape(program)
    assert not isinstance(batch, int) and not isinstance(length, int) and str(width) == "32"
    assert program.gm(randn(4, 7, 32))[0].shape == (4, 7)


def test_a_size_of_one_that_is_broadcast_is_fixed_and_noted():
    q = quantize(Block(lambda self, x, mask: self.a(x) * mask).eval(), (randn(1, 6, 32), torch.ones(1, 6, 1)))
    x, mask = q.convention.inputs
    assert all(isinstance(d, str) for d in (*x.dims[:2], *mask.dims[:2])) and mask.dims[2] == 1
    assert q(randn(3, 9, 32), torch.ones(3, 9, 1)).shape == (3, 9, 32)
    assert any("size 1" in note for note in q.report().notes)
    with pytest.raises(CaptureError, match=r"got float32 \[3, 9, 32\]"):
        q(randn(3, 9, 32), torch.ones(3, 9, 32))
    fixed_batch = quantize(Block(lambda self, x, bias: self.a(x) + bias).eval(), (randn(4, 32), torch.ones(1, 1)))
    assert fixed_batch.convention.inputs[1].dims == (1, 1)
    assert not any(
        "size 1" in note for note in quantize(Block(lambda self, x: self.a(x)).eval(), randn(1, 32)).report().notes
    )


def test_dynamic_shapes_may_be_given():
    block, x = Block(lambda self, x: self.a(x)).eval(), randn(3, 32)
    assert shape(capture_module(block, (x,), {}, W8A8, {"inputs": (None,)})) == (3, 32)
    rows = torch.export.Dim("rows", min=2, max=64)
    assert str(shape(capture_module(block, (x,), {}, W8A8, {"inputs": ({0: rows},)}))[1]) == "32"


class CatchAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x, **named):
        return self.linear(x) * named["scale"] + named["shift"]


def test_tensors_caught_by_keyword_are_dynamic_too():
    model, x, shift = CatchAll().eval(), torch.randn(3, 64), torch.randn(3, 64)
    quantized = quantize(model, (x,), {"shift": shift, "scale": 2})
    assert "forward" not in vars(model)
    longer, shift = torch.randn(5, 64), torch.randn(5, 64)
    want = model(longer, shift=shift, scale=2)
    assert sqnr(want, quantized(longer, scale=2, shift=shift)) > W8A8_DB


def test_one_tensor_given_twice_is_two_inputs():
    x, y = randn(3, 32), randn(3, 32, seed=1)
    q = quantize(Block(lambda self, a, b: (self.a(a), a - b)).eval(), (x, x))
    assert torch.equal(q(x, y)[1], x - y)


def test_tied_weights_and_shared_layers_stay_one_constant():
    program = captured(lambda self, x: self.b(self.a(self.a(x))), randn(3, 32))
    assert sum(name == "a.weight" for name, _ in constants(program.gm)) == 1

    block = Block(lambda self, x: self.b(self.a(x)))
    block.b.weight = block.a.weight
    program = captured(block, randn(3, 32))
    assert len({t.data_ptr() for name, t in constants(program.gm) if name.endswith("weight")}) == 1
    assert program.float_bytes == 4 * (32 * 32 + 2 * 32)


def test_the_exported_door_gives_the_same_program():
    model, x = Keywords().eval(), randn(2, 32)
    by_module = capture_module(model, (x,), {}, W8A8, {"x": None})
    exported = capture_exported(torch.export.export(model, (x,)), W8A8)
    assert ops(exported) == ops(by_module)
    assert torch.equal(exported.gm(x)[0], by_module.gm(x)[0])
    assert torch.equal(exported.example_inputs[0], x)
    assert exported.parameter_names == ()
    assert capture_exported(torch.export.export(model, (x,)), W8A8, ((x * 2,), {})).example_inputs[0].equal(x * 2)


def test_buffers_that_the_model_changes_stay_its_state():
    def counting(self, x):
        self.state.add_(1)
        return self.a(x) + self.state

    program = captured(counting, randn(3, 32))
    first, second = program.gm(randn(3, 32))[0], program.gm(randn(3, 32))[0]
    assert torch.allclose(second - first, torch.ones(()))


def test_names_of_layers_come_from_where_they_were_traced():
    program = captured(nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32))), randn(3, 32))
    linears = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [layer_of(n) for n in linears] == ["0", "1.0"]
    assert dotted_name("L['self']._modules['h']._modules['2']._parameters['weight']") == "h.2.weight"
    assert holds_layers(program) and not holds_layers(captured(lambda self, x: x + 1, randn(2)))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].encoder.layer.0.attention.self", "encoder.layer.0.attention.self"),
        ("L['self']._modules['encoder']._modules['0']", "encoder.0"),
        ("encoder.layer.0", "encoder.layer.0"),
        ("L['self']", ""),
        ("G['model'].head", "head"),
    ],
)
def test_names_of_modules_are_whole_paths_under_dynamo_too(path, name):
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (path, nn.Linear)}
    assert layer_of(node) == name


# --- refusals ------------------------------------------------------------------------------------------------------


def test_training_mode():
    with pytest.raises(CaptureError, match=r"Linear: the model is in training mode.*model\.eval\(\)"):
        quantize(nn.Linear(32, 32).train(), randn(2, 32))


def test_inputs_that_need_grad():
    with pytest.raises(CaptureError, match=r"\['y'\]\[0\]: an example input requires grad.*detach"):
        quantize(Keywords().eval(), randn(2, 32), {"y": [randn(2, 32).requires_grad_()]})


def test_active_dropout_names_its_layer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.25)).train()
    with pytest.raises(CaptureError, match=r"^1: dropout of 0\.25 is active.*eval"):
        capture_module(model, (randn(2, 32),), {}, W8A8)
    attention = nn.functional.scaled_dot_product_attention
    with pytest.raises(CaptureError, match=r"dropout of 0\.5"):
        captured(lambda self, x: attention(x, x, x, dropout_p=0.5), randn(2, 4, 8))


def test_a_model_that_cannot_be_exported_is_sent_to_the_other_door():
    def branching(self, x):
        return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(
        CaptureError, match=r"(?s)Block: torch.export failed: .*torch\.compile\(model, backend=.zeroquant.\)"
    ):
        quantize(Block(branching).eval(), randn(2, 32))


def test_inputs_that_do_not_fit_the_forward():
    with pytest.raises(CaptureError, match=r"Keywords: the example inputs do not fit its forward.*nonsense"):
        quantize(Keywords().eval(), randn(2, 32), {"nonsense": randn(2)})
