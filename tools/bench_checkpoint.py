"""Checkpoints' speed beside torch.distributed.checkpoint and plain copies of the same bytes, in the same run, on the directory given.

    python -m tools.bench_checkpoint [--bytes 2.5e9] [--ranks 4] [--pairs 7] [--dir /dev/shm] [--only save load ...] [--json FILE]

The state is that of a run: bf16 weights, fp32 masters and moments of a ZAYA-shaped model of at least --bytes, cut over the ranks as
ZeRO-1 cuts it. Ranks are processes over gloo. Contenders take turns in every round, the order turns with the round, the first round is
not counted; a ratio is of one round's times, and a goal looks at the median of ratios. All fsync what they write. Before a read the page
cache is dropped (a tmpfs keeps its pages). What was read is compared with what was written, to the bit, in every round; if it differs
no figure is reported. Peers: `dcp` is torch.distributed.checkpoint with every tensor a DTensor, its first dim cut over the ranks,
sync_files=True, plan caching on; `raw` is each rank's same bytes through plain write() and fsync(), or readinto() memory that exists.

    save      zaya.checkpoint.write.save               against dcp.save, raw write
    load      Checkpoint.open, read_into (hashes checked)  against dcp.load (checks none), raw read
    reshard   the same, of a checkpoint that tp 2, ep 2 wrote  against dcp.load of a 2-D mesh's
    stall     zaya.checkpoint.saver: how long the step waits  against copy_ of the same tensors
    verify    Checkpoint.damages, a thread per rank    against a read of the same files by as many threads
    reshape   tools.reshape_checkpoint, its own process: GB/s and peak memory
    manifest  in one process, what rank 0 does for the 8B recipe on 1,024 ranks: plan, write and read the manifest

Exit code 0: measured, whatever the goals say (they are in the JSON); 1: something read back wrong; 2: bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from tools.bench_checkpoint_ranks import STEP, WrongBytesError, drop_page_cache, run_rank, state_bytes, take_turns, tensors_of, zaya_of
from zaya.checkpoint.files import file_name
from zaya.checkpoint.manifest import FileEntry, Manifest, num_bytes
from zaya.checkpoint.planning import SavePlan, Table, pack
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.saver import available_bytes
from zaya.cli import Parser, replace_text
from zaya.config import ModelConfig, load_recipe
from zaya.dtypes import STORED_NAMES
from zaya.parallel.partition import saved_by_rank
from zaya.plan import plan
from zaya.shard import Layout

SECTIONS = ("save", "load", "reshard", "stall", "verify", "reshape", "manifest")
GOALS = {  # section -> (contender, least median of contender's seconds / ours)
    "save": (("raw", 0.9), ("dcp", 1.5)), "load": (("dcp", 1.5),), "reshard": (("dcp", 1.5),), "stall": (("copy", 1.0),)}
RECIPE = Path(__file__).parents[1] / "recipes" / "zaya1_8b_pretrain1.toml"
MANIFEST_RANKS, MANIFEST_SECONDS, MANIFEST_BYTES = 1024, 5.0, 50e6


# ------------------------------------------------------------------------------------------------------------------ in one process


def ranks_figures(model: ModelConfig, folder: Path, ranks: int, pairs: int, sections: Sequence[str]) -> dict[str, Any]:
    """What the ranks measured; FOLDER/zaya is left, a checkpoint of theirs."""
    context = mp.start_processes(run_rank, (ranks, model, folder, pairs, sections), nprocs=ranks, join=False, start_method="spawn")
    try:
        while not context.join(timeout=1.0):
            pass
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        if (folder / "wrong").exists():
            raise WrongBytesError((folder / "wrong").read_text(encoding="ascii")) from None
        last = str(error).strip().splitlines()[-1]
        raise ValueError(f"a rank failed ({last}); if memory or room ran out, choose fewer --bytes") from None
    finally:  # an interruption ends them before the folder they write to goes
        for process in context.processes:
            process.kill()
            process.join()
    figures: dict[str, Any] = json.loads((folder / "seconds.json").read_text(encoding="ascii"))
    return figures


def verify_seconds(path: Path, workers: int, pairs: int) -> dict[str, list[float]]:
    """Every hash of a checkpoint, and a read of the same files by as many threads."""

    def zaya() -> None:
        for damage in Checkpoint.open(path).damages(workers=workers):
            raise WrongBytesError(str(damage))

    def raw() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_read_through, sorted(path.glob("*.safetensors"))))

    return take_turns("verify", {"zaya": zaya, "raw": raw}, pairs, lambda name: drop_page_cache(path), lambda name: None)


def _read_through(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def reshape_figures(source: Path, target: Path, ranks: int, num_bytes: int) -> dict[str, Any]:
    """tools.reshape_checkpoint as a user calls it, start included. Memory: of all its processes together, sampled."""
    drop_page_cache(source)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "tools.reshape_checkpoint", source, target, "--layout", f"ranks={2 * ranks},tp=2"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = {"Pss": 0, "Pss_Anon": 0}
    try:
        while process.poll() is None:
            now = memory_bytes(process.pid)
            peak = {key: max(most, now[key]) for key, most in peak.items()}
            time.sleep(0.05)
    finally:  # an interruption takes it along
        process.terminate()
        process.wait()
    seconds = time.perf_counter() - started
    words, _ = process.communicate()
    if process.returncode:
        raise WrongBytesError(f"tools.reshape_checkpoint ended with {process.returncode}: {words.strip().splitlines()[-1][:200]}")
    return {"seconds": seconds, "gb_per_s": num_bytes / seconds / 1e9, "peak_bytes": peak["Pss"], "peak_anonymous_bytes": peak["Pss_Anon"]}


def memory_bytes(pid: int) -> dict[str, int]:
    """Proportional set size of a process and all it started; "Pss_Anon" without mapped files, which the kernel can take back."""
    total = {"Pss": 0, "Pss_Anon": 0}
    pids = [pid]
    while pids:
        process = Path(f"/proc/{pids.pop()}")
        with contextlib.suppress(OSError):  # it has just ended
            for line in (process / "smaps_rollup").read_text().splitlines()[1:]:
                key, _, value = line.partition(":")
                if key in total:
                    total[key] += int(value.split()[0]) * 1024
            for thread in (process / "task").iterdir():
                pids += map(int, (thread / "children").read_text().split())
    return total


def manifest_figures(recipe: Path, ranks: int) -> dict[str, Any]:
    """What rank 0 does for a save by so many ranks, phase by phase: seconds, and (in a second pass) what memory it adds at most."""
    table = plan(load_recipe(recipe).model)
    tensors: Table = {name: (STORED_NAMES[dtype], row.shape) for row in table.values() for name, dtype in tensors_of(row)}
    packed, sizes, hashes = [], [], []
    for rank, mine in enumerate(tqdm(saved_by_rank(table, Layout(ranks), True), desc="boxes", unit="rank", disable=None)):
        boxes = [(name, box) for parameter, parts in mine.items() for name, _ in tensors_of(table[parameter]) for box in parts]
        packed.append(pack(tensors, [boxes]))
        sizes.append((len(boxes), sum(num_bytes(tensors[name][0], box[1]) for name, box in boxes)))
        hashes.append(np.random.default_rng(rank).bytes(16 * len(boxes)))
    names = [file_name(rank, ranks) for rank in range(ranks)]
    files = {name: FileEntry(16 + 128 * count + held, "0" * 32) for name, (count, held) in zip(names, sizes, strict=True)}
    results: list[Any] = [None] * 4

    def planned() -> None:
        results[0] = SavePlan(tensors, packed)
        results[0].check()

    def joined() -> None:
        results[1] = Manifest(**STEP, recipe={}, layout={"world_size": ranks}, tensors=results[0].tensors(hashes, names), files=files)

    def written() -> None:
        results[2] = results[1].to_json()

    def read() -> None:
        results[3] = Manifest.from_json(results[2])

    phases = {"plan": planned, "join": joined, "write": written, "read": read}
    seconds, extra = {}, {}
    for name, phase in phases.items():
        started = time.perf_counter()
        phase()
        seconds[name] = time.perf_counter() - started
    if results[3] != results[1]:
        raise WrongBytesError("the manifest that was read is not the one that was written")
    tracemalloc.start()  # slows everything several times: never around what is timed
    for name, phase in phases.items():
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        phase()
        extra[name] = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return {"recipe": recipe.stem, "ranks": ranks, "tensors": len(tensors), "boxes": sum(count for count, _ in sizes),
            "plan_bytes_gathered": sum(map(len, packed)), "manifest_bytes": len(results[2]), "seconds": seconds,
            "seconds_in_all": sum(seconds.values()), "extra_bytes_at_most": extra}


# ------------------------------------------------------------------------------------------------------------------ the report


def summary(seconds: Mapping[str, Sequence[float]], num_bytes: int) -> dict[str, Any]:
    """Medians, and the peers' seconds over ours, round by round: above 1 they are slower."""
    ratios = {peer: [theirs / ours for ours, theirs in zip(seconds["zaya"], times, strict=True)]
              for peer, times in seconds.items() if peer != "zaya"}
    return {"median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
            "gb_per_s": {name: num_bytes / statistics.median(times) / 1e9 for name, times in seconds.items()},
            "against": {peer: {"median": statistics.median(r), "min": min(r), "max": max(r)} for peer, r in ratios.items()}}


def goals_met(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that this run can speak of."""
    goals = [{"goal": f"{section}: {peer}'s seconds / ours >= {least}", "value": results[section]["against"][peer]["median"],
              "met": results[section]["against"][peer]["median"] >= least}
             for section, goal in GOALS.items() if section in results for peer, least in goal]
    if "manifest" in results:
        found = results["manifest"]
        for what, value, most in (("seconds", found["seconds_in_all"], MANIFEST_SECONDS),
                                  ("bytes of the manifest", found["manifest_bytes"], MANIFEST_BYTES),
                                  ("more bytes of memory in any phase", max(found["extra_bytes_at_most"].values()), MANIFEST_BYTES)):
            goals.append({"goal": f"manifest: {what} < {most}", "value": value, "met": value < most})
    return goals


def surroundings(folder: Path) -> dict[str, Any]:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
               platform.machine())
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    return {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "load_before": os.getloadavg()[0],
            "filesystem": max(inside, key=lambda mount: len(mount[1]))[2]}


def measure(num_bytes: float, ranks: int, pairs: int, directory: Path, sections: Sequence[str]) -> dict[str, Any]:
    """ValueError: bad input. WrongBytesError: something read back wrong. Leaves nothing in the directory."""
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ValueError(f"{directory} is not a directory that can be written to; choose another --dir")
    report: dict[str, Any] = {"environment": surroundings(directory), "ranks": ranks, "pairs": pairs, "results": {}}
    results = report["results"]
    timed = [section for section in sections if section != "manifest"]
    if timed:
        model = zaya_of(num_bytes)
        check_room(directory, state_bytes(plan(model)))
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=directory) as name:
            folder = Path(name)
            figures = ranks_figures(model, folder, ranks, pairs, timed)
            held = figures["state"]["bytes"]
            report["state"] = figures["state"]
            path = folder / "zaya" / "step-00000001"
            if "verify" in timed:
                figures["seconds"]["verify"] = verify_seconds(path, ranks, pairs)
            results.update({section: summary(times, held) for section, times in figures["seconds"].items()})
            if "reshape" in timed:
                results["reshape"] = reshape_figures(path, folder / "reshaped", ranks, held)
    if "manifest" in sections:
        results["manifest"] = manifest_figures(RECIPE, MANIFEST_RANKS)
    report["goals"] = goals_met(results)
    return report


def check_room(directory: Path, held: int) -> None:
    """ValueError unless three checkpoints fit on the disk and, if that is memory, beside two states of their size."""
    free = shutil.disk_usage(directory).free
    if 3.1 * held > free:
        raise ValueError(f"{directory} has {free / 1e9:.1f} GB free, {held / 1e9:.2f} GB of state need 3.1 times that; lower --bytes")
    available = available_bytes()
    if 5.5 * held > available:
        raise ValueError(f"{available / 1e9:.1f} GB of memory are available, {held / 1e9:.2f} GB of state need 5.5 times that; "
                         "lower --bytes")


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    where = report["environment"]
    yield f"{where['cpu']}, {where['cores']} cores, load {where['load_before']:.1f}, {where['filesystem']}; torch {where['torch']}"
    if "state" in report:
        state = report["state"]
        yield f"{state['bytes'] / 1e9:.2f} GB in {state['tensors']} tensors on {report['ranks']} ranks, {report['pairs']} rounds"
    for section, found in report["results"].items():
        if section == "reshape":
            yield (f"{section:8} {found['gb_per_s']:6.2f} GB/s, peak {found['peak_anonymous_bytes'] / 1e6:.0f} MB "
                   f"({found['peak_bytes'] / 1e6:.0f} with mapped files)")
        elif section == "manifest":
            extra = found["extra_bytes_at_most"]
            phases = ", ".join(f"{name} {s:.2f} s +{extra[name] / 1e6:.0f} MB" for name, s in found["seconds"].items())
            yield f"{section:8} {found['boxes']:,} boxes of {found['ranks']} ranks, {found['manifest_bytes'] / 1e6:.1f} MB: {phases}"
        else:
            speeds = ", ".join(f"{name} {ms:,.0f} ms ({found['gb_per_s'][name]:.2f} GB/s)" for name, ms in found["median_ms"].items())
            ratios = ", ".join(f"{peer} / zaya {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
                               for peer, r in found["against"].items())
            yield f"{section:8} {speeds}; {ratios}"
    for goal in report["goals"]:
        yield f"{'met   ' if goal['met'] else 'MISSED'}  {goal['goal']}: {goal['value']:,.2f}"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.bench_checkpoint", description="Checkpoints' speed beside their peers.", allow_abbrev=False)
    parser.add_argument("--bytes", type=float, default=2.5e9, help="of state, at least (2.5e9); 5.5 times as much memory is needed")
    parser.add_argument("--ranks", type=int, default=4, help="processes, an even number (4)")
    parser.add_argument("--pairs", type=int, default=7, help="counted rounds (7)")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where checkpoints are written (/dev/shm)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, metavar="NAME", help=", ".join(SECTIONS))
    arguments = parser.parse_args(argv)
    if not 1e5 <= arguments.bytes <= 1e12:
        parser.error(f"--bytes {arguments.bytes:g} is outside 1e5 to 1e12")
    if not 2 <= arguments.ranks <= 64 or arguments.ranks % 2:
        parser.error(f"--ranks {arguments.ranks} is not an even number from 2 to 64")
    if not 1 <= arguments.pairs <= 1000:
        parser.error(f"--pairs {arguments.pairs} is outside 1 to 1000")
    parser.check_output("--json", arguments.json)
    try:
        report = measure(arguments.bytes, arguments.ranks, arguments.pairs, arguments.dir, arguments.only)
    except WrongBytesError as error:
        print(f"tools.bench_checkpoint: {error}; no speed is reported", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return parser.refused(error, "write", arguments.dir)
    print("\n".join(lines(report)), flush=True)
    if arguments.json is not None:
        replace_text(arguments.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
