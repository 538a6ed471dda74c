"""Tensor parallelism with sequence parallelism: what stands in the model's seams when heads and vocabulary are cut over ranks.

Who owns what: every rank of the tp group holds its heads' rows of q, k, v (columns of o) and its rows of the vocabulary, and of each row of
T tokens a contiguous part of t = T / tp: stream, norms, router and experts see (B, t, D). Attention and loss see all T tokens of its
heads and its words. Sent per rank, in units of (tp - 1) B t D elements:

    column_parallel           gathers x (1), multiplies by its rows             backward: gathers x again (1), reduce-scatters dx (1)
    row_parallel              multiplies by its columns, reduce-scatters y (1)  backward: gathers dy (1)
    vocabulary_lookup         looks its words up, reduce-scatters them (1)      backward: gathers dy (1)
    vocabulary_cross_entropy  gathers hidden (1), then 12 bytes a token         backward: reduce-scatters dhidden (1)
    group_mean                all-reduces (B, T, H) in fp32 where a KV head is on several ranks, and its gradient

When it is waited for: backward of the columns gathers x beside the product of dx, and its reduce-scatter runs beside the weight gradients.
x is gathered again because it would be the widest thing kept per block, and the whole sequence of it. Everything else is needed at once.
On a group of one all of it is the local product. Gradients of weights are those of this rank's heads or words and all T tokens: nothing is
left to sum over tp but what KV replicas share.

What ranks hand in lies rank by rank, (tp B, t, ...): products do not mind the order of tokens, so only narrow tensors (q, k, v, the heads'
outputs, token ids, labels) are brought from or into the order of rows, and with one row per batch nothing moves at all.

Letters: B batch, T tokens of a row, t = T / tp of a part, R = tp B parts, D hidden, C channels, N query heads, G KV groups, H head dim,
V rows of the vocabulary here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import GradientSum
from zaya.kernels.reference import Partials, lookup_gradient, wide
from zaya.parallel.collectives import Group, all_gather, all_reduce, reduce_scatter


def by_rank(x_BT: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (size * B, T / size, ...): every rank's part of the tokens, in rank order. A view where B or size is 1."""
    return x_BT.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 1)


def by_row(x_Rt: Tensor, size: int) -> Tensor:
    """The inverse of `by_rank`."""
    return x_Rt.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


def delayed_rows(logical_rows: int, start: int, stop: int) -> tuple[int, int]:
    """Which rows of the shard [start, stop) of the value matrix read the previous token: its second half, (n, n) where none of n does."""
    first = min(max(logical_rows // 2, start), stop)
    return first - start, stop - start


# ---------------------------------------------------------------------------------------------------------------- linear maps


def column_parallel(group: Group) -> Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]:
    """x (B, t, D), weights (C, D) of this rank -> each x @ W.T of all tokens (B, T, C)."""

    def project(x_BtD: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: tuple[Tensor, ...] = _Columns.apply(x_BtD, group, *weights)
        return outputs

    return project


class _Columns(torch.autograd.Function):
    """Saves this rank's x."""

    @staticmethod
    def forward(ctx: Any, x_BtD: Tensor, group: Group, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BtD, *weights)
        ctx.group = group
        x_RtD = all_gather(x_BtD, group, "columns: x").wait()
        return tuple(by_row(F.linear(x_RtD, weight), group.size) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *douts_BTC: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        x_BtD, *weights = ctx.saved_tensors
        x = all_gather(x_BtD, group, "columns: x again")
        douts = [by_rank(dout, group.size).flatten(0, 1) for dout in douts_BTC]
        dx = torch.mm(douts[0], weights[0])
        for dout, weight in zip(douts[1:], weights[1:]):
            dx.addmm_(dout, weight)
        dx_BtD = reduce_scatter(dx.unflatten(0, (-1, x_BtD.shape[1])), group, "columns: dx")
        x_rows = x.wait().flatten(0, 1)
        group.ledger.note("compute", "weight_gradients", "columns")
        dweights = [dout.t() @ x_rows for dout in douts]
        return dx_BtD.wait(), None, *dweights


def row_parallel(group: Group) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """x (B, T, C) of this rank's channels, weight (D, C) of the same -> the sum of x @ W.T over ranks, this rank's tokens (B, t, D)."""

    def apply_weight(x_BTC: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y_BtD: Tensor = _Rows.apply(x_BTC, weight, group)
        return y_BtD if bias is None else y_BtD + bias

    return apply_weight


class _Rows(torch.autograd.Function):
    """Saves x."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x_BTC, weight)
        ctx.group = group
        return reduce_scatter(F.linear(by_rank(x_BTC, group.size), weight), group, "rows: y").wait()

    @staticmethod
    def backward(ctx: Any, dy_BtD: Tensor) -> tuple[Tensor | None, ...]:
        group: Group = ctx.group
        x_BTC, weight = ctx.saved_tensors
        dy_RtD = all_gather(dy_BtD, group, "rows: dy").wait()
        dx_BTC = by_row(dy_RtD @ weight, group.size)
        return dx_BTC, dy_RtD.flatten(0, 1).t() @ by_rank(x_BTC, group.size).flatten(0, 1), None


# ---------------------------------------------------------------------------------------------------------------- KV groups


def group_mean(replicas: Group, heads_per_group: int) -> Callable[[Tensor, int], Tensor | None]:
    """q (B, T, N, H), number of KV groups here -> the mean over all `heads_per_group` heads of each (B, T, G, H).

    replicas: the ranks that hold the same KV heads and the rest of their query heads. Alone, all heads of a group are here: None, for the
    op takes the mean itself.
    """

    def mean(q_BTNH: Tensor, num_groups: int) -> Tensor | None:
        if replicas.size == 1:
            return None
        q_mean_BTGH: Tensor = _GroupMean.apply(q_BTNH, num_groups, heads_per_group, replicas)
        return q_mean_BTGH

    return mean


class _GroupMean(torch.autograd.Function):
    """Each replica uses the mean for its own copy of the key, so the mean's gradient is the sum of theirs. Summed in fp32 (fp64)."""

    @staticmethod
    def forward(ctx: Any, q_BTNH: Tensor, num_groups: int, heads_per_group: int, replicas: Group) -> Tensor:
        ctx.heads_per_group, ctx.replicas, ctx.heads = heads_per_group, replicas, q_BTNH.shape[2] // num_groups
        sum_BTGH = q_BTNH.unflatten(2, (num_groups, -1)).sum(3, dtype=wide(q_BTNH.dtype))
        return all_reduce(sum_BTGH, replicas, "group mean").wait().div_(heads_per_group).to(q_BTNH.dtype)

    @staticmethod
    def backward(ctx: Any, dmean_BTGH: Tensor) -> tuple[Tensor | None, ...]:
        total_BTGH = dmean_BTGH.to(wide(dmean_BTGH.dtype), copy=True, memory_format=torch.contiguous_format)
        dq_BTGH = all_reduce(total_BTGH, ctx.replicas, "group mean gradient").wait().div_(ctx.heads_per_group).to(dmean_BTGH.dtype)
        return dq_BTGH.repeat_interleave(ctx.heads, 2), None, None, None


# ---------------------------------------------------------------------------------------------------------------- vocabulary


def vocabulary_lookup(group: Group) -> Callable[[Tensor, Tensor, GradientSum | None], Tensor]:
    """tokens (B, T), weight (V, D): the rank-th V words, weight's gradient sum -> this rank's tokens' embeddings (B, t, D)."""

    def lookup(tokens_BT: Tensor, weight_VD: Tensor, gradient_sum: GradientSum | None) -> Tensor:
        embedded_BtD: Tensor = _Lookup.apply(tokens_BT, weight_VD, gradient_sum, group)
        return embedded_BtD

    return lookup


class _Lookup(torch.autograd.Function):
    """Saves the token ids. Those of other ranks' words stand for words of ours, spread over all (one for all would make backward add them
    one after the other), and give and get zeros: every sum over ranks has one term that is not 0, so nothing is rounded."""

    @staticmethod
    def forward(ctx: Any, tokens_BT: Tensor, weight_VD: Tensor, gradient_sum: GradientSum | None, group: Group) -> Tensor:
        V = len(weight_VD)
        local_Rt = by_rank(tokens_BT, group.size) - group.rank * V
        elsewhere_Rt1 = ((local_Rt < 0) | (local_Rt >= V))[..., None]
        local_Rt.remainder_(V)
        ctx.save_for_backward(local_Rt, elsewhere_Rt1)
        ctx.group, ctx.V, ctx.gradient_sum = group, V, gradient_sum
        embedded_RtD = F.embedding(local_Rt, weight_VD).masked_fill_(elsewhere_Rt1, 0)
        return reduce_scatter(embedded_RtD, group, "lookup").wait()

    @staticmethod
    def backward(ctx: Any, dy_BtD: Tensor) -> tuple[Tensor | None, ...]:
        local_Rt, elsewhere_Rt1 = ctx.saved_tensors
        dy_RtD = all_gather(dy_BtD, ctx.group, "lookup: dy").wait().masked_fill(elsewhere_Rt1, 0)
        return None, lookup_gradient(local_Rt, dy_RtD, ctx.V, ctx.gradient_sum), None, None


def vocabulary_cross_entropy(group: Group, z_loss: float = 0.0) -> Callable[[Tensor, Tensor, Tensor, GradientSum | None], Tensor]:
    """hidden (B, t, D), weight (V, D): the rank-th V words, labels (B, T), weight's gradient sum -> the sum of the loss over all T tokens,
    the same bits on all ranks. Logits exist a block of tokens at a time, as in the op."""

    def cross_entropy(hidden_BtD: Tensor, weight_VD: Tensor, labels_BT: Tensor, gradient_sum: GradientSum | None) -> Tensor:
        hidden_RtD = _Gather.apply(hidden_BtD, group)
        loss: Tensor = ops().cross_entropy(hidden_RtD.flatten(0, 1), weight_VD, by_rank(labels_BT, group.size).flatten(), z_loss,
                                           vocab_start=group.rank * len(weight_VD), combine=functools.partial(_combine, group),
                                           gradient_sum=gradient_sum)
        return loss

    return cross_entropy


class _Gather(torch.autograd.Function):
    """Backward sums the shards' shares of the gradient: all ranks compute one and the same loss, of which each is the whole."""

    @staticmethod
    def forward(ctx: Any, hidden_BtD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather(hidden_BtD, group, "loss: hidden").wait()

    @staticmethod
    def backward(ctx: Any, dhidden_RtD: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(dhidden_RtD, ctx.group, "loss: dhidden").wait(), None


def _combine(group: Group, parts: Partials) -> Partials:
    """The partials of all shards from each one's: largest logit, sum of exp(logit - largest), label's logit.

    One gather of the three, not an all-reduce of the largest and then of the sums: one round trip for two, and every rank adds the same
    numbers in the same order, so that all have the same bits. 12 (tp - 1) bytes a token, beside 2 D (tp - 1) / tp of hidden.
    """
    gathered = all_gather(torch.stack(parts)[None], group, "loss: partials").wait()
    largest, total, target = gathered.unbind(1)
    top = largest.amax(0)
    return top, (total * (largest - top).exp()).sum(0), target.sum(0)
