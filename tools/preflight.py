"""Is this node fit for a job? Its GPUs multiply, fill their memory and move data, alone and together, checked to the bit and timed.

    python -m tools.preflight                              # all GPUs of this node; --device cpu rehearses it on a CPU
    srun --ntasks-per-node=1 python -m tools.preflight --out DIR       # every node leaves DIR/HOST.json
    python -m tools.preflight --summary DIR --expect 16    # all nodes: the faulty, the missing, and those slow beside the others
    sbatch --exclude=$(python -m tools.preflight --summary DIR --bad) ...

Takes about half a minute and all of the GPUs' memory: run it where no job runs. Exit code 0: fit; 4: not; 2: a bad call.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path

from zaya.cli import Parser, positive
from zaya.resilience.exits import Exit
from zaya.resilience.health import UNITS, NodeReport, check_node, compare_nodes, gpu_count, gpu_devices


def table(reports: list[NodeReport]) -> list[str]:
    """A line for each device, or, of several nodes, one for each node with its slowest."""
    rows = [["host", "device", *UNITS.values()]]
    for report in reports:
        devices = [(probed.device, probed.readings) for probed in report.devices]
        if len(reports) > 1:
            names = {name for _, readings in devices for name in readings}
            slowest = {name: min(readings[name] for _, readings in devices if name in readings) for name in names}
            devices = [(f"the slowest of {len(devices)}", slowest)]
        rows += [[report.host, device, *(f"{readings[name]:,.4g}" if name in readings else "-" for name in UNITS)]
                 for device, readings in devices]
    if len(rows) > 3:
        values = [[float(row[column].replace(",", "")) for row in rows[1:] if row[column] != "-"] for column in range(2, len(rows[0]))]
        rows.append(["", "median", *(f"{statistics.median(column):,.4g}" if column else "-" for column in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths)))
            for row in rows]


def read_reports(folder: Path) -> list[NodeReport]:
    """ValueError: there are none, or one is not a report. OSError: it cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory")
    reports = [NodeReport.read(path) for path in sorted(folder.glob("*.json"))]
    if not reports:
        raise ValueError(f"{folder} holds no report (HOST.json)")
    return reports


def main() -> int:
    parser = Parser("tools.preflight", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, metavar="N", help="how many GPUs must be there (default: those that the drivers list)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse it there, with two processes")
    parser.add_argument("--seconds", type=positive, default=2.0, help="how long each GPU multiplies (2); more finds rarer faults")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave the report as DIR/HOST.json")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead")
    parser.add_argument("--summary", type=Path, metavar="DIR", help="judge the reports of all nodes in DIR; probes nothing")
    parser.add_argument("--expect", type=int, metavar="N", help="with --summary: how many nodes must have left a report")
    parser.add_argument("--bad", action="store_true", help="with --summary: print only the unfit, as Slurm's --exclude wants them")
    options = parser.parse_args()
    if options.summary is None and (options.expect is not None or options.bad):
        parser.error(f"{'--bad' if options.bad else '--expect'} goes with --summary DIR")
    if options.summary is not None:
        if options.out or options.gpus is not None:
            parser.error(f"--summary probes nothing: {'--out' if options.out else '--gpus'} does not go with it")
        try:
            reports = read_reports(options.summary)
        except (ValueError, OSError) as error:
            return parser.refused(error)
        return summarize(reports, options.expect, options.bad, options.json)
    count = options.gpus if options.gpus is not None else gpu_count()
    if options.device == "cuda" and count < 1:
        parser.error("no driver lists a GPU here; --device cpu rehearses it" if options.gpus is None else f"--gpus {count}: at least 1")
    devices = gpu_devices(count) if options.device == "cuda" else ("cpu", "cpu")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return parser.refused(error, "make", options.out)
    print(f"tools.preflight: probing {len(devices)} devices; about half a minute", file=sys.stderr)
    report = check_node(devices, options.seconds)
    try:
        if options.out is not None:
            report.write(options.out)
    except OSError as error:
        return parser.refused(error, "write", options.out)
    print(json.dumps(dataclasses.asdict(report), indent=1) if options.json else "\n".join(table([report])))
    return verdict({report.host: list(report.faults)}, report.corrected)


def summarize(reports: list[NodeReport], expected: int | None, only_bad: bool, as_json: bool) -> int:
    wrong = compare_nodes(reports)
    bad = [host for host, faults in wrong.items() if faults]
    if only_bad:
        print(",".join(bad))
        return Exit.UNHEALTHY if bad else Exit.DONE
    print(json.dumps({"nodes": len(reports), "faults": wrong}, indent=1) if as_json else "\n".join(table(reports)))
    code = verdict(wrong, {})
    if expected is not None and len(reports) < expected:
        print(f"tools.preflight: {len(reports)} of {expected} nodes have left a report", file=sys.stderr)
        return Exit.UNHEALTHY
    return code


def verdict(wrong: dict[str, list[str]], corrected: dict[str, int]) -> int:
    """Say what is wrong, a line each."""
    for pci, count in corrected.items():
        print(f"tools.preflight: GPU {pci}: {count} memory errors were corrected since its driver was loaded", file=sys.stderr)
    lines = [f"{host}: {fault}" for host, faults in wrong.items() for fault in faults]
    for line in lines:
        print(f"tools.preflight: {line}", file=sys.stderr)
    bad = sum(map(bool, wrong.values()))
    print(f"tools.preflight: {len(wrong) - bad} of {len(wrong)} nodes are fit", file=sys.stderr)
    return Exit.UNHEALTHY if lines else Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
