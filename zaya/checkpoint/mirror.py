"""Copy a run's checkpoints from the fast tier, a directory of the node, to the shared one, while the training goes on.

Two tiers: every node saves to a disk of its own, which is fast and dies with the node; this thread copies what is complete to storage that
all nodes share. It may be slower than the saves: it takes the newest checkpoint that every node has, and passes over older ones. The copy
is read back before its manifest is written, so it exists only as a whole. Knows no model, no layout and no process group.

Calls on every rank: Mirror(...), then `offer` with every checkpoint that is complete, in the same order; last `close`. Each round of the
thread is collective: all ranks come, agree on a step, copy, and agree on how it went.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar, cast

from zaya.checkpoint.directory import MANIFEST, complete_steps, identity, prune, remove, step_path, sync_directory
from zaya.checkpoint.errors import CheckpointError, RefusedError, disk_errors, raise_on_all
from zaya.checkpoint.files import write_manifest
from zaya.checkpoint.hashing import CHUNK_BYTES
from zaya.checkpoint.manifest import load, load_replaceable
from zaya.checkpoint.read import Checkpoint

RETRIES = 3
MEET_S = 30.0
"""While one copies, the others hear from it that often: a gather that waits for hours would be taken for a lost rank."""
T = TypeVar("T")
log = logging.getLogger("zaya")


class Mirror:
    """The thread and what it has done, as one rank sees it.

    `source`, `target`: the roots of the step directories. `gather`: an all-gather of objects that nothing but this mirror uses. The files
    of a source are copied by the ranks that see it, each its share: this one is the `place`-th of `places`. `bytes_per_s` limits what this
    rank writes and reads back; 0 does not.
    """

    def __init__(self, source: Path, target: Path, *, gather: Callable[[object], list[object] | None], rank: int = 0, place: int = 0,
                 places: int = 1, bytes_per_s: float = 0, keep: int = 0, keep_every: int = 0) -> None:
        self.source, self.target = source, target
        self.step: int | None = None
        """Of the newest checkpoint that this process saw on both tiers."""
        self.failures = 0
        self._gather, self._rank, self._place, self._places = gather, rank, place, places
        self._bytes_per_s, self._keep = bytes_per_s, (keep, keep_every)
        self._newest = self._done = -1
        """Steps: offered here, and dealt with (the same on all ranks)."""
        self._spared: frozenset[int] = frozenset()
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

    @contextlib.contextmanager
    def sparing(self) -> Iterator[frozenset[int]]:
        """Steps of `source` that must stay while others are pruned; none is chosen meanwhile."""
        with self._changed:
            yield self._spared | {self._newest}

    @property
    def is_behind(self) -> bool:
        """The last checkpoint offered is not on both tiers, as far as this rank knows."""
        return self._newest >= 0 and self.step != self._newest

    def close(self, timeout_s: float | None = None) -> bool:
        """Wait until the last checkpoint offered is on both tiers; False: it is not yet. CheckpointError: it could not be brought there."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        self.check()
        if self._thread.is_alive():
            return False
        if self.is_behind:
            where = step_path(self.source, self._newest)
            raise CheckpointError(f"the checkpoint of step {self._newest} is on the local tier only, {where}: mirroring it failed, as the "
                                  "log says; once that is mended, start the run again on the same nodes")
        return True

    def check(self) -> None:
        """Raise what ended the thread: a bug, a rank that is gone."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._await_work():
                self._gather(None)  # all ranks are here: what follows happens on all of them at about the same time
                step = self._choose()
                if step is not None:
                    self._bring(step)
                with self._changed:
                    self._spared = frozenset()
        except BaseException as error:  # noqa: BLE001 - raised again by check
            self._error = error

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._newest > self._done)
            return self._newest > self._done

    def _choose(self) -> int | None:
        """The newest step that every source has, not to be pruned from now on; None: there is none that is new."""
        everyone = self._tried(lambda: self._together(self._look), f"step {self._newest}")
        if everyone is None:
            self._done = min(cast(list[int], self._gather(self._newest)))
            return None
        fresh = {step for step in set.intersection(*(steps for steps, _ in everyone)) if step > self._done}
        if not fresh:
            self._done = min(offered for _, offered in everyone)
            return None
        step = max(fresh)
        with self._changed:
            self._spared = frozenset({step})
        return step

    def _look(self) -> tuple[set[int], int]:
        with self._changed:
            here = set(complete_steps(self.source))
            self._spared = frozenset(here)
            return here, self._newest

    def _bring(self, step: int) -> None:
        """Copy a step; all ranks together."""
        began = time.perf_counter()
        if self._tried(lambda: self._attempt(step_path(self.source, step), step_path(self.target, step)), f"step {step}") is not None:
            self.step = step
            self._prune(step)
            self._say(logging.INFO, f"step {step} | mirrored to {step_path(self.target, step)} in {time.perf_counter() - began:.1f} s")
        self._done = step

    def _tried(self, action: Callable[[], T], what: str) -> T | None:
        """What it returns, if need be at a later attempt; None if it was refused, or all have failed (on every rank alike: its
        CheckpointErrors are those of all)."""
        for attempt in itertools.count(1):
            try:
                return action()
            except CheckpointError as error:
                self.failures += 1
                if attempt > RETRIES or isinstance(error, RefusedError):
                    self._say(logging.ERROR, f"{what} | MIRROR FAILED: {error} | it stays on the local tier; the next one is tried")
                    return None
                pause_s = 2 ** (attempt - 1)
                self._say(logging.ERROR, f"{what} | MIRROR FAILED: {error} | another attempt after {pause_s} s")
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause_s)
        return None

    def _attempt(self, source: Path, target: Path) -> bool:
        """True; CheckpointError, on every rank, where it failed on any."""
        leader = self._rank == 0
        manifests = self._together(lambda: identity(source))
        if len(set(manifests)) > 1:
            raise CheckpointError(f"the nodes' directories {source} hold checkpoints of different saves")
        self._together(lambda: _make_way(target) if leader else None)
        self._together_long(lambda: self._copy(source, target))
        self._together(lambda: _commit(source, target) if leader else None)
        return True

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What it returns on every rank. On every rank the CheckpointError of the first rank that had one."""
        result, error = None, None
        try:
            result = action()
        except CheckpointError as problem:
            error = problem
        except OSError as problem:
            error = CheckpointError(f"cannot mirror {problem.filename or f'to {self.target}'}: {problem.strerror or problem}")
        everyone = cast(list[tuple[Any, CheckpointError | None]], self._gather((result, error)))
        raise_on_all([problem for _, problem in everyone])
        return [value for value, _ in everyone]

    def _together_long(self, action: Callable[[], Any]) -> list[Any]:
        """As `_together`, for what one rank may take hours longer over than another: ranks meet every MEET_S, so none waits longer."""
        work: Future[Any] = Future()

        def run() -> None:
            try:
                work.set_result(action())
            except BaseException as error:  # noqa: BLE001 - raised again by result
                work.set_exception(error)

        threading.Thread(target=run, name="mirror-copy", daemon=True).start()
        while not all(cast(list[bool], self._gather(bool(wait([work], MEET_S).done)))):
            pass
        return self._together(work.result)

    def _copy(self, source: Path, target: Path) -> None:
        """This rank's share of the files that its source has, each compared with the manifest's hashes once it is there."""
        checkpoint = Checkpoint.open(source, partial=True)
        mine = checkpoint.visible()[self._place :: self._places]
        budget = _Budget(self._bytes_per_s)
        for name in mine:
            _copy_file(source / name, target / name, budget)
        for damage in Checkpoint(target, checkpoint.manifest).damages(files=mine, progress=budget.spend):
            raise damage

    def _prune(self, step: int) -> None:
        if self._rank == 0:
            try:
                prune(self.target, step, *self._keep)
            except CheckpointError as error:
                self._say(logging.ERROR, f"{error}; free the room by hand")

    def _say(self, level: int, line: str) -> None:
        if self._rank == 0:
            log.log(level, line)


def _make_way(target: Path) -> None:
    """An older copy of this step, or half of one, goes. ForeignError: it is another program's checkpoint, and stays as it is."""
    with contextlib.suppress(OSError):  # one that cannot be read is half of one
        load_replaceable(target)
    if target.exists():
        remove(target)
    target.mkdir(parents=True)


def _commit(source: Path, target: Path) -> None:
    for damage in Checkpoint(target, load(source)).missized():  # no source had it
        raise damage
    write_manifest(target, (source / MANIFEST).read_text("ascii"))
    sync_directory(target.parent)


class _Budget:
    """Bytes per second, kept by sleeping."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.began, self.spent = bytes_per_s, time.monotonic(), 0

    def spend(self, count: int) -> None:
        self.spent += count
        if self.bytes_per_s:
            time.sleep(max(0.0, self.began + self.spent / self.bytes_per_s - time.monotonic()))


def _read(file: io.FileIO, path: Path) -> bytes:
    with disk_errors("read", path):
        return file.read(CHUNK_BYTES)


def _copy_file(source: Path, target: Path, budget: _Budget) -> None:
    with open(source, "rb", buffering=0) as from_, open(target, "xb", buffering=0) as to:
        while chunk := _read(from_, source):
            rest = memoryview(chunk)
            while rest:
                rest = rest[to.write(rest) :]
            budget.spend(len(chunk))
        os.fsync(to.fileno())
        os.posix_fadvise(to.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the storage
