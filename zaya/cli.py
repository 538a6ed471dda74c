"""How the tools read their command lines, write their files and end: a wrong call is one line on stderr, exit code 2, Ctrl-C one with 130;
SIGTERM and SIGHUP let them clean up, too. Standard library only."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import math
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import util
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

AGAIN_S = 10.0
"""A signal sooner than this after another is a repetition, and the cleaning up goes on; a later one interrupts again."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells count it."""


class Parser(argparse.ArgumentParser):
    """argparse, without the usage lines before an error, for a program that ends as `end_in_one_line` says."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, **options)
        end_in_one_line(prog)

    def check_output(self, option: str, path: Path | None) -> None:
        """Before the work, that its result can be written: in a directory that is there and takes files."""
        if path is None:
            return
        try:
            if not path.absolute().parent.is_dir():
                self.error(f"{option} {path}: there is no directory {path.absolute().parent}")
            if path.exists() and not path.is_file():
                self.error(f"{option} {path} is a {'directory' if path.is_dir() else 'device or pipe'}; name a file")
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
        except OSError as error:
            self.error(f"{option} {path}: cannot write there: {error.strerror}")

    def starting_so(self, option: str, words: Sequence[str] | None, names: Sequence[str], none: str) -> list[str]:
        """The names that start with one of the words, in their order; all where there are no words. A word that fits none is an error that
        lists the first words of the names; `none`: what there is none of."""
        for word in words or []:
            if not word or not any(name.startswith(word) for name in names):
                there = ", ".join(sorted({name.partition(" ")[0] for name in names}))
                self.error(f"{option} {word or 'is empty'}: {none} has such a name; there are {there}")
        return [name for name in names if words is None or name.startswith(tuple(words))]

    def refused(self, error: ValueError | OSError, verb: str = "read", path: Path | str = "a file") -> int:
        """Say in one line why the call is refused; the exit code. A ValueError's own words, or "cannot VERB FILE: reason" of the file that
        an OSError names, else of `path`."""
        words = str(error) if isinstance(error, ValueError) else f"cannot {verb} {error.filename or path}: {error.strerror or error}"
        print(f"{self.prog}: {words}", file=sys.stderr)
        return 2

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def end_in_one_line(prog: str) -> None:
    """Under `python -m PROG`: a reader of the output that goes away (`| head -1`) ends the program silently, by SIGPIPE, as it ends other
    commands; an output that does not fit ends it with one line and exit code 1, Ctrl-C with one and 130.

    SIGTERM and SIGHUP (a terminal that closes), unless they are ignored (nohup), are a KeyboardInterrupt, so that files and processes are
    cleaned up; after it the program ends by the signal. Whoever catches it to say more raises another with those words."""
    running = sys.modules["__main__"].__spec__
    if running is None or running.name != prog:  # a test calls main
        return
    came: list[signal.Signals] = []
    until = 0.0

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal until
        if time.monotonic() > until:
            until = time.monotonic() + AGAIN_S
            came.append(signal.Signals(number))
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.excepthook = functools.partial(_ended_by, prog, came)


def _ended_by(prog: str, came: Sequence[signal.Signals], kind: type[BaseException], error: BaseException,
              trace: TracebackType | None) -> None:
    """What main has not caught; its `with` blocks and `finally` have had their turn."""
    if issubclass(kind, BrokenProcessPool):
        _leave(prog, "one of its processes was killed; is there too little memory?", 1)
    if isinstance(error, OSError) and error.filename is None:  # an open stream, no file
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _leave(prog, f"cannot write its output: {error.strerror}", 1)  # without another try to write what is left
        if error.errno == errno.EPIPE and _reader_is_gone():  # while SIGPIPE was ignored, for a pool's sake
            _leave(prog, "", signal.SIGPIPE)
    if issubclass(kind, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _leave(prog, "; ".join(filter(None, ("interrupted", str(error)))), came[0] if came else INTERRUPTED)
    sys.__excepthook__(kind, error, trace)


def _reader_is_gone() -> bool:
    """Of stdout or stderr, not a process at the end of some other pipe."""
    outputs = select.poll()
    outputs.register(1, 0)
    outputs.register(2, 0)
    return bool(outputs.poll(0))  # errors are reported unasked


def _leave(prog: str, why: str, end: int | signal.Signals) -> NoReturn:
    """At once, with an exit code or by a signal: an exit by sys.exit would wait until pools have done the work that is left."""
    if why:
        line_end = "\n" if sys.stderr.isatty() else ""  # of a progress bar, or of the ^C that a terminal shows
        with contextlib.suppress(OSError):  # the terminal has closed
            print(f"{line_end}{prog}: {why}", file=sys.stderr, flush=True)
    util._run_finalizers(0)  # type: ignore[attr-defined]  # of multiprocessing: the names of its semaphores go
    for process in multiprocessing.active_children():
        process.kill()
    if isinstance(end, signal.Signals):
        signal.signal(end, signal.SIG_DFL)
        signal.raise_signal(end)
    os._exit(end)


def replace_text(path: Path, text: str) -> None:
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, onto the disk: an interruption or a full disk leaves the old one, and nothing beside it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


MAX_WORKERS = 256  # threads; more than any machine has use for


def worker_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads from 1 to {MAX_WORKERS}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1,000,000")
    return int(text)


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def layout_sizes(text: str) -> dict[str, int]:
    """{"ranks": 8, "tp": 2} of "ranks=8,tp=2". ValueError: not of that form, a key twice, or no ranks."""
    try:
        pairs = [(key.strip(), int(value)) for key, _, value in (item.partition("=") for item in text.split(","))]
    except ValueError:
        raise ValueError(f"layout {text!r} is not of the form ranks=8,tp=2") from None
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"layout {text!r} names a key twice; name each once")
    if dict(pairs).get("ranks", 1) < 1:
        raise ValueError(f"layout {text!r} has {dict(pairs)['ranks']} ranks, expected at least 1")
    return dict(pairs)


def format_bytes(num_bytes: float) -> str:
    """1,500,000,000 as "1.5 GB": four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.95:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not (number.isascii() and number.isdigit()) or not 0 < int(number[:12]) * UNITS[unit] < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB or 500MB")
    return int(number[:12]) * UNITS[unit]
