"""Steps that update nothing: one is harmless, many in a row are a run that has ended without knowing it. Standard library only."""

from __future__ import annotations

MAX_SKIPPED = 10
"""Steps in a row. The weights stay as they were, so what makes every batch overflow does not pass by itself."""


class NumericalFault(RuntimeError):
    """Loss or gradient has not been finite for too long."""


class Guard:
    def __init__(self) -> None:
        self._skipped = 0

    def step(self, step: int, committed: bool) -> None:
        """After each one (all ranks know the same). NumericalFault: the last MAX_SKIPPED updated nothing."""
        self._skipped = 0 if committed else self._skipped + 1
        if self._skipped >= MAX_SKIPPED:
            raise NumericalFault(f"loss or gradient is not finite since step {step - self._skipped + 1}: {self._skipped} steps in a row "
                                 "have updated nothing")
