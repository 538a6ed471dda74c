"""Why a process of a job ended: RUN/exit/ATTEMPT/rank-R.json, one file per rank and start, for whoever starts the job again.

torchrun turns every worker's exit code into 1, so the codes go by file. Standard library only: the supervisor reads them without torch.
"""

from __future__ import annotations

import enum
import json
import os
import re
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zaya.cli import INTERRUPTED, replace_text


class Exit(enum.IntEnum):
    """Exit codes of zaya.train, of its workers and of the supervisor; 0, 2 and 4 of tools.preflight, too."""

    DONE = 0
    FAILED = 1
    """A bug (its traceback is printed), a process that is gone, or a last state that could not be saved."""
    REFUSED = 2
    """Bad recipe, arguments or corpus, a run directory that cannot be written, too little memory."""
    PREEMPTED = 3
    UNHEALTHY = 4
    """The node: a device that fails its probes, or a process that cannot be killed."""
    HANG = 5
    NUMERICAL = 6
    UNREADABLE = 7
    """No checkpoint to start from can be read."""
    NO_PROGRESS = 8
    INTERRUPTED = INTERRUPTED


ACTIONS = {
    Exit.DONE: "nothing is left to do",
    Exit.FAILED: "start it again: it goes on from its newest checkpoint",
    Exit.REFUSED: "mend what the cause names; started again as it is, it would end the same",
    Exit.PREEMPTED: "start it again: it goes on from here",
    Exit.UNHEALTHY: "take the node out; python -m tools.preflight says what is wrong with its GPUs",
    Exit.HANG: "start it again: it goes on from its newest checkpoint; leave out the node of a rank that is late again",
    Exit.NUMERICAL: "start it again from a checkpoint before that: --checkpoint.resume=PATH",
    Exit.UNREADABLE: "python -m tools.inspect_checkpoint RUN --verify names what is damaged",
    Exit.NO_PROGRESS: "do not queue it again before somebody has looked at the causes",
    Exit.INTERRUPTED: "start it again: it goes on from its newest checkpoint",
}
"""What to do after it, by code."""
REPORTS = "ZAYA_EXIT_RECORDS"
"""In the environment of a supervised job: the folder of its node in which the supervisor waits for the records of this start."""
_ATTEMPT = re.compile(r"[0-9]{4,9}")


@dataclass(frozen=True)
class ExitRecord:
    """One process' end. `at_fault`: the ranks that it happened to, as far as this one knows; this one itself, or those that ended it."""

    rank: int
    code: int
    step: int
    """Optimizer steps done."""
    phase: str
    cause: str
    at_fault: tuple[int, ...] = ()
    action: str = ""
    host: str = field(default_factory=socket.gethostname)
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""

    def write(self, folder: Path) -> None:
        """FOLDER/rank-R.json, atomically; the folder is made. OSError: it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / f"rank-{self.rank}.json", json.dumps(asdict(self)) + "\n")

    def report(self) -> None:
        """To the supervisor, if there is one: whatever becomes of the run directory. OSError: it cannot be written."""
        if os.environ.get(REPORTS):
            self.write(Path(os.environ[REPORTS]))


def attempt_path(run_dir: Path, attempt: int) -> Path:
    return run_dir / "exit" / f"{attempt:04d}"


def read_records(folder: Path) -> list[ExitRecord]:
    """Of one start, by rank; what is no record is left out."""
    records = []
    for path in folder.glob("rank-*.json"):
        try:
            fields = json.loads(path.read_text())
            records.append(ExitRecord(**{**fields, "at_fault": tuple(fields["at_fault"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(records, key=lambda record: record.rank)


def attempts(run_dir: Path) -> list[int]:
    """Numbers of the starts that left records, ascending. OSError: they cannot be looked at."""
    folder = run_dir / "exit"
    return sorted(int(path.name) for path in folder.iterdir() if _ATTEMPT.fullmatch(path.name)) if folder.is_dir() else []


def next_attempt(run_dir: Path) -> int:
    return max(attempts(run_dir), default=0) + 1
