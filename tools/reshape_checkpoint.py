"""Rewrite a checkpoint for another layout: one set of files per rank, with exactly the boxes that the rank owns. docs/reshaping.md

    python -m tools.reshape_checkpoint RUN DST --layout ranks=8,tp=2,ep=4 --max-memory 2GB --workers 8
    python -m tools.reshape_checkpoint SRC DST --layout ranks=1 --average A B --dtype bf16

Nobody needs it to resume: every layout reads every checkpoint. It makes many small files few, spreads a file over the ranks that read it,
takes the optimizer state off, converts, averages. Ownership is the run's own (zaya/parallel/partition.py); reading, writing, going on after
a kill and verification are zaya/checkpoint/rewrite.py. Exit code 0: DST is there, complete and verified; 2: bad input or a full disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zaya.checkpoint.manifest import Manifest, TensorEntry
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.rewrite import Job, Target, cut_into_files, rewrite
from zaya.cli import Parser, layout_sizes, parse_bytes
from zaya.config import ModelConfig, ParallelConfig, model_from_tables
from zaya.dtypes import DTYPES, STORED_DTYPES, STORED_FLOATS, STORED_NAMES
from zaya.parallel.partition import saved_by_rank
from zaya.plan import ParameterPlan, plan
from zaya.shard import Box, Layout

STORED = {name: STORED_NAMES[DTYPES[name]] for name in ("bf16", "fp32")}
LEAST_MEMORY = 10**6


@dataclass(frozen=True)
class Options:
    """What the new checkpoint is to be; None and False leave things as they are."""

    layout: Layout
    dtype: str | None
    drop_optimizer: bool
    average: bool
    vocab_size: int | None


def parameter_of(name: str) -> tuple[str, str]:
    """(kind, parameter) of a tensor's name: ("model", "embedding.weight"), ("master", ...); ("", name) for what is neither."""
    if name.startswith("model."):
        return "model", name.removeprefix("model.")
    first, _, rest = name.partition(".")
    kind, _, parameter = rest.partition(".")
    return (kind, parameter) if first == "optim" else ("", name)


def plan_tensors(stored: Mapping[str, TensorEntry], table: Mapping[str, ParameterPlan], options: Options) -> Iterator[tuple[str, Target]]:
    """The tensors of the new checkpoint in the order of the old, and what each is made of."""
    for name, entry in stored.items():
        kind, parameter = parameter_of(name)
        if kind != "model" and (options.drop_optimizer or (options.average and kind != "master")):
            continue
        row, master = table.get(parameter), f"optim.master.{parameter}"
        if row is None or kind == "":
            yield name, Target(name, entry.dtype, entry.shape)
            continue
        dtype = STORED[options.dtype] if options.dtype and kind == "model" else entry.dtype
        wider = STORED_DTYPES[dtype].itemsize > STORED_DTYPES[entry.dtype].itemsize
        # What is widened or averaged is the masters; the rounded weights follow from them, as in a run.
        from_master = kind == "model" and master in stored and (wider or options.average)
        yield name, Target(master if from_master else name, dtype, row.shape)
        if STORED_DTYPES[dtype].itemsize < STORED_DTYPES[entry.dtype].itemsize and master not in stored and not options.drop_optimizer:
            yield master, Target(name, entry.dtype, row.shape)  # a run in the narrow dtype goes on from the unrounded weights


def check_model(checkpoint: Checkpoint, table: Mapping[str, ParameterPlan]) -> None:
    """ValueError unless the checkpoint holds the model of its recipe, state of its parameters included."""
    stored = checkpoint.manifest.tensors
    for name in table:
        if f"model.{name}" not in stored:
            raise ValueError(f"{checkpoint.path} has no tensor model.{name}, which its recipe asks for")
    for name, entry in stored.items():
        kind, parameter = parameter_of(name)
        if kind and parameter in table and entry.shape != table[parameter].shape:
            raise ValueError(f"{checkpoint.path}: {name} has shape {list(entry.shape)}, its recipe asks for {list(table[parameter].shape)}")


def check_alike(checkpoints: Sequence[Checkpoint], targets: Mapping[str, Target]) -> None:
    """ValueError unless the mean of the checkpoints is one."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        what = f"{first.path} and {other.path} cannot be averaged"
        odd = first.manifest.tensors.keys() ^ other.manifest.tensors.keys()
        odd = {name for name in odd if name.startswith(("model.", "optim.master."))}
        if odd:
            raise ValueError(f"{what}: only one of them has {min(odd)}")
        for name in sorted({target.source for target in targets.values()}):
            ours, theirs = first.manifest.tensors[name], other.manifest.tensors[name]
            if ours.shape != theirs.shape:
                raise ValueError(f"{what}: {name} has shape {list(ours.shape)} and {list(theirs.shape)}")
            if ours.dtype not in STORED_FLOATS or theirs.dtype not in STORED_FLOATS:
                raise ValueError(f"{what}: {name} is {ours.dtype} and {theirs.dtype}")


def plan_job(checkpoints: Sequence[Checkpoint], options: Options, max_file_bytes: int) -> Job:
    """ValueError: a checkpoint does not hold its recipe's model, or the layout or the others do not fit it."""
    first, layout = checkpoints[0], options.layout
    manifest = first.manifest
    try:
        model = model_from_tables(manifest.recipe)
    except ValueError as error:
        raise ValueError(f"{first.path}: {error}") from None
    check_model(first, plan(model))
    recipe = manifest.recipe
    if options.vocab_size is not None:
        if not model.vocab_size <= options.vocab_size < 2**31:
            raise ValueError(f"--vocab-size = {options.vocab_size} is less than model.vocab_size = {model.vocab_size}, or not below 2^31")
        model = dataclasses.replace(model, vocab_size=options.vocab_size)
        recipe = recipe | {"model": recipe["model"] | {"vocab_size": model.vocab_size}}
    check_layout(layout, model, recipe)
    table = plan(model)
    tensors = dict(plan_tensors(manifest.tensors, table, options))
    if len(checkpoints) > 1:
        check_alike(checkpoints, tensors)
    blank = dataclasses.replace(manifest, recipe=recipe, layout={**layout.as_dict(), "world_size": layout.world_size}, tensors={}, files={})
    job = Job(tuple(checkpoints), tensors, (), Manifest.from_json(blank.to_json()))
    muon = recipe.get("optim", {}).get("name") != "adamw"  # without a recipe of a run (an import) there is no state to cut either way
    return cut_into_files(job, boxes_by_rank(tensors, table, saved_by_rank(table, layout, muon)), max_file_bytes)


def boxes_by_rank(tensors: Mapping[str, Target], table: Mapping[str, ParameterPlan],
                  owned_boxes: Sequence[Mapping[str, Sequence[Box]]]) -> Iterator[list[tuple[str, Box]]]:
    """What each rank writes, in the order of `TrainState.owned`; rank 0 has the small rest."""
    states: dict[str, list[str]] = {name: [] for name in table}
    rest = []
    for name, target in tensors.items():
        kind, parameter = parameter_of(name)
        if kind and parameter in states:
            states[parameter].append(name)
        else:
            rest.append((name, ((0,) * len(target.shape), target.shape)))
    place = {name: index for index, name in enumerate(table)}
    for rank, mine in enumerate(owned_boxes):
        boxes = [(name, box) for parameter in sorted(mine, key=place.__getitem__) for name in states[parameter] for box in mine[parameter]]
        yield boxes + (rest if rank == 0 else [])


def check_layout(layout: Layout, model: ModelConfig, recipe: Mapping[str, Any]) -> None:
    """ValueError names the keys that do not fit the model, as at the start of a run."""
    config = ParallelConfig(tp=layout.tp, cp=layout.cp, ep=layout.ep, zero_size=layout.zero_size)
    seq_len = recipe.get("train", {}).get("seq_len")
    config.validate(layout.world_size, model, seq_len if isinstance(seq_len, int) else 4 * layout.cp * layout.tp)


def layout_of(text: str) -> Layout:
    keys = ("ranks", "tp", "cp", "ep", "zero_size")
    try:
        values = layout_sizes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not values.keys() <= set(keys) or not 1 <= values.get("ranks", 0) <= 1 << 17:
        raise argparse.ArgumentTypeError(f"{text!r} must name ranks (1 to {1 << 17}) and may name {', '.join(keys[1:])}")
    if any(value < (key != "zero_size") for key, value in values.items()):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are at least 1")
    return Layout(values.pop("ranks"), **values)


def summary(job: Job) -> str:
    """Whether the new checkpoint's tensors are the old one's, bit for bit, and what is not."""
    stored = job.sources[0].manifest.tensors
    changed = [name for name, target in job.tensors.items() if name not in stored or len(job.sources) > 1
               or target != Target(name, stored[name].dtype, stored[name].shape)]
    what = f"the mean of {len(job.sources)} checkpoints, " if len(job.sources) > 1 else ""
    return f"{what}no longer a bitwise copy: {len(changed)} tensors are computed" if changed else "every tensor is a bitwise copy"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.reshape_checkpoint", description="Rewrite a checkpoint for another layout.", allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="SRC", help="a checkpoint, or a run (its newest checkpoint); only read")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to make; must not exist, or be empty")
    parser.add_argument("--layout", type=layout_of, required=True, help="ranks=8,tp=2,ep=4[,cp=..][,zero_size=..]")
    parser.add_argument("--max-memory", type=parse_bytes, default="2GB", metavar="SIZE", help="of tensors in flight, in all (2GB)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (one per core)")
    parser.add_argument("--max-file-size", type=parse_bytes, default="4GB", metavar="SIZE", help="a rank begins a new file after it (4GB)")
    parser.add_argument("--drop-optimizer", action="store_true", help="keep model.* only")
    parser.add_argument("--dtype", choices=STORED, help="convert model.*; the state keeps its dtypes")
    parser.add_argument("--average", type=Path, nargs="+", default=[], metavar="CHECKPOINT",
                        help="write the mean of SRC and these: weights and masters, no optimizer state")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="append zero rows to the embedding and its state")
    arguments = parser.parse_args(argv)
    options = Options(arguments.layout, arguments.dtype, arguments.drop_optimizer, bool(arguments.average), arguments.vocab_size)
    target = Path(os.path.realpath(arguments.target))  # of a link the directory
    started = time.perf_counter()
    try:
        if not 1 <= arguments.workers <= 1024:
            raise ValueError(f"--workers = {arguments.workers} is outside 1 to 1024")
        if arguments.max_memory < LEAST_MEMORY:
            raise ValueError(f"--max-memory = {arguments.max_memory} bytes is less than 1MB")
        checkpoints = [Checkpoint.find(path) for path in (arguments.source, *arguments.average)]
        for checkpoint in checkpoints:
            if target.is_relative_to(checkpoint.path.resolve()):
                raise ValueError(f"{target} lies in {checkpoint.path}, which is only read; choose another name")
        job = plan_job(checkpoints, options, arguments.max_file_size)
        total = rewrite(job, target, workers=arguments.workers, max_memory=arguments.max_memory)
    except (ValueError, OSError) as error:
        return parser.refused(error, "write", target)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same call goes on from the files that were finished") from None
    seconds = time.perf_counter() - started
    axes = ", ".join(f"{axis} {size}" for axis, size in options.layout.as_dict().items())
    print(f"{target}: {len(job.files)} files for {options.layout.world_size} ranks ({axes}), {total / 1e9:.3f} GB in {seconds:.1f} s "
          f"({total / 1e9 / seconds:.2f} GB/s), verified; {summary(job)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
