"""Copy a run's checkpoints from the fast tier, a directory of the node, to the shared one, while the training goes on.

Two tiers: every node saves to a disk of its own, which is fast and dies with the node; this thread copies what is complete to storage that
all nodes share. It may be slower than the saves: it always takes the newest checkpoint that every rank has, and passes over older ones.
The copy is read back before its manifest is written, so it exists only as a whole. Knows no model, no layout and no process group.

Calls on every rank: Mirror(...), then `offer` with every checkpoint that is complete, in the same order; last `close`.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from zaya.checkpoint.directory import prune, remove, step_path, sync_directory
from zaya.checkpoint.manifest import CHUNK_BYTES, MANIFEST, CheckpointError, disk_errors, load
from zaya.checkpoint.read import Checkpoint

RETRIES = 3
log = logging.getLogger("zaya")


class Mirror:
    """The thread and what it has done, as one rank sees it.

    `source`, `target`: the roots of the step directories. `gather`: an all-gather of objects that nothing but this mirror uses. The files
    of a node are copied by its ranks, each its share. `bytes_per_s` limits what this rank writes; 0 does not.
    """

    def __init__(self, source: Path, target: Path, *, gather: Callable[[object], list[object] | None], rank: int = 0,
                 ranks_per_node: int = 1, bytes_per_s: float = 0, keep: int = 0, keep_every: int = 0) -> None:
        self.source, self.target = source, target
        self.step: int | None = None
        """Of the newest checkpoint that is on both tiers."""
        self.failures = 0
        self._gather, self._rank, self._ranks_per_node = gather, rank, ranks_per_node
        self._bytes_per_s, self._keep = bytes_per_s, (keep, keep_every)
        self._newest = self._done = -1
        self._at_work: frozenset[int] = frozenset()
        self._closing = False
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def offer(self, path: Path) -> None:
        """A checkpoint of `source` is complete on every rank, or about to be."""
        with self._changed:
            self._newest = int(path.name.removeprefix("step-"))
            self._changed.notify()

    def spare(self) -> set[int]:
        """Steps of `source` that are still needed: the one being copied, and the newest."""
        return {self._newest, *self._at_work}

    def close(self) -> None:
        """Wait until the last checkpoint offered is on both tiers, or cannot be."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self.check()

    def check(self) -> None:
        """Raise what ended the thread: a bug, a rank that is gone."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._await_work():
                steps = self._gather(self._newest)
                assert steps is not None
                # Every rank is offered the same steps: each has one that all have, and comes again for those that only some had.
                self._bring(min(step for step in steps if isinstance(step, int)))
        except BaseException as error:  # noqa: BLE001 - raised again by close
            self._error = error

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._newest > self._done)
            return self._newest > self._done

    def _bring(self, step: int) -> None:
        """Copy a step, several times if need be; all ranks together."""
        self._at_work = frozenset({step})
        for attempt in itertools.count(1):
            began = time.perf_counter()
            try:
                self._attempt(step_path(self.source, step), step_path(self.target, step))
            except CheckpointError as error:
                self.failures += 1
                if attempt > RETRIES:
                    self._say(logging.ERROR, f"step {step} | MIRROR FAILED: {error} | it stays on the local tier; the next one is tried")
                    break
                pause_s = 2 ** (attempt - 1)
                self._say(logging.ERROR, f"step {step} | MIRROR FAILED: {error} | another attempt after {pause_s} s")
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause_s)
            else:
                self.step = step
                self._prune()
                self._say(logging.INFO, f"step {step} | mirrored to {step_path(self.target, step)} in {time.perf_counter() - began:.1f} s")
                break
        self._done, self._at_work = step, frozenset()

    def _attempt(self, source: Path, target: Path) -> None:
        """CheckpointError, on every rank, where it failed on any."""
        leader = self._rank == 0
        self._together(target, lambda: self._prepare(target) if leader else None)
        self._together(target, lambda: self._copy(source, target))
        self._together(target, lambda: self._commit(source, target) if leader else None)

    def _together(self, target: Path, action: Callable[[], None]) -> None:
        error = ""
        try:
            with disk_errors("mirror to", target):
                action()
        except CheckpointError as problem:
            error = str(problem)
        errors = [str(error) for error in self._gather(error) or () if error]
        if errors:
            raise CheckpointError(errors[0] + (f" (and {len(errors) - 1} more ranks)" if errors[1:] else ""))

    def _prepare(self, target: Path) -> None:
        """An older copy of this step, or half of one, makes way."""
        if target.exists():
            remove(target)
        target.mkdir(parents=True)

    def _copy(self, source: Path, target: Path) -> None:
        """This rank's share of the files that this node has, each compared with the manifest's hashes once it is there."""
        checkpoint = Checkpoint.open(source, partial=True)
        mine = checkpoint.visible()[self._rank % self._ranks_per_node :: self._ranks_per_node]
        budget = _Budget(self._bytes_per_s)
        for name in mine:
            _copy_file(source / name, target / name, budget)
        for damage in Checkpoint(target, checkpoint.manifest).damages(files=mine):
            raise damage

    def _commit(self, source: Path, target: Path) -> None:
        shutil.copyfile(source / MANIFEST, target / f"{MANIFEST}.tmp")
        with open(target / f"{MANIFEST}.tmp", "rb+") as file:
            os.fsync(file.fileno())
        sync_directory(target)
        for damage in Checkpoint(target, load(source)).missized():  # a node that lacked a file has not copied it
            raise damage
        os.replace(target / f"{MANIFEST}.tmp", target / MANIFEST)
        sync_directory(target)
        sync_directory(target.parent)

    def _prune(self) -> None:
        if self._rank == 0:
            try:
                prune(self.target, *self._keep)
            except CheckpointError as error:
                self._say(logging.ERROR, f"{error}; free the room by hand")

    def _say(self, level: int, line: str) -> None:
        if self._rank == 0:
            log.log(level, line)


class _Budget:
    """Bytes per second, kept by sleeping."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.began, self.spent = bytes_per_s, time.monotonic(), 0

    def spend(self, count: int) -> None:
        self.spent += count
        if self.bytes_per_s:
            time.sleep(max(0.0, self.began + self.spent / self.bytes_per_s - time.monotonic()))


def _copy_file(source: Path, target: Path, budget: _Budget) -> None:
    with open(source, "rb", buffering=0) as from_, open(target, "xb", buffering=0) as to:
        while chunk := from_.read(CHUNK_BYTES):
            rest = memoryview(chunk)
            while rest:
                rest = rest[to.write(rest) :]
            budget.spend(len(chunk))
        os.fsync(to.fileno())
        os.posix_fadvise(to.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the storage

