"""Compile every shipped kernel configuration for the MI300X, without one, and print what its machine code uses; exit 1 where a gate fails.

Each chip case runs forward and backward on "meta" tensors, which compute nothing, so an op that waited for the device would fail here.
Equal launches are compiled once, in as many processes as there are CPUs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# The interpreter's stand-in for a kernel cannot be compiled. Triton reads this once, as it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
from tqdm import tqdm

from zaya.cli import Parser
from zaya.kernels import cases, gfx942
from zaya.kernels.launch import MI300X, Config, launching_through


@dataclass
class Launch:
    """A distinct launch, and the cases that make it."""

    build: gfx942.Build
    config: dict[str, int]
    cases: list[str] = field(default_factory=list)


def launches(chosen: Iterable[cases.Case], dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The distinct launches of the cases, forward and backward."""
    found: dict[str, Launch] = {}
    meta = torch.device("meta")
    for case in chosen:
        def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config, name: str = case.name) -> None:
            build = gfx942.specialise(kernel, arguments, config.options(MI300X))
            entry = found.setdefault(build.key, Launch(build, {**config.blocks, **config.options(MI300X)}))
            if name not in entry.cases:
                entry.cases.append(name)

        try:
            with launching_through(note):
                cases.run(case.op, case.make(meta, dtype), case.gradients)
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
    return list(found.values())


def figures(build: gfx942.Build) -> dict[str, Any]:
    """Compile one launch and read its machine code; "broken" lists its failed gates."""
    broken = []
    try:
        code = gfx942.build(build)
    except Exception as error:  # noqa: BLE001  # a compiler may fail in any way; the other launches are still reported
        code = gfx942.Code(build.kernel, "", b"", build.num_warps, 0, False)
        broken = [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    used, regions = gfx942.resources(code), gfx942.regions(code.asm)
    loop = gfx942.hot(regions)
    return {**used, "mfma": sum(region.mfma for region in regions), "mfma_share": round(loop.mfma_share, 3), "hot_mfma": loop.mfma,
            "hot_valu": loop.valu, "hot_lds": loop.lds, "hot_instructions": loop.instructions, "hot_depth": loop.depth,
            "wide_loads": loop.wide_loads, "narrow_loads": loop.narrow_loads, "wide_share": round(loop.wide_share, 3),
            "is_matrix_kernel": code.has_dot, "broken": broken + gfx942.gates(code, used, regions)}


def report(found: list[Launch]) -> list[dict[str, Any]]:
    """The figures of every launch, in their order."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, max(len(found), 1)), multiprocessing.get_context("spawn")) as pool:
        every = tqdm(pool.map(figures, [launch.build for launch in found]), total=len(found), unit="kernel", disable=None)
        return [{"kernel": launch.build.kernel, "config": launch.config, "arch": MI300X.arch, **row, "cases": launch.cases}
                for launch, row in zip(found, every)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; launches of one kernel whose figures agree share a line."""
    lines = ["| kernel | tile | warps | VGPRs | LDS | waves | MFMA | share | 16-byte loads | launches |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    merged: dict[str, int] = {}
    for row in rows:
        blocks = "x".join(str(value) for key, value in row["config"].items() if key.isupper())
        loads = f"{row['wide_loads']} of {row['wide_loads'] + row['narrow_loads']}"
        share = f"{row['mfma_share']:.2f}" if row["is_matrix_kernel"] else "-"
        line = (f"| {row['kernel']} | {blocks} | {row['config']['num_warps']} | {row['vgprs']} | {row['lds_bytes']:,} | "
                f"{row['waves_per_simd']} | {row['hot_mfma'] or '-'} | {share} | {loads}, {row['wide_share']:.0%} of bytes |")
        merged[line] = merged.get(line, 0) + 1
    return "\n".join([*lines, *(f"{line} {times} |" for line, times in merged.items())])


def main() -> int:
    parser = Parser(prog="tools.kernel_report", description=__doc__)
    parser.add_argument("--arch", choices=[MI300X.arch], default=MI300X.arch, help="chip to compile for")
    parser.add_argument("--op", help="only cases whose name starts so: attention, moe, ...")
    parser.add_argument("--json", action="store_true", help="print every figure as a JSON list instead of a table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Triton's backend announces a default that it will change, once per kernel
    chosen = [case for case in cases.cases(cases.CHIP) if case.name.startswith(arguments.op or "")]
    if not chosen:
        parser.error(f"--op {arguments.op}: no chip case has such a name")
    rows = report(launches(chosen))
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    broken = [f"{row['kernel']} {row['config']} ({row['cases'][0]}): {'; '.join(row['broken'])}" for row in rows if row["broken"]]
    for line in broken:
        print("GATE", line, file=sys.stderr)
    print(f"{len(rows)} launches, {len(broken)} with a failed gate", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
