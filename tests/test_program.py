"""Constants by dotted name, and what counts as how many bytes."""

import torch
from torch import fx, nn

from tests.programs import captured, randn
from zq_compiler.program import (
    PassRecord,
    Stage,
    constant_bytes,
    constants,
    copy_graph,
    get_constant,
    integer_name,
    set_constant,
    weight_name,
)


def test_stages_are_ordered():
    assert Stage.FLOAT < Stage.QDQ < Stage.FUSED


def test_set_constant_makes_the_modules_on_the_way_and_replaces_parameters():
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    set_constant(gm, "a.0.weight", torch.ones(2))
    assert torch.equal(get_constant(gm, "a.0.weight"), torch.ones(2))
    gm.linear = nn.Linear(2, 2)
    set_constant(gm, "linear.weight", torch.zeros(2, 2))
    assert not isinstance(gm.linear.weight, nn.Parameter)
    assert dict(gm.named_buffers()).keys() == {"a.0.weight", "linear.weight"}


def test_constants_are_listed_once_and_tied_ones_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(40, 32)
            self.head = nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids) + self.table(ids + 1))

    program = captured(Tied(), torch.arange(4))
    assert {t.untyped_storage().data_ptr() for _, t in constants(program.gm)} == {
        get_constant(program.gm, "table.weight").untyped_storage().data_ptr()
    }
    assert constant_bytes(program.gm) == program.float_bytes == 40 * 32 * 4


def test_copies_share_tensors_but_not_structure():
    program = captured(lambda self, x: self.a(x), randn(2, 32))
    copy = copy_graph(program.gm)
    assert copy.a.weight.data_ptr() == program.gm.a.weight.data_ptr()
    set_constant(copy, "a.weight", torch.zeros(32, 32))
    copy.graph.erase_node(copy.graph.find_nodes(op="output")[0])
    assert program.gm.a.weight.count_nonzero() > 0
    assert len(program.graph.find_nodes(op="output")) == 1


def test_integer_constants_remember_their_weight():
    for view in (0, 1, 12):
        assert weight_name(integer_name("h.0.attn.weight", view, "q")) == "h.0.attn.weight"
    assert len({integer_name("w", view, part) for view in (0, 1) for part in ("q", "scale")}) == 4


def test_records_default_to_unchecked():
    assert PassRecord("p", 1, 0.5).sqnr is None
