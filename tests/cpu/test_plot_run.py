"""tools.plot_run draws a run of any shape, and leaves nothing behind when there is nothing to draw."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image, pyplot

from tools import plot_run
from zaya.metrics import MetricsWriter, read_rows, routing_metrics


def make_run(run: Path, steps: int, blocks: int, experts: int, *, evaluate: bool = True, loss: float | None = 3.0) -> Path:
    run.mkdir()
    writer = MetricsWriter(run / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        load = [[float(1 + (expert + block + step) % experts) for expert in range(experts)] for block in range(blocks)]
        writer.append({"step": step, "tokens": 100 * step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0,
                       "step_time_s": 0.1, "mfu": None, **routing_metrics(load)})
        if evaluate and step % 2 == 0:
            writer.append({"step": step, "eval_loss": 3.5})
    writer.close()
    return run


@pytest.mark.parametrize(("steps", "blocks", "experts", "evaluate", "loss"), [
    (30, 4, 8, True, 3.0), (1, 1, 1, False, 3.0), (3, 2, 2, True, None)])
def test_a_picture_appears(tmp_path: Path, steps: int, blocks: int, experts: int, evaluate: bool, loss: float | None) -> None:
    run = make_run(tmp_path / "run", steps, blocks, experts, evaluate=evaluate, loss=loss)
    assert plot_run.main([str(run)]) == 0
    assert [path.name for path in (run / "plots").iterdir()] == ["run.png"]
    height, width, _ = image.imread(run / "plots/run.png").shape
    assert width == 1560 and height >= 1248


def test_a_big_model_gets_a_taller_picture(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 5, 40, 16)
    assert plot_run.main([str(run), "--out", str(tmp_path / "x.png")]) == 0
    assert image.imread(tmp_path / "x.png").shape[0] > 1900
    assert not (run / "plots").exists()


def test_a_picture_is_what_its_suffix_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 5, 2, 2)
    for suffix, start in ((".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert plot_run.main([str(run), "--out", str(tmp_path / f"x{suffix}")]) == 0
        assert (tmp_path / f"x{suffix}").read_bytes().startswith(start)
    assert plot_run.main([str(run), "--out", str(tmp_path / "x.doc")]) == 2
    assert "name a file that ends in .png or .svg or .pdf" in capsys.readouterr().err and not (tmp_path / "x.doc").exists()


def test_the_load_picture_shows_shares_of_even_block_by_block(tmp_path: Path) -> None:
    rows = [{"expert_load": [[1.0, 0.0], [0.5, 0.5]]}] * 3 * plot_run.MAX_COLUMNS
    picture = plot_run.load_picture(rows)
    assert picture.shape == (4, plot_run.MAX_COLUMNS)
    assert picture[:, 0].tolist() == [2.0, 0.0, 1.0, 1.0]


def test_a_smoothed_curve_is_the_mean_of_the_steps_before() -> None:
    values = np.random.default_rng(0).normal(size=400)
    ours = plot_run.smoothed(values)
    assert np.allclose(ours, [values[max(i - 9, 0): i + 1].mean() for i in range(400)]), "ten steps, also at the end of the run"
    values[391:399] = np.nan
    assert np.isclose(plot_run.smoothed(values)[399], (values[390] + values[399]) / 2)
    values[:] = np.nan
    assert np.isnan(plot_run.smoothed(values)).all()
    assert plot_run.smoothed(np.array([1.0, np.nan]))[0] == 1 and np.isnan(plot_run.smoothed(np.array([1.0, np.nan]))[1])


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read .*metrics.jsonl: No such file"),
    ("", "no training step"),
    ('{"step": 1, "eval_loss": 1.0}\n', "no training step"),
    ("not json\n", "line 1 is not JSON"),
    ('{"step": 1, "loss": 1.0}\n', "row of step 1 lacks expert_load, lr,"),
])
def test_nothing_to_draw_is_one_line_and_exit_2(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    before = sorted(tmp_path.iterdir())
    assert plot_run.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.plot_run: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert sorted(tmp_path.iterdir()) == before


GOOD: dict[str, Any] = {"step": 1, "tokens": 10, "loss": 3.0, "lr": 1e-3, "tokens_per_second": 9.0, "router_entropy": 1.0,
                        "router_entropy_min": 1.0, "expert_load": [[0.5, 0.5]]}


@pytest.mark.parametrize("change", [
    {key: None for key in GOOD if key not in ("step", "expert_load")}, {"expert_load": [[None, None]]}, {"loss": math.nan},
    {"lr": 0, "tokens_per_second": math.inf}])
def test_what_is_not_a_number_is_a_hole_in_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    rows = [GOOD | change, GOOD | change | {"step": 2}, {"step": 2, "eval_loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # they would be lines on stderr
        assert plot_run.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("change", "message"), [
    ({"loss": "3.0"}, "line 1: loss = '3.0' is not a number"), ({"lr": True}, "line 1: lr = True is not a number"),
    ({"tokens": [1]}, "tokens = .1. is not a number"), ({"loss": 10**400}, "loss = 1000.* is not a number"),
    ({"step": 1.5}, "it needs a step"), ({"step": True}, "it needs a step"),
    ({"expert_load": None}, "expert_load = None is not a table"), ({"expert_load": []}, r"expert_load = \[\] is not a table"),
    ({"expert_load": [[]]}, "is not a table"), ({"expert_load": [0.5]}, "is not a table"), ({"expert_load": [["a"]]}, "is not a table"),
    ({"expert_load": [[1.0], [0.5, 0.5]]}, "is not a table"),
])
def test_odd_values_are_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any],
                                            message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(GOOD | change) + "\n")
    assert plot_run.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.plot_run: ") and error.count("\n") == 1 and len(error) < 300
    assert re.search(message, error), error


@pytest.mark.parametrize(("steps", "label"), [(30, "training"), (79, "training"), (130, "training, mean of the last 3 steps")])
def test_the_legend_says_what_is_averaged(tmp_path: Path, steps: int, label: str) -> None:
    train, _ = read_rows(make_run(tmp_path / "run", steps, 1, 2) / "metrics.jsonl")
    ax = pyplot.figure().add_subplot()
    plot_run.plot_loss(ax, train, [])
    assert ax.get_legend_handles_labels()[1] == [label]
    pyplot.close("all")


@pytest.mark.parametrize(("out", "says"), [("", "--out . is a directory; name a file"), (".", "--out . is a directory; name a file"),
                                           ("{dir}", "--out {dir} is a directory; name a file"),
                                           ("{dir}/new/x.png", "there is no directory {dir}/new"),
                                           ("{dir}/run/metrics.jsonl/x.png", "there is no directory {dir}/run/metrics.jsonl")])
def test_a_picture_needs_a_directory_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, says: str) -> None:
    run = make_run(tmp_path / "run", 2, 1, 2)
    with pytest.raises(SystemExit) as ended:
        plot_run.main([str(run), f"--out={out.format(dir=tmp_path)}"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and says.format(dir=tmp_path) in error
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "metrics.jsonl"]


def test_bad_places_are_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_run.main([str(tmp_path / "absent")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    run = make_run(tmp_path / "run", 2, 1, 2)
    with pytest.raises(SystemExit) as ended:
        plot_run.main([str(run), "--out", str(tmp_path / f"{'n' * 300}.png")])
    assert ended.value.code == 2 and "cannot write there: File name too long" in capsys.readouterr().err
    (run / "plots").write_text("")
    assert plot_run.main([str(run)]) == 2
    assert capsys.readouterr().err.startswith("tools.plot_run: cannot write")
