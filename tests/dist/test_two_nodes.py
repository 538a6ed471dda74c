"""Two nodes on one machine: two torchrun agents that meet on loopback train what one process trains, and one's death ends the other.

What differs from the real thing is the wire. Each agent stands for a node: it has its own rank, starts its own workers and knows of the
other by address and port alone, as in tools/launch_slurm.sh (static rendezvous) or in a hand-made job (c10d).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
TIMEOUT_S = 200.0  # starting torch four times on a busy machine, not training


@dataclass
class Job:
    """Processes with a log each, killed with all they started when the test ends."""
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str) -> None:
        # One thread, so that sums do not depend on how many are free; loopback, as the only network that every machine has.
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environ.pop(name, None)
        with self.log(len(self.processes)).open("wb") as log:
            self.processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT,
                                                   start_new_session=True))

    def start_node(self, node: int, port: int, processes: int, recipe: Path, rendezvous: str, above: Sequence[str] = ()) -> None:
        meeting = {
            "static": ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)],
            "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two-nodes",
                     "--local-addr", "127.0.0.1", "--rdzv-conf", f"is_host={int(node == 0)},join_timeout={int(TIMEOUT_S)}"],
        }[rendezvous]
        self.start(*above, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes), *meeting,
                   "-m", "zaya.train", str(recipe))

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Exit codes; the logs if one does not end in time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"not done after {timeout_s:g} s\n{self.logs()}")
        return [process.returncode for process in self.processes]

    def log(self, index: int) -> Path:
        return self.folder / f"process-{index}.log"

    def logs(self) -> str:
        return "\n".join(f"--- process {index}\n{self.log(index).read_text()[-4000:]}" for index in range(len(self.processes)))

    def workers(self, node: int) -> list[int]:
        """Process ids of the workers of an agent."""
        children = Path(f"/proc/{self.processes[node].pid}/task/{self.processes[node].pid}/children").read_text()
        return [int(pid) for pid in children.split() if b"zaya.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def close(self) -> None:
        for process in self.processes:
            for pid in [*_descendants(process.pid), process.pid]:  # torchrun's workers lead sessions of their own
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in _descendants(child)]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_recipe(folder: Path, name: str, **overrides: object) -> Path:
    """NAME.toml, whose run lies in folder/NAME; all of a folder share corpora."""
    recipe = tiny.recipe(folder, run__dir=str(folder / name), train__log_interval=1, **overrides)
    path = folder / f"{name}.toml"
    path.write_text(recipe.to_toml())
    return path


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Training rows so far; a torn last line is left out."""
    if not (run_dir / "metrics.jsonl").exists():
        return []
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [row for row in (json.loads(line) for line in lines if line.endswith("\n")) if "loss" in row]


@pytest.mark.parametrize(("rendezvous", "processes", "layout"), [
    pytest.param("static", 2, dict(parallel__tp=2, parallel__ep=4), id="static, tp 2 ep 4"),  # tp inside a node, experts across both
    pytest.param("static", 1, {}, id="static, dp 2", marks=pytest.mark.slow),
    pytest.param("c10d", 1, dict(parallel__cp=2), id="c10d, cp 2", marks=pytest.mark.slow),
])
def test_two_nodes_train_what_one_process_trains(tmp_path: Path, job: Job, rendezvous: str, processes: int,
                                                 layout: dict[str, object]) -> None:
    sizes = dict(train__steps=STEPS, train__eval_interval=0, checkpoint__interval=STEPS)
    single = write_recipe(tmp_path, "single", **sizes)
    double = write_recipe(tmp_path, "double", **sizes, **layout)
    port = free_port()
    for node in (0, 1):
        job.start_node(node, port, processes, double, rendezvous)
    job.start("-m", "zaya.train", str(single))
    assert job.wait() == [0, 0, 0], job.logs()
    ours, theirs = rows(tmp_path / "double"), rows(tmp_path / "single")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs):
        assert abs(our["loss"] - their["loss"]) < 1e-5, (our, their)
        assert abs(our["grad_norm"] - their["grad_norm"]) < 1e-4 * their["grad_norm"], (our, their)
    logs = sorted(path.name for path in (tmp_path / "double/logs").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(2 * processes)]
    assert [path.name for path in (tmp_path / "double/checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    # Only rank 0 speaks, so only its node's output has the steps.
    said = [f"step {STEPS}/{STEPS}" in job.log(node).read_text() for node in (0, 1)]
    assert said == [True, False] if rendezvous == "static" else sum(said) == 1


@pytest.mark.slow
def test_two_supervised_nodes_start_again_together(tmp_path: Path, job: Job) -> None:
    """A worker of the second node is killed; both nodes' jobs end, both supervisors start them again, and they meet."""
    steps = 30
    recipe = write_recipe(tmp_path, "double", train__steps=steps, train__eval_interval=0, checkpoint__interval=4)
    port, supervisor = free_port(), ("-m", "zaya.resilience.supervisor", "--pause", "2", "--", sys.executable)
    for node in (0, 1):
        job.start_node(node, port, 2, recipe, "static", above=supervisor)
    deadline = time.monotonic() + TIMEOUT_S
    while len(rows(tmp_path / "double")) < 10:
        assert time.monotonic() < deadline and all(process.poll() is None for process in job.processes), job.logs()
        time.sleep(0.02)
    (agent,) = _descendants(job.processes[1].pid)[:1]
    (worker, *_) = [pid for pid in _descendants(agent) if b"zaya.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    assert job.wait() == [0, 0], job.logs()
    assert [row["step"] for row in rows(tmp_path / "double")] == list(range(1, steps + 1))
    for node in (0, 1):
        said = [line for line in job.log(node).read_text().splitlines() if line.startswith("zaya.resilience.supervisor: start ")]
        assert len(said) == 2 and "is gone: its process has ended" in said[0] and "with 0 (done)" in said[1], job.logs()


def test_the_death_of_a_node_ends_the_other(tmp_path: Path, job: Job) -> None:
    recipe = write_recipe(tmp_path, "double", train__steps=1_000_000, train__eval_interval=0, checkpoint__interval=0)
    port = free_port()
    for node in (0, 1):
        job.start_node(node, port, 1, recipe, "static")
    deadline = time.monotonic() + TIMEOUT_S
    while len(rows(tmp_path / "double")) < 2:
        assert time.monotonic() < deadline and all(process.poll() is None for process in job.processes), job.logs()
        time.sleep(0.2)
    (worker,) = job.workers(1)
    agent = job.processes[1].pid
    for pid in (agent, worker):  # as when the power fails: the agent first, so that it cannot say goodbye
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    codes = job.wait(60)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1, job.logs()
    assert time.monotonic() - started < 60
    assert "Traceback" in job.log(0).read_text(), "the surviving rank says where it was"
