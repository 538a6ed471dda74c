"""tools.bench_conversion measures what it says: both ways, in pairs, with real copies; a wrong conversion gives no figure; bad calls one
line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_conversion
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.write import CheckpointWriter
from zaya.model import hf

ROOT = Path(__file__).resolve().parents[2]
SMALL = bench_conversion.LEAST_BYTES


def test_figures_are_of_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, folder = tmp_path / "figures.json", tmp_path / "work"
    folder.mkdir()
    arguments = ["--bytes", str(SMALL), "--pairs", "1", "--dir", str(folder), "--workers", "2", "--json", str(report)]
    assert bench_conversion.main(arguments) == 0
    assert not list(folder.iterdir()), "what was written is removed"
    lines, result = capsys.readouterr().out.splitlines(), json.loads(report.read_text())
    for tool, line in zip(("export", "import"), lines[-2:], strict=True):
        of, rounds = result[tool], result["rounds"][tool]
        assert line.startswith(f"{tool}: ") and len(rounds) == 1 and 0.8 * SMALL < rounds[0]["bytes"] < 1.3 * SMALL
        tool_s, copy_s = rounds[0]["tool"]["seconds"], rounds[0]["copy"]["seconds"]
        assert of["ratio_median"] == copy_s / tool_s and of["goal_met"] == (of["ratio_median"] >= 0.8)
        assert of["gb_per_s"] == pytest.approx(rounds[0]["bytes"] / 1e9 / tool_s)
        # Of the conversion alone: python and torch take seconds to start, and a few hundred MB.
        assert 0 < tool_s < rounds[0]["tool"]["process_seconds"] and of["added_bytes"] < 100e6 < of["peak_bytes"]


@pytest.mark.parametrize("num_bytes", [10**7, 10**8, 2 * 10**9, 16 * 10**9])
def test_the_model_has_about_the_bytes_asked_for(num_bytes: int) -> None:
    """At full size of ZAYA1-8B's own blocks."""
    model = bench_conversion.model_of(num_bytes)
    made = 2 * sum(row.numel for row in bench_conversion.plan(model).values())
    assert 0.7 * num_bytes < made <= 1.2 * num_bytes and hf.links(model)
    assert model.hidden_size == 2048 or num_bytes < 10**9


def test_a_wrong_conversion_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one tensor; and a tensor too few."""
    model = bench_conversion.model_of(SMALL)
    bench_conversion.write_checkpoint(tmp_path / "right", model)
    bench_conversion.check_import(tmp_path / "right", tmp_path / "right")
    add = CheckpointWriter.add

    def wrong(writer: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "model.final_norm.weight":
            tensor.view(torch.int16)[-1] ^= 1
        add(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "add", wrong)
    bench_conversion.write_checkpoint(tmp_path / "wrong", model)
    with pytest.raises(bench_conversion.WrongError, match="tensor model.final_norm.weight came back otherwise .and 0 more"):
        bench_conversion.check_import(tmp_path / "right", tmp_path / "wrong")


def test_a_failed_conversion_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(path: Path, config: Any) -> None:
        path.mkdir()

    monkeypatch.setattr(bench_conversion, "write_checkpoint", broken)
    assert bench_conversion.main(["--bytes", str(SMALL), "--dir", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tools.bench_conversion: tools.export_hf ended with 2: tools.export_hf: ") and len(lines) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "says"), [
    (CheckpointError("cannot write x/checkpoint: No space left on device"), "cannot write x/checkpoint: No space left on device"),
    (PermissionError(13, "Permission denied", "x"), "cannot write x: Permission denied"), (None, "cp: the disk is full")])
def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
                                       error: Exception | None, says: str) -> None:
    """Where the checkpoint is made; of a copy, what cp says first."""
    def made(path: Path, config: Any) -> None:
        if error is not None:
            raise error
        path.mkdir()

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cp").write_text("#!/bin/sh\nprintf '%s\\n' 'cp: the disk is full' 'cp: it still is' >&2\nexit 1\n")
    (tmp_path / "bin/cp").chmod(0o755)
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(bench_conversion, "write_checkpoint", made)
    monkeypatch.setattr(bench_conversion, "timed_conversion", lambda *_: {})
    assert bench_conversion.main(["--bytes", str(SMALL), "--dir", str(tmp_path / "work")]) == 2
    words = [line for line in capfd.readouterr().err.splitlines() if "pair" not in line]  # of the bar
    assert words == [f"tools.bench_conversion: {says}"] and not list((tmp_path / "work").iterdir())


def test_a_signal_leaves_no_file(tmp_path: Path) -> None:
    """Gigabytes, in memory unless --dir says otherwise."""
    command = [sys.executable, "-m", "tools.bench_conversion", "--bytes", str(SMALL), "--pairs", "1000", "--dir", str(tmp_path)]
    tool = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/hf/*")):
        assert time.monotonic() < deadline and tool.poll() is None
        time.sleep(0.05)
    tool.terminate()
    _, err = tool.communicate(timeout=60)
    assert (tool.returncode, err) == (-signal.SIGTERM, "tools.bench_conversion: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "words"), [
    (["--bytes", "1e6"], "--bytes 1e+06: less than 1e+07"), (["--bytes", "nan"], "--bytes nan: less than 1e+07"),
    (["--pairs", "0"], "--pairs 0 is outside 1 to 1000"), (["--dir", "/no/such"], "--dir /no/such is not a directory"),
    (["--bytes", "1e18"], "GB free, the run needs"), (["--workers", "0"], "'0' is not a number of threads"),
])
def test_bad_calls_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_conversion.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("tools.bench_conversion: ") and words in lines[0]


def test_the_shards_are_as_many_as_a_full_size_model_leaves_in(tmp_path: Path) -> None:
    """So that threads have as many files to write: each of 5 GB of 16 there."""
    bench_conversion.write_checkpoint(tmp_path / "a", bench_conversion.model_of(SMALL))
    assert bench_conversion.convert("export", str(tmp_path / "a"), str(tmp_path / "hf"), "2") == 0
    assert bench_conversion.SHARDS <= len(list((tmp_path / "hf").glob("*.safetensors"))) <= bench_conversion.SHARDS + 2
