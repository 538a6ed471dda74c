"""Where the model meets the mesh: a rank's pieces of the parameters, and what stands in the model's seams.

The only file that knows both sides. Every seam gets its parallel object whatever the sizes: over a group of one each computes what the
local default does. Three skip what would be pure cost there: experts (no counts to the host), context (one chunk), group_mean (the
op's own). The last two are ZeRO-1's; with DeepSpeed autograd has all gradients.

    seam                                   object                                 over
    attention.project, attention.o         column / row parallel + sequence       tp
    attention.group_mean, delayed_rows     KV replicas, the value rows held here  tp
    attention.context                      zig-zag context parallelism            cp
    moe.dispatcher                         uneven all-to-all                      ep
    embedding.lookup, .cross_entropy       vocabulary parallel                    tp
    embedding.gradient_sum                 ZeRO-1's bucket
    moe.experts.gradient_sums              ZeRO-1's buckets
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zaya.config import ModelConfig, Recipe
from zaya.kernels.gradient_sum import ExpertSums
from zaya.model.layers import Embedding
from zaya.model.transformer import Zaya
from zaya.parallel import tensor
from zaya.parallel.account import BYTES
from zaya.parallel.context import ContextParallel
from zaya.parallel.deepspeed_engine import DeepSpeedEngine
from zaya.parallel.expert import ExpertParallel, buffers_bytes, most_rows
from zaya.parallel.mesh import Mesh
from zaya.parallel.zero1 import Zero1
from zaya.plan import ParameterPlan
from zaya.shard import Box


def build_model(config: ModelConfig, dtype: torch.dtype, recompute: str, mesh: Mesh, table: Mapping[str, ParameterPlan]) -> Zaya:
    """The model with this rank's pieces on its device, uninitialised, and its seams filled (makes groups: all ranks call it together)."""
    with torch.device("meta"):
        model = Zaya(config, dtype, recompute)
    for name, (_, sizes) in pieces(mesh, table).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(sizes, dtype=dtype, device=mesh.device)))
    for block in model.blocks:
        router = block.moe.router
        router.balance_bias = torch.empty_like(router.balance_bias, device=mesh.device)
    _fill_seams(model, config, mesh, table, recompute)
    return model


def pieces(mesh: Mesh, table: Mapping[str, ParameterPlan]) -> dict[str, Box]:
    """The box of every parameter that this rank's model holds."""
    return {name: mesh.layout.piece(row.placement, row.shape, mesh.rank) for name, row in table.items()}


def token_index(mesh: Mesh, seq_len: int) -> Tensor:
    """(T,) int64: which tokens of each row this rank is given; equal on the ranks of a tp group, which cut them once more."""
    return ContextParallel(mesh.cp).index(seq_len)


def _fill_seams(model: Zaya, config: ModelConfig, mesh: Mesh, table: Mapping[str, ParameterPlan], recompute: str) -> None:
    kv_replicas = mesh.kv_replicas(config.num_kv_heads)
    heads_of_group = config.num_heads // config.num_kv_heads
    context, dispatcher = ContextParallel(mesh.cp), ExpertParallel(mesh.ep, recompute=recompute == "selective")
    project, output, group_mean = (tensor.column_parallel(mesh.tp), tensor.row_parallel(mesh.tp),
                                   tensor.group_mean(kv_replicas, heads_of_group))
    for index, block in enumerate(model.blocks):
        row = table[f"blocks.{index}.attention.v.weight"]
        (start, *_), (size, *_) = mesh.layout.piece(row.placement, row.shape, mesh.rank)
        attention = block.attention
        attention.project, attention.o.apply_weight = project, output
        attention.group_mean, attention.context = group_mean, context
        attention.delayed_rows = tensor.delayed_rows(row.shape[0], start, start + size)
        block.moe.dispatcher = dispatcher
    model.embedding.lookup = tensor.vocabulary_lookup(mesh.tp)
    model.embedding.cross_entropy = tensor.vocabulary_cross_entropy(mesh.tp)


def describe(recipe: Recipe, mesh: Mesh) -> list[str]:
    """What a run says at its start about its layout, beside the mesh: groups of ranks, and how much the experts take at once."""
    lines = mesh.table().splitlines()[1:]
    if mesh.ep.size > 1:
        model = recipe.model
        tokens = recipe.micro_batch_rows(mesh.dp.size) * recipe.train.seq_len // (mesh.cp.size * mesh.tp.size)
        rows = most_rows(tokens, model.num_experts)
        held = buffers_bytes(rows, tokens, model.hidden_size, model.moe_intermediate_size, BYTES[recipe.train.dtype])
        lines.append(f"  experts take at most {rows:,} rows at once, whatever the router does: {held / 2**20:,.0f} MiB of buffers")
    return lines


def build_optimizer(model: Zaya, recipe: Recipe, mesh: Mesh, table: Mapping[str, ParameterPlan]) -> Zero1 | DeepSpeedEngine:
    """What holds the state of the model's parameters and moves them (all ranks call it together); fills the seams that belong to it.
    ValueError: DeepSpeed is not there."""
    reduce_dtype = torch.bfloat16 if recipe.parallel.grad_dtype == "bf16" else None
    if recipe.parallel.engine == "zaya":
        zero1 = Zero1({name: model.get_parameter(name) for name in table}, table, recipe.optim, mesh, reduce_dtype=reduce_dtype)
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()  # the parameters lie in the buckets now; what build_model allocated for them, as much again, is free
        install_waits(model, zero1)
        model.embedding.gradient_sum = zero1.gradient_sum("embedding.weight")
        for index, block in enumerate(model.blocks):
            gate_up, down = (zero1.gradient_sum(f"blocks.{index}.moe.experts.{name}") for name in ("gate_up", "down"))
            block.moe.experts.gradient_sums = ExpertSums(gate_up, down)
        return zero1
    head = _Head(model.embedding)
    model.embedding.add_module("head", head)
    model.embedding.cross_entropy = lambda hidden_BTD, _, labels_BT, gradient_sum: head(hidden_BTD, labels_BT)
    return DeepSpeedEngine(model, table, recipe.optim, mesh, stage=recipe.parallel.zero_stage, offload=recipe.parallel.offload,
                           micro_batches=recipe.micro_batches(mesh.dp.size), reduce_dtype=reduce_dtype)


class _Head(nn.Module):
    """The loss as a module that has the embedding's weight: DeepSpeed's stage 3 gathers what a module has before it runs."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.weight, self.cross_entropy = embedding.weight, embedding.cross_entropy

    def forward(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        return self.cross_entropy(hidden_BTD, self.weight, labels_BT, None)


def install_waits(model: Zaya, optimizer: Zero1) -> None:
    """Each block's forward waits for the all-gather of what it reads, and no earlier: updates overlap with the blocks before."""
    norms = [*(f"blocks.{index}.attention_norm." for index in range(len(model.blocks))), "final_norm."]
    names = [name for name, _ in model.named_parameters()]

    def waits(module: nn.Module, *prefixes: str) -> None:
        needed = [name for name in names if name.startswith(prefixes)]
        module.register_forward_pre_hook(lambda *_: optimizer.wait(needed))

    waits(model.embedding, "embedding.", norms[0])
    for index, block in enumerate(model.blocks):
        waits(block, f"blocks.{index}.", norms[index + 1])
