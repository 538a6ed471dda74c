"""Documents as strings, from the files that people keep text in: plain text, .jsonl (.gz, .zst), .parquet, and directories of them.

Stands before a batch's path: tokenisation reads documents from here, training never does. Knows no tokenizer and no corpus.
Every error is a ValueError that names the file and the line or row.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_PARQUET_BATCH = 256  # rows decoded at a time


def list_files(inputs: Iterable[Path]) -> list[Path]:
    """The files to read, directories replaced by everything below them but hidden files, by name. ValueError where there is nothing."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and not any(part[0] == "." for part in p.relative_to(path).parts))
            if not found:
                raise ValueError(f"input directory {path} holds no files; name a directory or file with text")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"input {path} does not exist; name a text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a directory")
    return files


def read_documents(files: Iterable[Path], text_key: str, advance: Callable[[int], object] = lambda _: None) -> Iterator[str]:
    """Every document of every file, in order. A text file is one document; `text_key` is the field (column) of the others.

    advance(n) is told of every n bytes read, for a progress bar.
    """
    for path in files:
        name = path.name.lower()
        try:
            with open(path, "rb") as raw:
                if name.endswith(_JSON_SUFFIXES):
                    documents = _json_lines(path, raw, text_key)
                elif name.endswith(".parquet"):
                    documents = _parquet(path, raw, text_key)
                else:
                    documents = _text(path, raw)
                told = 0
                for document in documents:
                    advance(raw.tell() - told)
                    told = raw.tell()
                    yield document
        except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
            reason = getattr(error, "strerror", None) or f"{error}; the file is damaged or no such archive"
            raise ValueError(f"cannot read {path}: {reason}") from None


def _text(path: Path, raw: IO[bytes]) -> Iterator[str]:
    try:
        yield raw.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out") from None


def _json_lines(path: Path, raw: IO[bytes], text_key: str) -> Iterator[str]:
    lines: Iterable[bytes] = raw
    if path.name.lower().endswith(".gz"):
        lines = gzip.open(raw)
    elif path.name.lower().endswith(".zst"):
        lines = io.BufferedReader(_ZstdStream(raw), 1 << 20)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8" if isinstance(error, ValueError) else "too deep"
            raise ValueError(f"{path}, line {number}: not valid JSON ({reason}); each line must be one JSON object") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}, not an object with key {text_key!r}")
        if text_key not in record:
            raise ValueError(f"{path}, line {number}: no key {text_key!r} among {', '.join(map(repr, record)) or 'none'}; set --text-key")
        yield _checked(record[text_key], f"{path}, line {number}", text_key)


def _parquet(path: Path, raw: IO[bytes], text_key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(raw)
        if text_key not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column {text_key!r} among {', '.join(map(repr, file.schema_arrow.names))}; set --text-key")
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _checked(text, f"{path}, row {number}", text_key)
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}; is it a parquet file, and whole?") from None


def _checked(text: object, where: str, text_key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_key!r} is {'null' if text is None else 'of type ' + type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {text_key!r} has half of a surrogate pair, which is no text; remove it") from None
    return text


class _ZstdStream(io.RawIOBase):
    """Bytes of a zstd file of one or more frames. zstandard's own reader takes a file that breaks off for one that ends."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._input = b""
        self._output = memoryview(b"")
        self._inside = False  # a frame has begun and not ended

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # the buffer protocol has no type before Python 3.12
        while not self._output:
            self._input = self._input or self._raw.read(1 << 17)
            if not self._input:
                if self._inside:
                    raise OSError("the zstd stream breaks off")
                return 0
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise OSError(f"not a zstd stream ({error})") from None
            self._inside, self._input = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
        taken = min(len(buffer), len(self._output))
        buffer[:taken], self._output = self._output[:taken], self._output[taken:]
        return taken
