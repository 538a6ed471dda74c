"""Saves beside the training: the copy, the bound on memory, failures and retries, the local tier and its mirror."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zaya.checkpoint import mirror as mirror_module
from zaya.checkpoint import save as save_module
from zaya.checkpoint import saver as saver_module
from zaya.checkpoint.directory import MANIFEST, complete_steps, newest, step_path
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.files import File
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share
from zaya.checkpoint.saver import RETRIES, Saver

COUNTERS: dict[str, Any] = dict(tokens=0, tokens_by_corpus={}, position=0, recipe={}, layout={})


class Ranks:
    """Threads that stand for ranks: gather(name) makes an all-gather among them for one use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: dict[str, list[object]] = {}
        self._barriers: dict[str, threading.Barrier] = {}

    def gather(self, name: str, rank: int) -> Callable[[object], list[object]]:
        barrier = self._barriers.setdefault(name, threading.Barrier(self.count))
        slots = self._slots.setdefault(name, [None] * self.count)

        def run(value: object) -> list[object]:
            slots[rank] = value
            barrier.wait(60)
            values = list(slots)
            barrier.wait(60)
            return values
        return run


def alone(value: object) -> list[object]:
    return [value]


def shares(tensors: dict[str, torch.Tensor], rank: int = 0, world_size: int = 1) -> dict[str, Share]:
    """Rows dealt out over the ranks."""
    cut = {}
    for name, tensor in tensors.items():
        rows = tensor.shape[0] // world_size
        part = tensor[rank * rows : (rank + 1) * rows]
        cut[name] = Share(tensor.dtype, tuple(tensor.shape), [(((rank * rows, *[0] * (tensor.dim() - 1)), tuple(part.shape)), part)])
    return cut


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"wide": torch.randn(64, 33, generator=generator, dtype=torch.float64), "small": torch.randn(8, generator=generator),
            "narrow": torch.randn(128, 65, generator=generator).bfloat16()}


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writers wait in their first fsync until this is set."""
    event = threading.Event()
    sync = os.fsync

    def fsync(fd: int) -> None:
        assert event.wait(60)
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return event


def test_training_goes_on_while_the_disk_works_and_the_next_save_waits(tmp_path: Path, held: threading.Event) -> None:
    saver = Saver(tmp_path, gather=alone)
    tensors = state(0)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saver.start(shares(tensors), step=1, **COUNTERS)  # returns although no file can be finished
    for tensor in tensors.values():
        tensor.add_(1)  # the training
    assert not complete_steps(tmp_path) and saver.step is None
    threading.Timer(0.3, held.set).start()
    began = time.monotonic()
    saver.start(shares(tensors), step=2, **COUNTERS)
    assert time.monotonic() - began > 0.2 and complete_steps(tmp_path)[:1] == [1], "the second save began before the first was over"
    saver.wait()
    assert_holds(step_path(tmp_path, 1), before)
    assert_holds(step_path(tmp_path, 2), tensors)
    assert saver.step == 2 and not saver.failed and saver.report()["save_stall_s"] > 0.2 and saver.report()["save_stall_s"] == 0  # type: ignore[operator]


@pytest.mark.parametrize("limit", [0, 200, 20_000, 30_000, 1 << 40])
def test_memory_is_bounded_and_what_does_not_fit_holds_the_training_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    tensors = state(1)
    total = sum(tensor.nbytes for tensor in tensors.values())
    on_disk: list[int] = []
    make = File.add

    def add(self: File, piece: Any, tensor: torch.Tensor) -> Any:
        time.sleep(0.05)
        box = make(self, piece, tensor)
        on_disk.append(tensor.nbytes)
        return box

    monkeypatch.setattr(File, "add", add)
    saver = Saver(tmp_path, gather=alone, staging_bytes=limit)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    saver.prepare(shares(tensors))
    memory = saver._staging._memory  # type: ignore[union-attr]
    assert memory.numel() <= min(limit, total + 3 * 64)
    saver.start(shares(tensors), step=1, **COUNTERS)
    written = sum(on_disk)
    for tensor in tensors.values():
        tensor.zero_()
    saver.wait()
    assert saver._staging._memory is memory, "made once"  # type: ignore[union-attr]
    assert_holds(step_path(tmp_path, 1), before)
    assert written >= total - limit


def test_a_state_larger_than_what_is_free_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver_module, "available_bytes", lambda: 80_000)
    saver = Saver(tmp_path, gather=alone, ranks_per_node=2)
    saver.start(shares(state(0)), step=1, **COUNTERS)
    saver.wait()
    assert saver._staging._memory.numel() == 16_640 + 64, "half of it for two ranks: the two tensors that are written last"  # type: ignore[union-attr]
    assert_holds(step_path(tmp_path, 1), state(0))


def test_free_memory_is_that_of_the_machine_or_of_the_jobs_group(tmp_path: Path) -> None:
    assert 1 << 20 < saver_module.available_bytes() < 1 << 50

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:       50 kB\n")
    assert saver_module.available_bytes(tmp_path) == 50 * 1024
    write("proc/self/cgroup", "0::/slurm/job_7\n")
    for group, limit in (("slurm/job_7", "max"), ("slurm", "30000")):
        write(f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
        write(f"sys/fs/cgroup/{group}/memory.current", "25000\n")
        write(f"sys/fs/cgroup/{group}/memory.stat", "anon 5000\nfile 20000\ninactive_file 15000\n")
    assert saver_module.available_bytes(tmp_path) == 20_000, "the limit of the group above holds too; files can be dropped"


def test_synchronous_saves_stage_nothing(tmp_path: Path) -> None:
    saver = Saver(tmp_path, gather=alone, asynchronous=False)
    saver.prepare(shares(state(0)))
    saver.start(shares(state(0)), step=1, **COUNTERS)
    assert_holds(step_path(tmp_path, 1), state(0))  # without a wait


def test_a_failed_save_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    full = True
    sync = os.fsync

    def fsync(fd: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    saver = Saver(tmp_path, gather=alone)
    monkeypatch.setattr(saver._hurry, "wait", lambda seconds: pauses.append(seconds))
    pauses: list[float] = []
    with caplog.at_level(logging.INFO, "zaya"):
        for attempt in range(RETRIES + 1):
            saver.start(shares(state(attempt)), step=attempt + 1, **COUNTERS)
            saver.wait()
            assert saver.failed and saver.failures == attempt + 1 and "No space left" in saver.problem and not list(tmp_path.iterdir())
            assert saver.wants_retry == (attempt < RETRIES)
        assert pauses == [1, 2, 4, 0] and caplog.text.count("SAVE FAILED") == RETRIES + 1
        assert "step 1 | SAVE FAILED: cannot write checkpoint" in caplog.text and "another attempt after 1 s (1 of 3)" in caplog.text
        assert "no other attempt until a save is due" in caplog.text
        saver.start(shares(state(8)), step=8, **COUNTERS)  # the next that is due may be tried as often
        saver.wait()
        assert saver.wants_retry and pauses[-1] == 1
        full = False
        saver.start(shares(state(9)), step=9, **COUNTERS)
        saver.wait()
    assert not saver.failed and not saver.wants_retry and saver.step == 9 and saver.report()["failed_saves"] == RETRIES + 2
    assert_holds(step_path(tmp_path, 9), state(9))


def foreign(path: Path) -> Path:
    """A checkpoint of another program; its manifest."""
    path.mkdir(parents=True)
    text = '"manifest": {"format_version": 3}}\n'
    (path / MANIFEST).write_text(f'{{"xxh3": "{hash_bytes(text.encode())}",\n{text}')
    return path / MANIFEST


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_refused_save_is_said_once_and_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, world_size: int) -> None:
    theirs = foreign(step_path(tmp_path, 1))
    before = theirs.read_text()
    ranks, pauses = Ranks(world_size), list[float]()
    savers = [Saver(tmp_path, gather=ranks.gather("saver", rank), rank=rank, world_size=world_size) for rank in range(world_size)]

    def save_all(step: int, widths: tuple[int, ...]) -> None:
        for rank, saver in enumerate(savers):
            saver.start(shares({"x": torch.ones(4, widths[rank])}, rank, world_size), step=step, **COUNTERS)
        for saver in savers:
            saver.wait()

    for saver in savers:
        saver._hurry.wait = pauses.append  # type: ignore[assignment, method-assign]
    with caplog.at_level(logging.INFO, "zaya"):
        save_all(1, (8, 8))
        for saver in savers:
            assert saver.failed and not saver.wants_retry and saver.failures == 1 and "move it away" in saver.problem
        assert theirs.read_text() == before and os.listdir(theirs.parent) == [MANIFEST]
        assert caplog.text.count("SAVE FAILED") == 1 and caplog.text.count("no other attempt until a save is due") == 1
        if world_size > 1:  # a state that is none
            save_all(2, (8, 9))
            assert not any(saver.wants_retry for saver in savers) and "other names, dtypes or shapes" in savers[1].problem
        assert not any(pauses)
        save_all(3, (8, 8))
    assert not any(saver.failed for saver in savers) and complete_steps(tmp_path) == [1, 3]


def test_what_reads_back_otherwise_never_becomes_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = File.finish

    def finish(self: File) -> Any:
        entry = original(self)
        with open(self.path, "r+b") as file:  # a disk that lies
            file.seek(-3, os.SEEK_END)
            file.write(b"\x55")
        return entry

    monkeypatch.setattr(File, "finish", finish)
    saver = Saver(tmp_path, gather=alone)
    saver.start(shares(state(0)), step=1, **COUNTERS)
    saver.wait(hurry=True)
    assert saver.failed and "reads back otherwise" in saver.problem and not list(tmp_path.iterdir())


def test_a_bug_or_a_lost_rank_ends_the_training(tmp_path: Path) -> None:
    def lost(value: object) -> list[object]:
        raise RuntimeError("Connection closed by peer")

    saver = Saver(tmp_path, gather=lost)
    saver.start(shares(state(0)), step=1, **COUNTERS)
    with pytest.raises(RuntimeError, match="closed by peer"):
        saver.wait()
    with pytest.raises(RuntimeError, match="closed by peer"):
        assert saver.wants_retry


def test_retention(tmp_path: Path) -> None:
    saver = Saver(tmp_path, gather=alone, keep=2, keep_every=4)
    for step in range(1, 10):
        saver.start(shares(state(step)), step=step, **COUNTERS)
    saver.wait()
    assert complete_steps(tmp_path) == [4, 8, 9]


def test_the_last_sound_checkpoint_outlives_the_failures_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, gather=alone, keep=1)
    saver.start(shares(state(1)), step=1, **COUNTERS)
    saver.wait()
    original = save_module.read_back

    def lies(*_: Any) -> None:
        raise CheckpointError("reads back otherwise")

    monkeypatch.setattr(save_module, "read_back", lies)
    for step in (2, 3):
        saver.start(shares(state(step)), step=step, **COUNTERS)
        saver.wait(hurry=True)
    assert complete_steps(tmp_path) == [1]
    monkeypatch.setattr(save_module, "read_back", original)
    saver.start(shares(state(4)), step=4, **COUNTERS)
    saver.wait()
    assert complete_steps(tmp_path) == [4]


# ------------------------------------------------------------------------------------------------------------------ two tiers


def run_nodes(roots: list[Path], shared: Path, steps: list[int], tensors: Callable[[int], dict[str, torch.Tensor]], ranks_per_node: int,
              keep_local: int = 2, **options: Any) -> list[Saver]:
    """A rank per thread; each node has a root of its own. Every other node's ranks name their tensors in the opposite order."""
    count = len(roots) * ranks_per_node
    ranks, savers, errors = Ranks(count), [], []

    def run(rank: int) -> None:
        try:
            root = roots[rank // ranks_per_node]
            mirror = Mirror(root, shared, gather=ranks.gather("mirror", rank), rank=rank, place=rank % ranks_per_node,
                            places=ranks_per_node, **options)
            saver = Saver(root, gather=ranks.gather("saver", rank), rank=rank, world_size=count, leads=rank % ranks_per_node == 0,
                          mirror=mirror, keep=keep_local)
            savers.append(saver)
            turn: Callable[[Any], Any] = reversed if rank // ranks_per_node % 2 else list
            for step in steps:
                saver.start(dict(turn(shares(tensors(step), rank, count).items())), step=step, **COUNTERS)
            saver.close()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    for name in ("mirror", "saver"):
        for rank in range(count):
            ranks.gather(name, rank)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for error in errors:
        raise error
    return savers


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(1, 1), (1, 2), (2, 2)])
def test_every_node_saves_to_its_own_disk_and_all_of_it_reaches_the_shared_one(tmp_path: Path, nodes: int, ranks_per_node: int) -> None:
    roots = [tmp_path / f"node{i}" for i in range(nodes)]
    run_nodes(roots, tmp_path / "shared", [1, 2, 3, 4], state, ranks_per_node, keep=1)
    assert complete_steps(tmp_path / "shared") == [4]
    assert_holds(step_path(tmp_path / "shared", 4), state(4))
    for root in roots:
        assert complete_steps(root) == [3, 4], "the local tier keeps two"
        files = [path.name for path in step_path(root, 4).iterdir()]
        assert len(files) == 1 + ranks_per_node and MANIFEST in files, "a node holds its own ranks' files"
    # What a node lacks it reads from the shared tier.
    here = Checkpoint.open(step_path(roots[0], 4), partial=True, elsewhere=[step_path(tmp_path / "shared", 4)])
    assert all(torch.equal(here.read(name), tensor) for name, tensor in state(4).items())


def test_a_mirror_that_fails_is_said_tried_again_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    copy, failures = mirror_module._copy_file, iter([True, True, False])

    def unsteady(source: Path, target: Path, budget: Any) -> None:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error", str(target))
        copy(source, target, budget)

    monkeypatch.setattr(mirror_module, "_copy_file", unsteady)
    with caplog.at_level(logging.INFO, "zaya"):
        savers = run_nodes([tmp_path / "node"], tmp_path / "shared", [1], state, 2)
    assert caplog.text.count("MIRROR FAILED") in (1, 2) and savers[0]._mirror.step == 1  # type: ignore[union-attr]
    assert_holds(step_path(tmp_path / "shared", 1), state(1))


def test_a_mirror_that_cannot_gives_up_and_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lies(source: Path, target: Path, budget: Any) -> None:
        target.write_bytes(source.read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(mirror_module, "_copy_file", lies)
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 is on the local tier only"):
        run_nodes([tmp_path / "node"], tmp_path / "shared", [1], state, 1)
    assert newest(tmp_path / "shared") is None and complete_steps(tmp_path / "node") == [1]


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_the_mirror_does_not_replace_another_programs_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                                 ranks_per_node: int) -> None:
    theirs = foreign(step_path(tmp_path / "shared", 1))
    before = theirs.read_text()
    with caplog.at_level(logging.INFO, "zaya"), pytest.raises(CheckpointError, match="the checkpoint of step 1 is on the local tier only"):
        run_nodes([tmp_path / "node"], tmp_path / "shared", [1], state, ranks_per_node)
    assert caplog.text.count("MIRROR FAILED") == 1 and "move it away" in caplog.text, "a refusal is not tried again"
    assert theirs.read_text() == before and os.listdir(theirs.parent) == [MANIFEST]


def test_a_slow_mirror_keeps_its_bandwidth_and_takes_the_newest(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in state(0).values())
    began = time.monotonic()
    run_nodes([tmp_path / "node"], tmp_path / "shared", [1, 2, 3, 4, 5], state, 1, bytes_per_s=2 * size)
    copied = complete_steps(tmp_path / "shared")
    # Each byte twice, at two states a second: a second each, less a tenth for the clock.
    assert time.monotonic() - began > 0.9 * len(copied) and copied[-1] == 5 and len(copied) < 5
    assert_holds(step_path(tmp_path / "shared", 5), state(5))


def test_the_limit_of_the_mirror_holds_for_what_it_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = list[int]()
    monkeypatch.setattr(mirror_module._Budget, "spend", lambda self, count: spent.append(count))
    run_nodes([tmp_path / "node"], tmp_path / "shared", [1], state, 1, bytes_per_s=1)
    (file,) = step_path(tmp_path / "shared", 1).glob("*.safetensors")
    assert sum(spent) == file.stat().st_size + sum(tensor.nbytes for tensor in state(1).values())


def test_ranks_that_have_copied_their_share_hear_from_one_that_has_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it copies, they meet again and again: a single wait for it would end a healthy run, if that takes longer than a gather may."""
    run_nodes([tmp_path / "node"], tmp_path / "shared", [1], state, 2)
    copy, ranks, meetings = mirror_module._copy_file, Ranks(2), [0]
    gathers = [ranks.gather("mirror", rank) for rank in range(2)]

    def slow(source: Path, target: Path, budget: Any) -> None:
        if "00001-of-" in source.name:
            deadline, enough = time.monotonic() + 20, meetings[0] + 5
            while meetings[0] < enough:
                assert time.monotonic() < deadline, "the other rank waits in one gather"
                time.sleep(0.01)
        copy(source, target, budget)

    def counted(value: object) -> list[object]:
        found = gathers[0](value)
        meetings[0] += 1
        return found

    monkeypatch.setattr(mirror_module, "MEET_S", 0.05)
    monkeypatch.setattr(mirror_module, "_copy_file", slow)
    mirrors = [Mirror(tmp_path / "node", tmp_path / "again", gather=gather, rank=rank, place=rank, places=2)
               for rank, gather in enumerate((counted, gathers[1]))]
    for mirror in mirrors:
        mirror.offer(step_path(tmp_path / "node", 1))
    for mirror in mirrors:
        assert mirror.close()
    assert_holds(step_path(tmp_path / "again", 1), state(1))


def test_what_the_mirror_needs_is_not_pruned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = sum(tensor.nbytes for tensor in state(0).values())
    with caplog.at_level(logging.INFO, "zaya"):
        savers = run_nodes([tmp_path / "a", tmp_path / "b"], tmp_path / "shared", list(range(1, 13)), state, 1, keep_local=1,
                           bytes_per_s=10 * size)
    assert "MIRROR FAILED" not in caplog.text and all(saver._mirror.step == 12 for saver in savers)  # type: ignore[union-attr]
    assert complete_steps(tmp_path / "a") == complete_steps(tmp_path / "b") == [12]


def test_checkpoints_of_one_step_but_different_saves_are_not_mixed(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    ranks = Ranks(2)
    for name, seed in (("first", 1), ("second", 2)):
        run_nodes([tmp_path / name / "a", tmp_path / name / "b"], tmp_path / name / "shared", [1], lambda step: state(seed), 1)  # noqa: B023
    (tmp_path / "first/a").rename(roots[0])
    (tmp_path / "second/b").rename(roots[1])
    gathers = [ranks.gather("mirror", rank) for rank in range(2)]
    mirrors = [Mirror(root, tmp_path / "shared", gather=gathers[rank], rank=rank) for rank, root in enumerate(roots)]
    for mirror, root in zip(mirrors, roots, strict=True):
        mirror._closing = True  # no pauses between attempts
        mirror.offer(step_path(root, 1))
    for mirror in mirrors:
        with pytest.raises(CheckpointError, match="local tier only"):
            mirror.close()
    assert mirrors[0].failures == mirror_module.RETRIES + 1 and newest(tmp_path / "shared") is None
