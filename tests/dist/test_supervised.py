"""A supervised job whose ranks die, hang, freeze and compute nonsense ends as one that nobody touched: same steps, same bits, exit code 0."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from zaya.resilience.exits import read_records

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
JOB = """
import os, runpy, signal, sys, time
from pathlib import Path
from zaya import trainer
from zaya.resilience import watchdog
watchdog.HANG_S, watchdog.STALL_S = 6.0, 1.0  # the defaults are minutes
faults = Path(os.environ["FAULTS"]).read_text().split()  # one a start
starts = Path(os.environ["FAULTS"] + "." + os.environ["RANK"])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
fault, _, rank = faults[number].partition("@") if number < len(faults) else ("none", "", "")
step = trainer.Trainer.train_step

def faulty(self, votes=(0, 0)):
    if self.step >= 5 * (number + 1) and os.environ["RANK"] == rank:
        match fault:
            case "kill": os.kill(os.getpid(), signal.SIGKILL)
            case "killtorchrun": os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)
            case "raise": raise RuntimeError("planted")
            case "hang": time.sleep(1000)
            case "nan":  # as a bit that flips in memory, where no later step mends it
                next(iter(self.model.parameters())).data.fill_(float("nan"))
    return step(self, votes)

trainer.Trainer.train_step = faulty
sys.argv = ["zaya.train", *sys.argv[3:]]  # after -m zaya.train
runpy.run_module("zaya.train", run_name="__main__", alter_sys=True)
"""


def run(folder: Path, name: str, *faults: str, ranks: int = 2) -> tuple[Path, str, int]:
    """Of a supervised run: its directory, stderr, exit code."""
    recipe = tiny.recipe(folder, run__dir=str(folder / name), train__steps=STEPS, checkpoint__interval=2, parallel__ep=ranks)
    (folder / f"{name}.toml").write_text(recipe.to_toml())
    (folder / "job.py").write_text(JOB)
    (folder / f"{name}.faults").write_text(" ".join(faults))
    command = [sys.executable, "-m", "zaya.resilience.supervisor", "--pause", "0.1", "--",
               sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(folder / "job.py"),
               "-m", "zaya.train", str(folder / f"{name}.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
                   "FAULTS": str(folder / f"{name}.faults")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT)
    return folder / name, done.stderr, done.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody touches."""
    run_dir, said, code = run(tmp_path_factory.mktemp("whole"), "whole")
    assert code == 0, said[-4000:]
    return run_dir


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")}
            for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("faults", [
    ["kill@1", "hang@0"],
    pytest.param(["raise@0", "killtorchrun@0", "hang@1", "kill@0"], marks=pytest.mark.slow),
])
def test_a_job_that_fails_again_and_again_ends_as_one_that_did_not(tmp_path: Path, whole: Path, faults: list[str]) -> None:
    broken, said, code = run(tmp_path, "broken", *faults)
    assert code == 0, said[-6000:]
    assert rows(broken) == rows(whole)
    starts = re.findall(r"supervisor: start (\d+) ended after \d+ s with (\d+) ", said)
    codes = ["5" if fault.startswith("hang") else "1" for fault in faults]
    assert starts == [(str(number), code) for number, code in enumerate([*codes, "0"], start=1)]
    # A rank that has lost another may be ended by torchrun, which has seen it die, in the moment before it records that.
    at_fault = [(fault, () if fault.startswith("killtorchrun") else (int(fault[-1]),)) for fault in faults]
    certain = [ranks for fault, ranks in at_fault if not fault.startswith("kill")]
    found = [{record.at_fault for record in read_records(folder)} for folder in sorted((broken / "exit").iterdir())]
    assert found in ([{ranks} for ranks in [*(ranks for _, ranks in at_fault), ()]], [{ranks} for ranks in [*certain, ()]])


@pytest.mark.slow
def test_broken_weights_are_left_behind(tmp_path: Path, whole: Path) -> None:
    """Ten steps that update nothing, in which nothing is saved."""
    broken, said, code = run(tmp_path, "broken", "nan@0")
    assert code == 0, said[-6000:]
    assert "with 6 (numerical): loss or gradient is not finite since step 6" in said and "from the checkpoint of step 4" in said
    assert rows(broken) == rows(whole)
    assert not list(broken.glob("set-aside-*")), "there was nothing to set aside"
