"""Where a run's checkpoints lie, what it starts from, and what saves it.

Start of a run: `restore` takes the newest checkpoint that every rank can read, on either tier, and says which it passed over and why.
During it, `open_saver` has made what the trainer saves with. Joins the recipe and the mesh to zaya/checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from zaya.checkpoint.directory import complete_steps, identity, locate, set_aside, step_directories, step_path
from zaya.checkpoint.manifest import CheckpointError, raise_on_all
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


class Tiers(NamedTuple):
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


def restore(recipe: Recipe, state: TrainState, mesh: Mesh) -> tuple[Checkpoint | None, str, list[str]]:
    """Start from where the recipe says: the run's own newest checkpoint, a given one, other weights, or none of them.

    All ranks together. The checkpoint whose counters the run goes on from, where it came from in words, and a line for each checkpoint
    that was passed over. CheckpointError: there are checkpoints to start from, and none can be read.
    """
    resume, allow_missing = recipe.checkpoint.resume, recipe.checkpoint.allow_missing
    skipped: list[str] = []
    if resume == "auto":
        found = _newest_sound(recipe, state, mesh, skipped)
        if found is not None:
            return found, f"resumed from {found.path} at step {found.manifest.step}{_changes(recipe, found)}{state.left_out}", skipped
    elif resume != "never":
        own = _agreed(lambda: Checkpoint.open(_named("checkpoint.resume", resume, 'name one, or write "auto" or "never"')), mesh)
        _take(own, recipe, state, mesh)
        return own, f"resumed from {own.path} at step {own.manifest.step}{_changes(recipe, own)}{state.left_out}", skipped
    if recipe.init.checkpoint:
        otherwise = "name one (tools.import_hf makes one from a transformers directory)"
        given = _agreed(lambda: Checkpoint.open(_named("init.checkpoint", recipe.init.checkpoint, otherwise)), mesh)
        _check_same(given, mesh)
        state.load(given, weights_only=True, allow_missing=allow_missing)
        return None, f"weights from {recipe.init.checkpoint}{state.left_out}", skipped
    return None, f"new weights from seed {recipe.train.seed}", skipped


def _newest_sound(recipe: Recipe, state: TrainState, mesh: Mesh, skipped: list[str]) -> Checkpoint | None:
    """Loaded. Every rank tries the same ones in the same order, and one counts only if all of them can read it, and it is the same."""
    tiers = Tiers.of(recipe)
    seen = _objects(_agreed(tiers.steps, mesh), mesh)
    for step in sorted({step for by_root in seen for steps in by_root for step in steps}, reverse=True):
        roots = [root for index, root in enumerate(tiers.roots) if all(step in by_root[index] for by_root in seen)]
        if not roots:
            lacking = [rank for rank, by_root in enumerate(seen) if not any(step in steps for steps in by_root)]
            where = f"ranks {lacking[:8]} see it nowhere" if lacking else "no tier has it for all ranks"
            skipped.append(f"passed over the checkpoint of step {step}: {where}")
        for root in roots:
            try:
                checkpoint = _agreed(lambda: tiers.open(root, step), mesh)  # noqa: B023 - called at once
                _take(checkpoint, recipe, state, mesh, on_node=root == tiers.local)
            except CheckpointError as error:
                tier = " on the local tier" if root == tiers.local else ""
                skipped.append(f"passed over the checkpoint of step {step}{tier}: {error}")
            else:
                return checkpoint
    unfinished = [path for _, path, whole in step_directories(tiers.shared) if not whole and any(path.glob("*.safetensors"))]
    if skipped:
        raise CheckpointError(f"no checkpoint of {tiers.shared.parent} can be read; {'; '.join(skipped)}")
    skipped += [f"{path} has no manifest.json: a save that did not end, or a checkpoint that was taken apart" for path in unfinished]
    return None


def _agreed(action: Callable[[], T], mesh: Mesh) -> T:
    """What it returns; on every rank the ValueError (or CheckpointError) that it raised on any."""
    result, error = None, None
    try:
        result = action()
    except ValueError as problem:
        error = problem
    raise_on_all(_objects("" if error is None else str(error), mesh),
                 CheckpointError if error is None or isinstance(error, CheckpointError) else ValueError)
    return cast(T, result)


def _objects(value: T, mesh: Mesh) -> list[T]:
    """Of every rank."""
    return cast(list[T], gather_objects(value, mesh.world))


def _take(checkpoint: Checkpoint, recipe: Recipe, state: TrainState, mesh: Mesh, on_node: bool = False) -> None:
    """Load it; verify it whole first, where the recipe says so or it is small: the files dealt out over all ranks, but those that lie on
    nodes over the ranks of each. CheckpointError, on every rank: not all of them have the same, or any of it is damaged."""
    _check_same(checkpoint, mesh)
    files = checkpoint.manifest.files
    here = [name for name in sorted(files) if on_node and (checkpoint.path / name).is_file()]
    on_any_node = {name for names in _objects(here, mesh) for name in names}
    mine = here[mesh.rank % ranks_per_node() :: ranks_per_node()] + sorted(files.keys() - on_any_node)[mesh.rank :: mesh.world_size]

    def verify() -> None:
        if recipe.checkpoint.verify == "all" or sum(file.size for file in files.values()) <= SMALL_BYTES:
            for damage in checkpoint.damages(files=mine):
                raise damage

    _agreed(verify, mesh)
    state.load(checkpoint, allow_missing=recipe.checkpoint.allow_missing)


def _check_same(checkpoint: Checkpoint, mesh: Mesh) -> None:
    """CheckpointError, on every rank, unless all have opened the same one."""
    if len(set(_objects(_agreed(lambda: identity(checkpoint.path), mesh), mesh))) > 1:
        raise CheckpointError(f"{checkpoint.path}: the nodes hold checkpoints of different saves")


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
        raise ValueError(f"{key} = {value!r} is neither a checkpoint nor a run that has one; {otherwise}")
    return found


# ------------------------------------------------------------------------------------------------------------------ saving


def open_saver(recipe: Recipe, mesh: Mesh, step: int, origin: Path | None = None) -> Saver:
    """What a run that stands at `step`, by the checkpoint `origin`, saves with (collective): to the local tier and from there to the shared
    one, or to the shared one at once. Later checkpoints of the local tier are set aside, and a copy of that step that was passed over.
    ValueError: the local directory cannot be written."""
    config, tiers = recipe.checkpoint, Tiers.of(recipe)
    mirror, place = None, mesh.rank
    if tiers.local is not None:
        local = tiers.local
        place, places = _place(local, mesh)
        if place == 0:
            set_aside(local, step - 1 if origin == step_path(tiers.shared, step) else step)
        mirror = Mirror(local, tiers.shared, gather=_gather(mesh, "mirror"), rank=mesh.rank, place=place, places=places,
                        bytes_per_s=config.mirror_mb_per_s * 1e6 / mesh.world_size, keep=config.keep, keep_every=config.keep_every)
        if all(_objects(step in complete_steps(local) and step not in complete_steps(tiers.shared), mesh)):
            mirror.offer(step_path(local, step))  # the last process did not come to it
    return Saver(tiers.roots[0], gather=_gather(mesh, "saver"), rank=mesh.rank, world_size=mesh.world_size, leads=place == 0,
                 asynchronous=config.asynchronous, staging_bytes=int(config.staging_gib * 2**30), ranks_per_node=ranks_per_node(),
                 keep=config.keep, keep_every=0 if mirror else config.keep_every, mirror=mirror)


def _gather(mesh: Mesh, name: str) -> Callable[[object], list[object]]:
    """Over connections of its own: a thread uses it beside the training."""
    group = open_background(mesh, name)
    return lambda value: gather_objects(value, group)


def _place(root: Path, mesh: Mesh) -> tuple[int, int]:
    """This rank's place among those that see its `root`, and how many: the ranks of a node, or all where it is one directory after all."""
    mark = root.parent / f".seen-{mesh.rank}-{secrets.token_hex(8)}"

    def leave() -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            for old in root.parent.glob(f".seen-{mesh.rank}-*"):  # of a process killed here
                old.unlink(missing_ok=True)
            mark.touch()
        except OSError as error:
            raise ValueError(f"cannot write checkpoint.local_dir: {error.filename}: {error.strerror}") from None

    try:
        _agreed(leave, mesh)
        seen = [rank for rank, name in enumerate(_objects(mark.name, mesh)) if (root.parent / name).exists()]
        _objects(None, mesh)  # all have looked
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
    return seen.index(mesh.rank), len(seen)
