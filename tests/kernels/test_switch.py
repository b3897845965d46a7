"""Switches in the environment: 1, 0 or unset."""

from __future__ import annotations

import pytest

from fastgrpo_kernels.runtime import switch

NAME = "FASTGRPO_TEST_SWITCH"


@pytest.mark.parametrize("default", [False, True])
def test_what_it_says(monkeypatch, default):
    """Read whenever it is asked for."""
    monkeypatch.delenv(NAME, raising=False)
    assert switch(NAME, default) is default
    for value, meaning in {"1": True, "0": False}.items():
        monkeypatch.setenv(NAME, value)
        assert switch(NAME, default) is meaning


@pytest.mark.parametrize("value", ["", "yes", "2", " 1", "true"])
def test_anything_else_is_an_error(monkeypatch, value):
    monkeypatch.setenv(NAME, value)
    with pytest.raises(ValueError) as raised:
        switch(NAME, True)
    assert all(part in str(raised.value) for part in (NAME, "expected 0 or 1", repr(value)))
