"""The trainer on this GPU: Triton's kernels and the reference draw the same loss curve."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tools.bench_step import Rows
from zaya.config import recipe_from_tables
from zaya.parallel.mesh import open_mesh
from zaya.shard import Layout
from zaya.trainer import Trainer

STEPS = 50


def make(dtype: str, kernels: str, optimizer: str) -> Trainer:
    recipe = recipe_from_tables({
        "model": dict(vocab_size=1000, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=8,
                      moe_intermediate_size=256, router_hidden_size=64),
        "data": {"train": ["unused"]}, "run": {"dir": "unused"},
        "train": dict(steps=STEPS, global_batch_size=8, micro_batch_size=8, seq_len=256, seed=0, dtype=dtype, kernels=kernels),
        "optim": dict(name=optimizer, lr=3e-3, min_lr=3e-4, warmup_steps=10)})
    rows = torch.randint(0, 1000, (32, 257), generator=torch.Generator().manual_seed(0))  # seen again and again: they are learnt by heart
    trainer = Trainer(recipe, open_mesh("cuda", Layout(1)), Rows(rows))  # type: ignore[arg-type]  # the one method that a step calls
    assert trainer.kernels.name == kernels
    return trainer


def curve(dtype: str, kernels: str, optimizer: str) -> torch.Tensor:
    trainer = make(dtype, kernels, optimizer)
    return torch.tensor([trainer.train_step().loss.item() for _ in range(STEPS)])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_steps_by_triton_and_by_the_reference(optimizer: str) -> None:
    """bf16's own noise, the distance of two references in bf16 and fp32, is the measure; twice that is allowed between two of bf16."""
    exact, plain, fast = curve("fp32", "reference", optimizer), curve("bf16", "reference", optimizer), curve("bf16", "triton", optimizer)
    noise, difference = (plain - exact).abs().max(), (fast - plain).abs().max()
    print(f"{optimizer}: loss {plain[0]:.3f} to {plain[-1]:.3f} and {fast[-1]:.3f}; noise {noise:.1e}, difference {difference:.1e}")
    assert plain[-1] < plain[0] - 0.5, "nothing was learnt: equal curves would say nothing"
    assert difference <= 2 * noise


def test_the_host_reads_a_step_while_its_update_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, ended = make("bf16", "triton", "muon"), torch.cuda.Event()
    trainer.train_step().loss.item()  # compiles
    update = trainer.optimizer.update

    def long(**arguments: Any) -> None:
        update(**arguments)
        torch.cuda._sleep(4_000_000_000)  # cycles: seconds
        ended.record()

    monkeypatch.setattr(trainer.optimizer, "update", long)
    result = trainer.train_step((1.0, 0.0))
    assert result.loss.isfinite() and result.votes.tolist() == [1, 0]
    assert not ended.query()
    torch.cuda.synchronize()
