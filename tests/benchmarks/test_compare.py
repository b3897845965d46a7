"""The comparison is sorted, fits a terminal, leaves out wrong results, explains bad arguments."""

import pytest
import torch

from benchmarks import compare as comparing
from benchmarks import providers
from benchmarks.cases import BOUND
from benchmarks.providers import Provider, plain_logits
from benchmarks.shapes import Shape

SHAPE = Shape("test", 30, 257, 33, sequences=2)
CPU = torch.device("cpu")


def broken():
    raise ModuleNotFoundError("No module named 'peer'")


def wrong():
    plain = plain_logits()
    return Provider("wrong", lambda batch: 1.1 * plain.token_logps(batch))


def out_of_memory():
    plain = plain_logits()

    def loss(batch):
        if batch.completion_ids.numel() == SHAPE.rows:  # the timed rows, not the checked ones
            raise MemoryError("too large")
        return plain.loss(batch)

    return Provider("out of memory", plain.token_logps, loss)


@pytest.fixture
def found(monkeypatch):
    own = {name: make for name, make in providers.LOADERS.items() if "fastgrpo" in name}
    loaders = own | {"wrong": wrong, "plain logits": plain_logits, "peer": broken}
    monkeypatch.setattr(providers, "LOADERS", loaders | {"out of memory": out_of_memory})
    monkeypatch.setattr(providers.load, "__defaults__", (tuple(providers.LOADERS),))
    monkeypatch.setattr(comparing, "CHECKED_ROWS", 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return comparing.compare(SHAPE, torch.float32, CPU, rounds=3)


def test_fastest_first_and_everyone_in_every_round(found):
    medians = [row["median_ms"] for row in found.rows]
    assert medians == sorted(medians)
    names = {row["provider"] for row in found.rows}
    assert names == {BOUND, "plain logits", "fastgrpo torch", "fastgrpo sparse"}
    assert all(len(row["samples_ms"]) == 3 for row in found.rows)
    assert all(row["peak_mib"] > 0 for row in found.rows if row["provider"] != BOUND)


def test_who_is_absent_wrong_or_too_large_is_named_and_not_timed(found):
    assert set(found.left_out) == {"fastgrpo triton", "wrong", "peer", "out of memory"}
    assert "error" in found.left_out["wrong"] and "too large" in found.left_out["out of memory"]
    text = " ".join(comparing.table(found).split())
    assert "peer (ModuleNotFoundError: No module named 'peer')" in text
    assert "fastgrpo triton (needs CUDA)" in text


def test_table_fits_a_terminal_and_says_what_the_bound_is(found):
    lines = comparing.table(found).splitlines()
    assert max(map(len, lines)) <= 100
    (row,) = (line for line in lines if line.startswith("plain logits"))
    assert len(row.split()) == 7  # two words, time, share, peak, two errors
    explained = f"{BOUND}: the three plain float32 products alone, timed in the same rounds."
    assert explained in lines


def test_a_busy_machine_is_named(found):
    busy = "The machine was busy before (2.0 processes per core): measure again later."
    assert busy in comparing.table(found._replace(load=2.0)).splitlines()
    assert "busy" not in comparing.table(found._replace(load=0.1))


def test_reasons_are_shared_and_shortened():
    text = comparing._by_reason(
        {"a": "ImportError: needs CUDA", "b": "x " * 200, "c": "needs CUDA"}
    )
    assert text.startswith("a, c (needs CUDA); b (x x") and len(text) < 150


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tokens 1e3", "argument --tokens: expected a whole number of at least 1, got '1e3'"),
        ("--vocab 1", "argument --vocab: expected a whole number of at least 2, got '1'"),
        ("--hidden -5", "argument --hidden: expected a whole number of at least 1, got '-5'"),
        ("--rounds 0", "argument --rounds: expected a whole number of at least 1, got '0'"),
        ("--dtype fp8", "argument --dtype: expected float32 or bfloat16, got 'fp8'"),
        (
            "--tokens 8 --vocab 99999999999 --hidden 64",
            "arguments --tokens, --vocab, --hidden: expected a size that fits in memory, "
            "got 8 x 99999999999 x 64",
        ),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        comparing.main(arguments.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == message + "\n"
