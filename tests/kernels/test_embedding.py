"""int8_embedding: rows of a quantized table."""

import numpy as np
import pytest
import torch

from tests.kernels.formulas import assert_close, float64
from zq_compiler.kernels import int8_embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[[0, 3], [3, 1]], [], 2])
def test_rows_times_their_scale(ids, dtype):
    table = torch.from_numpy(np.random.default_rng(0).integers(-127, 128, (4, 5), dtype=np.int8))
    scale, index = torch.tensor([[1.0], [2.0], [0.5], [1e4]]), torch.tensor(ids, dtype=torch.long)
    rows = int8_embedding(index, table, scale, dtype)
    assert rows.dtype is dtype
    exact = (float64(table) * float64(scale))[index.numpy()]
    if dtype is torch.float16:  # 127 * 1e4 is no float16
        exact = np.where(np.abs(exact) > 65519, np.inf * np.sign(exact), exact)
        assert torch.equal(rows.double(), torch.from_numpy(exact).half().double())
    else:
        assert_close(rows, exact, dtype)
