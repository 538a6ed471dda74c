"""A thread beside each rank's training that ends the process where a rank has failed, is gone, or stands still, and says which one.

Under RCCL nothing else does: a rank whose partner has failed waits until a collective times out, and the time-out names no rank. All goes
through the job's store (torchrun's, over TCP), never through a collective:

1. Every rank beats, now and then, and watches the next one: its beats, and where both are on one machine its process.
2. The first that fails, or that sees a hang or a dead neighbour, writes the verdict: code, cause, and the ranks at fault. Once.
3. The others read it within POLL_S, write their own exit records and leave, after the one that failed: torchrun's report names that one.

A rank is late by what it has launched: those with the fewest collectives in the earliest step. Only a rank that is late says so, after it
has stood still itself: one that is slow is not stopped. Where all have launched the same, it is no rank's Python that stands still but a
GPU or the network, and the verdict says that. (The DeepSpeed engine's collectives are not counted: there micro-batches tell.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from zaya.parallel.mesh import Mesh
from zaya.preemption import SIGNALS
from zaya.resilience.exits import ACTIONS, Exit, ExitRecord, attempt_path, next_attempt

HANG_S = 480.0
"""Without a collective, a micro-batch or a step. Below the 600 s after which torch gives a collective up (zaya/parallel/mesh.py): it does
not know which rank was late."""
LOST_S = 120.0
"""Without a beat. Long, since Python code in C may hold the interpreter that long; a dead process of this machine is seen at once."""
POLL_S = 0.5
"""While they train, 1,024 ranks ask the store 2,000 times a second."""
STALL_S = 10.0
"""Between two beats, and without progress until a rank tells the others where it is."""
PAUSED_S = 10.0
"""Between two looks of a thread that looks every POLL_S: it was not running."""
LINGER_S = 3.0
"""The rank at fault waits that long, at most, for the others to hear of it."""
UNJUDGED = ("start", "opened", "save", "end")
"""Phases in which a rank waits for disks, which have time-outs of their own."""
log = logging.getLogger("zaya")


@dataclass
class Progress:
    """Where the training is; the loop says it, the watchdog's thread reads it."""

    step: int = 0
    """Optimizer steps done."""
    phase: str = "start"
    part: int = 0
    """Micro-batch of the step, or of the evaluation."""

    def enter(self, phase: str, step: int, part: int = 0) -> None:
        self.phase, self.step, self.part = phase, step, part


class Place(NamedTuple):
    """Of a rank, as the others see it. Places are ordered by step, then by collectives launched."""

    step: int
    launched: int
    """Collectives since the start."""
    phase: str
    part: int
    latest: str
    """The collective launched last."""

    def __str__(self) -> str:
        part = f" {self.part + 1}" if self.phase in ("micro-batch", "evaluation") else ""
        latest = f", last {self.latest}" if self.latest else ""
        return f"step {self.step + 1}, {self.phase}{part}, {self.launched} collectives launched{latest}"


class Verdict(NamedTuple):
    """Why the job ends. `by`: the rank that found it."""

    by: int
    code: int
    cause: str
    at_fault: tuple[int, ...]
    is_loss: bool = False
    """The one at fault is gone, and hears nothing."""
    pid: int = 0
    """Of that one, where it is a process of the same machine as the one that misses it."""


class Watchdog:
    """Watches this process from `with` to the end of the block, and ends it with `end`, or by itself.

    Every rank makes one, right after the mesh (collective). On one CPU there is nobody to watch: only the exit record is written.
    """

    def __init__(self, mesh: Mesh, run_dir: Path) -> None:
        self.progress = Progress()
        self._rank, self._size, self._ledger, self._run_dir = mesh.rank, mesh.world_size, mesh.ledger, run_dir
        self._has_thread = mesh.world_size > 1 or mesh.device.type == "cuda"
        # A connection of its own: while one waits in a call, others of it wait too.
        self._store: dist.Store | None = None if mesh.store is None else dist.PrefixStore(
            "watchdog", mesh.store.clone())  # type: ignore[attr-defined]  # not in torch's stubs
        self._neighbour = None if self._store is None else Neighbour(self._store, mesh.rank, mesh.world_size)
        self._ending = threading.Lock()
        """Whoever holds it ends the process; it is never given back."""
        self._handlers: dict[signal.Signals, Any] = {}
        """Of signals, as they were before `claim`."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._looked = math.inf
        """When the thread last asked the store something that it has not answered yet."""
        self._clock = Clock()
        self._since = time.monotonic()
        self._place = self._where()
        self._next_judgement = 0.0
        self._tell("")
        self._attempt = self._agree_on_attempt()

    def __enter__(self) -> Watchdog:
        if self._has_thread:
            self._thread.start()
            threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    # ------------------------------------------------------------------------------------------------------------ the end

    def claim(self) -> None:
        """From here on the main thread ends the process, and speaks; does not return where the other thread is ending it already. What
        torchrun sends when it has seen another rank end does not cut it short."""
        self._ending.acquire()
        if threading.current_thread() is threading.main_thread():
            numbers = (*SIGNALS, signal.SIGHUP, signal.SIGINT)
            self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}

    def end(self, code: int, cause: str) -> None:
        """This process ends, once this has returned: write why, and unless the whole job ends so (done, preempted), tell the other ranks
        and wait until they have heard it. After `claim`."""
        try:
            if code in (Exit.DONE, Exit.PREEMPTED):
                self._stop()
                with self._limited(code):
                    self._set(f"left/{self._rank}")
                verdict = Verdict(self._rank, code, cause, ())
                self._report(verdict)
                self._record(verdict)
            else:
                with self._limited(code):
                    self._end_all(Verdict(self._rank, code, cause, (self._rank,)))
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _end_all(self, own: Verdict) -> None:
        """First what needs no store: that may be what does not answer."""
        self._report(own)
        self._write(own)
        verdict = self._pronounce(own, patience_s=2 * POLL_S if own.code == Exit.FAILED else 0)
        self._stop()
        if verdict.by != self._rank or verdict.is_loss:  # one end for the job: supervisors of all nodes decide by it
            if not verdict.is_loss:
                verdict = verdict._replace(cause=f"{verdict.cause} (and here: {own.cause})")
            else:
                self._say(verdict)
                self._fence(verdict)
            self._report(verdict)
            self._write(verdict)
        self._part(verdict)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(LINGER_S)  # not longer: it may wait for a store that does not answer

    @contextlib.contextmanager
    def _limited(self, code: int) -> Iterator[None]:
        """Whatever does not answer within, the store or a disk, the process ends."""
        limit = threading.Timer(6 * LINGER_S, os._exit, (code,))
        limit.daemon = True
        if self._store is not None:
            limit.start()
        try:
            yield
        finally:
            limit.cancel()

    def _set(self, key: str) -> None:
        if (store := self._store) is not None:
            with contextlib.suppress(RuntimeError):  # it is gone, with the rank or the node that has it
                store.set(key, "")

    def _pronounce(self, verdict: Verdict, patience_s: float = 0) -> Verdict:
        """The job's verdict: this one, or what was pronounced before, or within `patience_s` by whoever knows better."""
        if (store := self._store) is None:
            return verdict
        with contextlib.suppress(RuntimeError):
            until = time.monotonic() + patience_s
            while time.monotonic() < until and not store.check(["verdict"]):
                time.sleep(POLL_S / 10)
            return _verdict(store.compare_set("verdict", "", json.dumps(verdict)))
        return verdict

    def _part(self, verdict: Verdict) -> None:
        """Leave in an order in which torchrun sees first who has pronounced the verdict: the rank at fault, unless that is gone."""
        if (store := self._store) is None:
            return
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(RuntimeError):
            if verdict.by == self._rank:
                hearers = self._size - 1 - len(verdict.at_fault) * verdict.is_loss
                while store.add("heard", 0) < hearers and time.monotonic() < until:
                    time.sleep(POLL_S / 10)
                store.set("gone", "")
                return
            store.add("heard", 1)
            while not store.check(["gone"]) and time.monotonic() < until:
                time.sleep(POLL_S / 5)
        time.sleep(POLL_S)

    def _fence(self, verdict: Verdict) -> None:
        """What is missed must not come back and write; and torchrun would wait 30 s for it."""
        if verdict.by == self._rank and verdict.pid:
            with contextlib.suppress(OSError):
                os.kill(verdict.pid, signal.SIGKILL)

    def _say(self, verdict: Verdict) -> None:
        """On stderr: the rank that found it."""
        if verdict.by == self._rank:
            with contextlib.suppress(OSError):
                print(f"zaya.train: rank {self._rank}: {verdict.cause}; {ACTIONS[Exit(verdict.code)]}", file=sys.stderr, flush=True)

    def _write(self, verdict: Verdict, stacks: bool = False) -> None:
        """What goes into RUN, within LINGER_S: the disk that all nodes share may be what does not answer."""
        def write() -> None:
            if log.handlers:  # they are open
                log.error("step %d | the job ends: %s (said by rank %d)", self.progress.step, verdict.cause, verdict.by)
            if stacks:
                with contextlib.suppress(OSError), open(self._run_dir / "logs" / f"rank-{self._rank}.log", "a") as file:
                    faulthandler.dump_traceback(file)  # of all threads: where this rank was
            self._record(verdict)

        writer = threading.Thread(target=write, name="watchdog-write", daemon=True)
        writer.start()
        writer.join(LINGER_S)

    def _exit_record(self, verdict: Verdict) -> ExitRecord:
        where = self._where()
        return ExitRecord(self._rank, verdict.code, where.step, where.phase, verdict.cause, verdict.at_fault, ACTIONS[Exit(verdict.code)])

    def _report(self, verdict: Verdict) -> None:
        """To the supervisor of this node."""
        with _told_on_stderr():
            self._exit_record(verdict).report()

    def _record(self, verdict: Verdict) -> None:
        """Into RUN. A start that is refused leaves the directory as it was; a run that has not begun has none."""
        record = self._exit_record(verdict)
        if self._attempt and self._run_dir.is_dir() and not (record.code == Exit.REFUSED and record.phase == "start"):
            with _told_on_stderr():
                record.write(attempt_path(self._run_dir, self._attempt))

    def _agree_on_attempt(self) -> int:
        """One number on all ranks; 0: the run directory cannot be looked at, and there will be no records."""
        attempt = 0
        if self._rank == 0:
            with contextlib.suppress(OSError):
                attempt = next_attempt(self._run_dir)
        if self._store is None:
            return attempt
        if self._rank == 0:
            self._store.set("attempt", str(attempt))
        return int(self._store.get("attempt"))

    # ------------------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._looked = time.monotonic()
            try:
                verdict = self._heard() or (self._neighbour and self._neighbour.verdict()) or self._hang()
                if verdict is not None and verdict.by == self._rank:
                    verdict = self._pronounce(verdict)
            except RuntimeError:  # of the store
                cause = "the job's store is gone: torchrun, rank 0 or its node has ended"
                verdict = Verdict(self._rank, Exit.FAILED, cause, (), is_loss=True)
            self._looked = math.inf  # no call waits for the store
            # Where a rank is gone the main thread may fail by itself, and say where.
            if verdict is not None and not (verdict.is_loss and verdict.by == self._rank and self._stopped.wait(LINGER_S)):
                self._leave(verdict)

    def _watch_store(self) -> None:
        """A call to a store whose node has lost its power, or whose process is frozen, does not return."""
        clock, waited_s = Clock(), 0.0
        while not self._stopped.wait(POLL_S):
            waited_s = waited_s + POLL_S if time.monotonic() - self._looked > POLL_S and not clock.has_stopped() else 0.0
            if waited_s > LOST_S:
                self._store = None  # calls that come after this do without
                cause = f"the job's store has not answered for {LOST_S:.0f} s: rank 0 or its node is gone"
                self._leave(Verdict(self._rank, Exit.FAILED, cause, (), is_loss=True))

    def _heard(self) -> Verdict | None:
        if self._store is None or not self._store.check(["verdict"]):
            return None
        return _verdict(self._store.get("verdict"))

    def _where(self) -> Place:
        progress, ledger = self.progress, self._ledger
        return Place(progress.step, ledger.launched, progress.phase, progress.part, " ".join(filter(None, ledger.latest)))

    def _hang(self) -> Verdict | None:
        """That nothing has moved here for too long, and whose fault it is."""
        where, now, has_stopped = self._where(), time.monotonic(), self._clock.has_stopped()
        if where != self._place or has_stopped:
            self._place, self._since = where, now
            if self._told:
                self._tell("")
        stalled_s = now - self._since
        if stalled_s > STALL_S and not self._told:
            self._tell(json.dumps(where))
        if stalled_s < HANG_S or now < self._next_judgement:
            return None
        self._next_judgement = now + STALL_S
        places = self._places() if self._store is not None else {0: where}
        late = late_ranks(places)
        # A rank that tells nothing moves, or is gone: another verdict. One that is late and moves is slow: only it knows.
        if len(places) < self._size or self._rank not in late or where.phase in UNJUDGED:
            return None
        return Verdict(self._rank, Exit.HANG, f"no progress for {HANG_S:.0f} s: {describe_hang(places, late)}", tuple(late))

    def _tell(self, place: str) -> None:
        """The others where this rank stands still; empty: it goes on."""
        if self._store is not None:
            self._store.set(f"place/{self._rank}", place)
        self._told = bool(place)

    def _places(self) -> dict[int, Place]:
        """Of all ranks that stand still."""
        assert self._store is not None
        told = self._store.multi_get([f"place/{rank}" for rank in range(self._size)])
        return {rank: Place(*json.loads(place)) for rank, place in enumerate(told) if place}

    def _leave(self, verdict: Verdict) -> NoReturn:
        """End the process from the thread: the main one may wait for a collective for ever."""
        while not self._ending.acquire(timeout=POLL_S):
            if self._stopped.is_set():  # the main one is ending it
                sys.exit()
        with self._limited(verdict.code):
            self._report(verdict)
            self._fence(verdict)
            self._say(verdict)
            self._write(verdict, stacks=True)
            self._part(verdict)
        os._exit(verdict.code)


@contextlib.contextmanager
def _told_on_stderr() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"zaya.train: cannot write {error.filename or 'an exit record'}: {error.strerror}", file=sys.stderr, flush=True)


class Clock:
    """Whether this process itself has stood still since the last look (a suspended job, a laptop's lid): nobody is late for that."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def has_stopped(self) -> bool:
        last, self._last = self._last, time.monotonic()
        return self._last - last > PAUSED_S


class Neighbour:
    """The next rank, watched by this one, which itself shows that it is there to the one before."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._by, self._rank = store, rank, (rank + 1) % size
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # containers of a node share it, and have process numbers apart
        self._machine = f"{os.uname().nodename} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
        self._beats, self._seen, self._next_beat = 0, time.monotonic(), 0.0
        self._process: tuple[str, int] | None = None
        self._clock = Clock()
        store.set(f"process/{rank}", json.dumps([self._machine, os.getpid()]))

    def verdict(self) -> Verdict | None:
        """That it is gone, once that is sure."""
        now = time.monotonic()
        if self._clock.has_stopped():
            self._seen = now
        if now > self._next_beat:
            self._next_beat = now + STALL_S
            self._store.add(f"beats/{self._by}", 1)
            beats = self._store.add(f"beats/{self._rank}", 0)
            if beats != self._beats:
                self._beats, self._seen = beats, now
        if self._process is None and self._store.check([f"process/{self._rank}"]):
            self._process = tuple(json.loads(self._store.get(f"process/{self._rank}")))
        machine, pid = self._process or ("", 0)
        dead = machine == self._machine and not _lives(pid)
        if not dead and now - self._seen < LOST_S or self._store.check([f"left/{self._rank}"]):
            return None
        where = f"rank {self._rank}" + (f" on {machine.partition(' ')[0]}" if machine else "")
        why = "its process has ended without a word (killed? too little memory?)" if dead else f"no sign of it for {LOST_S:.0f} s"
        return Verdict(self._by, Exit.FAILED, f"{where} is gone: {why}", (self._rank,), is_loss=True,
                       pid=pid if machine == self._machine else 0)


def late_ranks(places: dict[int, Place]) -> list[int]:
    """Those in the earliest step with the fewest collectives, in the earliest micro-batch."""
    first = min((place.step, place.launched, place.part) for place in places.values())
    return [rank for rank, place in places.items() if (place.step, place.launched, place.part) == first]


def describe_hang(places: dict[int, Place], late: Sequence[int]) -> str:
    shown = " ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if late[8:] else "")
    subject = f"rank {shown} is" if len(late) == 1 else f"ranks {shown} are"
    others = [place for rank, place in places.items() if rank not in late]
    if not others:
        return f"every rank stands at {places[late[0]]}: a GPU or the network, not one rank's program"
    return f"{subject} behind, at {places[late[0]]}; the furthest is at {max(others)}"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _verdict(text: bytes) -> Verdict:
    by, code, cause, at_fault, is_loss, pid = json.loads(text)
    return Verdict(by, code, cause, tuple(at_fault), is_loss, pid)
