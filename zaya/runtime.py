"""The run-time settings of an MI300X node: environment of HIP, HSA and RCCL, NUMA binding, manual garbage collection.

A process calls `apply()` before its first `import torch`: HIP reads its variables when torch's libraries load or first touch a GPU, and
threads inherit the binding of the thread that starts them. So nothing here imports torch, or anything but the standard library: whether
torch is built for ROCm is read from its version.py, where the GPUs are from /sys. What the user has set wins; what does not apply to this
machine is left out. `describe()` gives the lines printed at start; `python -m zaya.runtime` prints what would be set here.

    if __name__ == "__main__":           # in zaya/train.py, above the imports that bring torch
        SETTINGS = runtime.start("zaya.train")
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import re
import resource
import sys
from collections.abc import MutableMapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Scope = Literal["rocm", "mi300x"]


@dataclass(frozen=True)
class Setting:
    """One environment variable: set where `scope` holds and the user has not set it."""

    name: str
    value: str
    scope: Scope
    reason: str
    source: str


_WORKLOAD = "rocm.docs.amd.com, MI300X workload optimization"
_PRIMUS = "AMD-AGI/Primus runner/helpers/envs"
SETTINGS = (
    Setting("HSA_NO_SCRATCH_RECLAIM", "1", "rocm",
            "a kernel's scratch memory stays with its queue; else a large one is taken and given back with every launch",
            "ROCR-Runtime, environment variables; Primus' MoE launchers (its base_env.sh leaves it at 0)"),
    Setting("HSA_KERNARG_POOL_SIZE", "12582912", "mi300x",
            "12 MiB instead of 1 MiB of kernel arguments: a step launches thousands of kernels ahead of the GPU",
            f"HIP, environment variables; {_PRIMUS}/MI300X.sh"),
    Setting("HIP_FORCE_DEV_KERNARG", "1", "rocm",
            "kernel arguments lie in device memory, not across the bus from it",
            f"HIP, environment variables; {_WORKLOAD}"),
    # More streams than queues share them in turn (HIP, environment variables): what must overlap has to fit in 2.
    Setting("GPU_MAX_HW_QUEUES", "2", "rocm",
            "2 hardware queues a process instead of 4: compute streams and RCCL's, which then overlap well",
            f"{_WORKLOAD}: multi-node RCCL settings; {_PRIMUS}/base_env.sh"),
    Setting("TORCH_NCCL_HIGH_PRIORITY", "1", "rocm",
            "RCCL's streams have high priority: a collective does not wait behind queued kernels",
            f"{_WORKLOAD}: multi-node RCCL settings; {_PRIMUS}/base_env.sh"),
    # Channels take compute units from the kernels that run meanwhile (RCCL usage tips): a job whose communication is hidden anyway may
    # want fewer.
    Setting("NCCL_MIN_NCHANNELS", "112", "mi300x",
            "more channels to the 7 other GPUs of the node than RCCL takes by itself",
            f"{_WORKLOAD}: NCCL_MIN_NCHANNELS"),
    Setting("RCCL_MSCCL_ENABLE", "0", "rocm",
            "MSCCL corrupted data in past releases; newer ones ignore this",
            f"rocm.docs.amd.com, system validation before training; {_PRIMUS}/base_env.sh"),
)

NUMA_SWITCH = "ZAYA_NUMA_BINDING"
"""auto (default) | off."""
COLLECT_SWITCH = "ZAYA_GC_STEPS"
"""Steps between garbage collections; 0 leaves them to Python. 50 is torchtitan's interval."""
COLLECT_STEPS = 50
MAX_OPEN_FILES = 1 << 17
GFX942 = 90402
"""KFD's number of the MI300X: major * 10000 + minor * 100 + stepping."""


class Gpu(NamedTuple):
    """A GPU as the kernel's driver lists it, in the order in which HIP counts them."""

    arch: int
    pci: str
    uuid: str
    numa_node: int
    """-1: the machine does not say."""


class Outcome(NamedTuple):
    """What became of one setting: `value` is the one in force."""

    name: str
    value: str
    state: Literal["set", "kept", "left out"]
    reason: str

    def __str__(self) -> str:
        if self.state == "left out":
            return f"runtime: {self.name} left out: {self.reason}"
        return f"runtime: {self.name}={self.value} ({'set by the user' if self.state == 'kept' else self.reason})"


class Machine:
    """What the settings depend on, read without torch. `root` stands for / in tests."""

    def __init__(self, root: Path = Path("/"), torch_version_file: Path | None = None) -> None:
        self.root = root
        self.hip = _hip_version(torch_version_file or _find_torch_version_file())
        nodes = sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*"), key=lambda path: int(path.name))
        self.gpus = [gpu for gpu in map(self._gpu, nodes) if gpu is not None] if (root / "dev/kfd").exists() else []
        listed = (root / "sys/devices/system/node").glob("node[0-9]*/cpulist")
        self.numa_cpus = {int(path.parent.name[4:]): cpus for path in listed if (cpus := _cpu_list(path.read_text()))}

    def holds(self, scope: Scope) -> bool:
        if self.hip is None or not self.gpus:
            return False
        return scope == "rocm" or all(gpu.arch == GFX942 for gpu in self.gpus)

    def balances_numa(self) -> bool:
        """Whether the kernel moves pages between NUMA nodes by itself."""
        return _read(self.root / "proc/sys/kernel/numa_balancing") not in ("", "0")

    def _gpu(self, node: Path) -> Gpu | None:
        """None: a CPU, or a GPU that this container may not use (its properties are empty or unreadable)."""
        properties = dict(line.split(maxsplit=1) for line in _read(node / "properties").splitlines() if " " in line)
        if int(properties.get("simd_count", 0)) == 0:
            return None
        location, domain = int(properties.get("location_id", 0)), int(properties.get("domain", 0))
        pci = f"{domain:04x}:{location >> 8 & 0xff:02x}:{location >> 3 & 0x1f:02x}.{location & 7:x}"
        numa_node = _read(self.root / "sys/bus/pci/devices" / pci / "numa_node") or "-1"
        return Gpu(int(properties.get("gfx_target_version", 0)), pci, f"GPU-{int(properties.get('unique_id', 0)):016x}", int(numa_node))


def apply(environ: MutableMapping[str, str] = os.environ, machine: Machine | None = None) -> list[Outcome]:
    """Set what applies and the user has not set, and bind a worker of torchrun to its GPU's NUMA node; say what was done.

    Call it before `import torch`. A second call changes nothing more. ValueError: a switch of ours has a value it cannot have.
    """
    machine = machine or Machine()
    outcomes = []
    for setting in SETTINGS:
        if not machine.holds(setting.scope):
            continue
        is_users = setting.name in environ
        value = environ.setdefault(setting.name, setting.value)
        outcomes.append(Outcome(setting.name, value, "kept" if is_users else "set", setting.reason))
    outcomes += [_bind(environ, machine), raise_open_files()]
    steps = collect_steps(environ)
    what = "one garbage collection every so many steps, on all ranks at once" if steps else "Python collects when it likes"
    outcomes.append(Outcome(COLLECT_SWITCH, str(steps), "kept" if COLLECT_SWITCH in environ else "set", what))
    return outcomes


def start(program: str) -> list[Outcome]:
    """`apply()` for a program's first lines: a bad switch ends it with one line and code 2, as any bad argument."""
    try:
        return apply()
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def describe(outcomes: list[Outcome], machine: Machine | None = None) -> list[str]:
    """The lines for the start of a log."""
    machine = machine or Machine()
    gpus = f"{len(machine.gpus)} AMD GPUs" if machine.gpus else "no AMD GPU"
    lines = [f"runtime: torch {'for HIP ' + machine.hip if machine.hip else 'without HIP'}, {gpus}, {len(machine.numa_cpus)} NUMA nodes"]
    lines += map(str, outcomes)
    if machine.gpus and machine.balances_numa():
        # Host-wide and root's to change, so only said: rocm.docs.amd.com, system validation before training.
        lines.append("runtime: NUMA balancing is on and costs time; as root: echo 0 > /proc/sys/kernel/numa_balancing")
    return lines


def collect_steps(environ: MutableMapping[str, str] = os.environ) -> int:
    """Steps between collections. ValueError: not a count."""
    text = environ.get(COLLECT_SWITCH, str(COLLECT_STEPS))
    if not text.isdecimal():
        raise ValueError(f"{COLLECT_SWITCH}={text!r} is not a number of steps; use 0 for Python's own collections, or unset it")
    return int(text)


class GarbageCollection:
    """Python's cycle collector on a schedule, for the length of a `with` block.

    Left alone, it stops each rank at a step of its own choice, and all others wait: 1.5 % of the time on 512 GPUs (torchtitan pull 148).
    What lives at the start is frozen: with torch and megatron-core loaded a full collection looks at 406,000 objects, 0.39 s on a CPU core;
    once frozen, only at those made since. Tensors do not wait for it: they are freed as their last reference goes.
    """

    def __init__(self, steps: int | None = None) -> None:
        self.steps = collect_steps() if steps is None else steps

    def __enter__(self) -> GarbageCollection:
        if self.steps:
            gc.collect()
            gc.disable()
            gc.freeze()
        return self

    def step(self, step: int) -> None:
        """Call with the number of each finished step, on every rank."""
        if self.steps and step % self.steps == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self.steps:
            gc.unfreeze()
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------- NUMA


def _bind(environ: MutableMapping[str, str], machine: Machine) -> Outcome:
    """Keep this process on the CPUs beside its GPU; memory follows, since Linux takes a page from the node that first writes to it.

    Source: torchrun --numa-binding=node (torch.numa.binding), which needs the GPU first, and Primus' numa_bind.sh.
    """
    choice = environ.get(NUMA_SWITCH, "auto")
    if choice not in ("auto", "off"):
        raise ValueError(f"{NUMA_SWITCH}={choice!r}; use auto or off")
    if choice == "off":
        return Outcome(NUMA_SWITCH, "off", "kept", "")

    def left_out(reason: str) -> Outcome:
        return Outcome(NUMA_SWITCH, "off", "left out", reason)

    if len(machine.numa_cpus) < 2:
        return left_out(f"{len(machine.numa_cpus)} NUMA node")
    if "LOCAL_RANK" not in environ:
        return left_out("no LOCAL_RANK: not a worker of torchrun")
    allowed = os.sched_getaffinity(0)
    reached = [node for node, cpus in sorted(machine.numa_cpus.items()) if cpus & allowed]
    if len(reached) < 2:
        return Outcome(NUMA_SWITCH, f"node {reached[0]}" if reached else "elsewhere", "kept", "")
    visible = _visible(machine.gpus, environ)
    local_rank = int(environ["LOCAL_RANK"])
    if isinstance(visible, str) or local_rank >= len(visible):
        return left_out(visible if isinstance(visible, str) else f"local rank {local_rank}, but {len(visible)} AMD GPUs are visible")
    gpu = visible[local_rank]
    cpus = machine.numa_cpus.get(gpu.numa_node, frozenset()) & allowed
    if not cpus:
        return left_out(f"GPU {gpu.pci} is on NUMA node {gpu.numa_node}, of which this process may use no CPU")
    os.sched_setaffinity(0, cpus)
    return Outcome(NUMA_SWITCH, f"node {gpu.numa_node}", "set", f"{len(cpus)} CPUs beside GPU {local_rank} at {gpu.pci}")


def _visible(gpus: list[Gpu], environ: MutableMapping[str, str]) -> list[Gpu] | str:
    """The GPUs as HIP numbers them in this process, or why that is not known. ROCR_ hides first, HIP_ numbers what is left."""
    left = gpus
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"):
        if name not in environ:
            continue
        by_word = {str(index): gpu for index, gpu in enumerate(left)} | {gpu.uuid: gpu for gpu in left}
        words = [word.strip() for word in environ[name].split(",")]
        if unknown := [word for word in words if word not in by_word]:
            return f"{name}={environ[name]}, and no GPU of this node is {unknown[0]!r}"
        left = [by_word[word] for word in words]
    return left


# ---------------------------------------------------------------------------------------------------------------- files


def raise_open_files() -> Outcome:
    """As many as the machine lets this process have, up to MAX_OPEN_FILES: each group of all ranks over gloo holds one to every other."""
    before, most = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(most, MAX_OPEN_FILES)
    if before < wanted:
        hard = resource.RLIM_INFINITY if most == math.inf else int(most)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(wanted), hard))
        except (ValueError, OSError) as error:  # the kernel's own limit is lower
            return Outcome("open files", str(before), "left out", str(error))
    return Outcome("open files", str(max(before, wanted)), "set", "as many as this process may have: groups connect it to every other rank")


def _find_torch_version_file() -> Path | None:
    spec = importlib.util.find_spec("torch")  # finds a top-level package without running it
    return Path(spec.origin).parent / "version.py" if spec and spec.origin else None


def _hip_version(version_file: Path | None) -> str | None:
    """torch.version.hip. The file says `hip: Optional[str] = None` or `= '7.2.53211'`."""
    found = re.search(r"^hip\b[^=\n]*=\s*['\"]([^'\"]+)", _read(version_file), flags=re.MULTILINE) if version_file else None
    return found[1] if found else None


def _cpu_list(text: str) -> Set[int]:
    """{0, 1, 2, 8} of 0-2,8."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))


def _read(path: Path) -> str:
    """A file's text; empty where there is none or it may not be read, as files of /sys in a container."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print("usage: python -m zaya.runtime\n\nPrint what a training process would set on this machine, and what it leaves out. "
              f"{NUMA_SWITCH}=off and\n{COLLECT_SWITCH}=STEPS (0: as Python likes) are its switches; docs/several_nodes.md explains them.")
        return 0
    if argv:
        print(f"zaya.runtime: unrecognized arguments: {' '.join(argv)}; see --help", file=sys.stderr)
        return 2
    print("\n".join(describe(start("zaya.runtime"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
