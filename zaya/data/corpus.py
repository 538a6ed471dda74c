"""A tokenised corpus on disk: Megatron's PREFIX.bin / PREFIX.idx (and PREFIX.mask) as one checked stream of tokens.

Lowest stage of a batch's path: the loader asks for windows of the stream, this file answers from memory maps. Everything that can be wrong
with the files is found before Megatron's reader sees them (it asserts or crashes), and no token id outside the vocabulary ever leaves here.
Knows nothing of rows, epochs, blends or labels.
"""

from __future__ import annotations

import bisect
import logging
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices: 34 bytes
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_CHECK_CHUNK = 1 << 20  # index entries (or tokens) looked at together: bounds memory, not a tuned number
_SCAN_BYTES = 64 << 20  # corpora below this are scanned whole for bad ids when opened (about 0.1 s); larger ones as rows are read
_REMAKE = "make it again with tools.tokenize_corpus, or copy it again"


def megatron_indexed_dataset() -> tuple[type[IndexedDataset], type[IndexedDatasetBuilder]]:
    """Megatron's reader and writer of the format. Imported late because that takes seconds, and without its advertisements."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Apex and TransformerEngine are not installed: true, and of no interest to a reader of files
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)
    return IndexedDataset, IndexedDatasetBuilder


class CorpusError(ValueError):
    """A corpus is missing, damaged, or of another vocabulary. One line that names the file."""


class Corpus:
    """One stream of `num_tokens` token ids in stored order, with its document borders and its loss mask.

    Nothing of the index is copied: a window costs a few bisections in the memory map, so 10^9 documents cost no memory.
    CorpusError where a file is missing, malformed or holds an id outside [0, vocab_size).
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.num_tokens = _check_files(prefix)
        self._dataset = megatron_indexed_dataset()[0](prefix)
        self._itemsize = np.dtype(self._dataset.index.dtype).itemsize
        self._mask = _open_mask(Path(f"{prefix}.mask"), self.num_tokens)
        if self.num_tokens * self._itemsize < _SCAN_BYTES:
            for start in range(0, self.num_tokens, _CHECK_CHUNK):
                self.tokens(start, min(_CHECK_CHUNK, self.num_tokens - start))

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Token ids [start, start + count) of the stream."""
        assert 0 <= start and start + count <= self.num_tokens, (start, count, self.num_tokens)
        stored = self._dataset.bin_reader.read(self._dataset.index.dtype, count, start * self._itemsize)
        if count and (stored.max() >= self.vocab_size or stored.min() < 0):
            at = int(np.flatnonzero((stored >= self.vocab_size) | (stored < 0))[0])
            raise CorpusError(f"corpus {self.prefix} holds token id {stored[at]} at token {start + at}, outside the vocabulary of "
                             f"{self.vocab_size} that model.vocab_size or data.tokenizer gives; use the tokenizer it was made with")
        return stored.astype(np.int64)

    def starts(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, start + count) are the first of a document. From the .idx alone, never from token ids."""
        index = self._dataset.index
        # bisect, not np.searchsorted: the file's int64 arrays are unaligned, and numpy would copy all of them for every call.
        first_sequence = bisect.bisect_left(index.sequence_pointers, start * self._itemsize)
        stop_sequence = bisect.bisect_left(index.sequence_pointers, (start + count) * self._itemsize)
        first = bisect.bisect_left(index.document_indices, first_sequence)
        stop = bisect.bisect_left(index.document_indices, stop_sequence)
        pointers = index.sequence_pointers[index.document_indices[first:stop]]
        starts = np.zeros(count, dtype=np.bool_)
        starts[pointers // self._itemsize - start] = True
        return starts

    def targets(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, start + count) may be predicted: all of them without a mask file."""
        if self._mask is None:
            return np.ones(count, dtype=np.bool_)
        return np.asarray(self._mask[start:start + count]) != 0


def _check_files(prefix: str) -> int:
    """Number of tokens, after checking every promise that the header and index of PREFIX make about each other and the .bin."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    sizes = {path: _size(path) for path in (idx, bin_)}
    itemsize, num_sequences, num_documents = _check_header(idx, sizes[idx])
    if num_sequences == 0 or sizes[bin_] == 0:
        raise CorpusError(f"corpus {prefix} is empty ({num_sequences} sequences, {sizes[bin_]} bytes in {bin_}); {_REMAKE}")
    lengths = np.memmap(idx, np.int32, "r", offset=_HEADER.size, shape=num_sequences)
    pointers = np.memmap(idx, np.int64, "r", offset=_HEADER.size + 4 * num_sequences, shape=num_sequences)
    documents = np.memmap(idx, np.int64, "r", offset=_HEADER.size + 12 * num_sequences, shape=num_documents)
    end = _check_sequences(idx, lengths, pointers, itemsize)
    _check_documents(idx, documents, num_sequences)
    if end != sizes[bin_]:
        raise CorpusError(f"corpus file {bin_} has {sizes[bin_]} bytes but {idx} describes {end}: truncated, or another corpus; {_REMAKE}")
    return end // itemsize


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return file.seek(0, 2)
    except OSError as error:
        advice = "make the corpus with tools.tokenize_corpus or correct the prefix in the recipe"
        named = path.with_suffix("")  # .bin.idx where the prefix names a file
        if named.suffix in (".bin", ".idx") and named.exists():
            advice = f"a corpus is named without the suffix of its files: {named.with_suffix('')}"
        raise CorpusError(f"cannot read corpus file {path}: {error.strerror}; {advice}") from None


def _check_header(idx: Path, size: int) -> tuple[int, int, int]:
    """(bytes per token, sequences, document indices) of an .idx whose header and size agree."""
    with open(idx, "rb") as file:
        head = file.read(_HEADER.size)
    if head[:len(_MAGIC)] != _MAGIC:
        raise CorpusError(f"corpus index {idx} starts with {head[:len(_MAGIC)]!r}, not {_MAGIC!r}: not a Megatron index; {_REMAKE}")
    if len(head) < _HEADER.size:
        raise CorpusError(f"corpus index {idx} is truncated: {size} bytes, its header alone has {_HEADER.size}; {_REMAKE}")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(head)
    if version != 1:
        raise CorpusError(f"corpus index {idx} has version {version}; only version 1 is known; {_REMAKE}")
    name = _DTYPES.get(code)
    if name is None or name.startswith("float"):
        raise CorpusError(f"corpus index {idx} has dtype code {code} ({name or 'unknown'}), not one of integer tokens "
                         f"(uint16 is 8, int32 is 4); {_REMAKE}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_documents
    if size not in (expected, expected + num_sequences):  # the optional tail is one mode byte per sequence (multimodal corpora)
        raise CorpusError(f"corpus index {idx} has {size} bytes but its header promises {expected} ({num_sequences} sequences, "
                         f"{num_documents} document indices): truncated or corrupt; {_REMAKE}")
    if num_documents == 0:
        raise CorpusError(f"corpus index {idx} has no document indices, at least the leading 0 belongs there; {_REMAKE}")
    return np.dtype(name).itemsize, num_sequences, num_documents


def _check_sequences(idx: Path, lengths: np.memmap, pointers: np.memmap, itemsize: int) -> int:
    """Bytes that all sequences take, lying one after the other."""
    end = 0
    for at in range(0, len(lengths), _CHECK_CHUNK):
        chunk = lengths[at:at + _CHECK_CHUNK].astype(np.int64)
        if chunk.min() < 0:
            bad = int(np.argmin(chunk))
            raise CorpusError(f"corpus index {idx} is corrupt: sequence {at + bad} has length {chunk[bad]}; {_REMAKE}")
        ends = end + np.cumsum(chunk) * itemsize
        wrong = np.flatnonzero(pointers[at:at + _CHECK_CHUNK] != ends - chunk * itemsize)
        if len(wrong):
            bad = int(wrong[0])
            raise CorpusError(f"corpus index {idx} is corrupt: sequence {at + bad} points at byte {pointers[at + bad]}, but the lengths "
                             f"before it add up to {ends[bad] - chunk[bad] * itemsize}; {_REMAKE}")
        end = int(ends[-1])
    return end


def _check_documents(idx: Path, documents: np.memmap, num_sequences: int) -> None:
    previous = 0
    if documents[0] != 0:
        raise CorpusError(f"corpus index {idx} is corrupt: its first document starts at sequence {documents[0]}, not 0; {_REMAKE}")
    for at in range(0, len(documents), _CHECK_CHUNK):
        chunk = np.concatenate([[previous], documents[at:at + _CHECK_CHUNK]])
        falls = np.flatnonzero(np.diff(chunk) < 0)
        if len(falls):
            bad = int(falls[0])
            raise CorpusError(f"corpus index {idx} is corrupt: document index {at + bad} is {chunk[bad + 1]}, below the one before it, "
                             f"{chunk[bad]}; {_REMAKE}")
        previous = int(chunk[-1])
    if previous != num_sequences:
        raise CorpusError(f"corpus index {idx} is corrupt: its documents end at sequence {previous} of {num_sequences}; {_REMAKE}")


def _open_mask(path: Path, num_tokens: int) -> np.memmap | None:
    if not path.exists():
        return None
    size = _size(path)
    if size != num_tokens:
        raise CorpusError(f"loss mask {path} has {size} bytes for a corpus of {num_tokens} tokens; it needs one byte per token "
                         "(0 = not a target), or remove it")
    return np.memmap(path, np.uint8, "r")
