"""Persistent worker processes for distributed tests: torch is imported once per process, not once per test.

The parent (pytest) owns the processes and one pipe to each. A call goes: the parent pickles (fn, args) and sends it to every
worker; each runs fn(rank, world_size, *args) in the pool's gloo group and sends back ("ok", result) or ("error", traceback).
The parent waits for all of them, but for the rest only briefly once one has failed, because they may sit in a collective
that the failed rank never joined. A pool with a worker that did not answer is killed and starts anew at the next call.

Tensors travel by value. Must know nothing of zaya: whatever a test needs, its function imports.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

START_TIMEOUT_S = 120.0  # importing torch takes 2 to 10 s a process, more when eight start on two cores
GRACE_S = 3.0  # for the other ranks, after one has failed


class WorkerError(RuntimeError):
    """A rank raised, died or did not answer. `rank` is the first one that did; the message starts with its traceback."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class WorkerPool:
    """`world_size` processes in one gloo group. Calls: run as often as you like, close at the end; all from one process."""

    def __init__(self, world_size: int, timeout_s: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._calls = 0
        self._renew_group = False
        self._workers: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> list[Any]:
        """[fn(rank, world_size, *args) for every rank]. `fn` is a function of a module, arguments and results can be pickled.

        WorkerError if a rank raises, dies or exceeds `timeout_s`. A function may destroy the process group; the next call has a new one.
        """
        timeout_s = timeout_s or self.timeout_s
        call = pickle.dumps((fn, args))
        if not self._workers:
            self._start()
        self._calls += 1
        for pipe in self._pipes:
            pipe.send((self._calls, self._renew_group, call))
        self._renew_group = False
        results, failures = self._collect(timeout_s)
        missing = [rank for rank in range(self.world_size) if rank not in results and rank not in failures]
        if not failures:
            failures = {rank: f"rank {rank} did not answer within {timeout_s:g} s; it was at\n{self._stack(rank)}" for rank in missing}
        if not failures:
            return [results[rank] for rank in range(self.world_size)]
        self._renew_group = True  # a rank that failed may have left a message of the old group behind
        if missing or not all(worker.is_alive() for worker in self._workers):
            self.close()
        raise WorkerError("\n".join(failures.values()), rank=next(iter(failures)))

    def _collect(self, timeout_s: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results and failures by rank, failures in the order they happened but deaths first."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        pending = dict(zip(self._pipes, range(self.world_size), strict=True))
        deadline = time.monotonic() + timeout_s
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    self._workers[rank].join()
                    # First, whenever it is seen: the ranks that talked to it raise too, for no fault of theirs.
                    failures = {rank: f"rank {rank} died with exit code {self._workers[rank].exitcode}", **failures}
                    continue
                if kind == "ok":
                    results[rank] = pickle.loads(value)
                else:
                    failures[rank] = f"rank {rank} of {self.world_size} raised\n{value}"
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        return results, failures

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch hangs in its threads
        self._folder = tempfile.TemporaryDirectory(prefix="worker-pool-")
        self._renew_group = False
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.world_size, theirs, self._folder.name), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        started, failures = self._collect(START_TIMEOUT_S)
        if len(started) < self.world_size:
            self.close()
            raise WorkerError("\n".join(failures.values()) or f"{self.world_size} workers did not start within {START_TIMEOUT_S:g} s", -1)

    def _stack(self, rank: int) -> str:
        """Where a hung rank is: its handler of SIGUSR1 writes the stack of its main thread."""
        assert self._folder is not None
        os.kill(self._workers[rank].pid or 0, signal.SIGUSR1)
        time.sleep(0.2)  # for the handler, which runs without the interpreter's lock
        return (Path(self._folder.name) / f"stack-{rank}").read_text()

    def close(self) -> None:
        """Kill the workers. The next run starts new ones."""
        for worker in self._workers:
            worker.kill()
        for worker, pipe in zip(self._workers, self._pipes, strict=True):
            worker.join()
            pipe.close()
        self._workers, self._pipes = [], []
        if self._folder:
            self._folder.cleanup()
            self._folder = None


class Pools:
    """One WorkerPool per world size, started when first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, WorkerPool] = {}

    def __getitem__(self, world_size: int) -> WorkerPool:
        if world_size not in self._pools:
            self._pools[world_size] = WorkerPool(world_size)
        return self._pools[world_size]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _work(rank: int, world_size: int, pipe: Connection, folder: str) -> None:
    """A worker's life: join the group, then call after call until it is killed or the parent is gone."""
    # One thread each: the ranks share few cores, and sums must not depend on how many are free. Names and loopback: what torchrun sets.
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    stack: IO[str] = open(Path(folder) / f"stack-{rank}", "w")  # open as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    import torch

    torch.set_num_threads(1)
    _join_group(rank, world_size, folder, call=0)
    pipe.send(("ok", pickle.dumps(None)))
    while True:
        try:
            number, renew_group, call = pipe.recv()
        except EOFError:
            return
        try:
            if renew_group:
                _leave_group()
            elif "deepspeed" not in sys.modules:  # which keeps the groups that it makes first
                _leave_subgroups()
            if not torch.distributed.is_initialized():
                _join_group(rank, world_size, folder, call=number)
            fn, args = pickle.loads(call)
            answer: tuple[str, str | bytes] = ("ok", pickle.dumps(fn(rank, world_size, *args)))
        except Exception:  # noqa: BLE001 - whatever a test function raises is the parent's to report
            answer = ("error", traceback.format_exc())
        pipe.send(answer)


def _join_group(rank: int, world_size: int, folder: str, call: int) -> None:
    import torch.distributed as dist

    # A file as the store: no port to find, so none to lose to another process. A new one per group: a store remembers its dead.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{call}", rank=rank, world_size=world_size)


def _leave_group() -> None:
    import torch.distributed as dist

    _leave_subgroups()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_subgroups() -> None:
    """All that earlier calls made: a group of gloo has three threads, one of which wakes a hundred times a second."""
    import torch.distributed as dist

    megatron_groups = sys.modules.get("megatron.core.parallel_state")
    if megatron_groups:
        megatron_groups.destroy_model_parallel()
    if dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map.copy():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    gc.collect()  # trainers and meshes are in cycles, and hold groups
    gc.freeze()  # what is left are modules: the next collection need not look at them again
