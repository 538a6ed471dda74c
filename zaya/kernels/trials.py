"""Candidates for the configuration table, tried on the GPU that is here: which of them run, and how long their kernels take.

A trial has one candidate of one kernel, beside the present entries of the op's others, since what a kernel has to do may follow from their
tiles; only its own launches are timed. Candidates are compiled first, in as many processes as there are CPUs; one that needs more than
the GPU has is never launched. Knows no op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from zaya.kernels import cases, launch, machine_code
from zaya.kernels.timing import Clock, passes

Entry = dict[str, Any]
Candidates = dict[tuple[str, int], list[Entry]]
"""By kernel and index in the table; the first is the present entry."""
Score = tuple[tuple[float, ...], str]
"""More is better; the figures in words."""
ROUNDS = 7  # of a trial: each launch's time is their median


def measured_scores(candidates: Candidates, chosen: list[cases.Case]) -> dict[tuple[str, int], list[Score]]:
    """Minus the milliseconds that each candidate's kernel takes in forward and backward of all cases; -inf where it does not run."""
    clock, device = Clock(), torch.device("cuda")
    where = f"{torch.cuda.get_device_name()}, {', '.join(case.name for case in chosen)}"
    calls = [list(passes(case.timed or case.op, case, case.make(device, torch.bfloat16)).values())[-1] for case in chosen]
    faults = misfits(candidates, calls)
    # The first that runs; the present one, unless it is of another GPU.
    beside = {entry: next((number for number in range(len(each)) if (entry, number) not in faults), 0)
              for entry, each in candidates.items()}

    def measured(entry: tuple[str, int], number: int) -> Score:
        if (entry, number) in faults:
            return (-float("inf"),), faults[entry, number]
        key = install(candidates, beside | {entry: number})[entry]
        try:
            times = [clock.by_launch(call, ROUNDS).get(key) for call in calls]
        except (RuntimeError, OutOfResources) as error:  # too many registers for its warps, say the driver and Triton
            return (-float("inf"),), f"does not run: {' '.join(str(error).split())[:80]}"
        total = sum(milliseconds for milliseconds in times if milliseconds is not None)
        return ((-total,), f"measured: {total:.3f} ms, {where}") if total else ((-float("inf"),), "not launched")

    trials = tqdm(total=sum(map(len, candidates.values())), unit="trial", disable=None, leave=False)
    scores: dict[tuple[str, int], list[Score]] = {}
    for entry, each in candidates.items():
        scores[entry] = []
        for number in range(len(each)):
            scores[entry].append(measured(entry, number))
            trials.update()
    install(candidates, dict.fromkeys(candidates, 0))
    return scores


def install(candidates: Candidates, numbers: dict[tuple[str, int], int]) -> dict[tuple[str, int], tuple[str, int]]:
    """Put the candidates of these numbers into the table. Returns the key of each entry's launches, as `Clock.by_launch` has them."""
    keys = {}
    for (kernel, index), number in numbers.items():
        chosen = candidates[kernel, index][number]
        launch.replace_entry(kernel, index, chosen)
        keys[kernel, index] = kernel, id(chosen["blocks"])
    return keys


def misfits(candidates: Candidates, calls: list[Callable[[], Any]]) -> dict[tuple[tuple[str, int], int], str]:
    """Why a candidate, by entry and number, cannot run on this GPU."""
    chip, gpu = launch.target(torch.device("cuda")), triton.runtime.driver.active.get_current_target()
    owners, builds, refused = [], {}, {}
    for entry, each in candidates.items():
        for number in range(len(each)):
            key = install(candidates, dict.fromkeys(candidates, 0) | {entry: number})[entry]
            try:
                with machine_code.recording(chip, gpu) as noted:
                    for call in calls:
                        call()
            except Exception as error:  # noqa: BLE001  # an op refuses tile sizes in its own way
                refused[entry, number] = f"refused: {' '.join(str(error).split())[:80]}"
                continue
            for build, config in noted:
                if (build.kernel, id(config.blocks)) == key and (entry, number, build.key) not in builds:
                    builds[entry, number, build.key] = build
                    owners.append((entry, number))
    shared = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    with machine_code.process_pool(len(builds)) as pool:
        every = pool.map(misfit, builds.values(), [gpu] * len(builds), [shared] * len(builds))
        found = list(tqdm(every, total=len(builds), unit="kernel", disable=None, leave=False))
    return refused | {owner: why for owner, why in zip(owners, found) if why}


def misfit(build: machine_code.Build, gpu: GPUTarget, shared_bytes: int) -> str:
    """Why a GPU with so much shared memory cannot run it; empty: it can."""
    try:
        used = machine_code.compiled(build, gpu).metadata.shared
    except Exception as error:  # noqa: BLE001  # a compiler may fail in any way; that candidate is out
        return f"fails: {' '.join(str(error).split())[:80]}"
    return f"needs {used} bytes of shared memory of {shared_bytes}" if used > shared_bytes else ""
