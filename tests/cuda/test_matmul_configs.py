"""Tiles that the roofline chooses: they fit, and they fill the chip."""

import pytest

from zq_compiler.kernels.cuda.configs import Problem
from zq_compiler.kernels.cuda.matmul_configs import CHIPS, PROGRAM, matmul_config

SHAPES = [(768, 768), (3072, 768), (768, 3072), (2304, 768), (4096, 4096), (11008, 4096), (4096, 11008)]
ROWS = [1, 16, 100, 512, 8192]
WIDTHS = {"int8": {}, "float16": {"x_bytes": 2, "w_bytes": 2}, "w4a16": {"x_bytes": 2, "w_bytes": 0.5, "most_k": 128}}


def chosen(m, n, k, architecture, **options):
    return matmul_config(Problem("int8_linear", m, n, k, "float16"), architecture, **options)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("architecture", CHIPS)
def test_buffers_fit_into_shared_memory(architecture, width):
    chip, options = CHIPS[architecture], WIDTHS[width]
    for n, k in SHAPES:
        for m in ROWS:
            config = chosen(m, n, k, architecture, **options)
            operands = config["BLOCK_M"] * options.get("x_bytes", 1) + config["BLOCK_N"] * options.get("w_bytes", 1)
            buffers = config["num_stages"] - (not (chip.wgmma and config["BLOCK_M"] >= 64))
            assert buffers >= 2 or config["num_stages"] == 2
            assert buffers * config["BLOCK_K"] * operands + PROGRAM <= chip.shared
            assert config["BLOCK_K"] <= options.get("most_k", 256)


@pytest.mark.parametrize("architecture", CHIPS)
def test_few_rows_get_low_tiles_and_many_get_large_ones(architecture):
    for n, k in SHAPES:
        heights = [chosen(m, n, k, architecture)["BLOCK_M"] for m in ROWS]
        assert heights == sorted(heights)
        assert heights[0] == heights[1] == 16 and heights[-1] == 128
        assert chosen(8192, n, k, architecture)["SPLIT_K"] == 1


def test_k_is_split_where_tiles_leave_the_chip_idle():
    tiles = chosen(128, 768, 3072, 80)
    programs = -(-128 // tiles["BLOCK_M"]) * -(-768 // tiles["BLOCK_N"])
    assert tiles["SPLIT_K"] > 1
    assert CHIPS[80].sms // 4 < programs * tiles["SPLIT_K"] <= CHIPS[80].sms
    assert chosen(128, 768, 3072, 80, split=False)["SPLIT_K"] == 1
    assert chosen(128, 768, 3072, 80, products=64)["SPLIT_K"] == 1, "64 of them fill it"


def test_the_largest_tile_is_a_limit():
    assert chosen(8192, 3072, 768, 90)["BLOCK_N"] == 256
    small = chosen(8192, 3072, 768, 90, largest_tile=64 * 64)
    assert small["BLOCK_M"] * small["BLOCK_N"] <= 64 * 64


def test_an_architecture_that_nobody_knows_gets_what_runs_anywhere():
    config = chosen(512, 768, 768, 133)
    assert config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"]) * config["num_stages"] <= 65536


def test_sizes_of_one_bucket_have_one_choice():
    assert chosen(65, 768, 768, 80) == chosen(128, 768, 768, 80)
