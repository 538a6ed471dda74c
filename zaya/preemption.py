"""What a process does when the job must go (SIGTERM: Slurm, Kubernetes, torchrun; SIGUSR1; Ctrl-C; SIGHUP: a terminal that
closes). Standard library only.

In the training loop the handler only notes it: the loop looks between steps, so that a step is never cut in two; only a second Ctrl-C does
not wait. What is made before it (a corpus) is left at once, and cleaned up.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import FrameType

GRACE_S = 25.0
"""From the signal to the exit, at most: torchrun kills its workers 30 s after it has passed SIGTERM on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_S = 2.0
"""A Ctrl-C sooner after the first signal is not another one: a launcher may pass on what the terminal has sent its processes already."""


class Preemption:
    """For the length of a `with` block, if it is active: `signal` is the name of the first signal that came, or empty. A Ctrl-C more than
    AGAIN_S after it is a KeyboardInterrupt. After one that came, to this process or (`learn`) to another of the job, the signals stay
    ignored."""

    def __init__(self, active: bool = True) -> None:
        self.signal = ""
        self._active = active
        self._noted = 0.0  # when, by the monotonic clock
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if self._active and threading.current_thread() is threading.main_thread():  # only there can handlers be set
            # Ignored behind a shell's &, or by nohup.
            terminals = [number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in (*SIGNALS, *terminals)}
        return self

    def learn(self) -> None:
        """The job must go, say other ranks, whether or not this one was told."""
        self._came("a signal to another rank")

    def _came(self, name: str) -> None:
        if not self.signal:
            self.signal, self._noted = name, time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and time.monotonic() - self._noted > AGAIN_S:
            raise KeyboardInterrupt
        if not self.signal and os.environ.get("RANK", "0") == "0":  # print and logging are not for a handler: it may have come inside them
            with contextlib.suppress(OSError):  # a full disk must not cost the state
                os.write(2, f"\n{signal.Signals(number).name}: the run ends as soon as its state is saved\n".encode())
        self._came(signal.Signals(number).name)

    def __exit__(self, *_: object) -> None:
        # Once it is known that the job must go, whoever says so again (torchrun does) must not end it before it has left in order.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.signal else handler)  # type: ignore[arg-type]  # what signal.signal gave


def end_with_parent() -> None:
    """A process of a pool calls this first: it ends when its parent does, however that ends (a kill, no memory), instead of waiting for
    work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """A signal that would end the process at once leaves the `with` block as a KeyboardInterrupt first: what the block cleans up is cleaned
    up. For Python code: a handler waits until a call of a library in C++ or Rust returns."""
    came: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for other in mine:  # torchrun sends it again: the cleaning up goes on
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    mine = [number for number in (*SIGNALS, signal.SIGHUP) if in_main_thread and signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, leave)
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])
