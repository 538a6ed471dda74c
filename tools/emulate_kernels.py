"""Execute the MI300X machine code of every kernel on the CPU and compare with the reference: every small case in bf16, on the shipped
gfx942 configuration, outputs and gradients, against fp32 arithmetic on the same rounded inputs.

The emulator is tinygrad's, of a checkout that --emulator names. Exit code 2 and one line where it is absent, 1 where an error is above its
limit. Cases run in as many processes as there are CPUs, for minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the machine code runs, not the interpreter; Triton reads this once, as it is imported

import torch
from tqdm import tqdm

from zaya.cli import Parser, replace_text
from zaya.kernels import cases
from zaya.kernels.emulator import EmulatorMissing, emulating
from zaya.kernels.launch import Target, launching_through
from zaya.kernels.machine_code import process_pool

# Few compute units, because work-groups run one after the other, but as many dies as the chip has: what maps work to dies runs as there.
TARGET = Target("gfx942", num_cus=8, num_xcds=8)


def emulate(name: str, checkout: str) -> dict[str, Any]:
    """RMS error / RMS of every tensor of a case; whatever goes wrong in it is its result."""
    warnings.simplefilter("ignore")  # Triton's backend announces a default that it will change
    torch.set_num_threads(1)
    case = next(case for case in cases.cases(cases.SMALL) if case.name == name)
    arguments, launcher, launched = case.make(torch.device("cpu"), torch.bfloat16), emulating(checkout), list[str]()
    started = time.perf_counter()

    def noting(kernel: Any, *rest: Any) -> None:
        launched.append(kernel.__name__)
        launcher(kernel, *rest)

    # The reference launches nothing, so it may run inside too.
    try:
        with launching_through(noting, TARGET):
            errors, fault = cases.errors(case, arguments), ""
    except Exception as exception:  # noqa: BLE001  # the emulator may fail in any way; the other cases must still run
        errors, fault = {}, f"{type(exception).__name__}: {str(exception).splitlines()[0] if str(exception) else ''}"
    return {"case": name, "kernels": list(dict.fromkeys(launched)), "errors": errors, "limit": case.limit, "fault": fault,
            "seconds": round(time.perf_counter() - started, 1)}


def broken(row: dict[str, Any]) -> list[str]:
    above = [f"{name} {error:.1e}" for name, error in row["errors"].items() if not error <= row["limit"]]
    return [row["fault"]] if row["fault"] else [f"above {row['limit']:.1e}: {', '.join(above)}"] if above else []


HEADER = "| case | outputs | gradients | limit |\n|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """Markdown."""
    parts = [", ".join(f"{name.removeprefix('d ').removeprefix('out.')} {error:.1e}" for name, error in row["errors"].items()
                       if name.startswith(prefix)) for prefix in ("out", "d ")]
    return f"| {row['case']} | {parts[0] or row['fault']} | {parts[1] or '-'} | {row['limit']:.0e} |"


def main() -> int:
    parser = Parser(prog="tools.emulate_kernels", description=__doc__)
    parser.add_argument("--emulator", required=True, metavar="DIR", help="a checkout of tinygrad")
    parser.add_argument("--op", nargs=1, help="only cases whose name starts so: attention, experts, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as a JSON list")
    arguments = parser.parse_args()
    parser.check_output("--json", arguments.json)
    every = [case.name for case in cases.cases(cases.SMALL) if torch.bfloat16 in case.dtypes]
    names = parser.starting_so("--op", arguments.op, every, "no small case")
    try:
        emulating(arguments.emulator)
    except EmulatorMissing as missing:
        parser.error(str(missing))
    with process_pool(len(names)) as pool:
        results = tqdm(pool.map(emulate, names, [arguments.emulator] * len(names)), total=len(names), unit="case", disable=None)
        print(HEADER)
        rows = []
        for row in results:
            rows.append(row)
            tqdm.write(line(row))
            if arguments.json:
                replace_text(arguments.json, json.dumps(rows, indent=1) + "\n")  # after each case: minutes are not lost to a later one
    failed = [f"{row['case']}: {fault}" for row in rows for fault in broken(row)]
    for words in failed:
        print("WRONG", words, file=sys.stderr)
    print(f"{len(rows)} cases, {len(failed)} wrong", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
