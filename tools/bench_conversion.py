"""tools.export_hf and tools.import_hf beside `cp` and fsync of the same bytes, in the same run, on the directory given.

    python -m tools.bench_conversion [--bytes 2e9] [--pairs 7] [--dir /dev/shm] [--workers N] [--json FILE]

The model is of about --bytes: random weights in bf16, in blocks of ZAYA1-8B, so that it has as many tensors per GB as a full-size one.
Three times that much is written below --dir, and removed. In each round a conversion and a copy of its source take turns, the order
turns with the round, and the first round is not counted. A ratio is of one round: the copy's time over the conversion's, so 1.0 is as
fast as cp. Seconds are those of the conversion in a process that has started (importing torch takes seconds whatever the size); CPU
seconds, user and system, say what is left of a ratio on cores that others use too; memory is the process' peak, and how much of that
came with the conversion. Every import is compared with the checkpoint it began as, by the hashes of all tensors; if one differs no figure
is reported.

Exit code 0: measured; 1: something was converted wrong, or not at all; 2: bad input, or a disk that fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zaya.checkpoint import stream
from zaya.checkpoint.manifest import load
from zaya.checkpoint.write import CheckpointWriter
from zaya.cli import Parser, replace_text, worker_count
from zaya.config import ModelConfig
from zaya.model.hf import links
from zaya.plan import plan

TOOLS = {"export": "tools.export_hf", "import": "tools.import_hf"}  # run as they are called
GOAL, LEAST_BYTES, MAX_PAIRS = 0.8, 10_000_000, 1000
SHARDS = 4  # that the model leaves in, as the 8B does (16 GB in shards of 5 GB): a file is written by one thread at a time
VOCABULARY = 8192


class WrongError(Exception):
    """A conversion failed, or its result is not what it began as."""


def model_of(num_bytes: int) -> ModelConfig:
    """About so many bytes in bf16: blocks of ZAYA1-8B, as many as fit; narrower ones where not even two do."""
    hidden = 4096
    while True:
        hidden //= 2

        def model(layers: int, hidden: int = hidden) -> ModelConfig:
            return ModelConfig(vocab_size=VOCABULARY, hidden_size=hidden, num_layers=layers, num_heads=8, num_kv_heads=2,
                               head_dim=hidden // 16, num_experts=16, moe_intermediate_size=hidden, router_hidden_size=hidden // 8)

        one, two = (2 * sum(row.numel for row in plan(model(layers)).values()) for layers in (1, 2))
        if two <= num_bytes or hidden == 64:
            return model(max(1, (num_bytes - one) // (two - one) + 1))


def write_checkpoint(path: Path, config: ModelConfig) -> None:
    """Random weights, as a run in bf16 leaves them."""
    random = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, recipe={"model": dataclasses.asdict(config)}) as writer:
        for link in tqdm(links(config), unit="link", desc="make", disable=None, dynamic_ncols=True):
            for named in link.ours:
                dtype = torch.float32 if link.always_fp32 else torch.bfloat16
                bits = torch.randint(-2**15, 2**15, named.shape, generator=random, dtype=torch.int16)
                writer.add(f"model.{named.name}", bits.to(dtype) if link.always_fp32 else bits.bitwise_and_(-0x4001).view(dtype))


def peak_bytes() -> int:
    """Of this process alone: getrusage would inherit the parent's."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def convert(tool: str, source: str, target: str, workers: str) -> int:
    """In a process of its own: one conversion, its figures on the last line of stdout."""
    main: Callable[[Sequence[str]], int] = importlib.import_module(TOOLS[tool]).main
    before, started, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    shard = [f"--max-shard-size={-(-size_of(Path(source)) // SHARDS // 1000)}KB"] if tool == "export" else []
    code = main([source, target, "--workers", workers, *shard])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes(), "added_bytes": peak_bytes() - before}))
    return code


def timed_conversion(tool: str, source: Path, target: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench_conversion", "--convert", tool, str(source), str(target), str(workers)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    whole = time.perf_counter() - started
    if done.returncode:
        raise WrongError(f"tools.{tool}_hf ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"process_seconds": whole}


def timed_copy(source: Path, target: Path) -> dict[str, Any]:
    """cp -r, then fsync of every file: what the tools do too. ValueError: cp's complaint."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(["cp", "-r", str(source), str(target)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(next(iter(done.stderr.splitlines()), f"cp ended with {done.returncode}"))
    for path in sorted(target.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def check_import(source: Path, target: Path) -> None:
    before, after = load(source).tensors, load(target).tensors
    hashes = [{name: [box.xxh3 for box in entry.boxes] for name, entry in tensors.items()} for tensors in (before, after)]
    if hashes[0] != hashes[1]:
        odd = sorted(name for name in before.keys() | after.keys() if hashes[0].get(name) != hashes[1].get(name))
        raise WrongError(f"tensor {odd[0]} came back otherwise (and {len(odd) - 1} more); no figure is reported")


def measure(folder: Path, config: ModelConfig, pairs: int, workers: int) -> dict[str, list[dict[str, Any]]]:
    """Rounds of (conversion, copy of the same source), the first one not counted."""
    checkpoint, hf_dir, made = folder / "checkpoint", folder / "hf", folder / "made"
    write_checkpoint(checkpoint, config)
    timed_conversion("export", checkpoint, hf_dir, workers)
    rounds: dict[str, list[dict[str, Any]]] = {"export": [], "import": []}
    for index in tqdm(range(pairs + 1), unit="pair", disable=None, dynamic_ncols=True):
        for tool, source in (("export", checkpoint), ("import", hf_dir)):
            figures: dict[str, Any] = {"bytes": size_of(source)}
            for side in (("tool", "copy") if index % 2 else ("copy", "tool")):
                figures[side] = timed_copy(source, made) if side == "copy" else timed_conversion(tool, source, made, workers)
                if side == "tool" and tool == "import":
                    check_import(checkpoint, made)
                shutil.rmtree(made)
            if index:
                rounds[tool].append(figures)
    return rounds


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ratios = [figures["copy"]["seconds"] / figures["tool"]["seconds"] for figures in rounds]
    speed = {side: statistics.median(figures["bytes"] / 1e9 / figures[side]["seconds"] for figures in rounds) for side in ("tool", "copy")}
    cpu = statistics.median(figures["copy"]["cpu_seconds"] / figures["tool"]["cpu_seconds"] for figures in rounds)
    return {"gb_per_s": speed["tool"], "copy_gb_per_s": speed["copy"], "ratio_median": statistics.median(ratios), "ratio_min": min(ratios),
            "ratio_max": max(ratios), "goal_ratio": GOAL, "goal_met": statistics.median(ratios) >= GOAL,
            "cpu_ratio_median": cpu,
            "peak_bytes": max(figures["tool"]["peak_bytes"] for figures in rounds),
            "added_bytes": max(figures["tool"]["added_bytes"] for figures in rounds)}


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("--bytes", type=float, default=2e9, help="of the model's weights, about (2e9)")
    parser.add_argument("--pairs", type=int, default=7, help="counted rounds (7)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where everything is written (/dev/shm)")
    parser.add_argument("--workers", type=worker_count, default=stream.WORKERS, metavar="N", help="threads (one per core, at most 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(argv)
    if not LEAST_BYTES <= options.bytes < 2**63:
        parser.error(f"--bytes {options.bytes:g}: less than {LEAST_BYTES:g} or absurd; a smaller model times the files, not the bytes")
    if not 1 <= options.pairs <= MAX_PAIRS:
        parser.error(f"--pairs {options.pairs} is outside 1 to {MAX_PAIRS}")
    if not options.dir.is_dir():
        parser.error(f"--dir {options.dir} is not a directory; name one")
    parser.check_output("--json", options.json)
    free = shutil.disk_usage(options.dir).free
    if free < 3.1 * options.bytes:
        parser.error(f"--dir {options.dir} has {free / 1e9:.1f} GB free, the run needs {3.1 * options.bytes / 1e9:.1f}; lower --bytes")
    return options


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--convert"]:
        return convert(*argv[1:])
    parser = Parser(prog="tools.bench_conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse(parser, argv)
    config = model_of(int(options.bytes))
    try:
        with tempfile.TemporaryDirectory(prefix="bench_conversion-", dir=options.dir) as folder:
            rounds = measure(Path(folder), config, options.pairs, options.workers)
    except WrongError as error:
        print(f"tools.bench_conversion: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return parser.refused(error, "write", options.dir)
    result = {"workers": options.workers, "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__,
              "model": dataclasses.asdict(config), **{tool: summary(figures) for tool, figures in rounds.items()}, "rounds": rounds}
    for tool in rounds:
        of = summary(rounds[tool])
        print(f"{tool}: {of['gb_per_s']:.2f} GB/s, cp {of['copy_gb_per_s']:.2f} GB/s, ratio {of['ratio_median']:.2f} "
              f"({of['ratio_min']:.2f} to {of['ratio_max']:.2f}) in {len(rounds[tool])} pairs, of CPU time {of['cpu_ratio_median']:.2f}; "
              f"peak {of['peak_bytes'] / 1e6:.0f} MB, {of['added_bytes'] / 1e6:.0f} MB with the conversion, {options.workers} threads",
              flush=True)
    if options.json:
        replace_text(options.json, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
