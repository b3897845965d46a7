"""What engines hand over, literally: the lines of docs/support.md make a `Support` of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from fastgrpo import Support

PAGE = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
# | engine | what it hands over | `the line` |
LINES = dict(re.findall(r"^\| (.+?) \|.*\| `(Support.*)` \|$", PAGE, re.M))

# Two completions, of three tokens and of one.
MASK = torch.tensor([[True, True, True], [True, False, False]])
KEPT = [[3, 42, 55], [1, 17], [8, 9, 23, 99], [7]]
PADDED = [*KEPT, [], []]
# The same behind prompts of two and of three tokens, in rows of five.
IN_ROWS = [[], [], *KEPT[:3], [], [], [], KEPT[3], []]

VLLM_SERVER = """{"choices": [
  {"index": 0, "token_ids": [42, 17, 99], "finish_reason": "length",
   "sampling_mask": [[3, 42, 55], [1, 17], [8, 9, 23, 99]]},
  {"index": 1, "token_ids": [7], "finish_reason": "stop", "sampling_mask": [[7]]}
]}"""
SGLANG = """[
  {"text": "a b c", "output_ids": [42, 17, 99], "meta_info": {"completion_tokens": 3,
   "output_token_sampling_mask": [[42, 55, 3], [17, 1], [99, 23, 9, 8]],
   "output_token_sampling_logprobs": [-0.7, -0.2, -1.5],
   "output_token_sampling_mask_length": 3}},
  {"text": "d", "output_ids": [7], "meta_info": {"completion_tokens": 1,
   "output_token_sampling_mask": [[7]], "output_token_sampling_logprobs": [0.0],
   "output_token_sampling_mask_length": 1}}
]"""


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def vllm_completion(tokens: list[int], kept: list[list[int]]) -> SimpleNamespace:
    return SimpleNamespace(token_ids=tokens, sampling_mask=SimpleNamespace(token_ids=kept))


HANDED_OVER = {
    "vLLM": (
        {
            "completions": [
                vllm_completion([42, 17, 99], [[3, 42, 55], [1, 17], [8, 9, 23, 99]]),
                vllm_completion([7], [[7]]),
            ]
        },
        (2, 3),
        PADDED,
    ),
    "vLLM's server": ({"choices": json.loads(VLLM_SERVER)["choices"]}, (2, 3), PADDED),
    "vLLM's arrays": (
        {
            "mask": SimpleNamespace(
                token_ids=int32(3, 42, 55, 1, 17, 8, 9, 23, 99, 7),
                offsets=np.array([0, 3, 5, 9, 10]),
                cu_num_generated_tokens=[0, 3, 4],
            )
        },
        (4,),
        KEPT,
    ),
    "SGLang": ({"responses": json.loads(SGLANG)}, (2, 3), PADDED),
    "prime-rl's samples": (
        {
            "sample": SimpleNamespace(
                ids=int32(3, 42, 55, 1, 17, 8, 9, 23, 99).tobytes(),
                counts=int32(0, 0, 3, 2, 4).tobytes(),
            )
        },
        (5,),
        IN_ROWS[:5],
    ),
    "prime-rl's batches": (
        {
            "batch": torch.tensor(
                [
                    [[-1] * 4, [-1] * 4, [3, 42, 55, -1], [1, 17, -1, -1], [8, 9, 23, 99]],
                    [[-1] * 4, [-1] * 4, [-1] * 4, [7, -1, -1, -1], [-1] * 4],
                ],
                dtype=torch.int32,
            )
        },
        (2, 5),
        IN_ROWS,
    ),
}


@pytest.mark.parametrize("engine", HANDED_OVER)
def test_a_line_of_the_page_is_the_adapter(engine: str) -> None:
    given, shape, wanted = HANDED_OVER[engine]
    known = {"Support": Support, "pad": pad, "torch": torch, "np": np, "completion_mask": MASK}
    made = eval(LINES[engine], known | given)
    found = [sorted(ids.tolist()) for ids in made.ids.split(made.cu.diff().tolist())]
    assert made.shape == shape and found == wanted


def test_the_page_has_no_line_beside_these() -> None:
    assert LINES.keys() == HANDED_OVER.keys()
