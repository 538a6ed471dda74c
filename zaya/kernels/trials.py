"""Candidates for the configuration table, tried on the GPU that is here: which of them run, and how long their kernels take.

Each launch is timed for itself, so all kernels of an op are varied at once: a trial has one candidate of each. Candidates are compiled
first, in as many processes as there are CPUs; one that needs more than the GPU has is never launched. Knows no op.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from zaya.kernels import cases, gfx942, launch
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
    scores: dict[tuple[str, int], list[Score]] = {
        entry: [((-float("inf"),), faults.get((entry, number), "not launched")) for number in range(len(each))]
        for entry, each in candidates.items()}
    for number in tqdm(range(max(map(len, candidates.values()))), unit="trial", disable=None, leave=False):
        entries = install(candidates, {entry: number if (entry, number) not in faults else 0 for entry in candidates})
        totals: dict[tuple[str, int], float] = {}
        for call in calls:
            try:
                times = clock.by_launch(call, ROUNDS)
            except RuntimeError as error:  # too many registers for its warps, says the driver; of which kernel, it does not tell
                tqdm.write(f"trial {number} does not run: {error}")
                totals.clear()
                break
            for key, milliseconds in times.items():
                totals[key] = totals.get(key, 0.0) + milliseconds
        for key, entry in entries.items():
            if key in totals and number < len(candidates[entry]) and (entry, number) not in faults:
                scores[entry][number] = (-totals[key],), f"measured: {totals[key]:.3f} ms, {where}"
    install(candidates, dict.fromkeys(candidates, 0))
    return scores


def install(candidates: Candidates, numbers: dict[tuple[str, int], int]) -> dict[tuple[str, int], tuple[str, int]]:
    """Put the candidates of these numbers into the table; an entry that has fewer keeps its present one. Returns each entry by the key of
    its launches, as `Clock.by_launch` has them."""
    entries = {}
    for (kernel, index), each in candidates.items():
        chosen = each[numbers[kernel, index] if numbers[kernel, index] < len(each) else 0]
        launch.replace_entry(kernel, index, chosen)
        entries[kernel, id(chosen["blocks"])] = kernel, index
    return entries


def misfits(candidates: Candidates, calls: list[Callable[[], Any]]) -> dict[tuple[tuple[str, int], int], str]:
    """Why a candidate, by entry and number, cannot run on this GPU."""
    chip, gpu = launch.target(torch.device("cuda")), triton.runtime.driver.active.get_current_target()
    owners, builds, refused = [], {}, {}
    for number in range(max(map(len, candidates.values()))):
        entries = install(candidates, dict.fromkeys(candidates, number))
        try:
            with gfx942.recording(chip, gpu) as noted:
                for call in calls:
                    call()
        except Exception as error:  # noqa: BLE001  # an op refuses tile sizes in its own way; which kernel's, it does not tell
            refused.update({(entry, number): f"refused beside others: {error}" for entry, each in candidates.items() if number < len(each)})
            continue
        for build, config in noted:
            entry = entries.get((build.kernel, id(config.blocks)))
            if entry and number < len(candidates[entry]) and (entry, build.key) not in builds:
                builds[entry, build.key] = build
                owners.append((entry, number))
    shared = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, max(len(builds), 1)), multiprocessing.get_context("spawn")) as pool:
        every = pool.map(misfit, builds.values(), [gpu] * len(builds), [shared] * len(builds))
        found = list(tqdm(every, total=len(builds), unit="kernel", disable=None, leave=False))
    return refused | {owner: why for owner, why in zip(owners, found) if why}


def misfit(build: gfx942.Build, gpu: GPUTarget, shared_bytes: int) -> str:
    """Why a GPU with so much shared memory cannot run it; empty: it can."""
    try:
        used = gfx942.compiled(build, gpu).metadata.shared
    except Exception as error:  # noqa: BLE001  # a compiler may fail in any way; that candidate is out
        return f"fails: {' '.join(str(error).split())[:80]}"
    return f"needs {used} bytes of shared memory of {shared_bytes}" if used > shared_bytes else ""
