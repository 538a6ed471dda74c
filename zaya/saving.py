"""What a run saves with: the saver over its own connections, and with two tiers the mirror behind it.

Between the start of a run and its first step. Joins the recipe and the mesh to zaya/checkpoint.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

from zaya.checkpoint.directory import complete_steps, identity, set_aside, step_path
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.saver import Saver
from zaya.config import Recipe
from zaya.parallel.collectives import gather_objects
from zaya.parallel.mesh import Mesh, open_background
from zaya.parallel.mesh import ranks_per_node_from_environment as ranks_per_node
from zaya.tiers import Tiers, agreed, objects


def open_saver(recipe: Recipe, mesh: Mesh, step: int, origin: Path | None = None) -> Saver:
    """What a run that stands at `step`, by the checkpoint `origin`, saves with (collective): to the local tier and from there to the shared
    one, or to the shared one at once. Later checkpoints of the local tier are set aside, and a copy of that step that was passed over.
    ValueError, on every rank: the local directory cannot be written."""
    config, tiers = recipe.checkpoint, Tiers.of(recipe)
    mirror, place = None, mesh.rank
    if tiers.local is not None:
        local = tiers.local
        place, places = _place(local, mesh)
        last = step - 1 if origin == step_path(tiers.shared, step) else step
        agreed(lambda: set_aside(local, last) if place == 0 else None, mesh)
        is_here = agreed(lambda: step in complete_steps(local), mesh)
        is_left = all(objects(is_here and not _is_at(step_path(tiers.shared, step), step_path(local, step)), mesh))
        mirror = Mirror(local, tiers.shared, gather=_gather(mesh, "mirror"), rank=mesh.rank, place=place, places=places,
                        bytes_per_s=config.mirror_mb_per_s * 1e6 / mesh.world_size, keep=config.keep, keep_every=config.keep_every)
        if is_left:
            mirror.offer(step_path(local, step))  # the last process did not come to it
    return Saver(tiers.roots[0], gather=_gather(mesh, "saver"), rank=mesh.rank, world_size=mesh.world_size, leads=place == 0,
                 asynchronous=config.asynchronous, staging_bytes=int(config.staging_gib * 2**30), ranks_per_node=ranks_per_node(),
                 keep=config.keep, keep_every=0 if mirror else config.keep_every, mirror=mirror)


def _is_at(target: Path, source: Path) -> bool:
    """Whether that directory holds the checkpoint of this one, not another of its step."""
    try:
        return identity(target) == identity(source)
    except (CheckpointError, OSError):
        return False


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
        agreed(leave, mesh)
        seen = [rank for rank, name in enumerate(objects(mark.name, mesh)) if (root.parent / name).exists()]
        objects(None, mesh)  # all have looked
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
    return seen.index(mesh.rank), len(seen)
