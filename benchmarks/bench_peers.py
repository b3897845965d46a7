"""All peers on one real head, in the same rounds: what `python -m benchmarks.compare` prints."""

import torch

from benchmarks import environment
from benchmarks.compare import compare
from benchmarks.shapes import SMOLLM2_SHAPE


def test_smollm2_head(benchmark, keep_for_summary):
    device = environment.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arguments = (SMOLLM2_SHAPE, dtype, device, 3)
    # The clock is around the whole comparison; each peer's own median is in the extra information.
    found = benchmark.pedantic(compare, arguments, rounds=1)
    medians = {row["provider"]: row["median_ms"] for row in found.rows}
    benchmark.extra_info["median_ms"] = medians
    keep_for_summary(found)
    assert {"fastgrpo torch", "fastgrpo sparse"} <= set(medians), found.left_out
