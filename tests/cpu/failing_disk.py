"""A disk on which one system call goes wrong: every call that some threads make on files, counted, and a fault put in place of one.

Calls go through `os` or through `open`; files opened meanwhile are this module's, so that what Python's buffers write and read is counted
too. Knows nothing of checkpoints.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest

READS = ("stat", "lstat", "listdir", "scandir", "preadv", "read", "posix_fadvise", "lseek")
CHANGES = ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir", "close")
FAULTS: dict[str, tuple[str, ...]] = {
    **{name: ("EIO",) for name in READS},
    **{name: ("EIO", "ENOSPC", "full") for name in CHANGES},
    **{name: ("EIO", "short") for name in ("preadv", "read")},
    "write": ("EIO", "ENOSPC", "full", "short", "rot"),
}
"""What can befall a call. full: this change fails and every later one, until the disk is mended; short: fewer bytes than asked for pass;
rot: a bit of them turns."""
Call = Callable[..., Any]


class FailingDisk:
    """`with FailingDisk(mine, at, fault) as disk`: call `at` (from 0) of the threads that are `mine` goes wrong, or the next one after it
    that the fault can befall (where threads race, calls differ from run to run); without `at`, all are noted."""

    def __init__(self, mine: Callable[[threading.Thread], bool], at: int = -1, fault: str = "") -> None:
        self.mine, self.at, self.fault = mine, at, fault
        self.calls: list[str] = []
        self.struck = ""
        """The call that went wrong."""
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> FailingDisk:
        for name in sorted({*READS, *CHANGES} - {"read"}):
            self._patch.setattr(os, name, self._wrap(name, getattr(os, name)))
        opened = builtins.open

        def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not self.mine(threading.current_thread()):
                return opened(file, mode, buffering, *args, **kwargs)
            raw = self.call("open", _File, self, file, mode.replace("b", ""))
            if buffering == 0:
                return raw
            buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

        self._patch.setattr(builtins, "open", open_)
        self._patch.setattr(io, "open", open_)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._patch.undo()

    def _wrap(self, name: str, function: Call) -> Call:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.mine(threading.current_thread()):
                return function(*args, **kwargs)
            return self.call(name, function, *args, **kwargs)

        return wrapped

    def call(self, name: str, function: Call, *args: Any, **kwargs: Any) -> Any:
        number = len(self.calls)
        self.calls.append(name)
        if number >= self.at >= 0 and not self.struck and self.fault in FAULTS[name]:
            self.struck = name
        elif not (self.struck and self.fault == "full" and name in CHANGES and name not in ("close", "unlink", "rmdir")):
            return function(*args, **kwargs)
        if self.fault == "short" and name == "preadv":
            return function(args[0], [_shorter(args[1][0])], *args[2:])
        if self.fault in ("short", "rot"):  # read(buffer), write(data) or write(fd, data)
            return function(*args[:-1], _shorter(args[-1]) if self.fault == "short" else _turned(args[-1]))
        if name == "close":  # a file is closed even where that fails
            function(*args, **kwargs)
        code = errno.EIO if self.fault == "EIO" else errno.ENOSPC
        named = [os.fspath(argument) for argument in args[:2] if isinstance(argument, str | os.PathLike)]
        raise OSError(code, os.strerror(code), *named[:1])  # as the system: of a file that is open it knows no name


class _File(io.FileIO):
    def __init__(self, disk: FailingDisk, file: Any, mode: str) -> None:
        self._disk = disk
        super().__init__(file, mode)

    def write(self, data: Any) -> Any:
        return self._disk.call("write", super().write, data)

    def readinto(self, buffer: Any) -> Any:
        return self._disk.call("read", super().readinto, buffer)

    def read(self, size: int | None = -1) -> Any:
        size = -1 if size is None else size
        if size < 0:  # until the end: as many calls as there are pieces
            return b"".join(iter(lambda: self.read(1 << 16), b""))
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def readall(self) -> bytes:
        return bytes(self.read())

    def close(self) -> None:
        if not self.closed:
            self._disk.call("close", super().close)


def _shorter(buffer: Any) -> memoryview:
    """At least one byte of it: none would mean the end."""
    view = memoryview(buffer).cast("B")
    return view[: max(1, len(view) // 2)]


def _turned(data: Any) -> bytearray:
    turned = bytearray(data)
    turned[len(turned) // 2] ^= 1
    return turned
