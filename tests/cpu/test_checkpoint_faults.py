"""Every system call of a save, and of the copy to the second tier, goes wrong once: no such disk costs a checkpoint, none goes unsaid."""

from __future__ import annotations

import errno
import gc
import os
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.failing_disk import FAULTS, FailingDisk
from tests.cpu.test_checkpoint import STEP, assert_holds, cut, random_tensor, same
from zaya.checkpoint.directory import complete_steps, step_path
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import save
from zaya.checkpoint.saver import RETRIES, Saver
from zaya.shard import Layout

OLD = {"x": torch.arange(300.0), "y": random_tensor(torch.bfloat16, (5, 7), 1), "scalar": torch.tensor(4.0)}
NEW = {"x": torch.arange(300.0) + 1, "y": random_tensor(torch.bfloat16, (5, 7), 2), "scalar": torch.tensor(5.0)}
Tree = dict[str, tuple[bytes, int]]
NEVER_FORGIVEN = {"write", "fsync", "replace"}
"""Calls that a checkpoint cannot do without: whatever else is true, their failure is the save's."""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: thousands of real fsyncs would take most of the time."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def alone(value: object) -> list[object]:
    return [value]


def store(root: Path, tensors: dict[str, torch.Tensor], step: int) -> Path:
    return save(root, cut(tensors, Layout(1), 0), **{**STEP, "step": step}, gather=alone, read_back=True)


def tree(path: Path) -> Tree:
    """Contents and inodes."""
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_ino) for file in path.rglob("*") if file.is_file()}


def calls_and_faults(calls: list[str]) -> Iterator[tuple[int, str]]:
    return ((at, fault) for at, name in enumerate(calls) for fault in FAULTS[name])


def assert_nothing_lost(root: Path, step: int, olds: Tree, what: object) -> bool:
    """All that looks complete is; other steps are as they were. Whether the new state is there."""
    there = False
    for complete in complete_steps(root):
        path = step_path(root, complete)
        if complete != step:
            assert tree(path) == olds, what
            continue
        held = NEW if same(Checkpoint.open(path).read("x"), NEW["x"]) else OLD
        assert_holds(path, held)
        there = held is NEW
    return there


# ------------------------------------------------------------------------------------------------------------------ a save


@pytest.mark.parametrize("same_step", [False, True], ids=["beside an older step", "over the same step"])
def test_a_save_survives_every_fault_of_every_call(memory: Path, same_step: bool) -> None:
    main = threading.main_thread()
    store(memory / "dry", OLD, 3 if same_step else 2)
    with FailingDisk(lambda thread: thread is main) as disk:
        store(memory / "dry", NEW, 3)
    made = {"open", "write", "fsync", "replace", "mkdir", "preadv", "posix_fadvise", "close", "stat"}
    assert made | ({"read"} if same_step else set()) <= set(disk.calls)  # read: the manifest of an older save of the step
    outcomes = set()
    for at, fault in calls_and_faults(disk.calls):
        root = memory / f"{at}-{fault}"
        before = store(root, OLD, 3 if same_step else 2)
        olds = tree(before)
        error = ""
        with FailingDisk(lambda thread: thread is main, at, fault) as disk:
            try:
                store(root, NEW, 3)
            except CheckpointError as refused:
                error = str(refused)
        what = at, disk.struck, fault, error
        there = assert_nothing_lost(root, 3, olds, what)
        assert there or error, what
        assert bool(error) or fault == "short" or disk.struck not in NEVER_FORGIVEN, what
        assert fault != "short" or not error, what
        assert "\n" not in error and (fault == "rot" or not error or os.strerror(errno.EIO) in error or os.strerror(errno.ENOSPC) in error)
        outcomes.add((fault, there, bool(error)))
        assert_holds(store(root, NEW, 3), NEW)  # the next attempt clears up
        assert len(list(step_path(root, 3).iterdir())) == 2 and same_step == (len(list(root.iterdir())) == 1), what
        shutil.rmtree(root)
    assert {("EIO", False, True), ("ENOSPC", False, True), ("full", False, True), ("short", True, False), ("rot", False, True)} <= outcomes


def test_every_fault_on_either_of_two_ranks_is_both_ranks_failure(memory: Path) -> None:
    """Both raise, neither waits for the other, and nothing half-written counts."""
    for victim in ("rank-0", "rank-1"):
        root = memory / victim
        olds = tree(store(root, OLD, 2))
        with FailingDisk(lambda thread: thread.name == victim) as disk:  # noqa: B023 - used in this turn only
            assert on_two_ranks(root) == ["", ""]
        for at, fault in list(calls_and_faults(disk.calls))[::3]:
            shutil.rmtree(step_path(root, 3))
            with FailingDisk(lambda thread: thread.name == victim, at, fault) as disk:  # noqa: B023
                errors = on_two_ranks(root)
            there = assert_nothing_lost(root, 3, olds, (victim, at, fault, errors))
            assert errors[0] == errors[1] and (there or all(errors)) and (fault != "short" or not any(errors)), (victim, at, fault, errors)
            assert on_two_ranks(root) == ["", ""]
            assert_holds(step_path(root, 3), NEW)


def on_two_ranks(root: Path) -> list[str]:
    """What each rank's save raised."""
    barrier, slots, errors = threading.Barrier(2, timeout=20), [None, None], ["", ""]

    def rank_saves(rank: int) -> None:
        def gather(value: Any) -> list[object]:
            slots[rank] = value
            barrier.wait()
            everyone: list[object] = list(slots)
            barrier.wait()
            return everyone

        try:
            save(root, cut(NEW, Layout(2), rank), **STEP, rank=rank, world_size=2, gather=gather, read_back=True)
        except CheckpointError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=rank_saves, args=(rank,), name=f"rank-{rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken, "a rank left the other alone"
    return errors


# ------------------------------------------------------------------------------------------------------------------ the saver


COUNTERS = {key: value for key, value in STEP.items() if key != "step"}


def is_saving(thread: threading.Thread) -> bool:
    return thread.name.startswith("save-")


def attempt(saver: Saver, tensors: dict[str, torch.Tensor], step: int = 3) -> None:
    saver.start(cut(tensors, Layout(1), 0), step=step, **COUNTERS)
    saver.wait(hurry=True)


def test_the_saver_tells_every_fault_and_comes_through_at_the_next_attempt(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(memory / "dry", OLD, 2)
    with FailingDisk(is_saving) as disk:
        attempt(Saver(memory / "dry", gather=alone, keep=1), NEW)
    assert complete_steps(memory / "dry") == [3]
    told = set()
    for at, fault in calls_and_faults(disk.calls):
        root = memory / f"{at}-{fault}"
        olds = tree(store(root, OLD, 2))
        saver = Saver(root, gather=alone, keep=1)
        caplog.clear()
        with FailingDisk(is_saving, at, fault) as disk:
            attempt(saver, NEW)
        what = at, disk.struck, fault, saver.problem
        there = assert_nothing_lost(root, 3, olds, what)
        if saver.failed:
            assert saver.wants_retry and saver.failures == 1 and saver.step is None and saver.problem, what
            assert f"step 3 | SAVE FAILED: {saver.problem}" in caplog.text, what
            attempt(saver, NEW)
        else:
            assert there and saver.failures == 0 and (fault == "short" or disk.struck not in NEVER_FORGIVEN), what
            if complete_steps(root) != [3] or (root / "step-00000002").exists():
                assert "free the room by hand" in caplog.text, what  # the fault met what is removed
        told.add((fault, saver.failures))
        assert not saver.failed and not saver.wants_retry and saver.step == 3, what
        assert_holds(step_path(root, 3), NEW)
        attempt(saver, OLD, step=4)
        assert [path.name for path in root.iterdir()] == ["step-00000004"], what  # nothing is left lying about
        shutil.rmtree(root)
    assert told == {("EIO", 0), ("EIO", 1), ("ENOSPC", 0), ("ENOSPC", 1), ("full", 0), ("full", 1), ("short", 0), ("rot", 1)}


def test_a_disk_that_stays_full_costs_attempts_and_nothing_else(tmp_path: Path) -> None:
    olds = tree(store(tmp_path, OLD, 2))
    saver = Saver(tmp_path, gather=alone, keep=1)
    with FailingDisk(is_saving, 4, "full"):
        for count in range(1, RETRIES + 2):
            attempt(saver, NEW)
            assert saver.failed and saver.failures == count and saver.wants_retry == (count <= RETRIES)
            assert not assert_nothing_lost(tmp_path, 3, olds, count) and complete_steps(tmp_path) == [2]
    attempt(saver, NEW, step=6)  # the next one that is due
    assert complete_steps(tmp_path) == [6] and not saver.failed and saver.step == 6
    with FailingDisk(is_saving, 4, "full"):  # it had its retries for itself again
        attempt(saver, NEW, step=9)
    assert saver.wants_retry


# ------------------------------------------------------------------------------------------------------------------ the second tier


def test_the_mirror_survives_every_fault_of_every_call(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = memory / "source"
    path = store(source, NEW, 3)
    saved = tree(source)

    def mirror_once(target: Path) -> tuple[Mirror, str]:
        """The mirror, and what it says at the end."""
        mirror, error = Mirror(source, target, gather=alone, keep=1), ""
        mirror.offer(path)
        try:
            mirror.close()
        except CheckpointError as problem:
            error = str(problem)
        assert tree(source) == saved
        return mirror, error

    store(memory / "dry", OLD, 2)
    with FailingDisk(lambda thread: thread.name == "mirror") as disk:
        assert mirror_once(memory / "dry")[1] == ""
    assert complete_steps(memory / "dry") == [3]
    for at, fault in calls_and_faults(disk.calls):
        root = memory / f"{at}-{fault}"
        olds = tree(store(root, OLD, 2))
        caplog.clear()
        with FailingDisk(lambda thread: thread.name == "mirror", at, fault) as disk:
            mirror, error = mirror_once(root)
        what = at, disk.struck, fault, error, caplog.text
        there = assert_nothing_lost(root, 3, olds, what)
        assert there >= (mirror.step == 3) and (mirror.step == 3) != bool(error), what
        assert caplog.text.count("MIRROR FAILED") == mirror.failures and (fault != "short" or not mirror.failures), what
        assert fault == "short" or disk.struck not in NEVER_FORGIVEN or mirror.failures, what
        assert mirror.failures in ((0, 1, RETRIES + 1) if fault == "full" else (0, 1)), what
        assert mirror.step == 3 or fault == "full", what  # the second attempt comes through
        if error:
            mirror, error = mirror_once(root)  # the disk is mended
            assert mirror.step == 3 and not error, what
        assert_holds(step_path(root, 3), NEW)
        shutil.rmtree(root)


# ------------------------------------------------------------------------------------------------------------------ reading


def test_every_fault_of_a_read_is_a_line_that_names_the_file(memory: Path) -> None:
    """Found, opened, verified and read: a CheckpointError, or the bytes that were saved; fewer bytes at a time are read on."""
    path = store(memory / "checkpoints", NEW, 3)

    def read_all() -> None:
        found = Checkpoint.find(memory)
        assert found.path == path
        found.verify()
        assert all(same(found.read(name), tensor) for name, tensor in NEW.items())
        for damage in found.damages(files=found.visible()):
            raise damage

    with FailingDisk(lambda thread: True) as disk:  # on any thread: hashes are compared on some
        read_all()
    assert {"open", "read", "preadv", "stat", "listdir", "close"} <= set(disk.calls)
    refused = 0
    for at, fault in calls_and_faults(disk.calls):
        with FailingDisk(lambda thread: True, at, fault) as disk:
            try:
                read_all()
            except CheckpointError as error:
                assert fault != "short" and "\n" not in str(error) and str(memory) in str(error), (at, disk.struck, fault, error)
                refused += 1
    assert refused > 20


# ------------------------------------------------------------------------------------------------------------------ real ones


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the write that reaches it is short, the next one fails."""
    olds, limits = tree(store(tmp_path, OLD, 2)), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {**NEW, "large": random_tensor(torch.float32, (1 << 18,), 3)}
    saver = Saver(tmp_path, gather=alone)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        attempt(saver, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saver.wants_retry and "File too large" in saver.problem and complete_steps(tmp_path) == [2]
    assert tree(tmp_path / "step-00000002") == olds
    attempt(saver, large)
    assert_holds(step_path(tmp_path, 3), large)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # lazy: mapped files may not have been let go yet


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """Room for three checkpoints of 1 MB: a save that meets the end leaves two sound ones, and goes through once there is room."""
    large = {**NEW, "large": random_tensor(torch.float32, (1 << 18,), 3)}
    saver = Saver(small_disk, gather=alone)
    for step in (1, 2, 3):
        attempt(saver, large, step=step)
    assert saver.step == 3
    attempt(saver, large, step=4)
    assert saver.wants_retry and "No space left on device" in saver.problem and complete_steps(small_disk) == [1, 2, 3]
    for step in (1, 2, 3):
        assert_holds(step_path(small_disk, step), large)
    assert not step_path(small_disk, 4).exists()  # what it wrote is gone: others need the room
    shutil.rmtree(step_path(small_disk, 1))
    gc.collect()  # checkpoints that were read here still map it: a file that is mapped keeps its room
    attempt(saver, large, step=4)
    assert complete_steps(small_disk) == [2, 3, 4]
    assert_holds(step_path(small_disk, 4), large)
