"""transformers' Zaya directory in, checkpoint out: usable as init.checkpoint of a recipe, and by every tool that reads checkpoints.

Off the batch's path. Streams: one tensor is in memory at a time. The config's keys that our model does not decide (token ids, lengths)
travel in the manifest, so that tools.export_hf gives back the same config.json.

    python -m tools.import_hf HF_DIR CHECKPOINT
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint.write import CheckpointWriter
from zaya.cli import Parser
from zaya.model import hf

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"  # tied to the embedding: some files store it all the same
ARCHITECTURE = "ZayaForCausalLM"
CONFIG_DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPES = ("F64", "F32", "BF16", "F16")  # safetensors' names


class HFDirectory:
    """config.json, read at once, and safetensors shards; everything about the tensors but their values is checked before use.

    1. the constructor; 2. open_shards; 3. check, with the table that config.json leads to; 4. read. ValueError for whatever is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; name one with config.json and {WEIGHTS}")
        self.config = _read_json(path / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, Path] = {}

    def open_shards(self) -> None:
        """Read every header."""
        files, weight_map = self._shards()
        for file in files:
            self._read_header(file)
        for name, file_name in weight_map.items():
            if name not in self.shapes:
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
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    view = shard.get_slice(name)
                    if name in self.shapes:
                        raise ValueError(f"tensor {name} is in {self.file_of[name].name} and in {file.name}")
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(f"tensor {name} has dtype {view.get_dtype()}; only {', '.join(DTYPES)} are supported")
                    self.shapes[name], self.file_of[name] = tuple(view.get_shape()), file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); get it again") from None

    def check(self, table: Sequence[hf.Link]) -> None:
        """Exactly the table's tensors, in the table's shapes; a stored head must equal the embedding it is tied to."""
        wanted = {named.name: named.shape for link in table for named in link.theirs}
        if HEAD in self.shapes:
            embedding = "model.embed_tokens.weight"
            if embedding in self.shapes and not torch.equal(self.read(HEAD), self.read(embedding)):
                raise ValueError(f"tensor {HEAD} differs from {embedding}; our head is tied to it, so this model is not supported")
            del self.shapes[HEAD]
        for names, word in ((wanted.keys() - self.shapes.keys(), "lacks"), (self.shapes.keys() - wanted.keys(), "has the unexpected")):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise ValueError(f"{self.path} {word} tensor {min(names)}{more}; its weights are not those of its config.json")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise ValueError(f"tensor {name} has shape {list(self.shapes[name])}, config.json asks for {list(shape)}")

    def read(self, name: str) -> Tensor:
        """Opens the shard for one tensor, so that no more of it stays mapped than the tensor."""
        with safe_open(self.file_of[name], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor.float() if tensor.dtype == torch.float16 else tensor  # exact; no run of ours is in fp16


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


def import_hf(source: Path, target: Path) -> None:
    """ValueError, with nothing left at `target`, for a directory that is not a Zaya model of transformers or is not complete."""
    directory = HFDirectory(source)
    if directory.config.get("model_type") == hf.MODEL_TYPE:  # another architecture may have other types; from_hf_config names it
        check_config(directory.config)
    model, rest = hf.from_hf_config(directory.config)
    table = hf.links(model)
    directory.open_shards()
    directory.check(table)
    recipe: dict[str, Any] = {"model": dataclasses.asdict(model)}
    if (source / "tokenizer.json").is_file():
        recipe["data"] = {"tokenizer": str((source / "tokenizer.json").resolve())}
    with CheckpointWriter(target, recipe=recipe, hf_config=rest) as writer:
        for link in tqdm(table, unit="tensor", disable=None, dynamic_ncols=True, desc="import"):
            tensors = link.to_ours([directory.read(named.name) for named in link.theirs])
            for named, tensor in zip(link.ours, tensors, strict=True):
                writer.add(f"model.{named.name}", tensor.float() if link.always_fp32 else tensor)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.import_hf", description="Turn a transformers Zaya directory into a checkpoint.")
    parser.add_argument("hf_dir", type=Path, help="directory with config.json and safetensors weights")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    options = parser.parse_args(argv)
    try:
        import_hf(options.hf_dir, options.checkpoint)
    except ValueError as error:
        print(f"tools.import_hf: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a name that no file can have; what is read and written says so itself
        print(f"tools.import_hf: cannot read {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(options.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
