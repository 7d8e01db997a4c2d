"""Calibration data of every form, read twice, and what is refused."""

import gc
import tempfile
from collections import UserDict
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.programs import randn
from zq_compiler import CalibrationError
from zq_compiler.batches import Batches

X, Y = randn(2, 3), randn(2, 3, seed=1)


def calls(batches):
    """What the model is called with."""
    seen = []
    count = batches.feed(lambda *args, **kwargs: seen.append((args, kwargs)))
    assert count == len(seen)
    return seen


def same(found, wanted):
    flat, spec = torch.utils._pytree.tree_flatten(found)
    flat_wanted, spec_wanted = torch.utils._pytree.tree_flatten(wanted)
    assert spec == spec_wanted
    for a, b in zip(flat, flat_wanted, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) and a.dtype is b.dtype if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ([X, Y], [((X,), {}), ((Y,), {})]),
        ([(X, Y)], [((X, Y), {})]),
        ([[X, None]], [((X, None), {})]),
        ([{"x": X}, {"x": Y}], [((), {"x": X}), ((), {"x": Y})]),
        ([UserDict(x=X)], [((), {"x": X})]),  # as a tokenizer's BatchEncoding is
        (DataLoader(TensorDataset(X, Y), batch_size=1), [((X[:1], Y[:1]), {}), ((X[1:], Y[1:]), {})]),
        (DataLoader([{"x": row} for row in X], batch_size=2), [((), {"x": X})]),
    ],
)
def test_iterables_are_read_as_often_as_needed(data, wanted, folder):
    batches = Batches(data)
    for _ in range(2):
        same(calls(batches), wanted)
    assert batches.count == len(wanted)
    assert not list(folder.iterdir())


def test_a_forward_loop_calls_the_model_itself():
    def loop(model):
        results.append(model(X, scale=2.0))
        results.append(model(Y))

    for _ in range(2):
        results = []
        assert Batches(loop).feed(lambda x, scale=1.0: x * scale) == 2
        same(results, [X * 2.0, Y])
    assert Batches(loop).count is None


def nested(step):
    return {
        "ids": torch.arange(step, step + 6).reshape(2, 3),
        "half": [X.bfloat16() + step, X.half(), X.double()],
        "view": (X.t(), X[:, 1:], X > 0, X[:0], torch.tensor(3)),
        "plain": {"flag": True, "count": 7, "scale": 0.5, "mode": "mean", "none": None, "nan": -1e300},
    }


def test_a_generator_is_spooled_with_every_dtype_and_structure(folder):
    batches = Batches(nested(step) for step in range(3))
    wanted = [((), nested(step)) for step in range(3)]
    for _ in range(3):
        same(calls(batches), wanted)
    (spool,) = folder.iterdir()
    assert len(list(spool.iterdir())) == 3
    del batches
    gc.collect()
    assert not list(folder.iterdir())


def test_tensors_that_share_memory_are_spooled():
    same(calls(Batches(iter([(X, X, X[0])]))), [((X, X, X[0]), {})])


def test_reading_that_was_broken_off_goes_on_where_it_was(folder):
    batches, seen = Batches(iter([X, Y, X + Y])), []

    def fail_at_the_second(x):
        seen.append(x)
        if len(seen) == 2:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        batches.feed(fail_at_the_second)
    for _ in range(2):
        same(calls(batches), [((x,), {}) for x in (X, Y, X + Y)])


def test_a_generator_has_a_limit_that_lists_do_not_have(folder):
    size = X.nbytes
    same(calls(Batches((x for x in (X, Y)), limit=2 * size)), [((X,), {}), ((Y,), {})])
    same(calls(Batches([X, Y], limit=0)), [((X,), {}), ((Y,), {})])
    batches, seen = Batches((x for x in (X, Y, X)), limit=2 * size), []
    for _ in range(2):  # the batch that did not fit is not forgotten either
        with pytest.raises(
            CalibrationError, match=rf"batch 2 of a generator exceeds the {2 * size} bytes.*Batches\(\.\."
        ):
            batches.feed(seen.append)
    assert len(seen) == 4


def test_what_cannot_be_spooled_is_named():
    class Cache:
        pass

    with pytest.raises(CalibrationError, match=r"batch 1 of a generator holds a value of type Cache.*give a list"):
        Batches(iter([(X, 1), (X, Cache())])).feed(lambda *_: None)
    same(len(calls(Batches([(X, Cache())]))), 1)


@pytest.mark.parametrize("data", [X, {"x": X}])
def test_one_batch_is_not_several(data):
    with pytest.raises(CalibrationError, match=r"one batch, not several\. To mend it: give \[batch\]"):
        Batches(data)


@pytest.mark.parametrize("data", [None, 3, "calibration.stats", Path("calibration.stats"), torch.nn.Linear(2, 2)])
def test_what_is_no_data(data):
    with pytest.raises(
        CalibrationError, match=rf"calibration data is a value of type {type(data).__name__}.*forward_loop"
    ):
        Batches(data)


@pytest.mark.parametrize("batch", [3, "text", X.numpy(), None])
def test_what_is_no_batch(batch):
    with pytest.raises(
        CalibrationError, match=rf"batch 1 is a value of type {type(batch).__name__}.*of tensors, of tuples"
    ):
        Batches([X, batch]).feed(lambda *_: None)


def test_nothing_is_an_error(folder):
    exhausted = iter([X])
    next(exhausted)
    for data in ([], exhausted, DataLoader(TensorDataset(X[:0]))):
        with pytest.raises(CalibrationError, match=r"calibration data is empty.*a generator that was read is empty"):
            Batches(data).feed(lambda *_: None)
    with pytest.raises(CalibrationError, match="forward_loop never called the model"):
        Batches(lambda model: None).feed(lambda *_: None)
