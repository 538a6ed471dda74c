"""metrics.jsonl, the record of a run: one row per optimizer step, evaluation rows beside them, no step twice, none missing.

Last stop of a batch's path: takes the numbers of a finished step on rank 0 and writes them down. Everything that shows a run
(tools.plot_run, the log line) reads this record. Knows the standard library only: no tensors, no ranks, no recipe.

Rows begin with "step" (evaluation rows with "step", "eval_loss") and lie in the order they happened, so a row's kind and step
are read from its first bytes, and cutting the file at one offset forgets every later step.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import reprlib
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_NUMBERS = ("tokens", "loss", "eval_loss", "grad_norm", "lr", "tokens_per_second", "step_time_s", "mfu", "router_entropy",
            "router_entropy_min", "router_max_load")
_HEAD = re.compile(rb'\{"step": (\d+), "(eval_loss)?')


def routing_metrics(load: Sequence[Sequence[float]]) -> Row:
    """How evenly the experts work. `load`: per block, each real expert's tokens of the global batch, as counts or shares.

    router_entropy is the block mean of H(p) / ln E (1 = even, 0 = one expert does it all), router_entropy_min the worst block's,
    router_max_load the largest p_e * E of any block, expert_load the p_e themselves.
    A block whose tokens all skipped has no shares: its load is zeros, its entropy 0.
    """
    shares = [[count / total for count in block] if (total := sum(block)) > 0 else [0.0] * len(block) for block in load]
    entropies = [entropy(block) for block in shares]
    return {
        "router_entropy": sum(entropies) / len(entropies),
        "router_entropy_min": min(entropies),
        "router_max_load": max(max(block) * len(block) for block in shares),
        "expert_load": [[round(p, 5) for p in block] for block in shares],
    }


def entropy(shares: Sequence[float]) -> float:
    """H(p) / ln E. A single expert is even by definition."""
    if len(shares) == 1:
        return 1.0
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def format_line(row: Row, steps: int) -> str:
    """A training or evaluation row of a run of `steps` steps as the one line of the log: for eyes, and for `key value | ...` regexes."""
    parts = [f"step {row['step']}/{steps}"]
    if "eval_loss" in row:
        return " | ".join([*parts, f"eval_loss {_number(row['eval_loss'], '.4f')}"])
    parts += [f"loss {_number(row['loss'], '.4f')}", f"grad {_number(row['grad_norm'], '.2f')}", f"lr {_number(row['lr'], '.1e')}",
              f"{_thousands(row['tokens_per_second'])} tok/s"]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.1%}")
    return " | ".join([*parts, f"entropy {_number(row['router_entropy'], '.2f')}", f"{row['step_time_s']:.2f} s"])


def _number(value: float | None, spec: str) -> str:
    return "nan" if value is None else format(value, spec)


def _thousands(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


class MetricsWriter:
    """The only writer of one metrics.jsonl, on rank 0. Calls: construct at (re)start, which locks and checks the file and changes nothing
    in it; cut; append after every step; close at the end.

    A disk that fails does not stop the training: rows wait in memory until it takes them.

    `resume_step`: the step of the checkpoint the run goes on from, 0 for a fresh run; the next training row must be resume_step + 1.
    Raises ValueError where the file that is there cannot be this run's record.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.step = resume_step
        """The last training row's."""
        self.eval_step = 0
        """The last evaluation row's; 0 = none."""
        self.problem = ""
        """Why the last rows are not written yet."""
        self._file = open(path, "ab", buffering=0)
        try:
            self._lock(path)
            self._end = self._find_end(path, resume_step)
        except ValueError:
            self._file.close()
            raise
        self._waiting = bytearray()
        self._writing = threading.Lock()

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._file.fileno()).st_size == 0

    def cut(self) -> None:
        """Take off the rows of steps after resume_step, training and evaluation alike, and a line torn by a crash. OSError: they are still
        there."""
        # Truncating is one call of the system: a crash leaves the old file or the new one. Appending: a crash can only tear the tail.
        self._file.truncate(self._end)

    def _lock(self, path: Path) -> None:
        """Until the file is closed or the process ends. ValueError: another process has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another process: this run is going on already; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks

    def _find_end(self, path: Path, resume_step: int) -> int:
        """Offset behind the last row of a step <= resume_step."""
        end, previous = 0, None
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                head = _HEAD.match(line)
                if not line.endswith(b"\n"):
                    break  # torn
                if not head:
                    if file.read(1):
                        raise ValueError(f"{path} line {number} is not a row of metrics; move the file away to go on without its history")
                    break  # a crash of the machine can leave a tail of zeros
                step, is_eval = int(head[1]), head[2] is not None
                if step > resume_step:
                    break
                _parse(line, f"{path} line {number}")  # 0.16 ms a row of 40 x 16 experts
                if is_eval:
                    self.eval_step = step
                elif previous is not None and step != previous + 1:
                    raise ValueError(f"{path} line {number}: step {step} follows step {previous}; move the file away to go on without it")
                else:
                    previous = step
                end += len(line)
        # No training row at all: a checkpoint of another directory was named. Some but too few: this history has a hole.
        if previous is not None and previous != resume_step:
            raise ValueError(f"{path} ends at step {previous} but the checkpoint is of step {resume_step}; "
                             "move the file away to go on without its history")
        return end

    def append(self, row: Row) -> None:
        """Write one row and flush it. Not-a-number and infinity become null: the line is valid JSON."""
        row = dict(row)
        step = row.pop("step")
        assert ("loss" in row) != ("eval_loss" in row), f"step {step}: a row has a training loss or an evaluation's, not both or neither"
        if "eval_loss" in row:
            assert self.eval_step < step == self.step, f"evaluation at step {step} after step {self.step} and evaluation {self.eval_step}"
            self.eval_step = step
            row = {"step": step, "eval_loss": row.pop("eval_loss"), **row}
        else:
            assert step == self.step + 1, f"training step {step} follows step {self.step}"
            self.step = step
            row = {"step": step, **row}
        with self._writing:
            self._waiting += json.dumps(_finite(row), allow_nan=False).encode() + b"\n"
            self.problem = ""
            try:
                self._write()
            except OSError as error:
                self.problem = error.strerror or str(error)

    def _write(self) -> None:
        """OSError: what is not written goes with a later row, unless `sync` or `close` raises."""
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def sync(self) -> None:
        """Make the rows so far survive a power cut, from any thread. Call before a checkpoint becomes complete, which promises them.

        OSError: they do not."""
        with self._writing:
            self._write()
            descriptor = os.dup(self._file.fileno())  # outlives the lock: the next row need not wait for the disk
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """OSError: the last rows could not be written."""
        with self._writing, self._file:
            self._write()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """Training rows and evaluation rows, also of a run that is being written: a torn last line is left out. ValueError: one line."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    train: list[Row] = []
    evaluation: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        row = _parse(line, f"{path} line {number}")
        _check_values(row, f"{path} line {number}")
        (evaluation if "eval_loss" in row else train).append(row)
    return train, evaluation


def _parse(line: bytes, where: str) -> Row:
    """One row. ValueError: it is damaged, or something else."""
    try:
        row = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity, which we write as null, are no JSON
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        raise ValueError(f"{where} is not JSON; mend it, or move the file away") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int or ("loss" in row) == ("eval_loss" in row):
        raise ValueError(f"{where} is not a row of metrics: it needs a step, and a loss or an eval_loss; mend it, or move the file away")
    return row


def _check_values(row: Row, where: str) -> None:
    """ValueError where a reader would stumble: whatever is there is a number or null, and expert_load a table of them."""
    for key in _NUMBERS:
        if not _is_number(row.get(key)):
            raise ValueError(f"{where}: {key} = {reprlib.repr(row[key])} is not a number")
    load = row.get("expert_load", [[None]])
    if not (isinstance(load, list) and load and all(isinstance(block, list) and block for block in load)
            and len({len(block) for block in load}) == 1 and all(_is_number(share) for block in load for share in block)):
        raise ValueError(f"{where}: expert_load = {reprlib.repr(load)} is not a table of shares, blocks by experts")


def _is_number(value: object) -> bool:
    """Or null, which stands for one that was not finite."""
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]
