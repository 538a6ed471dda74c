"""Every command, called wrongly: one line on stderr with its name, exit code 2, no traceback, no file made or changed; --help works.

All calls are made by one child process, because importing what the tools stand on takes seconds, and because two of them set Triton's
environment. A tool without a row in CALLS is called with an unknown flag only.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What stands where a good file or directory should. /proc/self/mem is a file that opens and cannot be read, even by root.
BAD = {"missing": "missing", "directory": "directory", "empty": "empty", "garbage": "garbage", "unreadable": "/proc/self/mem",
       "below a file": "empty/below", "name too long": "n" * 300}
# Command -> ways to call it; {bad} is each of BAD, {new} a path where nothing is.
CALLS: dict[str, list[list[str]]] = {
    "tools.accept_mi300x": [["--only", "nonsense"], ["--out", "empty"], ["--out", "empty/below"]],
    "tools.bench_step": [["--steps", "9"], ["--steps", "many"], ["--steps"]],
    "tools.bench_kernels": [["--json", "new", "--rounds", "9"], ["--json", "new", "--rounds", "many"], []],
    "tools.bigram_baseline": [["{bad}"], ["{bad}", "--json"], []],
    "tools.compare_checkpoints": [["{bad}", "{bad}"], ["{bad}", "{bad}", "--tolerance", "much"], ["one"]],
    "tools.inspect_checkpoint": [["{bad}"], ["{bad}", "--verify"], ["{bad}", "--verify", "--workers", "0"], []],
    "tools.dump_batch": [["{bad}", "--step", "1", "--out", "{new}"], ["{bad}", "--step", "0", "--out", "{new}"], ["recipe.toml"]],
    "tools.emulate_kernels": [["--emulator", "missing"], ["--emulator", "directory"], ["--emulator", "empty"], []],
    "tools.export_hf": [["{bad}", "{new}"], ["{bad}", "{new}", "--dtype", "int4"], ["one"]],
    "tools.generate": [["{bad}", "--prompt", "x"], ["{bad}", "--prompt", "x", "--device", "abacus"], []],
    "tools.import_hf": [["{bad}", "{new}"], ["{bad}", "{new}", "--workers", "0"], ["one"]],
    "tools.import_megatron": [["{bad}", "{new}"], ["one"]],
    "tools.export_megatron": [["{bad}", "{new}"], ["{bad}", "{new}", "--max-file-size", "much"], ["one"]],
    "tools.import_deepspeed": [["{bad}", "{new}", "--recipe", "{bad}"], ["one"]],
    "tools.export_deepspeed": [["{bad}", "{new}"], ["one"]],
    "tools.bench_checkpoint": [["--bytes", "many"], ["--dir", "empty"], ["--only", "nonsense"], ["--pairs", "0"]],
    "tools.bench_conversion": [["--bytes", "many"], ["--pairs", "0"]],
    "tools.kernel_report": [["--op", "nonsense"], ["--arch", "nonsense"]],
    "tools.bisect_layouts": [["{bad}"], ["{bad}", "--b", "ranks=2"], []],
    "tools.plan_layout": [["{bad}", "--ranks", "8"], ["recipe.toml"], ["{bad}", "--ranks", "many"]],
    "tools.plot_run": [["{bad}"], ["{bad}", "--out", "{new}"], []],
    "tools.quickstart_report": [["{bad}", "--bigram", "{bad}"], ["directory", "--bigram", "bigram.json"], []],
    "tools.reshape_checkpoint": [["{bad}", "{new}", "--layout", "ranks=2"], ["{bad}", "{new}", "--layout", "ranks=2", "--average", "{bad}"],
                                 ["{bad}", "{new}", "--layout", "tp=2"], ["{bad}", "{new}", "--layout", "ranks=2", "--max-memory", "much"],
                                 ["{bad}", "{new}", "--layout", "ranks=2", "--workers", "0"], ["{bad}", "{new}"], []],
    "tools.setup_env": [["--venv", "empty"], ["--venv"]],
    "tools.tokenize_corpus": [["{bad}", "--output", "{new}", "--tokenizer", "{bad}"], ["text", "--output", "{new}", "--tokenizer", "{bad}"],
                              ["{bad}", "--output", "{new}", "--tokenizer", "new.json", "--train-bpe", "300"], []],
    "zaya.runtime": [["{bad}"]],
    "zaya.config": [["{bad}"], ["{bad}", "--train.steps=1"], []],
    "zaya.train": [["{bad}"], ["{bad}", "--train.steps=1"], []],
}
COMMANDS = sorted(CALLS.keys() | {f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if "def main(" in path.read_text()})


@dataclass(frozen=True)
class Outcome:
    """What one call did."""

    command: str
    arguments: list[str]
    code: int | None
    """None where it raised."""
    out: str
    err: str
    changed: list[str]
    """Files that the call made, removed or changed."""

    def faults(self) -> list[str]:
        """What a wrong call must not do."""
        one_line = self.err.startswith(f"{self.command}: ") and self.err.count("\n") == 1 and self.err.endswith("\n")
        found = {"is not exit code 2": self.code != 2, "is not one line": not one_line, "left files": bool(self.changed),
                 "speaks on stdout": bool(self.out), "shows a traceback": "Traceback" in self.err, "shows an errno": "[Errno" in self.err,
                 "is endless": len(self.err) > 800}
        return [f"{' '.join(self.arguments)[:100]!r} {fault}: {self.code} {self.err[-600:]}{self.changed}" for fault, is_so in found.items()
                if is_so]


def call(command: str, arguments: list[str]) -> Outcome:
    before, out, err = snapshot(), io.StringIO(), io.StringIO()
    sys.argv = [command, *arguments]
    code: int | None = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main = importlib.import_module(command).main
            code = main(*([arguments] if inspect.signature(main).parameters else []))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:  # noqa: BLE001  # a traceback is what is looked for
            traceback.print_exc()
    after = snapshot()
    return Outcome(command, arguments, code, out.getvalue(), err.getvalue(), sorted({name for name, _ in before ^ after}))


def snapshot() -> set[tuple[str, bytes]]:
    return {(str(path), path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}


def child() -> None:
    """Make the calls that stdin lists; the outcomes go to stdout as JSON."""
    calls = json.load(sys.stdin)
    json.dump([vars(call(command, arguments)) for command, arguments in calls], sys.stdout)


def wrong_calls() -> list[tuple[str, list[str]]]:
    found = []
    for command in COMMANDS:
        patterns = CALLS.get(command, [])
        for pattern in [*patterns, [*(patterns[0] if patterns else []), "--nonsense"]]:
            stand_ins = BAD.values() if "{bad}" in pattern else [""]
            found += [(command, [argument.format(bad=bad, new="new") for argument in pattern]) for bad in stand_ins]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("calls")
    (folder / "directory").mkdir()
    (folder / "empty").touch()
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "text").write_text("text")
    (folder / "bigram.json").write_text('{"loss": 1.0}')
    calls = wrong_calls() + [(command, ["--help"]) for command in COMMANDS]
    done = subprocess.run([sys.executable, "-c", "from tests.cpu.test_bad_calls import child; child()"], input=json.dumps(calls), text=True,
                          capture_output=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=280)
    assert done.returncode == 0, done.stderr
    return [Outcome(**fields) for fields in json.loads(done.stdout)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_call_is_one_line_and_exit_code_2(outcomes: list[Outcome], command: str) -> None:
    wrong = [outcome for outcome in outcomes if outcome.command == command and outcome.arguments != ["--help"]]
    assert wrong
    faults = [fault for outcome in wrong for fault in outcome.faults()]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_helps(outcomes: list[Outcome], command: str) -> None:
    (outcome,) = [outcome for outcome in outcomes if outcome.command == command and outcome.arguments == ["--help"]]
    assert (outcome.code, outcome.err, outcome.changed) == (0, "", []) and outcome.out.startswith("usage: ")
