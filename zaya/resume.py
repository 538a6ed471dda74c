"""Where a run's checkpoints lie, what it starts from, and what saves it.

Start of a run: `restore` takes the newest checkpoint that every rank can read, on either tier, and says which it passed over and why.
During it, `open_saver` has made what the trainer saves with. Joins the recipe and the mesh to zaya/checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from zaya.checkpoint.directory import complete_steps, locate, step_path
from zaya.checkpoint.manifest import CheckpointError, Manifest, disk_errors
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.saver import Saver
from zaya.config import Recipe
from zaya.parallel.collectives import gather_objects
from zaya.parallel.mesh import Mesh, open_background
from zaya.parallel.mesh import ranks_per_node_from_environment as ranks_per_node
from zaya.state import TrainState

T = TypeVar("T")

SMALL_BYTES = 1 << 30
"""A checkpoint of at most this size is verified whole before it is taken, whatever checkpoint.verify says: a second or so."""


@dataclass(frozen=True)
class Tiers:
    """The roots of a run's step directories: storage that all nodes share, and where the recipe names one a disk of each node."""

    shared: Path
    local: Path | None

    @classmethod
    def of(cls, recipe: Recipe) -> Tiers:
        run_dir = Path(os.path.abspath(recipe.run.dir))
        if not recipe.checkpoint.local_dir:
            return cls(run_dir / "checkpoints", None)
        name = f"{run_dir.name}-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]}"  # runs of one name do not mix
        return cls(run_dir / "checkpoints", Path(recipe.checkpoint.local_dir) / name / "checkpoints")

    @property
    def roots(self) -> list[Path]:
        return [self.shared] if self.local is None else [self.local, self.shared]

    def steps(self) -> list[list[int]]:
        """Of complete checkpoints, by root as this node sees it."""
        return [complete_steps(root) for root in self.roots]

    def open(self, root: Path, step: int) -> Checkpoint:
        """From the local tier: what this node has not got, its ranks read from the shared one, if that has it."""
        if root == self.local:
            return Checkpoint.open(step_path(root, step), partial=True, elsewhere=[step_path(self.shared, step)])
        return Checkpoint.open(step_path(root, step))


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


def restore(recipe: Recipe, state: TrainState, mesh: Mesh) -> tuple[Manifest | None, str, list[str]]:
    """Start from where the recipe says: the run's own newest checkpoint, a given one, other weights, or none of them.

    All ranks together. The manifest whose counters the run goes on from, where it came from in words, and a line for each checkpoint
    that was passed over. CheckpointError: there are checkpoints to start from, and none can be read.
    """
    resume, allow_missing = recipe.checkpoint.resume, recipe.checkpoint.allow_missing
    skipped: list[str] = []
    if resume == "auto":
        found = _newest_sound(recipe, state, mesh, skipped)
        if found is not None:
            return found.manifest, f"resumed from {found.path} at step {found.manifest.step}{_changes(recipe, found)}", skipped
    elif resume != "never":
        given = _named("checkpoint.resume", resume, 'or write "auto" or "never"')
        own = _agreed(lambda: Checkpoint.open(given), mesh)
        _take(own, recipe, state, mesh)
        return own.manifest, f"resumed from {own.path} at step {own.manifest.step}{_changes(recipe, own)}", skipped
    if recipe.init.checkpoint:
        path = _named("init.checkpoint", recipe.init.checkpoint, "(tools.import_hf makes one from a transformers directory)")
        state.load(_agreed(lambda: Checkpoint.open(path), mesh), weights_only=True, allow_missing=allow_missing)
        return None, f"weights from {recipe.init.checkpoint}", skipped
    return None, f"new weights from seed {recipe.train.seed}", skipped


def _newest_sound(recipe: Recipe, state: TrainState, mesh: Mesh, skipped: list[str]) -> Checkpoint | None:
    """Loaded. Every rank tries the same ones in the same order, and one counts only if all of them can read it."""
    tiers = Tiers.of(recipe)
    for step, root in _candidates(tiers, mesh):
        try:
            checkpoint = _agreed(lambda: tiers.open(root, step), mesh)  # noqa: B023 - called at once
            _take(checkpoint, recipe, state, mesh, on_node=root == tiers.local)
        except CheckpointError as error:
            skipped.append(f"passed over the checkpoint of step {step}: {error}")
        else:
            return checkpoint
    if skipped:
        raise CheckpointError(f"no checkpoint of {tiers.shared.parent} can be read; {'; '.join(skipped)}")
    return None


def _candidates(tiers: Tiers, mesh: Mesh) -> list[tuple[int, Path]]:
    """Newest first, of one step the local tier first: those that every rank sees."""
    seen = _objects(tiers.steps(), mesh)
    return [(step, root) for step in sorted({step for by_root in seen for steps in by_root for step in steps}, reverse=True)
            for index, root in enumerate(tiers.roots) if all(step in by_root[index] for by_root in seen)]


def _agreed(action: Callable[[], T], mesh: Mesh) -> T:
    """What it returns; CheckpointError, on every rank, where any rank's action raised one."""
    result, error = None, ""
    try:
        result = action()
    except CheckpointError as problem:
        error = str(problem)
    errors = [problem for problem in _objects(error, mesh) if problem]
    if errors:
        raise CheckpointError(errors[0] + (f" (and {len(errors) - 1} more ranks)" if errors[1:] else ""))
    return cast(T, result)


def _objects(value: T, mesh: Mesh) -> list[T]:
    """Of every rank."""
    return cast(list[T], gather_objects(value, mesh.world))


def _take(checkpoint: Checkpoint, recipe: Recipe, state: TrainState, mesh: Mesh, on_node: bool = False) -> None:
    """Load it; verify it whole first, where the recipe says so or it is small: the files spread over the ranks, or over those of a node
    that has files of its own."""
    files = checkpoint.manifest.files
    readers = ranks_per_node() if on_node else mesh.world_size

    def verify() -> None:
        if recipe.checkpoint.verify == "all" or sum(file.size for file in files.values()) <= SMALL_BYTES:
            for damage in checkpoint.damages(files=checkpoint.visible()[mesh.rank % readers :: readers]):
                raise damage

    _agreed(verify, mesh)
    state.load(checkpoint, allow_missing=recipe.checkpoint.allow_missing)


def _changes(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """What the recipe of a checkpoint said otherwise: going on from another run's is allowed, but never silent."""
    theirs = checkpoint.manifest.recipe
    changed = [f"{key} was {theirs.get(section, {}).get(name)!r}, is {value!r}" for key, value in recipe.identity().items()
               for section, _, name in [key.partition(".")] if _plain(theirs.get(section, {}).get(name)) != _plain(value)]
    return f"; made by another recipe: {'; '.join(changed)}" if changed else ""


def _plain(value: object) -> object:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _named(key: str, value: str, otherwise: str) -> Path:
    """The checkpoint that a recipe key names, or the newest one of the run that it names. ValueError: there is none."""
    found = locate(value)
    if found is None:
        raise ValueError(f"{key} = {value!r} is neither a checkpoint nor a run that has one; name one, {otherwise}")
    return found


# ------------------------------------------------------------------------------------------------------------------ saving


def open_saver(recipe: Recipe, mesh: Mesh, step: int) -> Saver:
    """What a run that stands at `step` saves with (collective): to the local tier and from there to the shared one, or to the shared
    one at once."""
    config, tiers = recipe.checkpoint, Tiers.of(recipe)
    mirror, leads = None, mesh.rank == 0
    if tiers.local is not None:
        leads = _leads(tiers.local, mesh)
        mirror = Mirror(tiers.local, tiers.shared, gather=_gather(mesh, "mirror"), rank=mesh.rank, ranks_per_node=ranks_per_node(),
                        bytes_per_s=config.mirror_mb_per_s * 1e6 / mesh.world_size, keep=config.keep, keep_every=config.keep_every)
        local, shared = tiers.steps()
        if all(_objects(step in local and step not in shared, mesh)):  # the last process did not come to it
            mirror.offer(step_path(tiers.local, step))
    return Saver(tiers.roots[0], gather=_gather(mesh, "saver"), rank=mesh.rank, world_size=mesh.world_size, leads=leads,
                 asynchronous=config.asynchronous, staging_bytes=int(config.staging_gib * 2**30), ranks_per_node=ranks_per_node(),
                 keep=config.keep, keep_every=0 if mirror else config.keep_every, mirror=mirror)


def _gather(mesh: Mesh, name: str) -> Callable[[object], list[object]]:
    """Over connections of its own: a thread uses it beside the training."""
    group = open_background(mesh, name)
    return lambda value: gather_objects(value, group)


def _leads(root: Path, mesh: Mesh) -> bool:
    """Whether this rank is the first of those that see its `root` (ranks of one node, or of all where it is one directory after all)."""
    mark = root.parent / f".seen-{mesh.rank}-{secrets.token_hex(8)}"

    def leave() -> None:
        with disk_errors("write checkpoint.local_dir", root):
            root.mkdir(parents=True, exist_ok=True)
            mark.touch()

    try:
        _agreed(leave, mesh)
        names = _objects(mark.name, mesh)
        first = next(rank for rank, name in enumerate(names) if (root.parent / name).exists())
        _objects(None, mesh)  # all have looked
    finally:
        mark.unlink(missing_ok=True)
    return first == mesh.rank
