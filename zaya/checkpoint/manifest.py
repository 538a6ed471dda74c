"""The manifest of a checkpoint: what is in it, where each box lies, and a hash over every byte.

Both ends of a checkpoint meet here: save.py and write.py fill a Manifest, read.py trusts only one that `Manifest.from_json` accepted.
Knows no model, no rank and no layout: a tensor is a name, a shape and boxes. docs/checkpoints.md describes the format for other readers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zaya.checkpoint.boxes import Box, Boxes, Cut, bounds_of, inside, tile
from zaya.checkpoint.directory import MANIFEST
from zaya.checkpoint.errors import CheckpointError, ForeignError, RefusedError
from zaya.checkpoint.hashing import hash_bytes, new_hash
from zaya.dtypes import STORED_DTYPES

FORMAT_VERSION = 1
COLUMNS_VERSION = 2
PLAIN_BOXES = 512
"""A manifest of more boxes is written by column (version 2): a sixth of the bytes, a twentieth of the time, and hard to read by eye."""

# Limits that real checkpoints keep, so that a hostile or damaged manifest costs neither memory nor time without end.
# 8B on 1,024 ranks, nothing but data parallel: 5,052 tensors in 641,444 boxes, by column 21 MB, 33 bytes a box; boxes grow as ranks: 336 MB
# on 16,384. The next power of two. Reading takes the text and about twice as much again (21 + 44 MB there), so 1.6 GB at the limit.
MAX_MANIFEST_BYTES = 512 << 20
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_VALUES = 1 << 22  # of JSON: as objects they take up to 25 bytes for each byte of text; by column there are few, box by box 15 a box
MAX_DIMS = 16
MAX_DEPTH = 16  # nesting of recipe and hf_config
MAX_INT = 2**63 - 1

_HEAD = re.compile(r'\{"xxh3": "([0-9a-f]{32})",')
_HASH = re.compile(r"[0-9a-f]{32}")
_HASHES = re.compile(r"[0-9a-f]*")
_NUMBERS = re.compile(r"(?:(?:0|[1-9][0-9]{0,17})(?: (?:0|[1-9][0-9]{0,17}))*+)?")  # below 10^18: no sum of two overflows
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,400}")
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,400}(\[[0-9:,]{1,700}\])?")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}\.safetensors")  # no separator can occur: a name is never a path


@dataclass(frozen=True)
class TensorEntry:
    """A logical tensor; its boxes cover it exactly, without overlap. An empty tensor has one box, itself."""

    dtype: str
    shape: tuple[int, ...]
    boxes: Sequence[Box]
    """From `Manifest.from_json` always `Boxes`."""


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

    def to_json(self) -> str:
        """ASCII JSON. The first line holds the hash of all bytes after it, so a reader hashes before it parses anything."""
        body: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if sum(len(entry.boxes) for entry in self.tensors.values()) > PLAIN_BOXES:
            body |= {"format_version": COLUMNS_VERSION, **_columns(self)}
        else:
            body["tensors"] = ((name, {"dtype": t.dtype, "shape": t.shape, "boxes": [vars(box) for box in t.boxes]})
                               for name, t in self.tensors.items())
            body["files"] = {name: vars(entry) for name, entry in self.files.items()}
            body["format_version"] = FORMAT_VERSION
        parts = ["", '"manifest": ', *_spell(body), "}\n"]
        digest = new_hash()
        for part in parts:
            digest.update(part.encode("ascii"))
        parts[0] = f'{{"xxh3": "{digest.hexdigest()}",\n'
        return "".join(parts)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The only way in: checks hash, types, ranges, names, and that boxes tile tensors and files exactly. CheckpointError if not, a
        ForeignError where the hash is right."""
        _check_seal(text)
        try:
            return cls._from_sealed(text)
        except CheckpointError as error:
            raise ForeignError(str(error)) from None

    @classmethod
    def _from_sealed(cls, text: str) -> Manifest:
        body = _body(text)
        version = body.pop("format_version", None)
        if type(version) is not int or version not in (FORMAT_VERSION, COLUMNS_VERSION):
            raise CheckpointError(f"has format_version {reprlib.repr(version)}; this program reads {FORMAT_VERSION} and {COLUMNS_VERSION}")
        names = [f.name for f in dataclasses.fields(cls)] + ["cuts"] * (version == COLUMNS_VERSION)
        _fields(body, names, f"manifest of format_version {version}")
        tensors, files = _plain_tensors(body) if version == FORMAT_VERSION else _column_tensors(body)
        manifest = cls(
            step=_int(body["step"], "step"), tokens=_int(body["tokens"], "tokens"), position=_int(body["position"], "position"),
            tokens_by_corpus=_counts(body["tokens_by_corpus"], "tokens_by_corpus", 0), layout=_counts(body["layout"], "layout", 1),
            recipe=_recipe(body["recipe"]), hf_config=_tree(body["hf_config"], "hf_config"), tensors=tensors, files=files)
        if "world_size" not in manifest.layout:
            raise CheckpointError("layout lacks world_size")
        return manifest


def _spell(body: Mapping[str, Any]) -> Iterator[str]:
    """json.dumps, with objects that come pair by pair: a large manifest is in memory twice while it is written, not five times."""
    start = "{"
    for key, value in body.items():
        yield f"{start}{json.dumps(key)}: "
        start = ", "
        if isinstance(value, Iterator):
            yield "{"
            for number, (name, item) in enumerate(value):
                yield f"{', ' if number else ''}{json.dumps(name)}: {json.dumps(item, allow_nan=False)}"
            yield "}"
        else:
            yield json.dumps(value, allow_nan=False)
    yield "}"


def _check_seal(text: str) -> None:
    """CheckpointError: the first line is not the hash of all others."""
    if not text.isascii():
        raise CheckpointError("holds bytes that are not ASCII")
    end = text.find("\n")
    match = _HEAD.fullmatch(text, 0, max(end, 0))
    if not match:
        raise CheckpointError("does not begin with its own hash: not a manifest, or cut short")
    if hash_bytes(memoryview(text.encode("ascii"))[end + 1 :]) != match[1]:
        raise CheckpointError("does not match its own hash: it was changed or cut short")


def _body(text: str) -> dict[str, Any]:
    """The manifest's object."""
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise CheckpointError(f"holds more than {MAX_VALUES} values: not a manifest")
    return _dict(_fields(parse_json(text), ("xxh3", "manifest"), "the document")["manifest"], "manifest")


def load(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. CheckpointError if there is none or it is not valid; OSError if it cannot be read."""
    path = directory / MANIFEST
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{directory} is not a checkpoint: its {MANIFEST} is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, more than {MAX_MANIFEST_BYTES}: not a manifest")
    try:
        return Manifest.from_json(raw.decode("latin-1"))  # every byte is a character; from_json refuses those that are not ASCII
    except CheckpointError as error:
        raise type(error)(f"{path} {error}") from None  # a ForeignError stays one: writers spare what it is about


def load_replaceable(directory: Path) -> Manifest | None:
    """The manifest of what a writer of this step finds in its place; None: nothing, or the remains of a checkpoint. ForeignError: another
    program's, which must stay as it is."""
    try:
        return load(directory)
    except ForeignError as error:
        raise ForeignError(f"{error}; it is not replaced: move it away to write this step again") from None
    except CheckpointError:
        return None


def num_bytes(dtype: str, sizes: Sequence[int]) -> int:
    return math.prod(sizes) * STORED_DTYPES[dtype].itemsize


def check_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "__metadata__":
        raise RefusedError(f"tensor name {reprlib.repr(name)} is not 1 to 400 letters, digits, '_', '.' or '-'")
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


def _recipe(value: object) -> dict[str, Any]:
    """Section -> key -> value, so that its readers need not look."""
    return {section: _dict(table, f"recipe[{reprlib.repr(section)}]") for section, table in _tree(value, "recipe").items()}


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


def _dtype(what: str, dtype: object) -> str:
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise CheckpointError(f"{what}: dtype {reprlib.repr(dtype)} is not one of {', '.join(STORED_DTYPES)}")
    return dtype


def _check_size(what: str, dtype: str, shape: tuple[int, ...]) -> None:
    if num_bytes(dtype, shape) > MAX_INT:
        raise CheckpointError(f"{what}: shape {reprlib.repr(shape)} is not plausible")


def _key(what: str, key: object) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key == "__metadata__":
        raise CheckpointError(f"{what}: a box's key = {reprlib.repr(key)} is not a tensor name, with [start:stop,...] or without")
    return key


def _tensor(name: str, raw: object) -> TensorEntry:
    what = f"tensor {reprlib.repr(check_name(name))}"
    found = _fields(raw, ("dtype", "shape", "boxes"), what)
    dtype, shape = _dtype(what, found["dtype"]), _ints(found["shape"], f"{what}: shape")
    _check_size(what, dtype, shape)
    entry = TensorEntry(dtype, shape, tuple(_box(what, shape, box) for box in _list(found["boxes"], f"{what}: boxes")))
    check_cover(what, entry)
    return entry


def _box(what: str, shape: tuple[int, ...], raw: object) -> Box:
    found = _fields(raw, ("file", "key", "offsets", "sizes", "xxh3"), f"{what}: a box")
    file = found["file"]
    if not isinstance(file, str):
        raise CheckpointError(f"{what}: a box's file = {reprlib.repr(file)} is not a string")
    offsets, sizes = _ints(found["offsets"], f"{what}: offsets"), _ints(found["sizes"], f"{what}: sizes")
    if not len(offsets) == len(sizes) == len(shape) or any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
        raise CheckpointError(f"{what}: box at {reprlib.repr(offsets)} of {reprlib.repr(sizes)} is not inside shape {reprlib.repr(shape)}")
    return Box(file, _key(what, found["key"]), offsets, sizes, _hash(found["xxh3"], f"{what}: xxh3"))


def check_cover(what: str, entry: TensorEntry) -> None:
    """CheckpointError unless the boxes, which lie inside the shape, are the tensor: each element once."""
    _check_tile(what, bounds_of(entry.boxes, len(entry.shape)), entry.shape)


def _check_tile(what: str, bounds: np.ndarray, shape: tuple[int, ...]) -> None:
    if tile(bounds, shape):
        return
    if 0 in shape:
        raise CheckpointError(f"{what} is empty and needs exactly one box, of its own shape")
    held = sum(bounds[:, 1].prod(axis=1).tolist())
    raise CheckpointError(f"{what}: {len(bounds)} boxes of {held} elements do not tile its {math.prod(shape)} elements")


def _check_keys(tensors: Mapping[str, TensorEntry]) -> None:
    """Each key is one box. Keys of our writer are, as tensors' names differ and boxes of one do not overlap."""
    if all(isinstance(entry.boxes, Boxes) and entry.boxes.keys is None for entry in tensors.values()):
        return
    keys = set()
    for entry in tensors.values():
        for box in entry.boxes:
            if (box.file, box.key) in keys:
                raise CheckpointError(f"two boxes are stored as {box.key!r} in {box.file}")
            keys.add((box.file, box.key))


def _check_files(tensors: Mapping[str, TensorEntry], files: Mapping[str, FileEntry]) -> None:
    """Each file is a header and the boxes it holds, nothing else; each key is one box."""
    _check_keys(tensors)
    total = sum(num_bytes(entry.dtype, entry.shape) for entry in tensors.values())
    if total > MAX_INT:
        raise CheckpointError(f"tensors of {total} bytes are not plausible")
    element_bytes: dict[int, int] = {}  # by cut: of all its tensors
    cuts: dict[int, Cut] = {}
    for entry in tensors.values():
        assert isinstance(entry.boxes, Boxes)
        cut = entry.boxes.cut
        cuts[id(cut)] = cut
        element_bytes[id(cut)] = element_bytes.get(id(cut), 0) + STORED_DTYPES[entry.dtype].itemsize
    places = np.concatenate([np.empty(0, dtype=np.int32), *(cut.files for cut in cuts.values())])
    payload, count = np.zeros(len(files), dtype=np.int64), np.bincount(places, minlength=len(files))
    if cuts:
        np.add.at(payload, places, np.concatenate([cut.volumes * element_bytes[identity] for identity, cut in cuts.items()]))
    for (file, stored), held, boxes in zip(files.items(), payload.tolist(), count.tolist(), strict=True):
        if not boxes:
            raise CheckpointError(f"file {file!r} holds no box")
        header = stored.size - held  # 8 bytes of length and JSON padded to a multiple of 8
        if not 16 <= header <= MAX_HEADER_BYTES + 8 or header % 8:
            raise CheckpointError(f"file {file!r} has {stored.size} bytes for boxes of {held} bytes and a header")


# ---------------------------------------------------------------------------------------------------------------- version 1: box by box


def _plain_tensors(body: dict[str, Any]) -> tuple[dict[str, TensorEntry], dict[str, FileEntry]]:
    files = {name: _file(name, raw) for name, raw in _dict(body["files"], "files").items()}
    names = list(files)
    places = {name: place for place, name in enumerate(names)}
    tensors = {}
    for name, raw in _dict(body["tensors"], "tensors").items():
        entry = _tensor(name, raw)
        try:
            tensors[name] = dataclasses.replace(entry, boxes=Boxes.of(name, entry.shape, entry.boxes, places, names))
        except KeyError as error:
            file = reprlib.repr(error.args[0])
            raise CheckpointError(f"tensor {name!r} has a box in {file}, which is not in the list of files") from None
    _check_files(tensors, files)
    return tensors, files


# ---------------------------------------------------------------------------------------------------------------- version 2: by column


def _columns(manifest: Manifest) -> dict[str, Any]:
    """`tensors`, `cuts` and `files` of version 2."""
    names = list(manifest.files)
    places = {name: place for place, name in enumerate(names)}
    columns = {name: Boxes.of(name, entry.shape, entry.boxes, places, names) for name, entry in manifest.tensors.items()}
    numbers: dict[object, int] = {}
    cuts: list[Cut] = []
    cut_of: dict[str, int] = {}
    for name, boxes in columns.items():
        cut = boxes.cut
        content = (cut.shape, hash_bytes(cut.files.tobytes()), hash_bytes(cut.bounds.tobytes()))
        cut_of[name] = numbers.setdefault(content, len(cuts))
        if cut_of[name] == len(cuts):
            cuts.append(cut)

    def tensor(name: str, boxes: Boxes) -> dict[str, Any]:
        keys = {} if boxes.keys is None else {"keys": boxes.keys}
        return {"dtype": manifest.tensors[name].dtype, "cut": cut_of[name], "xxh3": boxes.hashes.tobytes().hex(), **keys}

    return {"tensors": ((name, tensor(name, boxes)) for name, boxes in columns.items()),
            "cuts": [{"shape": cut.shape, "files": _spaced(cut.files), "boxes": _spaced(cut.bounds)} for cut in cuts],
            "files": [{"name": name, **vars(entry)} for name, entry in manifest.files.items()]}


def _spaced(column: np.ndarray) -> str:
    return " ".join(map(str, column.ravel().tolist()))


def _column_tensors(body: dict[str, Any]) -> tuple[dict[str, TensorEntry], dict[str, FileEntry]]:
    files: dict[str, FileEntry] = {}
    for number, raw in enumerate(_list(body["files"], "files")):
        found = _fields(raw, ("name", "size", "xxh3_header"), f"file {number}")
        name = found.pop("name")
        if not isinstance(name, str) or name in files:
            raise CheckpointError(f"file {number}: name = {reprlib.repr(name)} is not a string, or there twice")
        files[name] = _file(name, found)
    names, used = list(files), set()
    cuts = [_cut(f"cut {number}", raw, len(names)) for number, raw in enumerate(_list(body.pop("cuts"), "cuts"))]
    tensors, raw_tensors = {}, _dict(body["tensors"], "tensors")
    for name in list(raw_tensors):
        raw = raw_tensors.pop(name)  # its text goes as its columns come
        what = f"tensor {reprlib.repr(check_name(name))}"
        found = _fields(raw, ("dtype", "cut", "xxh3", *("keys" for _ in (0,) if isinstance(raw, dict) and "keys" in raw)), what)
        number = _int(found["cut"], f"{what}: cut")
        if number >= len(cuts):
            raise CheckpointError(f"{what}: cut = {number}, there are {len(cuts)}")
        cut = cuts[number]
        used.add(number)
        keys = _keys(what, found["keys"], len(cut.files)) if "keys" in found else None
        boxes = Boxes(name, names, cut, _hashes(what, found["xxh3"], len(cut.files)), keys)
        tensors[name] = TensorEntry(_dtype(what, found["dtype"]), cut.shape, boxes)
    if len(used) < len(cuts):
        raise CheckpointError(f"cut {min(set(range(len(cuts))) - used)} is no tensor's")
    _check_files(tensors, files)
    return tensors, files


def _cut(what: str, raw: object, num_files: int) -> Cut:
    found = _fields(raw, ("shape", "files", "boxes"), what)
    shape = _ints(found["shape"], f"{what}: shape")
    _check_size(what, "U8", shape)
    files, numbers = _numbers(found.pop("files"), f"{what}: files"), _numbers(found.pop("boxes"), f"{what}: boxes")
    if (files >= num_files).any():
        raise CheckpointError(f"{what} has a box in file {files.max()}, there are {num_files}")
    if len(numbers) != len(files) * 2 * len(shape):
        raise CheckpointError(f"{what}: {len(numbers)} numbers are not {len(files)} boxes of {len(shape)} offsets and as many sizes")
    bounds = numbers.reshape(len(files), 2, len(shape))
    outside = np.flatnonzero(~inside(bounds, shape))
    if len(outside):
        offsets, sizes = bounds[outside[0]].tolist()
        raise CheckpointError(f"{what}: box at {reprlib.repr(offsets)} of {reprlib.repr(sizes)} is not inside shape {reprlib.repr(shape)}")
    _check_tile(what, bounds, shape)
    return Cut(shape, files.astype(np.int32), bounds)


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not a list")
    return value


def _numbers(value: object, what: str) -> np.ndarray:
    if not isinstance(value, str) or not _NUMBERS.fullmatch(value):
        raise CheckpointError(f"{what} = {reprlib.repr(value)} is not numbers below 10^18 with a space between them")
    return np.fromstring(value, dtype=np.int64, sep=" ")  # 8 bytes a number; as a list of words it would be 60


def _hashes(what: str, value: object, count: int) -> np.ndarray:
    if not isinstance(value, str) or not _HASHES.fullmatch(value) or len(value) != 32 * count:
        raise CheckpointError(f"{what}: xxh3 = {reprlib.repr(value)} is not {count} hashes of 32 hex digits")
    return np.frombuffer(bytes.fromhex(value), dtype=np.uint8).reshape(count, 16)


def _keys(what: str, value: object, count: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointError(f"{what}: keys = {reprlib.repr(value)} is not a list of {count} keys")
    return tuple(_key(what, key) for key in value)
