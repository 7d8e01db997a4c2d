"""What lies outside calibrated ranges: counted by hand, named by layer, and said under check=True."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F

import zq_compiler as zq
from tests.programs import Block, attend
from zq_compiler.analysis import saturation as module
from zq_compiler.lowering.eager import ReferenceInterpreter

FEATURES = 32


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(FEATURES, 64), torch.nn.Linear(64, FEATURES)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def narrow(inputs):
    return [{k: v[:, :4] for k, v in inputs.items()}]


def test_elements_outside_are_counted():
    x = torch.randn(50, FEATURES)
    model = FeedForward().eval()
    q = zq.quantize(model, x, recipe="hero-m3", calibration=[x])
    assert all(row.excess < module.NEGLIGIBLE_EXCESS for row in q.saturation([x]))
    far = 3 * x
    rows = {row.layer: row for row in q.saturation([far[:20], far[20:]])}
    with torch.no_grad():
        hidden = F.gelu(model.up(far))
        scale = q.statistics["down:input"].scale("max_abs", "per_feature")
        steps = (hidden / scale).round()
    share = ((steps > 127) | (steps < -128)).double().mean().item()
    assert share > 0.01
    row = rows["up"]
    assert row.op == "int8_linear_gelu_quantize"
    assert row.share == pytest.approx(share, rel=0.05)  # the linear before it is in INT8
    assert row.excess == pytest.approx((hidden / scale).abs().max().item() / 127, rel=0.05)
    assert str(row).startswith("up: ") and "% of what int8_linear_gelu_quantize writes" in str(row)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("softmax", ["token", "static", "static_signed"])
def test_steps_are_what_the_ops_round(family, softmax):
    """Rounded and saturated, the steps of every op that writes static integers are its result."""
    model, inputs = tiny_models.build(family)
    recipe = zq.load_recipe("hero-m3").replace(softmax=softmax)
    program = zq.quantize(model, inputs, recipe=recipe, calibration=narrow(inputs)).program
    seen = set()

    class Compare(ReferenceInterpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.target in module._STEPS:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                steps = module._STEPS[n.target](*args, **kwargs)
                if steps is not None:
                    assert torch.equal(steps.round().clamp(-128, 127).to(torch.int8), result), n.name
                    seen.add(n.target._opname)
            return result

    with torch.no_grad():
        Compare(program).run(*program.example_inputs)
    assert {"int8_attention", "int8_linear_quantize"} <= seen
    assert seen & {"int8_linear_gelu_quantize", "silu_mul_quantize_static"}


def test_check_names_the_layers():
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=narrow(inputs), check=True)
    (note,) = [note for note in q.report().notes if note.startswith("encoder.layer.0.output.dense: ")]
    assert "int8_linear_quantize writes lies outside its calibrated range" in note
    silent = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs], check=True)
    assert not any("calibrated range" in note for note in silent.report().notes)


def test_check_names_them_through_torch_compile_too():
    torch.compiler.reset()
    model, inputs = tiny_models.build("bert")
    statistics = zq.quantize(model, inputs, recipe="hero-m3", calibration=narrow(inputs)).statistics
    options = {"recipe": "hero-m3", "calibration": statistics, "check": True, "lowering": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="zeroquant", options=options)(**inputs)
    assert any(note.startswith("encoder.layer.0.output.dense: ") for note in zq.compile_reports()[-1].notes)


def test_a_loaded_model_can_be_asked_and_bad_batches_are_named(tmp_path):
    model, inputs = tiny_models.build("bert")
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=narrow(inputs))
    q.save(tmp_path / "saved")
    assert zq.load(tmp_path / "saved").saturation([inputs]) == q.saturation([inputs]) != []
    with pytest.raises(zq.CalibrationError, match="batch 1"):
        q.saturation([inputs, {"input_ids": inputs["input_ids"].float()}])


@pytest.mark.parametrize("softmax", ["static", "static_signed"])
def test_probabilities_beyond_their_scale_are_counted(softmax):
    """Calibrated where attention is spread evenly, asked where a mask selects one key."""

    def forward(self, x, mask):
        return self.out(attend(self.a(x), self.b(x), self.c(x), attn_mask=mask))

    x = torch.randn(2, 6, 32)
    everything, one = torch.ones(6, 6, dtype=torch.bool), torch.eye(6, dtype=torch.bool)
    recipe = zq.load_recipe("hero-m3").replace(softmax=softmax)
    model = Block(forward).eval()
    with torch.no_grad():
        model.a.weight.mul_(0.01)
    q = zq.quantize(model, (x, everything), recipe=recipe, calibration=[(x, everything)])
    assert not any("softmax" in row.op for row in q.saturation([(x, everything)]) if row.excess > 1.1)
    (row,) = [row for row in q.saturation([(x, one)]) if row.op == "int8_attention's softmax"]
    assert row.share == pytest.approx(1 / 6) and row.excess == pytest.approx(6, rel=0.2)
