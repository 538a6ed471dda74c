"""Start a job, and start it again when it fails: from its newest checkpoint, until it is done, or starting it again makes no sense.

    python -m zaya.resilience.supervisor [--health auto|always|never] -- torchrun ... -m zaya.train RECIPE.toml [--section.key=value ...]

One runs on each node, above that node's torchrun, and looks before every start whether the node is fit (zaya/resilience/health.py).
Every rank of the node leaves it an exit record, and what has ended one rank all ranks know (zaya/resilience/watchdog.py), so all nodes
come to the same decision. Knows the recipe and what a start has left on the disk; no torch, no GPU, nothing that fails with the job.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from zaya import runtime
from zaya.checkpoint.directory import MANIFEST, complete_steps, local_root, step_path
from zaya.checkpoint.errors import CheckpointError
from zaya.cli import Parser, count, positive, replace_text
from zaya.config import Recipe, check_recipe, load_recipe
from zaya.metrics import read_rows
from zaya.preemption import AGAIN_S
from zaya.resilience.exits import ACTIONS, REPORTS, Exit, ExitRecord, attempt_path, attempts, read_records
from zaya.resilience.guard import MAX_SKIPPED
from zaya.resilience.health import InterruptedCheck, check_node, gpu_devices, host_name, visible_gpus

RESTARTED = (Exit.FAILED, Exit.HANG, Exit.NUMERICAL)
"""Ends after which the job is started again; after all others the supervisor ends with the same code."""
MOST_PAUSE_S = 300.0
STOP_S = 60.0
"""From a signal to the kill: torchrun gives its workers 30 s."""
ORPHAN_S = 10.0
"""What a job leaves behind may end by itself that long after it."""
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class End(NamedTuple):
    """Of one start."""

    code: Exit
    cause: str
    step: int = -1
    """Optimizer steps done; -1: no rank has said."""
    has_opened: bool = False
    """It came so far that it had set aside what it does not go on from."""


class Job(NamedTuple):
    """What a command starts."""

    recipe: str
    overrides: list[str]
    options: dict[str, str]
    """Of the launcher: {"nproc-per-node": "8"}."""

    @classmethod
    def of(cls, command: Sequence[str]) -> Job:
        """ValueError: it does not run zaya.train."""
        for index in range(len(command) - 2):
            if list(command[index: index + 2]) == ["-m", "zaya.train"]:
                return cls(command[index + 2], list(command[index + 3:]), dict(_options(command[:index])))
        raise ValueError("the command does not run `-m zaya.train RECIPE.toml`; see --help")

    def read(self) -> Recipe:
        """ValueError: the recipe is bad, or cannot run on the ranks that the launcher is told to start; where it is not told on its command
        line, in plain numbers, on any."""
        recipe = load_recipe(self.recipe, self.overrides)
        numbers = [self.options.get("nproc-per-node", ""), self.options.get("nnodes", os.environ.get("PET_NNODES", "1"))]
        if not all(number.isdecimal() for number in numbers):
            check_recipe(recipe)
        elif (ranks := math.prod(int(number) for number in numbers)) < 1:
            raise ValueError(f"--nnodes {numbers[1]} --nproc-per-node {numbers[0]} start no process")
        else:
            recipe.validate(ranks)
        return recipe


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of --name=value and --name value, with - or _ in the name."""
    for word, following in zip(words, [*words[1:], ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            yield name[2:].replace("_", "-"), value if equals else following


def devices_of(job: Job, recipe: Recipe) -> tuple[str, ...]:
    """Those of this node that the job's ranks will use: a GPU for each, where the recipe asks for GPUs or torch sees any; it is started to
    tell, where a driver lists one."""
    visible = 0 if recipe.train.device == "cpu" else visible_gpus()
    if not visible and recipe.train.device != "cuda":
        return ("cpu",)
    ranks = job.options.get("nproc-per-node", os.environ.get("PET_NPROC_PER_NODE", "1"))  # or a number's name: gpu, auto
    return gpu_devices(int(ranks) if ranks.isdecimal() else max(visible, 1))


def end_of(status: int, records: Sequence[ExitRecord]) -> End:
    """How a start ended, from its exit status and what its ranks have written."""
    if not records:
        if status != Exit.FAILED and status in set(Exit):  # a bare zaya.train, or torchrun that refuses its own arguments
            return End(Exit(status), f"the command's own exit code is {status}: its words are above" if status else "the run is finished")
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        return End(Exit.FAILED, f"{how}, and no rank has left a record")
    faulty = [record for record in records if record.rank in record.at_fault] or [record for record in records if record.code]
    if status and not faulty:
        return End(Exit.FAILED, f"exit code {status}, though every rank that left a record was done", records[0].step)
    record = (faulty or list(records))[0]
    code = Exit(record.code) if record.code in set(Exit) else Exit.FAILED
    ends_well = code in (Exit.DONE, Exit.PREEMPTED)
    where = "" if ends_well else f" (rank {record.rank} on {record.host}, step {record.step}, {record.phase})"
    return End(code, f"{record.cause}{where}", record.step, record.phase != "start")


class Rollbacks:
    """Numerical faults are answered by going back: a fault of the hardware does not come again, one of the recipe does, at about the same
    step. Then to an older checkpoint than before, and after `most` times not again."""

    def __init__(self, most: int) -> None:
        self._most, self._step = most, -1
        self._targets: list[int] = []

    def next(self, first: int, last: int, before: Callable[[int], int]) -> int:
        """The step to go back to from a fault whose steps, `first` to `last`, have updated nothing; -1: it makes no sense. `before`: the
        newest checkpoint before a step, or -1."""
        if last > self._step + MAX_SKIPPED:  # another fault
            self._targets = []
        self._step = max(last, self._step)
        target = before(min([first, *self._targets])) if len(self._targets) < self._most else -1
        if target >= 0:
            self._targets.append(target)
        return target

    def __str__(self) -> str:
        steps = " and ".join(f"step {step}" for step in self._targets)
        return f"going back to {steps} has not cured it" if steps else "there is no checkpoint of before that to go back to"


@dataclass
class Supervisor:
    """A job's life. `give_up`: starts in a row that save no new checkpoint, after which it ends; `pause_s`: before a start after the first,
    doubled with each of those, up to MOST_PAUSE_S."""

    command: list[str]
    run_dir: Path
    give_up: int
    pause_s: float
    local: Path | None = None
    """This node's own tier of checkpoints."""
    devices: tuple[str, ...] = ()
    """Probed before every start."""
    report: Path | None = None
    """Where it leaves a line of JSON when it ends: {"code", "host", "cause"}."""
    signal: str = ""
    """The first that came; the job is told, and not started again."""
    _process: subprocess.Popen[bytes] | None = None
    _told: float = 0.0

    def run(self) -> Exit:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        runtime.raise_open_files()  # torchrun's store has two connections of every rank, and takes its limit from here
        # Workers lead sessions of their own; if torchrun is killed they become children of this process, and can be found.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        fruitless, target, rollbacks, has_saved = 0, -1, Rollbacks(self.give_up), False
        start = 0
        while True:
            start += 1
            unfit = self._unfit()
            if self.signal:
                return self._ends(Exit.INTERRUPTED)
            if unfit:
                return self._ends(Exit.UNHEALTHY, unfit)
            before = self._saved()
            began = time.monotonic()
            end = self._start([f"--checkpoint.resume={step_path(self._checkpoints, target)}"] if target >= 0 else
                              ["--checkpoint.resume=auto"] if has_saved else [])
            say(f"start {start} ended after {time.monotonic() - began:.0f} s with {end.code} ({end.code.name.lower()}): {end.cause}")
            if self.signal and end.code in RESTARTED:
                # No rank has said: it was killed, or the signal came before there was anything to save.
                return self._ends(end.code if end.step >= 0 else Exit.INTERRUPTED)
            if end.code not in RESTARTED:
                return self._ends(end.code, end.cause if end.code == Exit.UNHEALTHY else "")
            has_new = bool(self._saved().items() - before.items())
            fruitless, has_saved = (0, True) if has_new else (fruitless + 1, has_saved)
            if has_new or end.has_opened:  # a start that goes back and dies before has not gone back
                target = -1
            if end.code == Exit.NUMERICAL:
                target = rollbacks.next(self._first_skipped(end.step), end.step, self._before)
                if target < 0:
                    say(f"{rollbacks}: {self._causes()}")
                    return self._ends(Exit.NUMERICAL)
            elif fruitless >= self.give_up:
                say(f"no new checkpoint in {fruitless} starts in a row: given up; {self._causes()}")
                return self._ends(Exit.NO_PROGRESS)
            self._pause(min(self.pause_s * 2 ** max(fruitless - 1, 0), MOST_PAUSE_S), fruitless, target)

    def _unfit(self) -> str:
        """What is wrong with this node, if anything is."""
        if not self.devices or self.signal:
            return ""
        began = time.monotonic()
        say(f"probing {', '.join(self.devices)} of {host_name()}, for about half a minute (--health)")
        try:
            faults = check_node(self.devices, is_over=lambda: bool(self.signal)).faults
        except InterruptedCheck:
            return ""
        except OSError as error:
            faults = (f"its devices cannot be probed: {error.strerror}",)
        for fault in faults:
            say(f"{host_name()}: {fault}")
        say(f"probed in {time.monotonic() - began:.0f} s: {'unfit; --health never starts the job all the same' if faults else 'fit'}")
        return faults[0] if faults else ""

    def _ends(self, code: Exit, cause: str = "") -> Exit:
        """Say what is left, and what to do; leave the report."""
        if self.report is not None:
            try:
                replace_text(self.report, json.dumps({"code": code, "host": host_name(), "cause": cause}) + "\n")
            except OSError as error:
                say(f"cannot write --report {self.report}: {error.strerror}")
        if code == Exit.DONE:
            return code
        newest = self._before(sys.maxsize)
        state = f"the newest checkpoint is of step {newest}" if newest >= 0 else "there is no checkpoint"
        why = f"{self.signal}: " if self.signal else ""
        what = f" of {host_name()}: {cause}" if cause else ""
        say(f"{why}not started again: exit code {code} ({code.name.lower()}){what}; {state}; {ACTIONS[code]}")
        return code

    def _causes(self) -> str:
        folder = self.run_dir / "exit"
        return f"the causes are in {folder}" if folder.is_dir() else "the causes are above"

    @property
    def _checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def _saved(self) -> dict[Path, int]:
        """When the manifest of each complete checkpoint was written, on this node's own tier too, by its path; nothing where they cannot
        be looked at."""
        written = {}
        for root in filter(None, (self._checkpoints, self.local)):
            with contextlib.suppress(CheckpointError, OSError):
                for step in complete_steps(root):
                    written[step_path(root, step)] = (step_path(root, step) / MANIFEST).stat().st_mtime_ns
        return written

    def _before(self, step: int) -> int:
        """The newest complete checkpoint before a step, of the tier that all nodes share; -1: none, or they cannot be looked at."""
        with contextlib.suppress(CheckpointError):
            return max((saved for saved in complete_steps(self._checkpoints) if saved < step), default=-1)
        return -1

    def _first_skipped(self, step: int) -> int:
        """The first of the steps in a row, up to this one, that have updated nothing, whichever start took them."""
        first = step + 1
        with contextlib.suppress(ValueError):
            committed = {row["step"]: row.get("committed", True) for row in read_rows(self.run_dir / "metrics.jsonl")[0]}
            while not committed.get(first - 1, True):
                first -= 1
        return first if first <= step else step - MAX_SKIPPED + 1  # without a record: those of this start

    def _attempts(self) -> set[int]:
        with contextlib.suppress(OSError):
            return set(attempts(self.run_dir))
        return set()

    def _start(self, more: Sequence[str]) -> End:
        """One start, with more overrides, to its last process' end."""
        known = self._attempts()
        try:
            with tempfile.TemporaryDirectory(prefix="zaya-exit-", ignore_cleanup_errors=True) as folder:
                status = self._run([*self.command, *more], folder)
                left = end_leftovers()  # they may have records to leave, too
                # RUN's own where there was no room for a report.
                records = read_records(Path(folder)) or [record for new in self._attempts() - known
                                                         for record in read_records(attempt_path(self.run_dir, new))]
                end = end_of(status, records)
        except OSError as error:
            return End(Exit.REFUSED, f"cannot run {error.filename or self.command[0]}: {error.strerror}")
        return End(Exit.UNHEALTHY, f"{end.cause}; its process {left[0]} is still there, {STOP_S:.0f} s after its kill") if left else end

    def _run(self, command: Sequence[str], reports: str) -> int:
        """Its exit status. OSError: it cannot be started."""
        self._process = subprocess.Popen(command, env={**os.environ, REPORTS: reports}, start_new_session=True)
        if self.signal:  # it came in between
            self._process.send_signal(signal.SIGTERM)
        while (status := self._process.poll()) is None:
            time.sleep(0.1)
            if self._told and time.monotonic() - self._told > STOP_S:
                kill_descendants()
            if self._told and time.monotonic() - self._told > 2 * STOP_S:
                return -signal.SIGKILL  # it does not end even so
        self._process = None
        return status

    def _pause(self, seconds: float, fruitless: int, target: int) -> None:
        step = self._before(sys.maxsize) if target < 0 else target
        newest = "its newest checkpoint" if self._saved() else "the beginning"
        origin = f"the checkpoint of step {step}" if step >= 0 and (target >= 0 or not self.local) else newest
        count = f" ({fruitless} of {self.give_up} in a row without a new checkpoint)" if fruitless else ""
        say(f"starting again in {seconds:g} s from {origin}{count}")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.signal:
            time.sleep(0.1)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """torchrun passes SIGTERM on, and no other signal to all; a second Ctrl-C does not wait."""
        again = number == signal.SIGINT and self.signal and time.monotonic() - self._told > AGAIN_S
        if not self.signal:
            self.signal, self._told = signal.Signals(number).name, time.monotonic()
            if self._process is not None:
                self._process.send_signal(signal.SIGTERM)
        elif again:
            kill_descendants()


def descendants() -> list[int]:
    """Processes below this one, without dead ones that nobody has waited for."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)

    def below(pid: int) -> bool:
        while pid in parents:
            pid = parents[pid]
            if pid == os.getpid():
                return True
        return False

    return sorted(filter(below, parents))


def kill_descendants() -> None:
    for pid in descendants():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def end_leftovers() -> list[int]:
    """End what a job has left running; what of it cannot be killed (a GPU's driver holds it)."""
    began = time.monotonic()
    while (left := descendants()) and time.monotonic() - began < ORPHAN_S + STOP_S:
        if time.monotonic() - began > ORPHAN_S:
            kill_descendants()
        time.sleep(0.1)
    with contextlib.suppress(ChildProcessError):  # no more
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return left


def say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(f"zaya.resilience.supervisor: {line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    parser = Parser("zaya.resilience.supervisor", description="Run a job of zaya.train, and start it again when it fails.",
                    usage="python -m zaya.resilience.supervisor [--give-up N] [--pause SECONDS] [--health WHEN] [--report FILE] -- "
                          "torchrun ... -m zaya.train RECIPE.toml [--section.key=value ...]",
                    epilog=f"Exit codes: {', '.join(f'{code} {code.name.lower()}' for code in Exit)}. Started again after "
                           f"{', '.join(map(str, map(int, RESTARTED)))}. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the job, its state saved.")
    parser.add_argument("--give-up", type=count, default=3, metavar="N",
                        help="give up after N starts in a row that saved no new checkpoint (3)")
    parser.add_argument("--pause", type=positive, default=5.0, metavar="SECONDS",
                        help="before it is started again (5); doubled with each start that saved none")
    parser.add_argument("--health", choices=["auto", "always", "never"], default="auto",
                        help="probe this node's devices before each start (half a minute); auto: where they are GPUs. Unfit: 4")
    parser.add_argument("--report", type=Path, metavar="FILE", help="leave {code, host, cause} there as JSON when it ends")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what starts the job")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    try:
        job = Job.of(command)
        recipe = job.read()
    except ValueError as error:
        return parser.refused(error)
    local = local_root(recipe.run.dir, recipe.checkpoint.local_dir) if recipe.checkpoint.local_dir else None
    devices = () if arguments.health == "never" else devices_of(job, recipe)
    if arguments.health == "auto" and devices == ("cpu",):
        devices = ()
    return Supervisor(command, Path(recipe.run.dir), arguments.give_up, arguments.pause, local, devices, arguments.report).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
