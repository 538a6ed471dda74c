"""How long an op takes on the GPU: what benchmark and tuner share. Knows no op.

The GPU first has something else to do, for longer than the host needs to launch the op. So a time is that of the GPU alone, as in a
training step, where the host runs ahead; what the host needs is told apart (`Clock.host_milliseconds`).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import cases
from zaya.kernels.launch import Config, launching_through, target

Call = Callable[[], Any]
FLUSH_BYTES = 512 << 20  # more than any cache: 256 MiB of the MI300X, 50 MB of the H100
WARM_UP = 3  # calls: a first one compiles, tunes and allocates
LONGEST_LEAD_MS = 20.0  # enough for any launch; a call that waits for the GPU seems to keep the host busy for longer


class Clock:
    """Times calls on the GPU one at a time, after emptying its caches."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        cycles = 1_000_000
        self.cycles_per_ms = cycles / min(_between(lambda: torch.cuda._sleep(cycles)) for _ in range(3))

    def milliseconds(self, call: Call, lead_ms: float) -> float:
        """lead_ms: how long the GPU is busy before; more than the host needs to launch the call."""
        self._lead(lead_ms)
        return _between(call)

    def _lead(self, lead_ms: float) -> None:
        self.flush.zero_()
        torch.cuda._sleep(int(min(lead_ms, LONGEST_LEAD_MS) * self.cycles_per_ms))

    def host_milliseconds(self, call: Call) -> float:
        """Until the host has launched a warm call (or, if it waits for the GPU, until that is done): the least of three."""
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e3 * min(times)

    def peak_bytes(self, call: Call) -> int:
        """Largest allocation while it runs, beyond what is there before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def medians(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        """Milliseconds on the GPU, by name; each call once a round, so that a change of the clock speed meets all of them."""
        leads = {}
        for name, call in calls.items():
            for _ in range(WARM_UP):
                call()
            leads[name] = 1.5 * self.host_milliseconds(call)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.milliseconds(call, leads[name]))
        return {name: statistics.median(each) for name, each in times.items()}

    def by_launch(self, call: Call, rounds: int) -> dict[tuple[str, int], float]:
        """Median milliseconds of a call in its Triton kernels, by name and identity of their tile sizes (`id(config.blocks)`)."""
        for _ in range(WARM_UP):
            call()
        lead_ms = 2 * self.host_milliseconds(call)  # events cost the host time, too
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            self._lead(lead_ms)
            with _timing_launches() as launches:
                call()
            torch.cuda.synchronize()
            sums: dict[tuple[str, int], float] = {}
            for key, start, end in launches:
                sums[key] = sums.get(key, 0.0) + start.elapsed_time(end)
            for key, milliseconds in sums.items():
                times.setdefault(key, []).append(milliseconds)
        return {key: statistics.median(each) for key, each in times.items()}


def _between(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@contextlib.contextmanager
def _timing_launches() -> Iterator[list[tuple[tuple[str, int], torch.cuda.Event, torch.cuda.Event]]]:
    """Inside, each launch stands between two events, listed with the kernel's name and the identity of its tile sizes."""
    launches: list[tuple[tuple[str, int], torch.cuda.Event, torch.cuda.Event]] = []
    chip = target(torch.device("cuda"))

    def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kernel[grid](**arguments, **config.options(chip))
        end.record()
        launches.append(((kernel.__name__, id(config.blocks)), start, end))

    with launching_through(launch, chip):
        yield launches


def passes(op: Callable[..., Any], case: cases.Case, arguments: Mapping[str, Any]) -> dict[str, Call]:
    """Forward alone, and with backward where the op has one; cotangents are made before."""
    if not case.gradients:
        return {"forward": lambda: op(**arguments)}
    leaves = [cases.at(arguments, path).detach().requires_grad_() for path in case.gradients]
    bound = cases.with_leaves(arguments, dict(zip(case.gradients, leaves)))

    def outputs() -> list[Tensor]:
        result = op(**bound)
        return [output for output in ((result,) if isinstance(result, Tensor) else result) if output.requires_grad]

    cotangents = [cases.cotangent(output, index) for index, output in enumerate(outputs())]
    return {"forward": lambda: op(**bound), "both": lambda: torch.autograd.grad(outputs(), leaves, cotangents, allow_unused=True)}
