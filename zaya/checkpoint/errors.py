"""What can go wrong with a checkpoint, in one line, on one rank or on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. One line that names the file, and the tensor where there is one."""

    on_all_ranks = False
    """Every rank has raised it: one of them should say it."""


class RefusedError(CheckpointError):
    """It is what was asked, not the disk: another attempt would end the same."""


class ForeignError(RefusedError):
    """The manifest's own hash is right, and this program cannot read what it says: another program's checkpoint (a newer one's, most
    likely), not the remains of a save."""


@contextlib.contextmanager
def disk_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: "cannot read PATH: No space left on device"."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {verb} {path}: {error.strerror or error}") from error


def raise_on_all(errors: Sequence[ValueError | None]) -> None:
    """On every rank the first error that any had (by rank; None: none), with its rank and of its kind: a CheckpointError's, or ValueError.
    Nothing if there is none."""
    found = [(rank, error) for rank, error in enumerate(errors) if error is not None]
    if found:
        rank, first = found[0]
        kind = type(first) if isinstance(first, CheckpointError) else ValueError
        who, others = f"rank {rank}: " if len(errors) > 1 else "", f" (and {len(found) - 1} more ranks)" if found[1:] else ""
        raised = kind(f"{who}{first}{others}")
        raised.on_all_ranks = True  # type: ignore[attr-defined]  # a ValueError that is none of ours learns it here
        raise raised
