"""What the supervisor makes of every end: start again, go back, or end with the code; of signals, orphans and bad commands."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny
from zaya.resilience import supervisor
from zaya.resilience.exits import Exit, ExitRecord
from zaya.resilience.guard import MAX_SKIPPED, Guard, NumericalFault
from zaya.resilience.supervisor import Job, Rollbacks, Supervisor, end_of

ROOT = Path(__file__).resolve().parents[2]
# A job that does what its script says: a line of JSON each start, {"code", "step", "saves": [...], "status", "do"}.
JOB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from zaya.resilience.exits import ExitRecord
folder = Path(os.environ["SCRIPT"]).parent
with open(folder / "starts", "a") as starts:
    print(json.dumps(sys.argv[1:]), file=starts)
number = len((folder / "starts").read_text().splitlines())
act = json.loads(Path(os.environ["SCRIPT"]).read_text().splitlines()[number - 1])
back = [word.partition("step-")[2] for word in sys.argv if word.startswith("--checkpoint.resume=")]
checkpoints = folder / "run/checkpoints"
for path in checkpoints.glob("step-*"):
    if back and int(path.name[5:]) > int(back[0]):  # as zaya.train sets aside
        (path / "manifest.json").unlink()
for step in act.get("saves", []):
    (checkpoints / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (checkpoints / f"step-{step:08d}/manifest.json").touch()
if "code" in act:
    for rank in (0, 1):
        ExitRecord(rank, act["code"], act.get("step", 0), "micro-batch", "scripted", (1,) if act["code"] else ()).report()
match act.get("do"):
    case "orphan":
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (folder / "orphan").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    case "wait":
        def stop(*_):
            ExitRecord(0, 3, 5, "end", "SIGTERM").report()
            sys.exit(1)
        signal.signal(signal.SIGTERM, stop)
        (folder / "waits").touch()
        time.sleep(1000)
    case "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "waits").touch()
        time.sleep(1000)
sys.exit(act.get("status", 1 if act.get("code") else 0))
"""


def start(folder: Path, acts: list[dict[str, object]], *options: str) -> subprocess.Popen[str]:
    """The supervisor of a job that acts so, one act a start."""
    (folder / "acts").write_text("".join(json.dumps(act) + "\n" for act in acts))
    (folder / "job.py").write_text(JOB)
    (folder / "recipe.toml").write_text(tiny.recipe(folder).to_toml())
    command = [sys.executable, "-m", "zaya.resilience.supervisor", "--pause", "0.01", *options, "--",
               sys.executable, str(folder / "job.py"), "-m", "zaya.train", str(folder / "recipe.toml"), "--train.steps=9"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "SCRIPT": str(folder / "acts"), "PYTHONPATH": str(ROOT)})


def supervised(folder: Path, acts: list[dict[str, object]], *options: str) -> tuple[int, str, list[str]]:
    """Exit code, stderr, and the last word of every start's command."""
    process = start(folder, acts, *options)
    _, said = process.communicate(timeout=60)
    starts = [json.loads(line) for line in (folder / "starts").read_text().splitlines()]
    return process.returncode, said, [words[-1] for words in starts]


@pytest.mark.parametrize(("acts", "code", "starts", "words"), [
    ([{}], 0, 1, "start 1 ended after 0 s with 0: the run is finished"),
    ([{"code": 2}], 2, 1, "with 2: scripted (rank 1 on "),
    ([{"code": 7}], 7, 1, "with 7: scripted"),
    ([{"code": 3, "step": 4}], 3, 1, "with 3: scripted"),
    ([{"code": 1}, {"code": 5, "saves": [2]}, {}], 0, 3, "starting again in 0.01 s from the checkpoint of step 2\n"),
    ([{"code": 1}] * 3, 8, 3, "3 starts in a row have saved no new checkpoint: given up; the causes are in "),
    ([{"code": 5}, {"code": 5}, {"code": 5, "saves": [1]}, {"code": 1}, {"code": 1}, {"code": 1, "saves": [2]}, {}], 0, 7,
     "(2 of 3 in a row without a new checkpoint)\n"),
    ([{"status": 1}] * 3, 8, 3, "exit code 1, and no rank has left a record"),  # it does not even import torch
    ([{"status": 2}], 2, 1, "said by its exit code"),  # torchrun refuses its arguments
    ([{"code": 0, "status": 1}] * 3, 8, 3, "though every rank that left a record was done"),
    ([{"do": "orphan"}, {}], 0, 2, "ended by SIGKILL, and no rank has left a record"),
])
def test_every_end_has_its_answer(tmp_path: Path, acts: list[dict[str, object]], code: int, starts: int, words: str) -> None:
    ended, said, commands = supervised(tmp_path, acts)
    assert (ended, len(commands)) == (code, starts) and words in said, said
    assert set(commands) == {"--train.steps=9"}
    assert all(line.startswith("zaya.resilience.supervisor: ") for line in said.splitlines())
    if acts[0].get("do") == "orphan":
        assert not subprocess.run(["pgrep", "-f", "^sleep 1000$"], capture_output=True, text=True).stdout, "what it left has been ended"


def test_the_number_of_fruitless_starts_is_an_option(tmp_path: Path) -> None:
    code, said, commands = supervised(tmp_path, [{"code": 1}] * 2, "--give-up", "2")
    assert code == 8 and len(commands) == 2 and "(1 of 2 in a row without a new checkpoint)" in said


def test_a_numerical_fault_goes_back_further_each_time_and_then_ends(tmp_path: Path) -> None:
    fault: dict[str, object] = {"code": 6, "step": 35}  # nothing updated since step 26
    code, said, commands = supervised(tmp_path, [{**fault, "saves": [10, 20, 25, 30]}, {**fault, "saves": [30]},
                                                 {**fault, "saves": [25, 30]}, fault])
    assert code == 6, said
    folder = tmp_path / "run/checkpoints"
    assert commands == ["--train.steps=9", *(f"--checkpoint.resume={folder}/step-{step:08d}" for step in (25, 20, 10))]
    assert "going back has not cured it, 3 times" in said


def test_a_numerical_fault_that_is_cured(tmp_path: Path) -> None:
    code, _, commands = supervised(tmp_path, [{"code": 6, "step": 35, "saves": [20, 30]}, {"code": 1, "step": 60, "saves": [30, 60]}, {}])
    assert code == 0 and [word.partition("step-")[2] for word in commands] == ["", "00000020", ""]


def test_a_numerical_fault_from_the_first_step_on(tmp_path: Path) -> None:
    code, said, commands = supervised(tmp_path, [{"code": 6, "step": 10, "saves": [5]}])
    assert code == 6 and len(commands) == 1 and "going back has not cured it, 0 times" in said


def test_rollbacks_begin_anew_for_another_fault() -> None:
    saved = [10, 20, 30, 40, 50]
    rollbacks = Rollbacks(most=2)

    def before(step: int) -> int:
        return max((each for each in saved if each < step), default=-1)

    assert [rollbacks.next(step, before) for step in (35, 36, 37)] == [20, 10, -1]  # 25 was the first to update nothing
    assert rollbacks.next(61, before) == 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_job_not_started_again(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, [{"do": "wait"}])
    wait_for(tmp_path / "waits", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3 and "with 3: SIGTERM" in said and len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_signal_between_two_starts_is_obeyed(tmp_path: Path) -> None:
    process = start(tmp_path, [{"code": 1}], "--pause", "1000")
    wait_for(tmp_path / "starts", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    process = start(tmp_path, [{"do": "deaf"}])
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3 and "SIGINT: not started again" in said


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "does not run `-m zaya.train RECIPE.toml`"),
    (["--", "true"], "does not run"),
    (["--", "torchrun", "-m", "zaya.train"], "does not run"),
    (["--", "torchrun", "-m", "zaya.train", "/nowhere.toml"], "cannot read recipe /nowhere.toml"),
    (["--", "torchrun", "-m", "zaya.train", "recipes/quickstart.toml", "--train.stepz=1"], "train.steps"),
    (["--", "torchrun", "--nproc_per_node=3", "-m", "zaya.train", "recipes/quickstart.toml"], "3 data-parallel ranks"),
    (["--", "python", "-m", "torch.distributed.run", "--nnodes", "3", "--nproc-per-node", "1",
      "-m", "zaya.train", "recipes/quickstart.toml"], "3 data-parallel ranks"),
    (["--", "/nowhere/torchrun", "-m", "zaya.train", "recipes/quickstart.toml"], "cannot run /nowhere/torchrun"),
    (["--give-up", "0", "--", "torchrun"], "--give-up: '0' is not a number of starts"),
    (["--pause", "-1", "--", "torchrun"], "--pause"),
])
def test_a_bad_call_is_one_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "zaya.resilience.supervisor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


def test_a_number_of_ranks_that_is_no_number_is_left_to_the_job() -> None:
    job = Job.of(["torchrun", "--nproc-per-node", "gpu", "--nnodes=1:4", "-m", "zaya.train", "recipes/quickstart.toml", "--train.steps=30"])
    assert job.options == {"nproc-per-node": "gpu", "nnodes": "1:4"} and job.read().train.steps == 30


def test_the_rank_at_fault_speaks_for_the_others() -> None:
    records = [ExitRecord(0, 1, 4, "update", "rank 2 is gone", (2,)), ExitRecord(1, 1, 4, "update", "rank 2 is gone", (2,))]
    assert re.fullmatch(r"rank 2 is gone \(rank 0 on .*, step 4, update\)", end_of(1, records).cause)
    records[1] = ExitRecord(1, 5, 4, "update", "I was late", (1,))
    assert end_of(1, records)[:1] == (Exit.HANG,) and end_of(1, records).cause.startswith("I was late (rank 1 ")


def test_a_process_that_cannot_be_killed_is_the_nodes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "descendants", lambda: [2**22 + 1])  # beyond Linux's last: a kill changes nothing
    monkeypatch.setattr(supervisor, "ORPHAN_S", 0.0)
    monkeypatch.setattr(supervisor, "STOP_S", 0.5)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    try:
        assert Supervisor(["false"], tmp_path, give_up=3, pause_s=0.01).run() == Exit.UNHEALTHY
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ctypes.CDLL(None).prctl(supervisor.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def test_many_steps_that_update_nothing_are_a_fault_and_fewer_are_not() -> None:
    guard = Guard()
    for step in range(1, 3 * MAX_SKIPPED):
        guard.step(step, committed=step % MAX_SKIPPED == 0)
    guard.step(40, committed=True)
    for step in range(41, 40 + MAX_SKIPPED):
        guard.step(step, committed=False)
    with pytest.raises(NumericalFault, match=f"not finite since step 41: {MAX_SKIPPED} steps in a row"):
        guard.step(40 + MAX_SKIPPED, committed=False)
