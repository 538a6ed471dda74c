"""Where a run's checkpoints lie: storage that all nodes share, and where the recipe names one a disk of each node.

Start of a run, and whatever saves it. All ranks have to see the same: `agreed` and `objects` are how they find out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from zaya.checkpoint.directory import complete_steps, local_root, step_path
from zaya.checkpoint.errors import CheckpointError, raise_on_all
from zaya.checkpoint.read import Checkpoint
from zaya.config import Recipe
from zaya.parallel.collectives import gather_objects
from zaya.parallel.mesh import Mesh

T = TypeVar("T")


class Tiers(NamedTuple):
    """The roots of a run's step directories: storage that all nodes share, and where the recipe names one a disk of each node."""

    shared: Path
    local: Path | None

    @classmethod
    def of(cls, recipe: Recipe) -> Tiers:
        run_dir = Path(os.path.abspath(recipe.run.dir))
        if not recipe.checkpoint.local_dir:
            return cls(run_dir / "checkpoints", None)
        return cls(run_dir / "checkpoints", local_root(run_dir, recipe.checkpoint.local_dir))

    @property
    def roots(self) -> list[Path]:
        return [self.shared] if self.local is None else [self.local, self.shared]

    def steps(self) -> list[list[int]]:
        """Of complete checkpoints, by root as this node sees it."""
        return [complete_steps(root) for root in self.roots]

    def open(self, root: Path, step: int) -> Checkpoint:
        """From the local tier: what this node has not got, its ranks read from the shared one, if that has it."""
        elsewhere = [step_path(self.shared, step)] if root == self.local else []
        checkpoint = Checkpoint.open(step_path(root, step), partial=root == self.local, elsewhere=elsewhere)
        if checkpoint.manifest.step != step:
            raise CheckpointError(f"{checkpoint.path} holds a checkpoint of step {checkpoint.manifest.step}")
        return checkpoint


def newest_recipe(tiers: Tiers) -> dict[str, Any] | None:
    """The recipe in the newest checkpoint whose manifest is sound. CheckpointError: there are some, and none is."""
    problem = None
    for step, tier in sorted(((step, root) for root in tiers.roots for step in complete_steps(root)), reverse=True):
        try:
            return tiers.open(tier, step).manifest.recipe
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def agreed(action: Callable[[], T], mesh: Mesh) -> T:
    """What it returns; on every rank the ValueError (or CheckpointError) that it raised on any."""
    result: T | None = None
    error: ValueError | None = None
    try:
        result = action()
    except ValueError as problem:
        error = problem
    raise_on_all(objects(error, mesh))
    return cast(T, result)


def objects(value: T, mesh: Mesh) -> list[T]:
    """Of every rank."""
    return gather_objects(value, mesh.world)
