"""Is this node fit for a job: its GPUs probed one by one and together, their error counters read, the slow one found among its like.

    report = check_node(gpu_devices(8))
    report.faults        # (): it is

A process per device and a time limit for each, so that a GPU that hangs is a finding and not a hang. No torch: the supervisor asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from zaya.cli import replace_text
from zaya.runtime import Machine

SLOW_SHARE = 0.85
"""Of the median of its like: what is slower holds all others back. Good GPUs of one kind differ by a few percent."""
OVERHEAD_S = 180.0
"""For a device's probe beside its products: some 20 s, of which torch's start is half."""
UNITS = {"tflops": "TFLOP/s", "copy_gbs": "GB/s copied", "to_device_gbs": "GB/s to it", "from_device_gbs": "GB/s from it",
         "reduce_gbs": "GB/s all-reduced", "exchange_gbs": "GB/s all-to-all"}
"""Of the readings. tflops: bf16 products; copy_gbs: device memory, read and written; to_device_gbs, from_device_gbs: pinned host memory;
reduce_gbs, exchange_gbs: bytes that a rank has to send, over the time of a collective of all devices."""
_PROBE = (sys.executable, "-m", "zaya.resilience.probes")
ALONE = ("tflops", "copy_gbs", "to_device_gbs", "from_device_gbs")
"""Readings of one device. Those of all together are as slow as the slowest, so within a node no outlier shows."""


class Floor(NamedTuple):
    """What a good device of a kind reaches at least, where it is one of so many that are probed together (0: any number)."""

    reading: str
    least: float
    devices: int
    source: str


FLOORS: Mapping[str, tuple[Floor, ...]] = {
    "MI300X": (
        Floor("tflops", 580.0, 0, "0.8 of 724, the least published for bf16 of this size"),
        Floor("copy_gbs", 3200.0, 0, "0.8 of 4,000, the least of published copies"),
        Floor("reduce_gbs", 150.0, 8, "0.75 of 199, the least published for all-reduces of 64 MB over 8 GPUs"),
    ),
}
"""Where a whole node is slow there is no median to tell it. By a word of the device's name."""


class Fault(NamedTuple):
    """What is wrong with a device, in words; of which reading, where it is slow."""

    text: str
    reading: str = ""


@dataclass
class DeviceReport:
    """What the probes of one device have found (zaya/resilience/probes.py)."""

    device: str
    """cuda:N or cpu."""
    name: str = ""
    arch: str = ""
    """gfx942, sm_90, ..."""
    readings: dict[str, float] = field(default_factory=dict)
    """By the names of UNITS."""
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> DeviceReport:
        """From JSON. ValueError: it is not one."""
        try:
            readings = {name: float(value) for name, value in table["readings"].items() if name in UNITS}
            if not all(math.isfinite(value) and value > 0 for value in readings.values()):
                raise ValueError(f"a reading is no positive number: {readings}")
            return cls(str(table["device"]), str(table["name"]), str(table["arch"]), readings,
                       [Fault(str(text), str(reading)) for text, reading in table["faults"]])
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not what a probe has found ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class NodeReport:
    """Of one node."""

    host: str
    """As Slurm calls it, where Slurm has started this process."""
    time: float
    """Seconds since 1970."""
    devices: tuple[DeviceReport, ...]
    uncorrected: dict[str, int] = field(default_factory=dict)
    """Memory errors since the driver was loaded, by the GPU's PCI address: it must be reset."""
    corrected: dict[str, int] = field(default_factory=dict)
    """The same, that did no harm: worth watching."""

    @property
    def faults(self) -> tuple[str, ...]:
        """A line each; none, and the node is fit."""
        errors = (f"GPU {pci}: {count} errors of its memory could not be corrected since its driver was loaded; reset it"
                  for pci, count in self.uncorrected.items())
        return (*(f"{report.device}: {fault.text}" for report in self.devices for fault in report.faults), *errors)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `read` takes it back."""
        return {**asdict(self), "faults": self.faults}

    def write(self, folder: Path) -> Path:
        """FOLDER/HOST.json, atomically; the folder is made. OSError: it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.host}.json"
        replace_text(path, json.dumps(self.as_dict(), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> NodeReport:
        """ValueError: it is not a node's report. OSError: it cannot be read."""
        try:
            table = json.loads(path.read_bytes())
            if not table["devices"]:
                raise ValueError("it has no devices")
            return cls(str(table["host"]), float(table["time"]), tuple(DeviceReport.of(device) for device in table["devices"]),
                       *({str(pci): int(count) for pci, count in table[kind].items()} for kind in ("uncorrected", "corrected")))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is not a node's report ({type(error).__name__}: {error})") from None


def host_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ---------------------------------------------------------------------------------------------------------------- a node


def has_gpus(root: Path = Path("/")) -> bool:
    """Whether a driver of AMD or NVIDIA lists one; without starting torch."""
    return bool(Machine(root).gpus) or any((root / "dev").glob("nvidia[0-9]*"))


def visible_gpus(limit_s: float = OVERHEAD_S) -> int:
    """How many torch would use in this environment; takes its start of some seconds. 0 where it does not answer within `limit_s`."""
    if not has_gpus():
        return 0
    (ended,), _ = _run([[sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]], limit_s)
    return int(ended.out[0]) if ended.out and ended.out[0].isdecimal() else 0


def gpu_devices(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{index}" for index in range(count))


class InterruptedCheck(Exception):
    """Whoever asked does not wait for the end."""


def check_node(devices: Sequence[str], matmul_s: float = 2.0, overhead_s: float = OVERHEAD_S, is_over: Callable[[], bool] = lambda: False,
               machine: Machine | None = None) -> NodeReport:
    """Probe all devices at once, as a job would use them, then their links. `matmul_s`: how long each multiplies; its probe may take
    `overhead_s` longer. `is_over` is asked all the time; once it holds, InterruptedCheck. OSError: no process can be started."""
    machine = machine or Machine()
    limit_s = matmul_s + overhead_s

    def probe(words: Callable[[int], Sequence[str]]) -> tuple[list[DeviceReport], int | None]:
        commands = [[*_PROBE, "--device", device, *words(index)] for index, device in enumerate(devices)]
        ended, first = _run(commands, limit_s, is_over)
        return [_report(device, each, limit_s) for device, each in zip(devices, ended)], first

    reports, _ = probe(lambda index: ["--seconds", str(matmul_s)])
    if len(devices) > 1 and not any(report.faults for report in reports):  # a collective with a broken part tells nothing more
        with tempfile.TemporaryDirectory(prefix="zaya-links-") as folder:
            together, first = probe(lambda index: ["--links", str(index), str(len(devices)), f"{folder}/store"])
        for index, (report, linked) in enumerate(zip(reports, together)):
            report.readings.update(linked.readings)
            if first in (None, index):  # one that fails in a collective makes the others fail, later
                report.faults += linked.faults
    for report, fault in [*outliers(reports), *below_floors(reports)]:
        report.faults.append(fault)
    uncorrected, corrected = memory_errors(machine, "ue"), memory_errors(machine, "ce")
    return NodeReport(host_name(), time.time(), tuple(reports), uncorrected, corrected)


class _Ended(NamedTuple):
    """A process, and what it has written, the last line first."""

    status: int | None
    """None: it did not end."""
    out: list[str]
    err: list[str]


def _run(commands: Sequence[Sequence[str]], limit_s: float, is_over: Callable[[], bool] = lambda: False) -> tuple[list[_Ended], int | None]:
    """All at once; and which failed first, if any. What does not end is killed, but not waited for: a GPU's driver may hold it."""
    first = None
    with tempfile.TemporaryDirectory(prefix="zaya-probes-") as folder, contextlib.ExitStack() as stack:
        started = []
        for index, command in enumerate(commands):
            out, err = (stack.enter_context(open(f"{folder}/{index}.{name}", "w+b")) for name in ("out", "err"))
            environment = {**os.environ, "LOCAL_RANK": str(index)}  # beside its GPU, as the job's worker is (zaya/runtime.py)
            process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
            stack.callback(_end, process)
            started.append((process, out, err))
        until = time.monotonic() + limit_s
        while any(process.poll() is None for process, _, _ in started) and time.monotonic() < until:
            if is_over():
                raise InterruptedCheck
            if first is None:
                first = next((index for index, (process, _, _) in enumerate(started) if process.poll()), None)
            time.sleep(0.05)
        return [_Ended(process.poll(), _last_lines(out), _last_lines(err)) for process, out, err in started], first


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def _report(device: str, ended: _Ended, limit_s: float) -> DeviceReport:
    """What a probe has found, or that it died or did not end."""
    if ended.status is None:
        return DeviceReport(device, faults=[Fault(f"its probe did not end within {limit_s:g} s")])
    for line in ended.out if ended.status == 0 else ():  # a library may have the last word
        with contextlib.suppress(ValueError, RecursionError):
            return dataclasses.replace(DeviceReport.of(json.loads(line)), device=device)
    # The exception's own line: torch's errors go on with advice.
    named = (line for line in ended.err if re.match(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b", line))
    cause = next(named, ended.err[0] if ended.err else "silently")
    return DeviceReport(device, faults=[Fault(f"its probe ended with exit code {ended.status}: {cause}")])


def _last_lines(file: IO[bytes]) -> list[str]:
    """The last one first."""
    file.seek(max(file.seek(0, os.SEEK_END) - 100_000, 0))
    return [line.strip() for line in reversed(file.read().decode(errors="replace").splitlines()) if line.strip()]


# ---------------------------------------------------------------------------------------------------------------- what is slow, and errors


def outliers(reports: Sequence[DeviceReport], readings: Sequence[str] = ALONE) -> list[tuple[DeviceReport, Fault]]:
    """Devices slower than SLOW_SHARE of the median of those with the same name, where there are three or more."""
    slow = []
    for name in sorted({report.name for report in reports}):
        for reading in readings:
            alike = [report for report in reports if report.name == name and reading in report.readings]
            if len(alike) >= 3:
                median = statistics.median(report.readings[reading] for report in alike)
                slow += [(report, Fault(f"{format_reading(report, reading)}, {report.readings[reading] / median:.2f} of the median of its "
                                        "like", reading))
                         for report in alike if report.readings[reading] < SLOW_SHARE * median]
    return slow


def below_floors(reports: Sequence[DeviceReport]) -> list[tuple[DeviceReport, Fault]]:
    return [(report, Fault(f"{format_reading(report, floor.reading)}, less than {floor.least:g} ({floor.source})", floor.reading))
            for report in reports for kind, floors in FLOORS.items() if kind in report.name.split() for floor in floors
            if report.readings.get(floor.reading, math.inf) < floor.least and floor.devices in (0, len(reports))]


def format_reading(report: DeviceReport, reading: str) -> str:
    return f"{report.readings[reading]:,.4g} {UNITS[reading]}"


def compare_nodes(nodes: Sequence[NodeReport]) -> dict[str, list[str]]:
    """What is wrong, by host: each node's own faults, and what is slow beside the devices of all nodes, collectives included."""
    wrong: dict[str, list[str]] = {}
    for node in nodes:
        wrong.setdefault(node.host, []).extend(node.faults)
    hosts = {id(report): node.host for node in nodes for report in node.devices}
    for report, fault in outliers([report for node in nodes for report in node.devices], tuple(UNITS)):
        if fault.reading not in {known.reading for known in report.faults}:
            wrong[hosts[id(report)]].append(f"{report.device}: {fault.text}")
    return wrong


def memory_errors(machine: Machine, kind: str) -> dict[str, int]:
    """Errors of each GPU's blocks since the driver was loaded, by PCI address, where there are any. kind: ue, which could not be
    corrected, or ce, which were.

    Source: docs.kernel.org, AMDGPU RAS support: files of lines "ue: N" and "ce: N".
    """
    counts: dict[str, int] = {}
    for gpu in machine.gpus:
        for file in (machine.root / "sys/bus/pci/devices" / gpu.pci / "ras").glob("*_err_count"):
            with contextlib.suppress(OSError):
                for line in file.read_text().splitlines():
                    name, _, number = line.partition(":")
                    if name == kind and number.strip().isdecimal() and int(number):
                        counts[gpu.pci] = counts.get(gpu.pci, 0) + int(number)
    return counts
