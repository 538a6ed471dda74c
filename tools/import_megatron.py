"""Megatron-core torch_dist checkpoint in, checkpoint out: usable as init.checkpoint of a recipe, and by every tool that reads checkpoints.

Off the batch's path. Streams: one tensor is in memory at a time. Weights only: optimizer, scheduler and RNG state stay behind. The pickles
in the directory are read by a reader that runs nothing of them (zaya/checkpoint/torch_dist.py). docs/megatron.md

    python -m tools.import_megatron DIR CHECKPOINT
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.manifest import parse_json
from zaya.checkpoint.torch_dist import COMMON, Record, TorchDistReader
from zaya.checkpoint.write import CheckpointWriter
from zaya.cli import Parser
from zaya.config import ModelConfig, model_from_tables
from zaya.model import megatron

TRACKER = "latest_checkpointed_iteration.txt"
CARRIED = ("step", "tokens", "tokens_by_corpus", "position", "recipe", "hf_config")  # of the manifest, as tools.export_megatron left it


def locate(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a directory that Megatron-LM's --save made."""
    if not (path / TRACKER).is_file():
        return path
    newest = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if newest == "release":
        return path / newest
    if not (newest.isascii() and newest.isdigit() and len(newest) <= 12):
        raise ValueError(f"{path / TRACKER} holds {newest[:40]!r}, which is no iteration; name the checkpoint's own directory")
    return path / f"iter_{int(newest):07d}"


def describe(reader: TorchDistReader) -> tuple[ModelConfig, dict[str, Any]]:
    """The model, and what goes into the manifest: as we wrote it beside the weights, or by Megatron-LM's arguments."""
    common = reader.common()
    if isinstance(common.get("zaya"), str):
        try:
            manifest = parse_json(common["zaya"])
        except CheckpointError as error:
            raise ValueError(f"{reader.path / COMMON}: zaya {error}") from None
        if not isinstance(manifest, dict) or manifest.keys() != set(CARRIED) or not isinstance(manifest["recipe"], dict):
            raise ValueError(f"{reader.path / COMMON}: zaya is not an object of {', '.join(CARRIED)}")
        shape = manifest["recipe"].get("model")
        check_depth(reader, shape.get("num_layers") if isinstance(shape, dict) else None)
        model = model_from_tables(manifest["recipe"])
    else:
        arguments, iteration = common.get("args"), common.get("iteration", 0)
        if not isinstance(arguments, Record):
            raise ValueError(f"{reader.path} has no args in its common.pt, so the model's shape is not known")
        check_depth(reader, arguments.fields().get("num_layers"))
        model = megatron.from_arguments(arguments.fields())
        manifest = {"recipe": {"model": dataclasses.asdict(model)}, "step": iteration if type(iteration) is int else 0}
    return model, manifest


def check_depth(reader: TorchDistReader, num_layers: object) -> None:
    """Before anything is done once per layer: what the files say of it may be anything."""
    if isinstance(num_layers, int) and num_layers > len(reader.names()):
        raise ValueError(f"{reader.path} holds {len(reader.names())} tensors, too few for {num_layers} layers")


def check(reader: TorchDistReader, table: Sequence[megatron.Link]) -> None:
    """Exactly the table's tensors, in the table's shapes; what is not of the model is left aside."""
    wanted = {link.theirs.name: link.theirs.shape for link in table}
    found = {name for name in reader.names() if name.startswith(megatron.PREFIXES)}
    for names, word in ((wanted.keys() - found, "lacks"), (found - wanted.keys(), "has the unexpected")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{reader.path} {word} tensor {min(names)}{more}; its weights are not those of this model (docs/megatron.md)")
    for name, shape in wanted.items():
        if reader.entry(name).shape != shape:
            raise ValueError(f"{reader.path}: tensor {name} has shape {list(reader.entry(name).shape)}, this model asks for {list(shape)}")


def import_megatron(source: Path, target: Path) -> None:
    """ValueError, with nothing left at `target`, for a directory that is not such a checkpoint, or not one of our model, or damaged."""
    reader = TorchDistReader(locate(source))
    model, manifest = describe(reader)
    table = megatron.links(model)
    check(reader, table)
    with CheckpointWriter(target, **manifest) as writer:
        for link in tqdm(table, unit="tensor", disable=None, dynamic_ncols=True, desc="import"):
            for named, tensor in zip(link.ours, link.to_ours(reader.read(link.theirs.name)), strict=True):
                writer.add(f"model.{named.name}", tensor)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.import_megatron", description="Turn a Megatron-core torch_dist checkpoint into one of ours.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="a torch_dist checkpoint, or the directory of a Megatron-LM run")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    options = parser.parse_args(argv)
    try:
        import_megatron(options.directory, options.checkpoint)
    except (ValueError, OSError) as error:  # OSError: a name that no file can have; the rest says so itself
        return parser.refused(error, "read", options.directory)
    print(options.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
