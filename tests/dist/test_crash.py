"""Crashes: kill -9 at random points of a save, again and again over a short run; it ends where the run that nobody touched ended, bitwise.

After every kill each checkpoint that has a manifest verifies, and the next start goes on from the newest one.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist.fork_server import CALLS, ROOT, Death, ForkServer
from zaya.checkpoint.directory import complete_steps, newest, step_path
from zaya.checkpoint.read import Checkpoint
from zaya.config import Recipe
from zaya.tiers import Tiers

STEPS = 6
SAVE_S = 0.3  # a step and its save, roughly
END_S = 20.0  # from the death of a rank to the end of the others


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: what a process leaves behind is the same, and an fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path) as folder:
        yield Path(folder)


class Runs:
    """Of one recipe: the run that nobody touches, and those that get killed."""

    def __init__(self, server: ForkServer, folder: Path, ranks: int = 1, **overrides: Any) -> None:
        self.server, self.folder, self.ranks, self.overrides = server, folder, ranks, overrides
        self.whole = self.recipe("whole")
        calls = folder / "calls"
        ended = server.run([self.file(self.whole)], ranks=ranks, calls=calls)
        assert ended.codes == [0] * ranks, server.log.read_text()[-4000:]
        self.calls_per_save = {name: -(-count // STEPS) for name, count in collections.Counter(calls.read_text().split()).items()}
        assert self.calls_per_save.keys() == set(CALLS), "every kind of call is one to die at"

    def recipe(self, name: str) -> Recipe:
        # A checkpoint of the rows of every step, so that each step has a save to die in; old ones go, so that deaths fall into that too.
        local = {"checkpoint__local_dir": str(self.folder / "local")} if self.overrides.get("tiers") else {}
        overrides = {key: value for key, value in self.overrides.items() if key != "tiers"}
        return tiny.recipe(self.folder, train__steps=STEPS, checkpoint__interval=1, checkpoint__keep=2,
                           run__dir=str(self.folder / name), **local, **overrides)

    def file(self, recipe: Recipe) -> str:
        path = Path(f"{recipe.run.dir}.toml")
        path.write_text(recipe.to_toml())
        return str(path)

    def death(self, rng: random.Random) -> Death:
        """Within the first two saves."""
        rank = rng.randrange(self.ranks)
        if rng.random() < 0.3:
            return Death(rank, delay_s=rng.uniform(0, 2 * SAVE_S))
        call = rng.choice([*CALLS, "replace", "fsync"])  # about a manifest more often
        return Death(rank, call=call, count=rng.randint(1, 2 * self.calls_per_save[call]), share=rng.random())

    def crash(self, name: str, rng: random.Random, kills: int) -> int:
        """Start a run, kill it and start it again until it is finished or has been killed `kills` times, and then let it finish."""
        recipe = self.recipe(name)
        killed, expected, origins = 0, "new weights from seed", list[str]()
        while True:
            death = self.death(rng) if killed < kills else None
            ended = self.server.run([self.file(recipe)], ranks=self.ranks, death=death)
            before, origins = origins, [line for line in log_of(recipe).splitlines() if "mesh: " in line]
            # The mirror's thread can be the death of a start before it has said what it starts from.
            assert len(origins) > len(before) or (death is not None and recipe.checkpoint.local_dir), (death, origins)
            if len(origins) > len(before):
                assert origin_in(origins[-1]).startswith(expected), (death, origins)
            assert "passed over" not in log_of(recipe)
            if ended.codes == [0] * self.ranks:
                self.assert_as_untouched(recipe)
                return killed
            assert death is not None and ended.codes[death.rank] == -signal.SIGKILL, (death, ended, self.server.log.read_text()[-4000:])
            others = [code for rank, code in enumerate(ended.codes) if rank != death.rank]
            killed += 1
            expected = resumed_from(recipe)
            # In its last moment a rank is not missed: the run is finished.
            assert all(code > 0 for code in others) or expected.endswith(f"at step {STEPS}"), (death, ended)
            assert ended.seconds < END_S, (death, ended)

    def assert_as_untouched(self, recipe: Recipe) -> None:
        assert trajectory(recipe) == trajectory(self.whole)
        for root in Tiers.of(recipe).roots:
            assert state_at_the_end(root) == state_at_the_end(Tiers.of(self.whole).shared)


def log_of(recipe: Recipe) -> str:
    path = Path(recipe.run.dir) / "logs" / "rank-0.log"
    return path.read_text() if path.exists() else ""


def origin_in(line: str) -> str:
    """What a start says it starts from, behind its mesh and kernels."""
    return line.split(" | ")[-1]


def resumed_from(recipe: Recipe) -> str:
    """What a start must say. Every checkpoint that looks complete verifies."""
    found = []
    for preference, root in enumerate(reversed(Tiers.of(recipe).roots)):
        for step in complete_steps(root):
            checkpoint = Checkpoint.open(step_path(root, step))
            checkpoint.verify()
            assert checkpoint.manifest.step == step
            found.append((step, preference, checkpoint.path))
    return f"resumed from {max(found)[2]} at step {max(found)[0]}" if found else "new weights from seed"


def trajectory(recipe: Recipe) -> list[tuple[Any, ...]]:
    """Losses, gradient norms and routing of every step, and every evaluation: JSON gives a float back bit for bit."""
    rows = [json.loads(line) for line in (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    return [tuple(row.get(key) for key in ("step", "loss", "eval_loss", "grad_norm", "tokens", "expert_load")) for row in rows]


def state_at_the_end(root: Path) -> tuple[Any, ...]:
    """Hashes of all boxes, which have been compared with the bytes, and the counters."""
    path = newest(root)
    assert path is not None
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    manifest = checkpoint.manifest
    boxes = {name: sorted((box.offsets, box.sizes, box.xxh3) for box in entry.boxes) for name, entry in manifest.tensors.items()}
    return manifest.step, manifest.tokens, manifest.position, manifest.tokens_by_corpus, boxes


def crash_often(runs: Runs, kills: int, seed: int) -> None:
    rng, done = random.Random(seed), 0
    for number in range(kills):
        done += runs.crash(f"run-{number}", rng, kills - done)
        if done == kills:
            return
    raise AssertionError("the kills missed the saves")


@pytest.mark.parametrize(("kills", "tiers"), [
    (10, True), *(pytest.param(100, tiers, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for tiers in (False, True))],
    ids=["10 on two tiers", "100 on one tier", "100 on two tiers"])
def test_killed_in_saves_again_and_again(server: ForkServer, memory: Path, tmp_path: Path, tiers: bool, kills: int, soak_seed: int) -> None:
    crash_often(Runs(server, memory if kills < 100 else tmp_path, tiers=tiers), kills, seed=kills + soak_seed)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_one_of_two_ranks_is_killed_in_a_save(server: ForkServer, memory: Path, tmp_path: Path, kills: int, soak_seed: int) -> None:
    """The other ends by itself; half a checkpoint of one rank is none."""
    crash_often(Runs(server, memory if kills < 50 else tmp_path, ranks=2, parallel__ep=2), kills, seed=kills + soak_seed)


JOB = """
import json, os, runpy, sys
from tests.dist.fork_server import Death, watch
if os.environ["RANK"] == "1" and os.environ["DEATH"]:
    watch(Death(**json.loads(os.environ["DEATH"])), "")
sys.argv[0] = "zaya.train"
runpy.run_module("zaya.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_under_torchrun_is_killed_in_a_save(server: ForkServer, tmp_path: Path) -> None:
    """The whole job is over, by torchrun's code 1; the next one resumes, and ends where nobody's did."""
    runs = Runs(server, tmp_path, ranks=2, parallel__ep=2)
    recipe, script = runs.recipe("torchrun"), tmp_path / "job.py"
    script.write_text(JOB)
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), runs.file(recipe)]
    expected = "new weights from seed"
    for call, count in (("preadv", 2 * runs.calls_per_save["preadv"]), ("write", runs.calls_per_save["write"] + 3), ("fsync", 2), ("", 0)):
        death = json.dumps({"rank": 1, "call": call, "count": count, "share": 0.5}) if call else ""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "DEATH": death}
        done = subprocess.run(job, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
        assert done.returncode == bool(call) and ("Signal 9 (SIGKILL)" in done.stderr) == bool(call), done.stderr[-4000:]
        origin = [line for line in log_of(recipe).splitlines() if "mesh: " in line][-1]
        assert origin_in(origin).startswith(expected), (call, origin)
        expected = resumed_from(recipe)
    runs.assert_as_untouched(recipe)
