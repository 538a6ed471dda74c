"""Documents to a corpus: tokenised by one or many processes into Megatron's PREFIX.bin / PREFIX.idx, the same bytes for any number of them.

Stands before a batch's path: its files are what corpus.py reads. Knows nothing of where the documents come from.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import glob
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zaya.data.corpus import megatron_indexed_dataset
from zaya.data.tokenizer import vocabulary_size
from zaya.preemption import end_with_parent, unwinding

_PORTION_CHARS = 1 << 18  # characters sent to a process at once: about 0.1 s of work
_WAITING_PORTIONS = 4  # per process, read ahead but not yet written: bounds memory on inputs of any size
_UINT16_VOCAB = 65500  # Megatron's own rule (DType.optimal_dtype), so that its tools write the same bytes


@dataclass(frozen=True)
class Written:
    """What a corpus holds."""

    num_documents: int
    num_tokens: int
    num_empty: int
    """Documents without a token, which are left out."""


@contextlib.contextmanager
def staged(paths: list[Path], *, overwrite: bool = False) -> Iterator[list[Path]]:
    """Temporary paths beside `paths`, renamed to them if the block succeeds, removed if it does not (or a signal ends it), with any
    directory made for them. Those of a process that was killed go as well.

    The last path is the one without which the others mean nothing: it appears last. A rename that fails takes back those before it; a kill
    between two leaves the first ones without the last, which `was_cut_short` tells. ValueError if a path exists (and may not be
    overwritten) or cannot be written.
    """
    folder = next((path for path in paths if path.is_dir()), None)
    if folder:
        raise ValueError(f"output {folder} is a directory; name a file")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"output {existing[0]} exists; remove it, name another one or pass --overwrite")
    resolved = [path.resolve() for path in paths]
    twice = next((path for path, file in zip(paths, resolved) if resolved.count(file) > 1), None)
    if twice is not None:
        raise ValueError(f"output {twice} is named for two files; use other names")
    made: list[Path] = []
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    with unwinding(), contextlib.ExitStack() as locks:
        try:
            for path, temp in zip(paths, temporary, strict=True):
                try:
                    for parent in reversed([p for p in path.parents if not p.exists()]):
                        parent.mkdir()
                        made.append(parent)
                    _remove_stale(path)
                    locks.enter_context(_locked(temp))
                except OSError as error:
                    raise ValueError(f"cannot write {path}: {error.strerror}; name an output in a directory that can be written") from None
            yield temporary
            for temp in temporary:
                _sync(temp)
            paths[-1].unlink(missing_ok=True)  # never a new .bin under an old .idx
            _rename(temporary, paths)
            made = []
        finally:
            for temp in temporary:
                with contextlib.suppress(OSError):  # the directory may be gone or read-only, which is reported above
                    temp.unlink(missing_ok=True)
            for parent in reversed(made):
                with contextlib.suppress(OSError):  # not empty: someone else uses it by now
                    parent.rmdir()


def was_cut_short(paths: list[Path]) -> bool:
    """Whether a process that had them `staged` was killed between its renames: of each path either the file or that process' temporary one
    is there, and of the last the temporary one."""
    for temp in paths[-1].parent.glob(f".{glob.escape(paths[-1].name)}.*.tmp"):
        number = temp.name.split(".")[-2]
        if all(path.exists() != path.with_name(f".{path.name}.{number}.tmp").exists() for path in paths):
            with contextlib.suppress(OSError), open(temp, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it is alive, or there are no locks
                return True
    return False


def _rename(temporary: list[Path], paths: list[Path]) -> None:
    """All of them or, after an error, none: what an older file held that was replaced until then is gone."""
    try:
        for temp, path in zip(temporary, paths, strict=True):
            os.replace(temp, path)
    except BaseException:
        for temp, path in zip(temporary, paths, strict=True):
            if not temp.exists():
                path.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in paths}:
        _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _locked(path: Path) -> BinaryIO:
    """A new file that `_remove_stale` of other processes leaves alone while it is open, where the file system's locks reach them."""
    file = open(path, "wb")
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _remove_stale(path: Path) -> None:
    """Temporary files of `path` that nobody writes."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(stale, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: another process has it, or there are no locks
            stale.unlink()


def write_corpus(bin_path: Path, idx_path: Path, documents: Iterable[str], tokenizer: Tokenizer, end_id: int, *, workers: int = 1,
                 plain_text: bool = False, advance: Callable[[int], object] = lambda _: None) -> Written:
    """Tokenise documents in order, each followed by `end_id`, as one sequence per document. advance(n): n more documents are written.

    plain_text: the spelling of a special token inside a document is ordinary text, not the token. ValueError if there is no token at all.
    """
    vocab_size = vocabulary_size(tokenizer)
    dtype = np.uint16 if vocab_size < _UINT16_VOCAB else np.int32
    encoder = _Encoder(tokenizer.to_str(), end_id, dtype, plain_text)
    builder = megatron_indexed_dataset()[1](str(bin_path), dtype=dtype)
    num_documents = num_tokens = num_empty = 0
    try:
        for portion in _in_order(_portions(documents), encoder, workers):
            for ids in portion:
                if len(ids):
                    builder.add_document(ids, [len(ids)])
                num_documents, num_tokens, num_empty = num_documents + bool(len(ids)), num_tokens + len(ids), num_empty + (len(ids) == 0)
            advance(len(portion))
    finally:
        builder.data_file.close()
    if num_tokens == 0:
        raise ValueError(f"the corpus would be empty: {num_empty} documents and no text in them; check the inputs")
    builder.finalize(str(idx_path))
    return Written(num_documents, num_tokens, num_empty)


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for document in documents:
        portion.append(document)
        size += len(document) + 1
        if size >= _PORTION_CHARS:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


class _Encoder:
    """Texts to ids. Pickles as the tokenizer's own text, so that it can be sent to a process once."""

    def __init__(self, tokenizer: str, end_id: int, dtype: type[np.integer], plain_text: bool) -> None:
        self._settings = (tokenizer, end_id, dtype, plain_text)
        self._end_id, self._dtype = end_id, dtype
        self._tokenizer = Tokenizer.from_str(tokenizer)
        self._tokenizer.encode_special_tokens = plain_text

    def __reduce__(self) -> tuple[type[_Encoder], tuple[str, int, type[np.integer], bool]]:
        return _Encoder, self._settings

    def __call__(self, texts: list[str]) -> list[NDArray]:
        """Ids per text, ended by the end token (once, where the tokenizer's own template ends with it); an empty text stays empty."""
        encoded = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch_fast(texts), strict=True):
            ids = encoding.ids if text else []
            encoded.append(np.array(ids if not ids or ids[-1] == self._end_id else ids + [self._end_id], dtype=self._dtype))
        return encoded


def _in_order(portions: Iterator[list[str]], encoder: _Encoder, workers: int) -> Iterator[list[NDArray]]:
    """encoder(portion) in the order of the portions, by `workers` processes (in this one if it is 1)."""
    if workers == 1:
        yield from map(encoder, portions)
        return
    # spawn, not fork: the parent has threads (tokenizers', torch's) whose locks a forked child would inherit held.
    with _broken_pipes_raise(), ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,)) as pool:
        waiting: collections.deque[Future[list[NDArray]]] = collections.deque()
        try:
            for portion in portions:
                with _shielded():  # submitting starts the processes
                    waiting.append(pool.submit(_encode_in_worker, portion))
                if len(waiting) >= _WAITING_PORTIONS * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _shielded() -> Iterator[None]:
    """A process that starts inside leaves Ctrl-C, which a terminal sends it too, to its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _broken_pipes_raise() -> Iterator[None]:
    """While processes are fed: that one has died is an exception here, not the end by SIGPIPE that tools let their readers cause."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


_worker_encoder: _Encoder
"""In a worker process only: arrives with its start, not with every portion."""


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism; the library looks at its first batch
    _worker_encoder = encoder


def _encode_in_worker(texts: list[str]) -> list[NDArray]:
    return _worker_encoder(texts)
