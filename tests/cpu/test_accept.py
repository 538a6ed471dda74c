"""The acceptance of a node, on a machine that is none: its plan, that no failure hides another step, what it compares, what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools import accept_mi300x
from tools.accept_mi300x import LAYOUTS, PARTS, REHEARSED_LAYOUTS, Step, accept, compare, plan, select
from zaya.config import load_recipe
from zaya.shard import Layout

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def write_run(run_dir: Path, losses: list[float], norm: float = 2.0) -> Path:
    run_dir.mkdir(parents=True)
    rows = [{"step": step, "tokens": step, "loss": loss, "grad_norm": norm} for step, loss in enumerate(losses, start=1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


# ---------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("rehearse", [False, True], ids=["node", "rehearsal"])
def test_every_training_of_the_plan_is_a_valid_recipe(tmp_path: Path, rehearse: bool) -> None:
    sizes = set()
    for step in plan(tmp_path, rehearse):
        if not step.name.startswith("layout: "):
            continue
        world_size = int(step.command[step.command.index("--nproc-per-node") + 1])
        recipe = load_recipe(step.command[step.command.index("zaya.train") + 1], step.command[step.command.index("zaya.train") + 2:])
        recipe.validate(world_size)
        assert recipe.train.device == ("cpu" if rehearse else "cuda") and Path(recipe.run.dir).parent == tmp_path / "layouts"
        sizes.add((Layout.of(recipe.parallel, world_size), recipe.train.dtype, recipe.train.recompute, recipe.train.global_batch_size))
    assert len(sizes) == 1 + len(REHEARSED_LAYOUTS if rehearse else LAYOUTS) + (not rehearse), "no layout twice"


def test_the_plan_covers_what_it_promises(tmp_path: Path) -> None:
    names = [step.name for step in plan(tmp_path, rehearse=False)]
    benchmarks = [path.stem for path in (ROOT / "tools").glob("bench_*.py")]
    assert names[0] == "machine" and "tests/gpu" in names and len(names) == len(set(names))
    assert set(benchmarks) == {*PARTS, *(name for name in names if name.startswith("bench_"))} and not set(PARTS) & set(names)
    for part in PARTS:  # they say so themselves
        done = subprocess.run([sys.executable, "-m", f"tools.{part}"], capture_output=True, text=True, cwd=ROOT, timeout=100)
        assert done.returncode == 2 and "is a part of" in done.stderr
    assert names.index("layout: one process") < min(names.index(f"layout: {name}") for name in LAYOUTS)
    for axis in ("tp", "cp", "ep", "zero_size"):
        assert any(f"--parallel.{axis}=" in flag for flags in LAYOUTS.values() for flag in flags)


def test_a_choice_of_layouts_brings_what_they_are_compared_with(tmp_path: Path) -> None:
    steps = plan(tmp_path, rehearse=True)
    assert [step.name for step in select(steps, "tp 2")] == ["layout: one process", "layout: tp 2", "layout: tp 2, bf16"]
    assert [step.name for step in select(steps, "machine,tests")] == ["machine", "tests/gpu"]
    assert [step.name for step in select(steps, "machine,")] == ["machine"] and select(steps, "") == select(steps, "nonsense") == []


def test_the_machine_is_rehearsed_and_a_cpu_is_no_mi300x() -> None:
    for mode, code in (("rehearse", 0), ("node", 1)):
        done = subprocess.run([sys.executable, "-c", accept_mi300x.MACHINE, mode], capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
        assert '"torch"' in done.stdout
    assert "is not built for ROCm" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- comparing


def test_equal_curves_pass_and_others_say_where_they_part(tmp_path: Path) -> None:
    single = write_run(tmp_path / "single", [5.0, 4.0, 3.0])
    assert "3 steps, loss apart by 5.0e-06" in compare(write_run(tmp_path / "near", [5.0, 4.0, 3.000005]), single)
    with pytest.raises(ValueError, match="apart by 2.0e-05.*they part at step 2"):
        compare(write_run(tmp_path / "far", [5.0, 4.00002, 3.0]), single)
    with pytest.raises(ValueError, match="gradient norm.*they part at step 1"):
        compare(write_run(tmp_path / "norm", [5.0, 4.0, 3.0], norm=2.001), single)
    with pytest.raises(ValueError, match="2 steps, but 3 of single"):
        compare(write_run(tmp_path / "short", [5.0, 4.0]), single)
    with pytest.raises(ValueError, match="cannot read"):
        compare(tmp_path / "missing", single)
    (tmp_path / "near/metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": null, "grad_norm": 2.0}\n')
    with pytest.raises(ValueError, match="not finite"):
        compare(tmp_path / "near", single)


def test_a_bf16_run_has_to_learn(tmp_path: Path) -> None:
    assert "loss 5.0000 to 4.5000" in accept_mi300x._learns(write_run(tmp_path / "a", [5.0, 4.5]))
    with pytest.raises(ValueError, match="did not fall"):
        accept_mi300x._learns(write_run(tmp_path / "b", [5.0, 5.1]))


# ---------------------------------------------------------------------------------------------------------------- running


def bad_check() -> str:
    raise ValueError("the figures are wrong")


def test_a_step_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept_mi300x, "GRACE_S", 1.0)
    steps = [Step("fails", python("import sys; print('why it fails'); sys.exit(3)"), 60),
             Step("hangs", python("import time; print('here it hangs', flush=True); time.sleep(600)"), 3),
             Step("deaf", python("from signal import *; signal(SIGTERM, SIG_IGN); print('on', flush=True); sigwait([SIGUSR1])"), 3),
             Step("is wrong", python("print('x')"), 60, bad_check),
             Step("is | right", python("print('fine')"), 60, lambda: "all figures agree"),
             Step("bench_x", python("print('42 TFLOP/s')"), 60)]
    lines: list[str] = []
    started = time.monotonic()
    assert accept(steps, tmp_path, False, ["runtime: A=1 (because)"], lines.append) is False
    assert time.monotonic() - started < 60
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(result["name"], result["passed"]) for result in report["results"]] == [
        ("fails", False), ("hangs", False), ("deaf", False), ("is wrong", False), ("is | right", True), ("bench_x", True)]
    assert (report["verdict"], report["failed"], report["done"], report["steps"]) == ("failed", 4, 6, 6)
    details = [result["detail"] for result in report["results"]]
    assert details[0] == "exit code 3: why it fails" and "not done after 3 s; its last line: here it hangs" in details[1]
    assert details[3:] == ["the figures are wrong", "all figures agree", "42 TFLOP/s"]
    text = (tmp_path / "report.md").read_text()
    assert "| fails | **failed** |" in text and "why it fails" in text and "42 TFLOP/s\n```" in text and "runtime: A=1 (because)" in text
    assert [line for line in lines if "FAILED" in line][0].startswith("[1/6] fails: FAILED in ")
    assert len([line for line in lines if line.startswith("[")]) == 12


@pytest.mark.parametrize(("log", "cause"), [
    ("step 1\n[rank1]: Traceback (most recent call last):\n[rank1]:   x()\n[rank1]: ValueError: 3 is not 4\n"
     "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n", "ValueError: 3 is not 4"),
    ("torch.OutOfMemoryError: HIP out of memory\nlater\n", "torch.OutOfMemoryError: HIP out of memory"),
    ("zaya.train: parallel.tp = 3 does not fit\nChildFailedError:\n", "zaya.train: parallel.tp = 3 does not fit"),
    ("warning: an Error is near\nterminate called without an active exception\n====\n", "terminate called without an active exception"),
    ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nthe end\n\n", "the end"),
    ("", "(silent)"),
])
def test_the_cause_is_the_first_error_not_torchruns_summary(tmp_path: Path, log: str, cause: str) -> None:
    (tmp_path / "log").write_text(log)
    assert accept_mi300x._cause(tmp_path / "log") == cause


def test_a_report_is_there_while_steps_run(tmp_path: Path) -> None:
    seen = []

    def look() -> str:
        seen.append(json.loads((tmp_path / "report.json").read_text())["verdict"])
        return "seen"

    steps = [Step("one", python("pass"), 60), Step("two", python("pass"), 60, look)]
    assert accept(steps, tmp_path, True, [], lambda line: None)
    assert seen == ["not finished"] and json.loads((tmp_path / "report.json").read_text())["verdict"] == "passed"
    assert "Rehearsal" in (tmp_path / "report.md").read_text()


def test_a_long_step_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept_mi300x, "HEARTBEAT_S", 0.5)
    lines: list[str] = []
    code = "import time; print('step 7', flush=True); time.sleep(3)"
    assert accept([Step("slow", python(code), 60)], tmp_path, False, [], lines.append)
    assert any(line.strip().endswith("s | step 7") for line in lines)


@pytest.mark.parametrize("leader", ["hangs", "crashes", "passes"])
def test_a_steps_own_processes_end_with_it(tmp_path: Path, leader: str) -> None:
    """Else one of them would hold its GPU."""
    after = {"hangs": "time.sleep(600)", "crashes": "sys.exit(3)", "passes": "pass"}[leader]
    code = f"import subprocess, sys, time; print(subprocess.Popen(['sleep', '1234.5']).pid, flush=True); {after}"
    result = accept_mi300x.run(Step("s", python(code), 10 if leader == "hangs" else 60), tmp_path / "log", print)
    assert result.passed == (leader == "passes")
    left = Path(f"/proc/{int((tmp_path / 'log').read_text())}/cmdline")
    deadline = time.monotonic() + 30
    while left.exists() and left.read_bytes():  # a process that has ended has no command line
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_an_interruption_takes_the_step_with_it(tmp_path: Path, terminal: None, sent: signal.Signals) -> None:
    """Else its processes would hold the GPUs, and the next acceptance would find them taken."""
    code = (f"import __main__, sys; from tools import accept_mi300x as accept; __main__.__spec__ = accept.__spec__;"  # as by -m
            f"sleep = [sys.executable, '-c', 'import time; time.sleep(1234.5)'];"
            f"accept.plan = lambda *_: [accept.Step('sleeps', sleep, 600)]; sys.argv[1:] = ['--rehearse', '--out', {str(tmp_path)!r}];"
            f"sys.exit(accept.main())")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while "sleeps ..." not in (line := process.stdout.readline()):
        assert line, process.wait()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (step := children.read_text().split()) or b"1234.5" not in Path(f"/proc/{step[0]}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # the tool has it in its hands
    process.send_signal(sent)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent), rest
    assert rest == f"tools.accept_mi300x: interrupted; what was done is in {tmp_path}\n"
    assert not Path(f"/proc/{step[0]}").exists()


@pytest.mark.parametrize("arguments", [
    ["--only", "nonsense"], ["--rehearse", "--out", "full"], ["--rehearse", "--out", "full/file/below"], ["--rehearse", "--out", "n" * 300],
    pytest.param([], marks=pytest.mark.skipif(bool(torch.version.hip), reason="torch is built for ROCm"))],
    ids=["no step", "full", "below a file", "name too long", "no ROCm"])
def test_a_wrong_call_changes_nothing(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    command = [sys.executable, "-m", "tools.accept_mi300x", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100, env=environ)
    assert done.returncode == 2 and done.stderr.startswith("tools.accept_mi300x: ") and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.slow
def test_the_whole_rehearsal_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.accept_mi300x", "--rehearse", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        output, _ = process.communicate(timeout=290)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "out/report.json").read_text())["verdict"] == "passed"
