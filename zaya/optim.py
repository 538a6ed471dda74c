"""Optimizers: Muon for matrices, AdamW for the rest, and the AdamW that balances the router.

After backward on a batch's path. Parameters of one rule lie end to end in flat buffers (`FlatGroup`), so that a gradient all-reduce, the
norm and AdamW see one tensor per rule. Updates are two-phase: the trainer computes a verdict, and where `commit` is false nothing changes.
Which parameter gets which rule is the plan's business; ranks and groups are unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from zaya.config import OptimConfig
from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.plan import AdamW, Muon, ParameterPlan

MUON_SCALE = 0.2  # update RMS of AdamW (Liu et al. 2025, "Muon is scalable"): one learning rate serves both rules
MUON_BATCH = 1 << 27  # elements orthogonalised at once: 256 MiB in bf16, 32 matrices of 2048 x 2048 in one launch


class FlatGroup:
    """Parameters of one rule, end to end: `param` (train dtype; the model's parameters are views of it), `master` (fp32, or fp64; the
    same memory as param where the dtype is wide already), `grad` (dtype of master) and the rule's state.

    Gradients are collected by hooks: the first micro-batch overwrites, the others add, so nothing is zeroed.
    """

    def __init__(self, rows: Sequence[ParameterPlan], parameters: Mapping[str, nn.Parameter], state_names: Sequence[str]) -> None:
        self.rows = list(rows)
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + parameters[row.name].numel())
        first = parameters[rows[0].name]
        wide = reference.wide(first.dtype)
        self.param = torch.empty(starts[-1], dtype=first.dtype, device=first.device)
        self.spans = {row.name: (start, end) for row, start, end in zip(rows, starts, starts[1:])}
        self.shapes = {row.name: parameters[row.name].shape for row in rows}
        for row in rows:
            view = self.view(self.param, row.name)
            view.copy_(parameters[row.name].data)
            parameters[row.name].data = view
            parameters[row.name].register_post_accumulate_grad_hook(self._collector(row.name))
        self.master = self.param if wide == first.dtype else self.param.to(wide)
        self.grad = torch.zeros_like(self.master)
        self.state = {name: torch.zeros_like(self.master) for name in state_names}
        self.collected: dict[str, int] = {}

    def view(self, flat: Tensor, name: str) -> Tensor:
        start, end = self.spans[name]
        return flat[start:end].view(self.shapes[name])

    def start_step(self) -> None:
        """The next gradient of every parameter replaces the old one."""
        self.collected = dict.fromkeys(self.spans, 0)

    def publish(self) -> None:
        """Round the master weights to the model's parameters."""
        if self.master is not self.param:
            self.param.copy_(self.master)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything a checkpoint keeps beside the model's own tensors, by name."""
        flats = dict(self.state) if self.master is self.param else {"master": self.master, **self.state}
        for kind, flat in flats.items():
            for row in self.rows:
                yield f"optim.{kind}.{row.name}", self.view(flat, row.name)

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            target = self.view(self.grad, name)
            target.add_(parameter.grad) if self.collected.get(name) else target.copy_(parameter.grad)
            self.collected[name] = self.collected.get(name, 0) + 1
            parameter.grad = None

        return collect


class Optimizer:
    """The plan's rules over a model's parameters.

    Per step: `start_step`, backward passes, (all-reduce of `gradients`), `norm`, `update`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], table: Mapping[str, ParameterPlan], config: OptimConfig) -> None:
        self.config = config
        rows = [table[name] for name in parameters]
        muon = [row for row in rows if isinstance(self._rule(row), Muon)]
        assert all(row.decay for row in muon), "every matrix of the plan decays"
        rest = [row for row in rows if isinstance(self._rule(row), AdamW)]
        decayed, plain = [r for r in rest if r.decay], [r for r in rest if not r.decay]
        self.muon = [FlatGroup(muon, parameters, ("momentum",))] if muon else []
        self.adamw = [FlatGroup(group, parameters, ("exp_avg", "exp_avg_sq")) for group in (decayed, plain) if group]
        master = self.adamw[0].master
        self.step = torch.zeros((), dtype=torch.float32, device=master.device)

    def _rule(self, row: ParameterPlan) -> Muon | AdamW:
        return row.optimizer if self.config.name == "muon" else AdamW()

    @property
    def groups(self) -> list[FlatGroup]:
        return [*self.muon, *self.adamw]

    def start_step(self) -> None:
        for group in self.groups:
            group.start_step()

    def gradients(self) -> list[Tensor]:
        """The flat gradient buffers, complete: every parameter contributed equally often."""
        times = {count for group in self.groups for count in group.collected.values()}
        assert len(times) == 1 and times != {0}, "a parameter received no gradient"
        return [group.grad for group in self.groups]

    def norm(self) -> Tensor:
        """L2 norm over all gradients as they stand, each element once."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(group.grad) for group in self.groups]))

    @torch.no_grad()
    def update(self, *, lr: float, grad_scale: Tensor, commit: Tensor) -> None:
        """One step from grad * grad_scale (0-dim); nothing changes where commit (0-dim bool) is false."""
        config = self.config
        for group in self.adamw:
            decay = config.weight_decay if group.rows[0].decay else 0.0
            arrays = (group.master, group.grad, group.state["exp_avg"], group.state["exp_avg_sq"])
            ops().adamw_(*arrays, lr=lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=decay, grad_scale=grad_scale,
                         step=self.step, commit=commit, out=None if group.master is group.param else group.param)
        for group in self.muon:
            for matrix, rows in _alike(group.rows, group.shapes):
                flats = (group.master, group.grad, group.state["momentum"])
                muon_(*([group.view(flat, row.name) for row in rows] for flat in flats), matrix=matrix, lr=lr, momentum=config.momentum,
                      weight_decay=config.weight_decay, grad_scale=grad_scale, dtype=group.param.dtype, commit=commit)
            group.publish()
        self.step += commit

    def tensors(self) -> dict[str, Tensor]:
        """State by checkpoint name; writing into these tensors restores it."""
        named = {name: tensor for group in self.groups for name, tensor in group.tensors()}
        return named | {"optim.step": self.step}


def muon_(params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor], *, matrix: tuple[int, int], lr: float,
          momentum: float, weight_decay: float, grad_scale: Tensor, dtype: torch.dtype, commit: Tensor) -> None:
    """Muon in place on parameters that are stacks of `matrix` (rows, cols), one above the other (Jordan et al. 2024).

    Nesterov momentum as a moving average, Newton-Schulz in `dtype` over all matrices at once, update times 0.2 sqrt(max(rows, cols)),
    decoupled decay.
    """
    scaled = [grad * grad_scale for grad in grads]
    averages = [torch.lerp(buffer, grad, 1 - momentum) for buffer, grad in zip(momentum_buffers, scaled)]
    directions = [torch.lerp(grad, average, momentum).to(dtype).view(-1, *matrix) for grad, average in zip(scaled, averages)]
    updates = ops().newton_schulz(torch.cat(directions)).split([len(direction) for direction in directions])
    step = -lr * MUON_SCALE * math.sqrt(max(matrix))
    for param, update, buffer, average in zip(params, updates, momentum_buffers, averages):
        updated = torch.add(param * (1 - lr * weight_decay), update.to(param.dtype).view_as(param), alpha=step)
        param.copy_(torch.where(commit, updated, param))
        buffer.copy_(torch.where(commit, average, buffer))


def _alike(rows: Sequence[ParameterPlan], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[tuple[int, int], list[ParameterPlan]]]:
    """Rows whose matrices have one shape, with that shape; at most MUON_BATCH elements at a time, but at least a row."""
    by_matrix: dict[tuple[int, int], list[ParameterPlan]] = {}
    for row in rows:
        assert isinstance(row.optimizer, Muon)
        height, width = shapes[row.name][-2:]
        by_matrix.setdefault((height // row.optimizer.blocks, width), []).append(row)
    for matrix, alike in by_matrix.items():
        batch: list[ParameterPlan] = []
        size = 0
        for row in alike:
            numel = shapes[row.name].numel()
            if batch and size + numel > MUON_BATCH:
                yield matrix, batch
                batch, size = [], 0
            batch.append(row)
            size += numel
        yield matrix, batch


class RouterBalance:
    """Moves the router's balance biases so that experts get equal shares: AdamW on the gradient p_e - 1/E of each block.

    p_e is expert e's share of the global batch among the real experts; the skip class is no expert and its bias stays. After each step
    a block's mean bias is taken off, so that the biases cannot drift against the skip class.
    """

    BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # unpublished; starting values

    def __init__(self, biases: Sequence[Tensor], num_experts: int, lr: float) -> None:
        self.biases, self.num_experts, self.lr = list(biases), num_experts, lr
        self.exp_avg = torch.zeros(len(biases), num_experts, dtype=biases[0].dtype, device=biases[0].device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step = torch.zeros((), dtype=torch.float32, device=self.exp_avg.device)

    @torch.no_grad()
    def update(self, counts_LC: Tensor, commit: Tensor) -> None:
        """counts (L, C) int64: tokens of the global batch per block and router class."""
        bias_LE = torch.stack([bias[: self.num_experts] for bias in self.biases])
        excess_LE = self.shares(counts_LC) - 1 / self.num_experts
        ops().adamw_(bias_LE, excess_LE, self.exp_avg, self.exp_avg_sq, lr=self.lr, beta1=self.BETA1, beta2=self.BETA2, eps=self.EPS,
                     weight_decay=0.0, grad_scale=torch.ones_like(self.step), step=self.step, commit=commit)
        self.step += commit
        for bias, new in zip(self.biases, torch.where(commit, bias_LE - bias_LE.mean(-1, keepdim=True), bias_LE)):
            bias[: self.num_experts] = new

    def shares(self, counts_LC: Tensor) -> Tensor:
        """p_e (L, E), summing to 1 per block (to 0 where every token skipped)."""
        counts_LE = counts_LC[:, : self.num_experts].to(self.exp_avg.dtype)
        return counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)

    def tensors(self) -> dict[str, Tensor]:
        return {"optim.balance.exp_avg": self.exp_avg, "optim.balance.exp_avg_sq": self.exp_avg_sq, "optim.balance.step": self.step}
