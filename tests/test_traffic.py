"""Bytes of activations: counted by hand for a BERT layer, and what a fused graph's floats would be."""

import pytest
import torch
from transformers import BertConfig, BertModel

import zq_compiler as zq
from zq_compiler.program import OpTraffic
from zq_compiler.traffic import count_traffic, model_dtype

BATCH, TOKENS, WIDTH = 2, 16, 768
ROWS = BATCH * TOKENS
MASK = BATCH * TOKENS * TOKENS  # of one byte, which attention reads
SCALE = 4  # bytes, float32, of a row


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, hidden_size=WIDTH, vocab_size=50, max_position_embeddings=TOKENS)
    ids = torch.randint(50, (BATCH, TOKENS))
    return BertModel(config).eval().half(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_m3_moves_half_of_what_float16_moves(bert):
    model, inputs = bert
    q = zq.quantize(model, inputs, recipe="hero-m3", calibration=[inputs])
    moved = q.report().moved("encoder.layer.0.")
    # In widths of the layer: Q, K, V 6; attention 4; output 2; sum and norm 3; FC1 with GELU 5; FC2 5; sum and norm 3.
    assert moved.now == ROWS * (28 * WIDTH + 8 * SCALE) + MASK
    assert moved.fused_alike == ROWS * 28 * WIDTH * 2 + MASK
    # By themselves the two sums take 3 and the norms 2 each, FC1 5 and GELU 8.
    assert moved.op_by_op == ROWS * 40 * WIDTH * 2 + MASK
    assert moved.now <= 0.52 * moved.fused_alike and moved.now <= 0.40 * moved.op_by_op
    report = q.report()
    row = report.layer("encoder.layer.0.intermediate.dense")
    assert (row.moved_before, row.moved_after) == (ROWS * 5 * WIDTH * 2, ROWS * (5 * WIDTH + SCALE))
    everything = report.moved()
    assert everything.now == sum(r["read"] + r["written"] for r in report.traffic) > 2 * moved.now
    assert "in float16:" in str(report)


def test_a_layer_in_float_moves_what_it_moved(bert):
    model, inputs = bert
    report = zq.quantize(model, inputs, recipe="hero-m1").report()
    row = report.layer("encoder.layer.0.output.dense")
    assert row.got == "float" and row.moved_before == row.moved_after == ROWS * 5 * WIDTH * 2


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = torch.nn.Linear(32, 64), torch.nn.LayerNorm(64)

    def forward(self, x):
        y = self.norm(self.up(x)).reshape(-1, 64)
        return y.t().reshape(64, -1) * 2, y.shape[0]


def test_weights_and_moves_are_free():
    x = torch.randn(3, 5, 32)
    q = zq.quantize(Small().eval(), x, recipe="float")
    rows = {row.op: row for row in count_traffic(q.program)}
    wide, narrow = 3 * 5 * 64 * 4, 3 * 5 * 32 * 4
    assert rows == {
        "linear": OpTraffic("up", "linear", narrow, wide, narrow + wide),
        "layer_norm": OpTraffic("norm", "layer_norm", wide, wide, 2 * wide),
        "mul": OpTraffic("", "mul", wide, wide, 2 * wide),
    }
    assert model_dtype(q.program) is torch.float32
    assert q.program.float_traffic == count_traffic(q.program)


def test_integers_and_floats_of_one_norm_are_one_value_in_float():
    """A pre-norm block reads the norm's integers and its sum; in float these are one result and the sum."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = torch.nn.LayerNorm(32), torch.nn.Linear(32, 32)

        def forward(self, x):
            y = self.norm(x)
            return self.up(y) + y

    x = torch.randn(4, 32)
    q = zq.quantize(Block().eval(), x, recipe="w8a8")
    row = next(row for row in count_traffic(q.program) if row.op == "layer_norm_quantize")
    value = 4 * 32 * 4
    assert (row.layer, row.read, row.written, row.as_float) == ("norm", value, 4 * 32 + 4 * SCALE + value, 2 * value)
