"""Context parallelism: a whole attention under cp = 2, 3, 4, 8 is one process' attention; what is sent, in which order, and what is kept.

All sizes share the pool of eight ranks: a group is its last cp ranks, so that a rank's place in the group is not its place in the world.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.pool import Pools
from zaya.config import ModelConfig
from zaya.kernels import backend, reference
from zaya.model.attention import Attention, LocalContext, Packing
from zaya.model.layers import recomputed
from zaya.parallel import context as context_module
from zaya.parallel.collectives import ALONE, Group, Ledger, Pending
from zaya.parallel.context import ContextParallel

WORLD = 8
N, G, H, D, ROWS = 4, 2, 8, 12, 3


@dataclass(frozen=True)
class Case:
    kind: str
    chunk: int
    """Tokens of a chunk."""
    window: int = 1
    recompute: str = "none"
    """As in zaya.model.transformer.Block."""


CASES = (Case("full", 2), Case("sliding", 3, window=2), Case("sliding", 5, window=13), Case("full", 9, recompute="selective"),
         Case("full", 2, recompute="full"))


def config(case: Case) -> ModelConfig:
    return ModelConfig(vocab_size=8, hidden_size=D, num_layers=1, num_heads=N, num_kv_heads=G, head_dim=H, num_experts=1,
                       moe_intermediate_size=1, router_hidden_size=1, attention_pattern=(case.kind,), sliding_window=case.window,
                       rope_theta=50.0, rope_theta_sliding=20.0)


def documents(case: Case, cp: int) -> Tensor:
    """Positions (3, S): documents of one token before, after and on both sides of chunk borders, and none; one document; short ones."""
    S = 2 * cp * case.chunk
    starts = torch.zeros(ROWS, S, dtype=torch.bool)
    starts[:, 0] = True
    for border in range(1, 2 * cp):
        for shift in ((-1, 0), (0, 1), (), (-1, 0, 1))[border % 4]:
            starts[0, border * case.chunk + shift] = True
    starts[2, torch.tensor([1, 3, 1, 2, 1, 4] * S).cumsum(0)[: S // 2].clamp(max=S - 1)] = True
    index = torch.arange(S)
    return index - torch.where(starts, index, 0).cummax(1).values


def made(case: Case, cp: int) -> tuple[Attention, Tensor, Tensor, Tensor]:
    """The module, its input (3, S, D), positions and the cotangent of its output, in fp64; the same ones in every process."""
    generator = torch.Generator().manual_seed(7)
    attention = Attention(config(case), case.kind, recompute=case.recompute == "selective").double()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * weight[0].numel() ** -0.5)
    positions = documents(case, cp)
    x, dout = (torch.randn(*positions.shape, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return attention, x, positions, dout


def run(case: Case, attention: Attention, x: Tensor, positions: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradients of the parameters."""
    x.requires_grad_()
    packing = Packing.of(positions, config(case), x.dtype, attention.context.offsets(positions.shape[1]))
    out = (recomputed(attention) if case.recompute == "full" else attention)(x, packing)
    out.backward(dout)
    assert x.grad is not None
    return out.detach(), x.grad, {name: weight.grad for name, weight in attention.named_parameters() if weight.grad is not None}


def group(rank: int, cp: int) -> Group | None:
    """The last cp ranks of the world; None for the others."""
    import torch.distributed as dist

    ranks = tuple(range(WORLD - cp, WORLD))
    handle = dist.new_group(list(ranks))
    return Group(handle, ranks.index(rank), cp, "cp", ranks, Ledger(events=[])) if rank in ranks else None


def on_ranks(rank: int, world_size: int, cp: int) -> tuple[list[Any], list[Any]] | None:
    """Per case: which tokens, output, gradients; and what was sent: events and bytes."""
    cp_group = group(rank, cp)
    if cp_group is None:
        return None
    results, traffic = [], []
    for case in CASES:
        attention, x, positions, dout = made(case, cp)
        context = ContextParallel(cp_group)
        attention.context = context
        index = context.index(x.shape[1])
        ledger, before = cp_group.ledger, cp_group.ledger.sent.copy()
        ledger.events = []
        with noting_the_query_path(ledger):
            results.append((index, *run(case, attention, *(full[:, index] for full in (x, positions, dout)))))
        traffic.append((ledger.events, {operation: sent - before[operation, name] for (operation, name), sent in ledger.sent.items()}))
    return results, traffic


@contextmanager
def noting_the_query_path(ledger: Ledger) -> Iterator[None]:
    """The ledger shows when query heads are computed."""
    original = reference._MixNormRotate.apply

    def apply(x: Tensor, *rest: Any) -> Tensor:
        if x.shape[-1] == N * H:
            ledger.note("note", "query path", "")
        return original(x, *rest)

    with mock.patch.object(reference._MixNormRotate, "apply", apply):
        yield


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-12 * want.abs().max())


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_a_row_on_several_ranks_is_the_row_on_one(pools: Pools, cp: int) -> None:
    answers = [answer for answer in pools[WORLD].run(on_ranks, cp) if answer is not None]
    assert len(answers) == cp
    for case, *parts in zip(CASES, *(results for results, _ in answers)):
        out, dx, grads = run(case, *made(case, cp))
        index = torch.cat([part[0] for part in parts])
        assert index.sort().values.equal(torch.arange(out.shape[1]))
        for got, want in ((torch.cat([part[i] for part in parts], 1), want[:, index]) for i, want in ((1, out), (2, dx))):
            assert close(got, want), case
        wrong = {name for name, grad in grads.items() if not close(torch.stack([part[3][name] for part in parts]).sum(0), grad)}
        assert len(grads) == 13 and not wrong, case
    for case, *traffic in zip(CASES, *(traffic for _, traffic in answers)):
        for rank, (events, sent) in enumerate(traffic):
            check_traffic(case, cp, rank, events, sent)


def check_traffic(case: Case, cp: int, rank: int, events: list[tuple[str, str, str]], sent: dict[str, int]) -> None:
    """One exchange of halos, one gather that the query path overlaps; then all of it backward, once."""
    received = [1, 2][0 < rank]  # chunk 0 has no predecessor, the last none that it precedes
    send_forward = [("launch", "send", "halo")] * received + [("wait", "send", "halo")]
    returned = 1 if rank == 0 else 2
    send_backward = [("launch", "send", "halo")] * returned + [("wait", "send", "halo")]
    launch, wait = [("launch", "all_gather", "kv")] * 2, [("wait", "all_gather", "kv")] * 2  # first chunks, second chunks
    forward = [*send_forward, *launch, ("note", "query path", ""), *wait]
    again = forward if case.recompute != "none" else [*launch, *wait]  # recomputed, K and V are still there
    assert events == [*forward, *again, ("launch", "reduce_scatter", "dkv"), ("wait", "reduce_scatter", "dkv"), *send_backward]
    # What leaves a rank, in fp64: the last rank's first chunk and rank 0's second have no other rank behind them, backward likewise.
    halo = ROWS * (2 * N * H + 2 * G * H + G * H // 2) * 8
    messages = (1 if rank in (0, cp - 1) else 2) * (2 if case.recompute == "none" else 3)
    kv = ROWS * 2 * case.chunk * 2 * G * H * 8
    assert sent == {"send": messages * halo, "all_gather": 2 * (cp - 1) * kv, "reduce_scatter": (cp - 1) * kv}


def other_ways(rank: int, world_size: int) -> bool | None:
    """Without a gradient; without `begin`; twice through one graph; after a forward pass that never came to attend."""
    cp_group = group(rank, 2)
    if cp_group is None:
        return None
    context = ContextParallel(cp_group)
    torch.manual_seed(rank)
    q, k, v = (torch.randn(2, 8, heads, H, dtype=torch.float64, requires_grad=True) for heads in (N, G, G))
    first_key, offsets = torch.zeros(2, 8, dtype=torch.int64), context.offsets(8)
    assert context.begin is not None
    context.begin(q, q)
    context.begin(k, v)
    out = context.attend(q, k, v, first_key, offsets)
    dout = torch.randn_like(out)
    once = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    twice = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        again = context.attend(q, k, v, first_key, offsets)
    context.begin(k, k)
    with pytest.raises(AssertionError, match="other values"):
        context.attend(q, k, v, first_key, offsets)
    return torch.equal(out, again) and all(map(torch.equal, once, twice))


def test_evaluation_and_second_backward(pools: Pools) -> None:
    assert pools[WORLD].run(other_ways) == [None] * 6 + [True] * 2


@pytest.mark.parametrize("case", CASES)
def test_a_group_of_one_is_the_local_context(case: Case) -> None:
    results = []
    ledger = Ledger(events=[])
    for context in (LocalContext(), ContextParallel(Group(None, 0, 1, ledger=ledger))):
        attention, *rest = made(case, 1)
        attention.context = context
        results.append(run(case, attention, *rest))
    (out, dx, grads), (out_1, dx_1, grads_1) = results
    assert out.equal(out_1) and dx.equal(dx_1) and all(grads[name].equal(grads_1[name]) for name in grads)
    assert not ledger.events and not ledger.sent and ContextParallel(ALONE).index(5).equal(torch.arange(5))


@pytest.mark.parametrize(("row", "message"), [
    (36, r"a row of 36 tokens is not 8 equal chunks of 2 tokens or more, which parallel.cp = 4 needs; use train.seq_len = 40"),
    (8, r"a row of 8 tokens is not 8 equal chunks of 2 .*train.seq_len = 16"),
])
def test_refuses_rows_that_make_no_chunks(row: int, message: str) -> None:
    context = ContextParallel(Group(None, 1, 4))
    x = torch.zeros(1, row // 4, 3)
    for call in (lambda: context.index(row), lambda: context.offsets(row // 4), lambda: context.halos(((x, 2),))):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------------ memory


class Bytes(TorchDispatchMode):
    """Bytes of all storages that ops made inside and that are alive: now, and at most after any op."""
    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._made[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.sizes()))
        return result

    def sizes(self) -> list[int]:
        alive = [storage() for storage in self._made.values()]
        return [storage.nbytes() for storage in alive if storage is not None]


def measured(monkeypatch: pytest.MonkeyPatch, cp: int, tokens: int, recompute: bool) -> tuple[list[int], int, int]:
    """Sizes of what the 8B's attention keeps for backward, input not counted, and the peaks of forward and backward, on rank 1 of cp.

    bf16, Triton's op, tensors without values ("meta"); collectives that only make their results.
    """
    from zaya.kernels.launch import MI300X, launching_through

    def pending(tensor: Tensor, cp_group: Group) -> Pending:
        return Pending(tensor, None, cp_group, "", "")

    monkeypatch.setattr(context_module, "all_gather", lambda x, g, _, out=None: pending(
        x.new_empty(g.size * x.shape[0], *x.shape[1:]) if out is None else out, g))
    monkeypatch.setattr(context_module, "reduce_scatter", lambda x, g, _: pending(x.new_empty(x.shape[0] // g.size, *x.shape[1:]), g))
    monkeypatch.setattr(context_module, "send_receive", lambda *_: [])
    monkeypatch.setattr(backend, "_chosen", backend._triton())
    shape = ModelConfig(vocab_size=8, hidden_size=2048, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=1,
                        moe_intermediate_size=1, router_hidden_size=1)
    with torch.device("meta"), launching_through(lambda *_: None, MI300X):
        attention = Attention(shape, "full", recompute=recompute).bfloat16()
        attention.context = ContextParallel(Group(None, min(1, cp - 1), cp))
        x = torch.empty(1, tokens // cp, 2048, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.empty(1, tokens // cp, dtype=torch.int64)
        packing = Packing.of(positions, shape, torch.bfloat16, attention.context.offsets(tokens // cp))
        attention(x, packing).sum().backward()  # constants of the process are made when first used
        x.grad = None
        attention.zero_grad()
        with Bytes() as counted:
            out = attention(x, packing)
            kept, forward_peak = counted.sizes(), counted.peak
            counted.peak = 0
            out.backward(torch.empty_like(out))
    return kept, forward_peak, counted.peak


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_at_131072_tokens_is_an_eighth_on_eight_ranks(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    tokens, cp = 131072, 8
    row, _, _ = measured(monkeypatch, 1, tokens, recompute)
    part, part_forward, part_backward = measured(monkeypatch, 1, tokens // cp, recompute)
    kept, forward, backward = measured(monkeypatch, cp, tokens, recompute)
    # Exactly what one process keeps of a row of an eighth, and the halos of two chunks; nothing has the size of the row.
    halos = 0 if recompute else 2 * (2 * 8 + 2 * 2 + 1) * 128 * 2
    assert sum(kept) == sum(part) + halos and max(kept) == max(part)
    # The rest of an eighth of the row: the folded convolutions of 10 heads, which have no tokens.
    folded = 0 if recompute else 2 * 10 * 3 * 128 * 128 * 2 + 10 * 128 * 4
    assert 8 * (sum(part) - folded) == sum(row) - folded
    # While a block runs, the row's K and V come on top of that; backward beside their gradients.
    gathered = tokens * 2 * 2 * 128 * 2
    assert forward <= part_forward + gathered and backward <= part_backward + gathered
