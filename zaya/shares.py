"""How many rows of a block each corpus gives, from its weight: what validates a recipe and what blends its corpora agree. Standard library
only."""

from __future__ import annotations

from collections.abc import Sequence

BLEND_ROWS = 4096
"""Rows in which every corpus gets exactly its share: one global batch of ZAYA1 (4,096 sequences)."""


def blend_rows(names: Sequence[str], weights: Sequence[float]) -> list[int]:
    """Of BLEND_ROWS rows, how many each corpus gives: its share of the weights, by largest remainder. ValueError: one would give none."""
    total = sum(weights)
    exact = [weight / total * BLEND_ROWS for weight in weights]
    rows = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: rows[i] - exact[i])
    for i in by_remainder[:BLEND_ROWS - sum(rows)]:
        rows[i] += 1
    for name, weight, count in zip(names, weights, rows, strict=True):
        if count == 0:
            raise ValueError(f"corpus {name} has weight {weight:g} of {total:g}, less than one row in {BLEND_ROWS}; "
                             f"give it at least {total / BLEND_ROWS:g} in data.weights, merge it into another corpus or leave it out")
    return rows
