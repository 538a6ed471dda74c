"""metrics.jsonl keeps its contract: every step once, through crashes and resumes; the line and the balance figures are what they say."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from pathlib import Path

import pytest

from zaya.metrics import MetricsWriter, Row, format_line, read_rows, routing_metrics


def row(step: int, **changed: object) -> Row:
    return {"step": step, "tokens": 100 * step, "loss": 1 / (step + 2), "grad_norm": 0.5, "lr": 6e-4, "tokens_per_second": 12345.6,
            "step_time_s": 0.41, "mfu": None, "router_entropy": 0.97, "router_entropy_min": 0.9, "router_max_load": 1.2,
            "expert_load": [[0.5, 0.5]]} | changed


def write(path: Path, resume_step: int, last_step: int, eval_every: int = 0) -> None:
    writer = MetricsWriter(path, resume_step)
    writer.cut()
    for step in range(resume_step + 1, last_step + 1):
        writer.append(row(step))
        if eval_every and step % eval_every == 0:
            writer.append({"step": step, "eval_loss": 3.0})
    writer.close()


def steps(path: Path) -> tuple[list[int], list[int]]:
    train, evaluation = read_rows(path)
    return [r["step"] for r in train], [r["step"] for r in evaluation]


def test_a_row_does_not_wait_for_the_disk_that_makes_the_ones_before_it_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saving thread syncs, the training goes on; and whoever syncs has had every row before it written."""
    reached, is_done = threading.Event(), threading.Event()
    synced: list[int] = []

    def slow(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        reached.set()
        assert is_done.wait(60)

    monkeypatch.setattr(os, "fsync", slow)
    writer = MetricsWriter(tmp_path / "m", 0)
    writer.append(row(1))
    size = (tmp_path / "m").stat().st_size
    saving = threading.Thread(target=writer.sync)
    saving.start()
    assert reached.wait(60)
    appending = threading.Thread(target=writer.append, args=(row(2),))
    appending.start()
    appending.join(10)
    waited = appending.is_alive()
    is_done.set()
    saving.join()
    writer.close()
    assert not waited and synced == [size] and steps(tmp_path / "m")[0] == [1, 2]


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path / "m", 0, 3)
    train, evaluation = read_rows(tmp_path / "m")
    assert train == [row(1), row(2), row(3)] and evaluation == []
    assert train[0]["loss"] == 1 / 3  # all digits, not nine of them


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    write(tmp_path / "whole", 0, 9, eval_every=2)
    write(tmp_path / "resumed", 0, 7, eval_every=2)
    write(tmp_path / "resumed", 4, 9, eval_every=2)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert steps(tmp_path / "whole") == (list(range(1, 10)), [2, 4, 6, 8])


def test_a_fresh_run_forgets_everything(tmp_path: Path) -> None:
    write(tmp_path / "m", 0, 5, eval_every=1)
    write(tmp_path / "m", 0, 2)
    assert steps(tmp_path / "m") == ([1, 2], [])


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"{", b"\0" * 100, b"\0" * 100 + b"\n", b'{"step": 4, "loss": 1.0}'])
def test_a_torn_tail_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "m"
    write(path, 0, 3)
    with open(path, "ab") as file:
        file.write(tail)
    if not tail.endswith(b"\n"):
        assert steps(path) == ([1, 2, 3], [])  # a reader of a live run skips it too
    write(path, 3, 4)
    assert steps(path) == ([1, 2, 3, 4], [])


def test_the_checkpoint_step_torn_is_an_error_not_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 0, 4)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="ends at step 3 but the checkpoint is of step 4"):
        MetricsWriter(path, 4)
    assert steps(path) == ([1, 2, 3], [])  # and nothing was changed


def test_a_missing_record_starts_behind_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "m", 5, 7)
    assert steps(tmp_path / "m") == ([6, 7], [])
    write(tmp_path / "m", 6, 8)
    assert steps(tmp_path / "m") == ([6, 7, 8], [])


def test_a_foreign_or_broken_record_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m"
    lines = [json.dumps(row(step)) for step in (1, 2, 3)]
    for text, message in (("\n".join([lines[0], "garbage", lines[1], ""]), "line 2 is not a row"),
                          ("\n".join([lines[0], lines[1][:-40] + "\0" * 40, lines[2], ""]), "line 2 is not JSON"),
                          ("\n".join([lines[0], lines[1], lines[2].replace("loss", "mass"), ""]), "line 3 is not a row"),
                          ("\n".join([lines[0], '{"step": 1, "eval_loss": 3.', lines[1], lines[2], ""]), "line 2 is not JSON"),
                          ("\n".join([lines[0], lines[2], ""]), "line 2: step 3 follows step 1"),
                          ("\n".join([lines[0], lines[0], ""]), "line 2: step 1 follows step 1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            MetricsWriter(path, 3)
        assert path.read_text() == text


def test_a_step_twice_missing_or_mixed_is_our_mistake(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", 0)
    writer.append(row(1))
    for bad in (row(1), row(3), {"step": 2, "eval_loss": 1.0}, row(2, eval_loss=1.0), {"step": 2, "lr": 0.1}):
        with pytest.raises(AssertionError):
            writer.append(bad)
    writer.append({"step": 1, "eval_loss": 1.0})
    with pytest.raises(AssertionError):
        writer.append({"step": 1, "eval_loss": 1.0})
    writer.close()
    assert steps(tmp_path / "m") == ([1], [1])


def test_the_writer_knows_which_evaluation_it_has(tmp_path: Path) -> None:
    write(tmp_path / "m", 0, 6, eval_every=3)
    assert MetricsWriter(tmp_path / "m", 5).eval_step == 3
    assert MetricsWriter(tmp_path / "m", 0).eval_step == 0


def test_not_a_number_is_null_wherever_it_stands(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", 0)
    writer.append(row(1, loss=math.nan, grad_norm=math.inf, expert_load=[[math.nan, 1.0]]))
    writer.close()
    assert "NaN" not in (tmp_path / "m").read_text() and "Infinity" not in (tmp_path / "m").read_text()
    (got,), _ = read_rows(tmp_path / "m")
    assert (got["loss"], got["grad_norm"], got["expert_load"]) == (None, None, [[None, 1.0]])


def test_rows_are_on_disk_before_the_next_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m", 0)
    writer.append(row(1))
    assert steps(tmp_path / "m") == ([1], [])
    writer.close()


@pytest.mark.parametrize(("text", "message"), [
    ('{"step": 1, "loss"}\n', "line 1 is not JSON"), ("[1]\n", "not a row"), ('{"loss": 1.0}\n', "not a row"), ("\xff\n", "not JSON"),
    ('{"step": 1}\n', "not a row"), ('{"step": 1, "loss": 1.0, "eval_loss": 1.0}\n', "not a row"),
])
def test_reading_something_else_says_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "m")


def test_balance_figures() -> None:
    got = routing_metrics([[10, 10, 10, 10], [40, 0, 0, 0], [20, 20, 0, 0]])
    assert got["router_entropy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert got["router_entropy_min"] == 0
    assert got["router_max_load"] == 4
    assert got["expert_load"] == [[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert routing_metrics([[1, 2]])["expert_load"] == [[0.33333, 0.66667]]


def test_balance_where_it_has_no_meaning() -> None:
    assert routing_metrics([[5]])["router_entropy"] == 1  # one expert
    skipped = routing_metrics([[0, 0]])  # every token took the skip class
    assert (skipped["router_entropy"], skipped["router_max_load"], skipped["expert_load"]) == (0, 0, [[0, 0]])


def test_the_line_can_be_read_by_people_and_parsed() -> None:
    line = format_line(row(12, loss=3.14159), 200)
    assert line == "step 12/200 | loss 3.1416 | grad 0.50 | lr 6.0e-04 | 12.3k tok/s | entropy 0.97 | 0.41 s"
    assert re.fullmatch(r"step (\d+)/(\d+) \| loss (\S+) \| grad (\S+) \| lr (\S+) \| (\S+) tok/s \| entropy (\S+) \| (\S+) s", line)
    assert "| mfu 31.2% |" in format_line(row(1, mfu=0.312), 2)
    assert "| loss nan |" in format_line(row(1, loss=math.nan), 2) and "| loss nan |" in format_line(row(1, loss=None), 2)
    assert [format_line(row(1, tokens_per_second=speed), 2).split(" | ")[4] for speed in (950.4, 5.25e6)] == ["950 tok/s", "5.2M tok/s"]
    assert format_line({"step": 12, "eval_loss": 3.0}, 200) == "step 12/200 | eval_loss 3.0000"


def test_one_process_at_a_time_writes_a_record(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path / "m", 0)
    first.append({"step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match="is being written by another process"):
        MetricsWriter(tmp_path / "m", 0)
    first.close()
    assert len(read_rows(tmp_path / "m")[0]) == 1
    MetricsWriter(tmp_path / "m", 1).close()
