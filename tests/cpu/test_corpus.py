"""Corpora: what is read back is what was stored, and every kind of broken file is one clear error before Megatron sees it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya.data import corpus as corpus_module
from zaya.data.corpus import Corpus, megatron_indexed_dataset

DOCUMENTS = [[[5, 6, 7], [8]], [[9]], [], [[1, 2], [], [3]], [[0, 4]]]  # documents of sequences; one document and one sequence are empty


def write(prefix: Path, documents: list[list[list[int]]], dtype: type[np.integer] = np.uint16) -> str:
    """A corpus written by Megatron's own builder."""
    builder = megatron_indexed_dataset()[1](f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(np.array(sum(sequences, []), dtype=dtype), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def flatten(documents: list[list[list[int]]]) -> tuple[list[int], list[bool]]:
    """Tokens of the stream, and whether each is the first of its document, by plain loops."""
    tokens, starts = [], []
    for sequences in documents:
        inside = False
        for token in sum(sequences, []):
            tokens.append(token)
            starts.append(not inside)
            inside = True
    return tokens, starts


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_reads_back_what_megatron_wrote(tmp_path: Path, dtype: type[np.integer]) -> None:
    corpus = Corpus(write(tmp_path / "c", DOCUMENTS, dtype), vocab_size=10)
    tokens, starts = flatten(DOCUMENTS)
    assert corpus.num_tokens == len(tokens)
    assert corpus.tokens(0, len(tokens)).tolist() == tokens
    assert corpus.tokens(0, 1).dtype == np.int64
    assert corpus.starts(0, len(tokens)).tolist() == starts
    assert corpus.targets(0, len(tokens)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=3), min_size=1, max_size=12), st.data())
def test_any_window_of_any_corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]], data: st.DataObject) -> None:
    tokens, starts = flatten(documents)
    if not tokens:
        return
    corpus = Corpus(write(tmp_path_factory.mktemp("any") / "c", documents), vocab_size=10)
    first = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - first))
    assert corpus.tokens(first, count).tolist() == tokens[first:first + count]
    assert corpus.starts(first, count).tolist() == starts[first:first + count]


def test_mask_marks_what_is_no_target(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    (tmp_path / "c.mask").write_bytes(bytes([1, 0, 1, 7, 0, 0, 1, 1, 1, 1]))
    assert Corpus(prefix, 10).targets(1, 5).tolist() == [False, True, True, False, False]
    (tmp_path / "c.mask").write_bytes(bytes(9))
    with pytest.raises(ValueError, match=r"c\.mask has 9 bytes for a corpus of 10 tokens"):
        Corpus(prefix, 10)


def test_a_prefix_with_a_suffix_is_told_so(tmp_path: Path) -> None:
    write(tmp_path / "c", DOCUMENTS)
    with pytest.raises(ValueError, match=rf"named without the suffix of its files: {tmp_path}/c$"):
        Corpus(str(tmp_path / "c.bin"), 10)


def patch(offset: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:offset] + data + content[offset + len(data):]


# The index of DOCUMENTS: 34 bytes of header, 7 lengths (int32), 7 pointers (int64), 6 document indices (int64).
LENGTHS, POINTERS, INDICES = 34, 34 + 7 * 4, 34 + 7 * 12
BROKEN: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {  # suffix of the file, its new content (None: no file), message
    "no idx": ("idx", lambda _: None, r"cannot read corpus file .*c\.idx: No such file"),
    "no bin": ("bin", lambda _: None, r"cannot read corpus file .*c\.bin: No such file"),
    "empty idx": ("idx", lambda _: b"", "not a Megatron index"),
    "magic": ("idx", patch(0, b"NOTMMIDX"), "not a Megatron index"),
    "short header": ("idx", lambda c: c[:20], "truncated: 20 bytes"),
    "version": ("idx", patch(9, struct.pack("<Q", 2)), "version 2; only version 1"),
    "unknown dtype": ("idx", patch(17, b"\x63"), r"dtype code 99 \(unknown\)"),
    "float dtype": ("idx", patch(17, b"\x07"), r"dtype code 7 \(float32\)"),
    "truncated idx": ("idx", lambda c: c[:-8], "has 158 bytes but its header promises 166"),
    "absurd count": ("idx", patch(18, struct.pack("<Q", 1 << 60)), "truncated or corrupt"),
    "longer idx": ("idx", lambda c: c + bytes(6), "has 172 bytes but its header promises 166"),
    "no documents": ("idx", lambda c: c[:26] + bytes(8) + c[34:INDICES], "no document indices"),
    "negative length": ("idx", patch(LENGTHS + 4, struct.pack("<i", -1)), "sequence 1 has length -1"),
    "pointer": ("idx", patch(POINTERS + 16, struct.pack("<q", 4)), "sequence 2 points at byte 4, but the lengths before it add up to 8"),
    "first document": ("idx", patch(INDICES, struct.pack("<q", 1)), "first document starts at sequence 1, not 0"),
    "falling documents": ("idx", patch(INDICES + 8, struct.pack("<q", 4)), "document index 2 is 3, below the one before it, 4"),
    "unfinished document": ("idx", patch(INDICES + 40, struct.pack("<q", 6)), "documents end at sequence 6 of 7"),
    "truncated bin": ("bin", lambda c: c[:-1], "has 19 bytes but .* describes 20"),
    "longer bin": ("bin", lambda c: c + bytes(2), "has 22 bytes but .* describes 20"),
    "empty bin": ("bin", lambda _: b"", "is empty"),
}


def break_(prefix: str, case: str) -> None:
    path = Path(f"{prefix}.{BROKEN[case][0]}")
    content = BROKEN[case][1](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_clear_line(tmp_path: Path, case: str) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    break_(prefix, case)
    with pytest.raises(ValueError, match=BROKEN[case][2]) as error:
        Corpus(prefix, 10)
    assert "\n" not in str(error.value) and "tools.tokenize_corpus" in str(error.value)


def test_checks_hold_across_chunks_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_CHECK_CHUNK", 2)
    for case in ("negative length", "pointer", "falling documents"):
        prefix = write(tmp_path / "c", DOCUMENTS)
        assert Corpus(prefix, 10).num_tokens == 10
        break_(prefix, case)
        with pytest.raises(ValueError, match=BROKEN[case][2]):
            Corpus(prefix, 10)


@pytest.mark.parametrize("documents", [[], [[]], [[[]], [[], []]]])
def test_corpus_without_tokens(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="is empty"):
        Corpus(write(tmp_path / "c", documents), 10)


def test_mode_bytes_of_a_multimodal_index_are_accepted(tmp_path: Path) -> None:
    prefix = write(tmp_path / "c", DOCUMENTS)
    with open(f"{prefix}.idx", "ab") as file:
        file.write(bytes(7))
    assert Corpus(prefix, 10).starts(0, 10).tolist() == flatten(DOCUMENTS)[1]


@pytest.mark.parametrize(("token", "dtype"), [(10, np.uint16), (65535, np.uint16), (-1, np.int32)])
def test_foreign_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: int, dtype: type[np.integer]) -> None:
    prefix = write(tmp_path / "c", [[[1, 2, 3]], [[4, token, 5]]], dtype)
    message = rf"corpus .*c holds token id {token} at token 4, .*vocabulary of 10 that"
    with pytest.raises(ValueError, match=message):
        Corpus(prefix, 10)
    monkeypatch.setattr(corpus_module, "_SCAN_BYTES", 0)  # a corpus too large to scan: found when it is read
    large = Corpus(prefix, 10)
    assert large.tokens(0, 4).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=message):
        large.tokens(3, 3)
