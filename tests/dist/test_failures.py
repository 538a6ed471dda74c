"""A rank that raises, wherever it is, ends the whole job within seconds, and its own traceback comes first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
# Seconds from the fault to the end of the job; torchrun looks at its workers ten times a second.
END_S = 20.0
JOB = """
import os, runpy, sys, time
from zaya.checkpoint import directory, errors
from zaya.data import loader
from zaya.parallel import collectives, zero1
from zaya.state import TrainState
where = sys.argv.pop(1)

def refuses(*args, **kwargs):
    open(os.environ["FAULT"], "w").write(str(time.time()))
    raise (ValueError if where == "the corpora" else errors.CheckpointError)(f"planted in {where}")

def raises(function, when):
    calls = 0
    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == when:
            open(os.environ["FAULT"], "w").write(str(time.time()))
            raise RuntimeError(f"planted in {where}")
        return function(*args, **kwargs)
    return run

if os.environ["RANK"] == "1":
    if where == "forward":
        from zaya.model.moe import Router
        Router.forward = raises(Router.forward, 5)
    elif where == "a collective":
        collectives.dist.all_to_all_single = raises(collectives.dist.all_to_all_single, 9)
    elif where == "the optimizer":
        zero1.muon_direction = raises(zero1.muon_direction, 2)
    elif where == "a save":
        TrainState.owned = raises(TrainState.owned, 2)  # the first call measures the memory that a save needs
    elif where == "the recipe":
        sys.argv[1] += ".elsewhere"
        open(os.environ["FAULT"], "w").write(str(time.time()))
elif where == "the corpora":
    loader.build_corpora = refuses
elif where.endswith("tier's set-aside"):
    directory.set_aside = refuses
elif where == "every rank, and rank 0 is late":
    open(os.environ["FAULT"], "w").write(str(time.time()))
    time.sleep(3)
sys.argv[0] = "zaya.train"
runpy.run_module("zaya.train", run_name="__main__", alter_sys=True)
"""


def run(tmp_path: Path, where: str, *overrides: str) -> str:
    """What the job with a fault there has said; it has ended in time, and failed."""
    recipe, script = tmp_path / "recipe.toml", tmp_path / "job.py"
    script.write_text(JOB)
    recipe.write_text(tiny.recipe(tmp_path, train__steps=50, checkpoint__interval=4, parallel__ep=2).to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": str(tmp_path / "fault"), "PYTHONPATH": str(ROOT),
                   "GLOO_SOCKET_IFNAME": "lo"}
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), where, str(recipe),
           *overrides]
    done = subprocess.run(job, capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT)
    seconds = time.time() - float((tmp_path / "fault").read_text())
    assert done.returncode == 1
    assert seconds < END_S, f"the job ended {seconds:.0f} s after the fault"
    return done.stderr


@pytest.mark.parametrize("where", ["forward", "a collective", "the optimizer", "a save"])
def test_a_rank_that_raises_ends_the_job_with_its_traceback_first(tmp_path: Path, where: str) -> None:
    said = run(tmp_path, where)
    first = said[said.index("Traceback"):]
    assert f"RuntimeError: planted in {where}" in first.split("Traceback")[1], said[-4000:]


@pytest.mark.parametrize("where", ["the corpora", "the shared tier's set-aside", "the local tier's set-aside"])
def test_what_only_rank_0_does_at_a_start_ends_all_ranks_with_one_line(tmp_path: Path, where: str) -> None:
    said = run(tmp_path, where, *([f"--checkpoint.local_dir={tmp_path}/fast"] if "local" in where else []))
    (line,) = [line for line in said.splitlines() if line.startswith("zaya.train: ")]
    assert line == f"zaya.train: rank 0: planted in {where}" and "exitcode  : 2 " in said
    assert said.count("Traceback") == 1 and "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in said, "torchrun's own"


def test_bad_input_is_said_once_however_late_rank_0_finds_it(tmp_path: Path) -> None:
    said = run(tmp_path, "every rank, and rank 0 is late", "--train.steps=-5")
    assert [line for line in said.splitlines() if line.startswith("zaya.train: ")] == ["zaya.train: train.steps = -5 must be at least 1"]


def test_bad_input_of_one_rank_is_said_by_it(tmp_path: Path) -> None:
    said = run(tmp_path, "the recipe")
    (line,) = [line for line in said.splitlines() if line.startswith("zaya.train: ")]
    assert line.startswith("zaya.train: rank 1: ") and "recipe.toml.elsewhere" in line
