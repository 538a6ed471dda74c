"""What a layout costs, in numbers: bytes that a rank keeps, and bytes that it sends per step, collective by collective.

Computed from the plan, the layout and the partition alone, for any number of ranks in one process: the planner prints it, and tests
compare it with what the ledger of a real run counted. Routing decides what experts send; here every expert gets the same.

Keys of traffic are the ledger's: (operation, group).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from zaya.config import ModelConfig, Recipe
from zaya.dtypes import DTYPES
from zaya.parallel.partition import BucketPlan, Matrix, make_buckets
from zaya.parallel.tensor import delayed_rows
from zaya.plan import ParameterPlan
from zaya.shard import Layout, Shard

BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
Traffic = Counter[tuple[str, str]]


def kind_name(layout: Layout, bucket: BucketPlan) -> str:
    """How the mesh names the holders of a bucket."""
    kind, replicas = layout.kind(bucket.rows[0].placement)
    return kind if replicas == 1 else f"{kind}/{replicas}"


def zero1_traffic(buckets: Sequence[BucketPlan], rounds: Sequence[tuple[list[int], list[Matrix]]], layout: Layout, rank: int,
                  param_bytes: int, reduce_bytes: int) -> Traffic:
    """Gradients in, Muon's exchange, parameters out: per step, whatever the number of micro-batches."""
    sent: Traffic = Counter()
    for bucket in buckets:
        name, placement = kind_name(layout, bucket), bucket.rows[0].placement
        others = bucket.num_shards - 1
        copies = len(layout.holders(placement, rank)) // bucket.num_shards
        if others:
            sent["reduce_scatter", f"{name} holders"] += others * bucket.shard_length * reduce_bytes
            sent["all_gather", f"{name} holders"] += others * bucket.shard_length * param_bytes
        if copies > 1:
            sent["all_reduce", f"{name} replicas"] += 2 * (copies - 1) * bucket.shard_length * reduce_bytes // copies
    for indices, matrices in rounds:
        placement = buckets[indices[0]].rows[0].placement
        me = layout.exchange_ranks(placement, rank).index(rank)
        group = f"{kind_name(layout, buckets[indices[0]])} exchange"
        for matrix in matrices:
            for place, part in matrix.parts:
                if (place == me) != (matrix.owner == me):  # it leaves as a direction, or comes back as an update
                    sent["all_to_all", group] += part.numel * param_bytes
    return sent


def model_traffic(model: ModelConfig, layout: Layout, rank: int, rows: int, seq_len: int, recompute: str, dtype: str) -> Traffic:
    """What one forward and backward pass of `rows` rows sends over tp, cp and ep; experts as a level router would have it."""
    sent: Traffic = Counter()
    c, wide, again = BYTES[dtype], max(BYTES[dtype], 4), int(recompute == "full")
    D, H, L, tp, cp, ep = model.hidden_size, model.head_dim, model.num_layers, layout.tp, layout.cp, layout.ep
    tokens = rows * seq_len // cp  # of this rank's rows, those that attention sees
    kv_placement = Shard(0, "tp", model.num_kv_heads)
    replicas, kv_channels = kv_placement.replicas(tp), model.num_kv_heads * H
    first, last = kv_placement.piece(layout.index("tp", rank), tp, kv_channels)
    local_kv = last - first
    if tp > 1:
        part = (tp - 1) * tokens * D * c // tp
        # Per block: x, x again for the weights' gradients, o's gradient; o, x's gradient. Then the head's input and the embedding.
        sent["all_gather", "tp"] += part * (L * (3 + again) + 2) + (tp - 1) * 3 * tokens * wide  # and the loss' partials
        sent["reduce_scatter", "tp"] += part * (L * (2 + again) + 2)
    remix = int(recompute != "none")  # backward runs the op cca and attention's forward again
    if replicas > 1:
        sent["all_reduce", "kv replicas"] += L * (2 + remix) * (2 * (replicas - 1) * tokens * local_kv * wide // replicas)
    if cp > 1:
        sent["all_gather", "cp"] += L * 2 * (cp - 1) * 2 * tokens * local_kv * c  # K and V, forward and in backward
        sent["reduce_scatter", "cp"] += L * (cp - 1) * 2 * tokens * local_kv * c
        start, stop = delayed_rows(kv_channels, first, last)
        edge = rows * (2 * (model.num_heads * H // tp + local_kv) + stop - start) * c
        neighbours = (layout.index("cp", rank) < cp - 1) + (layout.index("cp", rank) > 0)  # the middle one's two chunks are neighbours
        sent["send", "cp"] += L * (2 + remix) * neighbours * edge
    if ep > 1:
        away = tokens // tp * (ep - 1) // ep
        passes = 2 + {"none": 0, "selective": 0.5, "full": 1}[recompute]  # selective sends x and gates again, not the results
        sent["all_to_all", "ep"] += int(L * passes * away * (2 * D * c + wide))
        sent["all_gather", "ep"] += L * (1 + again) * (ep - 1) * 8 * model.num_router_classes
    return sent


def held_bytes(table: Mapping[str, ParameterPlan], recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state: the same on every rank, since pieces and shards are equal."""
    muon, train = recipe.optim.name == "muon", recipe.train.dtype
    buckets = make_buckets(table.values(), layout, muon=muon)
    wide = 8 if train == "fp64" else 4
    local = sum(bucket.length for bucket in buckets)
    shards = sum(bucket.shard_length for bucket in buckets)
    state = sum(bucket.shard_length * (1 if bucket.muon else 2) for bucket in buckets)
    return {"parameters": local * BYTES[train], "gradients": local * wide, "master weights": shards * wide if train == "bf16" else 0,
            "optimizer state": state * wide}


def activation_bytes(model: ModelConfig, tokens: int, recompute: str, dtype: str, received: int | None = None) -> int:
    """Bytes that one block keeps for backward of `tokens` tokens on a rank that holds all heads, with the Triton ops.

    received: rows that come to the experts of this rank under expert parallelism (a level router sends as many as it has tokens); None: it
    holds all experts. Counted from what the ops save (tests compare it with the saved tensors of a real forward pass). In compute dtype
    unless noted: two joins of branch and stream (fp32) with the norm that follows; q~, k~, v, q, k, v and the output; gate | up, and
    where rows are received these; the router's six.
    """
    c, D, R = BYTES[dtype], model.hidden_size, model.router_hidden_size
    N, G, H, F, C = model.num_heads, model.num_kv_heads, model.head_dim, model.moe_intermediate_size, model.num_router_classes
    if recompute == "full":
        return tokens * ((c + 4) * D + c * R)  # x, the stream and the router's state
    joins = 2 * (2 * c * D + 4 * D + 4)
    router = 6 * c * R + 4 + 4 * C
    sent = 0 if received is None else 8  # the order sent, int64
    if recompute == "selective":
        return tokens * (joins + router + 2 * c * (N + G) * H + 8 + sent)  # q~, k~, v and the output; class and gate
    attention = c * (3 * N + 4 * G) * H + 4 * N + 4 * (N + G)  # log-sum-exp and inverse norms in fp32
    rows = 2 * c * F + 4  # gate | up, order
    if received is not None:
        rows += c * D + 4  # x and gate as they came
    experts = tokens * (8 + sent) + (tokens if received is None else received) * rows  # class, gate
    folded = (N + G) * (6 * H * H * c + 4 * H)  # the convolution's kernel both ways, and its constant
    return tokens * (joins + router + attention) + experts + folded
