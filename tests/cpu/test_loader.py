"""The loader: rows are a pure function of the position, cover the corpus, and label exactly what may be predicted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import dump_batch
from zaya.config import DataConfig
from zaya.data.blend import Blend, Epochs, key, permute
from zaya.data.corpus import megatron_indexed_dataset
from zaya.data.loader import IGNORE, Batch, Loader
from zaya.shares import BLEND_ROWS

SEQ_LEN = 8
LENGTHS = [5, 1, 1, 20, 3, 8, 8, 1, 40, 2, 13]  # tokens per document: of one token, of a row, of many rows; 102 in all


def write(prefix: Path, lengths: list[int], first_id: int) -> list[list[int]]:
    """A corpus whose ids are all different, so that a row tells where it was taken from."""
    ids = np.random.default_rng(first_id).permutation(sum(lengths)) + first_id
    documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    builder = megatron_indexed_dataset()[1](f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return documents


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a (102 tokens, ids from 0), b (61, ids from 1000, masked), valid (102, ids from 2000)."""
    folder = tmp_path_factory.mktemp("corpora")
    write(folder / "a", LENGTHS, 0)
    write(folder / "b", [30, 1, 30], 1000)
    (folder / "b.mask").write_bytes(bytes(i % 3 != 0 for i in range(61)))
    write(folder / "valid", LENGTHS, 2000)
    return folder


def loader(folder: Path, *names: str, seed: int = 7, weights: tuple[float, ...] = (), seq_len: int = SEQ_LEN) -> Loader:
    data = DataConfig(train=tuple(str(folder / n) for n in names), weights=weights, valid=str(folder / "valid"))
    return Loader(data, seq_len=seq_len, vocab_size=3000, seed=seed)


def slow_row(folder: Path, first_token: int, seq_len: int = SEQ_LEN) -> list[list[int]]:
    """(tokens, labels, positions, documents) of the row that starts at this token, read with plain numpy, one token at a time."""
    name = "a" if first_token < 1000 else "b" if first_token < 2000 else "valid"
    stream = np.fromfile(folder / f"{name}.bin", np.int32).tolist()
    idx = (folder / f"{name}.idx").read_bytes()
    count = int.from_bytes(idx[18:26], "little")
    document_of = [d for d, length in enumerate(np.frombuffer(idx, np.int32, count, 34)) for _ in range(length)]
    mask = (folder / f"{name}.mask").read_bytes() if name == "b" else bytes([1]) * len(stream)
    start = stream.index(first_token)
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    documents: list[int] = []
    for t in range(start, start + seq_len):
        fresh = t == start or document_of[t] != document_of[t - 1]
        tokens.append(stream[t])
        labels.append(stream[t + 1] if document_of[t + 1] == document_of[t] and mask[t + 1] else IGNORE)
        positions.append(0 if fresh else positions[-1] + 1)
        documents.append(0 if t == start else documents[-1] + fresh)
    return [tokens, labels, positions, documents]


def rows_of(batch: Batch) -> list[list[list[int]]]:
    fields = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.documents_BT)
    assert all(f.dtype == torch.int64 for f in fields)
    return [list(row) for row in zip(*(f.tolist() for f in fields), strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key_: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key_)), np.arange(size))


def test_permutation_is_one_for_huge_sizes_too() -> None:
    size = (1 << 45) + 12345
    indices = np.random.default_rng(0).integers(0, size, 100_000)
    images = permute(indices, size, 99)
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == len(np.unique(indices))
    assert abs(images.mean() / size - 0.5) < 0.005  # uniform: standard error 0.29 / sqrt(100,000) = 0.0009


def test_permutation_mixes() -> None:
    """Every (place, value) equally likely over the keys, and neighbours do not stay neighbours."""
    size, trials = 10, 2000
    seen = np.zeros((size, size))
    for k in range(trials):
        seen[np.arange(size), permute(np.arange(size), size, key(k))] += 1
    assert ((seen - trials / size) ** 2 / (trials / size)).sum() < 140  # chi-square of 81 degrees: mean 81, sigma 12.7
    order = permute(np.arange(4096), 4096, 5)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # about 2 expected


def test_order_never_changes_silently() -> None:
    """Runs resume by one integer: a change of these numbers gives every existing run other data."""
    assert permute(np.arange(10), 10, 123456789).tolist() == [7, 3, 6, 1, 9, 4, 8, 5, 2, 0]
    assert key(7, "corpus", 0) == 5514194836481588411
    assert Epochs(102, 8, 7, "corpus", 0).starts(np.arange(10, 16)).tolist() == [72, 64, 84, 12, 28, 68]
    assert Blend(["a", "b"], [3, 1], 7).rows(4090, 12)[0].tolist() == [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_every_row_equals_a_slow_reading(corpora: Path, names: tuple[str, ...]) -> None:
    rows = rows_of(loader(corpora, *names).batch(0, 60))
    assert rows == [slow_row(corpora, row[0][0]) for row in rows]


@pytest.mark.parametrize("seq_len", [1, 7, 101])
def test_other_row_lengths(corpora: Path, seq_len: int) -> None:
    rows = rows_of(loader(corpora, "a", seq_len=seq_len).batch(3, 20))
    assert rows == [slow_row(corpora, row[0][0], seq_len) for row in rows]


def test_labels_by_hand(tmp_path: Path) -> None:
    """[a b c end] predicts b c end and then nothing; a document of one token predicts nothing; a document cut by a row goes on."""
    builder = megatron_indexed_dataset()[1](str(tmp_path / "c.bin"), dtype=np.uint16)
    for document in ([11, 12, 13, 9], [9], [21, 9, 22, 23, 24, 9], [31, 9]):  # 9 inside a document is no border
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "c.idx"))
    data = DataConfig(train=(str(tmp_path / "c"),), valid=str(tmp_path / "c"))
    batch = Loader(data, seq_len=6, vocab_size=32, seed=0).evaluation(0, 2)
    assert batch.tokens_BT.tolist() == [[11, 12, 13, 9, 9, 21], [9, 22, 23, 24, 9, 31]]
    assert batch.labels_BT.tolist() == [[12, 13, 9, IGNORE, IGNORE, 9], [22, 23, 24, 9, IGNORE, 9]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 0, 1]]


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 3 * BLEND_ROWS), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_batches_do_not_depend_on_how_ranks_slice_them(corpora: Path, first: int, cuts: list[int]) -> None:
    whole = loader(corpora, "a", "b").batch(first, sum(cuts))
    ranks = loader(corpora, "a", "b")  # another process' loader, which has read other rows before
    ranks.batch(17, 3)
    parts, at = [], first
    for cut in cuts:
        parts += rows_of(ranks.batch(at, cut))
        at += cut
    assert parts == rows_of(whole)


def test_an_epoch_sees_every_token_once_but_the_left_over(corpora: Path) -> None:
    rows = 101 // SEQ_LEN
    orders, seen = [], set()
    for epoch in range(30):
        tokens = loader(corpora, "a").batch(epoch * rows, rows).tokens_BT
        assert tokens.unique().numel() == tokens.numel() == rows * SEQ_LEN
        orders.append(tuple(tokens[:, 0].tolist()))
        seen |= set(tokens.flatten().tolist())
    assert len(set(orders)) == 30
    last = np.fromfile(corpora / "a.bin", np.int32)[-1]
    assert seen == set(range(102)) - {last}, "over the epochs only the last token of the corpus is never an input: it has no label"


def test_epochs_differ_beyond_their_shift() -> None:
    epochs = Epochs(101, 10, 0)  # 10 rows, nothing left over: the shift is always 0
    orders = {tuple(epochs.starts(np.arange(e * 10, e * 10 + 10))) for e in range(20)}
    assert len(orders) == 20 and all(sorted(o) == list(range(0, 100, 10)) for o in orders)


def test_seed_and_place_in_the_recipe_decide_the_order(corpora: Path) -> None:
    first = rows_of(loader(corpora, "a", seed=1).batch(0, 12))
    assert first == rows_of(loader(corpora, "a", seed=1).batch(0, 12))
    assert first != rows_of(loader(corpora, "a", seed=2).batch(0, 12))


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), first=st.integers(0, 20_000), count=st.integers(0, 9_000))
def test_blend_is_consistent(weights: list[int], first: int, count: int) -> None:
    """Each corpus' rows come as 0, 1, 2, ...; the closed-form totals count them; every block has the shares."""
    blend = Blend([str(w) for w in weights], weights, seed=3)
    assert blend.shares.sum() == BLEND_ROWS
    assert all(abs(share - w / sum(weights) * BLEND_ROWS) < 1 for share, w in zip(blend.shares, weights, strict=True))
    corpus, row = blend.rows(first, count)
    before, after = blend.rows_by_corpus(first), blend.rows_by_corpus(first + count)
    assert before.sum() == first
    for i in range(len(weights)):
        assert row[corpus == i].tolist() == list(range(before[i], after[i]))


def test_one_corpus_is_taken_in_order() -> None:
    corpus, row = Blend(["a"], [0.3], seed=3).rows(5000, 6000)
    assert (corpus == 0).all() and row.tolist() == list(range(5000, 11000))


def test_blocks_are_shuffled_and_differ() -> None:
    blend = Blend(["a", "b"], [1, 1], seed=3)
    blocks = [blend.rows(i * BLEND_ROWS, BLEND_ROWS)[0] for i in range(3)]
    assert not np.array_equal(blocks[0], blocks[1]) and not np.array_equal(blocks[1], blocks[2])
    for block in blocks:  # both corpora all along: a quarter of a block is 1024 draws, sigma 14
        assert all(abs(part.sum() - 512) < 80 for part in np.split(block, 4))


def test_weights_and_their_default(corpora: Path) -> None:
    a, b = str(corpora / "a"), str(corpora / "b")
    block = BLEND_ROWS * SEQ_LEN
    assert loader(corpora, "a", "b", weights=(1.0, 3.0)).tokens_by_corpus(BLEND_ROWS) == {a: block // 4, b: block * 3 // 4}
    by_tokens = loader(corpora, "a", "b").tokens_by_corpus(BLEND_ROWS)
    assert by_tokens == {a: round(BLEND_ROWS * 102 / 163) * SEQ_LEN, b: round(BLEND_ROWS * 61 / 163) * SEQ_LEN}
    mixed = loader(corpora, "a", "b")
    ids = mixed.batch(0, 100).tokens_BT[:, 0]
    assert mixed.tokens_by_corpus(100) == {a: int((ids < 1000).sum()) * SEQ_LEN, b: int((ids >= 1000).sum()) * SEQ_LEN}


def test_evaluation_is_consecutive_and_ends(corpora: Path) -> None:
    it = loader(corpora, "a")
    stream = np.fromfile(corpora / "valid.bin", np.int32)
    assert it.num_evaluation_rows == 12
    rows = rows_of(it.evaluation(0, 12))
    assert [token for row in rows for token in row[0]] == stream[:96].tolist()
    assert rows == [slow_row(corpora, row[0][0]) for row in rows]
    assert rows_of(it.evaluation(5, 2)) == rows[5:7]
    assert loader(corpora, "a", seq_len=51).num_evaluation_rows == 1, "the second row's last label would lie behind the corpus"
    with pytest.raises(ValueError, match=r"has 12 rows of 8 tokens, but evaluation asks for 13; use train\.eval_rows <= 12"):
        it.evaluation(11, 2)


def test_bad_recipes(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 102 tokens, too few for one row of train\.seq_len = 102 .* seq_len <= 101"):
        loader(corpora, "a", seq_len=102)
    with pytest.raises(ValueError, match=rf"corpus .*b has weight 1e-05 of 1\.00001, less than one row in {BLEND_ROWS}"):
        loader(corpora, "a", "b", weights=(1.0, 1e-5))
    without = Loader(DataConfig(train=(str(corpora / "a"),)), seq_len=8, vocab_size=3000, seed=0)
    assert without.num_evaluation_rows == 0
    with pytest.raises(ValueError, match=r"data\.valid is empty"):
        without.evaluation(0, 1)


RECIPE = """
[model]
vocab_size = 3000
hidden_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 8
num_experts = 2
moe_intermediate_size = 16
router_hidden_size = 8
[data]
train = ["{folder}/a", "{folder}/b"]
[train]
steps = 10
global_batch_size = 6
micro_batch_size = 2
seq_len = 8
seed = 7
[optim]
name = "adamw"
lr = 1e-3
min_lr = 1e-4
warmup_steps = 1
[run]
dir = "{folder}/run"
"""


def test_dump_equals_a_slow_reading(corpora: Path, tmp_path: Path) -> None:
    """The command itself, as typed: silent, and the rows of step 3 are those of nobody else."""
    recipe, out = tmp_path / "r.toml", tmp_path / "b.npz"
    recipe.write_text(RECIPE.format(folder=corpora))
    command = [sys.executable, "-m", "tools.dump_batch", str(recipe), "--step", "3", "--out", str(out), "--train.global_batch_size=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote the ")
    arrays = np.load(out)
    assert set(arrays) == {"tokens", "labels", "positions", "documents", "loss_mask"}
    rows = [list(r) for r in zip(*(arrays[n].tolist() for n in ("tokens", "labels", "positions", "documents")), strict=True)]
    assert rows == [slow_row(corpora, row[0][0]) for row in rows]
    assert rows == rows_of(loader(corpora, "a", "b").batch(20, 10))
    assert np.array_equal(arrays["loss_mask"], arrays["labels"] != -100) and arrays["loss_mask"].dtype == np.bool_


@pytest.mark.parametrize(("arguments", "message"), [
    (["--step", "0"], "--step = 0 must be at least 1"),
    (["--step", "1", "--train.seq_length=4"], "did you mean 'train.seq_len'"),
    (["--step", "1", "--data.train=/nowhere/c"], "cannot read corpus file /nowhere/c.idx"),
    (["--step", "1", "--model.vocab_size=40"], "vocabulary of 40 that"),
    (["--step", "one"], "invalid int value"),
    ([], "required: --step"),
])
def test_dump_refuses_in_one_line(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
                                  message: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(folder=corpora))
    try:
        code: object = dump_batch.main([str(recipe), "--out", str(tmp_path / "b.npz"), *arguments])
    except SystemExit as ended:  # argparse's own way out
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.dump_batch: ") and error.count("\n") == 1 and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]


def test_dump_into_a_missing_directory(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(folder=corpora))
    with pytest.raises(SystemExit) as ended:
        dump_batch.main([str(recipe), "--step", "1", "--out", str(tmp_path / "none" / "b.npz")])
    assert ended.value.code == 2 and "there is no directory" in capsys.readouterr().err
