"""Is this node fit for a job? Its GPUs multiply, fill their memory and move data, alone and together, checked to the bit and timed.

    python -m tools.preflight                              # all GPUs of this node; --device cpu rehearses it on a CPU
    srun --ntasks-per-node=1 python -m tools.preflight --out DIR       # every node leaves DIR/HOST.json
    python -m tools.preflight --summary DIR --expect 16    # all nodes: the faulty, the missing, and those slow beside the others
    bad=$(python -m tools.preflight --summary DIR --bad) || sbatch --exclude="$bad" ...     # 4: there are some

Takes about half a minute and all of the GPUs' memory: run it where no job runs. Exit code 0: fit; 4: not; 2: a bad call.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from zaya.cli import Parser, count, positive
from zaya.resilience.exits import Exit
from zaya.resilience.health import UNITS, NodeReport, check_node, compare_nodes, gpu_devices, host_name, visible_gpus


def table(nodes: list[NodeReport]) -> list[str]:
    """A line for each device, or, of several nodes, one for each node with its slowest; and their median."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for node in nodes:
        if len(nodes) == 1:
            rows += [(node.host, report.device, report.readings) for report in node.devices]
        else:
            slowest = {name: min(values) for name in UNITS if (values := [report.readings[name] for report in node.devices
                                                                          if name in report.readings])}
            rows.append((node.host, f"the slowest of {len(node.devices)}", slowest))
    if len(rows) > 2:
        rows.append(("", "median of these", {name: statistics.median(values) for name in UNITS
                                             if (values := [readings[name] for _, _, readings in rows if name in readings])}))
    cells = [["host", "device", *UNITS.values()]]
    cells += [[host, device, *(f"{readings[name]:,.4g}" if name in readings else "-" for name in UNITS)] for host, device, readings in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths)))
            for row in cells]


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
    parser.add_argument("--gpus", type=count, metavar="N", help="how many GPUs must be there (default: those that torch sees)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse it there, with two processes")
    parser.add_argument("--seconds", type=positive, default=2.0, help="how long each GPU multiplies (2); more finds rarer faults")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave the report as DIR/HOST.json")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead")
    parser.add_argument("--summary", type=Path, metavar="DIR", help="judge the reports of all nodes in DIR; probes nothing")
    parser.add_argument("--expect", type=count, metavar="N", help="with --summary: how many nodes must have left a report")
    parser.add_argument("--bad", action="store_true", help="with --summary: print only the unfit, as Slurm's --exclude wants them")
    options = parser.parse_args()
    if options.summary is not None:
        for option, given in (("--out", options.out), ("--gpus", options.gpus)):
            if given is not None:
                parser.error(f"--summary probes nothing: {option} does not go with it")
        if options.bad and options.expect is not None:
            parser.error("--bad names nodes, and --expect counts those without a name: ask for one of them")
        try:
            nodes = read_reports(options.summary)
        except (ValueError, OSError) as error:
            return parser.refused(error)
        return summarize(nodes, options.expect, options.bad, options.json)
    if options.expect is not None or options.bad:
        parser.error(f"{'--bad' if options.bad else '--expect'} goes with --summary DIR")
    if options.device == "cpu" and options.gpus is not None:
        parser.error("--gpus does not go with --device cpu")
    gpus = 0 if options.device == "cpu" else options.gpus or visible_gpus()
    if options.device == "cuda" and not gpus:
        parser.error("torch sees no GPU here; --device cpu rehearses it")
    devices = gpu_devices(gpus) or ("cpu", "cpu")
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{host_name()}.json").unlink(missing_ok=True)  # should this node not come to its end, it has no report
    except OSError as error:
        return parser.refused(error, "make", options.out)
    print(f"tools.preflight: probing {len(devices)} devices, for about {options.seconds + 30:.0f} s", file=sys.stderr)
    try:
        report = check_node(devices, options.seconds)
        if options.out is not None:
            report.write(options.out)
    except OSError as error:
        return parser.refused(error, "write", options.out or "")
    print(json.dumps(report.as_dict(), indent=1) if options.json else "\n".join(table([report])))
    for pci, errors in report.corrected.items():
        print(f"tools.preflight: GPU {pci}: {errors} memory errors were corrected since its driver was loaded", file=sys.stderr)
    return verdict({report.host: list(report.faults)})


def summarize(nodes: list[NodeReport], expected: int | None, only_bad: bool, as_json: bool) -> int:
    wrong = compare_nodes(nodes)
    bad = [host for host, faults in wrong.items() if faults]
    if only_bad:
        print(",".join(bad))
        return Exit.UNHEALTHY if bad else Exit.DONE
    print(json.dumps({"nodes": len(nodes), "faults": wrong}, indent=1) if as_json else "\n".join(table(nodes)))
    code = verdict(wrong)
    oldest = min(nodes, key=lambda node: node.time)
    print(f"tools.preflight: the oldest report, {oldest.host}'s, is of {time.strftime('%Y-%m-%d %H:%M', time.localtime(oldest.time))}",
          file=sys.stderr)
    if expected is not None and len(wrong) < expected:
        print(f"tools.preflight: {len(wrong)} of {expected} nodes have left a report", file=sys.stderr)
        return Exit.UNHEALTHY
    return code


def verdict(wrong: dict[str, list[str]]) -> int:
    """Say what is wrong, a line each; the exit code."""
    for host, faults in wrong.items():
        for fault in faults:
            print(f"tools.preflight: {host}: {fault}", file=sys.stderr)
    fit = sum(not faults for faults in wrong.values())
    print(f"tools.preflight: {fit} of {len(wrong)} nodes are fit", file=sys.stderr)
    return Exit.DONE if fit == len(wrong) else Exit.UNHEALTHY


if __name__ == "__main__":
    sys.exit(main())
