"""The training loop: build the pieces of a recipe, take optimizer steps, evaluate, save, resume.

Read `Trainer.train_step` to see the algorithm. A batch comes from zaya/data and goes through zaya/model, its gradients through
zaya/parallel, whose optimizer updates by the rules of zaya/optim; the record is zaya/metrics', the state zaya/checkpoint's. This file joins
them, nothing more.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from zaya.checkpoint.directory import step_path
from zaya.checkpoint.errors import CheckpointError, raise_on_all
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import save
from zaya.checkpoint.saver import Saver
from zaya.config import Recipe
from zaya.data.loader import IGNORE, Batch, Loader, build_corpora, open_loader
from zaya.data.tokenizer import load_tokenizer, vocabulary_size
from zaya.dtypes import DTYPES
from zaya.kernels import backend
from zaya.metrics import MetricsWriter, format_line, routing_metrics
from zaya.model import flops
from zaya.model.init import init_weights
from zaya.optim import RouterBalance
from zaya.parallel.collectives import all_reduce_sum, gather_objects
from zaya.parallel.mesh import Mesh
from zaya.parallel.parallelize import build_model, build_optimizer, describe, pieces, token_index
from zaya.plan import plan
from zaya.preemption import GRACE_S, Preemption
from zaya.resilience.guard import Guard
from zaya.resilience.watchdog import Progress
from zaya.resume import restore
from zaya.runtime import GarbageCollection
from zaya.saving import open_saver
from zaya.schedule import batch_size, learning_rate
from zaya.state import TrainState
from zaya.step import StepResult, Sums
from zaya.tiers import agreed, objects

log = logging.getLogger("zaya")
MIRROR_POLL_S = 0.5
"""How often ranks that wait for the mirror tell one another of signals."""


def open_data(recipe: Recipe, mesh: Mesh) -> Loader:
    """The loader, once rank 0 has built what data.source asks for (collective). ValueError: bad corpora, too few evaluation rows; on every
    rank, where they cannot be built."""
    agreed(lambda: build_corpora(recipe) if mesh.rank == 0 else None, mesh)
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


def choose_kernels(recipe: Recipe, mesh: Mesh) -> backend.Choice:
    """Who computes the ops, the same on every rank (collective). ValueError: the recipe asks for what cannot run, or nodes differ."""
    model = recipe.model
    choice = agreed(lambda: backend.choose(recipe.train.kernels, mesh.device, DTYPES[recipe.train.dtype], model.head_dim, model.hidden_size,
                                           model.num_router_classes), mesh)
    choices = objects(choice, mesh)
    apart = next((rank for rank, other in enumerate(choices) if other.name != choices[0].name), None)
    if apart is not None:
        raise_on_all([ValueError(f"kernels would be {choices[0]} on rank 0 and {choices[apart]} on rank {apart}; make their nodes alike, "
                                 'or set train.kernels = "reference"')])
    return choice


class Trainer:
    """One rank's part of a run. `position` counts rows consumed by the whole job: with the recipe it determines every batch to come."""

    def __init__(self, recipe: Recipe, mesh: Mesh, loader: Loader, progress: Progress | None = None, *, draw: bool = True) -> None:
        """draw = False: the weights are NaN until `restore` has taken a checkpoint's (see resume.will_load_weights)."""
        self.recipe, self.mesh, self.loader = recipe, mesh, loader
        self.progress = progress or Progress()
        """Where the loop is, for whoever watches this process."""
        train = recipe.train
        self.kernels = choose_kernels(recipe, mesh)
        self.table = plan(recipe.model)
        self.model = build_model(recipe.model, DTYPES[train.dtype], train.recompute, mesh, self.table)
        init_weights(self.model, recipe.model, train.seed, pieces(mesh, self.table), draw=draw)
        self.has_weights = draw
        self.optimizer = build_optimizer(self.model, recipe, mesh, self.table)
        self.balance = RouterBalance([block.moe.router.balance_bias for block in self.model.blocks], recipe.model.num_experts,
                                     recipe.optim.balance_lr)
        biases = {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        self.state = TrainState(self.table, self.optimizer, biases | self.balance.tensors(), mesh, rounded=train.dtype == "bf16")
        self.token_index = token_index(mesh, train.seq_len)
        self.step, self.position = 0, 0
        self.last_batch_rows = 0
        self.origin = f"new weights from seed {train.seed}"
        self.skipped: list[str] = []
        """Checkpoints that the start passed over, and why."""
        self.resumed_from: Path | None = None
        self.hf_config: Mapping[str, Any] = {}
        """Of the checkpoint that the weights came from: an export of this run's writes it again."""
        self.saver: Saver | None = None
        peak = flops.peak_flops(torch.cuda.get_device_name(mesh.device)) if mesh.device.type == "cuda" else None
        self._peak_tokens_per_second = peak and peak * mesh.world_size / flops.train_flops_per_token(recipe.model, train.seq_len)
        """Of the whole job at an mfu of 1; None where the device's peak is unknown."""
        self._warned_of_grace = False
        self._evaluation_s = 0.0

    # ------------------------------------------------------------------------------------------------------------ one step

    def train_step(self, votes: Sequence[float] = (0, 0)) -> StepResult:
        """Forward and backward over this rank's rows, one update. `votes`: two numbers of this rank that all ranks shall know the sum of.

        Collectives beside the model's own: gradients and parameters (zaya/parallel/zero1.py), and one sum of everything small.
        """
        recipe = self.recipe
        batches = self._micro_batches()
        self.optimizer.start_step(len(batches))
        counts_LC = torch.zeros(recipe.model.num_layers, recipe.model.num_router_classes, dtype=torch.int64, device=self.mesh.device)
        loss_sum, labelled = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        for part, (first, rows) in enumerate(batches):
            self.progress.enter("micro-batch", self.step, part)
            batch = self._mine(self.loader.batch(first, rows))
            output = self.model(batch.tokens_BT, batch.positions_BT)
            loss = self.model.loss(output.hidden_BTD, batch.labels_BT)
            self.optimizer.backward(loss)
            loss_sum += loss.detach()  # rows of one small tensor, summed in place
            labelled += (batch.labels_BT != IGNORE).sum()
            counts_LC += output.counts_LC
        self.progress.enter("update", self.step)
        self.optimizer.finish_gradients()
        own = self.mesh.tp.rank == 0  # all tp ranks computed this loss
        voted = torch.tensor(votes, dtype=torch.float64, pin_memory=self.mesh.device.type == "cuda")
        flat = Sums.flat(loss_sum * own, labelled * own, self.optimizer.squared_norm(), voted.to(self.mesh.device, non_blocking=True),
                         counts_LC)
        all_reduce_sum(flat, self.mesh.world)
        result = StepResult(flat, len(counts_LC), loss.dtype, self.balance.shares)

        # Gradients are those of the summed loss; the mean over the global token count enters here, with the clipping.
        sums = Sums.of(flat, len(counts_LC))
        grad_norm, committed = sums.grad_norm(loss.dtype), sums.is_sound(loss.dtype)
        clip = recipe.optim.clip
        clip_scale = (clip / (grad_norm + 1e-6)).clamp_max(1.0) if clip else torch.ones_like(grad_norm)
        lr = learning_rate(self.step + 1, recipe.train.steps, recipe.optim)
        self.optimizer.update(lr=lr, grad_scale=(clip_scale / sums.labelled).to(grad_norm.dtype), commit=committed)
        self.balance.update(sums.counts_LC, commit=committed)
        self.step += 1
        self.last_batch_rows = batch_size(self.position, recipe.train)
        self.position += self.last_batch_rows
        return result

    def _micro_batches(self) -> list[tuple[int, int]]:
        """(first row, rows) of each forward pass of the next step on this rank."""
        dp, batch_rows = self.mesh.dp, batch_size(self.position, self.recipe.train)
        share = batch_rows // dp.size
        first = self.position + dp.rank * share
        rows = self.recipe.micro_batch_rows(dp.size, batch_rows)
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
        for part, row in enumerate(range(first, first + share, train.micro_batch_size)):
            self.progress.enter("evaluation", self.step, part)
            batch = self._mine(self.loader.evaluation(row, min(train.micro_batch_size, first + share - row)))
            loss = self.model.loss(self.model(batch.tokens_BT, batch.positions_BT).hidden_BTD, batch.labels_BT)
            sums += torch.stack([loss.double(), (batch.labels_BT != IGNORE).sum().double()])
        all_reduce_sum(sums, self.mesh.token)
        return (sums[0] / sums[1].clamp_min(1)).item()

    # ------------------------------------------------------------------------------------------------------------ state

    def counters(self) -> dict[str, Any]:
        """What a checkpoint says beside the tensors."""
        return dict(step=self.step, tokens=self.position * self.recipe.train.seq_len, position=self.position,
                    tokens_by_corpus=self.loader.tokens_by_corpus(self.position), recipe=dataclasses.asdict(self.recipe),
                    layout=self.mesh.layout.as_dict(), hf_config=dict(self.hf_config))

    def save(self, root: Path) -> Path:
        """Write checkpoint root/step-N on all ranks together, at once. CheckpointError: it cannot be written."""
        return save(root, self.state.owned(), **self.counters(), rank=self.mesh.rank, world_size=self.mesh.world_size,
                    gather=lambda value: gather_objects(value, self.mesh.world))

    def restore(self) -> None:
        """Start from where the recipe says: the run's own newest sound checkpoint, a given one, other weights, or random ones."""
        start = restore(self.recipe, self.state, self.mesh)
        if not (self.has_weights or start.brings_weights):
            raise_on_all([CheckpointError("the checkpoints that were there as the run started are gone; start it again")])
        self.has_weights = True
        self.origin, self.skipped, self.hf_config = start.origin, start.skipped, start.hf_config
        if start.resumed is not None:
            manifest = start.resumed.manifest
            self.step, self.position, self.resumed_from = manifest.step, manifest.position, start.resumed.path

    def load(self, path: Path, *, weights_only: bool = False) -> None:
        """Take the state of a checkpoint, or its weights alone; see TrainState.load."""
        checkpoint = Checkpoint.open(path)
        self.state.load(checkpoint, weights_only=weights_only)
        if not weights_only:
            self.step, self.position = checkpoint.manifest.step, checkpoint.manifest.position

    # ------------------------------------------------------------------------------------------------------------ the run

    def open_saver(self) -> None:
        """Be ready to save, where the recipe says so (collective; `fit` does it if nobody has). ValueError: see open_saver."""
        recipe = self.recipe
        if self.saver is None and recipe.checkpoint.interval and (self.step < recipe.train.steps or recipe.checkpoint.local_dir):
            self.saver = open_saver(recipe, self.mesh, self.step, self.resumed_from)

    def fit(self, metrics: MetricsWriter | None) -> str:
        """Train to train.steps from wherever the run stands; rank 0 has the record and writes every step to it.

        The name of the signal that ended it before that, or before its last checkpoint was mirrored, with its state saved; empty: it is
        finished. CheckpointError: its last state could not be saved. NumericalFault: see zaya/resilience/guard.py.
        """
        recipe = self.recipe
        for line in (*self.skipped, f"{self.mesh} | kernels: {self.kernels} | {self.origin}", *describe(recipe, self.mesh)):
            log.info(line)
        self.open_saver()
        saver = self.saver
        if self.step >= recipe.train.steps:
            log.info("run %s is finished at step %d; nothing to do", recipe.run.dir, self.step)
            with Preemption(active=saver is not None) as preemption:
                return "" if saver is None or self._mirrored(saver, preemption) else preemption.signal
        if saver is not None:
            saver.prepare(self.state.owned())
        # The signals last: from there to the exit record torchrun, which has seen another rank die, would end this process without one.
        with Preemption(active=saver is not None) as preemption, self._bar() as bar, GarbageCollection() as garbage:
            self._evaluate_again(metrics)
            stop, due, guard = False, False, Guard()
            while self.step < recipe.train.steps and not stop:
                started = time.perf_counter()
                result = self.train_step((bool(preemption.signal), saver is not None and saver.wants_retry))
                if metrics is not None:
                    self._record(metrics, self._row(result, started, saver))
                stopping, retrying = result.votes.tolist()
                self.progress.enter("between steps", self.step)
                committed = bool(result.committed)
                guard.step(self.step, committed, last=self.step == recipe.train.steps)
                stop = saver is not None and stopping > 0 and self.step < recipe.train.steps
                if stop:
                    preemption.learn()
                else:
                    self._evaluate_when_due(metrics)
                due = due or _due(self.step, recipe.checkpoint.interval, recipe.train.steps)
                # What may be broken does not take the place of a sound checkpoint: it waits for a step that updates something.
                sound = committed or self.step == recipe.train.steps
                if saver is not None and (due and sound or stop or retrying == self.mesh.world_size):
                    due = False
                    self._start_save(saver, metrics)
                garbage.step(self.step)
                bar.update()
            self.optimizer.wait()
            self.progress.enter("end", self.step)
            if saver is not None:
                self._finish_saves(saver, metrics, hurry=stop)
                stop = not self._mirrored(saver, preemption) or stop
        if metrics is not None:
            try:
                metrics.close()
            except OSError as error:
                raise CheckpointError(f"the last rows of metrics.jsonl could not be written: {error.strerror}") from None
        return preemption.signal if stop else ""

    def _bar(self) -> tqdm[NoReturn]:
        return tqdm(total=self.recipe.train.steps, initial=self.step, unit="step", disable=None if self.mesh.rank == 0 else True,
                    dynamic_ncols=True)

    def _record(self, metrics: MetricsWriter, row: Mapping[str, Any]) -> None:
        metrics.append(dict(row))
        if metrics.problem:
            log.error("step %d | metrics.jsonl cannot be written (%s): its rows wait in memory", self.step, metrics.problem)
        if self.step % self.recipe.train.log_interval == 0 or self.step == self.recipe.train.steps:
            log.info(format_line(dict(row), self.recipe.train.steps))
        # At worst a signal comes in an evaluation; then a step is done, the save under way and one more.
        needed_s = self._evaluation_s + 2 * row["step_time_s"] + 2 * (row.get("save_time_s") or 0)
        if needed_s > GRACE_S and not self._warned_of_grace:
            self._warned_of_grace = True
            log.warning("an evaluation, two steps and two saves take %.0f s, a preempted job has %.0f s: it may lose what follows its "
                        "last checkpoint; lower checkpoint.interval or train.eval_rows", needed_s, GRACE_S)

    def _start_save(self, saver: Saver, metrics: MetricsWriter | None) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)  # the copy waits for the update in any case; the stall is the copy's alone
        phase = self.progress.phase
        self.progress.enter("save", self.step)
        # A checkpoint never reaches the disk before the rows that it follows.
        saver.start(self.state.owned(), first=metrics.sync if metrics is not None else lambda: None, **self.counters())
        self.progress.enter(phase, self.step)

    def _finish_saves(self, saver: Saver, metrics: MetricsWriter | None, hurry: bool) -> None:
        """The last state is saved; where that fails, as often as any save is tried."""
        saver.wait(hurry)
        while saver.wants_retry:
            self._start_save(saver, metrics)
            saver.wait(hurry)
        if saver.failed:
            raise_on_all([CheckpointError(f"the state of step {self.step} could not be saved ({saver.problem}); once that is mended, start "
                                          "the run again: it goes on from the newest checkpoint before it")])

    def _mirrored(self, saver: Saver, preemption: Preemption) -> bool:
        """Wait until every checkpoint is on both tiers (collective). False: a signal to any rank came before; a job that must go has no
        time for that, and the next one on these nodes goes on with it. CheckpointError: the last one cannot be brought there."""
        while True:
            signalled, behind = map(any, zip(*objects((bool(preemption.signal), saver.mirror_is_behind), self.mesh)))
            if signalled and behind:
                preemption.learn()
                log.warning("step %d | not mirrored yet: it is on the local tier only, %s; start the run again on the same nodes",
                            self.step, step_path(saver.root, self.step))
                return False
            if all(objects(agreed(lambda: saver.close(timeout_s=MIRROR_POLL_S), self.mesh), self.mesh)):
                return True

    def _evaluate_when_due(self, metrics: MetricsWriter | None) -> None:
        recipe = self.recipe
        if _due(self.step, recipe.train.eval_interval, recipe.train.steps):
            began = time.perf_counter()
            eval_row = {"step": self.step, "eval_loss": self.evaluate()}
            self._evaluation_s = time.perf_counter() - began
            if metrics is not None:
                metrics.append(eval_row)
                log.info(format_line(eval_row, recipe.train.steps))

    def _evaluate_again(self, metrics: MetricsWriter | None) -> None:
        """The evaluation of the step that the run stands at, where a preemption left no time for it."""
        missing = objects(metrics is not None and metrics.step == self.step != metrics.eval_step, self.mesh)[0]
        if missing and self.step:
            self._evaluate_when_due(metrics)

    def _row(self, result: StepResult, started: float, saver: Saver | None) -> dict[str, object]:
        """One line of metrics.jsonl. Waits for the step's sums, not for its update, which runs into the next step's time, or into that
        of an evaluation or a save between them."""
        train, loss = self.recipe.train, result.loss.item()
        seconds = time.perf_counter() - started
        tokens_per_second = self.last_batch_rows * train.seq_len / seconds
        return {
            "step": self.step, "tokens": self.position * train.seq_len, "loss": loss, "grad_norm": result.grad_norm.item(),
            "lr": learning_rate(self.step, train.steps, self.recipe.optim), "tokens_per_second": tokens_per_second,
            "step_time_s": seconds, "mfu": tokens_per_second / self._peak_tokens_per_second if self._peak_tokens_per_second else None,
            **routing_metrics(result.shares_LE.tolist()), "committed": bool(result.committed),
            **(saver.report() if saver is not None else {}),
        }


def _due(step: int, interval: int, steps: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == steps)
