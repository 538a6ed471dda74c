"""What the supervisor makes of every end: start again, go back, or end with the code; of signals, orphans and bad commands."""

from __future__ import annotations

import contextlib
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
from zaya.checkpoint.directory import local_root, step_path
from zaya.config import load_recipe
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
back = [word.partition("step-")[2] for word in sys.argv if "step-" in word]
checkpoints = folder / "run/checkpoints"
for path in checkpoints.glob("step-*"):
    if back and int(path.name[5:]) > int(back[0]):  # as zaya.train sets aside
        (path / "manifest.json").unlink(missing_ok=True)
for step in act.get("saves", []):
    (checkpoints / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    (checkpoints / f"step-{step:08d}/manifest.json").touch()
if "code" in act:
    for rank in (0, 1):
        record = ExitRecord(rank, act["code"], act.get("step", 0), act.get("phase", "micro-batch"), "scripted", (1,) if act["code"] else ())
        record.write(folder / "run/exit/0003") if act.get("do") == "no room" else record.report()
match act.get("do"):
    case "orphan":
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (folder / "orphan").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    case "killed":
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
    ([{}], 0, 1, "start 1 ended after 0 s with 0 (done): the run is finished"),
    ([{"code": 2}], 2, 1, "with 2 (refused): scripted (rank 1 on "),
    ([{"code": 7}], 7, 1, "exit code 7 (unreadable); there is no checkpoint; python -m tools.inspect_checkpoint"),
    ([{"code": 3, "step": 4}], 3, 1, "with 3 (preempted): scripted"),
    ([{"code": 1}, {"code": 5, "saves": [2]}, {}], 0, 3, "starting again in 0.01 s from the checkpoint of step 2\n"),
    ([{"code": 1}] * 3, 8, 3, "no new checkpoint in 3 starts in a row: given up; the causes are above\n"),
    ([{"code": 5}, {"code": 5}, {"code": 5, "saves": [1]}, {"code": 1}, {"code": 1}, {"code": 1, "saves": [2]}, {}], 0, 7,
     "(2 of 3 in a row without a new checkpoint)\n"),
    ([{"status": 1}] * 3, 8, 3, "exit code 1, and no rank has left a record"),  # it does not even import torch
    ([{"status": 2}], 2, 1, "the command's own exit code is 2: its words are above"),  # torchrun refuses its arguments
    ([{"code": 0, "status": 1}] * 3, 8, 3, "though every rank that left a record was done"),
    ([{"do": "orphan"}, {}], 0, 2, "ended by SIGKILL, and no rank has left a record"),
])
def test_every_end_has_its_answer(tmp_path: Path, acts: list[dict[str, object]], code: int, starts: int, words: str) -> None:
    ended, said, commands = supervised(tmp_path, acts)
    assert (ended, len(commands)) == (code, starts) and words in said, said
    assert commands[0] == "--train.steps=9" and set(commands[1:]) <= {"--train.steps=9", "--checkpoint.resume=auto"}
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
    assert "going back to step 25 and step 20 and step 10 has not cured it" in said
    assert "not started again: exit code 6 (numerical); the newest checkpoint is of step 10" in said


def test_a_numerical_fault_that_is_cured(tmp_path: Path) -> None:
    code, _, commands = supervised(tmp_path, [{"code": 6, "step": 35, "saves": [20, 30]}, {"code": 1, "step": 60, "saves": [30, 60]}, {}])
    assert code == 0 and [word.partition("step-")[2] or word for word in commands[1:]] == ["00000020", "--checkpoint.resume=auto"]


def test_a_numerical_fault_from_the_first_step_on(tmp_path: Path) -> None:
    code, said, commands = supervised(tmp_path, [{"code": 6, "step": 10, "saves": [5]}])
    assert code == 6 and len(commands) == 1 and "there is no checkpoint of before that to go back to" in said


def test_rollbacks_begin_anew_for_another_fault() -> None:
    saved = [10, 20, 30, 40, 50]
    rollbacks = Rollbacks(most=2)

    def before(step: int) -> int:
        return max((each for each in saved if each < step), default=-1)

    assert [rollbacks.next(first, first + 9, before) for first in (26, 27, 28)] == [20, 10, -1]
    assert rollbacks.next(52, 61, before) == 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_job_not_started_again(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, [{"do": "wait"}])
    wait_for(tmp_path / "waits", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3 and "with 3 (preempted): SIGTERM" in said and f"{number.name}: not started again: exit code 3" in said
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_signal_between_two_starts_is_obeyed(tmp_path: Path) -> None:
    process = start(tmp_path, [{"code": 1}], "--pause", "1000")
    wait_for(tmp_path / "starts", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "SIGTERM: not started again" in said.splitlines()[-1]


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    process = start(tmp_path, [{"do": "deaf"}])
    wait_for(tmp_path / "waits", process)
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "SIGINT: not started again: exit code 130 (interrupted); there is no checkpoint" in said


PROBED = """
import sys
from zaya.resilience import supervisor
from zaya.resilience.health import DeviceReport, Fault, NodeReport
answers = iter({answers!r})
def check_node(devices, is_over):
    return NodeReport("n1", 0.0, tuple(DeviceReport("cuda:1", faults=[Fault(text)]) for text in next(answers)))
supervisor.check_node, supervisor.visible_gpus, supervisor.host_name = check_node, lambda: {gpus}, lambda: "n1"
sys.exit(supervisor.main(sys.argv[1:]))
"""


def probed(folder: Path, answers: list[tuple[str, ...]], *options: str, gpus: int = 0,
           recipe: str = "--train.device=auto") -> tuple[int, str]:
    """Exit code and stderr of a supervisor whose node's probes answer so, over a job that fails once; `starts` are in the folder."""
    (folder / "acts").write_text('{"code": 1}\n{}\n')
    (folder / "job.py").write_text(JOB)
    (folder / "recipe.toml").write_text(tiny.recipe(folder).to_toml())
    command = [sys.executable, "-c", PROBED.format(answers=answers, gpus=gpus), "--pause", "0.01", *options, "--",
               sys.executable, str(folder / "job.py"), "--nproc-per-node", "2", "-m", "zaya.train", str(folder / "recipe.toml"), recipe]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60,
                          env={**os.environ, "SCRIPT": str(folder / "acts"), "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stderr


def test_an_unfit_node_starts_nothing(tmp_path: Path) -> None:
    code, said = probed(tmp_path, [("3 wrong",)], "--report", str(tmp_path / "end.json"), gpus=8)
    assert code == 4 and "supervisor: n1: cuda:1: 3 wrong\n" in said and not (tmp_path / "starts").exists()
    assert "probing cuda:0, cuda:1 of n1, for" in said and "--health never starts the job all the same" in said
    assert "exit code 4 (unhealthy) of n1: cuda:1: 3 wrong; there is no checkpoint; take the node out" in said.splitlines()[-1]
    assert (tmp_path / "end.json").read_text() == '{"code": 4, "host": "n1", "cause": "cuda:1: 3 wrong"}\n'


def test_a_node_that_becomes_unfit_starts_nothing_again(tmp_path: Path) -> None:
    code, said = probed(tmp_path, [(), ("slow",)], "--report", "/nowhere/end.json", gpus=8)
    assert code == 4 and len((tmp_path / "starts").read_text().splitlines()) == 1 and "probed in 0 s: fit\n" in said
    assert "cannot write --report /nowhere/end.json: No such file or directory\n" in said, "that changes no exit code"


@pytest.mark.parametrize(("launcher", "visible", "device", "devices"), [
    ("torchrun --nproc-per-node 2", 8, "auto", ("cuda:0", "cuda:1")),
    ("torchrun --nproc-per-node=gpu", 2, "auto", ("cuda:0", "cuda:1")),
    ("torchrun", 8, "auto", ("cuda:0",)),
    ("python", 8, "cuda", ("cuda:0",)),
    ("torchrun --nproc-per-node 2", 0, "auto", ("cpu",)),
    ("torchrun --nproc-per-node 2", 0, "cuda", ("cuda:0", "cuda:1")),  # a node that has lost its GPUs
    ("torchrun --nproc-per-node 2", 8, "cpu", ("cpu",)),
])
def test_the_devices_of_a_job(monkeypatch: pytest.MonkeyPatch, launcher: str, visible: int, device: str, devices: tuple[str, ...]) -> None:
    monkeypatch.setattr(supervisor, "visible_gpus", lambda: visible)
    job = Job.of([*launcher.split(), "-m", "zaya.train", "recipes/quickstart.toml", f"--train.device={device}"])
    assert supervisor.devices_of(job, load_recipe(Path(job.recipe), job.overrides)) == devices


@pytest.mark.parametrize(("options", "gpus", "recipe", "probes"), [
    ([], 0, "--train.device=auto", 0), ([], 8, "--train.device=cpu", 0), (["--health", "never"], 8, "--train.device=auto", 0),
    (["--health", "always"], 0, "--train.device=auto", 2), ([], 1, "--train.device=auto", 2)])
def test_the_devices_that_the_job_uses_are_probed(tmp_path: Path, options: list[str], gpus: int, recipe: str, probes: int) -> None:
    code, said = probed(tmp_path, [()] * 2, *options, gpus=gpus, recipe=recipe)
    assert (code, said.count("probing")) == (0, probes) and said.count("probing cpu of n1") == (probes if not gpus else 0), said


def test_the_real_probes_of_a_cpu(tmp_path: Path) -> None:
    code, said, _ = supervised(tmp_path, [{}], "--health", "always")
    assert code == 0 and ": probed in" in said and said.count(": fit\n") == 1


def test_a_signal_during_the_probes_is_obeyed(tmp_path: Path) -> None:
    process = start(tmp_path, [{}], "--health", "always")
    assert process.stderr is not None and "probing cpu of" in process.stderr.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "SIGTERM: not started again: exit code 130" in said and "unfit" not in said
    assert not (tmp_path / "starts").exists()


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
    (["--", "torchrun", "--nproc-per-node=0", "-m", "zaya.train", "recipes/quickstart.toml"], "start no process"),
    (["--give-up", "0", "--", "torchrun"], "--give-up: '0' is not a number from 1"),
    (["--pause", "-1", "--", "torchrun"], "--pause"),
])
def test_a_bad_call_is_one_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "zaya.resilience.supervisor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and words in done.stderr and not done.stdout, done.stderr
    assert done.stderr.count("\n") == 1 + ("cannot run" in words), "of what it has tried to start it says that it has ended, too"


def test_a_number_of_ranks_that_is_no_number_is_left_to_the_job() -> None:
    job = Job.of(["torchrun", "--nproc-per-node", "gpu", "--nnodes=1:4", "-m", "zaya.train", "recipes/quickstart.toml", "--train.steps=30"])
    assert job.options == {"nproc-per-node": "gpu", "nnodes": "1:4"} and job.read().train.steps == 30


def test_ranks_that_the_environment_counts_are_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["-m", "zaya.train", "recipes/quickstart.toml", "--parallel.tp=2"]
    for launcher in (["torchrun"], ["srun", "python"], ["torchrun", "--nproc", "2"]):
        assert Job.of([*launcher, *command]).read().parallel.tp == 2
    monkeypatch.setenv("PET_NNODES", "2")
    assert Job.of(["torchrun", "--nproc-per-node=1", *command]).read().parallel.tp == 2


def test_what_a_user_starts_from_is_started_from_until_it_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    acts: list[dict[str, object]] = [{"code": 1}, {"code": 1, "saves": [2]}, {"code": 1}, {}]
    assert supervised(tmp_path, acts)[2] == ["--train.steps=9"] * 2 + ["--checkpoint.resume=auto"] * 2


def test_steps_that_updated_nothing_before_this_start_count(tmp_path: Path) -> None:
    """A run that was preempted in them goes on from a checkpoint of theirs; what is sound lies before."""
    (tmp_path / "run").mkdir()
    row = {"loss": 1.0, "tokens": 1}
    (tmp_path / "run/metrics.jsonl").write_text("".join(
        json.dumps({"step": step, **row, "committed": step < 26}) + "\n" for step in range(1, 44)))
    _, _, commands = supervised(tmp_path, [{"code": 6, "step": 43, "saves": [24, 27, 33]}, {}])
    assert commands[1].endswith("step-00000024")


def test_the_rank_at_fault_speaks_for_the_others() -> None:
    records = [ExitRecord(0, 1, 4, "update", "rank 2 is gone", (2,)), ExitRecord(1, 1, 4, "update", "rank 2 is gone", (2,))]
    assert re.fullmatch(r"rank 2 is gone \(rank 0 on .*, step 4, update\)", end_of(1, records).cause)
    records[1] = ExitRecord(1, 5, 4, "update", "I was late", (1,))
    assert end_of(1, records)[:1] == (Exit.HANG,) and end_of(1, records).cause.startswith("I was late (rank 1 ")


def test_a_start_that_goes_back_and_dies_before_goes_back_again(tmp_path: Path) -> None:
    """What is broken has not been set aside yet."""
    fault: dict[str, object] = {"code": 6, "step": 35, "saves": [20, 30]}
    code, said, commands = supervised(tmp_path, [fault, {"code": 1, "phase": "start"}, {"do": "killed"}, {}])
    assert code == 0 and [word.partition("step-")[2] for word in commands] == ["", *["00000020"] * 3], (code, said)


def test_progress_on_the_nodes_own_tier_is_progress(tmp_path: Path) -> None:
    local = local_root(tmp_path / "run", tmp_path / "fast")
    saved = step_path(local, 4) / "manifest.json"
    saved.parent.mkdir(parents=True)
    supervisor = Supervisor([], tmp_path / "run", give_up=3, pause_s=1, local=local)
    assert supervisor._saved() == {}
    saved.touch()
    assert list(supervisor._saved()) == [saved.parent] and supervisor._before(100) == -1, "every node can go back to shared ones only"


def test_a_process_of_any_name_is_seen(tmp_path: Path) -> None:
    """Linux cuts names at 15 bytes, be it inside a character."""
    (tmp_path / "aaaaaaaaaaaaaaé").symlink_to("/bin/sleep")
    with subprocess.Popen([str(tmp_path / "aaaaaaaaaaaaaaé"), "1000"]) as process:
        try:
            while b"\xc3\n" not in Path(f"/proc/{process.pid}/comm").read_bytes():  # the name comes with exec
                time.sleep(0.01)
            assert process.pid in supervisor.descendants()
        finally:
            process.kill()


def test_without_room_for_reports_the_runs_own_records_count(tmp_path: Path) -> None:
    code, _, commands = supervised(tmp_path, [{"code": 7, "do": "no room"}])
    assert code == 7 and len(commands) == 1


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


@pytest.mark.parametrize("skipped", [1, 2])
def test_a_run_does_not_end_in_steps_that_update_nothing(skipped: int) -> None:
    guard = Guard()
    for step in range(1, 10):
        guard.step(step, committed=step < 11 - skipped)
    with pytest.raises(NumericalFault) if skipped == 2 else contextlib.nullcontext():
        guard.step(10, committed=False, last=True)
