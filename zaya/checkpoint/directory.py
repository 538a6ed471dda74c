"""Where the checkpoints of a run lie: the step directories under a root, which of them are complete, which may go.

Start of a run that resumes, and the end of every save. Reads names and manifests' presence, never a checkpoint's contents. A directory
without a manifest does not exist; `remove` therefore begins with the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import Self

from zaya.checkpoint.errors import CheckpointError, disk_errors

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-([0-9]{8,18})")


def step_path(root: str | Path, step: int) -> Path:
    return Path(root) / f"step-{step:08d}"


def local_root(run_dir: str | Path, local_dir: str | Path) -> Path:
    """Where a run's step directories lie on a node's own disk: runs of one name do not mix."""
    run_dir = Path(os.path.abspath(run_dir))
    return Path(local_dir) / f"{run_dir.name}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]}" / "checkpoints"


def locate(path: str | Path) -> Path | None:
    """A checkpoint's directory, or that of the newest one of a run; None: neither. CheckpointError: it cannot be looked at."""
    with disk_errors("read", Path(path)):
        return Path(path) if (Path(path) / MANIFEST).is_file() else newest(Path(path) / "checkpoints")


def newest(root: str | Path) -> Path | None:
    """The complete checkpoint of the highest step, or None. Complete = has a manifest; whether it is sound, `Checkpoint` tells."""
    steps = complete_steps(root)
    return step_path(root, steps[-1]) if steps else None


def complete_steps(root: str | Path) -> list[int]:
    """Steps that have a manifest, ascending."""
    return [step for step, _, whole in step_directories(Path(root)) if whole]


def step_directories(root: Path) -> list[tuple[int, Path, bool]]:
    """(step, path, complete) of every checkpoint directory, by step."""
    found: list[tuple[int, Path, bool]] = []
    with disk_errors("read", root):
        for path in root.iterdir() if root.exists() else ():
            match = _STEP.fullmatch(path.name)
            if match and path == step_path(root, int(match[1])) and path.is_dir():
                found.append((int(match[1]), path, (path / MANIFEST).is_file()))
    return sorted(found)


def prune(root: str | Path, sound: int, keep: int, keep_every: int = 0, spare: Container[int] = ()) -> list[Path]:
    """Of the complete checkpoints up to step `sound`, which is known to verify, keep the newest `keep`, every multiple of `keep_every`
    steps, and those of `spare`; what went. 0 keeps all. So one that verifies is always left, whatever lies there beside.

    The remains of killed saves before it go too, whatever `keep` is. CheckpointError: something could not be removed; the rest is gone.
    """
    if keep < 0 or keep_every < 0:
        raise ValueError(f"keep = {keep} and keep_every = {keep_every} must be at least 0")
    steps = [found for found in step_directories(Path(root)) if found[0] <= sound]
    complete = [step for step, _, whole in steps if whole]
    kept = {sound, *complete[-keep:], *(step for step in complete if keep_every and step % keep_every == 0)}
    gone = [path for step, path, whole in steps if step < sound and not (whole and step in kept) and step not in spare]
    problems = []
    for path in gone:
        try:
            remove(path)
        except CheckpointError as error:
            problems.append(error)
    for problem in problems:
        raise problem
    return gone


def free_aside(parent: Path) -> Path:
    """The first set-aside-K of a directory that is not there."""
    return next(path for path in (parent / f"set-aside-{k}" for k in itertools.count(1)) if not path.exists())


def set_aside(root: Path, step: int, target: Path | None = None) -> None:
    """Move complete checkpoints beyond `step`, if there are any, to `target`, or to a new set-aside-K beside `root`; never over anything.
    CheckpointError: the disk does not let it."""
    later = [number for number in complete_steps(root) if number > step]
    if not later:
        return
    target = target or free_aside(root.parent)
    with disk_errors("write", target):
        (target / root.name).mkdir(parents=True)
        for number in later:
            step_path(root, number).rename(step_path(target / root.name, number))


def identity(path: Path) -> str:
    """What tells a checkpoint from another of its step: its manifest's hash of itself. CheckpointError: it has none."""
    with disk_errors("read", path / MANIFEST), open(path / MANIFEST, "rb") as file:
        return file.readline(80).decode("latin-1").strip()


def remove(path: Path) -> None:
    """Delete a checkpoint; of a link, the link. Its manifest goes first, so that one half removed does not exist. CheckpointError: the disk
    does not let it."""
    with disk_errors("remove", path):
        if path.is_symlink():
            path.unlink()
            return
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


class NewDirectory:
    """A directory that is filled under a hidden name beside it and takes its own, `directory`, when it is whole: `with` ends in `close`, or
    after an exception in `abort`. A writer of a format fills `hidden` and extends `close`.

    `directory` must not exist or be empty, or with `overwrite` be an older one, which holds the file `mark`. CheckpointError: it cannot be
    made.
    """

    def __init__(self, directory: str | Path, *, overwrite: bool = False, mark: str = "") -> None:
        self.directory = Path(os.path.realpath(directory))  # a link stands for the directory that it names
        self.hidden = self.directory.with_name(f".{self.directory.name}.tmp")
        with disk_errors("write", self.directory):
            if is_taken(self.directory) and not (overwrite and (self.directory / mark).is_file()):
                if overwrite:
                    raise CheckpointError(f"{self.directory} is not an older export, and --overwrite replaces only those; remove it, or "
                                          "choose another name")
                raise CheckpointError(f"{self.directory} exists and is not empty; remove it, or choose another name"
                                      + (", or replace an older export with --overwrite" if mark else ""))
            shutil.rmtree(self.hidden, ignore_errors=True)  # of a killed process
            self.hidden.mkdir(parents=True)

    def close(self) -> None:
        with disk_errors("write", self.directory):
            old = self.directory.with_name(f".{self.directory.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if is_taken(self.directory):
                os.replace(self.directory, old)
            os.replace(self.hidden, self.directory)
            sync_directory(self.directory.parent)
            shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()  # nothing is left to remove after a close that came through


def is_taken(target: Path) -> bool:
    """Whether a directory is there that holds something. CheckpointError: it is no directory."""
    if os.path.lexists(target) and not target.is_dir():
        raise CheckpointError(f"{target} is there and is not a directory; choose another name")
    return target.is_dir() and any(target.iterdir())


def sync_directory(path: Path) -> None:
    """The names in a directory are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
