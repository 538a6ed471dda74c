"""Exit records: written whole, read back, counted by start; and which ranks a hang is laid to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zaya.resilience.exits import ACTIONS, REPORTS, Exit, ExitRecord, attempt_path, attempts, next_attempt, read_records
from zaya.resilience.watchdog import Place, describe_hang, late_ranks

RECORD = ExitRecord(rank=1, code=Exit.HANG, step=7, phase="micro-batch", cause="rank 2 is behind", at_fault=(2,), action="start it again")


def test_every_code_says_what_to_do() -> None:
    assert set(ACTIONS) == set(Exit) and [int(code) for code in Exit] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 130]


def test_records_come_back(tmp_path: Path) -> None:
    other = replace(RECORD, rank=0, at_fault=())
    for record in (RECORD, other):
        record.write(attempt_path(tmp_path, 3))
    assert read_records(tmp_path / "exit/0003") == [other, RECORD] and not read_records(attempt_path(tmp_path, 2))
    assert json.loads((tmp_path / "exit/0003/rank-1.json").read_text()) == {
        "rank": 1, "code": 5, "step": 7, "phase": "micro-batch", "cause": "rank 2 is behind", "at_fault": [2], "action": "start it again",
        "host": RECORD.host, "time": RECORD.time}
    assert [path.name for path in (tmp_path / "exit/0003").iterdir() if "tmp" in path.name] == []


def test_a_supervisor_is_told_where_it_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REPORTS, raising=False)
    RECORD.report()
    monkeypatch.setenv(REPORTS, str(tmp_path / "reports"))
    RECORD.report()
    assert read_records(tmp_path / "reports") == [RECORD]
    assert attempts(tmp_path / "run") == [] and next_attempt(tmp_path / "run") == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rank": 0', json.dumps({"rank": 0, "at_fault": 3}), "null"])
def test_what_is_no_record_is_left_out(tmp_path: Path, text: str) -> None:
    RECORD.write(tmp_path)
    (tmp_path / "rank-0.json").write_text(text)
    assert read_records(tmp_path) == [RECORD]


def test_starts_are_counted_past_what_is_none(tmp_path: Path) -> None:
    for name in ("0002", "0011", "7", "x", "00a1"):
        (tmp_path / "exit" / name).mkdir(parents=True)
    assert attempts(tmp_path) == [2, 11] and next_attempt(tmp_path) == 12


def place(step: int, launched: int) -> Place:
    return Place(step, launched, "micro-batch", 0, "all_to_all ep")


@pytest.mark.parametrize(("places", "late", "words"), [
    ([place(4, 90), place(4, 89), place(4, 90)], [1],
     "rank 1 is behind, at step 5, micro-batch 1, 89 collectives launched, last all_to_all ep; the furthest is at step 5, "),
    ([place(4, 90), place(3, 95), place(3, 95)], [1, 2], "ranks 1 2 are behind, at step 4"),  # an earlier step, whatever it has launched
    ([place(4, 90)] * 3, [0, 1, 2], "every rank stands at step 5, micro-batch 1"),
    ([place(4, 90), *[place(4, 80)] * 10], list(range(1, 11)), "ranks 1 2 3 4 5 6 7 8 and 2 more are behind"),
])
def test_a_hang_is_laid_to_the_ranks_that_are_behind(places: list[Place], late: list[int], words: str) -> None:
    by_rank = dict(enumerate(places))
    assert late_ranks(by_rank) == late
    assert describe_hang(by_rank, late).startswith(words)
