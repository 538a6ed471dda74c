"""The parameter table alone: the published sizes, one row per parameter, Muon's blocks, and how shards fall on ranks."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zaya.config import ModelConfig
from zaya.plan import AdamW, Fill, Muon, Normal, Replicate, Shard, plan

ZAYA1_8B = ModelConfig(
    vocab_size=262_272, hidden_size=2048, num_layers=40, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=16,
    moe_intermediate_size=2048, router_hidden_size=256)
ZAYA1_74B = ModelConfig(
    vocab_size=262_272, hidden_size=4096, num_layers=60, num_heads=16, num_kv_heads=2, head_dim=128, num_experts=24,
    moe_intermediate_size=4096, router_hidden_size=256, attention_pattern=("sliding", "full"), sliding_window=4096,
    rope_theta=5e6, rope_theta_sliding=1e4)
TINY = dataclasses.replace(ZAYA1_8B, vocab_size=64, hidden_size=16, num_layers=3, head_dim=8, num_experts=4, moe_intermediate_size=12,
                           router_hidden_size=6)


def count(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters: all, without the embedding matrix, and active per token without it (one expert of each block)."""
    rows = plan(model).values()
    total = sum(row.numel for row in rows)
    body = total - plan(model)["embedding.weight"].numel
    experts = sum(row.numel for row in rows if isinstance(row.placement, Shard) and row.placement.axis == "ep")
    return total, body, body - experts + experts // model.num_experts


@pytest.mark.parametrize(("model", "published"), [
    (ZAYA1_8B, (8_840_488_784, 8_303_355_728, 753_608_528)),
    (ZAYA1_74B, (74_793_953_144, 73_719_687_032, 4_262_012_792)),
], ids=["8B", "74B"])
def test_published_parameter_counts(model: ModelConfig, published: tuple[int, int, int]) -> None:
    assert count(model) == published


def test_names_are_the_keys_and_the_order_is_the_forward_pass() -> None:
    table = plan(TINY)
    assert all(name == row.name for name, row in table.items())
    names = list(table)
    assert names[0] == "embedding.weight" and names[-1] == "final_norm.weight"
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1, 2}
    assert not any("head" in name for name in names)  # tied: the embedding is the head


def test_only_the_first_block_has_no_depth_scale_and_skipping_costs_one_class() -> None:
    scales = [name for name in plan(TINY) if name.endswith("depth_scale")]
    assert scales == ["blocks.1.moe.router.depth_scale", "blocks.2.moe.router.depth_scale"]
    without = plan(dataclasses.replace(TINY, skip_expert=False))
    changed = {name: row.shape for name, row in plan(TINY).items() if without[name].shape != row.shape}
    assert changed == {f"blocks.{i}.moe.router.out.weight": (5, 6) for i in range(3)}


def test_muon_takes_matrices_and_its_blocks_divide_their_rows() -> None:
    for row in plan(TINY).values():
        if isinstance(row.optimizer, Muon):
            assert len(row.shape) >= 2 and row.shape[-2] % row.optimizer.blocks == 0, row.name
            assert row.decay and isinstance(row.init, Normal), row.name
        else:
            assert isinstance(row.optimizer, AdamW)
    blocks = {name: row.optimizer.blocks for name, row in plan(TINY).items() if isinstance(row.optimizer, Muon)}
    # value: current and previous; gate_up: gate and up, of every expert
    assert {name for name, number in blocks.items() if number == 2} == {
        f"blocks.{i}.{name}" for i in range(3) for name in ("attention.v.weight", "moe.experts.gate_up")}
    assert set(blocks.values()) == {1, 2}


def test_decay_is_for_matrices_and_the_embedding_only() -> None:
    table = plan(TINY)
    assert table["embedding.weight"].decay and isinstance(table["embedding.weight"].optimizer, AdamW)
    for name, row in table.items():
        assert row.decay == (isinstance(row.optimizer, Muon) or name == "embedding.weight"), name
        if isinstance(row.init, Fill) and name.endswith(("scale", "norm.weight")):
            assert row.init.value == 1.0, name


def test_output_projections_start_smaller() -> None:
    table = plan(TINY)
    for name in ("attention.o.weight", "moe.experts.down"):
        assert table[f"blocks.0.{name}"].init == Normal(0.02 / math.sqrt(2 * 3))
    assert table["blocks.0.attention.q.weight"].init == Normal(0.02)
    assert plan(dataclasses.replace(TINY, router_init_std=0.5))["blocks.0.moe.router.fc1.weight"].init == Normal(0.5)


def test_every_cut_dimension_is_made_of_equal_units() -> None:
    for model in (ZAYA1_8B, ZAYA1_74B, TINY):
        for row in plan(model).values():
            if isinstance(row.placement, Shard):
                assert row.shape[row.placement.dim] % row.placement.units == 0, row.name
            else:
                assert row.placement == Replicate(), row.name


def test_query_and_key_channels_shard_with_their_heads() -> None:
    for name, row in plan(TINY).items():
        part = name.removeprefix("blocks.0.attention.")
        if part != name:
            assert isinstance(row.placement, Shard)
            assert row.placement == Shard(1 if part == "o.weight" else 0, "tp", 8 if part[0] in "qo" else 2), name


def test_replicas_where_ranks_outnumber_heads() -> None:
    two_heads = Shard(0, "tp", 2)
    assert [two_heads.replicas(size) for size in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert [two_heads.piece(rank, 8, 256) for rank in range(8)] == [(0, 128)] * 4 + [(128, 256)] * 4
    assert [Shard(0, "ep", 8).piece(rank, 2, 8) for rank in range(2)] == [(0, 4), (4, 8)]
    with pytest.raises(ValueError, match="tp = 3 neither divides 2 units nor is a multiple"):
        two_heads.replicas(3)
    with pytest.raises(ValueError, match="ep = 6 neither divides 8"):
        Shard(0, "ep", 8).replicas(6)


@given(units=st.integers(1, 64), size=st.integers(1, 64), unit_length=st.integers(1, 16))
def test_pieces_tile_the_dimension_once_per_replica(units: int, size: int, unit_length: int) -> None:
    shard, length = Shard(0, "tp", units), units * unit_length
    if units % size and size % units:
        with pytest.raises(ValueError):
            shard.replicas(size)
        return
    pieces = [shard.piece(rank, size, length) for rank in range(size)]
    replicas = shard.replicas(size)
    distinct = pieces[::replicas]
    assert [piece for piece in distinct for _ in range(replicas)] == pieces  # neighbours hold the same
    assert [start for start, _ in distinct] + [length] == [0] + [stop for _, stop in distinct]  # no gap, no overlap
    assert all(start % unit_length == 0 for start, _ in pieces)  # never inside a unit
