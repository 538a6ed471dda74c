"""The one place where Triton kernels are launched: on the device of their tensors, or through whoever stands in for one.

A stand-in (`launching_through`) receives every launch of an op instead of a device: one that notes them, to compile for a chip that is not
here; one that executes the chip's machine code on the CPU. Ops run the same lines for all of them. Knows no op.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
TABLE = Path(__file__).with_name("configs.json")


@dataclass(frozen=True)
class Target:
    """What a kernel is built for."""

    arch: str
    """gfx942, sm_90, ...: the key of the configuration table."""
    num_cus: int
    """Compute units (streaming multiprocessors): the size of a persistent grid."""
    num_xcds: int = 1
    """Dies with an L2 each, over which work-groups go round-robin: 8 on the MI300X."""

    @property
    def is_hip(self) -> bool:
        return self.arch.startswith("gfx")


MI300X = Target("gfx942", num_cus=304, num_xcds=8)
CUS_PER_XCD = 38  # of an MI300X, and of an MI300A, which has six dies
SMALL_SHARED = ("sm_86", "sm_120", "sm_121")  # NVIDIA's others with sm_89's 99 KiB of shared memory


@dataclass(frozen=True)
class Config:
    """One entry of the table: tile sizes (constexprs of the kernel) and launch options."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 2
    hip: Mapping[str, int] = field(default_factory=dict)
    """Options that only the AMD compiler knows: waves_per_eu, matrix_instr_nonkdim, kpack."""

    def options(self, target: Target) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **(self.hip if target.is_hip else {})}


Launcher = Callable[[Any, tuple[int, ...], Mapping[str, Any], Config], None]
"""Called with kernel, grid, all arguments by name (constexprs among them), and the configuration."""


@dataclass(frozen=True)
class _StandIn:
    launcher: Launcher
    target: Target


_stand_in: _StandIn | None = None


@contextlib.contextmanager
def launching_through(launcher: Launcher, target: Target = MI300X) -> Iterator[None]:
    """Inside, `launcher` gets every launch and ops believe to be on `target`, whatever the device of their tensors."""
    global _stand_in
    before, _stand_in = _stand_in, _StandIn(launcher, target)
    try:
        yield
    finally:
        _stand_in = before


def target(device: torch.device) -> Target:
    """The chip that kernels over tensors of `device` run on."""
    if _stand_in is not None:
        return _stand_in.target
    if device.type == "cuda":
        return _gpu(device.index if device.index is not None else torch.cuda.current_device())
    assert INTERPRETED, f"a Triton kernel cannot run on {device}: only under TRITON_INTERPRET=1 or through a stand-in"
    return Target("interpreter", num_cus=4)  # few programs where a grid is persistent: the interpreter runs them one after the other


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        dies = properties.multi_processor_count // CUS_PER_XCD if arch == MI300X.arch else 1
        return Target(arch, properties.multi_processor_count, max(dies, 1))
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def config(kernel: Any, target: Target, **when: str | int) -> Config:
    """The table's first entry for this kernel whose conditions all hold, of the arch, else of its kin: sm_89 where there is as little
    shared memory, then sm_90 for NVIDIA; gfx942 for AMD and the interpreter. sm_89 lists only what sm_90's entries have no room for."""
    return _config(kernel.__name__, target.arch, tuple(when.items()))


@functools.cache
def _config(kernel: str, arch: str, conditions: tuple[tuple[str, str | int], ...]) -> Config:
    when = dict(conditions)
    for each in (arch, *["sm_89"] * (arch in SMALL_SHARED), "sm_90" if arch.startswith("sm_") else MI300X.arch):
        for entry in _table()[kernel]:
            if entry["arch"] == each and all(when.get(key) == value for key, value in entry.get("when", {}).items()):
                return Config(entry["blocks"], entry["num_warps"], entry.get("num_stages", 2), entry.get("hip", {}))
    raise LookupError(f"{TABLE.name} has no configuration of {kernel} for {arch} and {when}")


def replace_entry(kernel: str, index: int, entry: dict[str, Any]) -> None:
    """For a tuner: this entry of the table, in this process, from the next launch on."""
    _table()[kernel][index] = entry
    _config.cache_clear()


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text())
    return table


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
    """Run `kernel` (a triton.jit function) over `grid`. arguments: by name, without the configuration's blocks."""
    everything = {**arguments, **config.blocks}
    if _stand_in is not None:
        _stand_in.launcher(kernel, grid, everything, config)
        return
    if INTERPRETED:
        kernel[grid](**everything)
        return
    device = next(value for value in arguments.values() if isinstance(value, torch.Tensor)).device
    if device.index != torch.cuda.current_device():  # Triton launches on the current device, whatever its tensors'
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, config)
        return
    values = [everything[name] for name in kernel.arg_names]
    key = (id(kernel), id(config), device.index, *specialisation(kernel, values))
    if key in _built and not kernel.pre_run_hooks:
        built, _ = _built[key]
        built[(*grid, 1, 1)[:3]](*values)
    else:
        built = kernel[grid](**everything, **config.options(target(device)))
        if isinstance(built, CompiledKernel):  # not under a hook of Triton's that leaves the compiling to somebody else
            _built[key] = built, config


_built: dict[tuple[Any, ...], tuple[Any, Config]] = {}
"""Triton's compiled kernel of each launch so far; its configuration with it, so that no other gets its id.

Triton's own way from a launch to its kernel takes the host three times as long: docs/kernels.md."""


def specialisation(kernel: Any, values: Sequence[Any]) -> Iterator[Any]:
    """What Triton compiles another kernel for, of a launch with these values of all its parameters: constexprs; a tensor's dtype, whether
    it starts at a multiple of 16 bytes, whether its storage is under 2 GiB; whether an integer is 1, whether 16 divides it, its width."""
    for value, parameter in zip(values, kernel.params, strict=True):
        if parameter.is_constexpr:
            yield type(value), value  # 1, True and 1.0 are one key to a dict, three to Triton
        elif value is None:
            yield None
        elif isinstance(value, torch.Tensor):
            yield value.dtype, value.data_ptr() % 16 == 0, value.untyped_storage().nbytes() < 2**31
        elif isinstance(value, int):
            yield value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63, type(value)
        else:
            yield type(value)
