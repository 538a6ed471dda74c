"""Universal checkpoints pass between our engine and a DeepSpeed run that is not ours: torch's AdamW, DeepSpeed's clipping and loop.

On two gloo ranks, in processes of their own: DeepSpeed leaves globals behind. Skipped where deepspeed cannot be imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.dist.pool import WorkerPool
from tests.dist.test_deepspeed import call
from tools import export_deepspeed, import_deepspeed
from zaya.checkpoint.read import Checkpoint
from zaya.dtypes import DTYPES
from zaya.config import Recipe, recipe_from_tables

STEPS = 3  # with the one, and as many with the other
EXPERTS = [f"blocks.{block}.moe.experts.{part}" for block in range(2) for part in ("gate_up", "down")]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None,
                                reason="deepspeed cannot be imported; docs/deepspeed.md says how to install it")


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, timeout_s=160)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two micro-batches of two rows per rank and step; no weight decay is that of no group by accident."""
    return tiny.recipe(tmp_path_factory.mktemp("universal"), optim__name="adamw", optim__lr=5e-3, optim__weight_decay=0.3)


class DeepSpeedRun:
    """A training script of DeepSpeed around our model: its engine, torch's AdamW, its clipping. As docs/deepspeed.md describes one."""

    def __init__(self, tables: dict[str, Any], world_size: int, stage: int, micro_batches: int = 2) -> None:
        from zaya.model.init import init_weights
        from zaya.optim import RouterBalance
        from zaya.parallel.deepspeed_engine import _import_deepspeed
        from zaya.parallel.mesh import make_mesh
        from zaya.parallel.parallelize import build_model, pieces
        from zaya.plan import plan
        from zaya.shard import Layout
        from zaya.trainer import open_data

        self.recipe = recipe_from_tables(tables)
        self.mesh = make_mesh(Layout(world_size), torch.device("cpu"))
        self.loader = open_data(self.recipe, self.mesh)
        self.table = plan(self.recipe.model)
        dtype, optim = self.recipe.train.dtype, self.recipe.optim
        self.model = build_model(self.recipe.model, DTYPES[dtype], "none", self.mesh, self.table)
        init_weights(self.model, self.recipe.model, self.recipe.train.seed, pieces(self.mesh, self.table))
        biases = [block.moe.router.balance_bias for block in self.model.blocks]
        self.balance = RouterBalance(biases, self.recipe.model.num_experts, optim.balance_lr)
        groups = [{"params": [self.model.get_parameter(name) for name, row in self.table.items() if row.decay is decay],
                   "weight_decay": optim.weight_decay * decay} for decay in (True, False)]
        adamw = torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        settings = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches, "gradient_clipping": optim.clip,
            "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "bf16": {"enabled": dtype == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {"load_universal": True},
        }
        self.engine = _import_deepspeed(self.mesh).initialize(model=self.model, optimizer=adamw, config=settings)[0]
        self.position, self.micro_batches = 0, micro_batches

    def small_state(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": buffer for name, buffer in self.model.named_buffers()} | self.balance.tensors()

    def load(self, directory: str) -> None:
        _, client = self.engine.load_checkpoint(directory)
        self.position = client["zaya"]["position"]
        for name, tensor in self.small_state().items():
            tensor.copy_(client["zaya"]["tensors"][name])

    def save(self, directory: str) -> None:
        """And make it universal, with DeepSpeed's own converter."""
        import torch.distributed as dist
        from deepspeed.checkpoint import ds_to_universal

        step = self.engine.global_steps
        state = {"step": step, "position": self.position, "tokens": self.position * self.recipe.train.seq_len,
                 "tensors": self.small_state()}
        self.engine.save_checkpoint(directory, client_state={"zaya": state})
        dist.barrier()
        if self.mesh.rank == 0:
            ds_to_universal.main(SimpleNamespace(
                input_folder=f"{directory}/global_step{step}", output_folder=f"{directory}/global_step{step}_universal",
                num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True))
        dist.barrier()

    def step(self) -> float:
        """The mean loss of the global batch, before the update."""
        import torch.distributed as dist

        from zaya.data.loader import IGNORE
        from zaya.schedule import learning_rate

        train = self.recipe.train
        share = train.global_batch_size // self.mesh.world_size
        first, rows = self.position + self.mesh.rank * share, share // self.micro_batches
        batches = [self.loader.batch(row, rows) for row in range(first, first + share, rows)]
        labelled = torch.tensor(sum(int((batch.labels_BT != IGNORE).sum()) for batch in batches))
        dist.all_reduce(labelled)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.engine.global_steps + 1, train.steps, self.recipe.optim)
        total = torch.zeros((), dtype=torch.float64)
        counts_LC = torch.zeros(self.recipe.model.num_layers, self.recipe.model.num_router_classes, dtype=torch.int64)
        for batch in batches:
            output = self.engine(batch.tokens_BT, batch.positions_BT)
            loss = self.model.loss(output.hidden_BTD, batch.labels_BT)
            # DeepSpeed divides by the micro-batches and by the ranks; the mean is over labelled tokens.
            self.engine.backward(loss * (self.micro_batches * self.mesh.world_size / labelled))
            self.engine.step()
            total += loss.detach().double()
            counts_LC += output.counts_LC
        dist.all_reduce(total)
        dist.all_reduce(counts_LC)
        self.balance.update(counts_LC, commit=torch.tensor(True))
        self.position += train.global_batch_size
        return (total / labelled).item()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything by checkpoint name, through DeepSpeed's own accessors (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        zero = self.engine.optimizer  # links its accessors after the first group's first step, when the second has no state yet
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        found = {name: tensor.clone() for name, tensor in self.small_state().items()}
        for name in self.table:
            parameter = self.model.get_parameter(name)
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"optim.{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
            kind = "optim.master" if self.recipe.train.dtype == "bf16" else "model"
            found[f"{kind}.{name}"] = safe_get_full_fp32_param(parameter)
            if self.recipe.train.dtype == "bf16":
                found[f"model.{name}"] = parameter.detach().clone()
        return found


def ours(rank: int, world_size: int, tables: dict[str, Any], start: str, steps: int, root: str) -> tuple[str, list[float]]:
    """Steps of our trainer from a checkpoint ("": new weights), then a save: where, and the losses."""
    trainer = tiny.trainer(tables, world_size)
    if start:
        trainer.load(Path(start))
    losses = [trainer.train_step().loss.item() for _ in range(steps)]
    return str(trainer.save(Path(root))), losses


def theirs(rank: int, world_size: int, tables: dict[str, Any], stage: int, start: str, steps: int,
           directory: str) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Steps of the DeepSpeed run from a universal checkpoint ("": new weights); the state then, saved where `directory` says; losses of
    these steps and of as many more."""
    run = DeepSpeedRun(tables, world_size, stage)
    if start:
        run.load(start)
    losses = [run.step() for _ in range(steps)]
    state = run.state()
    if directory:
        run.save(directory)
    return state, losses, [run.step() for _ in range(STEPS)]


def zero3_differences(rank: int, world_size: int, tables: dict[str, Any], universal: str, checkpoint: str) -> list[str]:
    """What our engine's ZeRO-3, once DeepSpeed's loader has read a universal checkpoint, holds otherwise than a checkpoint says."""
    trainer = tiny.trainer(tables, world_size)
    engine = trainer.optimizer._engine  # type: ignore[union-attr]
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(universal)
    stored = Checkpoint.open(checkpoint)
    return [name for name, share in trainer.state.owned().items() for box, tensor in share.parts
            if trainer.table.keys() & {name.partition(".")[2], name.partition(".")[2].partition(".")[2]}
            and not torch.equal(tensor, stored.read(name, *box))]


def zero3_run(rank: int, world_size: int, tables: dict[str, Any], directory: str) -> str:
    """Steps of our engine's ZeRO-3, saved twice: universal by DeepSpeed, and as our checkpoint, which is returned."""
    import torch.distributed as dist
    from deepspeed.checkpoint import ds_to_universal

    trainer = tiny.trainer(tables, world_size)
    for _ in range(STEPS):
        trainer.train_step()
    small = {name: tensor for name, tensor in trainer.state.replicated.items() if name != "optim.step"}
    client = {"step": trainer.step, "position": trainer.position, "tensors": small}
    trainer.optimizer._engine.save_checkpoint(f"{directory}/theirs", client_state={"zaya": client})  # type: ignore[union-attr]
    dist.barrier()
    if rank == 0:
        tag = f"{directory}/theirs/global_step{STEPS}"
        ds_to_universal.main(SimpleNamespace(input_folder=tag, output_folder=f"{tag}_universal", num_extract_workers=1, num_merge_workers=1,
                                             keep_temp_folder=False, strict=True, inject_missing_state=True))
    return str(trainer.save(Path(directory) / "ours"))


def assert_state(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    """Bit for bit, of every tensor, the experts' moments among them."""
    assert checkpoint.manifest.tensors.keys() == {*state, "optim.step"}
    assert {f"optim.{kind}.{name}" for name in EXPERTS for kind in ("exp_avg", "exp_avg_sq")} <= state.keys()
    for name, tensor in state.items():
        stored = checkpoint.read(name)
        assert stored.dtype == tensor.dtype and torch.equal(stored, tensor), name
        assert name.rpartition(".")[2] == "step" or stored.any(), f"{name} is zero: nothing was compared"


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_deepspeed_goes_on_from_our_run(pool: WorkerPool, recipe: Recipe, tmp_path: Path, stage: int, dtype: str) -> None:
    """And ends where our own run does; bf16 until its routing flips."""
    tables = dataclasses.asdict(tiny.variant(recipe, train__dtype=dtype))
    start, _ = call(pool, ours, tables, "", STEPS, str(tmp_path / "ours"))[0]
    _, expected = call(pool, ours, tables, start, STEPS, str(tmp_path / "whole"))[0]
    assert export_deepspeed.main([start, str(tmp_path / "universal")]) == 0
    state, _, losses = call(pool, theirs, tables, stage, str(tmp_path / "universal"), 0, "")[0]
    assert_state(Checkpoint.open(start), state)
    assert np.abs(np.subtract(losses, expected)).max() < (1e-5 if dtype == "fp32" else 3e-2), (losses, expected)


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_we_go_on_from_a_deepspeed_run(pool: WorkerPool, recipe: Recipe, tmp_path: Path, stage: int, dtype: str) -> None:
    """From new weights there, through DeepSpeed's converter, and on here as there."""
    changed = tiny.variant(recipe, train__dtype=dtype)
    (tmp_path / "recipe.toml").write_text(changed.to_toml())
    tables = dataclasses.asdict(changed)
    state, _, expected = call(pool, theirs, tables, stage, "", STEPS, str(tmp_path / "theirs"))[0]
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "checkpoint"), "--recipe", str(tmp_path / "recipe.toml")]
    assert import_deepspeed.main(arguments) == 0
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert_state(checkpoint, state)
    assert checkpoint.read("optim.step") == checkpoint.manifest.step == STEPS
    _, losses = call(pool, ours, tables, str(tmp_path / "checkpoint"), STEPS, str(tmp_path / "ours"))[0]
    assert np.abs(np.subtract(losses, expected)).max() < (1e-5 if dtype == "fp32" else 3e-2), (losses, expected)


def test_zero_3_reads_and_is_read(pool: WorkerPool, recipe: Recipe, tmp_path: Path) -> None:
    """Its universal checkpoints look otherwise: bare flat tensors, the step counter elsewhere."""
    whole = tiny.variant(recipe, parallel__engine="deepspeed", parallel__zero_stage=3)
    (tmp_path / "recipe.toml").write_text(whole.to_toml())
    tables = dataclasses.asdict(whole)
    saved = Checkpoint.open(call(pool, zero3_run, tables, str(tmp_path))[0])
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "checkpoint"), "--recipe", str(tmp_path / "recipe.toml")]
    assert import_deepspeed.main(arguments) == 0
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert_state(checkpoint, {name: saved.read(name) for name in saved.names() if name != "optim.step"})
    assert checkpoint.read("optim.step") == saved.read("optim.step") == STEPS
    assert checkpoint.manifest.position == saved.manifest.position and checkpoint.manifest.tokens == saved.manifest.tokens

    assert export_deepspeed.main([str(tmp_path / "checkpoint"), str(tmp_path / "universal")]) == 0
    assert call(pool, zero3_differences, tables, str(tmp_path / "universal"), str(tmp_path / "checkpoint")) == [[], []]
    assert export_deepspeed.main([call(pool, ours, dataclasses.asdict(recipe), "", 1, str(tmp_path / "other"))[0][0],
                                  str(tmp_path / "other universal")]) == 0
    assert all(call(pool, zero3_differences, tables, str(tmp_path / "other universal"), str(tmp_path / "checkpoint")))
