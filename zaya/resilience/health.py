"""Is this node fit for a job: its GPUs probed one by one and together, their error counters read, the slow one found among its like.

    report = check_node(gpu_devices(8))
    report.faults        # (): it is

A process per device and a time limit for each, so that a GPU that hangs is a finding and not a hang. No torch: the supervisor asks.
"""

from __future__ import annotations

import contextlib
import json
import os
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
TIMEOUT_S = 180.0
"""For the probes of a device: some 20 s, of which torch's start is half."""


class Floor(NamedTuple):
    reading: str
    least: float
    source: str


FLOORS: Mapping[str, tuple[Floor, ...]] = {
    "gfx942": (
        Floor("tflops", 560.0, "0.8 of 708, the most that AMD reports for bf16"),
        Floor("copy_gbs", 3200.0, "0.8 of 4,000, the least of published copies"),
        Floor("reduce_gbs", 150.0, "0.75 of 199, the least published for all-reduces of 64 MB over 8 GPUs"),
    ),
}
"""Where the whole node is slow there is no median to tell it. By architecture; the last holds for 8 GPUs together."""
UNITS = {"tflops": "TFLOP/s", "copy_gbs": "GB/s copied", "to_device_gbs": "GB/s to it", "from_device_gbs": "GB/s from it",
         "reduce_gbs": "GB/s all-reduced", "exchange_gbs": "GB/s all-to-all"}
ALONE = ("tflops", "copy_gbs", "to_device_gbs", "from_device_gbs")
"""Readings of one device. Those of all together are as slow as the slowest, so within a node no outlier shows."""


@dataclass
class Probed:
    """What the probes of one device have found (zaya/resilience/probes.py)."""

    device: str
    """cuda:N or cpu."""
    name: str = ""
    """Of its kind, with the architecture: "AMD Instinct MI300X gfx942"."""
    readings: dict[str, float] = field(default_factory=dict)
    """By the names of UNITS. tflops: bf16 products; copy_gbs: device memory, read and written; to_device_gbs, from_device_gbs: pinned host
    memory; reduce_gbs, exchange_gbs: all-reduce and all-to-all, in bytes that a rank has to send."""
    faults: list[str] = field(default_factory=list)
    """A line each; none, and the device is good."""

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Probed:
        """From JSON. ValueError: it is not one."""
        try:
            readings = {str(name): float(value) for name, value in table["readings"].items()}
            return cls(str(table["device"]), str(table["name"]), readings, [str(fault) for fault in table["faults"]])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not what a probe has found ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class NodeReport:
    """Of one node; it is fit where there are no faults, those of its devices among them."""

    host: str
    time: float
    """Seconds since 1970."""
    devices: tuple[Probed, ...]
    faults: tuple[str, ...]
    corrected: dict[str, int] = field(default_factory=dict)
    """Memory errors that were corrected, by the GPU's PCI address: no fault, but worth watching."""

    def write(self, folder: Path) -> Path:
        """FOLDER/HOST.json, atomically; the folder is made. OSError: it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.host}.json"
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> NodeReport:
        """ValueError: it is not a node's report. OSError: it cannot be read."""
        try:
            table = json.loads(path.read_bytes())
            return cls(str(table["host"]), float(table["time"]), tuple(Probed.of(device) for device in table["devices"]),
                       tuple(str(fault) for fault in table["faults"]),
                       {str(pci): int(count) for pci, count in table["corrected"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a node's report ({type(error).__name__}: {error})") from None


def gpu_count(root: Path = Path("/")) -> int:
    """GPUs of this machine, as the drivers of AMD and NVIDIA list them; what *_VISIBLE_DEVICES hides is counted."""
    return len(Machine(root).gpus) or len(list((root / "dev").glob("nvidia[0-9]*")))


def gpu_devices(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{index}" for index in range(count))


def check_node(devices: Sequence[str], seconds: float = 2.0, timeout_s: float = TIMEOUT_S, is_over: Callable[[], bool] = lambda: False,
               machine: Machine | None = None) -> NodeReport:
    """Probe all devices at once, as a job would use them, then their links; seconds: of products. `is_over`: asked all the time, and once
    it holds the rest is left out."""
    machine = machine or Machine()
    found = _run([[*_PROBE, "--device", device, "--seconds", str(seconds)] for device in devices], devices, timeout_s, is_over)
    if len(devices) > 1 and not any(probed.faults for probed in found):  # a collective with a broken part tells nothing more
        with tempfile.TemporaryDirectory(prefix="zaya-links-") as folder:
            commands = [[*_PROBE, "--device", device, "--links", str(rank), str(len(devices)), f"{folder}/store"]
                        for rank, device in enumerate(devices)]
            for probed, linked in zip(found, _run(commands, devices, timeout_s, is_over)):
                probed.readings.update(linked.readings)
                probed.faults += linked.faults
    for probed, fault in [*slow_ones(found), *below_floors(found)]:
        probed.faults.append(fault)
    errors = memory_errors(machine)
    faults = [f"{probed.device}: {fault}" for probed in found for fault in probed.faults]
    faults += [f"GPU {pci}: {uncorrected} errors of its memory could not be corrected since its driver was loaded; reset it"
               for pci, (uncorrected, _) in errors.items() if uncorrected]
    return NodeReport(socket.gethostname(), time.time(), tuple(found), tuple(faults),
                      {pci: corrected for pci, (_, corrected) in errors.items() if corrected})


_PROBE = (sys.executable, "-m", "zaya.resilience.probes")


def _run(commands: Sequence[Sequence[str]], devices: Sequence[str], timeout_s: float, is_over: Callable[[], bool]) -> list[Probed]:
    """Each device's command, all at once: what it found, or that it died or did not end."""
    with tempfile.TemporaryDirectory(prefix="zaya-probes-") as folder, contextlib.ExitStack() as stack:
        started = []
        for index, command in enumerate(commands):
            out, err = (stack.enter_context(open(f"{folder}/{index}.{name}", "w+b")) for name in ("out", "err"))
            environment = {**os.environ, "LOCAL_RANK": str(index)}  # beside its GPU, as the job's worker is (zaya/runtime.py)
            started.append((subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment,
                                             start_new_session=True), out, err))
            stack.callback(_end, started[-1][0])
        until = time.monotonic() + timeout_s
        while any(process.poll() is None for process, _, _ in started) and time.monotonic() < until and not is_over():
            time.sleep(0.05)
        return [_result(device, process, out, err, timeout_s) for device, (process, out, err) in zip(devices, started)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """What a GPU's driver holds cannot be killed, and is not waited for."""
    with contextlib.suppress(OSError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def _result(device: str, process: subprocess.Popen[bytes], out: IO[bytes], err: IO[bytes], timeout_s: float) -> Probed:
    status = process.poll()
    out.seek(0)
    err.seek(0)
    if status == 0:
        with contextlib.suppress(ValueError, IndexError):
            return Probed.of(json.loads(out.read().splitlines()[-1]))
    lines = [line.strip() for line in err.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "silently"
    how = f"did not end within {timeout_s:g} s" if status is None else f"ended with exit code {status}: {last}"
    return Probed(device, faults=[f"its probe {how}"])


# ---------------------------------------------------------------------------------------------------------------- what is slow, and errors


def slow_ones(found: Sequence[Probed], readings: Sequence[str] = ALONE) -> list[tuple[Probed, str]]:
    """Devices slower than SLOW_SHARE of the median of those with the same name, where there are three or more, and what to say of each."""
    slow = []
    for name in sorted({probed.name for probed in found}):
        for reading in readings:
            alike = [probed for probed in found if probed.name == name and reading in probed.readings]
            if len(alike) >= 3:
                median = statistics.median(probed.readings[reading] for probed in alike)
                slow += [(probed, f"{told(probed, reading)}, {probed.readings[reading] / median:.2f} of the median of its like")
                         for probed in alike if probed.readings[reading] < SLOW_SHARE * median]
    return slow


def below_floors(found: Sequence[Probed]) -> list[tuple[Probed, str]]:
    return [(probed, f"{told(probed, floor.reading)}, less than {floor.least:g} ({floor.source})")
            for probed in found for floor in FLOORS.get(probed.name.rpartition(" ")[2], ())
            if floor.reading in probed.readings and probed.readings[floor.reading] < floor.least
            and (floor.reading in ALONE or len(found) == 8)]


def told(probed: Probed, reading: str) -> str:
    return f"{probed.readings[reading]:,.4g} {UNITS[reading]}"


def compare_nodes(reports: Sequence[NodeReport]) -> dict[str, list[str]]:
    """What is wrong, by host: each node's own faults, and what is slow beside the devices of all nodes, collectives included."""
    wrong = {report.host: list(report.faults) for report in reports}
    hosts = {id(probed): report.host for report in reports for probed in report.devices}
    for probed, fault in slow_ones([probed for report in reports for probed in report.devices], tuple(UNITS)):
        line = f"{probed.device}: {fault}"
        if not any(known.startswith(f"{probed.device}: {fault.partition(',')[0]}") for known in wrong[hosts[id(probed)]]):
            wrong[hosts[id(probed)]].append(line)
    return wrong


def memory_errors(machine: Machine) -> dict[str, tuple[int, int]]:
    """(uncorrected, corrected) errors of each GPU's blocks since the driver was loaded, by PCI address; those that the driver tells of.

    Source: docs.kernel.org, AMDGPU RAS support: files of lines "ue: N" and "ce: N".
    """
    errors = {}
    for gpu in machine.gpus:
        counts = {"ue": 0, "ce": 0}
        files = sorted((machine.root / "sys/bus/pci/devices" / gpu.pci / "ras").glob("*_err_count"))
        for file in files:
            with contextlib.suppress(OSError):
                for line in file.read_text().splitlines():
                    kind, _, number = line.partition(":")
                    if kind in counts and number.strip().isdecimal():
                        counts[kind] += int(number)
        if files:
            errors[gpu.pci] = counts["ue"], counts["ce"]
    return errors
