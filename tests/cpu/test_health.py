"""Whether a node is fit: every kind of fault is found, in the device that has it, and a good one is not accused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.test_runtime import node, write
from zaya.resilience import health, probes
from zaya.resilience.health import DeviceReport, Fault, NodeReport, check_node, compare_nodes
from zaya.runtime import GFX942

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = probes.Sizes(matmul=64, block=16, piece_bytes=1 << 12, memory_bytes=1 << 14, transfer_bytes=1 << 10, reduce_bytes=0)

# ---------------------------------------------------------------------------------------------------------------- one device


@pytest.mark.parametrize("sizes", [probes.GPU_SIZES, probes.CPU_SIZES, SMALL], ids=["GPU", "CPU", "small"])
def test_products_are_exact_in_any_order_and_show_every_wrong_bit(sizes: probes.Sizes) -> None:
    a, b = probes.operands(sizes)
    product = a @ b
    assert all(torch.equal(exact, exact.round().bfloat16().double()) for exact in (a, b, product)) and (product != 0).float().mean() > 0.95
    assert (a.abs() @ b.abs()).max() < 2**24, "no partial sum, in whatever order, is beyond what fp32 counts to"
    assert product.abs().max() < 256, "an element that is wrong by 1 is another bf16"
    assert {int(bit) for bit in range(8) if (a.abs().long() >> bit & 1).any()} == set(range(8)), "all bits of a bf16 are in use"


def test_no_partial_sum_may_be_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, multiply, seen = torch.backends.cuda.matmul, torch.mm, []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(bool(settings.allow_bf16_reduced_precision_reduction))
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    probes.matmul(CPU, SMALL, 0)
    assert not any(seen) and settings.allow_bf16_reduced_precision_reduction


def test_readings_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: Iterator[float] = itertools.cycle([0.25, 0.5])

    def timed(call: Callable[[], object], device: torch.device) -> float:
        call()
        return next(seconds)

    monkeypatch.setattr(probes, "seconds_of", timed)
    assert probes.transfer(CPU, SMALL)[:2] == (1024 / 0.25 / 1e9, 1024 / 0.5 / 1e9)
    seconds = itertools.repeat(0.25)
    assert probes.matmul(CPU, SMALL, 0)[0] == 2 * 64**3 / 0.25 / 1e12
    assert probes.memory(CPU, SMALL)[0] == 2 * 4096 / 0.25 / 1e9


def test_a_good_device_is_not_accused() -> None:
    report = probes.probe(CPU, seconds=0.1)
    assert report.faults == [] and set(report.readings) == set(health.ALONE) and all(value > 0 for value in report.readings.values())
    assert probes.matmul(CPU, SMALL, 0.01)[1] == probes.memory(CPU, SMALL)[1] == probes.transfer(CPU, SMALL)[2] == []


def spoiling(monkeypatch: pytest.MonkeyPatch, name: str, at: int, spoil: Callable[[torch.Tensor], object]) -> None:
    """The call `at` of torch.NAME spoils what it wrote."""
    original, calls = getattr(torch, name), iter(range(1 << 30))

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(*args, **kwargs)
        if next(calls) == at:
            spoil(result)
        return result

    monkeypatch.setattr(torch, name, spoiled)


@pytest.mark.parametrize("at", [0, 7])
def test_one_wrong_element_of_one_product_is_found(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def flip(product: torch.Tensor) -> None:
        product.view(torch.int16)[37, 5] ^= 1  # its last bit

    spoiling(monkeypatch, "mm", at, flip)
    (fault,) = probes.matmul(CPU, SMALL, 0)[1]
    assert re.fullmatch(r"1 of 40,960 elements of 10 bf16 products are wrong", fault)


def test_a_tile_in_anothers_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all blocks are made of one."""
    def move(product: torch.Tensor) -> None:
        product[16:32, :16] = product[:16, :16]

    spoiling(monkeypatch, "mm", 3, move)
    assert "bf16 products are wrong" in probes.matmul(CPU, SMALL, 0)[1][0]


def test_elements_that_are_not_written_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    assert probes.matmul(CPU, SMALL, 0)[1] == ["40,960 of 40,960 elements of 10 bf16 products are wrong"]


@pytest.mark.parametrize("bit", [0, 31, 63])
@pytest.mark.parametrize("stuck_at", [0, 1])
def test_a_bit_of_memory_that_sticks_is_found_whatever_it_sticks_at(monkeypatch: pytest.MonkeyPatch, bit: int, stuck_at: int) -> None:
    """It is written as 0 once and as 1 once, so one of both is wrong."""
    mask, original = (1 << bit) - (1 << 64) * (bit == 63), torch.bitwise_xor
    pieces: list[int] = []

    def writing(*args: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return original(*args)
        original(*args, out=out)
        pieces.append(out.data_ptr())
        if out.data_ptr() == pieces[0]:
            out[100] = out[100] | mask if stuck_at else out[100] & ~mask
        return out

    monkeypatch.setattr(torch, "bitwise_xor", writing)
    assert probes.memory(CPU, SMALL)[1] == ["1 of 8,704 words of memory do not hold what was written"]


def test_pieces_that_share_an_address_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to the third lands in the first, too."""
    written: list[torch.Tensor] = []
    original = torch.bitwise_xor

    def writing(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(*args, **kwargs)
        if "out" in kwargs:
            written.append(result)
            if len(written) == 3:
                written[0].copy_(result)
        return result

    monkeypatch.setattr(torch, "bitwise_xor", writing)
    assert probes.memory(CPU, SMALL)[1] == ["512 of 8,704 words of memory do not hold what was written"]


def test_nine_tenths_of_what_is_free_are_filled_but_for_what_the_check_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dataclasses.replace(SMALL, memory_bytes=None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 4096, 200 * 4096))
    made: list[torch.Tensor] = []
    empty_like = torch.empty_like

    def counted(base: torch.Tensor) -> torch.Tensor:
        made.append(empty_like(base))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", counted)
    probes.memory(CPU, sizes)
    assert len(made) + 1 == 88, "90 pieces of 100, one of them the pattern, and two for a check's own"


def test_a_gpu_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    name = types.SimpleNamespace(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (180 << 30, 192 << 30))
    fault = Fault("12.0 of 192 GiB of its memory are taken; is a job running?")
    assert probes.probe(torch.device("cuda:3"), 1) == DeviceReport("cuda:3", "AMD Instinct MI300X", "gfx942", {}, [fault])


def test_a_copy_within_memory_that_goes_wrong_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = torch.Tensor.copy_, iter(range(1 << 30))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self if next(calls) == 4 else copy(self, other))
    assert "words of memory do not hold" in probes.memory(CPU, SMALL)[1][0]


def test_words_at_anothers_address_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiling(monkeypatch, "bitwise_xor", 1, lambda piece: piece.copy_(piece.roll(1)))
    assert "words of memory" in probes.memory(CPU, SMALL)[1][0]


def test_a_bit_that_is_wrong_in_what_all_is_compared_with_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arange, calls = torch.arange, iter(range(2))

    def sticking(*args: Any, **kwargs: Any) -> torch.Tensor:
        base = arange(*args, **kwargs)
        base[100] ^= next(calls) == 0
        return base

    monkeypatch.setattr(torch, "arange", sticking)
    assert probes.memory(CPU, SMALL)[1] == ["1 of 8,704 words of memory do not hold what was written"]


@pytest.mark.parametrize("lost", [0, 7, 19])
def test_what_is_lost_on_one_way_is_found(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    copy, calls = torch.Tensor.copy_, iter(range(1 << 30))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self if next(calls) == lost else copy(self, other))
    assert probes.transfer(CPU, SMALL)[2] == ["128 of 1,280 words are not the same after a way to the device and back"]


WRONG_LINK = """
import sys, torch, torch.distributed as dist
from zaya.resilience import probes
reduce, exchange = dist.all_reduce, dist.all_to_all_single
reduced, exchanged = iter(range(100)), iter(range(100))
def all_reduce(tensor):
    reduce(tensor)
    tensor[77] += {reduce} * (next(reduced) == 4)
def all_to_all_single(received, sent):
    exchange(received, sent)
    received[5] += {exchange} * (next(exchanged) == 4)
dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all_single
sys.exit(probes.main(sys.argv[1:]))
"""


def test_a_wrong_element_of_a_collective_is_found(tmp_path: Path) -> None:
    """One of ten, in the rank that received it: rank 1's all-reduce, rank 2's all-to-all; rank 0 has none."""
    jobs = []
    for rank, (reduce, exchange) in enumerate([(0, 0), (1, 0), (0, 1)]):
        code = WRONG_LINK.format(reduce=reduce, exchange=exchange)
        command = [sys.executable, "-c", code, "--device", "cpu", "--links", str(rank), "3", str(tmp_path / "store")]
        jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    faults = [DeviceReport.of(json.loads(job.communicate(timeout=60)[0].splitlines()[-1])).faults for job in jobs]
    assert faults == [[], [Fault("1 of 10,485,750 elements of 10 all-reduces over 3 devices are wrong")],
                      [Fault("1 of 10,485,750 elements of 10 all-to-alls over 3 devices are wrong")]]


# ---------------------------------------------------------------------------------------------------------------- a node

# In the place of the probes: what each device's probe does is said by a table; a device that is not in it is good.
FAKE = """
import json, os, sys, time
device = sys.argv[sys.argv.index("--device") + 1]
assert device == "cuda:" + os.environ["LOCAL_RANK"] and ("--links" in sys.argv or sys.argv[-2:] == ["--seconds", "1.0"]), sys.argv
act = json.loads({acts!r}).get(device, {{}})
if "--links" in sys.argv:
    readings = {{"reduce_gbs": act.get("reduce_gbs", 200.0), "exchange_gbs": 100.0}}
else:
    readings = {{"tflops": 600.0, "copy_gbs": 4000.0, **act.get("readings", {{}})}}
if "sleep" in act and ("--links" in sys.argv) == act.get("links", False):
    time.sleep(act["sleep"])
if "words" in act and ("--links" in sys.argv) == act.get("links", False):
    print(act["words"], file=sys.stderr)
    sys.exit(3)
print("a library's words")
found = {{"device": "its own", "name": act.get("name", "AMD Instinct MI300X"), "arch": "gfx942", "readings": readings,
          "faults": act.get("faults", [])}}
print(act.get("print") or json.dumps(found))
print("and its last word")
"""
Acts = dict[str, dict[str, Any]]


def check(monkeypatch: pytest.MonkeyPatch, acts: Acts, count: int = 8, machine: Any = None, overhead_s: float = 30.0) -> NodeReport:
    monkeypatch.setattr(health, "_PROBE", (sys.executable, "-c", FAKE.format(acts=json.dumps(acts))))
    return check_node(health.gpu_devices(count), 1.0, overhead_s, machine=machine)


def test_a_good_node_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(monkeypatch, {})
    assert report.faults == () and [probed.device for probed in report.devices] == [f"cuda:{index}" for index in range(8)]
    assert report.devices[3].readings == {"tflops": 600.0, "copy_gbs": 4000.0, "reduce_gbs": 200.0, "exchange_gbs": 100.0}


@pytest.mark.parametrize(("act", "fault"), [
    ({"faults": [["3 of 9 elements of 1 bf16 products are wrong", ""]]}, "3 of 9 elements of 1 bf16 products are wrong"),
    ({"words": "Traceback\ntorch.AcceleratorError: HIP error: invalid device ordinal\nCompile with `TORCH_USE_HIP_DSA` to enable it."},
     "its probe ended with exit code 3: torch.AcceleratorError: HIP error: invalid device ordinal"),
    ({"words": "killed by a driver", "links": True}, "its probe ended with exit code 3: killed by a driver"),
    ({"print": "no JSON"}, "its probe ended with exit code 0: silently"),
    ({"readings": {"tflops": float("nan")}}, "its probe ended with exit code 0: silently"),
    ({"readings": {"copy_gbs": 0.0}}, "its probe ended with exit code 0: silently"),
    ({"readings": {"tflops": 500.0}, "faults": [["2 of 9 wrong", ""]]}, "2 of 9 wrong"),
    ({"print": '{"device": "cuda:2"}'}, "its probe ended with exit code 0: silently"),
    ({"sleep": 100}, "its probe did not end within 4 s"),
    ({"readings": {"tflops": 500.0}}, "500 TFLOP/s, 0.83 of the median of its like"),
    ({"readings": {"copy_gbs": 3300.0}}, "3,300 GB/s copied, 0.82 of the median of its like"),
    ({"reduce_gbs": 120.0}, "120 GB/s all-reduced, less than 150"),
])
def test_the_device_with_the_fault_is_named(monkeypatch: pytest.MonkeyPatch, act: dict[str, Any], fault: str) -> None:
    report = check(monkeypatch, {"cuda:2": act}, overhead_s=3 if "sleep" in act else 30)
    assert report.faults and all(line.startswith("cuda:2: ") for line in report.faults) and fault in report.faults[0]
    assert [bool(probed.faults) for probed in report.devices] == [index == 2 for index in range(8)]


def test_one_that_dies_in_a_collective_is_not_the_others_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    acts: Acts = {f"cuda:{index}": {"links": True, "sleep": 0.7 if index != 5 else 0, "words": "RuntimeError: connection closed"}
                  for index in range(8)}
    assert check(monkeypatch, acts).faults == ("cuda:5: its probe ended with exit code 3: RuntimeError: connection closed",)


def test_two_have_no_median_and_other_kinds_are_not_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: Acts = {"cuda:1": {"readings": {"tflops": 590.0, "copy_gbs": 5000.0}}, "cuda:0": {"readings": {"tflops": 900.0}}}
    assert check(monkeypatch, slow, count=2).faults == ()
    other: Acts = {"cuda:7": {"name": "another", "readings": {"tflops": 1.0}}}
    assert check(monkeypatch, other).faults == ()


def test_a_collective_is_not_asked_of_a_broken_part(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check(monkeypatch, {"cuda:1": {"faults": [["broken", ""]]}})
    assert report.faults == ("cuda:1: broken",) and "reduce_gbs" not in report.devices[0].readings


def test_a_node_that_is_slow_as_a_whole_is_found_by_what_its_kind_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {f"cuda:{index}": {"readings": {"tflops": 400.0}} for index in range(8)}
    assert len(check(monkeypatch, slow).faults) == 8 and "less than 580 (0.8 of 724" in check(monkeypatch, slow).faults[0]
    other = {device: {**act, "name": "AMD Instinct MI308X"} for device, act in slow.items()}
    assert check(monkeypatch, other).faults == (), "of this kind nothing is known"
    two = {f"cuda:{index}": {"reduce_gbs": 40.0} for index in range(2)}
    assert check(monkeypatch, two, count=2).faults == (), "two GPUs have one link of seven"


def test_who_asks_can_stop_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (f"import os, time; open(r'{tmp_path}/new', 'w').write(str(os.getpid())); os.rename(r'{tmp_path}/new', r'{tmp_path}/id'); "
            "time.sleep(99)")
    monkeypatch.setattr(health, "_PROBE", (sys.executable, "-c", code))
    with pytest.raises(health.InterruptedCheck):
        check_node(("cpu",), is_over=(tmp_path / "id").exists)
    assert not Path(f"/proc/{(tmp_path / 'id').read_text()}").exists(), "nothing is left running"


def test_much_output_and_no_room_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_PROBE", (sys.executable, "-c", "print('x' * 30_000_000)"))
    assert check_node(("cpu",)).faults == ("cpu: its probe ended with exit code 0: silently",)
    monkeypatch.setattr(health, "_PROBE", ("/nowhere",))
    with pytest.raises(OSError, match="nowhere"):
        check_node(("cpu",))


def test_hidden_gpus_are_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not health.has_gpus(tmp_path)
    write(tmp_path / "dev/nvidia0", "")
    assert health.has_gpus(tmp_path) and health.visible_gpus() == 0, "torch sees none here, whatever a driver lists"
    monkeypatch.setattr(health, "has_gpus", lambda: True)
    assert health.visible_gpus() == 0
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for script, visible in (("echo warning; echo 8", 8), ("echo 8; echo end", 0), ("sleep 99", 0)):  # a driver that hangs
        write(tmp_path / "python", f"#!/bin/sh\n{script}\n")
        (tmp_path / "python").chmod(0o755)
        assert health.visible_gpus(limit_s=1) == visible


def test_memory_errors_that_the_driver_counts_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = node(tmp_path, archs=(GFX942, GFX942))
    first, second = (tmp_path / "sys/bus/pci/devices" / gpu.pci / "ras" for gpu in machine.gpus)
    write(first / "umc_err_count", "ue: 0\nce: 5\nde: 1\n")
    write(first / "sdma_err_count", "ue: 0\nce: 2\n")
    write(second / "umc_err_count", "ue: 2\nce: 0\n")
    write(second / "odd_err_count", "not supported\n")
    report = check(monkeypatch, {}, count=2, machine=machine)
    assert report.corrected == {machine.gpus[0].pci: 7} and report.uncorrected == {machine.gpus[1].pci: 2}
    assert len(report.faults) == 1 and f"GPU {machine.gpus[1].pci}: 2 errors of its memory could not be corrected" in report.faults[0]


# ---------------------------------------------------------------------------------------------------------------- all nodes


def report_of(host: str, tflops: float = 600.0, reduce: float = 200.0, faults: tuple[Fault, ...] = ()) -> NodeReport:
    """Of two devices; the first has the faults."""
    devices = tuple(DeviceReport(f"cuda:{index}", "AMD Instinct MI300X", "gfx942", {"tflops": tflops, "reduce_gbs": reduce},
                                 list(faults) if index == 0 else []) for index in range(2))
    return NodeReport(host, 1.5, devices, {}, {"0000:05:01.0": 3})


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    report = report_of("n1", faults=(Fault("broken"), Fault("480 TFLOP/s", "tflops")))
    assert NodeReport.read(report.write(tmp_path / "new")) == report


@pytest.mark.parametrize("spoil", [
    {"devices": []}, {"devices": [{"device": "cuda:0"}]}, {"time": "x"}, {"corrected": {"x": float("inf")}}, {"uncorrected": 3},
    {"devices": [{"device": "cuda:0", "name": "", "arch": "", "readings": {}, "faults": "abc"}]},
    {"devices": [{"device": "cuda:0", "name": "", "arch": "", "readings": {"tflops": float("nan")}, "faults": []}]}], ids=str)
def test_what_is_no_report_is_one_line(tmp_path: Path, spoil: dict[str, Any]) -> None:
    path = report_of("n1").write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **spoil}))
    with pytest.raises(ValueError, match=r"n1\.json is not a node's report \(\w+: ") as caught:
        NodeReport.read(path)
    assert "\n" not in str(caught.value)


def test_two_reports_of_a_host_are_one_node_with_the_faults_of_both() -> None:
    assert compare_nodes([report_of("n1", faults=(Fault("broken"),)), report_of("n1")]) == {"n1": ["cuda:0: broken"]}


def test_a_node_that_is_slow_beside_the_others_is_found() -> None:
    nodes = [report_of(f"n{index}") for index in range(6)] + [report_of("slow", tflops=480.0), report_of("far", reduce=160.0)]
    wrong = compare_nodes(nodes)
    assert [host for host, faults in wrong.items() if faults] == ["slow", "far"]
    assert wrong["slow"] == [f"cuda:{index}: 480 TFLOP/s, 0.80 of the median of its like" for index in range(2)]
    assert wrong["far"][0] == "cuda:0: 160 GB/s all-reduced, 0.80 of the median of its like"
    known = (Fault("480 TFLOP/s, less than 580", "tflops"), Fault("4 of 9 words wrong"))
    wrong = compare_nodes([*nodes[:6], report_of("slow", tflops=480.0, reduce=160.0, faults=known)])
    assert [line.partition(",")[0] for line in wrong["slow"]] == [
        "cuda:0: 480 TFLOP/s", "cuda:0: 4 of 9 words wrong", "cuda:1: 480 TFLOP/s", "cuda:0: 160 GB/s all-reduced",
        "cuda:1: 160 GB/s all-reduced"], "what is known is not said again, and hides nothing else"


def preflight(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "tools.preflight", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout, done.stderr


def test_the_tool_probes_writes_and_sums_up(tmp_path: Path) -> None:
    code, out, err = preflight("--device", "cpu", "--seconds", "0.1", "--out", str(tmp_path / "reports"))
    (path,) = (tmp_path / "reports").iterdir()
    assert code == 0 and out.count("cpu") == 2 and "1 of 1 nodes are fit" in err and path.name == f"{NodeReport.read(path).host}.json"
    for report in (report_of("n1"), report_of("n2"), report_of("bad", faults=(Fault("broken"),))):
        report.write(tmp_path / "reports")
    code, out, err = preflight("--summary", str(path.parent), "--expect", "5")
    assert code == 4 and "bad: cuda:0: broken\n" in err and "4 of 5 nodes have left a report" in err and "3 of 4 nodes are fit" in err
    assert re.search(r"^n1 +the slowest of 2 +600 ", out, flags=re.MULTILINE)
    assert preflight("--summary", str(path.parent), "--bad") == (4, "bad\n", "")
    (path.parent / "bad.json").unlink()
    assert preflight("--summary", str(path.parent), "--bad") == (0, "\n", "")
    assert json.loads(preflight("--summary", str(path.parent), "--json")[1])["nodes"] == 3


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "torch sees no GPU here; --device cpu rehearses it"),
    (["--gpus", "0"], "'0' is not a number from 1"),
    (["--gpus", "2", "--device", "cpu"], "--gpus does not go with --device cpu"),
    (["--summary", "docs", "--bad", "--expect", "2"], "ask for one of them"),
    (["--summary", "docs", "--expect", "-3"], "--expect: '-3' is not a number"),
    (["--gpus", "x"], "--gpus"),
    (["--expect", "3"], "--expect goes with --summary DIR"),
    (["--bad"], "--bad goes with --summary DIR"),
    (["--summary", "/nowhere"], "/nowhere is not a directory"),
    (["--summary", "docs"], "docs holds no report"),
    (["--summary", "docs/benchmarks"], "is not a node's report"),
    (["--summary", "docs", "--out", "x"], "--out does not go with it"),
    (["--device", "cpu", "--out", "/dev/null/x"], "cannot make /dev/null/x"),
    (["--seconds", "-1"], "--seconds"),
])
def test_a_bad_call_is_one_line(arguments: list[str], words: str) -> None:
    code, out, err = preflight(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and words in err, err
