"""transformers' Zaya directory in, checkpoint out: usable as init.checkpoint of a recipe, and by every tool that reads checkpoints.

Off the batch's path. Streams: each of `--workers` threads reads, hashes and writes a chunk at a time. The config's keys that our model
does not decide (token ids, lengths) travel in the manifest, so that tools.export_hf gives back the same config.json.
Weights in the layout before transformers 5.13 are told by their config.json and come in by the table of zaya/model/zyphra.py.

    python -m tools.import_hf HF_DIR CHECKPOINT [--workers N]
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint import stream
from zaya.checkpoint.hashing import CHUNK_BYTES
from zaya.checkpoint.write import CheckpointWriter
from zaya.cli import Parser, worker_count
from zaya.dtypes import STORED_FLOATS
from zaya.model import hf, zyphra

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"  # tied to the embedding: some files store it all the same
ARCHITECTURE = "ZayaForCausalLM"
CONFIG_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie."""

    file: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> Iterator[Tensor]:
        """Elements [start, stop) in row-major order, a chunk at a time, valid until the next one is asked for. ValueError: damage."""
        width = self.dtype.itemsize
        buffer = memoryview(bytearray(min(CHUNK_BYTES, (stop - start) * width)))
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.begin + start * width)
                while start < stop:
                    chunk = buffer[: min(len(buffer), (stop - start) * width)]
                    filled = 0
                    while filled < len(chunk):
                        count = file.readinto(chunk[filled:])
                        if not count:
                            raise ValueError(f"{self.file} is truncated or damaged; get it again")
                        filled += count
                    yield torch.frombuffer(chunk, dtype=self.dtype)
                    start += len(chunk) // width
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from None


class HFDirectory:
    """config.json, read at once, and safetensors shards; everything about the tensors but their values is checked before use.

    1. the constructor; 2. open_shards; 3. check, with the table that config.json leads to; 4. read. ValueError for whatever is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; name one with config.json and {WEIGHTS}")
        self.config = _read_json(path / "config.json")
        self.tensors: dict[str, Stored] = {}

    def open_shards(self) -> None:
        """Read every header."""
        files, weight_map = self._shards()
        for file in files:
            self._read_header(file)
        for name, file_name in weight_map.items():
            if name not in self.tensors:
                raise ValueError(f"{INDEX} places tensor {name} in {file_name}, which does not hold it; get the shard again")

    def _shards(self) -> tuple[list[Path], dict[str, str]]:
        if (self.path / INDEX).is_file():
            weight_map = _read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{self.path / INDEX} has no weight_map")
            names = sorted({str(name) for name in weight_map.values()})
            for name in names:
                if Path(name).name != name:
                    raise ValueError(f"{self.path / INDEX} names shard {name!r}, which is not a plain file name")
                if not (self.path / name).is_file():
                    raise ValueError(f"shard {name} of {len(names)} is missing from {self.path}; get it again")
            return [self.path / name for name in names], weight_map
        if not (self.path / WEIGHTS).is_file():
            raise ValueError(f"{self.path} has neither {WEIGHTS} nor {INDEX}; only safetensors weights are read")
        return [self.path / WEIGHTS], {}

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt"):  # the library has checked that the header and the file agree
                pass
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); get it again") from None
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in self.tensors:
                raise ValueError(f"tensor {name} is in {self.tensors[name].file.name} and in {file.name}")
            if entry["dtype"] not in STORED_FLOATS:
                raise ValueError(f"tensor {name} has dtype {entry['dtype']}; only {', '.join(STORED_FLOATS)} are supported")
            self.tensors[name] = Stored(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), STORED_FLOATS[entry["dtype"]])

    def check(self, table: Sequence[hf.Link]) -> None:
        """Exactly the table's tensors, in the table's shapes; a stored head must equal the embedding it is tied to."""
        wanted = {named.name: named.shape for link in table for named in link.theirs}
        if HEAD in self.tensors:
            embedding = "model.embed_tokens.weight"
            if embedding in self.tensors and not self._equal(HEAD, embedding):
                raise ValueError(f"tensor {HEAD} differs from {embedding}; our head is tied to it, so this model is not supported")
            del self.tensors[HEAD]
        for names, word in ((wanted.keys() - self.tensors.keys(), "lacks"), (self.tensors.keys() - wanted.keys(), "has the unexpected")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.path} {word} tensor {min(names)}{more}; its weights are not those of its config.json")
        for name, shape in wanted.items():
            if self.tensors[name].shape != shape:
                raise ValueError(f"tensor {name} has shape {list(self.tensors[name].shape)}, config.json asks for {list(shape)}")

    def _equal(self, one: str, other: str) -> bool:
        a, b = self.tensors[one], self.tensors[other]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and all(map(torch.equal, a.read(0, a.numel), b.read(0, b.numel)))

    def parts(self, link: hf.Link) -> list[list[tuple[Stored, int, int]]]:
        """For each of `link.ours` the ranges of stored elements that it is, in order: both sides are joined along their rows."""
        borders = list(itertools.accumulate((math.prod(named.shape) for named in link.ours), initial=0))
        parts: list[list[tuple[Stored, int, int]]] = [[] for _ in link.ours]
        start = 0
        for stored in (self.tensors[named.name] for named in link.theirs):
            stop = start + stored.numel
            for index, (low, high) in enumerate(itertools.pairwise(borders)):
                if max(low, start) < min(high, stop):
                    parts[index].append((stored, max(low, start) - start, min(high, stop) - start))
            start = stop
        return parts


def target_dtype(link: hf.Link, parts: Sequence[tuple[Stored, int, int]]) -> torch.dtype:
    """As stored, the wider of two; fp16 becomes fp32, which is exact: no run of ours is in fp16."""
    dtypes = [torch.float32 if stored.dtype == torch.float16 else stored.dtype for stored, _, _ in parts]
    return torch.float32 if link.always_fp32 else functools.reduce(torch.promote_types, dtypes)


def read_parts(parts: Sequence[tuple[Stored, int, int]], dtype: torch.dtype) -> Iterator[Tensor]:
    for stored, start, stop in parts:
        for chunk in stored.read(start, stop):
            yield chunk.to(dtype)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} is not a JSON object")
    return parsed


def check_config(config: dict[str, Any]) -> None:
    """Types that transformers would not take back, and what could not even be compared with what we support. ValueError names the key."""
    def refuse(key: str, must: str) -> NoReturn:
        raise ValueError(f"{key} = {reprlib.repr(config[key])} is not supported; it must be {must}")

    for key, value in config.items():
        if not _is_finite(value):
            refuse(key, "of finite numbers, nested a few levels at most")
    for key, fixed in hf.FIXED.items():  # 0 equals False and 2.0 equals 2, but not for transformers
        if key in config and type(config[key]) is not type(fixed) and not (isinstance(fixed, float) and type(config[key]) is int):
            refuse(key, repr(fixed))
    if config.get("architectures") is not None and config["architectures"] != [ARCHITECTURE]:
        refuse("architectures", repr([ARCHITECTURE]))
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in CONFIG_DTYPES:
            refuse(key, f"one of {', '.join(CONFIG_DTYPES)}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = config.get(key)
        ids = given if key == "eos_token_id" and isinstance(given, list) else [] if given is None else [given]
        if any(type(token) is not int or token < 0 for token in ids):
            refuse(key, "a token id or null")
    length = config.get("max_position_embeddings", 1)
    if type(length) is not int or length < 1:
        refuse("max_position_embeddings", "an integer of at least 1")
    layers = config.get("layer_types")
    if isinstance(layers, list) and not all(isinstance(layer, str) for layer in layers):
        refuse("layer_types", "a list of strings")


def _is_finite(value: Any, depth: int = 0) -> bool:
    """Also of every number inside; an integer no float can hold counts as infinite."""
    if isinstance(value, (dict, list)):
        return depth < 16 and all(_is_finite(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max


def import_hf(source: Path, target: Path, workers: int = 1) -> None:
    """ValueError, with nothing left at `target`, for a directory that is not a Zaya model of transformers or is not complete."""
    directory = HFDirectory(source)
    if directory.config.get("model_type") == hf.MODEL_TYPE:  # another architecture may have other types; from_hf_config names it
        check_config(directory.config)
    layout = zyphra if zyphra.recognises(directory.config) else hf
    model, rest = layout.from_hf_config(directory.config)
    table = layout.links(model)
    directory.open_shards()
    directory.check(table)
    recipe: dict[str, Any] = {"model": dataclasses.asdict(model)}
    if (source / "tokenizer.json").is_file():
        recipe["data"] = {"tokenizer": str((source / "tokenizer.json").resolve())}
    planned = [(named, parts, target_dtype(link, parts))
               for link in table for named, parts in zip(link.ours, directory.parts(link), strict=True)]
    total = sum(math.prod(named.shape) * dtype.itemsize for named, _, dtype in planned)
    with (tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc="import") as bar,
          CheckpointWriter(target, recipe=recipe, hf_config=rest, workers=workers) as writer):
        for named, parts, dtype in planned:
            writer.stream(f"model.{named.name}", dtype, named.shape, functools.partial(read_parts, parts, dtype), bar.update)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.import_hf", description="Turn a transformers Zaya directory into a checkpoint.")
    parser.add_argument("hf_dir", type=Path, help="directory with config.json and safetensors weights")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    parser.add_argument("--workers", type=worker_count, default=stream.WORKERS, metavar="N", help="threads (one per core, at most 32)")
    options = parser.parse_args(argv)
    try:
        import_hf(options.hf_dir, options.checkpoint, options.workers)
    except (ValueError, OSError) as error:  # OSError: a name that no file can have; the rest says so itself
        return parser.refused(error, "read", options.hf_dir)
    print(options.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
