"""Checkpoint in, Megatron-core torch_dist checkpoint out: the weights under the names of GPTModel's sharded state. docs/megatron.md

Off the batch's path. Streams: one tensor is in memory at a time, whatever the size of the files. The target appears complete or not at all.

    python -m tools.export_megatron RUN DIR --dtype bf16 --max-file-size 4GB
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.torch_dist import METADATA, TorchDistReader, TorchDistWriter
from zaya.cli import Parser, parse_bytes
from zaya.config import ModelConfig, model_from_tables
from zaya.dtypes import DTYPES, STORED_DTYPES
from zaya.model import megatron

CHECKPOINT_VERSION = 3.0  # of Megatron-LM's layouts; linear_qkv is interleaved by group since 2.0


@dataclass(frozen=True)
class Item:
    """A link, what its tensors are called in the checkpoint, and the dtype they leave in."""

    link: megatron.Link
    sources: tuple[str, ...]
    dtype: torch.dtype


def plan_items(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype | None) -> list[Item]:
    """The table with dtypes, after a check that the checkpoint holds exactly the model."""
    links = megatron.links(config)
    checkpoint.check_parameters({named.name: named.shape for link in links for named in link.ours})
    stored = {name.removeprefix("model."): entry for name, entry in checkpoint.manifest.tensors.items()}
    items = []
    for link in links:
        # The balance bias is state, not a parameter: Megatron keeps it in fp32 whatever the weights are, and so do we.
        keep = dtype is None or link.ours[0].name.endswith(megatron.BALANCE_BIAS)
        target = STORED_DTYPES[stored[link.ours[0].name].dtype] if keep else dtype
        assert target is not None
        if keep and any(STORED_DTYPES[stored[named.name].dtype] != target for named in link.ours):
            raise ValueError(f"{checkpoint.path}: {' and '.join(named.name for named in link.ours)} become one tensor but are of different "
                             "dtypes; choose one with --dtype")
        items.append(Item(link, tuple(checkpoint.weight(named.name, target) for named in link.ours), target))
    return items


def common_state(checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """common.pt: what Megatron-LM's loader asks of it, and under "zaya" what only we know, so that an import gives the checkpoint back."""
    manifest = checkpoint.manifest
    arguments = megatron.to_arguments(config) | {
        "params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16,
        "seq_length": manifest.recipe.get("train", {}).get("seq_len"), "iteration": manifest.step,
        "consumed_train_samples": manifest.position,
    }
    own = {"step": manifest.step, "tokens": manifest.tokens, "tokens_by_corpus": manifest.tokens_by_corpus,
           "position": manifest.position, "recipe": manifest.recipe, "hf_config": manifest.hf_config}
    return {"args": argparse.Namespace(**arguments), "checkpoint_version": CHECKPOINT_VERSION, "iteration": manifest.step,
            "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": True}, "zaya": json.dumps(own)}


def export_megatron(source: Path, target: Path, dtype: torch.dtype | None, max_file_bytes: int, overwrite: bool) -> None:
    """ValueError, with nothing new at `target`, if it cannot be done."""
    checkpoint = Checkpoint.find(source)
    if overwrite and (target / METADATA).is_file() and "zaya" not in TorchDistReader(target).common():
        raise ValueError(f"{target} was not made by this tool, so --overwrite does not replace it; remove it, or choose another name")
    config = model_from_tables(checkpoint.manifest.recipe)
    items = plan_items(checkpoint, config, dtype)
    with TorchDistWriter(target, max_file_bytes=max_file_bytes, overwrite=overwrite) as writer:
        for item in tqdm(items, unit="tensor", disable=None, dynamic_ncols=True, desc="export"):
            ours = [checkpoint.read(name).to(item.dtype) for name in item.sources]
            checkpoint.unmap()  # its pages count as this process' memory
            writer.add(item.link.theirs.name, item.link.to_theirs(ours))
        writer.common = common_state(checkpoint, config, items[0].dtype)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.export_megatron", description="Turn a checkpoint into one of Megatron-core's torch_dist format.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run (its newest checkpoint)")
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to make; must not exist, or be empty")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as in the checkpoint)")
    parser.add_argument("--max-file-size", type=parse_bytes, default="4GB", metavar="SIZE", help="largest .distcp file (default: 4GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export at DIR")
    options = parser.parse_args(argv)
    try:
        export_megatron(options.checkpoint, options.directory, DTYPES.get(options.dtype), options.max_file_size, options.overwrite)
    except ValueError as error:
        return parser.refused(error)
    print(options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
