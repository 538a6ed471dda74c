"""Time every kernel on this GPU at the 8B's and 74B's shapes in bf16, against torch's best, alternating; no speed without a green check.

Times are medians of alternating rounds, caches flushed before each call and the host ahead, as in training: forward, and forward with
backward. Beside them TFLOP/s or GB/s (useful work over time), as a share of what a large matmul or copy reaches here; the host's time for
the launches; peak memory beyond the arguments. Routing is uniform and skewed (one expert has half of the tokens). Exit code 2 and one
line where there is no GPU, 1 where a check fails.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools import bench_kernels_moe
from zaya.cli import Parser, replace_text
from zaya.kernels import cases
from zaya.kernels.peers import Peer, peers
from zaya.kernels.timing import Clock, passes

PEER_LIMIT = 0.2  # of a peer's difference from the op: both round, some peers after every step; other work is 1 apart


def ceilings(clock: Clock, rounds: int, size: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """TFLOP/s of a large bf16 matmul and GB/s of a large copy (read and written)."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(copied, dtype=torch.int8, device="cuda") for _ in range(2))
    times = clock.medians({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds)
    return {"tflops": 2 * size**3 / times["matmul"] / 1e9, "gbs": 2 * copied / times["copy"] / 1e6}


def errors_as_timed(case: cases.Case, ours: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Errors of what is timed in the op's place, on a set of arguments that it may update, against the op's results."""
    if case.timed is None:
        return {}
    timed = cases.run(case.timed, case.make(device, torch.bfloat16), case.gradients, like=ours)
    return {f"{name} as timed": cases.error(timed[name], ours[name]) for name in ours}


def difference(peer: Peer, case: cases.Case, arguments: Mapping[str, Any], ours: Mapping[str, torch.Tensor]) -> float:
    """The largest error of a peer's results against the op's; 0, unmeasured, for a peer that leaves something out."""
    if not peer.is_whole:
        return 0.0
    theirs = cases.run(peer.call, arguments, case.gradients, like=ours)
    return max(cases.error(theirs[name], ours[name]) for name in ours)


def bench(case: cases.Case, clock: Clock, limits: Mapping[str, float], rounds: int, device: torch.device) -> dict[str, Any]:
    """One case: the check, then times and memory of the op and of every peer that runs and agrees."""
    arguments = case.make(device, torch.bfloat16)
    errors, ours = cases.errors(case, arguments), cases.run(case.op, arguments, case.gradients)
    errors |= errors_as_timed(case, ours, device)
    row: dict[str, Any] = {"case": case.name, "errors": errors, "limit": case.limit, "left_out": {}}
    row["is_right"] = all(error <= case.limit for error in errors.values())
    if not row["is_right"]:
        return row
    contenders = {"zaya": passes(case.timed or case.op, case, arguments)}
    for name, peer in {**peers(case, arguments), **bench_kernels_moe.peers(case, arguments)}.items():
        try:
            own = case.make(device, torch.bfloat16) if peer.is_in_place else arguments
            apart = difference(peer, case, own, ours)
            if apart > min(PEER_LIMIT, 5 * case.limit):
                row["left_out"][name] = f"computes something else: {apart:.1e}"
            else:
                contenders[name] = passes(peer.call, case, own)
                for call in contenders[name].values():
                    call()
        except Exception as error:  # noqa: BLE001  # a peer may fail in any way where its library or GPU does not suit it
            row["left_out"][name] = (str(error) or type(error).__name__).splitlines()[0][:120]
            contenders.pop(name, None)
        _empty_cache()
    del ours
    for kind in contenders["zaya"]:
        calls = {name: kinds[kind] for name, kinds in contenders.items()}
        row[kind] = {"ms": clock.medians(calls, rounds), "host_ms": {name: clock.host_milliseconds(call) for name, call in calls.items()},
                     "peak_bytes": {name: clock.peak_bytes(call) for name, call in calls.items()}}
    flops = {"forward": case.flops, "both": case.flops + (case.backward_flops or 2 * case.flops)}
    moved = {"forward": case.num_bytes, "both": case.num_bytes + case.backward_bytes if case.backward_bytes else 0}
    for kind in contenders["zaya"]:
        milliseconds = row[kind]["ms"]["zaya"]
        rates = {"tflops": flops[kind] / milliseconds / 1e9, "gbs": moved[kind] / milliseconds / 1e6}
        # What bounds the op is what it comes nearer to.
        row[kind]["bound"] = max(rates, key=lambda unit: rates[unit] / limits[unit])
        row[kind] |= {"rate": rates[row[kind]["bound"]], "share": rates[row[kind]["bound"]] / limits[row[kind]["bound"]]}
    return row


def _empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lines(row: dict[str, Any]) -> list[str]:
    """Markdown rows of one case, one per pass; ratio: the peer's time over ours."""
    if not row["is_right"]:
        above = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items() if not error <= row["limit"])
        return [f"| {row['case']} | WRONG: {above} | | | | | |"]
    result = []
    for kind in (kind for kind in ("forward", "both") if kind in row):
        part = row[kind]
        unit = {"tflops": "TFLOP/s", "gbs": "GB/s"}[part["bound"]]
        rate = f"{part['rate']:,.0f} {unit}, {part['share']:.0%}" if part["rate"] else "-"
        ours, memory = part["ms"]["zaya"], part["peak_bytes"]
        theirs = "; ".join(f"{name} {ms / ours:.2f} ({memory[name] / max(memory['zaya'], 1):.1f}x memory)"
                           for name, ms in part["ms"].items() if name != "zaya")
        result.append(f"| {row['case']} | {kind} | {ours:.3f} | {part['host_ms']['zaya']:.2f} | {rate} | {memory['zaya'] / 2**20:,.0f} | "
                      f"{theirs or '-'} |")
    return result


def main() -> int:
    parser = Parser(prog="tools.bench_kernels", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where every figure goes")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="only cases whose name starts so: attention, experts, ...")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each contender (at least 10)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    every = (*cases.cases(cases.CHIP), *bench_kernels_moe.CASES)
    names = parser.starting_so("--op", arguments.op, [case.name for case in every], "no chip case")
    chosen = [case for case in every if case.name in names]
    parser.check_output("--json", arguments.json)
    if arguments.rounds < 10:
        parser.error(f"--rounds {arguments.rounds}: a median of fewer than 10 says little")
    torch.backends.cuda.matmul.allow_tf32 = False  # the references compute in fp32
    clock, device = Clock(), torch.device("cuda")
    gpu, limits = torch.cuda.get_device_name(), ceilings(clock, arguments.rounds)
    print(f"{gpu}, torch {torch.__version__}: matmul {limits['tflops']:,.0f} TFLOP/s, copy {limits['gbs']:,.0f} GB/s\n")
    print("| case | pass | ms | host ms | rate, share of ceiling | peak MiB | peers: their time / ours |\n|---|---|---|---|---|---|---|")
    rows = []
    for case in tqdm(chosen, unit="case", disable=None):
        try:
            rows.append(bench(case, clock, limits, arguments.rounds, device))
        except torch.cuda.OutOfMemoryError:
            rows.append({"case": case.name, "skipped": "the check does not fit this GPU's memory"})
            tqdm.write(f"| {case.name} | {rows[-1]['skipped']} | | | | | |")
        else:
            tqdm.write("\n".join(lines(rows[-1])))
        _empty_cache()
        record = {"gpu": gpu, "torch": torch.__version__, "ceilings": limits, "rounds": arguments.rounds, "cases": rows}
        replace_text(arguments.json, json.dumps(record, indent=1) + "\n")  # after each case: a crash of a later one loses nothing
    return 0 if all(row.get("is_right", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
