"""Expert parallelism: tokens travel to the rank that holds their expert, and the results travel back.

Who owns what: rank r of the ep group holds experts [r E / ep, (r + 1) E / ep). Who sends what: every rank its counts per router class,
once a call (all-gather, and one copy to the host: all ranks cut the same plan from it); then its routed rows and their gates, brought
together by expert, to the experts' ranks, which compute, gate and send the results back; backward the same with gradients. Assignments of
the skip class go nowhere. No token is dropped and no row is padded.

Memory, in rows, where a rank has A = T k assignments of its own (the mean over the group, should ranks differ):
- limit = factor * A. If no rank receives more than that, a call is one chunk and what its experts keep for backward, x and gate | up, is at
  most limit * (D + 2 F) elements: `factor` times what a level router gives.
- Else (an untrained router can send everything to one rank: ep * A rows) every segment of rows from one rank to one expert is cut into n
  equal parts, n = ceil(most rows a rank receives / limit), and the n chunks run one after the other. A chunk has at most limit + E rows, a
  segment's part being rounded up to a row. Nothing received is kept: backward sends each chunk again and computes it again.
- Transient, two chunks being on the way at a time: see `buffers_bytes`.

Waiting: while the counts travel the device gathers all A rows in the order of their experts; a call of one chunk sends the first of them
as they lie (those of the skip class are last), so that only views stand between the counts' arrival and the first dispatch. Chunk i + 1
is sent before the experts of chunk i are computed, and the results of chunk i are waited for after those of chunk i + 1 have been
computed; so only the first dispatch and the last return are bare. On every rank the order of collectives follows from the plan alone, so
a rank without rows takes part like any other.

Letters: S ranks of the ep group, T tokens of this rank, k slots, A = T k, C router classes, E experts of all ranks, D hidden, F width, n
chunks, R rows of a chunk. A name's suffix tells the rank that has the tensor's rows where it matters: `sent`, `received`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import ExpertSums
from zaya.parallel.collectives import Group, Pending, all_gather, all_to_all

CHUNK_FACTOR = 2.0  # rows a rank takes at once, as a multiple of its own assignments; an estimate, not measured


class Weights(Protocol):
    """The experts of this rank: gate_up (E / ep, 2 F, D), down (E / ep, D, F), and where their gradients are summed, if anywhere."""

    @property
    def gate_up(self) -> Tensor: ...

    @property
    def down(self) -> Tensor: ...

    @property
    def gradient_sums(self) -> ExpertSums | None: ...


@dataclass(frozen=True)
class Plan:
    """What every rank knows of a call on the host, cut from the counts of all ranks alike."""

    send: list[list[int]]
    """[chunk][rank]: rows that this rank sends to each."""
    receive: list[list[int]]
    most_rows: int
    """Rows of the largest chunk of any rank."""
    recompute: bool


class ExpertParallel:
    """The MoE block's dispatcher over an ep group. Every rank calls `compute` for the same blocks in the same order.

    min_chunks: chunks of every call, so that communication overlaps under a level router too. recompute: keep nothing received even
    where it fits; cheaper than checkpointing `compute`, which would exchange the counts and return the results a second time.
    """

    def __init__(self, ep: Group, chunk_factor: float = CHUNK_FACTOR, min_chunks: int = 1, recompute: bool = False) -> None:
        assert chunk_factor > 0 and min_chunks >= 1, (chunk_factor, min_chunks)
        self.ep, self.chunk_factor, self.min_chunks, self.recompute = ep, chunk_factor, min_chunks, recompute
        self.last_rows = 0
        """Rows of the last call's largest chunk on any rank."""
        self.last_chunks = 1

    def compute(self, experts: Weights, x_TD: Tensor, choice_Tk: Tensor, gate_Tk: Tensor, num_classes: int) -> Tensor:
        """The experts' output per token, gated (T, D). The host waits for the device once, for the counts; alone, never."""
        order_A, sizes_C = ops().sort_by_expert(choice_Tk, num_classes)
        num_local = len(experts.gate_up)
        if self.ep.size == 1:
            self.last_rows = choice_Tk.numel()
            inputs = (x_TD, sizes_C[:num_local], experts.gate_up, experts.down, order_A, gate_Tk, experts.gradient_sums)
            if self.recompute:
                return checkpoint(ops().experts, *inputs, use_reentrant=False, preserve_rng_state=False)
            return ops().experts(*inputs)
        counts = all_gather(sizes_C[None], self.ep, "counts")
        # While the counts travel: the rows in the order in which one chunk sends them. If there turn out to be several, it was for nothing.
        order_A, k = order_A.long(), choice_Tk.shape[1]  # int64: index_copy_ takes no other
        ahead = [_rows_of(x_TD.detach(), order_A, k), _rows_of(gate_Tk.detach().reshape(-1, 1), order_A, 1)] if self.min_chunks == 1 else []
        counts_SC = counts.wait()
        plan = self._plan(_on_host(counts_SC, self.ep), num_local)
        self.last_rows, self.last_chunks = plan.most_rows, len(plan.send)
        if self.last_chunks > 1:
            ahead.clear()
        parts_nSE = _cut(counts_SC[:, : self.ep.size * num_local], self.last_chunks)
        sent_A = _in_order_sent(order_A, parts_nSE, self.ep.rank, sum(map(sum, plan.send)))
        return _Experts.apply(x_TD, gate_Tk, experts.gate_up, experts.down, experts.gradient_sums, sent_A, parts_nSE, self.ep, plan, ahead,
                              torch.is_grad_enabled())

    def _plan(self, host_SC: Tensor, num_local: int) -> Plan:
        S, rank, E = self.ep.size, self.ep.rank, self.ep.size * num_local
        assert host_SC.shape[1] >= E, (host_SC.shape, E)
        counts_SC = host_SC.tolist()

        def by_owner(row_C: Sequence[int]) -> list[int]:
            return [sum(row_C[first : first + num_local]) for first in range(0, E, num_local)]

        def received(part_SC: list[list[int]]) -> list[int]:
            return by_owner(list(map(sum, zip(*part_SC))))

        limit = max(int(self.chunk_factor * sum(map(sum, counts_SC)) / S), 1)
        needed = math.ceil(max(received(counts_SC)) / limit)
        n = max(needed, self.min_chunks)
        parts = [counts_SC] if n == 1 else _cut(host_SC, n).tolist()
        own = slice(rank * num_local, (rank + 1) * num_local)
        return Plan([by_owner(part[rank]) for part in parts], [[sum(row[own]) for row in part] for part in parts],
                    max(max(received(part)) for part in parts), self.recompute or needed > 1)


def most_rows(assignments: int, num_experts: int, chunk_factor: float = CHUNK_FACTOR) -> int:
    """The bound of `ExpertParallel.last_rows`, from the assignments T k of a rank."""
    return int(chunk_factor * assignments) + num_experts


def buffers_bytes(rows: int, assignments: int, hidden: int, width: int, element_size: int) -> int:
    """The most that backward of a call holds if it computes again, from the rows of its largest chunk and the experts of this rank.

    Received, 6 D + 5 F elements a row: x and dy of this chunk and of the next, dx of this one and of the last, which is on its way back;
    gate | up, its gradient and the activation. (Forward: 4 D + 3 F.) This rank's own, 4 D an assignment: what it has sent of x and dy and
    got back of dx is never more than 3 D, and the gradient is D. The weights' gradients enter the sums that are given; temporary ones would
    be 4 bytes a weight. The gates' few bytes a row are not counted.
    """
    return element_size * (rows * (6 * hidden + 5 * width) + 4 * assignments * hidden)


def _on_host(counts_SC: Tensor, group: Group) -> Tensor:
    """The one place where the host waits for the device."""
    group.ledger.note("sync", "counts", "experts")
    return counts_SC.cpu()


def _cut(counts_SE: Tensor, num_chunks: int) -> Tensor:
    """Each count in n nearly equal parts (n, S, E); part i of c rows ends at c (i + 1) / n, rounded down."""
    if num_chunks == 1:
        return counts_SE[None]
    cuts = torch.arange(num_chunks + 1, device=counts_SE.device)[:, None, None]
    return (counts_SE * cuts // num_chunks).diff(dim=0)


def _in_order_sent(order_A: Tensor, parts_nSE: Tensor, rank: int, num_rows: int) -> Tensor:
    """Assignments (token * k + slot) by chunk, then by expert; `order` brings them together by expert, the skipped ones last."""
    if len(parts_nSE) == 1:
        return order_A[:num_rows]
    parts_nE = parts_nSE[:, rank]
    count_E = parts_nE.sum(0)
    starts_nE = count_E.cumsum(0) - count_E + parts_nE.cumsum(0) - parts_nE  # of each part, in `order`
    parts = parts_nE.flatten()
    shift = starts_nE.flatten() - (parts.cumsum(0) - parts)
    # output_size: without it the device would have to tell the host how long the result is.
    place = torch.arange(num_rows, device=parts.device) + shift.repeat_interleave(parts, output_size=num_rows)
    return order_A.index_select(0, place)


def _rows_of(source: Tensor, assignments: Tensor, slots: int) -> Tensor:
    """The source's rows for these assignments; it has one for each `slots` of them."""
    return source.index_select(0, assignments if slots == 1 else assignments // slots)


class _Experts(torch.autograd.Function):
    """Keeps the chunks' graphs, or nothing that was received (`Plan.recompute`). Inputs of the graphs are no leaves, which would hold on
    to their tensors, and whatever the experts' op saves in them, but for its small tables, is saved by this function instead: so it is
    seen, and let go, by whoever takes care of saved tensors (recomputation of a whole block does). The weights get their gradients outside
    the graphs, in sums over the chunks (and, where these are given, over micro-batches): the number of chunks does not show in bf16's
    rounding."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gate_Tk: Tensor, gate_up: Tensor, down: Tensor, gradient_sums: ExpertSums | None, sent_A: Tensor,
                parts_nSE: Tensor, group: Group, plan: Plan, ahead: list[Tensor], training: bool) -> Tensor:
        k = gate_Tk.shape[1]
        keep = training and any(ctx.needs_input_grad) and not plan.recompute
        graphs: list[_Graph] = []
        sums = gradient_sums
        if sums is None and training:
            sums = ExpertSums.temporary(gate_up, down, reference.wide(gate_up.dtype))

        def compute(chunk: int, x_RD: Tensor, gate_R1: Tensor) -> list[Tensor]:
            if not keep:
                return [_compute_chunk(group, plan, chunk, parts_nSE, x_RD, gate_R1, gate_up, down, sums)]
            graphs.append(_Graph(group, plan, chunk, parts_nSE, x_RD, gate_R1, gate_up, down, sums))
            return [graphs[-1].take_result()]

        sources = [("x", x_TD, k), ("gate", gate_Tk.reshape(-1, 1), 1)]
        (out_AD,) = _pipeline(group, plan, sent_A, sources, compute, ["y"], ahead)
        ctx.group, ctx.plan, ctx.graphs, ctx.sums = group, plan, graphs, sums
        again = (x_TD, gate_Tk, gate_up, down) if plan.recompute else (None, gate_Tk, gate_up, down)
        ctx.save_for_backward(*again, sent_A, parts_nSE, *(tensor for graph in graphs for tensor in graph.take_saved()))
        return _sum_slots(out_AD, k)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.graphs is None:
            raise RuntimeError("Trying to backward through the graph a second time: what the experts keep is freed by the first, whatever "
                               "retain_graph says; run the forward again")
        x_TD, gate_Tk, gate_up, down, sent_A, parts_nSE, *saved = ctx.saved_tensors
        group, plan, graphs = ctx.group, ctx.plan, ctx.graphs
        ctx.graphs = None
        k = gate_Tk.shape[1]
        for graph in graphs:
            saved = graph.give_saved(saved)

        def compute(chunk: int, dy_RD: Tensor, *again: Tensor) -> Sequence[Tensor]:
            if plan.recompute:
                x_RD, gate_R1 = again
                graph = _Graph(group, plan, chunk, parts_nSE, x_RD, gate_R1, gate_up, down, ctx.sums, hook=False)
            else:
                graph = graphs[chunk]
            graph.take_result()
            return graph.gradients(dy_RD)

        sources = [("dy", dout_TD, k)]
        if plan.recompute:
            sources += [("x", x_TD, k), ("gate", gate_Tk.reshape(-1, 1), 1)]
        dx_AD, dgate_A1 = _pipeline(group, plan, sent_A, sources, compute, ["dx", "dgate"], [])
        dweights = [gradient_sum.for_autograd(gate_up.dtype) for gradient_sum in ctx.sums]
        return _sum_slots(dx_AD, k), dgate_A1.view_as(gate_Tk), *dweights, *[None] * 7


def _pipeline(group: Group, plan: Plan, sent_A: Tensor, sources: Sequence[tuple[str, Tensor, int]],
              compute: Callable[..., Sequence[Tensor]], targets: Sequence[str], ahead: list[Tensor]) -> list[Tensor]:
    """For every chunk: rows of each source to the experts' ranks, compute(chunk, *received), its results back to rows of the targets.

    A source has a row for each `slots` assignments, a target one for each, zero where nothing went. ahead: of each source, rows that start
    with the first chunk's, where these have been gathered already; taken out of the list, so that they live no longer than others.
    """
    last, num_assignments = len(plan.send) - 1, len(sources[0][1]) * sources[0][2]
    sent = sent_A.split([sum(rows) for rows in plan.send])
    out: list[Tensor] = []

    def gather(chunk: int, source: Tensor, slots: int) -> Tensor:
        return ahead.pop(0)[: len(sent[chunk])] if ahead else _rows_of(source, sent[chunk], slots)

    def dispatch(chunk: int) -> list[Pending]:
        return [all_to_all(gather(chunk, source, slots), plan.send[chunk], plan.receive[chunk], group, f"{name} {chunk}")
                for name, source, slots in sources]

    def collect(chunk: int, returning: Sequence[Pending]) -> None:
        for pending, target in zip(returning, out, strict=True):
            target.index_copy_(0, sent[chunk], pending.wait())

    arriving, returning = dispatch(0), list[Pending]()
    for chunk in range(last + 1):
        received = [pending.wait() for pending in arriving]
        arriving = dispatch(chunk + 1) if chunk < last else []
        results = compute(chunk, *received)
        leaving = [all_to_all(rows, plan.receive[chunk], plan.send[chunk], group, f"{name} {chunk}")
                   for rows, name in zip(results, targets, strict=True)]
        if chunk:
            collect(chunk - 1, returning)
        else:
            out = [rows.new_zeros(num_assignments, rows.shape[1]) for rows in results]  # while the results travel
        returning = leaving
    collect(last, returning)
    return out


def _compute_chunk(group: Group, plan: Plan, chunk: int, parts_nSE: Tensor, x_RD: Tensor, gate_R1: Tensor, gate_up: Tensor,
                   down: Tensor, sums: ExpertSums | None) -> Tensor:
    """Received rows lie by source, then by expert; the op takes them by expert and leaves its results where the rows were."""
    group.ledger.note("compute", "experts", str(chunk))
    num_local = len(gate_up)
    parts_SE = parts_nSE[chunk, :, group.rank * num_local : (group.rank + 1) * num_local]
    expert_R = torch.repeat_interleave(parts_SE.flatten(), output_size=len(x_RD)) % num_local  # from the segment: source * experts + expert
    order_R, sizes_E = ops().sort_by_expert(expert_R[:, None], num_local)
    return ops().experts(x_RD, sizes_E, gate_up, down, order_R, gate_R1, sums)


class _Graph:
    """One chunk's experts with what autograd keeps of them: the tensors (apart, until backward gives them back) and the edges."""

    def __init__(self, group: Group, plan: Plan, chunk: int, parts_nSE: Tensor, x_RD: Tensor, gate_R1: Tensor, gate_up: Tensor,
                 down: Tensor, sums: ExpertSums | None, hook: bool = True) -> None:
        self._saved: list[Tensor] = []
        with torch.enable_grad(), saved_tensors_hooks(self._save, self._saved_tensor) if hook else nullcontext():
            entered = _Entry.apply(torch.empty(0, requires_grad=True), x_RD, gate_R1)
            self._inputs = [get_gradient_edge(tensor) for tensor in entered]
            result = _compute_chunk(group, plan, chunk, parts_nSE, entered[0], entered[1], gate_up.detach(), down.detach(), sums)
        self._result: Tensor | None = result.detach()
        self._output: GradientEdge | None = get_gradient_edge(result)

    def take_result(self) -> Any:
        result, self._result = self._result, None
        return result

    def take_saved(self) -> list[Tensor]:
        self._num_saved, saved, self._saved = len(self._saved), self._saved, []
        return saved

    def give_saved(self, saved: list[Tensor]) -> list[Tensor]:
        """Takes its own back from the front; returns the rest."""
        self._saved = saved[: self._num_saved]
        return saved[self._num_saved :]

    def gradients(self, dy_RD: Tensor) -> tuple[Tensor, ...]:
        """Of x and gate. Once: the graph and its tensors are freed."""
        assert self._output is not None
        gradients = torch.autograd.grad([self._output], self._inputs, [dy_RD])
        self._output, self._saved = None, []
        return gradients

    def _save(self, tensor: Tensor) -> int:
        self._saved.append(tensor.detach())
        return len(self._saved) - 1

    def _saved_tensor(self, index: int) -> Tensor:
        return self._saved[index]


class _Entry(torch.autograd.Function):
    """The root of a chunk's graph. A leaf would do, but its node holds the tensor as long as the graph lives."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise AssertionError("gradients are taken at this node, not below it")


def _sum_slots(rows_AD: Tensor, slots: int) -> Tensor:
    return rows_AD if slots == 1 else rows_AD.view(-1, slots, rows_AD.shape[1]).sum(1)
