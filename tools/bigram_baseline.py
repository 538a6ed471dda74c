"""Held-out loss of a bigram model of the same tokens: what a model must beat to have learnt more than pairs of neighbours.

    python -m tools.bigram_baseline recipes/quickstart.toml [--json] [--section.key=value ...]

Counts all pairs (token, label) of data.train and scores the labels that evaluation uses (rows 0 .. train.eval_rows of data.valid), in nats
per token. Smoothing is interpolated: three absolute discounts by count (Chen and Goodman 1998) plus a concentration (Pitman-Yor, Teh 2006),
over a discounted unigram of either continuation counts (Kneser and Ney 1995) or plain counts. Every number of it, and the choice of the
unigram, is tuned on a held-out tenth of data.train's documents; data.valid is only scored.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from zaya.cli import Parser
from zaya.config import Recipe, load_recipe
from zaya.data.corpus import Corpus
from zaya.data.loader import IGNORE, Loader, build_corpora, open_loader
from zaya.data.packing import pack

_CHUNK = 1 << 16  # tokens read at once; a document piece of a chunk is what the tuning split moves as a whole
_WORTH = 1e-6  # nats per token: what a tuning step must gain to be taken
_MERGE = 1 << 24  # pairs held before they are summed: bounds memory


@dataclass(frozen=True)
class Smoothing:
    """Mass taken from pairs seen once, twice, more often; extra mass per context; mass taken from each unigram; which unigram."""

    once: float = 0.7
    twice: float = 1.0
    more: float = 1.2
    concentration: float = 1.0
    unigram: float = 0.7
    continuation: bool = True


@dataclass(frozen=True)
class Counts:
    """How often each pair occurs: code = token * vocab_size + label, sorted, and its count."""

    vocab_size: int
    codes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @staticmethod
    def of(vocab_size: int, portions: Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Counts:
        """Sum of portions (codes, counts), in any order and with repetitions."""
        codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for portion in portions:
            waiting.append(portion)
            if sum(len(c) for c, _ in waiting) >= max(_MERGE, len(codes)):
                codes, counts = _merge([(codes, counts), *waiting])
                waiting = []
        return Counts(vocab_size, *_merge([(codes, counts), *waiting]))


class Bigram:
    """p(label | token) for every pair of the vocabulary."""

    def __init__(self, counts: Counts, smoothing: Smoothing) -> None:
        self._counts, self._smoothing = counts, smoothing
        size, tokens, labels = counts.vocab_size, counts.codes // counts.vocab_size, counts.codes % counts.vocab_size
        self._discounted = counts.counts - np.array([0.0, smoothing.once, smoothing.twice, smoothing.more])[np.minimum(counts.counts, 3)]
        total = np.bincount(tokens, weights=counts.counts, minlength=size)
        taken = total - np.bincount(tokens, weights=self._discounted, minlength=size)
        seen = total > 0
        self._norm = np.where(seen, total + smoothing.concentration, 1.0)
        self._left = np.where(seen, taken + smoothing.concentration, 1.0) / self._norm  # what goes to the unigram
        unigram = np.bincount(labels, weights=None if smoothing.continuation else counts.counts, minlength=size).astype(np.float64)
        discount = smoothing.unigram * (unigram > 0)
        self._unigram = (unigram - discount + discount.sum() / size) / unigram.sum()

    def probability(self, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        codes = tokens * self._counts.vocab_size + labels
        at = np.minimum(np.searchsorted(self._counts.codes, codes), len(self._counts.codes) - 1)
        direct = np.where(self._counts.codes[at] == codes, self._discounted[at], 0.0) / self._norm[tokens]
        return direct + self._left[tokens] * self._unigram[labels]

    def loss(self, scored: Counts) -> float:
        """Cross-entropy of the pairs of `scored`, in nats per pair."""
        p = self.probability(scored.codes // scored.vocab_size, scored.codes % scored.vocab_size)
        return float(-(np.log(p) * scored.counts).sum() / scored.counts.sum())


def tune(train: Counts, held_out: Counts) -> Smoothing:
    """The smoothing under which `train` predicts `held_out` best: coordinate descent with shrinking steps, from both unigrams."""
    best, best_loss = Smoothing(), np.inf
    for continuation in (True, False):
        current = Smoothing(continuation=continuation)
        loss = Bigram(train, current).loss(held_out)
        step = 1.6
        while step > 1.02:
            improved = False
            for name, most in (("once", 0.999), ("twice", 1.999), ("more", 2.999), ("concentration", 1e6), ("unigram", 0.999)):
                for factor in (step, 1 / step):
                    trial = replace(current, **{name: min(most, getattr(current, name) * factor)})
                    trial_loss = Bigram(train, trial).loss(held_out)
                    if trial_loss < loss - _WORTH:
                        current, loss, improved = trial, trial_loss, True
                        break
            if not improved:
                step = step ** 0.5
        if loss < best_loss:
            best, best_loss = current, loss
    return best


def baseline(loader: Loader, vocab_size: int, eval_rows: int) -> tuple[float, int, Smoothing]:
    """(nats per token, tokens scored, smoothing) on the evaluation rows [0, eval_rows)."""
    batch = loader.evaluation(0, eval_rows)
    tokens, labels = batch.tokens_BT.numpy(), batch.labels_BT.numpy()
    chosen = labels != IGNORE
    scored = Counts.of(vocab_size, iter([np.unique(tokens[chosen] * vocab_size + labels[chosen], return_counts=True)]))
    if not len(scored.codes):
        raise ValueError("data.valid has no label in these rows (every document has one token, or its mask is 0); use other text")
    folds = [Counts.of(vocab_size, _pairs(loader.corpora, vocab_size, fold)) for fold in (False, True)]
    if not len(folds[0].codes):
        raise ValueError("data.train has no pair of neighbouring tokens to count; use other text")
    smoothing = tune(*folds) if len(folds[1].codes) else Smoothing()  # a corpus of few pieces is too small to split
    whole = Counts.of(vocab_size, iter([(fold.codes, fold.counts) for fold in folds]))
    return Bigram(whole, smoothing).loss(scored), int(scored.counts.sum()), smoothing


def _pairs(corpora: list[Corpus], vocab_size: int, held_out: bool) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs with their counts, from every tenth document piece (held_out) or from the others: together, all labels of the corpora."""
    pieces = 0
    total = sum(c.num_tokens for c in corpora)
    with tqdm(total=total, desc="counting pairs", unit="token", unit_scale=True, disable=None, leave=False) as bar:
        for corpus in corpora:
            for start in range(0, corpus.num_tokens - 1, _CHUNK):
                span = min(_CHUNK + 1, corpus.num_tokens - start)
                batch = pack(corpus.tokens(start, span)[None], corpus.starts(start, span)[None], corpus.targets(start, span)[None])
                tokens, labels, documents = (t[0].numpy() for t in (batch.tokens_BT, batch.labels_BT, batch.documents_BT))
                chosen = (labels != IGNORE) & (((documents + pieces) % 10 == 9) == held_out)
                yield np.unique(tokens[chosen] * vocab_size + labels[chosen], return_counts=True)
                pieces += int(documents[-1]) + 1
                bar.update(span - 1)


def _merge(portions: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    codes, place = np.unique(np.concatenate([c for c, _ in portions]), return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, place, np.concatenate([n for _, n in portions]))
    return codes, counts


def _load(recipe: Recipe) -> Loader:
    for section in (recipe.model, recipe.data, recipe.train):  # not the layout: counts do not depend on it
        section.validate()
    build_corpora(recipe)
    return open_loader(recipe)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tools.bigram_baseline", description="Held-out loss of a well-smoothed bigram model of a recipe's corpus.",
                     epilog="Overrides of the recipe: --section.key=value", allow_abbrev=False)
    parser.add_argument("recipe", help="recipe (.toml)")
    parser.add_argument("--json", action="store_true", help="print {loss, tokens, smoothing} as JSON")
    try:
        args, overrides = parser.parse_known_args(argv)
        recipe = load_recipe(args.recipe, overrides)
        loss, tokens, smoothing = baseline(_load(recipe), recipe.model.vocab_size, recipe.train.eval_rows)
    except (ValueError, OSError) as error:
        return parser.refused(error)
    if args.json:
        print(json.dumps({"loss": loss, "tokens": tokens, "smoothing": vars(smoothing)}))
    else:
        print(f"bigram baseline: {loss:.9f} nats per token over {tokens} held-out tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
