"""Notice that the job must go: SIGTERM (Slurm, Kubernetes, torchrun) or SIGUSR1. Standard library only.

In the training loop the handler only notes it; the loop looks after every step, so that a step is never cut in two. Before and after the
loop there is nothing to save, and the process leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

GRACE_S = 25.0
"""From the signal to the exit, at most: torchrun kills its workers 30 s after it has passed SIGTERM on."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 3
"""Exit code of a job that a signal ended and that can be started again without loss."""


def leave_by_signal(program: str) -> None:
    """Outside of every `Preemption` a signal is the end, in order: one line, of rank 0, and the exit code of a preempted job."""

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come inside one.
            os.write(2, f"{program}: {signal.Signals(number).name}: nothing to save; start it again to go on\n".encode())
        os._exit(PREEMPTED)

    for number in SIGNALS:
        signal.signal(number, leave)


class Preemption:
    """For the length of a `with` block. Active: `signal` is the name of the first signal that came, or empty; after one that came, to this
    process or (`learn`) to another of the job, the signals stay ignored. Not active: they end the process as they end any, since exit
    code 3 would say that the state is saved."""

    def __init__(self, active: bool = True) -> None:
        self.signal = ""
        self._active = active
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._before = {number: signal.signal(number, self._note if self._active else signal.SIG_DFL) for number in SIGNALS}
        return self

    def learn(self) -> None:
        """The job must go, say other ranks, whether or not this one was told."""
        self.signal = self.signal or "a signal to another rank"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        # Once it is known that the job must go, whoever says so again (torchrun does) must not end it before it has left in order.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.signal else handler)  # type: ignore[arg-type]  # what signal.signal gave
