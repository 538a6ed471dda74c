"""The last moment of a corpus that is made: all of its files appear or none, whatever fails, and a kill in between is made up for."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from pathlib import Path

import pytest

from zaya.config import DataConfig
from zaya.data import stdlib_corpus
from zaya.data.corpus_writer import staged
from zaya.data.tokenizer import train_bpe

NAMES = ["tokenizer.json", "valid.bin", "valid.idx", "train.bin", "train.idx"]
"""In the order in which they appear."""
VOCAB = 260


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Corpora of three letters."""
    train_bpe(iter(["some text"]), VOCAB).save(str(tmp_path / "tokenizer.json"))

    def write_corpus(bin_path: Path, idx_path: Path, *_: object, **__: object) -> None:
        bin_path.write_text("new")
        idx_path.write_text("new")

    monkeypatch.setattr(stdlib_corpus, "write_corpus", write_corpus)
    return DataConfig(train=(str(tmp_path / "train"),), valid=str(tmp_path / "valid"), tokenizer=str(tmp_path / "tokenizer.json"),
                      source="stdlib")


def fill(folder: Path, present: int) -> None:
    """As a process that was killed after `present` renames leaves it; the tokenizer is there."""
    for number, name in enumerate(NAMES):
        if name != "tokenizer.json":
            (folder / (name if number < present else f".{name}.4194305.tmp")).write_text("old")


@pytest.mark.parametrize("failing", range(5))
def test_a_rename_that_fails_takes_back_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    paths, synced, calls = [tmp_path / "new" / name for name in NAMES], list[str](), itertools.count()
    replace, sync = os.replace, os.fsync

    def fails(source: Path, target: Path) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace(source, target)

    def noted(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name.split(f".{os.getpid()}")[0].lstrip("."))
        sync(fd)

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(os, "fsync", noted)
    with pytest.raises(OSError, match="No space left"), staged(paths) as temporary:
        for path in temporary:
            path.write_text("x")
    assert synced == NAMES, "on the disk before the first has its name"
    assert not list(tmp_path.iterdir())
    with staged(paths) as temporary:
        for path in temporary:
            path.write_text("x")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(NAMES)


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stdlib_corpus, "write_corpus", full)
    with pytest.raises(ValueError, match=r"cannot make .*train and .*valid: No space left on device"):
        stdlib_corpus.build(data, VOCAB)
    assert os.listdir(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize("present", range(1, 5))
def test_what_a_kill_between_two_renames_leaves_is_made_again(tmp_path: Path, data: DataConfig, present: int) -> None:
    fill(tmp_path, present)
    stdlib_corpus.build(data, VOCAB)
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)
    assert all((tmp_path / name).read_text() == "new" for name in NAMES[1:])


@pytest.mark.parametrize("theirs", ["put there after a kill", "being made"])
def test_what_is_somebody_elses_is_left_alone(tmp_path: Path, data: DataConfig, theirs: str) -> None:
    fill(tmp_path, 2)
    if theirs == "being made":
        lock = open(tmp_path / ".train.idx.4194305.tmp", "r+b")
        fcntl.flock(lock, fcntl.LOCK_EX)
    else:
        (tmp_path / ".valid.bin.4194305.tmp").write_text("old")  # so the killed process had not renamed it
    with pytest.raises(ValueError, match=r"valid\.bin is half of a corpus"):
        stdlib_corpus.build(data, VOCAB)
    assert (tmp_path / "valid.bin").read_text() == "old"
