"""The study's kernels compile, and rank as its record says."""

import json

import pytest

from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs a process in which Triton compiles", allow_module_level=True)

from benchmarks import sparse_epilogues as study  # noqa: E402


def test_the_ways_rank_as_the_record_says():
    tile = "128x128x64, 4 warps"
    ranked = [
        study.Form(),
        study.Form(study.any_entry, study.xor_uniform),
        study.Form(study.mask_in_threads, study.xor_uniform),
        study.Form(study.mask_in_threads, study.wrapping_sum_uniform),
        study.Form(study.mask_in_threads, study.sum_uniform),
        study.Form(study.mask_shifted, study.sum_uniform),
        study.Form(study.mask_shifted, study.multiply_shift_uniform),
        study.Form(study.append_each, study.sum_uniform),
    ]
    rows = study.study(ranked, {tile: study.TILES[tile]})
    assert sorted(rows, key=lambda row: row["added"]) == rows
    for row in rows:
        assert row["MUFU.EX2"] == 128 and (row["stack"] > 0) == (row["ATOMG"] > 0)
    assert rows[2]["SHFL"] == rows[0]["SHFL"] < rows[5]["SHFL"], "no lane needs another's bits"

    record = json.loads(study.RECORD.read_text())
    if record["triton"] == study.triton.__version__:
        again = "python -m benchmarks.sparse_epilogues"
        assert all(row in record["rows"] for row in rows), again


def test_what_the_ways_move():
    moved = study.traffic()
    assert moved["mask"]["written"] == pytest.approx(151_936 / 8e3, abs=0.1)
    assert moved["mask"]["weights"] == pytest.approx(46 * 7.168, abs=0.1)
    assert moved["append"]["weights"] == moved["mask"]["weights"]
    product = 151_936 * 7168 / 128 / 1e3  # every weight row, once for 128 rows
    assert moved["count, 128 rows"]["weights"] == pytest.approx(product, rel=0.01)
