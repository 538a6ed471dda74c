"""How a tool ends by a signal, or because its reader or its terminal goes: cleaned up, in one line. Small programs play the tools."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import reshape_checkpoint
from zaya.checkpoint.read import Checkpoint
from zaya.cli import Parser, replace_text

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import multiprocessing, os, signal, sys, tempfile, time
from zaya.cli import Parser

def child():
    time.sleep(1234)

if __name__ == "__main__":
    Parser(prog="program")
"""
WAITS = """
with tempfile.TemporaryDirectory(dir="."):
    print("waits", flush=True)
    while True:
        time.sleep(0.05)
"""


@pytest.fixture
def start(tmp_path: Path, terminal: None) -> Callable[..., subprocess.Popen[str]]:
    """`python -m program`, a tool whose work is `body`."""

    def start(body: str, **options: object) -> subprocess.Popen[str]:
        (tmp_path / "program.py").write_text(HEAD + textwrap.indent(body, "    "))
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([sys.executable, "-u", "-m", "program"], cwd=tmp_path, text=True,  # type: ignore[call-overload]
                                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, **streams)

    return start


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sent: sent.name)
def test_a_signal_is_one_line_and_leaves_no_file(tmp_path: Path, start: Callable[..., subprocess.Popen[str]], sent: signal.Signals) -> None:
    program = start(WAITS)
    assert program.stdout is not None and program.stdout.readline() == "waits\n" and len(list(tmp_path.iterdir())) == 2
    program.send_signal(sent)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (130 if sent == signal.SIGINT else -sent, "program: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_the_signal_sent_again_does_not_disturb_the_cleaning_up(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    program = start("""
try:
    print("waits", flush=True)
    time.sleep(1234)
except KeyboardInterrupt:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        signal.raise_signal(number)
    open("cleaned", "w").close()
    raise KeyboardInterrupt("the rest is there") from None
""")
    assert program.stdout is not None and program.stdout.readline() == "waits\n"
    program.terminate()
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (-signal.SIGTERM, "program: interrupted; the rest is there\n") and (tmp_path / "cleaned").exists()


def test_what_nohup_ignores_stays_ignored(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    program = start("signal.raise_signal(signal.SIGHUP)\nprint('goes on')")
    assert program.communicate(timeout=60) == ("goes on\n", "") and program.returncode == 0


CHILD = "multiprocessing.get_context('spawn').Process(target=child).start()\nprint(multiprocessing.active_children()[0].pid, flush=True)\n"


@pytest.mark.parametrize("moment", ["signal", "reader"])
def test_processes_go_with_the_tool(start: Callable[..., subprocess.Popen[str]], moment: str) -> None:
    """Under a pool SIGPIPE is ignored, so a reader that has gone is an exception."""
    rest = "time.sleep(1234)" if moment == "signal" else "signal.signal(signal.SIGPIPE, signal.SIG_IGN)\nwhile True:\n    print('more')\n"
    program = start(CHILD + rest)
    assert program.stdout is not None and program.stderr is not None
    pid = int(program.stdout.readline())
    if moment == "signal":
        program.terminate()
    else:
        program.stdout.close()
    assert program.wait(timeout=60) == -(signal.SIGTERM if moment == "signal" else signal.SIGPIPE)
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert program.stderr.read() == ("program: interrupted\n" if moment == "signal" else "")


def test_another_broken_pipe_is_not_the_readers(start: Callable[..., subprocess.Popen[str]]) -> None:
    """To a process of its own, say: that is a bug, or a kill, and shows."""
    program = start("signal.signal(signal.SIGPIPE, signal.SIG_IGN)\nread, write = os.pipe()\nos.close(read)\nos.write(write, b'x')\n")
    _, err = program.communicate(timeout=60)
    assert program.returncode == 1 and err.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")


def test_a_terminal_that_closes_leaves_no_file(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Nothing more can be said there."""
    ours, theirs = pty.openpty()
    program = start(WAITS.replace('"waits"', '"waits", file=open("told", "w")'), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not (tmp_path / "told").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(ours)
    program.send_signal(signal.SIGHUP)  # as a shell to its jobs
    assert program.wait(timeout=60) == -signal.SIGHUP
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py", "told"]


def test_a_reshape_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "find", interrupted)
    with pytest.raises(KeyboardInterrupt, match="^the same call goes on from the files that were finished$"):
        reshape_checkpoint.main(["from", "to", "--layout", "ranks=1"])


@pytest.mark.parametrize(("error", "says"), [
    (ValueError("2 is not 3"), "2 is not 3"),
    (FileNotFoundError(2, "No such file or directory", "a"), "cannot write a: No such file or directory"),
    (OSError(28, "No space left on device"), "cannot write out: No space left on device"),
    (OSError("odd"), "cannot write out: odd")])
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], error: ValueError | OSError, says: str) -> None:
    assert Parser(prog="program").refused(error, "write", Path("out")) == 2
    assert capsys.readouterr() == ("", f"program: {says}\n")


@pytest.mark.parametrize(("name", "says"), [
    ("/proc/figures.json", "--json /proc/figures.json: cannot write there: No such file or directory"),
    ("{dir}/" + "n" * 256, "File name too long"), ("{dir}/" + "n" * 256 + "/f.json", "File name too long"),
    ("{dir}", "--json {dir} is a directory; name a file"),
    ("{dir}/new/f.json", "there is no directory {dir}/new"), ("/dev/null", "device or pipe; name a file")])
def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
                                                                  says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        Parser(prog="program").check_output("--json", Path(name.format(dir=tmp_path)))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and says.format(dir=tmp_path) in message and message.count("\n") == 1


def test_an_output_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    for name in ("f", "new"):
        Parser(prog="program").check_output("--json", tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "old")]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "f", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "old")]
