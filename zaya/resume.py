"""What a run starts from: its own newest checkpoint that every rank can read, a given one, other weights, or none of them.

Start of a run. Says which checkpoints it passed over and why. Joins the recipe and the state to zaya/checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zaya.checkpoint.directory import identity, locate, step_directories
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.read import Checkpoint
from zaya.config import Recipe
from zaya.parallel.mesh import Mesh
from zaya.parallel.mesh import ranks_per_node_from_environment as ranks_per_node
from zaya.state import TrainState
from zaya.tiers import Tiers, agreed, objects

SMALL_BYTES = 1 << 30
"""A checkpoint of at most this size is verified whole before it is taken, whatever checkpoint.verify says."""


class Start(NamedTuple):
    """What a run starts from."""

    origin: str
    """In words."""
    skipped: list[str]
    """A line for each checkpoint that was passed over."""
    resumed: Checkpoint | None = None
    """Whose counters the run goes on from."""
    hf_config: Mapping[str, Any] = {}
    """The keys of config.json of the checkpoint that the weights came from; the next export writes them."""
    brings_weights: bool = True
    """They are a checkpoint's."""


def restore(recipe: Recipe, state: TrainState, mesh: Mesh) -> Start:
    """Start from where the recipe says: the run's own newest checkpoint, a given one, other weights, or none of them.

    All ranks together. CheckpointError: there are checkpoints to start from, and none can be read.
    """
    resume, allow_missing = recipe.checkpoint.resume, recipe.checkpoint.allow_missing
    skipped: list[str] = []

    def going_on(own: Checkpoint) -> Start:
        origin = f"resumed from {own.path} at step {own.manifest.step}{_changes(recipe, own)}{state.left_out}"
        return Start(origin, skipped, own, own.manifest.hf_config)

    if resume == "auto":
        found = _newest_sound(recipe, state, mesh, skipped)
        if found is not None:
            return going_on(found)
    elif resume != "never":
        own = agreed(lambda: Checkpoint.open(_named("checkpoint.resume", resume, 'name one, or write "auto" or "never"')), mesh)
        _take(own, recipe, state, mesh)
        return going_on(own)
    if recipe.init.checkpoint:
        otherwise = "name one (tools.import_hf makes one from a transformers directory)"
        given = agreed(lambda: Checkpoint.open(_named("init.checkpoint", recipe.init.checkpoint, otherwise)), mesh)
        _check_same(given, mesh)
        state.load(given, weights_only=True, allow_missing=allow_missing)
        return Start(f"weights from {recipe.init.checkpoint}{state.left_out}", skipped, hf_config=given.manifest.hf_config)
    return Start(f"new weights from seed {recipe.train.seed}", skipped, brings_weights=False)


def will_load_weights(recipe: Recipe, mesh: Mesh) -> bool:
    """Whether `restore` will replace every weight, or fail, so that none need be drawn (collective)."""
    if recipe.checkpoint.allow_missing:  # what is missing keeps what was drawn
        return False
    if recipe.init.checkpoint or recipe.checkpoint.resume not in ("auto", "never"):
        return True
    return recipe.checkpoint.resume == "auto" and any(objects(agreed(lambda: any(Tiers.of(recipe).steps()), mesh), mesh))


def _newest_sound(recipe: Recipe, state: TrainState, mesh: Mesh, skipped: list[str]) -> Checkpoint | None:
    """Loaded. Every rank tries the same ones in the same order, and one counts only if all of them can read it, and it is the same."""
    tiers = Tiers.of(recipe)
    seen = objects(agreed(tiers.steps, mesh), mesh)
    for step in sorted({step for by_root in seen for steps in by_root for step in steps}, reverse=True):
        roots = [root for index, root in enumerate(tiers.roots) if all(step in by_root[index] for by_root in seen)]
        if not roots:
            lacking = [rank for rank, by_root in enumerate(seen) if not any(step in steps for steps in by_root)]
            where = f"ranks {lacking[:8]} see it nowhere" if lacking else "no tier has it for all ranks"
            skipped.append(f"passed over the checkpoint of step {step}: {where}")
        for root in roots:
            try:
                checkpoint = agreed(lambda: tiers.open(root, step), mesh)  # noqa: B023 - called at once
                _take(checkpoint, recipe, state, mesh, on_node=root == tiers.local)
            except CheckpointError as error:
                tier = " on the local tier" if root == tiers.local else ""
                skipped.append(f"passed over the checkpoint of step {step}{tier}: {error}")
            else:
                return checkpoint
    if skipped:
        raise CheckpointError(f"no checkpoint of {tiers.shared.parent} can be read; {'; '.join(skipped)}")
    unfinished = agreed(lambda: [path for _, path, whole in step_directories(tiers.shared) if not whole], mesh)
    skipped += [f"{path} has no manifest.json: a save that did not end, or a checkpoint that was taken apart" for path in unfinished]
    return None


def _take(checkpoint: Checkpoint, recipe: Recipe, state: TrainState, mesh: Mesh, on_node: bool = False) -> None:
    """Load it; verify it whole first, where the recipe says so, where tensors may be missing, or if it is small: the files dealt out over
    all ranks, but those that lie on nodes over the ranks of each. CheckpointError, on every rank: not all of them have the same, or any of
    it is damaged."""
    _check_same(checkpoint, mesh)
    files = checkpoint.manifest.files
    here = [name for name in sorted(files) if on_node and (checkpoint.path / name).is_file()]
    on_any_node = {name for names in objects(here, mesh) for name in names}
    mine = here[mesh.rank % ranks_per_node() :: ranks_per_node()] + sorted(files.keys() - on_any_node)[mesh.rank :: mesh.world_size]

    def verify() -> None:
        # allow_missing: a load that fails half-way has written into tensors; one that the next candidate lacks would keep that.
        config, size = recipe.checkpoint, sum(file.size for file in files.values())
        if config.verify == "all" or config.allow_missing or size <= SMALL_BYTES:
            for damage in checkpoint.damages(files=mine):
                raise damage

    agreed(verify, mesh)
    state.load(checkpoint, allow_missing=recipe.checkpoint.allow_missing)


def _check_same(checkpoint: Checkpoint, mesh: Mesh) -> None:
    """CheckpointError, on every rank, unless all have opened the same one."""
    if len(set(objects(agreed(lambda: identity(checkpoint.path), mesh), mesh))) > 1:
        raise CheckpointError(f"{checkpoint.path}: the nodes hold checkpoints of different saves")


def _changes(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """What the recipe of a checkpoint said otherwise: going on at another pace, or from another run's, is allowed, but never silent."""
    theirs = checkpoint.manifest.recipe

    def changed(ours: dict[str, object]) -> str:
        return "; ".join(f"{key} was {theirs.get(section, {}).get(name)!r}, is {_plain(value)!r}" for key, value in ours.items()
                         for section, _, name in [key.partition(".")] if _plain(theirs.get(section, {}).get(name)) != _plain(value))

    has_ramp = recipe.train.batch_ramp or theirs.get("train", {}).get("batch_ramp")
    pace = changed({"train.steps": recipe.train.steps, "train.global_batch_size": recipe.train.global_batch_size,
                    **({"train.batch_ramp": recipe.train.batch_ramp} if has_ramp else {}), "train.dtype": recipe.train.dtype})
    others = changed(recipe.identity())
    is_finished = checkpoint.manifest.step >= recipe.train.steps
    return ((f"; {pace}" + ("" if is_finished else ": the new recipe holds from here") if pace else "")
            + (f"; made by another recipe: {others}" if others else ""))


def _plain(value: object) -> object:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _named(key: str, value: str, otherwise: str) -> Path:
    """The checkpoint that a recipe key names, or the newest one of the run that it names. ValueError: there is none."""
    found = locate(value)
    if found is None:
        raise ValueError(f"{key} = {value!r} is neither a checkpoint nor a run that has one; {otherwise}")
    return found
