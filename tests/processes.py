"""Which processes a tool has started: none may stay behind."""

from __future__ import annotations

import contextlib
from pathlib import Path


def processes_of(session: int) -> list[str]:
    """Ids of the living processes of a session, the number of a `Popen(..., start_new_session=True)`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = file.read_text().rpartition(")")[2].split()[:4]
            found += [file.parent.name] if int(its_session) == session and state != "Z" else []
    return found
