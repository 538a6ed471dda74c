"""Two tiers over several nodes: each node's disk holds its own ranks' files only, and a run goes on from what is left."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist.pool import Pools, WorkerError
from zaya.checkpoint.directory import complete_steps
from zaya.checkpoint.manifest import load
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.metrics import MetricsWriter, read_rows
from zaya.preemption import SIGNALS
from zaya.tiers import Tiers


def train(rank: int, world_size: int, tables: dict[str, Any], folder: str, own_disks: bool = True) -> tuple[list[float], str, list[str], list[str]]:
    """Two ranks a node, which has a disk of its own: losses, where it began, what it passed over, files on the node's disk."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        tables["checkpoint"]["local_dir"] = f"{folder}/node{rank // 2 if own_disks else 0}"
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
    assert f"resumed from {local[0]}/step-00000004" in results[0][1] and not results[0][2]
    assert max(abs(a - b) for a, b in zip(results[0][0], whole[0][0], strict=True)) < 1e-5


def test_nodes_with_different_saves_of_a_step_do_not_mix_them(pools: Pools, start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, local, shared = copied(start)
    manifest = local[1] / "step-00000004/manifest.json"
    manifest.write_text(dataclasses.replace(load(manifest.parent), tokens=1).to_json())
    results = again(pools, folder, tables)
    assert "hold checkpoints of different saves" in results[0][2][0] and f"resumed from {shared}/step-00000004" in results[0][1]


def test_a_checkpoint_that_only_some_ranks_see_is_no_fresh_start(pools: Pools, start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, _, shared = copied(start)
    shutil.rmtree(shared)
    shutil.rmtree(folder / "node1")
    with pytest.raises(WorkerError, match=r"step 4: ranks \[2, 3\] see it nowhere"):
        again(pools, folder, tables)
    assert complete_steps(next((folder / "node0").iterdir()) / "checkpoints") == [2, 4], "nothing is set aside"


def begin(rank: int, world_size: int, tables: dict[str, Any], folder: str) -> int:
    """A start on two nodes, without a step; where it began."""
    from zaya import train as entry

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    start_logging, entry.start_logging = entry.start_logging, lambda *_: None
    try:
        tables["checkpoint"]["local_dir"] = f"{folder}/node{rank // 2}"
        trainer = tiny.trainer(tables, world_size)
        trainer.restore()
        record = entry.open_run(trainer)
        if record is not None:
            record.close()
        return trainer.step
    finally:
        entry.start_logging = start_logging
        del os.environ["LOCAL_WORLD_SIZE"]


def test_the_record_is_kept_where_only_another_node_has_a_later_checkpoint(pools: Pools, start: tuple[Path, dict[str, Any], list[Any]]) -> None:
    folder, tables, local, shared = copied(start)
    record = MetricsWriter(folder / "run/metrics.jsonl", 0)
    for step in (1, 2, 3, 4):
        record.append({"step": step, "loss": 1.0})
    record.close()
    shutil.rmtree(shared / "step-00000004")
    shutil.rmtree(local[0] / "step-00000004")
    assert pools[4].run(begin, {**tables, "checkpoint": dict(tables["checkpoint"])}, str(folder)) == [2] * 4
    assert complete_steps(local[1].parent / "set-aside-1/checkpoints") == [4] and complete_steps(local[1]) == [2]
    assert [len(read_rows(folder / name)[0]) for name in ("run/metrics.jsonl", "run/set-aside-1/metrics.jsonl")] == [2, 4]


def test_a_local_directory_that_all_nodes_share(pools: Pools, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__steps=4, checkpoint__interval=2, parallel__ep=2)
    results = pools[4].run(train, dataclasses.asdict(recipe), str(tmp_path), False)
    assert len(results[0][3]) >= 4
    Checkpoint.open(tmp_path / "run/checkpoints/step-00000004").verify()


def fails_once(rank: int, world_size: int, tables: dict[str, Any]) -> tuple[int, int | None, list[float]]:
    """Rank 1's disk is full for one file: failures and newest checkpoint as this rank counts them, and the losses."""
    from zaya.checkpoint import saver

    trainer = tiny.trainer(tables, world_size)
    trainer.restore()
    sync, step, losses, full = os.fsync, trainer.train_step, [], [rank == 1]

    def fsync(fd: int) -> None:
        if full[0] and "safetensors" in os.readlink(f"/proc/self/fd/{fd}"):
            full[0] = False
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    def noted(votes: Any = (0, 0)) -> Any:
        result = step(votes)
        losses.append(result.loss.item())
        return result

    pause_s, trainer.train_step = saver.PAUSE_S, noted  # type: ignore[method-assign]
    os.fsync, saver.PAUSE_S = fsync, 0.01  # type: ignore[assignment]
    try:
        trainer.fit(None)
    finally:
        os.fsync, saver.PAUSE_S = sync, pause_s
    assert trainer.saver is not None
    return trainer.saver.failures, trainer.saver.step, losses


def test_a_save_that_fails_on_one_rank_is_tried_again_by_all(pools: Pools, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__steps=8, checkpoint__interval=3)
    results = pools[2].run(fails_once, dataclasses.asdict(recipe))
    assert [one[:2] for one in results] == [(1, 8)] * 2 and results[0][2] == results[1][2]
    steps = complete_steps(tmp_path / "run/checkpoints")
    assert 3 not in steps and steps[0] in (4, 5, 6) and steps[-1] == 8, "that of step 3 failed; the next attempt is later"


def signalled_while_it_mirrors(rank: int, world_size: int, tables: dict[str, Any]) -> tuple[str, float]:
    """Rank 1 is told to go while all wait for a mirror that hangs: how the run ended, and seconds from the signal to that."""
    trainer = tiny.trainer(tables, world_size)
    trainer.restore()
    sent: list[float] = []

    def stuck(self: Mirror, step: int) -> None:
        time.sleep(1)  # the training is over and waits
        sent.append(time.monotonic())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    bring, Mirror._bring = Mirror._bring, stuck  # type: ignore[method-assign]
    try:
        return trainer.fit(None), time.monotonic() - sent[0]
    finally:
        Mirror._bring = bring  # type: ignore[method-assign]
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def test_a_signal_to_one_rank_ends_the_wait_of_all_for_the_mirror(pools: Pools, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__steps=2, checkpoint__interval=2, checkpoint__local_dir=str(tmp_path / "fast"), optim__warmup_steps=0)
    results = pools[2].run(signalled_while_it_mirrors, dataclasses.asdict(recipe))
    assert [ended_by for ended_by, _ in results] == ["a signal to another rank", "SIGTERM"] and max(seconds for _, seconds in results) < 1.5
