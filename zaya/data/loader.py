"""The loader: a batch is a pure function of (recipe, seed, first row, number of rows).

Last stage of a batch's path on the host: the trainer asks for the rows of a step and every rank for its slice of them, so batches do not
depend on the number of ranks, and resuming takes one integer. Knows no rank, no step, no device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from zaya.config import DataConfig, Recipe
from zaya.data.blend import Blend, Epochs
from zaya.data.corpus import Corpus
from zaya.data.packing import IGNORE, Batch, pack

__all__ = ["IGNORE", "Batch", "Loader", "build_corpora", "open_loader"]


def build_corpora(recipe: Recipe) -> None:
    """Make what data.source asks for, where it does not exist. One process of a job calls it."""
    if recipe.data.source == "stdlib":
        from zaya.data import stdlib_corpus  # here, because only such recipes need the tokenizers library

        stdlib_corpus.build(recipe.data, recipe.model.vocab_size)


def open_loader(recipe: Recipe, known_tokens: int | None = None) -> Loader:
    """The loader of a recipe whose corpora exist. known_tokens: entries of its tokenizer, beyond which no token may lie."""
    vocab_size = min(recipe.model.vocab_size, known_tokens or recipe.model.vocab_size)
    return Loader(recipe.data, seq_len=recipe.train.seq_len, vocab_size=vocab_size, seed=recipe.train.seed)


class Loader:
    """Rows of `seq_len` tokens from the corpora of a recipe. Opens and checks every corpus: ValueError on bad input.

    Reading goes through memory maps: the object holds no tokens and may be used from several threads.
    """

    def __init__(self, data: DataConfig, *, seq_len: int, vocab_size: int, seed: int) -> None:
        self.seq_len = seq_len
        self.corpora = [Corpus(prefix, vocab_size) for prefix in data.train]
        self._valid = Corpus(data.valid, vocab_size) if data.valid else None
        for corpus in self.corpora + ([self._valid] if self._valid else []):
            if corpus.num_tokens <= seq_len:
                raise ValueError(f"corpus {corpus.prefix} has {corpus.num_tokens} tokens, too few for one row of train.seq_len = {seq_len} "
                                 f"and its last label; use a larger corpus or seq_len <= {corpus.num_tokens - 1}")
        # Keyed by the place in data.train, not by the path: the same corpora elsewhere give the same batches.
        self._epochs = [Epochs(c.num_tokens, seq_len, seed, "corpus", i) for i, c in enumerate(self.corpora)]
        self._blend = Blend(data.train, data.weights or [c.num_tokens for c in self.corpora], seed)

    @property
    def num_evaluation_rows(self) -> int:
        """Rows of data.valid, 0 without one."""
        return (self._valid.num_tokens - 1) // self.seq_len if self._valid else 0

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Training rows [first_row, first_row + num_rows) of the run's one order of rows, which has no end."""
        assert first_row >= 0 and num_rows >= 1, (first_row, num_rows)
        corpora_B, rows_B = self._blend.rows(first_row, num_rows)
        starts_B = np.empty_like(rows_B)
        for i in np.unique(corpora_B):
            starts_B[corpora_B == i] = self._epochs[i].starts(rows_B[corpora_B == i])
        return self._read((self.corpora[i], int(start)) for i, start in zip(corpora_B, starts_B, strict=True))

    def evaluation(self, first_row: int, num_rows: int) -> Batch:
        """Rows [first_row, first_row + num_rows) of data.valid, consecutive windows in stored order. ValueError past its end."""
        if self._valid is None:
            raise ValueError("data.valid is empty; name a held-out corpus")
        if first_row + num_rows > self.num_evaluation_rows:
            raise ValueError(f"corpus {self._valid.prefix} has {self.num_evaluation_rows} rows of {self.seq_len} tokens, but evaluation "
                             f"asks for {first_row + num_rows}; use train.eval_rows <= {self.num_evaluation_rows} or a larger data.valid")
        return self._read((self._valid, row * self.seq_len) for row in range(first_row, first_row + num_rows))

    def tokens_by_corpus(self, num_rows: int) -> dict[str, int]:
        """Tokens that the rows [0, num_rows) take from each corpus."""
        rows = self._blend.rows_by_corpus(num_rows)
        return {corpus.prefix: int(n) * self.seq_len for corpus, n in zip(self.corpora, rows, strict=True)}

    def _read(self, windows: Iterable[tuple[Corpus, int]]) -> Batch:
        span = self.seq_len + 1
        rows = [(c.tokens(start, span), c.starts(start, span), c.targets(start, span)) for c, start in windows]
        tokens, starts, targets = (np.array(part).reshape(len(rows), span) for part in zip(*rows, strict=True))
        return pack(tokens, starts, targets)
