"""Two tiers over several nodes: each node's disk holds its own ranks' files only, and a run goes on from what is left."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist.pool import Pools
from zaya.checkpoint.directory import complete_steps
from zaya.checkpoint.read import Checkpoint
from zaya.resume import Tiers


def train(rank: int, world_size: int, tables: dict[str, Any], folder: str) -> tuple[list[float], str, list[str], list[str]]:
    """Two ranks a node, which has a disk of its own: losses, where it began, what it passed over, files on the node's disk."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        tables["checkpoint"]["local_dir"] = f"{folder}/node{rank // 2}"
        trainer = tiny.trainer(tables, world_size)
        trainer.restore()
        losses = []
        step = trainer.train_step

        def noted(votes: Any = (0, 0)) -> Any:
            result = step(votes)
            losses.append(result.loss.item())
            return result

        trainer.train_step = noted  # type: ignore[method-assign]
        trainer.fit(None)
        local = Tiers.of(trainer.recipe).local
        assert local is not None
        return losses, trainer.origin, trainer.skipped, sorted(str(path.relative_to(local)) for path in local.rglob("*.safetensors"))
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


@pytest.fixture(scope="module")
def start(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Any]]:
    """A run of 4 ranks, saved at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("tiers")
    recipe = tiny.recipe(folder, train__steps=4, checkpoint__interval=2, parallel__ep=2, optim__min_lr=2e-2, optim__warmup_steps=0)
    tables = dataclasses.asdict(recipe)
    return folder, tables, pools[4].run(train, tables, str(folder))


def again(pools: Pools, folder: Path, tables: dict[str, Any]) -> list[Any]:
    """The same run, two steps further."""
    tables = {**tables, "train": {**tables["train"], "steps": 6}, "checkpoint": dict(tables["checkpoint"])}
    return pools[4].run(train, tables, str(folder))


def copied(start: tuple[Path, dict[str, Any], list[Any]]) -> tuple[Path, dict[str, Any], dict[int, Path], Path]:
    """Everything the run left, restored to how it was; (folder, tables, local roots by node, shared root)."""
    folder, tables, _ = start
    backup = folder.parent / f"{folder.name}-backup"
    if not backup.exists():
        shutil.copytree(folder, backup)
    for name in ("run", "node0", "node1"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(backup / name, folder / name)
    local = {node: next((folder / f"node{node}").iterdir()) / "checkpoints" for node in (0, 1)}
    return folder, tables, local, folder / "run/checkpoints"


def test_every_node_has_its_ranks_files_and_the_shared_tier_has_all(start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    _, _, local, shared = copied(start)
    assert complete_steps(local[0]) == complete_steps(local[1]) == [2, 4] and complete_steps(shared)[-1] == 4
    files = {node: {path.name for path in (local[node] / "step-00000004").glob("*.safetensors")} for node in local}
    assert len(files[0]) == len(files[1]) == 2 and not files[0] & files[1]
    assert files[0] | files[1] == {path.name for path in (shared / "step-00000004").glob("*.safetensors")}
    Checkpoint.open(shared / "step-00000004").verify()


def test_the_same_layout_needs_the_nodes_own_disks_only(pools: Pools, start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, local, shared = copied(start)
    from_both = again(pools, folder, tables)
    assert all(f"resumed from {local[rank // 2]}/step-00000004" in from_both[rank][1] for rank in range(4))
    folder, tables, local, shared = copied(start)
    shutil.rmtree(shared)
    from_local = again(pools, folder, tables)
    assert "at step 4" in from_local[0][1] and [one[0] for one in from_local] == [one[0] for one in from_both]
    assert complete_steps(shared)[-1] == 6


def test_a_lost_node_is_no_lost_run(pools: Pools, start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, local, shared = copied(start)
    whole = again(pools, folder, tables)
    folder, tables, local, shared = copied(start)
    shutil.rmtree(folder / "node1")
    results = again(pools, folder, tables)
    assert f"resumed from {shared}/step-00000004" in results[0][1] and not results[0][2]
    assert [one[0] for one in results] == [one[0] for one in whole]
    # Without its shared copy the step is lost with the node: the newest that every rank can read is taken.
    folder, tables, local, shared = copied(start)
    shutil.rmtree(folder / "node1")
    shutil.rmtree(shared / "step-00000004")
    shutil.rmtree(shared / "step-00000002", ignore_errors=True)
    shutil.copytree(local[0] / "step-00000002", shared / "step-00000002")  # as the mirror would have, given the time
    for file in (folder.parent / f"{folder.name}-backup/node1").rglob("step-00000002/*.safetensors"):
        shutil.copy(file, shared / "step-00000002")
    assert f"resumed from {shared}/step-00000002 at step 2" in again(pools, folder, tables)[0][1]


def test_another_layout_reads_what_its_node_lacks_from_the_shared_tier(pools: Pools,
                                                                       start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, local, shared = copied(start)
    whole = again(pools, folder, tables)
    folder, tables, local, shared = copied(start)
    tables = {**tables, "parallel": {**tables["parallel"], "ep": 4, "tp": 2}}
    results = again(pools, folder, tables)
    assert "at step 4" in results[0][1]
    assert max(abs(a - b) for a, b in zip(results[0][0], whole[0][0], strict=True)) < 1e-5
