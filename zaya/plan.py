"""THE table: how every parameter is shaped, initialised, sharded and optimized. One row per kind of parameter.

Initialisation, the optimizers, sharding, gradient sync, checkpoints and export read it. None keeps a list of names of its own. Knows
ModelConfig and the standard library: no torch, no ranks.

Letters: D hidden, H head dim, N query heads, G KV heads, E experts, C router classes, F expert width, R router width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from zaya.config import ModelConfig
from zaya.shard import Replicate, Shard


@dataclass(frozen=True)
class Muon:
    """Orthogonalised. Each trailing 2-D matrix is cut into `blocks` equal groups of rows, and each is a matrix of its own."""

    blocks: int = 1


@dataclass(frozen=True)
class AdamW:
    """Element-wise."""


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from N(0, std^2) by (seed, parameter name)."""

    std: float


@dataclass(frozen=True)
class Fill:
    """Initial values all equal."""

    value: float


@dataclass(frozen=True)
class ParameterPlan:
    """One row for one parameter. `shape` is the logical (unsharded) shape; `decay`: decoupled weight decay applies."""

    name: str
    shape: tuple[int, ...]
    placement: Shard | Replicate
    optimizer: Muon | AdamW
    decay: bool
    init: Normal | Fill

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def plan(model: ModelConfig) -> dict[str, ParameterPlan]:
    """Every parameter of the model by name, in the order of the forward pass."""
    rows = [*_embedding(model)]
    for block in range(model.num_layers):
        rows += [*_block(model, f"blocks.{block}.", first=block == 0)]
    rows.append(_vector("final_norm.weight", model.hidden_size, 1.0))
    table = {row.name: row for row in rows}
    assert len(table) == len(rows), "a parameter has two rows"
    return table


def _embedding(m: ModelConfig) -> Iterator[ParameterPlan]:
    # The tied embedding is also the head: one row.
    yield ParameterPlan("embedding.weight", (m.vocab_size, m.hidden_size), Shard(0, "tp", m.vocab_size), AdamW(), True, Normal(m.init_std))
    yield _vector("embedding.scale", m.hidden_size, 1.0)
    yield _vector("embedding.bias", m.hidden_size, 0.0)


def _block(m: ModelConfig, prefix: str, *, first: bool) -> Iterator[ParameterPlan]:
    yield _vector(f"{prefix}attention_norm.weight", m.hidden_size, 1.0)
    yield from _attention(m, f"{prefix}attention.")
    yield from _residual(m, f"{prefix}attention_residual.")
    yield _vector(f"{prefix}moe_norm.weight", m.hidden_size, 1.0)
    yield from _router(m, f"{prefix}moe.router.", first=first)
    yield from _experts(m, f"{prefix}moe.experts.")
    yield from _residual(m, f"{prefix}moe_residual.")


def _attention(m: ModelConfig, p: str) -> Iterator[ParameterPlan]:
    D, H, N, G = m.hidden_size, m.head_dim, m.num_heads, m.num_kv_heads
    q_heads, kv_heads = Shard(0, "tp", N), Shard(0, "tp", G)
    yield _matrix(f"{p}q.weight", (N * H, D), q_heads, m.init_std)
    yield _matrix(f"{p}k.weight", (G * H, D), kv_heads, m.init_std)
    # One value matrix: the first half of its rows reads the current token, the second half the previous one. Two Muon blocks.
    yield _matrix(f"{p}v.weight", (G * H, D), kv_heads, m.init_std, blocks=2)
    # q and k convolutions are stored apart, so that their channels shard with their heads. std: torch's Conv1d default, 1 / sqrt(3 fan-in).
    for letter, heads, shard in (("q", N, q_heads), ("k", G, kv_heads)):
        yield ParameterPlan(f"{p}{letter}_depthwise.weight", (heads * H, 2), shard, AdamW(), False, Normal((3 * 2) ** -0.5))
        yield ParameterPlan(f"{p}{letter}_depthwise.bias", (heads * H,), shard, AdamW(), False, Fill(0.0))
        yield ParameterPlan(f"{p}{letter}_grouped.weight", (heads * H, H, 2), shard, AdamW(), False, Normal((3 * 2 * H) ** -0.5))
        yield ParameterPlan(f"{p}{letter}_grouped.bias", (heads * H,), shard, AdamW(), False, Fill(0.0))
    yield ParameterPlan(f"{p}temperature", (G,), kv_heads, AdamW(), False, Fill(m.temperature_init))
    yield _matrix(f"{p}o.weight", (D, N * H), Shard(1, "tp", N), _output_std(m))


def _router(m: ModelConfig, p: str, *, first: bool) -> Iterator[ParameterPlan]:
    D, R, C = m.hidden_size, m.router_hidden_size, m.num_router_classes
    yield _matrix(f"{p}down.weight", (R, D), Replicate(), m.router_init_std)
    yield _vector(f"{p}down.bias", R, 0.0)
    if not first:  # block 0 has no router state to average with
        yield _vector(f"{p}depth_scale", R, 1.0)
    yield _vector(f"{p}norm.weight", R, 1.0)
    for layer in ("fc1", "fc2"):
        yield _matrix(f"{p}{layer}.weight", (R, R), Replicate(), m.router_init_std)
        yield _vector(f"{p}{layer}.bias", R, 0.0)
    yield _matrix(f"{p}out.weight", (C, R), Replicate(), m.router_init_std)


def _experts(m: ModelConfig, p: str) -> Iterator[ParameterPlan]:
    D, E, F = m.hidden_size, m.num_experts, m.moe_intermediate_size
    experts = Shard(0, "ep", E)
    yield _matrix(f"{p}gate_up", (E, 2 * F, D), experts, m.init_std, blocks=2)  # gate and up: two Muon blocks per expert
    yield _matrix(f"{p}down", (E, D, F), experts, _output_std(m))


def _residual(m: ModelConfig, p: str) -> Iterator[ParameterPlan]:
    for branch in ("branch", "stream"):
        yield _vector(f"{p}{branch}_scale", m.hidden_size, 1.0)
        yield _vector(f"{p}{branch}_bias", m.hidden_size, 0.0)


def _matrix(name: str, shape: tuple[int, ...], placement: Shard | Replicate, std: float, blocks: int = 1) -> ParameterPlan:
    return ParameterPlan(name, shape, placement, Muon(blocks), True, Normal(std))


def _vector(name: str, length: int, value: float) -> ParameterPlan:
    return ParameterPlan(name, (length,), Replicate(), AdamW(), False, Fill(value))


def _output_std(m: ModelConfig) -> float:
    """Projections into the stream start smaller, so that 2 * num_layers of them add up to the stream's own scale."""
    return m.init_std / math.sqrt(2 * m.num_layers)
