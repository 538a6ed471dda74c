"""What a checkpoint holds and whether it is whole: step, layout, sizes by kind of state, and every hash.

    python -m tools.inspect_checkpoint RUN                              # its checkpoints, and what a resume would find
    python -m tools.inspect_checkpoint CHECKPOINT --verify
    python -m tools.inspect_checkpoint CHECKPOINT --tensors '*router*' --json

Off the batch's path; knows no model, reads only. Without --verify it checks the manifest's hash and the files' sizes; with it every byte,
on threads. Exit code 0: good, 7: corrupt (a line names the file, and the tensor, of every damage), 2: no checkpoint or another program's,
or bad arguments.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zaya.checkpoint.directory import MANIFEST, step_directories
from zaya.checkpoint.errors import CheckpointError, ForeignError
from zaya.checkpoint.manifest import Manifest, load, num_bytes
from zaya.checkpoint.read import Checkpoint
from zaya.cli import Parser, format_bytes, worker_count

GOOD, NO_CHECKPOINT, CORRUPT = 0, 2, 7
MAX_FOREIGN_BYTES = 128 << 20  # of another program's manifest, which is read without the bounds that ours has
MOMENTS = ("exp_avg", "exp_avg_sq")
OTHERS = {  # a file of a directory -> whose checkpoint that is, and what reads it
    "latest_universal": "a universal checkpoint of DeepSpeed; tools.import_deepspeed reads those",
    "zero/optimizer_state.pt": "a universal checkpoint of DeepSpeed; tools.import_deepspeed reads those",
    "latest": "a checkpoint of DeepSpeed; its ds_to_universal makes of it what tools.import_deepspeed reads",
    "mp_rank_00_model_states.pt": "a checkpoint of DeepSpeed; its ds_to_universal makes of it what tools.import_deepspeed reads",
    "latest_checkpointed_iteration.txt": "a run of Megatron-LM; tools.import_megatron reads those",
    "common.pt": "a torch_dist checkpoint of Megatron-core; tools.import_megatron reads those",
    ".metadata": "a checkpoint of torch.distributed; no tool here reads those",
    "config.json": "a model of transformers; tools.import_hf reads those of ZAYA1",
}


@dataclass(frozen=True)
class Report:
    """One checkpoint. `manifest` is None where that is what is damaged; `seconds` is what the hashes took, None if they were not asked;
    `foreign`: why it is another program's or version's, which is no damage; empty: ours."""

    path: Path
    manifest: Manifest | None
    damage: list[str]
    seconds: float | None = None
    foreign: str = ""


def kind_of(name: str) -> str:
    """The kind of state that a tensor's name says it is."""
    first, _, rest = name.partition(".")
    if name.startswith("optim.balance.") or name.endswith(".balance_bias"):
        return "router balance"
    if first != "optim" or "." not in rest:
        return first
    kind = rest.partition(".")[0]
    return "moments" if kind in MOMENTS else kind


def inspect(path: Path, verify: bool, workers: int) -> Report:
    try:
        manifest = load(path)
    except ForeignError as error:
        return Report(path, None, [], foreign=f"not a zaya checkpoint of this version: {error}")
    except CheckpointError as error:
        if is_another_programs(path):
            return Report(path, None, [], foreign=f"not a zaya checkpoint: its {MANIFEST} is another program's{likeness(path)}")
        return Report(path, None, [str(error)])
    except OSError as error:
        return Report(path, None, [f"cannot read {path / MANIFEST}: {error.strerror}"])
    checkpoint = Checkpoint(path, manifest)
    if not verify:
        return Report(path, manifest, [str(damage) for damage in checkpoint.missized()])
    started = time.perf_counter()
    with tqdm(total=box_bytes(manifest), unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc=path.name) as bar:
        damage = [str(damage) for damage in checkpoint.damages(workers, bar.update)]
    return Report(path, manifest, damage, time.perf_counter() - started)


def is_another_programs(path: Path) -> bool:
    """Whether the manifest is whole JSON with nothing of ours in it, beside no file of ours. Damage leaves some of it, or no JSON."""
    if any(path.glob("shard-*.safetensors")):
        return False
    try:
        with open(path / MANIFEST, "rb") as file:
            found = json.loads(file.read(MAX_FOREIGN_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, list) or (isinstance(found, dict) and not {"xxh3", "manifest"} & found.keys())


def likeness(path: Path) -> str:
    """Whose checkpoint a directory that is none of ours looks like; empty where there is no sign."""
    sign = next((name for name in OTHERS if (path / name).is_file()), None)
    return "" if sign is None else f"; with {sign} it looks like {OTHERS[sign]}"


def box_bytes(manifest: Manifest) -> int:
    return sum(num_bytes(entry.dtype, entry.shape) for entry in manifest.tensors.values())


def kinds(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Kind of state -> tensors, elements, bytes, dtypes."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.tensors.items():
        row = found.setdefault(kind_of(name), {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        row["tensors"] += 1
        row["elements"] += math.prod(entry.shape)
        row["bytes"] += num_bytes(entry.dtype, entry.shape)
        row["dtypes"] = sorted({*row["dtypes"], entry.dtype})
    return found


def matching(manifest: Manifest, pattern: str) -> list[dict[str, Any]]:
    return [{"name": name, "kind": kind_of(name), "dtype": entry.dtype, "shape": list(entry.shape), "boxes": len(entry.boxes),
             "bytes": num_bytes(entry.dtype, entry.shape), "files": sorted({box.file for box in entry.boxes})}
            for name, entry in manifest.tensors.items() if fnmatch.fnmatchcase(name, pattern)]


def as_json(report: Report, pattern: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"path": str(report.path), "good": not report.damage, "verified": report.seconds is not None,
                           "damage": report.damage}
    manifest = report.manifest
    if manifest is not None:
        out |= {"step": manifest.step, "tokens": manifest.tokens, "tokens_by_corpus": manifest.tokens_by_corpus,
                "position": manifest.position, "layout": manifest.layout, "kinds": kinds(manifest), "tensors": len(manifest.tensors),
                "boxes": sum(len(entry.boxes) for entry in manifest.tensors.values()), "files": len(manifest.files),
                "bytes": sum(entry.size for entry in manifest.files.values())}
        if pattern is not None:
            out["matching"] = matching(manifest, pattern)
    return out


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("x") else "s")


def verdict(report: Report) -> str:
    if report.damage:
        return f"CORRUPT: {count(len(report.damage), 'damage')}"
    if report.seconds is None:
        return "whole by the manifest's hash and the files' sizes; --verify checks every byte"
    assert report.manifest is not None  # it is the first thing to be damaged
    held = box_bytes(report.manifest)
    return f"good: every hash is right ({format_bytes(held)} in {report.seconds:.2f} s, {held / max(report.seconds, 1e-9) / 1e9:.2f} GB/s)"


def text(report: Report, pattern: str | None) -> str:
    lines, manifest = [str(report.path)], report.manifest
    if manifest is not None:
        numbers = as_json(report, pattern)
        lines += [f"  step {manifest.step:,}, {manifest.tokens:,} tokens, position {manifest.position:,} rows"]
        if len(manifest.tokens_by_corpus) > 1:
            lines += [f"  {tokens:,} tokens of {corpus!a}" for corpus, tokens in manifest.tokens_by_corpus.items()]
        lines += ["  written by " + ", ".join(f"{ascii(axis)[1:-1]} {ranks}" for axis, ranks in manifest.layout.items()), ""]
        lines += [f"  {'kind':16} {'tensors':>8} {'elements':>16} {'size':>10}  dtypes"]
        lines += [f"  {kind:16.40} {row['tensors']:8} {row['elements']:16,} {format_bytes(row['bytes']):>10}  {', '.join(row['dtypes'])}"
                  for kind, row in numbers["kinds"].items()]
        elements = sum(row["elements"] for row in numbers["kinds"].values())
        lines += [f"  {'in all':16} {numbers['tensors']:8} {elements:16,} {format_bytes(box_bytes(manifest)):>10}", "",
                  f"  {count(numbers['files'], 'file')} of {format_bytes(numbers['bytes'])} with "
                  f"{count(numbers['boxes'], 'box')}"]
        lines += [f"    {row['name']:60} {row['dtype']:4} {row['shape']!s:20} {format_bytes(row['bytes']):>10} "
                  f"in {count(row['boxes'], 'box')}"
                  for row in numbers.get("matching", [])]
    return "\n".join([*lines, f"  {verdict(report)}", *(f"    {damage}" for damage in report.damage)])


def table(run: Path, reports: list[Report], foreign: list[Report], unfinished: list[Path]) -> str:
    """The checkpoints of a run, a line each, and what lies beside them."""
    lines = [f"{run}: {count(len(reports), 'checkpoint')}"]
    for report in reports:
        held = "" if report.manifest is None else f"{report.manifest.tokens:,} tokens, {format_bytes(as_json(report, None)['bytes'])}, "
        lines += [f"  {report.path.name}  {held}{verdict(report)}", *(f"    {damage}" for damage in report.damage)]
    lines += [f"  {report.path.name}  {report.foreign}" for report in foreign]
    return "\n".join([*lines, *(f"  {path.name}  no {MANIFEST}: a save that did not end; it counts for nothing" for path in unfinished)])


def look(path: Path) -> tuple[list[Path], list[Path]]:
    """(checkpoints, directories of saves that did not end): of a checkpoint itself alone, of a run all. ValueError: it is neither."""
    try:
        if (path / MANIFEST).is_file():
            return [path], []
        found = step_directories(path / "checkpoints")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    complete = [directory for _, directory, whole in found if whole]
    if not complete:
        killed = f"; {count(len(found), 'save')} in {path / 'checkpoints'} did not end" if found else ""
        raise ValueError(f"{path} is neither a checkpoint (no {MANIFEST}) nor a run that has one "
                         f"(no checkpoints/step-*/{MANIFEST}){killed}{likeness(path)}")
    return complete, [directory for _, directory, whole in found if not whole]


def check_readable(path: Path) -> None:
    """A manifest that we may not read says nothing about the checkpoint: ValueError. One that the disk cannot give is damage."""
    try:
        with open(path / MANIFEST, "rb"):
            pass
    except OSError as error:
        if error.errno != errno.EIO:
            raise ValueError(f"cannot read {path / MANIFEST}: {error.strerror}") from None


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.inspect_checkpoint", description="What a checkpoint holds, and whether it is whole.")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run (all of its checkpoints)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare every hash")
    parser.add_argument("--json", action="store_true", help="print JSON: an object for a checkpoint; for a run one that lists them")
    parser.add_argument("--tensors", metavar="PATTERN", help="list tensors whose names match, as '*router*' (of a run's newest checkpoint)")
    parser.add_argument("--workers", type=worker_count, default=min(8, os.cpu_count() or 1), metavar="N",
                        help="threads of --verify (%(default)s)")
    options = parser.parse_args(argv)
    pattern = options.tensors
    try:
        paths, unfinished = look(options.checkpoint)
        for path in paths:
            check_readable(path)
        reports = [inspect(path, options.verify, options.workers) for path in paths]
        reports = [report for report in reports if not report.damage or (report.path / MANIFEST).is_file()]  # a run prunes meanwhile
        foreign = [report for report in reports if report.foreign]
        reports = [report for report in reports if not report.foreign]
        if foreign and not reports:
            raise ValueError(f"{foreign[-1].path} is {foreign[-1].foreign}")
        if not reports:
            raise ValueError(f"{options.checkpoint} was removed while it was read")
        newest = reports[-1]
        if pattern is not None and newest.manifest is not None and not matching(newest.manifest, pattern):
            raise ValueError(f"no tensor of {newest.path} matches {pattern!r}; names are as model.blocks.0.moe.router.down.weight")
    except ValueError as error:
        print(f"tools.inspect_checkpoint: {error}", file=sys.stderr)
        return NO_CHECKPOINT
    is_run = paths != [options.checkpoint]
    if options.json:
        listed = [as_json(report, pattern if report is newest else None) for report in reports]
        beside = {"foreign": [{"path": str(report.path), "why": report.foreign} for report in foreign],
                  "unfinished": [str(path) for path in unfinished]}
        print(json.dumps({"run": str(options.checkpoint), "checkpoints": listed, **beside} if is_run else listed[0], indent=1))
    else:
        parts = [table(options.checkpoint, reports, foreign, unfinished)] if is_run else []
        print("\n\n".join([*parts, text(newest, pattern)]))
    damages = [damage for report in reports for damage in report.damage]
    if damages:
        print(f"tools.inspect_checkpoint: {options.checkpoint} is corrupt, {count(len(damages), 'damage')}; the first: {damages[0]}",
              file=sys.stderr)
    return CORRUPT if damages else GOOD


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
