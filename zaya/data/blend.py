"""Order of the rows: which corpus, and which of its windows, the i-th row of the run is.

Second stage of a batch's path: position -> (corpus, row of that corpus) -> start in its stream. Closed forms keyed by the seed: no index is
built, stored or shuffled in memory, so any position of any epoch costs the same. Pure integers: knows no file, no token, no tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zaya.shares import BLEND_ROWS, blend_rows

_ROUNDS = 6  # 4 rounds already make a Feistel network pseudo-random (Luby and Rackoff); two more for tiny domains


def key(*parts: object) -> int:
    """64 bits that depend on every part, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(indices: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Images of `indices` under a keyed permutation of range(size): a Feistel network on an even power of two, repeated until it is inside.

    Its domain is at most 4 * size, so that takes under 4 repetitions on average; bijective, because every cycle re-enters range(size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    out = indices.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        x = out[walking]
        left, right = x >> half, x & low
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(right + np.uint64((key + round_ * 0x9E3779B97F4A7C15) % (1 << 64))) & low)
        x = (left << half) | right
        out[walking] = x
        walking = walking[x >= np.uint64(size)]
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014): every input bit flips every output bit about half the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Epochs:
    """Windows of `seq_len` tokens in a stream of `num_tokens`, in another order every epoch. Needs seq_len + 1 tokens at least."""

    def __init__(self, num_tokens: int, seq_len: int, *keys: object) -> None:
        self.rows, self._left_over = divmod(num_tokens - 1, seq_len)  # the last window's last label is one token further
        self._seq_len = seq_len
        self._keys = keys

    def starts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each row, rows counted over all epochs. Each epoch shifts its windows, so no token is left over for ever."""
        starts = np.empty_like(rows)
        epochs = rows // self.rows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shift = key(*self._keys, "shift", int(epoch)) % (self._left_over + 1)
            order = permute(rows[chosen] % self.rows, self.rows, key(*self._keys, "order", int(epoch)))
            starts[chosen] = shift + order * self._seq_len
        return starts


class Blend:
    """Mixes corpora by weight: every block of BLEND_ROWS rows holds each corpus' share exactly, in a keyed order of its own."""

    def __init__(self, names: Sequence[str], weights: Sequence[float], seed: int) -> None:
        self.shares = np.array(blend_rows(names, weights), np.int64)
        self._seed = seed
        self._latest: tuple[int, NDArray[np.int64], NDArray[np.int64]] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def rows(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(corpus, row of that corpus) of the rows [first, first + count); every corpus' rows come in order 0, 1, 2, ..."""
        corpora, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            block, slot = divmod(first + done, BLEND_ROWS)
            taken = min(BLEND_ROWS - slot, count - done)
            corpus_of_slot, rank_of_slot = self._block(block)
            corpora[done:done + taken] = corpus_of_slot[slot:slot + taken]
            rows[done:done + taken] = block * self.shares[corpora[done:done + taken]] + rank_of_slot[slot:slot + taken]
            done += taken
        return corpora, rows

    def rows_by_corpus(self, count: int) -> NDArray[np.int64]:
        """How many of the rows [0, count) each corpus gives."""
        block, slot = divmod(count, BLEND_ROWS)
        return block * self.shares + np.bincount(self._block(block)[0][:slot], minlength=len(self.shares))

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per slot of the block: its corpus, and how many earlier slots of the block have that corpus."""
        if self._latest[0] != block:  # consecutive calls fall into the same block; another thread at worst computes it again
            deck = permute(np.arange(BLEND_ROWS), BLEND_ROWS, key(self._seed, "blend", block))
            ends = np.cumsum(self.shares)
            corpora = np.searchsorted(ends, deck, side="right")
            by_corpus = np.argsort(corpora, kind="stable")
            ranks = np.empty_like(corpora)
            ranks[by_corpus] = np.arange(BLEND_ROWS) - np.repeat(ends - self.shares, self.shares)
            self._latest = (block, corpora, ranks)
        return self._latest[1:]
