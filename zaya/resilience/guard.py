"""Steps that update nothing: one is harmless, many in a row are a run that has ended without knowing it. Standard library only."""

from __future__ import annotations

MAX_SKIPPED = 10
"""Steps in a row. The weights stay as they were, so what makes every batch overflow does not pass by itself."""

MAX_SKIPPED_LAST = 2
"""Of them at the end of a run: one may be an overflow, of two the weights are the likelier cause."""


class NumericalFault(RuntimeError):
    """Loss or gradient has not been finite for too long."""

    on_all_ranks = True
    """Every rank raises it: one of them should say it."""


class Guard:
    def __init__(self) -> None:
        self._skipped = 0

    def step(self, step: int, committed: bool, last: bool = False) -> None:
        """After each one (all ranks know the same). NumericalFault: the latest MAX_SKIPPED updated nothing, or MAX_SKIPPED_LAST where the
        run ends with this step (`last`)."""
        self._skipped = 0 if committed else self._skipped + 1
        if self._skipped >= (MAX_SKIPPED_LAST if last else MAX_SKIPPED):
            raise NumericalFault(f"loss or gradient is not finite since step {step - self._skipped + 1}: {self._skipped} steps in a row "
                                 "have updated nothing")
