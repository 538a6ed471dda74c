"""A job of several ranks that must go: one signal to one of them, or to torchrun, and all save the same step and exit 3."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 25.0  # torchrun kills its workers 30 s after the signal
JOB = """
import os, signal, sys, time
from pathlib import Path
from zaya import train, trainer
Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
step = trainer.Trainer.train_step
def slow(self, votes=(0, 0)):
    time.sleep(0.2)
    return step(self, votes)
trainer.Trainer.train_step = slow
code = train.main(sys.argv[1:])
still = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # a later signal must not end it before it has left in order
Path(os.environ["PIDS"], os.environ["RANK"] + ".code").write_text(str(code) if still else "would be killed by another signal")
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize("target", [pytest.param("torchrun", marks=pytest.mark.slow), "one rank"])
def test_all_ranks_stop_at_the_same_step_and_go_on_from_it(tmp_path: Path, target: str) -> None:
    recipe, script = tmp_path / "recipe.toml", tmp_path / "job.py"
    script.write_text(JOB)
    recipe.write_text(tiny.recipe(tmp_path, train__steps=200, checkpoint__interval=1000, parallel__ep=2).to_toml())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIDS": str(tmp_path), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(recipe)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    record = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.exists() and record.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(job.pid if target == "torchrun" else int((tmp_path / "1").read_text()), signal.SIGTERM)
    _, stderr = job.communicate(timeout=60)
    assert time.monotonic() - began < GRACE_S
    assert [(tmp_path / f"{rank}.code").read_text() for rank in (0, 1)] == ["3", "3"], stderr
    saved = re.search(r"zaya\.train: (.*): saved at step (\d+); start it again to go on", stderr)
    assert saved and saved[1] == ("SIGTERM" if target == "torchrun" else "a signal to another rank"), stderr
    assert (tmp_path / f"run/checkpoints/step-{int(saved[2]):08d}/manifest.json").exists()
    assert record.read_bytes().count(b'"loss"') == int(saved[2]), "no step after the one that was saved"
