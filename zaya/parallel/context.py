"""Context parallelism: the seam `Attention.context` where a row's tokens lie on several ranks.

Who owns what. A row is cut into 2 * cp equal chunks; rank r holds chunk r and chunk 2 * cp - 1 - r, so that each rank has as many (query,
key) pairs of causal attention as any other. Queries, outputs and all that is kept for backward are a rank's own.

Who sends what, and when it is waited for, in order, on every rank of the group:
  1. `halos`: the last tokens of chunk c go to the owner of chunk c + 1, one message per neighbour for q~, k~ and the delayed values
     together; waited for at once, for the convolutions start with them. Backward: their gradients, one chunk the other way.
  2. `begin`: K | V of all ranks, in two all-gathers (all first chunks, all second ones), launched from inside the op cca as soon as they
     exist; query heads are computed while they run; `attend` waits.
  3. Backward: K | V once more (nobody keeps them in between), then dK | dV of all tokens in one reduce-scatter; both waited for at once.

Memory. From `begin` to the end of attention a block has K and V of the whole row (and a quarter of them again while second chunks are
put in order); backward too, and their gradients. In between the storage of K and V is empty: the op's saved tensors keep their shapes, and
`_GatherAgain`, the node before the op's in backward, fills it. Where forward itself runs in backward (recomputation), it is not emptied.

Letters: B batch, T tokens of a row here, S of the whole row, N query heads, G KV heads, H head dim, C channels, K chunks here, n tokens of
a halo, X numbers of a message.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zaya.kernels.backend import ops
from zaya.kernels.reference import no_halos
from zaya.parallel.collectives import Group, Pending, all_gather, reduce_scatter, send_receive

HALO = 2  # tokens: what the two convolutions of width 2 see before a chunk; a shorter chunk could not give them to the next one


class ContextParallel:
    """`Attention.context` for rows that lie on the ranks of `cp`. A group of one keeps a row in one chunk and sends nothing."""

    def __init__(self, cp: Group) -> None:
        self.cp = cp
        self.num_chunks = 2 * cp.size if cp.size > 1 else 1
        self.chunks = tuple(sorted({cp.rank, self.num_chunks - 1 - cp.rank}))
        self.begin = self._begin if cp.size > 1 else None
        self._under_way: _Gathering | None = None

    def index(self, row_tokens: int) -> Tensor:
        """(T,) int64: which tokens of a row this rank holds, in the order in which it holds them. ValueError: no equal chunks."""
        length = self._chunk_length(row_tokens, self.num_chunks)
        return torch.cat([torch.arange(chunk * length, (chunk + 1) * length) for chunk in self.chunks])

    def offsets(self, num_tokens: int) -> tuple[int, ...]:
        """Index in the row at which each chunk of the `num_tokens` on this rank starts. ValueError: no equal chunks."""
        length = self._chunk_length(num_tokens, len(self.chunks))
        return tuple(chunk * length for chunk in self.chunks)

    def halos(self, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """For each (x (B, T, C), n) the n <= 2 tokens before each chunk (B, K, n, C), zeros before the row. All x have one dtype."""
        K = len(self.chunks)
        self._chunk_length(parts[0][0].shape[1], K)
        if self.num_chunks == 1:
            return no_halos(parts)
        return list(_Halos.apply(self, *(x_BTC.unflatten(1, (K, -1))[:, :, -n:] for x_BTC, n in parts)))

    def attend(self, q_BTNH: Tensor, k_BTGH: Tensor, v_BTGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """Attention of this rank's queries over the whole row's keys and values; k and v are those that `begin` saw, if it was called."""
        if self.begin is None:
            return ops().attention(q_BTNH, k_BTGH, v_BTGH, first_key_BT, offsets)
        whole_S2BGH = self._arrived(k_BTGH, v_BTGH)
        k_BSGH, v_BSGH = _Gathered.apply(k_BTGH, v_BTGH, whole_S2BGH, self)
        out_BTNH = ops().attention(q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets)
        return _GatherAgain.apply(out_BTNH, k_BTGH, v_BTGH, whole_S2BGH, self)

    def _begin(self, k_BTGH: Tensor, v_BTGH: Tensor) -> None:
        B, T, G, H = k_BTGH.shape
        self._under_way = self._gather(k_BTGH, v_BTGH, k_BTGH.new_empty(self.cp.size * T, 2, B, G, H))

    def _arrived(self, k_BTGH: Tensor, v_BTGH: Tensor) -> Tensor:
        """K | V of the row, from the gather that `begin` launched for these very k and v, or from one launched now."""
        if self._under_way is None:
            self._begin(k_BTGH, v_BTGH)
        assert self._under_way is not None
        gathering, self._under_way = self._under_way, None
        assert gathering.k_BTGH.data_ptr() == k_BTGH.data_ptr(), "begun with other keys"
        assert gathering.v_BTGH.data_ptr() == v_BTGH.data_ptr(), "begun with other values"
        return gathering.wait()

    @torch.no_grad()  # the reference calls `begin` from recorded code; the gradient's way is `_Gathered`
    def _gather(self, k_BTGH: Tensor, v_BTGH: Tensor, whole_S2BGH: Tensor) -> _Gathering:
        local_T2BGH = torch.stack((k_BTGH.transpose(0, 1), v_BTGH.transpose(0, 1)), dim=1)
        first, second = (all_gather(part, self.cp, "kv", out=out) for part, out in zip(local_T2BGH.chunk(2), whole_S2BGH.chunk(2)))
        return _Gathering(k_BTGH, v_BTGH, whole_S2BGH, (first, second))

    def _scatter(self, dk_BSGH: Tensor, dv_BSGH: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over ranks of this rank's part of dK and dV, (B, T, G, H) each."""
        B, S, G, H = dk_BSGH.shape
        grads = dk_BSGH.new_empty(self.cp.size, 2, S // self.num_chunks, 2, B, G, H)
        for which, grad_BSGH in enumerate((dk_BSGH, dv_BSGH)):
            first, second = grad_BSGH.transpose(0, 1).unflatten(0, (2, self.cp.size, -1))
            grads[:, 0, :, which].copy_(first)
            grads[:, 1, :, which].index_copy_(0, _backwards(self.cp.size, second.device), second)
        local_2TBGH = reduce_scatter(grads, self.cp, "dkv").wait().flatten(0, 2).movedim(1, 0)
        dk_BTGH, dv_BTGH = local_2TBGH.transpose(1, 2).contiguous().unbind(0)
        return dk_BTGH, dv_BTGH

    def _exchange(self, parts: Sequence[Tensor], step: int) -> list[Tensor]:
        """Parts (B, K, n, C), of which chunk c's row goes to chunk c + step; what comes in, zeros where the row ends.

        Rank r talks to ranks r - 1 and r + 1, one message each way: no two messages between the same two ranks could be mistaken.
        """
        packed_KX = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        came_KX = torch.zeros_like(packed_KX)
        row = range(self.num_chunks)
        sends = [(packed_KX[slot], self._owner(chunk + step)) for slot, chunk in enumerate(self.chunks) if chunk + step in row]
        receives = [(came_KX[slot], self._owner(chunk - step)) for slot, chunk in enumerate(self.chunks) if chunk - step in row]
        for pending in send_receive(sends, receives, self.cp, "halo")[:1]:  # the first one's wait is for the whole exchange
            pending.wait()
        pieces = came_KX.split([part[:, 0].numel() for part in parts], dim=1)
        return [piece.view(part.transpose(0, 1).shape).transpose(0, 1).contiguous() for piece, part in zip(pieces, parts)]

    def _owner(self, chunk: int) -> int:
        return min(chunk, self.num_chunks - 1 - chunk)

    def _chunk_length(self, num_tokens: int, num_chunks: int) -> int:
        length = num_tokens // num_chunks
        if num_tokens % num_chunks or (length < HALO and self.num_chunks > 1):
            row, least = num_tokens * self.num_chunks // num_chunks, HALO * self.num_chunks
            raise ValueError(f"a row of {row} tokens is not {self.num_chunks} equal chunks of {HALO} tokens or more, which parallel.cp = "
                             f"{self.cp.size} needs; use train.seq_len = {max(least, -(-row // self.num_chunks) * self.num_chunks)}")
        return length


class _Gathering(NamedTuple):
    """K | V of the row on their way: all ranks' first chunks into the first half of `whole`, their second ones into the other."""

    k_BTGH: Tensor
    v_BTGH: Tensor
    whole_S2BGH: Tensor
    halves: tuple[Pending, Pending]

    def wait(self) -> Tensor:
        """`whole`, complete and in the order of the sequence: rank 0's second chunk is the last one, so they are turned round in place."""
        _, second = (pending.wait().unflatten(0, (-1, self.k_BTGH.shape[1] // 2)) for pending in self.halves)
        pairs = len(second) // 2
        early, late, turned = second[:pairs], second[len(second) - pairs :], _backwards(pairs, second.device)
        before = early.clone()
        torch.index_select(late, 0, turned, out=early)
        torch.index_select(before, 0, turned, out=late)
        return self.whole_S2BGH


@functools.cache
def _backwards(size: int, device: torch.device) -> Tensor:
    return torch.arange(size - 1, -1, -1, device=device)


def _in_backward() -> bool:
    """Whether this is forward computed again: autograd numbers the backward passes under way, as torch's own checkpoint asks."""
    return torch._C._current_graph_task_id() != -1


class _Halos(torch.autograd.Function):
    """Each chunk's last tokens -> what the previous chunk's are; backward goes one chunk the other way."""

    @staticmethod
    def forward(ctx: Any, context: ContextParallel, *tails: Tensor) -> tuple[Tensor, ...]:
        ctx.context = context
        return tuple(context._exchange(tails, +1))

    @staticmethod
    def backward(ctx: Any, *dhalos: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.context._exchange(dhalos, -1)


class _Gathered(torch.autograd.Function):
    """k and v of this rank -> those of the row, which lie in `whole` already; backward sums each rank's part over all of them."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, whole_S2BGH: Tensor, context: ContextParallel) -> tuple[Tensor, Tensor]:
        ctx.context = context
        k_BSGH, v_BSGH = (whole.transpose(0, 1) for whole in whole_S2BGH.unbind(1))
        return k_BSGH, v_BSGH

    @staticmethod
    def backward(ctx: Any, dk_BSGH: Tensor, dv_BSGH: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.context._scatter(dk_BSGH, dv_BSGH), None, None


class _GatherAgain(torch.autograd.Function):
    """The identity on attention's output: forward empties the storage of `whole`, backward fills it before the op's backward reads it.

    `whole` is among the saved tensors, so that under recomputation it is the one that the op saved too. Its storage is written behind
    autograd's back: a version counter would say that the op's saved tensors were modified, and their values are what they were.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, k: Tensor, v: Tensor, whole: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        ctx.save_for_backward(k, v, whole)
        if not _in_backward():
            whole.untyped_storage().resize_(0)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        k, v, whole = ctx.saved_tensors
        storage: torch.UntypedStorage = whole.untyped_storage()
        if not storage.nbytes():
            storage.resize_(whole.nbytes)
            ctx.context._gather(k, v, whole.new_empty(0).set_(storage, 0, whole.shape, whole.stride())).wait()
        return dout, None, None, None, None
