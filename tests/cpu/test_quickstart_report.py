"""The quickstart's report keeps a promise only on its figures, and says which one was broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import quickstart_report

EVEN, COLLAPSED = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]


def write_run(folder: Path, *, last_loss: float, eval_loss: float, loads: list) -> Path:
    rows = [{"step": step, "loss": 7.0 if step == 1 else last_loss, "tokens": 10 * step, "step_time_s": 0.1, "expert_load": loads}
            for step in range(1, 11)]
    lines = [json.dumps(row) for row in [*rows, {"step": 10, "eval_loss": eval_loss}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "plots").mkdir()
    (folder / "plots/run.png").touch()
    (folder / "bigram.json").write_text('{"loss": 4.0}')
    return folder


@pytest.mark.parametrize(("change", "broken"), [
    ({}, {"transformers"}), ({"last_loss": 8.0}, {"transformers", "loss fell"}), ({"eval_loss": 4.5}, {"transformers", "held-out"}),
    ({"loads": [EVEN, COLLAPSED]}, {"transformers", "router entropy"}),
    ({"loads": [[1 / 16] * 16, [1 / 16] * 15 + [None]]}, {"transformers", "router entropy"}),  # 0.94 without it
])
def test_each_broken_promise_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, broken: set[str]) -> None:
    """Nothing was exported, so that promise is always broken here; tests/cpu/test_hf.py loads real exports."""
    run = write_run(tmp_path, **({"last_loss": 3.0, "eval_loss": 3.5, "loads": [EVEN, EVEN]} | change))
    assert quickstart_report.report(run, run / "bigram.json") is False
    lines = capsys.readouterr().out.splitlines()
    named = {word for word in ("transformers", "loss fell", "held-out", "router entropy", "plot")
             if any(line.startswith("[NOT KEPT]") and word in line for line in lines)}
    assert named == broken and len(lines) == 5


def test_a_run_that_diverged_has_kept_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, last_loss=3.0, eval_loss=3.5, loads=[EVEN, EVEN])
    text = (run / "metrics.jsonl").read_text()
    for number in ("3.0", "3.5", "0.25"):
        text = text.replace(number, "null")
    (run / "metrics.jsonl").write_text(text)
    assert quickstart_report.report(run, run / "bigram.json") is False
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("[NOT KEPT]")] == [f"[ok] plot: {run / 'plots/run.png'}"]


def test_an_export_that_does_not_load_is_a_broken_promise(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert quickstart_report.loads_in_transformers(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "zaya"')
    assert "\n" not in quickstart_report.loads_in_transformers(tmp_path)


def test_entropy_is_the_mean_over_the_last_fifth() -> None:
    rows = [{"expert_load": [COLLAPSED]}] * 8 + [{"expert_load": [EVEN]}] * 2
    assert quickstart_report.block_entropies(rows) == [pytest.approx(1.0)]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bigram.json").write_text("{}")
    with pytest.raises(ValueError, match="not the output of tools.bigram_baseline"):
        quickstart_report.report(tmp_path, tmp_path / "bigram.json")
