"""What a launch becomes on a chip, on a machine that has none: Triton's backend builds the machine code, and this file reads the MI300X's.

`specialise` does what Triton does between a launch and the compiler: types, constexprs, the integers equal to 1, what 16 divides, which
tensors are small enough (2 GiB) for buffer instructions; `recording` does it for every launch inside, `compiled` compiles one. These serve
any GPU. `build_code` compiles for gfx942; `resources` reads registers, spills and LDS off its assembly, `regions` its loops, `mfma_bound`
how busy they can keep the matrix cores, `gates` what must not ship; `figures` is all of it. Tensors may lie on "meta". Knows no op.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from zaya.kernels.launch import MI300X, Config, Target, launching_through

# The MI300X:
GFX942 = GPUTarget("hip", "gfx942", 64)
SIMDS = 4  # per CU
VGPRS = 512  # per lane of a SIMD: 256 architectural and 256 accumulation registers, one file, allocated by 8
MAX_WAVES_PER_SIMD = 8
LDS_BYTES = 64 * 1024  # per CU
WIDE_BYTES = 16  # of a lane's widest load

LATENCY_CYCLES = 512  # of a load from global memory, supposed: L2 takes some hundreds, HBM more
SLOT_CYCLES = 4  # of an issue slot: a vector instruction goes through a SIMD of 16 lanes in four

# FLOP that the matrix core of a SIMD does in one issue slot: 1,307 TFLOP/s of 16-bit types / (304 CUs * 4 * 2.1 GHz / 4) is
# 2,048, so a 16x16x16 product takes 8,192 / 2,048 = 4 slots. By the type of the operands.
MFMA_FLOP_PER_SLOT = {"f16": 2048, "bf16": 2048, "f32": 256, "f64": 256, "xf32": 1024, "fp8": 4096, "bf8": 4096, "i8": 4096}

_BLOCK = re.compile(r"\.L(BB\d+_\d+):|; %bb\.")
_LOOP = re.compile(r";\s+(?:=>\s*This (?:Inner )?Loop Header:|in Loop: Header=(BB\d+_\d+)) Depth=(\d+)")
_INSTRUCTION = re.compile(r"\s+[a-z]\w*(\s|$)")  # no label, directive or comment
_MATRIX = ("v_mfma", "v_smfmac")
_MEMORY = re.compile(r"(?:global|buffer|flat)_(load|store|atomic)")  # what the counter of s_waitcnt vmcnt counts
_LOADS = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+?)(?:_d16(?:_hi)?)?$")
_LOAD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}


@dataclass(frozen=True)
class Build:
    """One specialised launch, ready to be compiled, here or (it pickles) in another process."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]
    attrs: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        return repr((self.module, self.kernel, self.signature, self.constexprs, self.attrs, self.options))

    @property
    def num_warps(self) -> int:
        return int(dict(self.options)["num_warps"])


@dataclass(frozen=True)
class Code:
    """A kernel built for gfx942."""

    name: str
    asm: str
    elf: bytes
    num_warps: int
    lds_bytes: int
    dots: int
    """How often it contains tl.dot, after unrolling and pipelining."""
    dots_elsewhere: int
    """Of these, those that the compiler did not put on the matrix cores."""


@dataclass(frozen=True)
class Region:
    """The instructions of one loop without those of the loops in it; label "" is what lies in no loop."""

    label: str
    depth: int
    instructions: int
    mfma: int
    mfma_share: float
    """Issue slots of matrix instructions / those of all vector instructions. A vector instruction is counted as one slot of 4 cycles."""
    valu: int
    lds: int
    stores: int
    wide_loads: int
    """Loads of 16 bytes a lane from global memory."""
    narrow_loads: int
    wide_share: float
    """Of the bytes that a lane loads, the share that comes in 16-byte loads; 1 without any load."""
    waiting: float
    """Share of a wave's time that it waits for its loads from global memory, were each to take LATENCY_CYCLES and no other wave to run."""


def specialise(kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], gpu: GPUTarget = GFX942) -> Build:
    """What Triton would compile for a launch of `kernel` with all `arguments` (constexprs among them) and launch `options`."""
    keywords = {**arguments, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one backend warns of a default that it will change
        backend = make_backend(gpu)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(**keywords)
        _, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, None)
    return Build(kernel.fn.__module__, kernel.fn.__name__, tuple(signature.items()), tuple(constexprs.items()),
                 tuple((path, attr) for path, attr in attrs.items() if attr), tuple(sorted(options.items())))


def runtime_arguments(kernel: Any, arguments: Mapping[str, Any], build: Build) -> list[tuple[str, Any]]:
    """(type, value) of what the machine code receives, in its order: all but constexprs."""
    values = [arguments.get(parameter.name, parameter.default) for parameter in kernel.params]
    return [(kind, value) for (_, kind), value in zip(build.signature, values, strict=True) if kind != "constexpr"]


def compiled(build: Build, gpu: GPUTarget = GFX942) -> Any:
    """Triton's compiled kernel, or the one in its cache. Raises whatever the compiler does."""
    kernel = getattr(importlib.import_module(build.module), build.kernel)
    source = ASTSource(kernel, dict(build.signature), dict(build.constexprs), {path: attr for path, attr in build.attrs})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(source, target=gpu, options=dict(build.options))


def build_code(build: Build) -> Code:
    code = compiled(build)
    asm, dots = code.asm["amdgcn"], re.findall(r"= tt\.dot\b.*-> (.*)", code.asm["ttgir"])
    lds_bytes = max(code.metadata.shared, _field(asm, "group_segment_fixed_size"))
    return Code(build.kernel, asm, code.asm["hsaco"], code.metadata.num_warps, lds_bytes, len(dots),
                sum("#mma" not in layout for layout in dots))


def resources(code: Code) -> dict[str, int]:
    """Registers, spills, scratch, LDS, and the waves per SIMD that they leave room for, in whole work-groups."""
    vgprs = max(_field(code.asm, "vgpr_count"), 1)
    by_vgprs = min(MAX_WAVES_PER_SIMD, VGPRS // (-(-vgprs // 8) * 8)) * SIMDS // code.num_warps
    by_lds = LDS_BYTES // code.lds_bytes if code.lds_bytes else by_vgprs
    return {
        "vgprs": vgprs, "agprs": _field(code.asm, "agpr_count"), "sgprs": _field(code.asm, "sgpr_count"),
        "vgpr_spills": _field(code.asm, "vgpr_spill_count"), "sgpr_spills": _field(code.asm, "sgpr_spill_count"),
        "scratch_bytes": _field(code.asm, "private_segment_fixed_size"), "lds_bytes": code.lds_bytes,
        "waves_per_simd": min(by_vgprs, by_lds) * code.num_warps // SIMDS,
    }


def _field(asm: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", asm)
    return int(found.group(1)) if found else 0


def regions(asm: str) -> list[Region]:
    """Every loop, and the instructions in none; the hot one first.

    Hotter is what has matrix work, then a deeper loop, then more of it; of two with as much, as attention has with and without a mask,
    the leaner, which runs more often; without matrix work the longer. So products unrolled in no loop count, where no loop has any.
    """
    bodies: dict[tuple[int, str], list[str]] = {(0, ""): []}
    here = 0, ""
    for line in asm.splitlines():
        if start := _BLOCK.match(line):
            here, block = (0, ""), start.group(1) or ""
        if words := _LOOP.search(line):  # LLVM's own word on which loop a block belongs to
            here = int(words.group(2)), words.group(1) or block
        if _INSTRUCTION.match(line):
            bodies.setdefault(here, []).append(line.strip())
    found = [_region(label, depth, body) for (depth, label), body in bodies.items()]
    return sorted(found, key=lambda region: (not region.mfma, -region.depth, -region.mfma,
                                             region.instructions if region.mfma else -region.instructions))


def _region(label: str, depth: int, body: list[str]) -> Region:
    opcodes = [line.split()[0] for line in body]
    mfma = [opcode for opcode in opcodes if opcode.startswith(_MATRIX)]
    valu = sum(opcode.startswith("v_") for opcode in opcodes) - len(mfma)
    slots = sum(map(mfma_slots, mfma))
    loads = [_LOAD_BYTES.get(match.group(1), 4) for opcode in opcodes if (match := _LOADS.match(opcode))]
    wide = [size for size in loads if size == WIDE_BYTES]
    stores = sum(match.group(1) != "load" for opcode in opcodes if (match := _MEMORY.match(opcode)))
    return Region(label, depth, len(opcodes), len(mfma), slots / (slots + valu) if mfma else 0.0, valu,
                  sum(opcode.startswith("ds_") for opcode in opcodes), stores, len(wide), len(loads) - len(wide),
                  sum(wide) / sum(loads) if loads else 1.0, _waiting(body, passes=4 if label else 1))  # more than are on their way at once


def _waiting(body: list[str], passes: int) -> float:
    """`Region.waiting` in the last of so many passes: what one leaves in flight later ones wait for. Vector instructions take their issue
    slots, a load LATENCY_CYCLES from its issue on; LDS, scalar instructions and barriers take no time."""
    clock, start, waited = 0, 0, 0
    flying: deque[int] = deque()  # when each is done, in the order in which they are waited for
    for _ in range(passes):
        start, waited = clock, 0
        for line in body:
            opcode = line.split()[0]
            if opcode.startswith("v_"):
                clock += SLOT_CYCLES * (mfma_slots(opcode) if opcode.startswith(_MATRIX) else 1)
            elif match := _MEMORY.match(opcode):
                flying.append(clock + LATENCY_CYCLES if match.group(1) == "load" else clock)
            elif opcode == "s_waitcnt" and (match := re.search(r"vmcnt\((\d+)\)", line)):
                while len(flying) > int(match.group(1)):
                    wait = max(flying.popleft() - clock, 0)
                    clock, waited = clock + wait, waited + wait
    return waited / (clock - start) if waited else 0.0


def mfma_slots(opcode: str) -> int:
    """Issue slots of 4 cycles that a matrix instruction holds its SIMD's matrix core: v_mfma_f32_16x16x16_bf16 -> 4."""
    match = re.match(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_?(xf32|bf16|f16|f32|f64|fp8|bf8|i8)", opcode)
    assert match, f"a matrix instruction of unknown shape: {opcode}"
    m, n, k, blocks, kind = match.groups()
    return max(1, 2 * int(m) * int(n) * int(k) * int(blocks or 1) // MFMA_FLOP_PER_SLOT[kind])


def hot(found: list[Region]) -> Region:
    """Where a kernel spends its time: the first in the order of `regions`."""
    return found[0]


def mfma_bound(code: Code, used: Mapping[str, int], loop: Region) -> float:
    """The share of a loop's time that matrix cores can work at most: mfma_share * min(1, work-groups * (1 - waiting)). The waves of one
    work-group wait together, at barriers; work-groups, of which a CU holds what its registers and LDS allow, each for themselves."""
    groups = used["waves_per_simd"] // max(code.num_warps // SIMDS, 1)
    return loop.mfma_share * min(1.0, groups * (1 - loop.waiting))


def gates(code: Code, used: Mapping[str, int], found: list[Region]) -> list[str]:
    """What must not ship, in words; none for a kernel that may."""
    broken = [f"{used[key]} {words}" for key, words in (("vgpr_spills", "vector registers spilled"), ("sgpr_spills", "scalar registers "
              "spilled"), ("scratch_bytes", "bytes of scratch memory")) if used[key]]
    if used["lds_bytes"] > LDS_BYTES:
        broken.append(f"{used['lds_bytes']} bytes of LDS, the chip has {LDS_BYTES}")
    elif used["waves_per_simd"] * SIMDS < code.num_warps:
        broken.append(f"{code.num_warps} waves of {used['vgprs']} registers do not fit a CU")
    if code.dots_elsewhere or (code.dots and not hot(found).mfma):
        broken.append(f"no MFMA for {code.dots_elsewhere or code.dots} of {code.dots} tl.dot")
    return broken


def figures(build: Build) -> dict[str, Any]:
    """Compile one launch and read its machine code; "broken" lists its failed gates."""
    broken = []
    try:
        code = build_code(build)
    except Exception as error:  # noqa: BLE001  # a compiler may fail in any way; the other launches are still reported
        code = Code(build.kernel, "", b"", build.num_warps, 0, 0, 0)
        broken = [f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    used, found = resources(code), regions(code.asm)
    loop = hot(found)
    return {**used, "mfma": sum(region.mfma for region in found), "mfma_share": round(loop.mfma_share, 3), "hot_mfma": loop.mfma,
            "hot_valu": loop.valu, "hot_lds": loop.lds, "hot_instructions": loop.instructions, "hot_depth": loop.depth,
            "wide_loads": loop.wide_loads, "narrow_loads": loop.narrow_loads, "wide_share": round(loop.wide_share, 3),
            "waiting": round(loop.waiting, 3), "mfma_bound": round(mfma_bound(code, used, loop), 3), "is_matrix_kernel": code.dots > 0,
            "broken": broken + gates(code, used, found)}


def all_figures(builds: Sequence[Build]) -> Iterator[dict[str, Any]]:
    """`figures` of each, in order, in as many processes as there are CPUs."""
    with process_pool(len(builds)) as pool:
        yield from pool.map(figures, builds)


def _end_with_parent() -> None:
    """As zaya/preemption.py's (kernels import nothing of the rest): a process of the pool ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def process_pool(num_tasks: int) -> Iterator[ProcessPoolExecutor]:
    """A process per CPU, at most one a task; an exception does not wait for them, nor they for a parent that was killed. Ctrl-C, which a
    terminal sends them too, is for their parent."""
    count = max(min(os.cpu_count() or 1, num_tasks), 1)
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent)
    pipes = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # that one has died is an exception here, not the end of this process
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it
        try:
            for _ in range(count):
                pool.submit(int)  # starts one while none is idle
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield pool
        pool.shutdown()  # waits: Python's own end may otherwise write to a pipe that is closed under it
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        signal.signal(signal.SIGPIPE, pipes)


@contextlib.contextmanager
def recording(chip: Target = MI300X, gpu: GPUTarget = GFX942) -> Iterator[list[tuple[Build, Config]]]:
    """Inside, launches are noted in the list instead of being run, as on an MI300X; chip, gpu: another, to launch.py and to Triton."""
    noted: list[tuple[Build, Config]] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        noted.append((specialise(kernel, arguments, config.options(chip), gpu), config))

    with launching_through(note, chip):
        yield noted
