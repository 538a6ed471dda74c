"""tools.bench_step compares equals: the same weights give the same losses on both sides, the quickest peer is found, ratios of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tools import bench_step
from zaya.parallel.mesh import open_mesh
from zaya.shard import Layout
from zaya.trainer import Trainer

TINY = dict(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16,
            router_hidden_size=8)


def tiny_trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr(bench_step, "SIZES", TINY)
    rows = bench_step.Rows(torch.randint(0, TINY["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(0)))
    return Trainer(bench_step.make_recipe(2, 16), open_mesh("cpu", Layout(1)), rows)  # type: ignore[arg-type]


def test_both_sides_train_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of the updates too: a decay, clipping or rate of another kind would part them."""
    trainer = tiny_trainer(monkeypatch)
    peer = bench_step.transformers_step(trainer, "eager", "eager")
    for _ in range(6):
        assert trainer.train_step().loss.item() == pytest.approx(peer(), rel=1e-4)


def test_rows_come_round_without_end() -> None:
    rows = bench_step.Rows(torch.arange(15).view(3, 5))
    batch = rows.batch(first_row=2, num_rows=2)
    assert batch.tokens_BT.tolist() == [[10, 11, 12, 13], [0, 1, 2, 3]] and batch.labels_BT.tolist() == [[11, 12, 13, 14], [1, 2, 3, 4]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3]] * 2 and not batch.documents_BT.any()


def test_the_quickest_peer_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that need more than the limit get no further attention, a pair that raises is not taken, and why is kept."""
    speed = {"eager + eager": 0.4, "eager + sdpa": 0.3, "broken + eager": 0.0, "broken + sdpa": 0.0, "slow + eager": 9.0,
             "quick + eager": 0.2, "quick + sdpa": 0.25}
    tried: list[str] = []

    def build(trainer: Any, experts: str, attention: str) -> Callable[[], float]:
        tried.append(f"{experts} + {attention}")
        if experts == "broken":
            raise RuntimeError("needs a GPU\nand more")
        return lambda: speed[f"{experts} + {attention}"]

    monkeypatch.setattr(bench_step, "ALL_EXPERTS_FUNCTIONS", {"broken": None, "slow": None, "quick": None})
    monkeypatch.setattr(bench_step, "ALL_ATTENTION_FUNCTIONS", {"sdpa": None})
    monkeypatch.setattr(bench_step, "transformers_step", build)
    monkeypatch.setattr(bench_step, "seconds", lambda step: (step(), 0.0))
    name, step, figures = bench_step.fastest_peer(None, limit_s=5.0)  # type: ignore[arg-type]  # nothing of the trainer is used here
    assert name == "quick + eager" and step() == 0.2
    assert set(figures) == speed.keys() | {"slow + sdpa"} and figures["quick + sdpa"] == pytest.approx(250)
    assert figures["broken + sdpa"] == "does not run here: needs a GPU" and figures["slow + sdpa"].startswith("not tried")
    assert "slow + sdpa" not in tried and tried[-1] == "quick + eager", "the winner starts afresh, from the trainer's weights"


def run_bench(monkeypatch: pytest.MonkeyPatch, times: list[tuple[float, float]], peer_loss: float = 3.0) -> dict[str, Any]:
    """bench() with scripted (our, their) seconds for every pair, the two of warm-up included."""
    clock: Iterator[float] = iter([side for pair in times for side in pair])
    result = SimpleNamespace(loss=torch.tensor(3.0))
    monkeypatch.setattr(bench_step, "Trainer", lambda *_: SimpleNamespace(train_step=lambda: result))
    monkeypatch.setattr(bench_step, "fastest_peer", lambda trainer, limit_s: ("eager + sdpa", lambda: peer_loss, {"eager + sdpa": 1.0}))
    monkeypatch.setattr(bench_step, "seconds", lambda step: (next(clock), step()))
    return bench_step.bench(len(times) - 2, batch_size=2, seq_len=50)


def test_the_ratio_is_the_median_over_pairs_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run_bench(monkeypatch, [(9.0, 1.0), (9.0, 1.0), (1.0, 2.0), (2.0, 3.0), (1.0, 5.0)])
    assert (figures["ratio_median"], figures["ratio_min"], figures["ratio_max"]) == (2.0, 1.5, 5.0)
    assert figures["tokens_per_second"] == {"zaya": 100.0, "transformers": pytest.approx(100 / 3)} and figures["steps"] == 3


def test_no_speed_is_reported_where_losses_part(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="losses part at step 1"):
        run_bench(monkeypatch, [(1.0, 1.0)] * 4, peer_loss=3.01)
