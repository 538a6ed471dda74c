"""ZeRO-1: every rank keeps the optimizer state of its shard of each flat bucket, and Muon's matrices have one owner each.

Who owns what is zaya/parallel/partition.py's. Per step, on every rank, in one fixed order:

1. backward: a hook copies (micro-batch 1) or adds (later ones) each gradient into its bucket, unless an op has (`gradient_sum`). When the
   last micro-batch has completed a bucket, and all buckets before it, its reduce-scatter is launched; backward goes on.
2. `finish_gradients` waits for them: this rank then has the summed gradient of its shards. With zero_size they are summed over blocks too.
3. `squared_norm`: of the shards here; summed over all ranks, every logical element is in it once.
4. `update`: Muon's momentum, its pieces sent to the matrices' owners (all rounds at once); AdamW on the other shards meanwhile; then each
   round is orthogonalised as it arrives, sent back, and applied.
5. As soon as a bucket's shard is updated, the all-gather of its parameters is launched; `wait` (before the next forward of a block, an
   evaluation, a save) waits for it.

Updates are two-phase: the trainer computes a verdict, and where `commit` is false nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zaya.config import OptimConfig
from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import GradientSum
from zaya.optim import muon_direction, muon_step, orthogonalise
from zaya.parallel import partition
from zaya.parallel.collectives import Group, Pending, all_gather, all_reduce, all_to_all, reduce_scatter
from zaya.parallel.mesh import Holding, Mesh
from zaya.parallel.partition import BucketPlan, Matrix, Part
from zaya.plan import ParameterPlan
from zaya.shard import Box


class Bucket:
    """A flat bucket: `param` (train dtype; the model's parameters are views of it), `grad` (fp32, or fp64), and of this rank's shard
    `master` (the same memory as its part of param where the dtype is wide already) and the rule's state."""

    def __init__(self, plan: BucketPlan, holding: Holding, parameters: Mapping[str, nn.Parameter],
                 reduce_dtype: torch.dtype | None) -> None:
        self.plan, self.holding = plan, holding
        first = parameters[plan.rows[0].name]
        wide = reference.wide(first.dtype)
        self.param = torch.zeros(plan.length, dtype=first.dtype, device=first.device)
        self.shapes = {row.name: parameters[row.name].shape for row in plan.rows}
        for row in plan.rows:
            view = self.view(self.param, row.name)
            view.copy_(parameters[row.name].data)
            parameters[row.name].data = view
        self.param_shard = self.shard_of(self.param)
        self.master = self.param_shard if wide == first.dtype else self.param_shard.to(wide)
        self.grad = torch.zeros(plan.length, dtype=wide, device=first.device)
        self.reduce_dtype = reduce_dtype or wide
        self.state = {name: torch.zeros_like(self.master) for name in (("momentum",) if plan.muon else ("exp_avg", "exp_avg_sq"))}
        self.missing = 0
        self.grad_shard = self.shard_of(self.grad)
        self._reducing: Pending | None = None
        self._gathering: Pending | None = None

    @property
    def label(self) -> str:
        return f"{self.plan.rows[0].name}..{self.plan.rows[-1].name}"

    def view(self, flat: Tensor, name: str) -> Tensor:
        start, stop = self.plan.spans[name]
        return flat[start:stop].view(self.shapes[name])

    def shard_of(self, flat: Tensor) -> Tensor:
        start = self.holding.shard.rank * self.plan.shard_length
        return flat[start : start + self.plan.shard_length]

    def publish(self) -> None:
        """Round the shard's master weights to the model's parameters."""
        if self.master is not self.param_shard:
            self.param_shard.copy_(self.master)

    def start_reduce(self) -> None:
        self._reducing = reduce_scatter(self.grad.to(self.reduce_dtype), self.holding.shard, self.label)

    def finish_reduce(self) -> None:
        assert self._reducing is not None, "a bucket's gradients were not complete"
        shard = self._reducing.wait()
        self._reducing = None
        self.grad_shard = all_reduce(shard, self.holding.replicas, self.label).wait().to(self.grad.dtype)

    def start_gather(self) -> None:
        self._gathering = all_gather(self.param_shard, self.holding.shard, self.label, out=self.param)

    def finish_gather(self) -> None:
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None


@dataclass(frozen=True)
class _Round:
    """One exchange of Muon as this rank sees it: matrices are listed in one order on all ranks."""

    group: Group
    buckets: tuple[int, ...]
    sends: tuple[tuple[tuple[Matrix, Part], ...], ...]
    """By owner: the parts of its matrices that lie here."""
    receives: tuple[tuple[tuple[Matrix, Part], ...], ...]
    """By holder: its parts of the matrices owned here."""
    owned: tuple[Matrix, ...]


class Zero1:
    """The plan's rules over the parameters of this rank's model. `parameters` hold this rank's pieces; gradients are summed over ranks in
    `reduce_dtype` (None: fp32, or fp64).

    Per step: `start_step`, backward passes, `finish_gradients`, `squared_norm`, `update`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], table: Mapping[str, ParameterPlan], config: OptimConfig, mesh: Mesh, *,
                 reduce_dtype: torch.dtype | None = None, bucket_elements: int | None = None, round_elements: int | None = None) -> None:
        self.config, self.mesh = config, mesh
        rows = [table[name] for name in parameters]
        plans = partition.make_buckets(rows, mesh.layout, muon=config.name == "muon",
                                       bucket_elements=bucket_elements or partition.BUCKET_ELEMENTS)
        self.buckets = [Bucket(p, mesh.holding(p.rows[0].placement), parameters, reduce_dtype) for p in plans]
        self.rounds = [_round(mesh, self.buckets, indices, matrices) for indices, matrices in partition.muon_rounds(
            plans, mesh.layout, mesh.rank, round_elements or partition.ROUND_ELEMENTS)]
        self.step = torch.zeros((), dtype=torch.float32, device=self.buckets[0].master.device)
        self._bucket_of = {name: bucket for bucket in self.buckets for name in bucket.plan.spans}
        self._rows = {row.name: row for bucket in self.buckets for row in bucket.plan.rows}
        self._sums = {name: GradientSum(bucket.view(bucket.grad, name)) for name, bucket in self._bucket_of.items()}
        self._collected: dict[str, int] = {}
        self._micro_batches = 0
        self._to_reduce: list[Bucket] = []
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(self._collector(name))

    # ------------------------------------------------------------------------------------------------------------ gradients

    def start_step(self, micro_batches: int = 1) -> None:
        """The next gradients replace the old ones; the micro_batches-th of each parameter completes it."""
        self._micro_batches = micro_batches
        self._collected = dict.fromkeys(self._bucket_of, 0)
        for gradient_sum in self._sums.values():
            gradient_sum.restart()
        for bucket in self.buckets:
            bucket.missing = len(bucket.plan.rows)
        self._to_reduce = list(self.buckets)  # the last in the forward pass is taken first

    def gradient_sum(self, name: str) -> GradientSum:
        """The part of the bucket where a parameter's gradients are summed, for an op that adds to it by itself."""
        return self._sums[name]

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch's summed loss."""
        loss.backward()

    def finish_gradients(self) -> None:
        """Every shard's gradient is summed. Every parameter must have received one from each micro-batch."""
        missing = [name for name, times in self._collected.items() if times != self._micro_batches]
        assert self._collected and not missing, f"a parameter received no gradient: {missing[:1]}"
        for bucket in reversed(self.buckets):
            bucket.finish_reduce()

    def squared_norm(self) -> Tensor:
        """Squared L2 norm, fp64, of the gradient elements that count here: summed over all ranks each element counts once."""
        norms = [torch.linalg.vector_norm(bucket.grad_shard) for bucket in self.buckets if bucket.holding.replicas.rank == 0]
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.step.device)
        return torch.stack(norms).double().square().sum()

    def _collector(self, name: str) -> Callable[[Tensor], None]:
        bucket, gradient_sum = self._bucket_of[name], self._sums[name]

        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if not parameter.grad.is_sparse:  # else GradientSum.for_autograd: an op says that it has added it
                gradient_sum.add(parameter.grad)
            parameter.grad = None
            self._collected[name] += gradient_sum.added
            gradient_sum.added = False
            if self._collected[name] == self._micro_batches:
                bucket.missing -= 1
                while self._to_reduce and self._to_reduce[-1].missing == 0:
                    self._to_reduce.pop().start_reduce()

        return collect

    # ------------------------------------------------------------------------------------------------------------ update

    @torch.no_grad()
    def update(self, *, lr: float, grad_scale: Tensor, commit: Tensor) -> None:
        """One step from grad * grad_scale (0-dim); nothing changes where commit (0-dim bool) is false."""
        config = self.config
        arriving = [self._send_directions(round_, grad_scale, commit) for round_ in self.rounds]
        for bucket in self.buckets:
            if not bucket.plan.muon:
                arrays = (bucket.master, bucket.grad_shard, bucket.state["exp_avg"], bucket.state["exp_avg_sq"])
                ops().adamw_(*arrays, lr=lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                             weight_decay=config.weight_decay if bucket.plan.decay else 0.0, grad_scale=grad_scale, step=self.step,
                             commit=commit, out=None if bucket.master is bucket.param_shard else bucket.param_shard)
                bucket.start_gather()
        returning = [self._send_updates(round_, pending) for round_, pending in zip(self.rounds, arriving)]
        for round_, pending in zip(self.rounds, returning):
            self._apply(round_, pending, lr, commit)
        self.step += commit

    def _send_directions(self, round_: _Round, grad_scale: Tensor, commit: Tensor) -> Pending:
        """Momentum of the round's shards, and their directions on the way to the owners."""
        directions: dict[int, Tensor] = {}
        for index in round_.buckets:
            bucket = self.buckets[index]
            directions[index] = muon_direction(bucket.grad_shard * grad_scale, bucket.state["momentum"], momentum=self.config.momentum,
                                               commit=commit).to(bucket.param.dtype)
        parts = [directions[part.bucket][part.start : part.stop] for to in round_.sends for _, part in to]
        rows = torch.cat(parts) if parts else next(iter(directions.values()))[:0]
        send, receive = _lengths(round_.sends), _lengths(round_.receives)
        return all_to_all(rows, send, receive, round_.group, "directions")

    def _send_updates(self, round_: _Round, pending: Pending) -> Pending:
        """Orthogonalise the matrices owned here; their pieces on the way back."""
        rows = pending.wait()
        arrived = _cut(rows, round_.receives)
        updates = orthogonalise([_assemble(matrix, arrived, rows) for matrix in round_.owned])
        update_of = {(matrix.name, matrix.index): update for matrix, update in zip(round_.owned, updates)}
        parts = [_piece_of(update_of[matrix.name, matrix.index], part) for source in round_.receives for matrix, part in source]
        rows = torch.cat(parts) if parts else rows[:0]
        return all_to_all(rows, _lengths(round_.receives), _lengths(round_.sends), round_.group, "updates")

    def _apply(self, round_: _Round, pending: Pending, lr: float, commit: Tensor) -> None:
        """The pieces of the updates enter this rank's shards."""
        rows, start = pending.wait(), 0
        steps = {index: torch.zeros_like(self.buckets[index].master) for index in round_.buckets}
        for matrix, part in (item for owner in round_.sends for item in owner):
            steps[part.bucket][part.start : part.stop] = rows[start : start + part.numel]
            steps[part.bucket][part.start : part.stop] *= muon_step(lr, matrix.shape)
            start += part.numel
        for index in round_.buckets:
            bucket = self.buckets[index]
            updated = bucket.master * (1 - lr * self.config.weight_decay) + steps[index]
            bucket.master.copy_(torch.where(commit, updated, bucket.master))
            bucket.publish()
            bucket.start_gather()

    def wait(self, names: Iterable[str] | None = None) -> None:
        """The parameters `names` (all by default) are the updated ones."""
        for bucket in self.buckets if names is None else {id(b): b for b in map(self._bucket_of.__getitem__, names)}.values():
            bucket.finish_gather()

    def publish(self) -> None:
        """The parameters from their owners' shards, after these were written (collective)."""
        for bucket in self.buckets:
            bucket.start_gather()
        self.wait()

    # ------------------------------------------------------------------------------------------------------------ state

    def kinds(self, name: str) -> list[str]:
        """What a checkpoint keeps of a parameter: model, master (where the model's is rounded), and the rule's state."""
        bucket = self._bucket_of[name]
        return ["model", *([] if bucket.master is bucket.param_shard else ["master"]), *bucket.state]

    def _flat(self, name: str, kind: str) -> Tensor:
        bucket = self._bucket_of[name]
        return {"model": bucket.param_shard, "master": bucket.master, "grad": bucket.grad_shard, **bucket.state}[kind]

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return self._flat(name, kind).dtype

    def parts(self, name: str, kind: str) -> Iterator[tuple[Box, Tensor]]:
        """This rank's shard of one tensor of the state (or "grad"), as boxes of the logical tensor, each with the memory that holds it."""
        bucket = self._bucket_of[name]
        return self._views(name, kind, 0, bucket.plan.boxes(self._rows[name], self.mesh.layout, self.mesh.rank))

    def own_parts(self, name: str, kind: str) -> Iterator[tuple[Box, Tensor]]:
        """The part of that which is this rank's to save or to count: with zero_size other ranks hold the same shard, and share it out."""
        bucket = self._bucket_of[name]
        return self._views(name, kind, *bucket.plan.saved(self._rows[name], self.mesh.layout, self.mesh.rank))

    def _views(self, name: str, kind: str, before: int, boxes: Iterable[Box]) -> Iterator[tuple[Box, Tensor]]:
        """`boxes` follow one another in the shard, `before` elements after the first of the parameter."""
        bucket, flat = self._bucket_of[name], self._flat(name, kind)
        start = max(bucket.plan.spans[name][0] - bucket.holding.shard.rank * bucket.plan.shard_length, 0) + before
        for box in boxes:
            stop = start + math.prod(box[1])
            yield box, flat[start:stop].view(box[1])
            start = stop


def _round(mesh: Mesh, buckets: list[Bucket], indices: list[int], matrices: list[Matrix]) -> _Round:
    group = buckets[indices[0]].holding.exchange
    ranks = mesh.layout.exchange_ranks(buckets[indices[0]].plan.rows[0].placement, mesh.rank)
    assert group.size == len(ranks) and ranks[group.rank] == mesh.rank
    sends: list[list[tuple[Matrix, Part]]] = [[] for _ in ranks]
    receives: list[list[tuple[Matrix, Part]]] = [[] for _ in ranks]
    for matrix in matrices:
        for place, part in matrix.parts:
            if place == group.rank:
                sends[matrix.owner].append((matrix, part))
            if matrix.owner == group.rank:
                receives[place].append((matrix, part))
    return _Round(group, tuple(indices), tuple(map(tuple, sends)), tuple(map(tuple, receives)),
                  tuple(m for m in matrices if m.owner == group.rank))


def _lengths(parts_by_place: Iterable[Iterable[tuple[Matrix, Part]]]) -> list[int]:
    return [sum(part.numel for _, part in parts) for parts in parts_by_place]


def _cut(rows: Tensor, parts_by_place: Iterable[Iterable[tuple[Matrix, Part]]]) -> dict[tuple[str, int, Part], Tensor]:
    """What arrived, part by part."""
    found, start = {}, 0
    for parts in parts_by_place:
        for matrix, part in parts:
            found[matrix.name, matrix.index, part] = rows[start : start + part.numel]
            start += part.numel
    return found


def _assemble(matrix: Matrix, arrived: Mapping[tuple[str, int, Part], Tensor], like: Tensor) -> Tensor:
    """A matrix from its parts: pieces are ranges of rows or of columns, a part is a flat interval of one."""
    whole = like.new_empty(matrix.shape)
    pieces: dict[tuple[tuple[int, int], tuple[int, int]], list[Tensor]] = {}
    for _, part in matrix.parts:
        pieces.setdefault((part.rows, part.columns), []).append(arrived[matrix.name, matrix.index, part])
    for ((top, bottom), (left, right)), flats in pieces.items():
        whole[top:bottom, left:right] = torch.cat(flats).view(bottom - top, right - left)
    return whole


def _piece_of(whole: Tensor, part: Part) -> Tensor:
    """The inverse of `_assemble` for one part."""
    (top, bottom), (left, right) = part.rows, part.columns
    return whole[top:bottom, left:right].reshape(-1)[part.offset : part.offset + part.numel]
