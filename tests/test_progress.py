"""How far a computation is: a bar on a terminal, a line now and then in a file, nothing where it is short."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vlmscope import progress as module
from vlmscope.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    """As ipykernel's stream: no terminal, and yet what is written can be written over."""


Notebook.__module__ = "ipykernel.iostream"


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: object) -> str:
    """What ten examples of five patches each leave on a stream."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    with progress(10, **options) as step:
        for number in range(10):
            step(5, number + 1)
    return stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_a_terminal_and_a_notebook_have_a_bar(monkeypatch, stream):
    text = shown(monkeypatch, stream(), what="pictures")
    assert "10/10 pictures" in text and "patches/s" in text and "\r" in text and "|##########|" in text


def test_a_file_has_whole_lines_with_rate_and_time_left(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    lines = shown(monkeypatch, io.StringIO()).splitlines()
    line = re.compile(r"(\d+)/10 examples, [\d,]+ patches/s, \d\d:\d\d gone, \d\d:\d\d left")
    found = [line.fullmatch(text) for text in lines if not text.startswith("0/10")]
    assert all(found), lines
    assert {int(match[1]) for match in found if match} == set(range(1, 11))


def test_a_short_computation_leaves_nothing_in_a_file(monkeypatch):
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_quiet_one_leaves_nothing_anywhere(monkeypatch):
    assert shown(monkeypatch, Terminal(), quiet=True) == ""


def test_what_was_done_before_counts_and_a_total_may_come_late(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(0, done=3, what="images") as step:
        step(0, 4, 8)
    assert stream.getvalue().splitlines()[-1].startswith("4/8 images, ")
