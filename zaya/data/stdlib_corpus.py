"""The default corpus: the source of Python's own standard library, which every machine that runs this program has.

Stands before a batch's path: makes data.train, data.valid and data.tokenizer where a recipe says data.source = "stdlib". One document per
file, by name; about one file in twenty is held out. The same Python version gives the same bytes, on every machine.
"""

from __future__ import annotations

import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from zaya.config import DataConfig
from zaya.data.corpus_writer import staged, was_cut_short, write_corpus
from zaya.data.tokenizer import end_token_id, load_tokenizer, train_bpe, vocabulary_size

# Tests are half of the library where it has them; Debian and Ubuntu ship it without. What is installed on top is not of the library.
# encodings is 1.4 MB of generated character tables: trivially predictable, and no text.
_LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
_HELD_OUT_EVERY = 20


def build(data: DataConfig, vocab_size: int) -> None:
    """Make data.train[0] and data.valid where neither is there, and data.tokenizer where it is not: a byte-level BPE of `vocab_size`
    entries, of training files.

    All appear together or not at all; where a process was killed between two of the last renames, the next makes them again. ValueError
    where something cannot be written, an existing tokenizer has another vocabulary, or a corpus lacks its tokenizer, the other corpus (one
    of the names may be mistyped) or half of itself.
    """
    tokenizer_path = Path(data.tokenizer)
    corpora = [(Path(f"{name}.bin"), Path(f"{name}.idx"), held_out) for name, held_out in ((data.valid, True), (data.train[0], False))]
    anew = was_cut_short([tokenizer_path, *(path for row in corpora for path in row[:2])])
    missing = [row for row in corpora if anew or not (row[0].exists() and row[1].exists())]
    half = next((path for row in missing for path in row[:2] if path.exists() and not anew), None)
    if half is not None:
        raise ValueError(f"{half} is half of a corpus; remove it, and the corpus is made of the standard library, or name new paths in "
                         "data.train and data.valid")
    have_tokenizer = tokenizer_path.exists()
    if have_tokenizer:
        tokenizer = load_tokenizer(tokenizer_path)
        if vocabulary_size(tokenizer) != vocab_size:
            raise ValueError(f"tokenizer {tokenizer_path} has {vocabulary_size(tokenizer)} entries but model.vocab_size = {vocab_size}; "
                             f"set model.vocab_size = {vocabulary_size(tokenizer)}, or name new paths in data.tokenizer, train and valid")
    elif len(missing) < len(corpora):
        present = next(row[0] for row in corpora if row not in missing)
        raise ValueError(f"corpus {present} exists but its tokenizer {tokenizer_path} does not; remove the corpus, and both are made again")
    if not missing:
        return
    if len(missing) < len(corpora):
        absent, present = (next(row[0].with_suffix("") for row in corpora if (row in missing) is gone) for gone in (True, False))
        raise ValueError(f"there is no corpus {absent}, though there is {present}; if both names are right, remove the latter, and both "
                         'are made again of the standard library; for corpora of your own set data.source = ""')

    try:
        _make(missing, tokenizer_path, tokenizer if have_tokenizer else None, vocab_size)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ValueError(f"cannot make {data.train[0]} and {data.valid}: {where}{error.strerror or error}") from None
    tqdm.write(f"made {', '.join(str(row[0].with_suffix('')) for row in missing)} of the standard library's source", file=sys.stderr)


def _make(missing: Sequence[tuple[Path, Path, bool]], tokenizer_path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    outputs = [path for row in missing for path in row[:2]]
    with staged(([] if tokenizer is not None else [tokenizer_path]) + outputs, overwrite=True) as temporary:
        if tokenizer is None:
            tokenizer = train_bpe(_documents(held_out=False, task=f"training a tokenizer of {vocab_size} entries"), vocab_size)
            temporary[0].write_text(tokenizer.to_str(pretty=True), encoding="utf-8")  # not save, whose errors are no OSError
        end_id = end_token_id(tokenizer)
        pairs = iter(temporary[-len(outputs):])
        for bin_path, _, held_out in missing:
            documents = _documents(held_out=held_out, task=f"tokenizing {bin_path.stem}")
            write_corpus(next(pairs), next(pairs), documents, tokenizer, end_id, plain_text=True)


def source_files() -> list[tuple[str, Path]]:
    """(name relative to the library, path) of every file of the corpus, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    # _sysconfigdata holds the machine's own compiler flags and paths: not source, and not the same anywhere.
    return sorted((name.as_posix(), path) for name, path in files
                  if not _LEFT_OUT & set(name.parts) and not name.name.startswith("_sysconfigdata"))


def is_held_out(name: str) -> bool:
    """Whether a file belongs to data.valid: by its name alone, so that it stays there from one Python version to the next."""
    return zlib.crc32(name.encode()) % _HELD_OUT_EVERY == 0


def _documents(*, held_out: bool, task: str) -> Iterator[str]:
    chosen = [path for name, path in source_files() if is_held_out(name) == held_out]
    for path in tqdm(chosen, desc=task, unit="file", disable=None, leave=False):
        with tokenize.open(path) as file:  # decodes as Python itself would
            yield file.read()
