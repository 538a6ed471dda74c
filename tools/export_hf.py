"""Checkpoint in, transformers' Zaya directory out: AutoModelForCausalLM.from_pretrained loads it, and so do the servers built on it.

Off the batch's path. Streams: each of `--workers` threads copies a chunk of a stored box at a time, whatever the size of tensors and
shards (zaya/checkpoint/stream.py). The target appears complete or not at all.

    python -m tools.export_hf RUN HF_DIR --dtype bf16 [--workers N]
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zaya.checkpoint import stream
from zaya.checkpoint.directory import NewDirectory
from zaya.checkpoint.read import Checkpoint
from zaya.cli import Parser, parse_bytes, worker_count
from zaya.config import ModelConfig, model_from_tables
from zaya.data.tokenizer import end_token_id, load_tokenizer
from zaya.dtypes import DTYPES, STORED_DTYPES, STORED_NAMES
from zaya.model import hf

# Copied where they lie beside the tokenizer: what a directory that was imported brought along.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Item:
    """A link and the dtype its tensors leave in."""

    link: hf.Link
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(named.shape) for named in self.link.theirs) * self.dtype.itemsize


def plan_items(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None) -> list[Item]:
    """The table with dtypes, after a check that the checkpoint holds exactly the model."""
    links = hf.links(config)
    checkpoint.check_parameters({named.name: named.shape for link in links for named in link.ours})
    stored = checkpoint.manifest.tensors
    return [Item(link, torch.float32 if link.always_fp32 else dtype or STORED_DTYPES[stored[f"model.{link.ours[0].name}"].dtype])
            for link in links]


def cut_into_shards(items: list[Item], max_bytes: int) -> list[list[Item]]:
    """In order, as many to a shard as fit; an item that alone is larger gets a shard of its own."""
    shards: list[list[Item]] = [[]]
    room = max_bytes
    for item in items:
        if shards[-1] and item.num_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(item)
        room -= item.num_bytes
    # Wide elements first, so that every tensor begins at a multiple of its element's size.
    return [sorted(shard, key=lambda item: -item.dtype.itemsize) for shard in shards]


def write_header(path: Path, shard: list[Item]) -> int:
    """One safetensors file at its full length, without its tensors; where these begin. Each item's lie one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in shard:
        for named in item.link.theirs:
            begin, end = end, end + math.prod(named.shape) * item.dtype.itemsize
            header[named.name] = {"dtype": STORED_NAMES[item.dtype], "shape": named.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text)


def plan_copies(target: stream.Target, begin: int, shard: list[Item], checkpoint: Checkpoint) -> Iterator[stream.Copy]:
    """Both sides of a link are joined along their rows, so its tensors' bytes here are those of our tensors, one after the other."""
    for item in shard:
        for named in item.link.ours:
            yield from stream.cut(checkpoint, checkpoint.weight(named.name, item.dtype), target, begin, item.dtype)
            begin += math.prod(named.shape) * item.dtype.itemsize


def write_weights(directory: Path, shards: list[list[Item]], checkpoint: Checkpoint, workers: int) -> None:
    total = sum(item.num_bytes for shard in shards for item in shard)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    pool = ThreadPoolExecutor(min(workers, len(shards) + 1))  # one of a file reads while another writes; more would only wait
    try:
        targets = [stream.Target(directory / name) for name in names]
        planned = [plan_copies(target, write_header(target.path, shard), shard, checkpoint)
                   for target, shard in zip(targets, shards, strict=True)]
        copies: dict[stream.Target, list[Future[int]]] = {target: [] for target in targets}
        # One thread writes a file at a time: as many files are under way as there are threads, each in turn.
        for first in range(0, len(planned), workers):
            for copy in itertools.chain.from_iterable(itertools.zip_longest(*planned[first : first + workers])):
                if copy is not None:
                    copies[copy.target].append(pool.submit(stream.copy_boxes, checkpoint, copy))
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc="export") as bar:
            for target, futures in copies.items():
                for future in futures:
                    bar.update(future.result())
                with open(target.path, "rb") as file:
                    os.fsync(file.fileno())
    finally:
        pool.shutdown(cancel_futures=True)
    if len(shards) > 1:
        weight_map = {named.name: name for name, shard in zip(names, shards, strict=True) for item in shard for named in item.link.theirs}
        _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def hf_config(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None) -> dict[str, Any]:
    """What the model came with, if it was imported; else what the recipe knows."""
    manifest = checkpoint.manifest
    rest = manifest.hf_config or hf.rest_of_new_model(_end_token(tokenizer), manifest.recipe.get("train", {}).get("seq_len"))
    if not manifest.hf_config or rest.get("dtype") is not None:  # a config that was silent leaves it to the weights
        rest = rest | {"dtype": str(dtype).removeprefix("torch.")}
    return hf.to_hf_config(config, rest)


def _end_token(tokenizer: Path | None) -> int | None:
    if tokenizer is None:
        return None
    loaded = load_tokenizer(tokenizer)
    try:
        return end_token_id(loaded)
    except ValueError:  # a tokenizer without one is still good for text
        return None


def write_tokenizer(directory: Path, tokenizer: Path) -> None:
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    for name in SIDE_FILES:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, directory / name)
    if not (directory / "tokenizer_config.json").exists():
        end = _end_token(tokenizer)
        special = {} if end is None else {"eos_token": load_tokenizer(tokenizer).id_to_token(end)}
        _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_hf(source: Path, target: Path, dtype: torch.dtype | None, max_shard_bytes: int, overwrite: bool, workers: int = 1) -> str:
    """In words what the export lacks, or nothing. ValueError or OSError, with nothing left at `target`, if it cannot be done."""
    checkpoint = Checkpoint.find(source)
    config = model_from_tables(checkpoint.manifest.recipe)
    items = plan_items(checkpoint, config, dtype)
    named = checkpoint.manifest.recipe.get("data", {}).get("tokenizer")
    tokenizer = Path(named) if named and Path(named).is_file() else None
    with NewDirectory(target, overwrite=overwrite, mark="config.json") as new:
        _write_json(new.hidden / "config.json", hf_config(checkpoint, config, items[0].dtype, tokenizer))
        if tokenizer is not None:
            write_tokenizer(new.hidden, tokenizer)
        write_weights(new.hidden, cut_into_shards(items, max_shard_bytes), checkpoint, workers)
    if named and tokenizer is None:
        return (f"{named}, the run's tokenizer, is not there: the export has weights and config only; put it back and export with "
                "--overwrite")
    return ""


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.export_hf", description="Turn a checkpoint into a directory that transformers loads.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run (its newest checkpoint)")
    parser.add_argument("hf_dir", type=Path, help="directory to make; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the checkpoint)")
    parser.add_argument("--max-shard-size", type=parse_bytes, default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export at HF_DIR")
    parser.add_argument("--workers", type=worker_count, default=stream.WORKERS, metavar="N", help="threads (one per core, at most 32)")
    options = parser.parse_args(argv)
    try:
        lacks = export_hf(options.checkpoint, options.hf_dir, DTYPES.get(options.dtype), options.max_shard_size, options.overwrite,
                          options.workers)
    except (ValueError, OSError) as error:
        return parser.refused(error, "write", options.hf_dir)
    if lacks:
        print(f"tools.export_hf: {lacks}", file=sys.stderr)
    print(options.hf_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
