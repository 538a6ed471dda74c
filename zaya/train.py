"""The torchrun entry: `torchrun --nproc-per-node N -m zaya.train RECIPE.toml [--section.key=value ...]`.

Turns a command line into a Trainer and its end into an exit code: 0 done, 1 a bug (its traceback), another rank that is gone, or a last
state that could not be saved, 2 bad recipe, arguments or corpus, a run directory that cannot be written, or too little memory, 3 preempted
by a signal (Ctrl-C is one), the state saved, 5 a hang, 6 steps in a row that update nothing, 7 no checkpoint to start from can be read, 130
Ctrl-C, once torch is imported, where there is nothing to save (no loop, checkpoint.interval = 0), or a second one in the loop (one clear
line for all but a bug, nothing half-written). RUN/exit/ATTEMPT/rank-R.json says the same (zaya/resilience/exits.py), but of a start that
was refused, or ended before its processes had met. Another signal outside of the training loop ends it as any process; of a corpus that is
being made nothing is left.
"""
# ruff: noqa: E402  # settings first, then torch

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from zaya import runtime

if __name__ == "__main__":
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # closed (>&-): the next file would get its number, and what is printed with it
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w", closefd=False))

# HIP reads its variables as torch loads: before the imports below.
SETTINGS = runtime.start("zaya.train") if __name__ == "__main__" else []

import torch
from tqdm import tqdm

from zaya.checkpoint.directory import free_aside, set_aside, sync_directory
from zaya.checkpoint.errors import CheckpointError
from zaya.cli import replace_text
from zaya.config import Recipe, load_recipe, recipe_from_tables
from zaya.data.corpus import CorpusError
from zaya.metrics import MetricsWriter
from zaya.parallel.mesh import Mesh, close_mesh, open_mesh, rank_from_environment, world_size_from_environment
from zaya.resilience.exits import ACTIONS, Exit, ExitRecord
from zaya.resilience.guard import NumericalFault
from zaya.resilience.watchdog import Watchdog
from zaya.resume import will_load_weights
from zaya.shard import Layout
from zaya.tiers import Tiers, agreed, newest_recipe, objects
from zaya.trainer import Trainer, open_data

USAGE = """usage: torchrun --nproc-per-node N -m zaya.train RECIPE.toml [--section.key=value ...]

Train the run that a recipe describes, or go on with it where it stopped. `python -m zaya.config RECIPE.toml` prints every key."""
RANK_0_S = 10.0  # a rank's start may take that much longer than another's
log = logging.getLogger("zaya")


def check_run_directory(recipe: Recipe) -> None:
    """ValueError: run.dir holds the run of another recipe or a file in a directory's place, or cannot be looked at. Writes nothing."""
    run_dir = Path(recipe.run.dir)
    try:
        for path in (run_dir, run_dir / "logs", run_dir / "checkpoints", *sorted((run_dir / "checkpoints").glob("step-[0-9]*"))):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path} is in the place of a directory; move it away, or use another run.dir")
        saved = recipe_of_run(run_dir, Tiers.of(recipe))
    except OSError as error:
        raise ValueError(f"cannot read run.dir = {recipe.run.dir!r}: {error.strerror}") from None
    if saved and recipe.checkpoint.resume == "auto" != saved.checkpoint.resume != "never" and not any(Tiers.of(recipe).steps()):
        raise ValueError(f"{run_dir} started from checkpoint.resume = {saved.checkpoint.resume!r} and has no checkpoint of its own yet; "
                         'start it with that again, with "never", or use another run.dir')
    theirs, ours = (saved or recipe).identity(), recipe.identity()
    for key, value in ours.items():
        if theirs[key] != value:
            raise ValueError(f"{recipe.run.dir} holds another run: its {key} = {theirs[key]!r}, this recipe's is {value!r}; "
                             "use another run.dir, or the recipe it was made with")


def recipe_of_run(run_dir: Path, tiers: Tiers) -> Recipe | None:
    """The recipe of a directory's run: recipe.toml or, if that is gone, what its newest checkpoint says. None: no run is there."""
    if (run_dir / "recipe.toml").exists():
        return load_recipe(run_dir / "recipe.toml")
    tables = newest_recipe(tiers)
    if tables is not None:
        return recipe_from_tables(tables)
    record = run_dir / "metrics.jsonl"
    if record.is_file() and record.stat().st_size:
        raise ValueError(f"{run_dir} holds metrics.jsonl but no recipe.toml to tell whose run it is; "
                         "put recipe.toml back, move the file away, or use another run.dir")
    return None


def open_record(recipe: Recipe, mesh: Mesh, step: int) -> MetricsWriter | None:
    """The record of a run that was here before, on rank 0, locked and checked; nothing is changed yet. ValueError: another process writes
    it, or it is not this run's."""
    path = Path(recipe.run.dir) / "metrics.jsonl"
    try:
        return MetricsWriter(path, resume_step=step) if mesh.rank == 0 and path.exists() else None
    except OSError as error:
        raise ValueError(f"cannot write run.dir = {recipe.run.dir!r}: {error.filename or path}: {error.strerror}") from None


def keep_record(recipe: Recipe, mesh: Mesh, step: int, record: MetricsWriter | None) -> Path | None:
    """Copy the record to a new RUN/set-aside-K (rank 0 does, and returns it), where checkpoints beyond `step` are on any tier of any node,
    or the run starts over. Before the first of them moves: until the last has moved the record is whole, and from then on this copy is.

    All ranks; `record`: what `open_record` found. ValueError, on every rank: it cannot be written, and nothing has changed.
    """
    tiers = Tiers.of(recipe)
    goes_back = any(objects(agreed(lambda: any(later > step for steps in tiers.steps() for later in steps), mesh), mesh))
    path = Path(recipe.run.dir) / "metrics.jsonl"

    def keep() -> Path | None:
        if record is None or not (goes_back or step == 0) or record.is_empty:
            return None
        aside = free_aside(path.parent)
        try:
            aside.mkdir()
            with open(path, "rb") as ours, open(aside / f"{path.name}.tmp", "xb") as copy:
                shutil.copyfileobj(ours, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.replace(aside / f"{path.name}.tmp", aside / path.name)
            sync_directory(aside)
            sync_directory(path.parent)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            raise ValueError(f"cannot write {aside}: {error.strerror}; without a copy of {path.name} nothing is set aside") from None
        return aside

    return agreed(keep, mesh)


def open_run_directory(recipe: Recipe, mesh: Mesh, step: int, record: MetricsWriter | None, aside: Path | None) -> MetricsWriter | None:
    """Make run.dir's record and its recipe.toml, on rank 0, once everything else about the recipe proved good; a finished run keeps the
    recipe.toml that it was made with, if it is still there.

    A run that starts at `step` does not go on from later checkpoints: those of the directory are set aside, never mixed with it, never
    deleted. `record`, `aside`: what `open_record` and `keep_record` found. ValueError: something there cannot be written.
    """
    run_dir, metrics = Path(recipe.run.dir), None
    try:
        if mesh.rank == 0:
            metrics = record or MetricsWriter(run_dir / "metrics.jsonl", resume_step=step)
            # Before checkpoints move: without them it must say that the run started from elsewhere.
            if step < recipe.train.steps or not (run_dir / "recipe.toml").exists():
                replace_text(run_dir / "recipe.toml", recipe.to_toml())
            set_aside(Tiers.of(recipe).shared, step, aside)
            metrics.cut()
    except OSError as error:
        raise ValueError(f"cannot write run.dir = {recipe.run.dir!r}: {error.filename or run_dir}: {error.strerror}") from None
    return metrics


def open_run(trainer: Trainer) -> MetricsWriter | None:
    """Everything that a start writes, once it is known from which checkpoint the run goes on (all ranks); the record, on rank 0.
    ValueError, on every rank: something cannot be written, or is not this run's.

    1. The record is locked and checked. 2. The logs are opened. 3. The record is copied where the run goes back. 4. Later checkpoints of
    the local tier are set aside. 5. recipe.toml is written. 6. Later checkpoints of the shared tier are set aside. 7. The record is cut.
    """
    recipe, mesh = trainer.recipe, trainer.mesh
    record = agreed(lambda: open_record(recipe, mesh, trainer.step), mesh)
    agreed(lambda: start_logging(recipe, mesh), mesh)
    aside = keep_record(recipe, mesh, trainer.step, record)
    trainer.open_saver()
    return agreed(lambda: open_run_directory(recipe, mesh, trainer.step, record, aside), mesh)


def start_logging(recipe: Recipe, mesh: Mesh) -> None:
    """Every rank writes RUN/logs/rank-R.log; rank 0 speaks on stdout too, above the progress bar. ValueError: the log cannot be written."""
    logs = Path(recipe.run.dir) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [_LogFile(logs / f"rank-{mesh.rank}.log")]
    except OSError as error:
        raise ValueError(f"cannot write run.dir = {recipe.run.dir!r}: {error.filename or logs}: {error.strerror}") from None
    if mesh.rank == 0:
        handlers.append(_ConsoleHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def stop_logging() -> None:
    """Close what `start_logging` opened: a program that calls `main` again writes no line of the next run into this one's log."""
    for handler in [handler for handler in log.handlers if isinstance(handler, _Dispensable)]:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # what it could not write, and has told
            handler.close()


class _Dispensable(logging.Handler):
    """Lines that cannot be written (a full disk, a reader that went away) do not stop the training; the first one is told on stderr."""

    place: str
    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            say(f"cannot write log lines to {self.place}: {error.strerror}; the training goes on without them")


class _LogFile(_Dispensable, logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.place = str(path)


class _ConsoleHandler(_Dispensable):
    """Prints above tqdm's bar."""

    place = "stdout"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:  # noqa: BLE001  # as handlers of logging do
            self.handleError(record)


def say(line: str) -> None:
    """On stderr. That it cannot be written changes no exit code: the scripts that start a job again go by that."""
    with contextlib.suppress(OSError):
        print(f"zaya.train: {line}", file=sys.stderr, flush=True)


class Ended(Exception):
    """The run ends with an exit code, and in one line: the error's words, which are the cause."""

    def __init__(self, code: Exit, error: Exception) -> None:
        super().__init__(str(error))
        self.code, self.error = code, error


@contextlib.contextmanager
def ending(checkpoint: Exit, mendable: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Within it a CheckpointError ends the run with that code; bad input (`mendable`), or memory that is too small for the recipe, as
    refused; steps that update nothing as a numerical fault. Anything else is a bug, and passes."""
    try:
        yield
    except CheckpointError as error:
        raise Ended(checkpoint, error) from error
    except NumericalFault as error:
        raise Ended(Exit.NUMERICAL, error) from error
    except mendable as error:
        raise Ended(Exit.REFUSED, error) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise Ended(Exit.REFUSED, ValueError(f"out of memory: {str(error).splitlines()[0]}; lower train.micro_batch_size or train.seq_len, "
                                             "set train.recompute, use more ranks, or a smaller model")) from error


def wait_for_rank_0(error: BaseException | None, told: bool) -> None:
    """Before the mesh opens every rank finds the same fault in its recipe, and of some all are told (`told`: the mesh is open): rank 0 says
    it. The others wait for that: torchrun ends all ranks when it sees one leave. Where the fault is theirs alone, they are still there
    afterwards, and say it themselves."""
    if isinstance(error, Ended) and rank_from_environment() and (not told or getattr(error.error, "on_all_ranks", False)):
        time.sleep(RANK_0_S)


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE) if argv else say("name a recipe; see --help")
        return Exit.DONE if argv else Exit.REFUSED
    watchdog, mesh, preempted, error = None, None, "", None
    with contextlib.ExitStack() as watched:
        watched.callback(stop_logging)
        try:
            with ending(Exit.UNREADABLE):
                recipe = load_recipe(argv[0], argv[1:])
                recipe.validate(world_size_from_environment())
                check_run_directory(recipe)
                mesh = open_mesh(recipe.train.device, Layout.of(recipe.parallel, world_size_from_environment()))
                watchdog = watched.enter_context(Watchdog(mesh, Path(recipe.run.dir)))
            preempted = run(recipe, mesh, watchdog)
        except BaseException as caught:  # noqa: BLE001 - said, and the process ends
            error = caught
        wait_for_rank_0(error, told=watchdog is not None)
        if watchdog is not None:
            watchdog.claim()
        code, cause = explain(error, preempted)
        if watchdog is not None:
            watchdog.end(code, cause)
        else:
            with contextlib.suppress(OSError):
                ExitRecord(rank_from_environment(), code, 0, "start", cause, (rank_from_environment(),), ACTIONS[code]).report()
    if mesh is not None and error is None:
        close_mesh(mesh)
    return code


def explain(error: BaseException | None, preempted: str) -> tuple[Exit, str]:
    """The exit code of a run that ended with this error, or was preempted, and why; it is said."""
    rank = rank_from_environment()
    match error:
        case None:
            if not preempted:
                return Exit.DONE, "the run is finished"
            if rank == 0:
                say(f"{preempted}; start it again to go on")
            return Exit.PREEMPTED, preempted
        case Ended():
            say(f"{error}" if rank == 0 else f"rank {rank}: {error}")
            return error.code, str(error)
        case KeyboardInterrupt():
            if rank == 0:
                say("interrupted")
            return Exit.INTERRUPTED, "interrupted"
        case _:
            with contextlib.suppress(OSError):
                traceback.print_exception(error)
            return Exit.FAILED, f"{type(error).__name__}: {error}"


def run(recipe: Recipe, mesh: Mesh, watchdog: Watchdog) -> str:
    """Train to the end, or until a signal: which, and what is saved. Ended: why not."""
    with ending(Exit.UNREADABLE):
        trainer = Trainer(recipe, mesh, open_data(recipe, mesh), watchdog.progress, draw=not will_load_weights(recipe, mesh))
        trainer.restore()
    with ending(Exit.REFUSED):  # a CheckpointError here is of what cannot be written
        metrics = open_run(trainer)
    watchdog.progress.enter("opened", trainer.step)
    for line in runtime.describe(SETTINGS):
        log.info(line)
    with ending(Exit.FAILED, mendable=(CorpusError,)):  # another ValueError of the loop is a bug, and shows where
        signal = trainer.fit(metrics)
    return f"{signal}: saved at step {trainer.step}" if signal else ""


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except KeyboardInterrupt:  # in the last moment
        exit_code = Exit.INTERRUPTED
    # At once and without collectives: the others learn it from the closed connections, a process group must not be waited for. After a run
    # that is whole too: the interpreter takes a second to end, in which a signal would make a failure of it.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)
