"""Save while the training goes on: a copy of the state into memory that is kept for it, then a thread that writes.

End of a step that saves: the trainer hands its shares to `Saver.start`, which blocks it for the copy alone. The thread runs
save.save, collectives included, over a gather of its own, so that nothing of it meets the training's. Knows no model, no layout and no
process group.

Calls on every rank, at the same steps:
1. Saver(...), once.
2. start: waits for the last save, copies, returns.
3. after every step `wants_retry`: the last save did not come through, as far as this rank knows. All ranks come to the same answer,
   but not at the same moment, so the trainer sums it with what it sums anyway; when all say so, it starts another.
4. wait: the last save is over. `failed` and `wants_retry` are the same on all ranks now.

What a rank stages never exceeds `staging_bytes`, nor half of what its node has left: of a state that does not fit, `start` writes the
rest before it returns. That is the back-pressure: memory is bounded, the stall is not.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zaya.checkpoint.directory import prune
from zaya.checkpoint.errors import CheckpointError, RefusedError
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.save import Share, in_file_order, save, with_tensors

RETRIES = 3
"""Saves started anew after one that failed, before the next one that is due."""
PAUSE_S = 1.0
"""Before the first of them; twice as long before each further one."""
ALIGNMENT = 64  # bytes; a staged box begins at a multiple of it, as memory that torch allocates does
log = logging.getLogger("zaya")


class Saver:
    """The checkpoints of one run, as one rank sees them.

    `gather`: an all-gather of objects that nothing but this saver uses. `leads`: see save.save. `keep`, `keep_every`: see prune.
    `mirror` is offered every checkpoint that is complete.
    """

    def __init__(self, root: Path, *, gather: Callable[[object], list[object] | None], rank: int = 0, world_size: int = 1,
                 leads: bool | None = None, asynchronous: bool = True, staging_bytes: int = 1 << 62, ranks_per_node: int = 1,
                 keep: int = 0, keep_every: int = 0, mirror: Mirror | None = None) -> None:
        self.root = root
        self.step: int | None = None
        """Of the newest checkpoint that this process made complete."""
        self.failures = 0
        self.problem = ""
        """Of the last save that failed."""
        self.seconds: float | None = None
        """From the start of the last save to its end."""
        self._stall_s = 0.0
        self.failed = False
        """The last save did not come through and it is time for another."""
        self._gives_up = False
        """The last failure was a refusal, or that of the last retry."""
        self._save: dict[str, Any] = {"gather": gather, "rank": rank, "world_size": world_size, "leads": leads, "read_back": True}
        self._leads, self._speaks = rank == 0 if leads is None else leads, rank == 0
        self._keep, self._mirror = (keep, keep_every), mirror
        self._staging = Staging(staging_bytes, ranks_per_node) if asynchronous else None
        self._writer = _Writer()
        self._hurry = threading.Event()
        self._attempts = 0
        self._released = threading.Event()
        """The training may go on."""
        self._error: BaseException | None = None

    def prepare(self, shares: Mapping[str, Share]) -> None:
        """Allocate the staging memory before the first save needs it: fresh pages cost several times a copy into old ones."""
        if self._staging is not None:
            self._staging.reserve(in_file_order(shares))

    def start(self, shares: Mapping[str, Share], *, step: int, first: Callable[[], None] = lambda: None, **counters: Any) -> None:
        """Begin to save `shares` as checkpoint `step`; the caller may change their tensors when this returns. `first`, `counters`: as
        save.save."""
        began = time.perf_counter()
        self.wait(hurry=True)
        self._attempts = self._attempts + 1 if self.wants_retry else 1
        self.failed = False
        tensors = in_file_order(shares)
        live = self._staging.take(tensors) if self._staging is not None else 0
        written = 0
        self._released.clear()
        if not live and self._staging is not None:
            self._released.set()

        def tell(count: int) -> None:
            nonlocal written
            written += count
            if written >= live:
                self._released.set()  # all that was not copied is on its way to the disk

        def work() -> None:
            try:
                mine = shares if self._staging is None else self._staging.staged(shares, tensors)
                self._write(mine, tell, began, step=step, first=first, **counters)
            except BaseException as error:  # noqa: BLE001 - raised again in the training's thread
                self._error = error
            finally:
                self._released.set()

        self._writer.submit(work)
        self._released.wait()
        if self._staging is None:
            self.wait(hurry=True)
        self._stall_s += time.perf_counter() - began

    def wait(self, hurry: bool = False) -> None:
        """The last save is over. `hurry`: without the pause that follows a failure. Raises what was no failure of the disk: a bug, a
        rank that is gone."""
        if hurry:
            self._hurry.set()
        self._writer.idle.wait()
        self._hurry.clear()
        self.check()

    @property
    def mirror_is_behind(self) -> bool:
        """The newest complete checkpoint is on the local tier only, as far as this rank knows."""
        return self._mirror is not None and self._mirror.is_behind

    def close(self, timeout_s: float | None = None) -> bool:
        """Every checkpoint is where it belongs, on both tiers; False: the mirror needs longer than that. CheckpointError: the last one is
        not, and will not be."""
        self.wait()
        if self._mirror is not None:
            if not self._mirror.close(timeout_s):
                return False
            if self.step is not None:
                self._prune(self.step)  # of what the mirror needed until now
        return True

    def check(self) -> None:
        """Raise what ended a thread."""
        if self._error is not None:
            raise self._error
        if self._mirror is not None:
            self._mirror.check()

    def report(self) -> dict[str, object]:
        """For a row of metrics: the newest complete checkpoint, failures so far, how long saves held up training since last asked."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return {"saved_step": self.step, "failed_saves": self.failures, "save_stall_s": stall_s, "save_time_s": self.seconds,
                "failed_mirrors": self._mirror.failures if self._mirror is not None else 0}

    @property
    def wants_retry(self) -> bool:
        """As this rank sees it now; all ranks come to see it. False after a refusal, and once all retries have failed too."""
        self.check()
        return self.failed and not self._gives_up

    def _write(self, shares: Mapping[str, Share], tell: Callable[[int], None], began: float, *, step: int, **counters: Any) -> None:
        try:
            path = save(self.root, shares, step=step, written=tell, **counters, **self._save)
        except CheckpointError as error:
            self._fail(step, error)
            return
        self.step, self.seconds = step, time.perf_counter() - began
        if self._speaks:
            log.info("step %d | saved %s in %.1f s", step, path, self.seconds)
        if self._mirror is not None:
            self._mirror.offer(path)
        self._prune(step)

    def _fail(self, step: int, error: CheckpointError) -> None:
        self.failures, self.problem = self.failures + 1, str(error)
        self._gives_up = isinstance(error, RefusedError) or self._attempts > RETRIES
        pause_s = 0 if self._gives_up else PAUSE_S * 2 ** (self._attempts - 1)
        if self._speaks:
            again = f"another attempt after {pause_s:g} s ({self._attempts} of {RETRIES})"
            log.error("step %d | SAVE FAILED: %s | %s", step, error, "no other attempt until a save is due" if self._gives_up else again)
        self._released.set()  # the training does not wait for this
        self._hurry.wait(pause_s)
        self.failed = True

    def _prune(self, step: int) -> None:
        """That of `step` was read back, so one that verifies stays whatever goes."""
        if self._leads:
            try:
                with self._mirror.sparing() if self._mirror is not None else contextlib.nullcontext(()) as spare:
                    prune(self.root, step, *self._keep, spare=spare)
            except CheckpointError as error:
                log.error("%s; free the room by hand", error)


class Staging:
    """Memory of the host that holds a rank's state while it is written; pinned where some of the state is on a GPU. Made once."""

    def __init__(self, limit_bytes: int, ranks_per_node: int) -> None:
        self.limit_bytes, self.ranks_per_node = limit_bytes, ranks_per_node
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._places: list[torch.Tensor] = []
        """Where the last tensors of the state go, in file order; those before them do not fit."""
        self._kinds: list[tuple[torch.dtype, torch.Size]] = []

    def reserve(self, tensors: Sequence[torch.Tensor]) -> None:
        """Once for a state (in file order): it does not change its tensors."""
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        if kinds == self._kinds:
            return
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        assert not self._kinds or not on_gpu, "pinned memory is not given back"
        self._kinds = kinds
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        self._memory, self._places = torch.empty(0, dtype=torch.uint8), []  # the old one goes first
        room = min(self.limit_bytes, available_bytes() // 2 // self.ranks_per_node)
        count = sum(1 for total in itertools.accumulate(reversed(sizes)) if total <= room)  # the last written are copied
        fitting, sizes = tensors[len(tensors) - count :], sizes[len(tensors) - count :]
        self._memory = torch.empty(sum(sizes), dtype=torch.uint8).zero_()  # touched, so that it is there
        for tensor, begin in zip(fitting, itertools.accumulate(sizes, initial=0), strict=False):
            self._places.append(self._memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        if on_gpu and self._memory.numel() and not _pin(self._memory):
            log.warning("the memory for saves could not be pinned: the copies that saves wait for are slower")

    def take(self, tensors: list[torch.Tensor]) -> int:
        """Copy a state (in file order); how many bytes of it did not fit: those are the ones written first."""
        self.reserve(tensors)
        live = len(tensors) - len(self._places)
        if self._places:
            torch._foreach_copy_(self._places, tensors[live:], non_blocking=True)
            if any(tensor.is_cuda for tensor in tensors):
                torch.cuda.synchronize()
        return sum(tensor.nbytes for tensor in tensors[:live])

    def staged(self, shares: Mapping[str, Share], tensors: Sequence[torch.Tensor]) -> dict[str, Share]:
        """The shares with the copies in place of their tensors, but for those that did not fit."""
        return with_tensors(shares, [*tensors[: len(tensors) - len(self._places)], *self._places])


class _Writer(threading.Thread):
    """Runs one job after another. It stays, because the start of a thread costs its starter up to 5 ms: the new one has the
    interpreter's lock first."""

    def __init__(self) -> None:
        super().__init__(name="save-writer", daemon=True)
        self.idle = threading.Event()
        self.idle.set()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start()

    def submit(self, job: Callable[[], None]) -> None:
        self.idle.clear()
        self._jobs.put(job)

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            job()
            del job  # and with it the state, if the run is over
            self.idle.set()


def _pin(memory: torch.Tensor) -> bool:
    """Lock its pages, so that a GPU copies straight into it. (`pin_memory` would round its size up to a power of two.)"""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 1)) == 0:
        return True
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # the driver tells the failure once more, to whoever asks next: not to a kernel of the model
    return False


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that this process could still take: of the machine or, if that is less, of a control group that it is in.

    `root`: where /proc and /sys are. Pages of files that a group could drop count as free.
    """
    found = [1 << 62]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()  # version 2: "0::/system.slice/job_1/step_0"
        group = Path(next(line for line in lines if line.startswith("0::"))[4:])
        for path in (root / "sys/fs/cgroup" / folder for folder in (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError, StopIteration):  # "max" where there is no limit
                limit, used = int((path / "memory.max").read_text()), int((path / "memory.current").read_text())
                stat = (path / "memory.stat").read_text().splitlines()
                found.append(limit - used + int(next(line for line in stat if line.startswith("inactive_file ")).split()[1]))
    return max(0, min(found))
