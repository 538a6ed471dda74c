"""Runs of zaya.train by fork: a process that has imported torch once, so that a run starts in 0.2 s and can be killed 200 times.

A test starts this module with `ForkServer`, and asks it for one run after the other, a line of JSON each way. Every rank of a run is a fork
that executes zaya.train as __main__; one of them may be told when to die. Deaths are real: SIGKILL, from outside after a delay, or of
the process by itself at a call that a thread of the saving makes. Knows nothing of a recipe.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("write", "fsync", "replace", "unlink", "rmdir", "mkdir", "posix_fadvise", "preadv")
"""Between two of them a save changes nothing on the disk but the existence of an empty file."""
HANG_S = 60.0  # a rank that has lost another must be gone long before


@dataclass(frozen=True)
class Death:
    """Of `rank`: `delay_s` after its first save began, or (if `call` is named) at its `count`-th call of that kind in a save or mirror;
    of a write, `share` of the bytes are written before."""

    rank: int = 0
    delay_s: float = 0.0
    call: str = ""
    count: int = 1
    share: float = 0.0


@dataclass(frozen=True)
class Ended:
    """By rank: exit codes, negative where a signal did it. `seconds`: from the death, or the start, to the end of the last rank."""

    codes: list[int]
    seconds: float


class ForkServer:
    """The test's end. `log`: where the ranks' output goes."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        with open(log, "ab") as output:
            self._process = subprocess.Popen([sys.executable, "-m", "tests.dist.fork_server"], stdin=subprocess.PIPE, cwd=ROOT,
                                             stdout=subprocess.PIPE, stderr=output, text=True, env=environment)

    def run(self, arguments: Sequence[str], *, ranks: int = 1, death: Death | None = None, calls: Path | None = None) -> Ended:
        """A run of zaya.train to its end. `calls`: a file that gets the name of every call that could have been a death."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": list(arguments), "ranks": ranks, "death": asdict(death) if death else None,
                   "calls": str(calls) if calls else ""}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"the server died; see {self.log}:\n{self.log.read_text()[-4000:]}"
        return Ended(**json.loads(answer))

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()  # it ends by itself
        self._process.wait()


# ------------------------------------------------------------------------------------------------------------------ the server


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a rank prints goes to the log
    with warnings.catch_warnings(action="ignore"):
        import megatron.core.parallel_state  # noqa: F401 - what a run imports late: once, here
        import torch

        import zaya.trainer  # noqa: F401
    torch.set_num_threads(1)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a fork of threads would hang"
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        death = Death(**request["death"]) if request["death"] else None
        print(json.dumps(asdict(run(request["arguments"], request["ranks"], death, request["calls"]))), file=answers, flush=True)


def run(arguments: list[str], ranks: int, death: Death | None, calls: str) -> Ended:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    heard, told = os.pipe()
    children = []
    began = time.monotonic()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            be_a_rank(arguments, rank, ranks, port, told, death if death and death.rank == rank else None, calls)
        children.append(child)
    os.close(told)
    codes: dict[int, int] = {}
    if death is not None and not death.call and os.read(heard, 1):  # nothing to read: it ended without a save
        time.sleep(death.delay_s)
        os.kill(children[death.rank], signal.SIGKILL)  # not waited for yet, so its number is still its own
    os.close(heard)
    while len(codes) < ranks:
        for rank, child in enumerate(children):
            if rank not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                began = time.monotonic() if codes[rank] == -signal.SIGKILL else began
        if codes and len(codes) < ranks and time.monotonic() - began > HANG_S:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.kill(child, signal.SIGABRT)
        time.sleep(0.002)
    return Ended([codes[rank] for rank in range(ranks)], time.monotonic() - began)


def be_a_rank(arguments: list[str], rank: int, ranks: int, port: int, told: int, death: Death | None, calls: str) -> None:
    """Never returns."""
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the server's requests are not a rank's
        if death is not None and not death.call:
            tell_of_saves(told)
        os.close(told) if death is None or death.call else None
        watch(death if death is not None and death.call else None, calls if rank == 0 else "")
        sys.argv = ["zaya.train", *arguments]
        runpy.run_module("zaya.train", run_name="__main__", alter_sys=True)  # leaves by os._exit itself unless all is well
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def tell_of_saves(told: int) -> None:
    from zaya.checkpoint import saver

    save = saver.save

    def telling(*args: Any, **kwargs: Any) -> Path:
        os.write(told, b"s")
        return save(*args, **kwargs)

    saver.save = telling


def watch(death: Death | None, calls: str) -> None:
    """Every call of a thread that saves or mirrors is counted, written down, or the last."""
    record = open(calls, "a", buffering=1) if calls else None

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        numbers = itertools.count(1)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith(("save-", "mirror")):
                number = next(numbers)
                if record is not None:
                    print(name, file=record)
                if death is not None and name == death.call and number == death.count:
                    if name == "write":
                        function(args[0], memoryview(args[1])[: int(len(args[1]) * death.share)])
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return watched

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


if __name__ == "__main__":
    serve()
