"""How long the passes of an op take on the GPU: what benchmark and tuner share. Knows no op."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import cases

Call = Callable[[], Any]
FLUSH_BYTES = 512 << 20  # more than any cache: 256 MiB of the MI300X, 50 MB of the H100


class Clock:
    """Times calls on the GPU one at a time, after emptying its caches."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def milliseconds(self, call: Call) -> float:
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, call: Call) -> int:
        """Largest allocation while it runs, beyond what is there before."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def medians(self, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
        """Each call once a round, so that a change of the clock speed meets all of them."""
        for call in calls.values():
            for _ in range(3):
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.milliseconds(call))
        return {name: statistics.median(each) for name, each in times.items()}


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
