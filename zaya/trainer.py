"""The training loop: build the pieces of a recipe, take optimizer steps, evaluate, save, resume.

Read `Trainer.train_step` to see the algorithm. A batch comes from zaya/data and goes through zaya/model, its gradients through
zaya/parallel, whose optimizer updates by the rules of zaya/optim; the record is zaya/metrics', the state zaya/checkpoint's. This file joins
them, nothing more.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint.manifest import load as load_manifest
from zaya.checkpoint.read import Checkpoint, locate, newest, prune
from zaya.checkpoint.write import Share, save
from zaya.config import Recipe
from zaya.data.loader import IGNORE, Batch, Loader, build_corpora, open_loader
from zaya.data.tokenizer import load_tokenizer, vocabulary_size
from zaya.kernels import backend
from zaya.metrics import MetricsWriter, format_line, routing_metrics
from zaya.model import flops
from zaya.model.init import init_weights
from zaya.optim import RouterBalance
from zaya.parallel.collectives import all_reduce_sum, barrier, gather_objects
from zaya.parallel.mesh import Mesh
from zaya.parallel.parallelize import build_model, build_optimizer, describe, pieces, token_index
from zaya.plan import plan
from zaya.runtime import GarbageCollection
from zaya.schedule import learning_rate

log = logging.getLogger("zaya")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def open_data(recipe: Recipe, mesh: Mesh) -> Loader:
    """The loader, once rank 0 has built what data.source asks for (one barrier). ValueError: bad corpora, too few evaluation rows."""
    if mesh.rank == 0:
        build_corpora(recipe)
    barrier(mesh.world)
    known = None
    if recipe.data.tokenizer:
        known = vocabulary_size(load_tokenizer(recipe.data.tokenizer))
        if known > recipe.model.vocab_size:
            raise ValueError(f"data.tokenizer = {recipe.data.tokenizer!r} knows {known} tokens, model.vocab_size is "
                             f"{recipe.model.vocab_size}; name the tokenizer of the corpora, or widen the model")
    loader = open_loader(recipe, known)
    if recipe.train.eval_interval and recipe.train.eval_rows > loader.num_evaluation_rows:
        raise ValueError(f"train.eval_rows = {recipe.train.eval_rows} but data.valid = {recipe.data.valid!r} has "
                         f"{loader.num_evaluation_rows} rows of {recipe.train.seq_len} tokens; lower it")
    return loader


class StepResult(NamedTuple):
    """Device tensors of one optimizer step, over the global batch."""

    loss: Tensor
    """Mean nats per labelled token, before the update."""
    grad_norm: Tensor
    """Of the mean loss, before clipping."""
    committed: Tensor
    """False where loss or gradient was not finite and nothing was updated."""
    shares_LE: Tensor
    """p_e per block, over the real experts."""


class Trainer:
    """One rank's part of a run. `position` counts rows consumed by the whole job: with the recipe it determines every batch to come."""

    def __init__(self, recipe: Recipe, mesh: Mesh, loader: Loader) -> None:
        self.recipe, self.mesh, self.loader = recipe, mesh, loader
        train = recipe.train
        self.kernels = backend.choose(train.kernels, mesh.device, DTYPES[train.dtype], recipe.model.head_dim,
                                      recipe.model.hidden_size, recipe.model.num_router_classes)
        self.table = plan(recipe.model)
        self.model = build_model(recipe.model, DTYPES[train.dtype], train.recompute, mesh, self.table)
        init_weights(self.model, recipe.model, train.seed, pieces(mesh, self.table))
        self.optimizer = build_optimizer(self.model, recipe, mesh, self.table)
        self.balance = RouterBalance([block.moe.router.balance_bias for block in self.model.blocks], recipe.model.num_experts,
                                     recipe.optim.balance_lr)
        self.token_index = token_index(mesh, train.seq_len)
        self.step, self.position = 0, 0
        self.origin = f"new weights from seed {train.seed}"

    # ------------------------------------------------------------------------------------------------------------ one step

    def train_step(self) -> StepResult:
        """Forward and backward over this rank's rows, one update.

        Collectives beside the model's own: gradients and parameters (zaya/parallel/zero1.py), and one sum of everything small.
        """
        recipe = self.recipe
        batches = self._micro_batches()
        self.optimizer.start_step(len(batches))
        counts_LC = torch.zeros(recipe.model.num_layers, recipe.model.num_router_classes, dtype=torch.int64, device=self.mesh.device)
        loss_sum, labelled = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for first, rows in batches:
            batch = self._mine(self.loader.batch(first, rows))
            output = self.model(batch.tokens_BT, batch.positions_BT)
            loss = self.model.loss(output.hidden_BTD, batch.labels_BT)
            self.optimizer.backward(loss)
            loss_sum += loss.detach()  # rows of one small tensor, summed in place
            labelled += (batch.labels_BT != IGNORE).sum()
            counts_LC += output.counts_LC
        self.optimizer.finish_gradients()
        # One small fp64 tensor carries loss, token count, gradient norm and routing counts: integers up to 2^53 are exact in it.
        own = self.mesh.tp.rank == 0  # all tp ranks computed this loss
        sums = torch.cat([torch.stack([loss_sum * own, labelled * own, self.optimizer.squared_norm()]), counts_LC.double().flatten()])
        all_reduce_sum(sums, self.mesh.world)
        loss_sum, labelled, counts_LC = sums[0], sums[1].clamp_min(1), sums[3:].view_as(counts_LC)

        # Gradients are those of the summed loss; the mean over the global token count enters here, with the clipping.
        grad_norm = (sums[2].sqrt() / labelled).to(loss.dtype)
        committed = grad_norm.isfinite() & loss_sum.isfinite()
        clip = recipe.optim.clip
        clip_scale = (clip / (grad_norm + 1e-6)).clamp_max(1.0) if clip else torch.ones_like(grad_norm)
        lr = learning_rate(self.step + 1, recipe.train.steps, recipe.optim)
        self.optimizer.update(lr=lr, grad_scale=(clip_scale / labelled).to(grad_norm.dtype), commit=committed)
        self.balance.update(counts_LC, commit=committed)
        self.step += 1
        self.position += recipe.train.global_batch_size
        return StepResult(loss_sum / labelled, grad_norm, committed, self.balance.shares(counts_LC))

    def _micro_batches(self) -> list[tuple[int, int]]:
        """(first row, rows) of each forward pass of this step on this rank."""
        dp = self.mesh.dp
        share = self.recipe.train.global_batch_size // dp.size
        first = self.position + dp.rank * share
        rows = self.recipe.micro_batch_rows(dp.size)
        return [(row, rows) for row in range(first, first + share, rows)]

    def _mine(self, batch: Batch) -> Batch:
        """The tokens of these rows that lie on this rank's part of the sequence, on its device."""
        return batch.columns(self.token_index).to(self.mesh.device)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean nats per labelled token over the first train.eval_rows rows of data.valid; changes nothing (one all-reduce)."""
        train = self.recipe.train
        share = train.eval_rows // self.mesh.dp.size
        first = self.mesh.dp.rank * share
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for row in range(first, first + share, train.micro_batch_size):
            batch = self._mine(self.loader.evaluation(row, min(train.micro_batch_size, first + share - row)))
            loss = self.model.loss(self.model(batch.tokens_BT, batch.positions_BT).hidden_BTD, batch.labels_BT)
            sums += torch.stack([loss.double(), (batch.labels_BT != IGNORE).sum().double()])
        all_reduce_sum(sums, self.mesh.token)
        return (sums[0] / sums[1].clamp_min(1)).item()

    # ------------------------------------------------------------------------------------------------------------ state

    def owned_state(self) -> dict[str, Share]:
        """The state by checkpoint name, and the boxes of it that this rank owns: together the ranks hold every element once."""
        shares = {}
        for name, row in self.table.items():
            for kind in self.optimizer.kinds(name):
                parts = list(self.optimizer.parts(name, kind)) if self.optimizer.is_counted_here(name) else []
                shares[_stored(kind, name)] = Share(self.optimizer.dtype(name, kind), row.shape, parts)
        for name, tensor in self._replicated().items():
            whole = ((0,) * tensor.dim(), tuple(tensor.shape))
            shares[name] = Share(tensor.dtype, tuple(tensor.shape), [(whole, tensor)] if self.mesh.rank == 0 else [])
        return shares

    def _replicated(self) -> dict[str, Tensor]:
        """The small rest of the state, equal on all ranks; writing into these tensors restores it."""
        biases = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        return biases | {"optim.step": self.optimizer.step} | self.balance.tensors()

    def save(self, root: Path) -> Path:
        """Write checkpoint root/step-N on all ranks together."""
        self.optimizer.wait()
        tokens = self.position * self.recipe.train.seq_len
        path = save(root, self.owned_state(), step=self.step, tokens=tokens, tokens_by_corpus=self.loader.tokens_by_corpus(self.position),
                    position=self.position, recipe=dataclasses.asdict(self.recipe), layout=self.mesh.layout.as_dict(),
                    rank=self.mesh.rank, world_size=self.mesh.world_size, gather=lambda value: gather_objects(value, self.mesh.world))
        if self.mesh.rank == 0:
            prune(root, self.recipe.checkpoint.keep)
        return path

    def restore(self) -> None:
        """Start from where the recipe says: the run's own newest checkpoint, a given one, other weights, or random ones."""
        resume, init = self.recipe.checkpoint.resume, self.recipe.init.checkpoint
        own = newest(Path(self.recipe.run.dir) / "checkpoints") if resume == "auto" else None
        if resume not in ("auto", "never"):
            own = _named("checkpoint.resume", resume, 'or write "auto" or "never"')
        if own is not None:
            self.load(own)
            self.origin = f"resumed from {own} at step {self.step}{self._changes(own)}"
        elif init:
            self.load(_named("init.checkpoint", init, "(tools.import_hf makes one from a transformers directory)"), weights_only=True)
            self.origin = f"weights from {init}"

    def _changes(self, path: Path) -> str:
        """What the recipe of a checkpoint said otherwise: going on from another run's is allowed, but never silent."""
        theirs = load_manifest(path).recipe
        changed = [f"{key} was {theirs.get(section, {}).get(name)!r}, is {value!r}" for key, value in self.recipe.identity().items()
                   for section, _, name in [key.partition(".")] if _plain(theirs.get(section, {}).get(name)) != _plain(value)]
        return f"; made by another recipe: {'; '.join(changed)}" if changed else ""

    @torch.no_grad()
    def load(self, path: Path, *, weights_only: bool = False) -> None:
        """Take the state of a checkpoint, or its weights alone. ValueError: a tensor is missing, misshapen or one too many."""
        checkpoint = Checkpoint.open(path)
        stored = {name: entry.shape for name, entry in checkpoint.manifest.tensors.items()}
        needed = {_stored(kind, name): row.shape for name, row in self.table.items() for kind in self.optimizer.kinds(name)}
        needed |= {name: tuple(tensor.shape) for name, tensor in self._replicated().items()}
        wanted = {name: _where(name, stored, rounded=self.recipe.train.dtype == "bf16") for name in needed
                  if not weights_only or name.startswith(("model.", "optim.master."))}
        extra = sorted(name for name in stored.keys() - needed.keys() if name.startswith("model."))
        if extra:
            raise ValueError(f"checkpoint {path} has tensor {extra[0]}, which this recipe's model lacks; it belongs to another model")
        for name, source in wanted.items():
            if source not in stored:
                raise ValueError(f"checkpoint {path} has no tensor {name}; it belongs to another model or optimizer")
            if stored[source] != needed[name]:
                raise ValueError(f"checkpoint {path}: {source} has shape {stored[source]}, this recipe needs {needed[name]}")
        self.optimizer.wait()
        for name in self.table:
            for kind in self.optimizer.kinds(name):
                if _stored(kind, name) in wanted:
                    for box, tensor in self.optimizer.parts(name, kind):
                        tensor.copy_(checkpoint.read(wanted[_stored(kind, name)], *box))
        self.optimizer.publish()
        for name, tensor in self._replicated().items():
            if name in wanted:
                tensor.copy_(checkpoint.read(wanted[name]))
        if not weights_only:
            self.step, self.position = checkpoint.manifest.step, checkpoint.manifest.position

    # ------------------------------------------------------------------------------------------------------------ the run

    def fit(self, metrics: MetricsWriter | None) -> None:
        """Train to train.steps from wherever the run stands; rank 0 has the record and writes every step to it."""
        recipe, run_dir = self.recipe, Path(self.recipe.run.dir)
        log.info("%s | kernels: %s | %s", self.mesh, self.kernels, self.origin)
        for line in describe(recipe, self.mesh):
            log.info(line)
        if self.step >= recipe.train.steps:
            log.info("run %s is finished at step %d; nothing to do", run_dir, self.step)
            return
        primary = self.mesh.rank == 0
        progress = tqdm(total=recipe.train.steps, initial=self.step, unit="step", disable=None if primary else True, dynamic_ncols=True)
        with progress as bar, GarbageCollection() as garbage:
            while self.step < recipe.train.steps:
                started = time.perf_counter()
                result = self.train_step()
                row = self._row(result, started) if primary else {}
                if metrics is not None:
                    metrics.append(row)
                    if self.step % recipe.train.log_interval == 0 or self.step == recipe.train.steps:
                        log.info(format_line(row, recipe.train.steps))
                self._when_due(metrics, run_dir)
                garbage.step(self.step)
                bar.update()
        self.optimizer.wait()
        if metrics is not None:
            metrics.close()

    def _when_due(self, metrics: MetricsWriter | None, run_dir: Path) -> None:
        """Evaluate and save, where the recipe says so."""
        recipe = self.recipe
        if _due(self.step, recipe.train.eval_interval, recipe.train.steps):
            eval_row = {"step": self.step, "eval_loss": self.evaluate()}
            if metrics is not None:
                metrics.append(eval_row)
                log.info(format_line(eval_row, recipe.train.steps))
        if _due(self.step, recipe.checkpoint.interval, recipe.train.steps):
            if metrics is not None:
                metrics.sync()  # a checkpoint never reaches the disk before the rows it follows
            path = self.save(run_dir / "checkpoints")
            log.info("step %d/%d | saved %s", self.step, recipe.train.steps, path)

    def _row(self, result: StepResult, started: float) -> dict[str, object]:
        """One line of metrics.jsonl. Waits for the step first, so that its time is the device's, not the launches'."""
        train, device = self.recipe.train, self.mesh.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        tokens_per_second = train.global_batch_size * train.seq_len / seconds
        peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        per_token = flops.train_flops_per_token(self.recipe.model, train.seq_len)
        return {
            "step": self.step, "tokens": self.position * train.seq_len, "loss": result.loss.item(), "grad_norm": result.grad_norm.item(),
            "lr": learning_rate(self.step, train.steps, self.recipe.optim), "tokens_per_second": tokens_per_second,
            "step_time_s": seconds, "mfu": tokens_per_second * per_token / (peak * self.mesh.world_size) if peak else None,
            **routing_metrics(result.shares_LE.tolist()), "committed": bool(result.committed),
        }


def _due(step: int, interval: int, steps: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == steps)


def _named(key: str, value: str, otherwise: str) -> Path:
    """The checkpoint that a recipe key names, or the newest one of the run that it names. ValueError: there is none."""
    found = locate(value)
    if found is None:
        raise ValueError(f"{key} = {value!r} is neither a checkpoint nor a run that has one; name one, {otherwise}")
    return found


def _plain(value: object) -> object:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _stored(kind: str, name: str) -> str:
    """The name under which a checkpoint keeps one kind of a parameter's tensors."""
    return f"model.{name}" if kind == "model" else f"optim.{kind}.{name}"


def _where(name: str, stored: Mapping[str, object], *, rounded: bool) -> str:
    """Where a tensor is found when the checkpoint was written in another dtype: a wide run keeps no separate master weights."""
    master = name.replace("model.", "optim.master.", 1)
    if name.startswith("model.") and master in stored and not rounded:
        return master
    if name.startswith("optim.master.") and name not in stored:
        return name.replace("optim.master.", "model.", 1)
    return name
