"""Tensor + sequence parallelism against one process in fp64: attention, embedding, loss; every gradient; bytes sent and their order.

Ranks return what they computed; the parent puts the parts together (tokens side by side, shards of parameters in their places, gradients
of replicas summed) and compares with the same module whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.dist.pool import Pools
from zaya.config import ModelConfig
from zaya.kernels import reference
from zaya.kernels.gradient_sum import GradientSum
from zaya.model.attention import Attention, Packing
from zaya.model.layers import Embedding
from zaya.parallel import tensor
from zaya.parallel.collectives import ALONE, Group, Ledger
from zaya.plan import plan

TIGHT = 1e-12
D, H, T, V = 24, 8, 24, 104
PREFIX = "blocks.0.attention."

Sent = dict[tuple[str, str], int]  # bytes by operation and group


def group_of(world_size: int, rank: int, size: int, name: str, ledger: Ledger) -> Group:
    """Neighbouring ranks, `size` at a time; those left over are in none."""
    if size == 1:
        return replace(ALONE, ledger=ledger)
    first = rank // size * size
    if size == world_size:
        handle = dist.group.WORLD
    else:
        groups = [list(range(start, start + size)) for start in range(0, world_size - size + 1, size)]
        handle, _ = dist.new_subgroups_by_enumeration(groups)
    return Group(handle, rank - first, size, name, tuple(range(first, first + size)), ledger)


def config(num_heads: int, num_kv_heads: int) -> ModelConfig:
    return ModelConfig(vocab_size=V, hidden_size=D, num_layers=1, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=H, num_experts=4,
                       moe_intermediate_size=24, router_hidden_size=16, attention_pattern=("sliding",), sliding_window=7)


def filled(module: nn.Module, seed: int = 5) -> nn.Module:
    """Every parameter away from its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.3, 0.5, generator)
    return module


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def part(x_BT: Tensor, rank: int, size: int) -> Tensor:
    """The rank's tokens."""
    return x_BT.unflatten(1, (size, -1))[:, rank].clone()


def documents(B: int) -> Tensor:
    """Positions of rows of documents with borders in and between the ranks' parts."""
    lengths = [[5, 3, 12, 4], [24], [1, 1, 13, 9]][:B]
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


# ---------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionCase:
    tp: int
    num_heads: int
    num_kv_heads: int
    B: int = 2
    recompute: bool = False

    def __str__(self) -> str:
        return f"tp{self.tp} N{self.num_heads} G{self.num_kv_heads} B{self.B}" + (" recompute" if self.recompute else "")


def attention_result(module: nn.Module, x_BtD: Tensor, dy_BtD: Tensor, B: int, m: ModelConfig) -> dict[str, Tensor]:
    packing = Packing.of(documents(B), m, torch.float64, (0,))
    x_BtD.requires_grad_()
    y_BtD = module(x_BtD, packing)
    y_BtD.backward(dy_BtD)
    assert x_BtD.grad is not None
    return {"y": y_BtD.detach(), "dx": x_BtD.grad, **{name: p.grad for name, p in module.named_parameters() if p.grad is not None}}


def whole_attention(case: AttentionCase) -> tuple[ModelConfig, Attention, Tensor, Tensor]:
    torch.set_default_dtype(torch.float64)
    try:
        m = config(case.num_heads, case.num_kv_heads)
        module = filled(Attention(m, "sliding", recompute=case.recompute))
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(module, Attention)
    return m, module, normal(case.B, T, D, seed=6), normal(case.B, T, D, seed=7)


def placements(m: ModelConfig) -> dict[str, Any]:
    return {name.removeprefix(PREFIX): row for name, row in plan(m).items() if name.startswith(PREFIX)}


def cut_attention(rank: int, world_size: int, case: AttentionCase) -> tuple[dict[str, Tensor], Sent, list[tuple[str, str, str]]] | None:
    """One rank's heads in the whole module's seams; None from ranks beyond tp."""
    m, module, x_BTD, dy_BTD = whole_attention(case)
    ledger = Ledger(events=[])
    tp = case.tp
    group = group_of(world_size, rank, tp, "tp", ledger)
    replicas = group_of(world_size, rank, max(tp // case.num_kv_heads, 1), "kv replicas", ledger)
    if rank >= tp:
        return None
    for name, row in placements(m).items():
        owner, _, leaf = name.rpartition(".")
        start, stop = row.placement.piece(rank, tp, row.shape[row.placement.dim])
        piece = module.get_parameter(name).detach().narrow(row.placement.dim, start, stop - start).clone()
        setattr(module.get_submodule(owner), leaf, nn.Parameter(piece))
    v_row = placements(m)["v.weight"]
    module.delayed_rows = tensor.delayed_rows(v_row.shape[0], *v_row.placement.piece(rank, tp, v_row.shape[0]))
    module.project = tensor.column_parallel(group)
    module.o.apply_weight = tensor.row_parallel(group)
    module.group_mean = tensor.group_mean(replicas, case.num_heads // case.num_kv_heads)
    found = attention_result(module, part(x_BTD, rank, tp), part(dy_BTD, rank, tp), case.B, m)
    assert ledger.events is not None
    return found, dict(ledger.sent), ledger.events


def run_cases(rank: int, world_size: int, cases: list[AttentionCase]) -> list[Any]:
    return [cut_attention(rank, world_size, case) for case in cases]


ATTENTION = {
    1: [AttentionCase(1, 8, 2), AttentionCase(1, 6, 3)],
    2: [AttentionCase(2, 8, 2), AttentionCase(2, 8, 1, B=3), AttentionCase(2, 6, 6, B=1), AttentionCase(2, 8, 1, recompute=True)],
    4: [AttentionCase(4, 8, 2), AttentionCase(4, 8, 1), AttentionCase(4, 8, 4, B=1), AttentionCase(3, 6, 3)],
    8: [AttentionCase(8, 8, 2), AttentionCase(8, 8, 1, B=1), AttentionCase(8, 8, 2, recompute=True)],
}


def merged(parts: list[dict[str, Tensor]], m: ModelConfig) -> dict[str, Tensor]:
    """The whole module's result: tokens side by side, pieces of gradients added where they belong."""
    found = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("y", "dx")}
    for name, row in placements(m).items():
        total = torch.zeros(row.shape, dtype=torch.float64)
        for rank, part_ in enumerate(parts):
            start, stop = row.placement.piece(rank, len(parts), row.shape[row.placement.dim])
            total.narrow(row.placement.dim, start, stop - start).add_(part_[name])
        found[name] = total
    return found


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], threshold: float = TIGHT) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert found[name].shape == want.shape and want.abs().max() > 0, name
        assert (found[name] - want).abs().max() < threshold * want.abs().max(), name


@pytest.mark.parametrize("world_size", ATTENTION)
def test_attention_equals_the_whole_module(pools: Pools, world_size: int) -> None:
    """tp = 3 of 4 ranks: with 3 KV heads the border of the delayed values lies inside the middle one's head."""
    cases = ATTENTION[world_size]
    answers = pools[world_size].run(run_cases, cases)
    for index, case in enumerate(cases):
        tp = case.tp
        m, module, x_BTD, dy_BTD = whole_attention(case)
        wanted = attention_result(module, x_BTD, dy_BTD, case.B, m)
        check(merged([answer[index][0] for answer in answers[:tp]], m), wanted)
        sent, events = answers[0][index][1:]
        replicas = max(tp // case.num_kv_heads, 1)
        part_bytes, mean_bytes = case.B * T // tp * D * 8, case.B * T * H * 8
        passes = 3 if case.recompute else 2  # the mean is in what recomputation computes again
        assert sent.get(("all_gather", "tp"), 0) == 3 * (tp - 1) * part_bytes  # x, x again, dy
        assert sent.get(("reduce_scatter", "tp"), 0) == 2 * (tp - 1) * part_bytes  # y, dx
        assert sent.get(("all_reduce", "kv replicas"), 0) == passes * 2 * (replicas - 1) * mean_bytes // replicas
        assert sum(sent.values()) == 5 * (tp - 1) * part_bytes + passes * 2 * (replicas - 1) * mean_bytes // replicas
        backward = [(what, operation) for what, operation, label in events if label.startswith("columns")][2:]
        assert backward == [("launch", "all_gather"), ("launch", "reduce_scatter"), ("wait", "all_gather"),
                            ("compute", "weight_gradients"), ("wait", "reduce_scatter")]


def test_delayed_rows_follow_the_border() -> None:
    assert tensor.delayed_rows(16, 0, 16) == (8, 16)
    assert [tensor.delayed_rows(16, s, s + 8) for s in (0, 8)] == [(8, 8), (0, 8)]
    assert [tensor.delayed_rows(24, s, s + 8) for s in (0, 8, 16)] == [(8, 8), (4, 8), (0, 8)]  # inside the middle head


@pytest.mark.parametrize("delayed", [(8, 8), (0, 8)], ids=["none", "all"])
def test_cca_takes_no_and_all_rows_delayed(delayed: tuple[int, int]) -> None:
    """What whole pieces of the value matrix become: the op's v is the plain one, or all of it a token late."""
    positions = documents(1)
    rope = reference.rope_table(positions, H, 100.0, torch.float64)
    convs = (normal(H, 2, seed=1), normal(H, seed=2), normal(H, H, 2, seed=3), normal(H, seed=4))
    q, k, v = (normal(1, T, H, seed=s).requires_grad_() for s in (5, 6, 7))
    two, one = torch.zeros(1, 1, 2, H, dtype=torch.float64), torch.zeros(1, 1, 1, delayed[1] - delayed[0], dtype=torch.float64)
    out = reference.cca(q, k, v, None, convs, convs, normal(1, seed=8), positions, rope, (two, two, one), delayed)[2]
    late = torch.cat((torch.zeros(1, 1, H), v.detach()[:, :-1]), 1) * (positions > 0)[..., None]
    assert torch.equal(out[:, :, 0], v if delayed == (8, 8) else late)
    out.sum().backward()
    assert v.grad is not None and v.grad.sum() == (T if delayed == (8, 8) else (positions > 0).sum()) * H


def linears(rank: int, world_size: int, B: int) -> tuple[dict[str, Tensor], Sent]:
    """The two maps by themselves, with a bias behind the second."""
    ledger = Ledger()
    group = group_of(world_size, rank, world_size, "tp", ledger)
    x = part(normal(B, T, D, seed=1), rank, world_size).requires_grad_()
    w1 = normal(32, D, seed=2).chunk(world_size)[rank].clone().requires_grad_()
    w2 = normal(16, D, seed=3).chunk(world_size)[rank].clone().requires_grad_()
    w3 = normal(D, 32, seed=4).chunk(world_size, dim=1)[rank].clone().requires_grad_()
    bias = normal(D, seed=5).requires_grad_()
    a, b = tensor.column_parallel(group)(x, (w1, w2))
    y = tensor.row_parallel(group)(a.sin(), w3, bias)
    loss = (y * part(normal(B, T, D, seed=6), rank, world_size)).sum() + (b * normal(B, T, 16, seed=7).chunk(world_size, -1)[rank]).sum()
    loss.backward()
    grads = {name: p.grad for name, p in zip(("dx", "w1", "w2", "w3", "bias"), (x, w1, w2, w3, bias)) if p.grad is not None}
    return {"y": y.detach(), **grads}, dict(ledger.sent)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_linear_maps_equal_whole_ones_and_send_what_the_formula_says(pools: Pools, tp: int, B: int) -> None:
    answers, (wanted, nothing) = pools[tp].run(linears, B), linears(0, 1, B)
    parts = [answer[0] for answer in answers]
    dims = {"y": 1, "dx": 1, "w1": 0, "w2": 0, "w3": 1}
    found = {name: torch.cat([p[name] for p in parts], dim) for name, dim in dims.items()}
    check(found | {"bias": torch.stack([p["bias"] for p in parts]).sum(0)}, wanted)
    each = (tp - 1) * B * T // tp * D * 8
    assert all(sent == {("all_gather", "tp"): 3 * each, ("reduce_scatter", "tp"): 2 * each} for _, sent in answers)
    assert nothing == {}


# ---------------------------------------------------------------------------------------------------------------- vocabulary


def token_rows(B: int, seed: int) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def vocabulary(rank: int, world_size: int, B: int, z_loss: float, block: int) -> tuple[dict[str, Tensor], Sent]:
    """Embed, a map of each token by itself, loss: the tied weight gets both gradients, here (but for one row) in a sum of the optimizer's."""
    reference.LOSS_BLOCK, block_before = block, reference.LOSS_BLOCK
    ledger = Ledger()
    group = group_of(world_size, rank, world_size, "tp", ledger)
    torch.set_default_dtype(torch.float64)
    module = filled(Embedding(V, D))
    torch.set_default_dtype(torch.float32)
    assert isinstance(module, Embedding)
    module.weight = nn.Parameter(module.weight.detach().chunk(world_size)[rank].clone())
    module.lookup, module.cross_entropy = tensor.vocabulary_lookup(group), tensor.vocabulary_cross_entropy(group, z_loss)
    module.gradient_sum = GradientSum(torch.full_like(module.weight.detach(), math.nan)) if B > 1 else None
    tokens_BT, labels_BT = token_rows(B, 1), token_rows(B, 2)
    labels_BT[:, ::5] = reference.IGNORE
    stream_BtD = module(tokens_BT)
    hidden_BtD = stream_BtD.sin()
    hidden_BtD.retain_grad()
    loss = module.loss(hidden_BtD, labels_BT)
    (0.7 * loss).backward()
    with torch.no_grad():
        assert torch.equal(module.loss(hidden_BtD, labels_BT), loss)
    reference.LOSS_BLOCK = block_before
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert hidden_BtD.grad is not None
    if module.gradient_sum is not None:
        assert grads["weight"].is_sparse and not grads["weight"]._nnz()
        grads["weight"] = module.gradient_sum.total
    return {"loss": loss.detach(), "stream": stream_BtD.detach(), "dhidden": hidden_BtD.grad, **grads}, dict(ledger.sent)


@pytest.mark.parametrize(("B", "z_loss"), [(1, 0.0), (2, 0.0), (3, 1e-2)])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_embedding_and_loss_equal_the_whole_vocabulary(pools: Pools, tp: int, B: int, z_loss: float) -> None:
    """104 words: 13 on each of 8 ranks. Blocks of 5 tokens, so that shards meet several times."""
    answers = pools[tp].run(vocabulary, B, z_loss, 5 * V // tp)
    wanted, parts = whole_vocabulary(B, z_loss), [answer[0] for answer in answers]
    assert all(torch.equal(p["loss"], parts[0]["loss"]) for p in parts)
    found = {name: torch.cat([p[name] for p in parts], dim) for name, dim in (("stream", 1), ("dhidden", 1), ("weight", 0))}
    found["loss"] = parts[0]["loss"]
    for name in ("scale", "bias"):  # replicated: each rank's own tokens
        found[name] = torch.stack([p[name] for p in parts]).sum(0)
    check(found, wanted)
    assert torch.equal(found["stream"], wanted["stream"])
    each, partials = (tp - 1) * B * T // tp * D * 8, (tp - 1) * B * T * 3 * 8
    # Of hidden and partials twice: training, evaluation.
    gathered, scattered = 3 * each + 2 * partials, 2 * each
    assert answers[0][1] == ({("all_gather", "tp"): gathered, ("reduce_scatter", "tp"): scattered} if tp > 1 else {})


def whole_vocabulary(B: int, z_loss: float) -> dict[str, Tensor]:
    """The same in torch's own words."""
    torch.set_default_dtype(torch.float64)
    module = filled(Embedding(V, D))
    torch.set_default_dtype(torch.float32)
    assert isinstance(module, Embedding)
    tokens_BT, labels_BT = token_rows(B, 1), token_rows(B, 2)
    labels_BT[:, ::5] = reference.IGNORE
    stream_BTD = (module.weight[tokens_BT] + module.bias) * module.scale
    hidden_BTD = stream_BTD.sin()
    hidden_BTD.retain_grad()
    logits = (hidden_BTD @ module.weight.T).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels_BT.flatten(), ignore_index=reference.IGNORE, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(-1)[labels_BT.flatten() != reference.IGNORE].square().sum()
    (0.7 * loss).backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert hidden_BTD.grad is not None
    return {"loss": loss.detach(), "stream": stream_BTD.detach(), "dhidden": hidden_BTD.grad, **grads}


def megatron(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Megatron-core's vocabulary-parallel embedding and loss (tokens first), and ours, on the same inputs."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core import tensor_parallel as theirs

    current_device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]  # where its mappings allocate
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    torch.set_default_dtype(torch.float64)
    try:
        setup = ModelParallelConfig(tensor_model_parallel_size=world_size, sequence_parallel=True, use_cpu_initialization=True,
                                    perform_initialization=False, params_dtype=torch.float64)
        embedding = theirs.VocabParallelEmbedding(V, D, init_method=nn.init.zeros_, reduce_scatter_embeddings=True, config=setup)
        weight_VD = normal(V, D, seed=8).chunk(world_size)[rank]
        embedding.weight.data.copy_(weight_VD)
        tokens_BT, labels_BT = token_rows(2, 1), token_rows(2, 2)
        labels_BT[:, ::5] = reference.IGNORE
        embedded_tBD = embedding(tokens_BT)
        hidden_TBD = theirs.gather_from_sequence_parallel_region(embedded_tBD.sin())
        losses_TB = theirs.vocab_parallel_cross_entropy(hidden_TBD @ embedding.weight.T, labels_BT.T.contiguous())
        their_loss = losses_TB[labels_BT.T != reference.IGNORE].sum()
        their_loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
        parallel_state.destroy_model_parallel()
        torch.cuda.current_device = current_device
    group = group_of(world_size, rank, world_size, "tp", Ledger())
    weight = nn.Parameter(weight_VD.clone())
    embedded_BtD = tensor.vocabulary_lookup(group)(tokens_BT, weight, None)
    loss = tensor.vocabulary_cross_entropy(group)(embedded_BtD.sin(), weight, labels_BT, None)
    loss.backward()
    assert weight.grad is not None and embedding.weight.grad is not None
    return ({"embedded": embedded_BtD.detach(), "loss": loss.detach(), "weight": weight.grad},
            {"embedded": embedded_tBD.detach().transpose(0, 1), "loss": their_loss.detach(), "weight": embedding.weight.grad})


def test_vocabulary_parts_equal_megatron_core(pools: Pools) -> None:
    for ours, theirs in pools[2].run(megatron):
        check(ours, theirs, 1e-6)  # its loss computes in fp32
