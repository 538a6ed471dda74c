"""A rank that fails, dies, freezes or stands still: the others end within seconds, every record says which rank it was, and torchrun too."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
HANG_S, LOST_S = 6.0, 6.0  # the defaults are minutes
END_S = 20.0
JOB = """
import os, runpy, signal, sys, time
from pathlib import Path
from zaya.data import corpus, loader
from zaya.parallel import collectives
from zaya.resilience import watchdog
from zaya import trainer
fault, at = sys.argv[1], Path(os.environ["FAULT"])
watchdog.HANG_S, watchdog.LOST_S, watchdog.STALL_S = float(os.environ["HANG_S"]), float(os.environ["LOST_S"]), 1.0

def once(function, when, action):
    calls = 0
    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == when:
            at.write_text(str(time.time()))
            action()
        return function(*args, **kwargs)
    return run

if fault.startswith("deaf "):  # as under RCCL: what a rank waits for does not end when another is gone
    wait = collectives.Pending.wait
    def deaf(self):
        try:
            return wait(self)
        except RuntimeError:
            time.sleep(1000)
    collectives.Pending.wait = deaf
if os.environ["RANK"] == os.environ["AT"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    match fault.removeprefix("deaf "):
        case "raise":
            def action(): raise RuntimeError("planted")
        case "refuse":
            def action(): raise corpus.CorpusError("planted corpus fault")
        case "kill":
            def action(): os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            def action(): os.kill(os.getpid(), signal.SIGSTOP)
        case "freeze torchrun":
            def action(): os.kill(os.getppid(), signal.SIGSTOP); time.sleep(1000)
        case "sleep":
            def action(): time.sleep(1000)
    loader.Loader.batch = once(loader.Loader.batch, 5, action)
sys.argv = ["zaya.train", *sys.argv[2:]]
runpy.run_module("zaya.train", run_name="__main__", alter_sys=True)
"""


def start(tmp_path: Path, fault: str, at: int, ranks: int = 3, hang_s: float = 60, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    recipe, script = tmp_path / "recipe.toml", tmp_path / "job.py"
    script.write_text(JOB)
    recipe.write_text(tiny.recipe(tmp_path, train__steps=50, train__eval_interval=0, checkpoint__interval=1000, train__global_batch_size=6,
                                  train__micro_batch_size=1).to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "AT": str(at),
                   "FAULT": str(tmp_path / "fault"), "HANG_S": str(hang_s), "LOST_S": str(LOST_S)}
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options, str(script), fault,
           str(recipe)]
    return subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def run(tmp_path: Path, fault: str, at: int, hang_s: float = 60) -> tuple[dict[int, dict[str, Any]], str]:
    """The exit records by rank, and the job's stderr; it has ended in time."""
    process = start(tmp_path, fault, at, hang_s=hang_s)
    _, said = process.communicate(timeout=150)
    seconds = time.time() - float((tmp_path / "fault").read_text())
    assert process.returncode == 1 and seconds < END_S, f"{process.returncode}, {seconds:.1f} s after the fault\n{said[-4000:]}"
    return records_of(tmp_path), said


def records_of(tmp_path: Path, attempt: int = 1) -> dict[int, dict[str, Any]]:
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / f"run/exit/{attempt:04d}").glob("rank-?.json"))]
    return {record["rank"]: record for record in records}


def root_cause(said: str) -> int:
    """The rank that torchrun's report names first."""
    return int(re.findall(r"rank +: (\d+)", said[said.index("Root Cause"):])[0])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "deaf raise", "deaf refuse"])
def test_a_failing_rank_is_named_by_all_and_ends_them(tmp_path: Path, fault: str) -> None:
    records, said = run(tmp_path, fault, at=1)
    code, cause = (2, "planted corpus fault") if "refuse" in fault else (1, "RuntimeError: planted")
    assert {rank: (record["code"], record["cause"], record["at_fault"]) for rank, record in records.items()} == {
        rank: (code, cause, [1]) for rank in range(3)}
    assert root_cause(said) == 1
    assert said.count(cause) == 1 and said.count("Traceback") == 1 + (code == 1), "the others are silent, but for torchrun's own"


@pytest.mark.parametrize("fault", [pytest.param("kill", marks=pytest.mark.slow), "deaf kill"])
def test_a_killed_rank_is_missed_at_once(tmp_path: Path, fault: str) -> None:
    records, said = run(tmp_path, fault, at=2)
    assert set(records) == {0, 1}
    for record in records.values():
        assert record["code"] == 1 and record["at_fault"] == [2] and re.match(r"rank 2 on \S+ is gone: .*killed", record["cause"]), record
        assert record["phase"] in ("micro-batch", "update") and record["host"] and record["action"].startswith("start it again")
    assert root_cause(said) == 2


@pytest.mark.slow
def test_a_frozen_rank_is_missed_when_its_beats_are(tmp_path: Path) -> None:
    records, _ = run(tmp_path, "freeze", at=0)
    assert set(records) == {1, 2} and all(record["at_fault"] == [0] for record in records.values())
    assert records[2]["cause"].endswith(f"is gone: no sign of it for {LOST_S:.0f} s")


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_hang_names_the_rank_that_is_late(tmp_path: Path, at: int) -> None:
    records, said = run(tmp_path, "sleep", at, hang_s=HANG_S)
    assert {rank: (record["code"], record["at_fault"]) for rank, record in records.items()} == {rank: (5, [at]) for rank in range(3)}
    place = re.match(rf"no progress for {HANG_S:.0f} s: rank {at} is behind, at step (\d+), micro-batch (\d+), ", records[0]["cause"])
    assert place and (int(place[1]), int(place[2])) == (3, 1), records[0]["cause"]  # the 5th batch of 2 a step
    lines = [line for line in said.splitlines() if line.startswith("zaya.train: ")]
    assert len(lines) == 1 and records[0]["cause"] in lines[0] and "start it again" in lines[0], "one rank says it"
    stacks = (tmp_path / f"run/logs/rank-{at}.log").read_text()
    assert "in action" in stacks and "the job ends: no progress" in stacks, "where it was"


@pytest.mark.slow
def test_a_frozen_launcher_ends_its_workers(tmp_path: Path) -> None:
    """It has the store; a call to it does not return. As when the first node has lost its power, seen from another."""
    process = start(tmp_path, "freeze torchrun", at=1)
    try:
        deadline = time.monotonic() + 90
        while len(records_of(tmp_path)) < 3 if (tmp_path / "run/exit").exists() else True:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        assert time.time() - float((tmp_path / "fault").read_text()) < LOST_S + 10
        records = records_of(tmp_path).values()  # one that is still there when another has left has that for its cause
        assert f"the job's store has not answered for {LOST_S:.0f} s: rank 0 or its node is gone" in {record["cause"] for record in records}
        assert {record["code"] for record in records} == {1}
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_torchruns_own_restart_does_not_inherit_the_verdict(tmp_path: Path) -> None:
    """With --max-restarts its store outlives the first start."""
    process = start(tmp_path, "raise", at=1, options=["--max-restarts", "1"])
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0, said[-4000:]
    assert [record["code"] for record in records_of(tmp_path, 1).values()] == [1, 1, 1]
    assert [record["code"] for record in records_of(tmp_path, 2).values()] == [0, 0, 0]


def test_a_run_that_ends_well_leaves_records_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tiny.recipe(tmp_path, train__steps=2, train__eval_interval=0, parallel__ep=2).to_toml())
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zaya.train", str(recipe)]
    for attempt in (1, 2):
        done = subprocess.run(job, capture_output=True, text=True, timeout=150, cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
        assert done.returncode == 0, done.stderr[-4000:]
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / f"run/exit/{attempt:04d}").iterdir())]
        assert [(record["rank"], record["code"], record["step"], record["at_fault"]) for record in records] == [(0, 0, 2, []), (1, 0, 2, [])]
