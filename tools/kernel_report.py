"""Compile every shipped kernel configuration for the MI300X, without one, and print what its machine code uses; exit 1 where a gate fails.

Each chip case runs forward and backward on "meta" tensors, which compute nothing, so an op that waited for the device would fail here.
Equal launches are compiled once, in as many processes as there are CPUs.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# The interpreter's stand-in for a kernel cannot be compiled. Triton reads this once, as it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
from tqdm import tqdm

from zaya.cli import Parser
from zaya.kernels import cases, machine_code
from zaya.kernels.launch import MI300X


@dataclass
class Launch:
    """A distinct launch, and the cases that make it."""

    build: machine_code.Build
    config: dict[str, int]
    cases: list[str] = field(default_factory=list)


def launches(chosen: Iterable[cases.Case], dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """The distinct launches of the cases, forward and backward."""
    found: dict[str, Launch] = {}
    for case in chosen:
        try:
            with machine_code.recording() as noted:
                cases.run(case.op, case.make(torch.device("meta"), dtype), case.gradients)
        except Exception as error:
            error.add_note(f"in case {case.name}")
            raise
        for build, config in noted:
            entry = found.setdefault(build.key, Launch(build, {**config.blocks, **config.options(MI300X)}))
            if case.name not in entry.cases:
                entry.cases.append(case.name)
    return list(found.values())


def report(found: list[Launch]) -> list[dict[str, Any]]:
    """The figures of every launch, in their order."""
    every = tqdm(machine_code.all_figures([launch.build for launch in found]), total=len(found), unit="kernel", disable=None)
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
    parser.add_argument("--op", help="only cases whose name starts so: attention, experts, ...")
    parser.add_argument("--json", action="store_true", help="print every figure as a JSON list instead of a table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Triton's backend announces a default that it will change, once per kernel
    chosen = [case for case in cases.cases(cases.CHIP) if case.name.startswith(arguments.op or "")]
    if not chosen:
        names = sorted({case.name.partition(" ")[0] for case in cases.cases(cases.CHIP)})
        parser.error(f"--op {arguments.op}: no chip case has such a name; there are {', '.join(names)}")
    rows = report(launches(chosen))
    print(json.dumps(rows, indent=1) if arguments.json else table(rows))
    broken = [f"{row['kernel']} {row['config']} ({row['cases'][0]}): {'; '.join(row['broken'])}" for row in rows if row["broken"]]
    for line in broken:
        print("GATE", line, file=sys.stderr)
    print(f"{len(rows)} launches, {len(broken)} with a failed gate", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
