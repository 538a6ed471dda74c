"""The manifest of a checkpoint: what is in it, where each box lies, and a hash over every byte.

Both ends of a checkpoint meet here: write.py fills a Manifest, read.py trusts nothing but one that `Manifest.from_json` accepted.
Knows no model, no rank and no layout: a tensor is a name, a shape and boxes. docs/checkpoints.md describes the format for other readers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
"""safetensors' name of each dtype that a checkpoint can hold."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer dtype of each width: bytes pass through numpy as these, because it has no bfloat16."""

# Limits no real checkpoint comes near, so that a hostile or damaged manifest costs neither memory nor time.
# 74B on 1,024 ranks: about 8,000 tensors in 20,000 boxes of 200 bytes = 4 MB.
MAX_MANIFEST_BYTES = 128 << 20
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMS = 16
MAX_DEPTH = 16  # nesting of recipe and hf_config; levels of cuts in a tensor
MAX_TANGLED_BOXES = 2048  # boxes that no straight cut separates are compared in pairs
MAX_INT = 2**63 - 1

_HEAD = re.compile(r'\{"xxh3": "([0-9a-f]{32})",')
_HASH = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,400}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,400}(\[[0-9:,]{1,700}\])?")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}\.safetensors")  # no separator can occur: a name is never a path


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written. One line that names the file, and the tensor where there is one."""


@dataclass(frozen=True)
class Box:
    """Elements [offsets, offsets + sizes) of a logical tensor, stored as tensor `key` of `file`. `xxh3` hashes its bytes."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    xxh3: str


@dataclass(frozen=True)
class TensorEntry:
    """A logical tensor; its boxes cover it exactly, without overlap. An empty tensor has one box, itself."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class FileEntry:
    """A safetensors file: `size` in bytes; `xxh3_header` hashes everything before the first box (length, JSON, padding)."""

    size: int
    xxh3_header: str


@dataclass(frozen=True)
class Manifest:
    """Everything but the tensors' bytes. Tuples inside recipe and hf_config come back from JSON as lists."""

    step: int
    tokens: int
    tokens_by_corpus: dict[str, int]
    position: int
    recipe: dict[str, Any]
    layout: dict[str, int]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    hf_config: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """ASCII JSON. The first line holds the hash of all bytes after it, so a reader hashes before it parses anything."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["tensors"] = {name: {"dtype": t.dtype, "shape": t.shape, "boxes": [vars(box) for box in t.boxes]}
                           for name, t in self.tensors.items()}
        body["files"] = {name: vars(entry) for name, entry in self.files.items()}
        rest = f'"manifest": {json.dumps(body, allow_nan=False)}}}\n'
        return f'{{"xxh3": "{hash_bytes(rest.encode("ascii"))}",\n{rest}'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The only way in: checks hash, types, ranges, names, and that boxes tile tensors and files exactly. CheckpointError if not."""
        if not text.isascii():
            raise CheckpointError("holds bytes that are not ASCII")
        head, newline, rest = text.partition("\n")
        match = _HEAD.fullmatch(head)
        if not match or not newline:
            raise CheckpointError("does not begin with its own hash: not a manifest, or cut short")
        if hash_bytes(rest.encode("ascii")) != match[1]:
            raise CheckpointError("does not match its own hash: it was changed or cut short")
        document = _fields(parse_json(text), ("xxh3", "manifest"), "the document")
        body = _dict(document["manifest"], "manifest")
        version = body.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(f"has format_version {reprlib.repr(version)}; this program reads {FORMAT_VERSION}")
        _fields(body, [f.name for f in dataclasses.fields(cls)], "manifest")
        manifest = cls(
            step=_int(body["step"], "step"), tokens=_int(body["tokens"], "tokens"), position=_int(body["position"], "position"),
            tokens_by_corpus=_counts(body["tokens_by_corpus"], "tokens_by_corpus", 0), layout=_counts(body["layout"], "layout", 1),
            recipe=_tree(body["recipe"], "recipe"), hf_config=_tree(body["hf_config"], "hf_config"),
            tensors={name: _tensor(name, raw) for name, raw in _dict(body["tensors"], "tensors").items()},
            files={name: _file(name, raw) for name, raw in _dict(body["files"], "files").items()})
        if "world_size" not in manifest.layout:
            raise CheckpointError("layout lacks world_size")
        _check_files(manifest)
        return manifest


def load(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. CheckpointError if there is none or it is not valid; OSError if it cannot be read."""
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than {MAX_MANIFEST_BYTES}: not a manifest")
    try:
        return Manifest.from_json(raw.decode("latin-1"))  # every byte is a character; from_json refuses those that are not ASCII
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


@contextlib.contextmanager
def disk_errors(verb: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError: "cannot read PATH: No space left on device"."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot {verb} {path}: {error.strerror or error}") from error


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The hash of this format: XXH3, 128 bits, as 32 lower-case hex digits (big-endian, as the xxhash tools print it)."""
    return xxhash.xxh3_128_hexdigest(data)


def num_bytes(dtype: str, sizes: Sequence[int]) -> int:
    return math.prod(sizes) * DTYPES[dtype].itemsize


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "__metadata__":
        raise CheckpointError(f"tensor name {reprlib.repr(name)} is not 1 to 400 letters, digits, '_', '.' or '-'")
    return name


def parse_json(text: str) -> Any:
    """json.loads that raises CheckpointError for everything odd: duplicate keys, NaN, endless digits, nesting without end."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise CheckpointError("has the same key twice in one JSON object")
    return unique


def _no_constant(name: str) -> None:
    raise CheckpointError(f"holds {name}, which is not a JSON number")


def _int(value: object, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= MAX_INT:  # a bool is not a number here
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not an integer from {least} to {MAX_INT}")
    return value


def _dict(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not an object")
    return value


def _fields(value: object, names: Iterable[str], what: str) -> dict[str, Any]:
    found = _dict(value, what)
    odd = set(names) ^ set(found)
    if odd:
        raise CheckpointError(f"{what} lacks or should not have {reprlib.repr(sorted(odd)[0])}")
    return found


def _ints(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not a list of at most {MAX_DIMS} integers")
    return tuple(_int(v, what) for v in value)


def _hash(value: object, what: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not a hash of 32 hex digits")
    return value


def _counts(value: object, what: str, least: int) -> dict[str, int]:
    return {_text(key, what): _int(count, f"{what}[{reprlib.repr(key)}]", least) for key, count in _dict(value, what).items()}


def _text(value: str, what: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in value):  # JSON can spell half a surrogate pair; nothing can print or store it
        raise CheckpointError(f"{what} holds {reprlib.repr(value)}, which is not text")
    return value


def _tree(value: object, what: str) -> dict[str, Any]:
    _check_plain(_dict(value, what), what, 0)
    return _dict(value, what)


def _check_plain(value: object, what: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{what} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, str):
        _text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{what} holds a number that is not finite")
    elif isinstance(value, dict):
        for key, item in value.items():
            _text(key, what)
            _check_plain(item, what, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, what, depth + 1)


def _file(name: str, raw: object) -> FileEntry:
    what = f"file {reprlib.repr(name)}"
    if not _FILE.fullmatch(name):
        raise CheckpointError(f"{what} is not a plain *.safetensors file name")
    found = _fields(raw, ("size", "xxh3_header"), what)
    return FileEntry(_int(found["size"], f"{what}: size"), _hash(found["xxh3_header"], f"{what}: xxh3_header"))


def _tensor(name: str, raw: object) -> TensorEntry:
    what = f"tensor {reprlib.repr(check_name(name))}"
    found = _fields(raw, ("dtype", "shape", "boxes"), what)
    dtype, boxes = found["dtype"], found["boxes"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{what}: dtype {reprlib.repr(dtype)} is not one of {', '.join(DTYPES)}")
    shape = _ints(found["shape"], f"{what}: shape")
    if num_bytes(dtype, shape) > MAX_INT:
        raise CheckpointError(f"{what}: shape {reprlib.repr(shape)} is not plausible")
    if not isinstance(boxes, list):
        raise CheckpointError(f"{what}: boxes = {reprlib.repr(boxes)} is not a list")
    entry = TensorEntry(dtype, shape, tuple(_box(what, shape, box) for box in boxes))
    check_cover(what, entry)
    return entry


def _box(what: str, shape: tuple[int, ...], raw: object) -> Box:
    found = _fields(raw, ("file", "key", "offsets", "sizes", "xxh3"), f"{what}: a box")
    file, key = found["file"], found["key"]
    if not isinstance(file, str):
        raise CheckpointError(f"{what}: a box's file = {reprlib.repr(file)} is not a string")
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key == "__metadata__":
        raise CheckpointError(f"{what}: a box's key = {reprlib.repr(key)} is not a tensor name, with [start:stop,...] or without")
    offsets, sizes = _ints(found["offsets"], f"{what}: offsets"), _ints(found["sizes"], f"{what}: sizes")
    if not len(offsets) == len(sizes) == len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise CheckpointError(f"{what}: box at {reprlib.repr(offsets)} of {reprlib.repr(sizes)} is not inside shape {reprlib.repr(shape)}")
    return Box(file, key, offsets, sizes, _hash(found["xxh3"], f"{what}: xxh3"))


def check_cover(what: str, entry: TensorEntry) -> None:
    """Boxes lie inside the shape; if they do not overlap and have its volume, they are the tensor."""
    if 0 in entry.shape:
        if [box.sizes for box in entry.boxes] != [entry.shape]:
            raise CheckpointError(f"{what} is empty and needs exactly one box, of its own shape")
        return
    volume, held = math.prod(entry.shape), sum(math.prod(box.sizes) for box in entry.boxes)
    if volume != held or any(0 in box.sizes for box in entry.boxes) or not _disjoint(entry.boxes):
        raise CheckpointError(f"{what}: {len(entry.boxes)} boxes of {held} elements do not tile its {volume} elements")


def _disjoint(boxes: Sequence[Box]) -> bool:
    """Cut groups apart along any dim until single boxes remain: n log n for what any layout writes, where pairs would be n^2."""
    groups: list[tuple[Sequence[Box], int]] = [(boxes, 0)]
    while groups:
        group, depth = groups.pop()
        if len(group) == 1:
            continue
        parts = _cut_apart(group) if depth < MAX_DEPTH else [group]
        if len(parts) > 1:
            groups += [(part, depth + 1) for part in parts]
        elif len(group) > MAX_TANGLED_BOXES or any(_overlap(a, b) for a, b in itertools.combinations(group, 2)):
            return False
    return True


def _cut_apart(group: Sequence[Box]) -> list[Sequence[Box]]:
    """Groups that a plane across some dim separates; [group] where no dim has one."""
    for dim in range(len(group[0].sizes)):
        parts: list[Sequence[Box]] = []
        part: list[Box] = []
        end = 0
        for box in sorted(group, key=lambda box: box.offsets[dim]):
            if part and box.offsets[dim] >= end:
                parts.append(part)
                part = []
            part.append(box)
            end = max(end, box.offsets[dim] + box.sizes[dim])
        if parts:
            return [*parts, part]
    return [group]


def _overlap(a: Box, b: Box) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True))


def _check_files(manifest: Manifest) -> None:
    """Each file is a header and the boxes it holds, nothing else; each key is one box."""
    payload = dict.fromkeys(manifest.files, 0)
    keys = set()
    for name, entry in manifest.tensors.items():
        for box in entry.boxes:
            if box.file not in payload:
                raise CheckpointError(f"tensor {name!r} has a box in {reprlib.repr(box.file)}, which is not in the list of files")
            if (box.file, box.key) in keys:
                raise CheckpointError(f"two boxes are stored as {box.key!r} in {box.file}")
            keys.add((box.file, box.key))
            payload[box.file] += num_bytes(entry.dtype, box.sizes)
    unused = set(payload) - {file for file, _ in keys}
    if unused:
        raise CheckpointError(f"file {sorted(unused)[0]!r} holds no box")
    for file, held in payload.items():
        header = manifest.files[file].size - held  # 8 bytes of length and JSON padded to a multiple of 8
        if not 16 <= header <= MAX_HEADER_BYTES + 8 or header % 8:
            raise CheckpointError(f"file {file!r} has {manifest.files[file].size} bytes for boxes of {held} bytes and a header")
