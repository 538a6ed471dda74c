"""Checkpoint in, DeepSpeed's universal checkpoint out: a DeepSpeed run with `checkpoint.load_universal` goes on from it. docs/deepspeed.md

Off the batch's path; the way back is tools.import_deepspeed. Streams: one tensor is in memory at a time. What DeepSpeed keeps of AdamW
goes into its own files; what it has no place for (router balance, position in the data) travels in client_state["zaya"], which
load_checkpoint returns. The files themselves are zaya/checkpoint/universal.py's.

    python -m tools.export_deepspeed CHECKPOINT|RUN DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.universal import CLIENT_KEY, STATES, ParameterGroup, UniversalWriter
from zaya.cli import Parser
from zaya.config import Recipe, recipe_from_tables
from zaya.dtypes import STORED_DTYPES
from zaya.plan import ParameterPlan, plan
from zaya.schedule import learning_rate

STEP = "optim.step"


@dataclass(frozen=True)
class Source:
    """A checkpoint whose AdamW state is known to be whole."""

    checkpoint: Checkpoint
    recipe: Recipe
    table: dict[str, ParameterPlan]
    rest: dict[str, Tensor]
    """What is no parameter's: buffers (model.*), the router's balance."""
    optimizer_steps: int

    def stored(self, name: str, state: str) -> str:
        """fp32 runs keep no masters beside their weights."""
        if state != "fp32":
            return f"optim.{state}.{name}"
        master = f"optim.master.{name}"
        return master if master in self.checkpoint.manifest.tensors else f"model.{name}"


def open_source(path: Path) -> Source:
    """ValueError: no checkpoint, not one of AdamW, or one with state missing."""
    checkpoint = Checkpoint.find(path)
    tensors = checkpoint.manifest.tensors
    muon = [name for name in tensors if name.startswith("optim.momentum.")]
    if muon:
        raise ValueError(f"{checkpoint.path} has {muon[0]}: no optimizer of DeepSpeed goes on from Muon's state; only a run with "
                         'optim.name = "adamw" can be exported')
    try:
        recipe = recipe_from_tables(checkpoint.manifest.recipe)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} holds no run's state ({error}); export a checkpoint that a run saved") from None
    table = plan(recipe.model)
    for name, row in table.items():
        master = [f"optim.master.{name}"] if recipe.train.dtype == "bf16" else []
        for stored in (f"model.{name}", *master, f"optim.exp_avg.{name}", f"optim.exp_avg_sq.{name}"):
            entry = tensors.get(stored)
            if entry is None:
                raise ValueError(f"{checkpoint.path} has no tensor {stored}, so DeepSpeed could not go on from it")
            if entry.shape != row.shape:
                raise ValueError(f"{checkpoint.path}: {stored} has shape {list(entry.shape)}, its recipe asks for {list(row.shape)}")
            if entry.dtype != "F32" and not (master and stored == f"model.{name}"):
                raise ValueError(f"{checkpoint.path}: {stored} is {entry.dtype}; DeepSpeed keeps masters and moments in F32 alone")
    taken = {f"{kind}.{name}" for name in table for kind in ("model", "optim.master", "optim.exp_avg", "optim.exp_avg_sq")}
    rest = {name: checkpoint.read(name) for name in tensors if name not in taken}
    if STEP not in rest:
        raise ValueError(f"{checkpoint.path} has no tensor {STEP}, AdamW's counter, so DeepSpeed could not go on from it")
    steps = int(rest.pop(STEP).item())
    return Source(checkpoint, recipe, table, rest, steps)


def groups(source: Source) -> list[ParameterGroup]:
    """Two, as zaya/parallel/deepspeed_engine.py makes them: matrices with decay, then vectors without."""
    optim, manifest = source.recipe.optim, source.checkpoint.manifest
    lr = learning_rate(max(manifest.step, 1), source.recipe.train.steps, optim)
    made = []
    for decay in (True, False):
        names = tuple(name for name, row in source.table.items() if row.decay is decay)
        made.append(ParameterGroup(names, {"lr": lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps,
                                           "weight_decay": optim.weight_decay if decay else 0.0}))
    return [group for group in made if group.names]


def client_state(source: Source) -> dict[str, Any]:
    manifest = source.checkpoint.manifest
    return {CLIENT_KEY: {"step": manifest.step, "position": manifest.position, "tokens": manifest.tokens,
                         "tokens_by_corpus": manifest.tokens_by_corpus, "hf_config": manifest.hf_config, "tensors": source.rest}}


def check_rounded(source: Source, name: str, master: Tensor) -> None:
    """DeepSpeed makes the parameters from the masters: they must be what it will make."""
    if source.recipe.train.dtype == "fp32":
        return  # one tensor is both
    stored = source.checkpoint.read(f"model.{name}")
    if not torch.equal(master.to(stored.dtype), stored):
        raise ValueError(f"{source.checkpoint.path}: model.{name} is not optim.master.{name} rounded to {stored.dtype}, which DeepSpeed "
                         "would make of it")


def export_deepspeed(path: Path, target: Path) -> Path:
    """The directory of the universal checkpoint. ValueError, with nothing left at `target`, if it cannot be done."""
    source = open_source(path)
    manifest = source.checkpoint.manifest
    buffers = {name.removeprefix("model."): tensor for name, tensor in source.rest.items() if name.startswith("model.")}
    total = len(STATES) * sum(row.numel for row in source.table.values()) * STORED_DTYPES["F32"].itemsize
    with (UniversalWriter(target, step=manifest.step, optimizer_steps=source.optimizer_steps, groups=groups(source), buffers=buffers,
                          client_state=client_state(source)) as writer,
          tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc="export") as bar):
        for name in source.table:
            write_parameter(source, name, writer, bar)
            source.checkpoint.unmap()  # pages that were read count as this process' memory
    return target


def write_parameter(source: Source, name: str, writer: UniversalWriter, bar: tqdm) -> None:
    for state in STATES:
        tensor = source.checkpoint.read(source.stored(name, state))
        if state == "fp32":
            check_rounded(source, name, tensor)
        writer.add(name, state, tensor)
        bar.update(tensor.nbytes)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.export_deepspeed", description="Turn a checkpoint of AdamW into a universal checkpoint of DeepSpeed.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run (its newest checkpoint)")
    parser.add_argument("directory", type=Path, help="directory to make, load_dir of load_checkpoint; must not exist, or be empty")
    options = parser.parse_args(argv)
    try:
        print(export_deepspeed(options.checkpoint, options.directory))
    except (ValueError, OSError) as error:  # OSError: a name that no file can have; the rest says so itself
        return parser.refused(error, "write", options.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
