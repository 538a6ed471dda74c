"""Is this GPU right, and how fast is it: small programs whose results are known to the last bit.

    python -m zaya.resilience.probes --device cuda:3 [--seconds 2]               # one GPU: a JSON line, its DeviceReport
    python -m zaya.resilience.probes --device cuda:3 --links 3 8 FILE            # its part in a collective of 8

A GPU that multiplies wrongly once in a million times, or a bit of its memory that sticks, stops no run: it shows as a loss spike days
later. So nothing here has a tolerance: the operands are integers, chosen so that every sum is exact in whatever order it is taken. Each
device has a process of its own (zaya/resilience/health.py starts them): a GPU that hangs takes no other with it.
"""

from __future__ import annotations

import sys

from zaya import runtime

if __name__ == "__main__":
    runtime.start("zaya.resilience.probes")  # before torch is imported

import argparse
import contextlib
import ctypes
import functools
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zaya.cli import Parser, positive
from zaya.resilience.health import DeviceReport, Fault

ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # of the golden ratio: its multiples change all bits of a word
FREE_SHARE = 0.95
"""Of a GPU's memory that must be free before a job; a context takes less than 1 %."""
REPEATS = 10
"""Of what is timed; its time is their median."""
LINK_S = 60.0
"""For a collective."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Sizes:
    """Of the probes. Rows, inner and columns of a product are `matmul` long, in blocks of `block`."""

    matmul: int
    block: int
    piece_bytes: int
    """Of the memory that is filled: one copy, beyond every cache."""
    memory_bytes: int | None
    """None: nine tenths of what is free, but for what the check needs itself."""
    transfer_bytes: int
    reduce_bytes: int


GPU_SIZES = Sizes(8192, 512, 1 << 30, None, 256 << 20, 64 << 20)  # 1.1 TFLOP a product
CPU_SIZES = Sizes(512, 64, 16 << 20, 128 << 20, 16 << 20, 4 << 20)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """From the launch to the end of the work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------- one device


def operands(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """a [block, n] and b [n, block], integers as fp64, on the CPU, whose product shows every wrong bit of every product in it.

    a has 8 bits, all that bf16 holds. The absolute values of an element's n = 8,192 products add up to about 2^23, less than the 2^24 that
    fp32 counts to: every partial sum, in whatever order, is exact. And nearly all products come twice, with both signs, at places far
    apart: what is left is an integer below 256, which bf16 holds, too, so that no rounding hides anything.
    """
    generator = torch.Generator().manual_seed(0)
    half = sizes.matmul // 2
    a = torch.randint(-255, 256, (sizes.block, half), generator=generator)
    b = torch.randint(-15, 16, (half, sizes.block), generator=generator)
    mixed = torch.randperm(half, generator=generator)
    rest = torch.zeros_like(b).scatter_(0, torch.randint(half, (1, sizes.block), generator=generator), 1)
    return torch.cat([a, a[:, mixed]], 1).double(), torch.cat([b, rest - b[mixed]], 0).double()


def matmul(device: torch.device, sizes: Sizes, seconds: float) -> tuple[float, list[str]]:
    """Products of two square bf16 matrices, again and again for so long: (TFLOP/s, faults).

    Both are one block repeated, times powers of two that tell the blocks apart, so the whole product is known from one of its blocks: all
    elements are checked, not a sample. Every second product is the transposed one, in which the sides change roles.
    """
    n, times = sizes.matmul, sizes.matmul // sizes.block
    block_a, block_b = operands(sizes)
    block, block_a, block_b = (block.bfloat16().to(device) for block in (block_a @ block_b, block_a, block_b))
    numbers = torch.arange(times, dtype=torch.float64).repeat_interleave(sizes.block)
    rows, columns = (2.0 ** numbers).bfloat16().to(device)[:, None], (2.0 ** (5 * numbers)).bfloat16().to(device)
    a, b, expected = block_a.repeat(times, 1) * rows, block_b.repeat(1, times) * columns, block.repeat(times, times) * rows * columns
    ways = [(a, b, expected), (b.t().contiguous(), a.t().contiguous(), expected.t().contiguous())]
    product = torch.empty(n, n, dtype=torch.bfloat16, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    spent: list[float] = []
    until = time.monotonic() + seconds
    with exact_sums():
        while time.monotonic() < until or len(spent) < REPEATS:
            left, right, known = ways[len(spent) % 2]
            product.fill_(math.nan)
            spent.append(seconds_of(functools.partial(torch.mm, left, right, out=product), device))
            wrong += (product != known).sum()
    return 2 * n**3 / statistics.median(spent) / 1e12, fault(wrong, len(spent) * n * n, f"elements of {len(spent)} bf16 products are wrong")


def fault(wrong: Tensor, count: int, what: str) -> list[str]:
    """A line, if any is wrong."""
    return [f"{int(wrong):,} of {count:,} {what}"] if int(wrong) else []


@contextlib.contextmanager
def exact_sums() -> Iterator[None]:
    """Within it no partial sum of a product is rounded to bf16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


def memory(device: torch.device, sizes: Sizes) -> tuple[float, list[str]]:
    """Fill memory with words that are all different, read them back, then the same with every bit turned: (GB/s of a copy, faults).

    Each bit is 0 once and 1 once; a word that lands at another's address is seen, too.
    """
    words = sizes.piece_bytes // 8

    def pattern() -> Tensor:
        return torch.arange(words, dtype=torch.int64, device=device).mul_(ODD)

    total = sizes.memory_bytes or int(0.9 * torch.cuda.mem_get_info(device)[0]) - 2 * sizes.piece_bytes  # the check needs two itself
    base = pattern()
    pieces = [torch.empty_like(base) for _ in range(max(total // sizes.piece_bytes - 1, 2))]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turned in (0, -1):
        keys = [(index << 40) ^ turned for index in range(len(pieces))]
        for piece, key in zip(pieces, keys):
            torch.bitwise_xor(base, key, out=piece)
        for piece, key in zip(pieces, keys):
            wrong += (torch.bitwise_xor(piece, base) != key).sum()
    wrong += (base != pattern()).sum()  # what is wrong in both does not show above
    times = []
    for _ in range(REPEATS):
        pieces[1].zero_()
        times.append(seconds_of(lambda: pieces[1].copy_(pieces[0]), device))
        wrong += (pieces[1] != pieces[0]).sum()
    return (2 * sizes.piece_bytes / statistics.median(times) / 1e9,
            fault(wrong, (2 * len(pieces) + 1 + REPEATS) * words, "words of memory do not hold what was written"))


def transfer(device: torch.device, sizes: Sizes) -> tuple[float, float, list[str]]:
    """From pinned host memory and back: (GB/s to the device, GB/s from it, faults)."""
    pinned = device.type == "cuda"
    there = torch.arange(sizes.transfer_bytes // 8, dtype=torch.int64, pin_memory=pinned).mul_(ODD)
    back = torch.empty_like(there, pin_memory=pinned)
    away = torch.empty_like(there, device=device)
    to_device, from_device, lost = [], [], torch.zeros((), dtype=torch.int64)
    for _ in range(REPEATS):
        away.fill_(-1)
        back.fill_(-1)
        to_device.append(seconds_of(lambda: away.copy_(there), device))
        from_device.append(seconds_of(lambda: back.copy_(away), device))
        lost += (there != back).sum()
    gigabytes = sizes.transfer_bytes / 1e9
    return (gigabytes / statistics.median(to_device), gigabytes / statistics.median(from_device),
            fault(lost, REPEATS * there.numel(), "words are not the same after a way to the device and back"))


def probe(device: torch.device, seconds: float) -> DeviceReport:
    """All of one device; `seconds` of products. A device in use is left alone."""
    if device.type == "cpu":
        report, sizes = DeviceReport("cpu", "CPU", "cpu"), CPU_SIZES
    else:
        torch.cuda.set_device(device)
        properties, sizes = torch.cuda.get_device_properties(device), GPU_SIZES
        arch = properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        report = DeviceReport(str(device), properties.name, arch)
        free, total = torch.cuda.mem_get_info(device)
        if free < FREE_SHARE * total:
            taken = (total - free) / 2**30
            report.faults.append(Fault(f"{taken:.1f} of {total / 2**30:.0f} GiB of its memory are taken; is a job running?"))
            return report
    report.readings["tflops"], wrong = matmul(device, sizes, seconds)
    report.readings["copy_gbs"], broken = memory(device, sizes)
    report.readings["to_device_gbs"], report.readings["from_device_gbs"], lost = transfer(device, sizes)
    report.faults += map(Fault, wrong + broken + lost)
    return report


# ---------------------------------------------------------------------------------------------------------------- several devices


def links(device: torch.device, rank: int, ranks: int, store: str) -> DeviceReport:
    """This device's part in an all-reduce and an all-to-all of all of the node's, 64 MiB each on GPUs, checked to the bit."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=LINK_S))
    count = (GPU_SIZES if device.type == "cuda" else CPU_SIZES).reduce_bytes // 4 // ranks * ranks
    pattern = torch.arange(count, dtype=torch.float32, device=device) % 1021  # small integers: sums are exact
    mine, total, received = pattern + rank, torch.empty_like(pattern), torch.empty_like(pattern)
    summed = ranks * pattern + sum(range(ranks))
    sent = (pattern.view(ranks, -1)[rank] + torch.arange(ranks, dtype=torch.float32, device=device)[:, None]).flatten()
    reduce_s, exchange_s, wrong = [], [], torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(REPEATS):
        total.copy_(mine)
        received.fill_(math.nan)
        reduce_s.append(seconds_of(lambda: dist.all_reduce(total), device))
        exchange_s.append(seconds_of(lambda: dist.all_to_all_single(received, mine), device))
        wrong += torch.stack([(total != summed).sum(), (received != sent).sum()])
    dist.destroy_process_group()
    share = count * 4 * (ranks - 1) / ranks / 1e9
    lines = [line for number, what in zip(wrong, ("all-reduces", "all-to-alls"))
             for line in fault(number, REPEATS * count, f"elements of {REPEATS} {what} over {ranks} devices are wrong")]
    return DeviceReport(str(device), readings={"reduce_gbs": 2 * share / statistics.median(reduce_s),
                                               "exchange_gbs": share / statistics.median(exchange_s)}, faults=list(map(Fault, lines)))


def main(argv: list[str]) -> int:
    parser = Parser("zaya.resilience.probes", description="Probe one device; tools.preflight does it for all of a node.")
    parser.add_argument("--device", type=torch.device, required=True, help="cuda:N or cpu")
    parser.add_argument("--seconds", type=positive, default=2.0, help="how long it multiplies (2)")
    parser.add_argument("--links", nargs=3, metavar=("RANK", "RANKS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a GPU that nobody asks about any more is free again
    device = arguments.device
    if arguments.links:
        rank, ranks, store = arguments.links
        report = links(device, int(rank), int(ranks), store)
    else:
        report = probe(device, arguments.seconds)
    print(json.dumps(asdict(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
