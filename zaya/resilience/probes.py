"""Is this GPU right, and how fast is it: small programs whose results are known to the last bit.

    python -m zaya.resilience.probes --device cuda:3 [--seconds 2]               # one GPU: a JSON line of readings and faults
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
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from zaya.cli import Parser, positive
from zaya.resilience.health import Probed

ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # of the golden ratio: its multiples change all bits of a word
FREE_SHARE = 0.95
"""Of a GPU's memory that must be free before a job; a context takes less than 1 %."""
REPEATS = 10
LINK_S = 60.0


@dataclass(frozen=True)
class Sizes:
    """matmul: rows, inner and columns are all of that length, in blocks of `block`; piece and memory in bytes."""

    matmul: int
    block: int
    piece: int
    memory: int | None
    """None: nine tenths of what is free."""


GPU = Sizes(8192, 512, 1 << 30, None)  # 1.1 TFLOP a product; a piece is beyond every cache
CPU = Sizes(512, 64, 16 << 20, 128 << 20)


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


def operands(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """a [block, n], b [n, block] and a @ b [block, block], bf16, on the CPU.

    Integers of 7 bits, of the 8 that bf16 holds. Products have 13 bits, and sums of 8,192 of them, which walk at random, 20 of the 24 that
    fp32 holds. So a @ b does not depend on the order of summation, and its rounding to bf16 is the only one.
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-64, 64, (sizes.block, sizes.matmul), generator=generator)
    b = torch.randint(-64, 64, (sizes.matmul, sizes.block), generator=generator)
    return a.bfloat16(), b.bfloat16(), (a.double() @ b.double()).bfloat16()


def matmul(device: torch.device, sizes: Sizes, seconds: float) -> tuple[float, list[str]]:
    """Products of two square bf16 matrices, again and again for so long: (TFLOP/s, faults).

    Both are one block repeated, so every block of every product is the same known one: all elements are checked, not a sample.
    """
    block_a, block_b, expected = (tensor.to(device) for tensor in operands(sizes))
    n, times = sizes.matmul, sizes.matmul // sizes.block
    a, b = block_a.repeat(times, 1), block_b.repeat(1, times)
    product = torch.empty(n, n, dtype=torch.bfloat16, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    spent: list[float] = []
    until = time.monotonic() + seconds
    with exact_sums():
        while time.monotonic() < until or len(spent) < REPEATS:
            product.fill_(float("nan"))
            spent.append(seconds_of(lambda: torch.mm(a, b, out=product), device))
            wrong += (product.view(times, sizes.block, times, sizes.block) != expected[:, None, :]).sum()
    count = int(wrong)
    faults = [f"{count:,} of {len(spent) * n * n:,} elements of {len(spent)} bf16 products are wrong"] if count else []
    return 2 * n**3 / statistics.median(spent) / 1e12, faults


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
    total = sizes.memory or int(0.9 * torch.cuda.mem_get_info(device)[0]) - 2 * sizes.piece  # the check needs two pieces itself
    base = torch.arange(sizes.piece // 8, dtype=torch.int64, device=device) * ODD
    pieces = [torch.empty_like(base) for _ in range(max(total // sizes.piece - 1, 2))]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turned in (0, -1):
        keys = [(index << 40) ^ turned for index in range(len(pieces))]
        for piece, key in zip(pieces, keys):
            torch.bitwise_xor(base, key, out=piece)
        for piece, key in zip(pieces, keys):
            wrong += (torch.bitwise_xor(piece, base) != key).sum()
    count, words = int(wrong), 2 * len(pieces) * base.numel()
    times = [seconds_of(lambda: pieces[1].copy_(pieces[0]), device) for _ in range(REPEATS)]
    faults = [f"{count:,} of {words:,} words of memory do not hold what was written"] if count else []
    return 2 * sizes.piece / statistics.median(times) / 1e9, faults


def transfer(device: torch.device, sizes: Sizes) -> tuple[float, float, list[str]]:
    """A piece from pinned host memory and back: (GB/s to the device, GB/s from it, faults)."""
    there = torch.arange(sizes.piece // 32, dtype=torch.int64, pin_memory=device.type == "cuda").mul_(ODD)
    back = torch.empty_like(there, pin_memory=device.type == "cuda")
    away = torch.empty_like(there, device=device)
    to_device = [seconds_of(lambda: away.copy_(there), device) for _ in range(REPEATS)]
    from_device = [seconds_of(lambda: back.copy_(away), device) for _ in range(REPEATS)]
    faults = [] if torch.equal(there, back) else ["what goes to the device and back is not the same"]
    gigabytes = there.numel() * 8 / 1e9
    return gigabytes / statistics.median(to_device), gigabytes / statistics.median(from_device), faults


def probe(device: torch.device, seconds: float) -> Probed:
    """All of one device."""
    if device.type == "cpu":
        found, sizes = Probed("cpu", "CPU"), CPU
    else:
        torch.cuda.set_device(device)
        properties, sizes = torch.cuda.get_device_properties(device), GPU
        arch = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
        found = Probed(str(device), f"{properties.name} {arch.partition(':')[0]}")
        free, total = torch.cuda.mem_get_info(device)
        if free < FREE_SHARE * total:
            found.faults.append(f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB of its memory are taken by another process")
    found.readings["tflops"], wrong = matmul(device, sizes, seconds)
    found.readings["copy_gbs"], broken = memory(device, sizes)
    found.readings["to_device_gbs"], found.readings["from_device_gbs"], lost = transfer(device, sizes)
    found.faults += wrong + broken + lost
    return found


# ---------------------------------------------------------------------------------------------------------------- several devices


def links(device: torch.device, rank: int, ranks: int, store: str) -> Probed:
    """This device's part in an all-reduce and an all-to-all of all of the node's, 64 MiB each, checked to the bit."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=LINK_S))
    found = Probed(str(device), "")
    count = (16 << 20) // ranks * ranks
    pattern = torch.arange(count, dtype=torch.float32, device=device) % 1021
    total, received = torch.empty_like(pattern), torch.empty_like(pattern)

    def reduce() -> None:
        total.copy_(pattern + rank)
        dist.all_reduce(total)

    def exchange() -> None:
        dist.all_to_all_single(received, pattern + rank)

    share = count * 4 * (ranks - 1) / ranks / 1e9
    found.readings["reduce_gbs"] = 2 * share / statistics.median(seconds_of(reduce, device) for _ in range(REPEATS))
    found.readings["exchange_gbs"] = share / statistics.median(seconds_of(exchange, device) for _ in range(REPEATS))
    wrong = int((total != ranks * pattern + sum(range(ranks))).sum())
    sent = pattern.view(ranks, -1)[rank] + torch.arange(ranks, dtype=torch.float32, device=device)[:, None]
    lost = int((received.view(ranks, -1) != sent).sum())
    found.faults += [f"{wrong:,} of {count:,} elements of an all-reduce over {ranks} devices are wrong"] if wrong else []
    found.faults += [f"{lost:,} of {count:,} elements of an all-to-all over {ranks} devices are wrong"] if lost else []
    dist.destroy_process_group()
    return found


def main(argv: list[str]) -> int:
    parser = Parser("zaya.resilience.probes", description="Probe one device; tools.preflight does it for all of a node.")
    parser.add_argument("--device", type=torch.device, required=True, help="cuda:N or cpu")
    parser.add_argument("--seconds", type=positive, default=2.0, help="how long it multiplies (2)")
    parser.add_argument("--links", nargs=3, metavar=("RANK", "RANKS", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = arguments.device
    if arguments.links:
        rank, ranks, store = arguments.links
        found = links(device, int(rank), int(ranks), store)
    else:
        found = probe(device, arguments.seconds)
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
