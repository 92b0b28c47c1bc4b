"""The line of progress fits every width, on a terminal and in a log."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shards.progress import Progress, compose

NOTES = ["loss 0.1234", "gradient 0.56", "rate 0.0001", "3.2 samples/s", "0.1 TFLOP/s", "0 % waiting", "5.1 GiB"]
STATE = {"prefix": "vae", "n": 36, "total": 600, "unit": "step", "elapsed": 432.0, "rate": 1 / 12}


@pytest.mark.parametrize("width", [1, 5, 10, 20, 30, 40, 60, 80, 120, 200, None])
def test_a_line_is_never_wider_than_the_terminal_and_says_the_most_important_first(width: int | None) -> None:
    line = compose(STATE, NOTES, width)
    if width is not None:
        assert len(line) <= width
    for least, text in ((6, "36/600"), (34, "1:52:48 left"), (60, "12 s/step"), (100, "loss 0.1234"), (190, "5.1 GiB")):
        if width is None or width >= least:
            assert text in line, line


def test_counts_have_plural_units() -> None:
    def line(total: int | None, unit: str, rate: float) -> str:
        return compose({**STATE, "n": 1, "total": total, "unit": unit, "rate": rate}, [], None)

    assert ": 1/24 scans, " in line(24, "scan", 2.0) and "2 scans/s" in line(24, "scan", 2.0)
    assert ": 1/1 scan, " in line(1, "scan", 0.5) and "2 s/scan" in line(1, "scan", 0.5)
    assert ": 1 visit, " in line(None, "visit", 2.0) and ": 1/9 people, " in line(9, "person", 2.0)


def test_the_bar_is_as_full_as_the_work_is_done() -> None:
    for n in (0, 150, 300, 600):
        bar = compose({**STATE, "n": n, "rate": None}, [], 120).rpartition("[")[2]
        assert bar.count("#") / (bar.count("#") + bar.count(".")) == pytest.approx(n / 600, abs=0.04)


@contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard error becomes a terminal of that width; yields the descriptor of its screen."""
    screen, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", os.fdopen(os.dup(program), "w"))  # where the width is read
    monkeypatch.setattr(sys, "stderr", os.fdopen(program, "w"))
    try:
        yield screen
    finally:
        os.close(screen)


def on(screen: int) -> str:
    """All that was written to a screen; one call of the system may give a part of it."""
    found = b""
    while select.select([screen], [], [], 0.5)[0]:
        found += os.read(screen, 10_000)
    return found.decode()


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_on_a_terminal_the_bar_appears_at_once_on_one_line_of_it(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(columns, monkeypatch) as screen:
        bar = Progress("vae", 600, "step", at_once=True)
        shown = on(screen)
        assert "0/600" in shown
        bar.update(2, NOTES, rate=1 / 12)
        bar.refresh()
        bar.say("vae: about 2 h left")
        bar.close()
        shown += on(screen)
    assert "2/600" in shown and "vae: about 2 h left" in shown
    pieces = re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", shown))
    assert max(len(piece) for piece in pieces if "about" not in piece) < columns


def test_a_log_gets_lines_with_the_count_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("vae", 600, "step", initial=3, at_once=True) as bar:
        bar.update(2)
    text = capsys.readouterr().err
    assert text.startswith("vae: 3/600 steps") and text.count("\n") == 1
    assert "\r" not in text and "\x1b" not in text
