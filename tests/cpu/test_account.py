"""The published models on 1,024 GPUs, in one process: every element has one owner, shards and owners are level, memory fits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from zaya.config import ModelConfig, Recipe, load_recipe
from zaya.parallel.account import activation_bytes, held_bytes, zero1_traffic
from zaya.parallel.partition import ALIGNMENT_ELEMENTS, make_buckets, muon_rounds, newton_schulz_work
from zaya.plan import plan
from zaya.shard import Layout, flat_boxes, shifted

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
SCALE = [("zaya1_8b_pretrain1", Layout(1024)), ("zaya1_8b_pretrain1", Layout(1024, ep=8)), ("zaya1_8b_pretrain1", Layout(1024, cp=8, ep=8)),
         ("zaya1_74b_pretrain", Layout(1024, tp=2, ep=8)), ("zaya1_74b_pretrain", Layout(1024, tp=4, cp=2, ep=24 // 3, zero_size=64))]
NAMES = [f"{name}-{layout.as_dict()}" for name, layout in SCALE]


def recipe(name: str) -> Recipe:
    return load_recipe(ROOT / f"recipes/{name}.toml")


@pytest.mark.parametrize(("name", "layout"), SCALE, ids=NAMES)
def test_every_element_has_one_owner_and_shards_are_level(name: str, layout: Layout) -> None:
    table = plan(recipe(name).model)
    buckets = make_buckets(table.values(), layout, muon=True)
    assert Counter(n for bucket in buckets for n in bucket.spans) == Counter(table.keys())
    owned = [0] * layout.world_size
    for bucket in buckets:
        assert not any(start % ALIGNMENT_ELEMENTS for start in (*(start for start, _ in bucket.spans.values()), bucket.shard_length))
        placement = bucket.rows[0].placement
        # Who owns which flat interval of which piece; with zero_size every block of holders owns everything once.
        intervals: dict[tuple[str, tuple[int, ...], int], list[tuple[int, int]]] = {}
        for rank in range(layout.world_size):
            shard, block = layout.shard(placement, rank), layout.block(placement, rank)
            for row in bucket.rows:
                start, stop = bucket.overlap(row.name, shard)
                if start < stop:
                    offsets, _ = layout.piece(row.placement, row.shape, rank)
                    intervals.setdefault((row.name, offsets, block), []).append((start, stop))
                    owned[rank] += stop - start
        for row in bucket.rows:
            pieces = {layout.piece(row.placement, row.shape, rank) for rank in range(min(layout.tp * layout.ep, layout.world_size))}
            assert sum(math.prod(sizes) for _, sizes in pieces) == math.prod(row.shape)
            for offsets, sizes in pieces:
                found = [key for key in intervals if key[:2] == (row.name, offsets)]
                assert len(found) == len({layout.block(placement, rank) for rank in layout.holders(placement, 0)})
                for key in found:
                    reached = 0
                    for start, stop in sorted(intervals[key]):
                        assert start == reached, f"{row.name}: element {reached} has no owner, or two"
                        reached = stop
                    assert reached == math.prod(sizes)
    mean = sum(owned) / len(owned)
    assert max(owned) <= 1.01 * mean, f"shards of {min(owned):,} to {max(owned):,} elements, mean {mean:,.0f}"


@pytest.mark.parametrize(("name", "layout"), SCALE, ids=NAMES)
def test_muon_owners_are_level_and_exchange_little(name: str, layout: Layout) -> None:
    table = plan(recipe(name).model)
    buckets = make_buckets(table.values(), layout, muon=True)
    by_kind: dict[tuple[str, int], list] = {}
    for indices, matrices in muon_rounds(buckets, layout, 0):
        by_kind.setdefault(layout.kind(buckets[indices[0]].rows[0].placement), []).extend(matrices)
    for kind, matrices in by_kind.items():
        placement = next(b.rows[0].placement for b in buckets if b.muon and layout.kind(b.rows[0].placement) == kind)
        places = len(layout.exchange_ranks(placement, 0))
        work = Counter({place: 0 for place in range(places)})
        for matrix in matrices:
            assert sum(part.numel for _, part in matrix.parts) == matrix.numel, matrix.name
            work[matrix.owner] += newton_schulz_work(matrix.shape)
        mean, largest = sum(work.values()) / places, max(newton_schulz_work(m.shape) for m in matrices)
        most = max(work.values())
        assert most <= max(1.1 * mean, math.ceil(mean / largest) * largest), f"{kind}: {most / mean:.2f} of the mean"
    if name.startswith("zaya1_8b") and layout.ep == 1:
        shard = sum(bucket.shard_length for bucket in buckets if bucket.muon)
        for rank in (0, 1, 511, 1023):
            out = back = 0
            for indices, matrices in muon_rounds(buckets, layout, rank):
                me = layout.exchange_ranks(buckets[indices[0]].rows[0].placement, rank).index(rank)
                out += sum(part.numel for m in matrices for place, part in m.parts if place == me != m.owner)
                back += sum(part.numel for m in matrices if m.owner == me for place, part in m.parts if place != me)
            assert max(out, back) <= 2 * shard, f"rank {rank} sends {out:,} and {back:,} elements, its shard has {shard:,}"


@pytest.mark.parametrize(("name", "layout"), SCALE, ids=NAMES)
def test_memory_fits_an_mi300x(name: str, layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe(name)
    table = plan(run.model)
    held = held_bytes(table, run, layout)
    row_tokens = 131_072 if layout.cp == 8 else run.train.seq_len
    tokens = row_tokens // layout.cp
    received = tokens if layout.ep > 1 else None
    held["activations"] = run.model.num_layers * activation_bytes(run.model, tokens, run.train.recompute, run.train.dtype, received)
    buckets = make_buckets(table.values(), layout, muon=True)
    traffic = zero1_traffic(buckets, muon_rounds(buckets, layout, 0), layout, 0, 2, 4)
    with capsys.disabled():
        print(f"\n{name} on {layout}")
        print(f"  memory, {sum(held.values()) / GIB:.1f} GiB: " + ", ".join(f"{what} {n / GIB:.1f}" for what, n in held.items()))
        for (operation, group), n in sorted(traffic.items()):
            print(f"  sends {n / 1e9:8.3f} GB per step: {operation} over {group}")
    assert sum(held.values()) < 192e9


def test_boxes_of_a_rank_rebuild_its_flat_shard() -> None:
    layout = Layout(8, tp=2, ep=4)
    for row in plan(recipe("quickstart").model).values():
        offsets, sizes = layout.piece(row.placement, row.shape, 5)
        numel = math.prod(sizes)
        boxes = [shifted(box, offsets) for box in flat_boxes(numel // 3, numel - 1, sizes)]
        assert sum(math.prod(box[1]) for box in boxes) == numel - 1 - numel // 3 and len(boxes) <= 2 * len(sizes) - 1


SAVED = """
import json, os, torch
from zaya.config import ModelConfig
from zaya.kernels import backend
from zaya.model.init import init_weights
from zaya.parallel import expert
from zaya.parallel.mesh import close_mesh, open_mesh
from zaya.parallel.parallelize import build_model, pieces
from zaya.plan import plan
from zaya.shard import Layout

RANKS = int(os.environ["WORLD_SIZE"])
mesh = open_mesh("cpu", Layout(RANKS, ep=RANKS))
received, compute_chunk = [], expert._compute_chunk

def counted(group, plan, chunk, parts, x_RD, *rest):
    received.append(len(x_RD))
    return compute_chunk(group, plan, chunk, parts, x_RD, *rest)

expert._compute_chunk = counted

def kept(num_layers, recompute):
    config = ModelConfig(vocab_size=64, hidden_size=96, num_layers=num_layers, num_heads=8, num_kv_heads=2, head_dim=32, num_experts=6,
                         moe_intermediate_size=80, router_hidden_size=24)
    backend.choose("triton", torch.device("cpu"), torch.float32, 32)
    table = plan(config)
    model = build_model(config, torch.float32, recompute, mesh, table)
    init_weights(model, config, 0, pieces(mesh, table))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor keeps its address from being used again
        return tensor
    torch.manual_seed(mesh.rank)
    received.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randint(0, 64, (1, 64)), torch.arange(64)[None])
    return sum(n for n, _ in storages.values())

for recompute in ("none", "selective", "full"):
    fewer = kept(2, recompute)
    print(json.dumps([recompute, kept(3, recompute) - fewer, received[-1] if received else None]))
close_mesh(mesh)
"""


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_activation_bytes_are_what_a_block_keeps(ranks: int, tmp_path: Path) -> None:
    """In processes of their own, whose Triton interprets. The rest: halos and group sizes, which do not grow with the tokens."""
    script = tmp_path / "saved.py"
    script.write_text(SAVED)
    start = ["-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", str(ranks), "--log-dir", str(tmp_path),
             "--redirects", "1", sys.executable, str(script)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *start], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    config = ModelConfig(vocab_size=64, hidden_size=96, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=32, num_experts=6,
                         moe_intermediate_size=80, router_hidden_size=24)
    outputs = list(tmp_path.rglob("stdout.log"))
    assert len(outputs) == ranks
    for output in outputs:
        measured = [json.loads(line) for line in output.read_text().splitlines()]
        assert [recompute for recompute, _, _ in measured] == ["none", "selective", "full"]
        for recompute, num_bytes, received in measured:
            assert (received is None) == (ranks == 1)
            assert activation_bytes(config, 64, recompute, "fp32", received) == pytest.approx(num_bytes, rel=5e-3), (recompute, received)
