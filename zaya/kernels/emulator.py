"""Run a kernel's gfx942 machine code on the CPU, matrix instructions included: `emulating(checkout)` is a launcher for `launching_through`.

The processor is the CDNA emulator that tinygrad tests its own drivers with (test/mockgpu/amd/emu.py of a checkout that the user names;
nothing of it is in this repository). It gets some instructions wrong; `_Repairs` executes those instead. It is about values, not about
time: work-groups run one after the other, a few thousand instructions a second.

Limits: a kernel that spills cannot run (all waves would share one scratch area; none may ship anyway); matrix instructions of shape 16x16
only (matrix_instr_nonkdim = 16).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import io
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from zaya.kernels import machine_code
from zaya.kernels.launch import MI300X, Config, Launcher

Execute = Callable[..., None]
"""One instruction: takes the address of the wave's scalar registers, of its vector registers, and what else it asked for."""

# Which memories an instruction asks the emulator for, by its numbers: scalar registers, vector registers, LDS.
SCALAR, VECTOR, LDS = 0, 1, 3
SPARE = 255  # vector register that a repair borrows and puts back


class EmulatorMissing(Exception):
    """Something that the emulator needs is not on this machine; the message is one line."""


def emulating(checkout: str | Path) -> Launcher:
    """A launcher that builds every launch for gfx942 and executes it on CPU tensors, in place. Raises EmulatorMissing."""
    emulator = _load_emulator(Path(checkout))

    def launcher(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        build = machine_code.specialise(kernel, arguments, config.options(MI300X))
        code = machine_code.build_code(build)
        if scratch := machine_code.resources(code)["scratch_bytes"]:
            raise ValueError(f"{code.name} uses {scratch} bytes of scratch memory: the emulator cannot run a kernel that spills")
        _run(emulator, code, machine_code.runtime_arguments(kernel, arguments, build), grid)

    return launcher


def _load_emulator(checkout: Path) -> Any:
    if not (checkout / "test/mockgpu/amd/emu.py").is_file():
        raise EmulatorMissing(f"{checkout} holds no test/mockgpu/amd/emu.py: pass a checkout of tinygrad")
    compiler = next((name for name in (os.environ.get("CC", ""), "clang", *(f"clang-{n}" for n in range(25, 14, -1)))
                     if "clang" in name and shutil.which(name)), None)
    if compiler is None:
        raise EmulatorMissing("the emulator compiles each instruction with clang, and there is none on PATH (Debian: clang)")
    if importlib.util.find_spec("elftools") is None:
        raise EmulatorMissing("reading a code object needs pyelftools: pip install pyelftools")
    os.environ["CC"] = compiler
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        emulator: Any = importlib.import_module("test.mockgpu.amd.emu")
    except ImportError as error:
        raise EmulatorMissing(f"{checkout} holds no tinygrad that can be imported: {error}") from None
    if not isinstance(getattr(emulator._decode_at, "__self__", None), _Repairs):
        emulator._decode_at = _Repairs(emulator).decode
    return emulator


def _run(emulator: Any, code: machine_code.Code, arguments: list[tuple[str, Any]], grid: tuple[int, ...]) -> None:
    """Lay out code and arguments as the command processor would, then run every work-group."""
    memory, entry, size, rsrc2, preloaded = _load(code.elf)
    packed = _pack(arguments)
    kernarg = ctypes.create_string_buffer(packed + bytes(512))  # behind them the hidden arguments
    for at, count in _block_counts(code.asm, grid):
        struct.pack_into("<I", kernarg, at, count)
    address = ctypes.addressof(kernarg)
    num_user_sgprs = rsrc2 >> 1 & 0x1F
    user = [address & 0xFFFFFFFF, address >> 32] + [0] * (num_user_sgprs - 2)
    words = struct.unpack(f"<{len(packed) // 4}I", packed)
    count = min(preloaded, len(words), num_user_sgprs - 2)
    user[2 : 2 + count] = words[:count]
    rsrc2 = rsrc2 & ~(0x1FF << 15) | -(-code.lds_bytes // 512) << 15
    if preloaded:
        entry += 256  # code for a firmware that does not preload arguments comes first
    emulator.run_asm(entry, size, *(*grid, 1, 1)[:3], code.num_warps * 64, 1, 1, address, rsrc2, 0, "cdna", user)
    del memory  # must live until here


def _load(elf_bytes: bytes) -> tuple[Any, int, int, int, int]:
    """The code object in memory: what owns it, address of the first instruction, size, and from the kernel descriptor the second resource
    word and how many argument words are preloaded into scalar registers."""
    from elftools.elf.elffile import ELFFile  # here, because only the emulator needs it

    elf: Any = ELFFile(io.BytesIO(elf_bytes))
    segments = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
    size = max(segment["p_vaddr"] + segment["p_memsz"] for segment in segments)
    memory = ctypes.create_string_buffer(size + 8192)
    base = (ctypes.addressof(memory) + 4095) & ~4095
    for segment in segments:
        ctypes.memmove(base + segment["p_vaddr"], segment.data(), len(segment.data()))
    symbol = next(symbol for symbol in elf.get_section_by_name(".dynsym").iter_symbols() if symbol.name.endswith(".kd"))
    address = base + symbol["st_value"]
    descriptor = ctypes.string_at(address, 64)
    (entry,), (rsrc2,), (preload,) = (struct.unpack_from(kind, descriptor, at) for kind, at in (("<q", 16), ("<I", 52), ("<H", 58)))
    return memory, address + entry, size, rsrc2, preload & 0x7F


def _block_counts(asm: str, grid: tuple[int, ...]) -> list[tuple[int, int]]:
    """Byte offset in the arguments and value of each hidden block count, which tl.num_programs reads: without them a persistent kernel
    steps by 0 and never ends."""
    found = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+4\s+\.value_kind:\s+hidden_block_count_([xyz])", asm)
    offsets = {axis: int(at) for at, axis in found}
    return [(offsets[axis], count) for axis, count in zip("xyz", (*grid, 1, 1)) if axis in offsets]


def _pack(arguments: list[tuple[str, Any]]) -> bytes:
    formats = {"i1": "?", "u1": "?", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
    packed = b""
    for kind, value in arguments:
        letter = "Q" if kind.startswith("*") else formats[kind]
        packed += bytes(-len(packed) % struct.calcsize(letter))
        packed += struct.pack(f"<{letter}", value.data_ptr() if isinstance(value, Tensor) else value)
    return packed + bytes(-len(packed) % 8)


# --------------------------------------------------------------------------------------------------------------- registers


class _Wave:
    """The registers of one wave, as arrays over the emulator's own memory."""

    def __init__(self, emulator: Any, scalar_address: int, vector_address: int) -> None:
        self.scalar = np.ctypeslib.as_array((ctypes.c_uint32 * emulator.SGPR_COUNT).from_address(scalar_address))
        self.vector = np.ctypeslib.as_array((ctypes.c_uint32 * (256 * 64)).from_address(vector_address)).reshape(256, 64)
        self._exec, self._pc = emulator.EXEC_LO.offset, (emulator.PC_LO_IDX, emulator.PC_HI_IDX)

    def pair(self, register: int) -> int:
        return int(self.scalar[register]) | int(self.scalar[register + 1]) << 32

    @property
    def mask(self) -> int:
        return self.pair(self._exec)

    @mask.setter
    def mask(self, bits: int) -> None:
        self.scalar[self._exec], self.scalar[self._exec + 1] = bits & 0xFFFFFFFF, bits >> 32

    @property
    def pc(self) -> int:
        return int(self.scalar[self._pc[0]]) | int(self.scalar[self._pc[1]]) << 32

    @pc.setter
    def pc(self, address: int) -> None:
        self.scalar[self._pc[0]], self.scalar[self._pc[1]] = address & 0xFFFFFFFF, address >> 32

    def active(self) -> np.ndarray:
        return (np.uint64(self.mask) >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(bool)

    def buffer_lanes(self, first: int, second: int) -> Iterator[tuple[int, int | None]]:
        """(lane, address) of a buffer instruction; no address where it lies outside the buffer."""
        resource = (second >> 16 & 0x1F) * 4
        base = self.pair(resource) & (1 << 48) - 1
        base += int(self.scalar[second >> 24])
        for lane in np.flatnonzero(self.active()):
            offset = (first & 0xFFF) + (int(self.vector[second & 0xFF, lane]) if first >> 12 & 1 else 0)
            yield int(lane), base + offset if offset < int(self.scalar[resource + 2]) else None


def _dpp_source(control: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a GFX9 data-parallel-primitive control: the lane that each lane reads, and whether that lies inside its row or wave."""
    lane = np.arange(64)
    row, column, by = lane & ~15, lane & 15, control & 15
    inside = np.ones(64, bool)
    if control <= 0xFF:  # any order within four lanes
        source = (lane & ~3) + (control >> 2 * (lane & 3) & 3)
    elif 0x101 <= control <= 0x10F:
        source, inside = lane + by, column + by <= 15
    elif 0x111 <= control <= 0x11F:
        source, inside = lane - by, column >= by
    elif 0x121 <= control <= 0x12F:
        source = row + (column - by & 15)
    elif control in (0x130, 0x138):  # shift of the whole wave
        source = lane + (1 if control == 0x130 else -1)
        inside = (source >= 0) & (source < 64)
    elif control in (0x134, 0x13C):  # rotation of the whole wave
        source = lane + (1 if control == 0x134 else -1) & 63
    elif control in (0x140, 0x141):  # mirror of rows, of half rows
        source = row + 15 - column if control == 0x140 else row + (column & 8) + 7 - (column & 7)
    elif control == 0x142:
        source, inside = row - 1, row > 0
    elif control == 0x143:
        source, inside = np.full(64, 31), lane >= 32
    elif 0x150 <= control <= 0x15F:
        source = row + by
    else:
        raise NotImplementedError(f"DPP control {control:#x}")
    return np.where(inside, source, 0), inside


# --------------------------------------------------------------------------------------------------------------- repairs


class _Repairs:
    """Instead of the emulator's decoder: the emulator's own instruction, or one of ours where that is wrong.

    Wrong in tinygrad of 2026: lane exchanges that read a register they also write (DPP, ds_bpermute, ds_swizzle), DPP row broadcasts,
    operand selection of packed fp32, buffer accesses of 8 and 16 bits, cache control, atomics, and memory accesses of inactive lanes, whose
    addresses are arbitrary.
    """

    def __init__(self, emulator: Any) -> None:
        self.emulator, self.decode_original = emulator, emulator._decode_at
        self.wave = functools.lru_cache(maxsize=256)(functools.partial(_Wave, emulator))
        self.nowhere = ctypes.create_string_buffer(256)

    def decode(self, pc: int, arch: str) -> tuple[Any, Any]:
        raw = ctypes.string_at(pc, 16)
        instruction = self.emulator.decode_inst(raw, arch)
        name = self.emulator._op_name(instruction)
        first, second = struct.unpack("<II", raw[:8])
        if hasattr(type(instruction), "dpp") and hasattr(type(instruction), "vsrc0"):
            return self._dpp(first, second, arch), instruction
        if "PERMUTE_B32" in name or "SWIZZLE_B32" in name:
            return self._exchange(first, second, arch), instruction
        if re.match(r"BUFFER_(LOAD|STORE)_\w*(BYTE|SHORT)", name):
            return self._ours(functools.partial(_narrow, first, second, name)), instruction
        if re.fullmatch(r"V_PK_(ADD|MUL|FMA)_F32|V_PK_MOV_B32", name):
            return self._ours(functools.partial(_packed, first, second, name)), instruction
        if name.startswith(("BUFFER_WBL2", "BUFFER_INV", "BUFFER_WBINV")):  # caches, of which there are none
            return self._ours(lambda wave: None), instruction
        if re.match(r"(GLOBAL|BUFFER)_ATOMIC|DS_(ADD|SUB|MIN|MAX|AND|OR|XOR)_(RTN_)?[UIFB]\d", name):
            return self._ours(functools.partial(_atomic, first, second, name), LDS), instruction
        if name.startswith(("DS_READ", "DS_WRITE", "GLOBAL_LOAD", "GLOBAL_STORE", "FLAT_LOAD", "FLAT_STORE")):
            return self._guarded(pc, arch, second, name.startswith("DS_"))
        return self.decode_original(pc, arch)

    def _program(self, execute: Execute, needs: list[int]) -> tuple[Any, Any]:
        """In the emulator's form: what the instruction asks for, and the function that runs it."""
        return SimpleNamespace(arg=SimpleNamespace(globals=needs)), SimpleNamespace(fxn=execute)

    def _ours(self, effect: Callable[..., None], *needs: int) -> tuple[Any, Any]:
        """An instruction of 8 bytes that `effect` carries out."""
        def execute(scalar: Any, vector: Any, *memories: Any) -> None:
            wave = self.wave(scalar.value, vector.value)
            effect(wave, *(memory.value for memory in memories))
            wave.pc += 8

        return self._program(execute, [SCALAR, VECTOR, *needs])

    def _instead(self, words: bytes, arch: str) -> tuple[Callable[..., None], list[int]]:
        """Another instruction, to be run in the place of one of 8 bytes. The emulator reads operands from memory at the program counter."""
        program, runtime = self.emulator._get_runner(words + bytes(4), arch)
        image = ctypes.create_string_buffer(words, 16)

        def run(wave: _Wave, memories: tuple[Any, ...]) -> None:
            pc = wave.pc
            wave.pc = ctypes.addressof(image)
            runtime.fxn(*memories)
            wave.pc = pc + 8

        return run, program.arg.globals

    def _dpp(self, first: int, second: int, arch: str) -> tuple[Any, Any]:
        """Exchange lanes into a spare register, then run the plain instruction on it, in the lanes that may write."""
        if second >> 22 & 3:
            raise NotImplementedError("DPP with a modifier on the second source")
        source, inside = _dpp_source(second >> 8 & 0x1FF)
        register, zero_outside, destination = second & 0xFF, bool(second >> 19 & 1), first >> 17 & 0xFF
        lane = np.arange(64)
        allowed = (second >> 28 >> (lane >> 4) & second >> 24 >> (lane >> 2 & 3) & 1).astype(bool)  # row mask and bank mask
        run, needs = self._instead(struct.pack("<I", first & ~0x1FF | 0x100 | SPARE), arch)

        def execute(scalar: Any, vector: Any, *memories: Any) -> None:
            wave = self.wave(scalar.value, vector.value)
            mask, active = wave.mask, wave.active()
            valid = inside & active[source]
            value = wave.vector[register][source].copy()
            if second >> 21 & 1:
                value &= np.uint32(0x7FFFFFFF)
            if second >> 20 & 1:
                value ^= np.uint32(0x80000000)
            value[~valid] = 0
            saved = wave.vector[SPARE].copy()
            wave.vector[SPARE] = value
            wave.mask = int(np.packbits(active & allowed & (valid | zero_outside), bitorder="little").view(np.uint64)[0])
            run(wave, memories)
            wave.mask = mask
            if destination != SPARE:
                wave.vector[SPARE] = saved

        return self._program(execute, [SCALAR, VECTOR, *needs])

    def _exchange(self, first: int, second: int, arch: str) -> tuple[Any, Any]:
        """The emulator's own lane exchange, reading a copy of the data register."""
        data, destination = second >> 8 & 0xFF, second >> 24
        run, needs = self._instead(struct.pack("<II", first, second & ~0xFF00 | SPARE << 8), arch)

        def execute(scalar: Any, vector: Any, *memories: Any) -> None:
            wave = self.wave(scalar.value, vector.value)
            saved = wave.vector[SPARE].copy()
            wave.vector[SPARE] = wave.vector[data]
            run(wave, memories)
            if destination != SPARE:
                wave.vector[SPARE] = saved

        return self._program(execute, [SCALAR, VECTOR, *needs])

    def _guarded(self, pc: int, arch: str, second: int, is_lds: bool) -> tuple[Any, Any]:
        """The emulator's own memory access, with harmless addresses in inactive lanes."""
        (program, runtime), instruction = self.decode_original(pc, arch)
        address, is_wide = second & 0xFF, not is_lds and (second >> 16 & 0x7F) >= 0x7C  # 64 bits where no scalar base is given
        safe = ctypes.addressof(self.nowhere) + 127 & ~127 if is_wide else 0
        registers = [address, address + 1] if is_wide else [address]

        def execute(scalar: Any, vector: Any, *memories: Any) -> None:
            wave = self.wave(scalar.value, vector.value)
            idle = ~wave.active()
            saved = [wave.vector[register][idle].copy() for register in registers]
            for half, register in enumerate(registers):
                wave.vector[register][idle] = safe >> 32 * half & 0xFFFFFFFF
            runtime.fxn(*memories)
            for register, old in zip(registers, saved):
                wave.vector[register][idle] = old

        return self._program(execute, [SCALAR, VECTOR, *program.arg.globals]), instruction


def _narrow(first: int, second: int, name: str, wave: _Wave) -> None:
    """Buffer load or store of 8 or 16 bits."""
    is_signed = "SBYTE" in name or "SSHORT" in name
    cell: Any = ((ctypes.c_int8 if is_signed else ctypes.c_uint8) if "BYTE" in name else ctypes.c_int16 if is_signed else ctypes.c_uint16)
    data = second >> 8 & 0xFF
    for lane, address in wave.buffer_lanes(first, second):
        old = int(wave.vector[data, lane])
        if "STORE" in name:
            if address is not None:
                cell.from_address(address).value = old >> 16 if "HI" in name else old
            continue
        value = (cell.from_address(address).value if address is not None else 0) & 0xFFFFFFFF
        if "D16_HI" in name:
            value = old & 0xFFFF | (value & 0xFFFF) << 16
        elif "D16" in name:
            value = old & 0xFFFF0000 | value & 0xFFFF
        wave.vector[data, lane] = value


def _packed(first: int, second: int, name: str, wave: _Wave) -> None:
    """Two fp32 operations on a pair of registers, each half reading the half of its operands that the instruction selects."""
    destination, sources = first & 0xFF, [second >> 9 * i & 0x1FF for i in range(3)]
    low = [first >> 11 + i & 1 for i in range(3)]  # op_sel
    high = low if "MOV" in name else [second >> 27 & 1, second >> 28 & 1, first >> 14 & 1]  # op_sel_hi, which a move does not read
    negate_low, negate_high = [second >> 29 + i & 1 for i in range(3)], [first >> 8 + i & 1 for i in range(3)]

    def operand(i: int, half: int, negate: int) -> np.ndarray:
        register = sources[i]
        if register >= 256:
            value = wave.vector[register - 256 + half].copy()
        else:  # a pair of scalar registers, or an inline constant, which is the same for both halves
            value = np.full(64, wave.scalar[register + (half if register < 128 else 0)], np.uint32)
        return value ^ np.uint32(0x80000000) if negate else value

    results: list[np.ndarray] = []
    for half, (picks, negates) in enumerate(((low, negate_low), (high, negate_high))):
        a, b = (operand(i, picks[i], negates[i]) for i in range(2))
        if "MOV" in name:
            results.append((a, b)[half])
            continue
        x, y = a.view(np.float32), b.view(np.float32)
        with np.errstate(all="ignore"):
            if "FMA" in name:
                z = operand(2, picks[2], negates[2]).view(np.float32)
                value = (x.astype(np.float64) * y + z).astype(np.float32)
            else:
                value = x * y if "MUL" in name else x + y
        results.append((value.clip(0, 1) if first >> 15 & 1 else value).view(np.uint32))
    active = wave.active()
    for half in range(2):
        wave.vector[destination + half][active] = results[half][active]


def _atomic(first: int, second: int, name: str, wave: _Wave, lds: int) -> None:
    """An atomic on global memory (by address or buffer) or LDS, lane by lane."""
    address, data, destination = second & 0xFF, second >> 8 & 0xFF, second >> 24
    is_buffer, is_lds = name.startswith("BUFFER"), name.startswith("DS_")
    words = 2 if name.endswith(("_X2", "_U64", "_B64", "_I64", "_F64")) else 1
    saddr = second >> 16 & 0x7F
    offset = first & 0xFFFF if is_lds else (first & 0x1FFF) - ((first & 0x1000) << 1)
    returns = "_RTN" in name if is_lds else bool(first >> (14 if is_buffer else 16) & 1)

    def read(register: int, lane: int) -> int:
        return sum(int(wave.vector[register + word, lane]) << 32 * word for word in range(words))

    def place(lane: int) -> int:
        if is_lds:
            return lds + int(wave.vector[address, lane]) + offset
        if saddr < 0x7C:
            return wave.pair(saddr) + int(wave.vector[address, lane]) + offset
        return (int(wave.vector[address, lane]) | int(wave.vector[address + 1, lane]) << 32) + offset

    lanes: Iterator[tuple[int, int | None]] = (wave.buffer_lanes(first, second) if is_buffer else
                                               ((int(lane), place(int(lane))) for lane in np.flatnonzero(wave.active())))
    for lane, where in lanes:
        if where is None:
            continue
        cell = (ctypes.c_uint64 if words == 2 else ctypes.c_uint32).from_address(where)
        old = cell.value
        compare = read(data + words, lane) if "CMPSWAP" in name else 0
        cell.value = _combine(name, 32 * words, old, read(data, lane), compare)
        for word in range(words if returns else 0):
            wave.vector[(data if is_buffer else destination) + word, lane] = old >> 32 * word & 0xFFFFFFFF


def _combine(name: str, bits: int, old: int, new: int, compare: int) -> int:
    """What an atomic leaves in memory."""
    name = name.replace("_RTN", "")

    def signed(x: int) -> int:
        return x - (1 << bits) if x >> bits - 1 else x

    def as_float(kind: type[np.floating[Any]], unsigned: Any) -> int:
        pair = np.array([old, new], unsigned).view(kind).reshape(2, -1)
        return int((pair[0] + pair[1]).view(unsigned)[0])

    if "BF16" in name:
        raise NotImplementedError(f"{name}: atomics on bf16")
    if "F16" in name:
        return as_float(np.float16, np.uint32)
    if "F32" in name:
        return as_float(np.float32, np.uint32)
    if "F64" in name:
        return as_float(np.float64, np.uint64)
    rules: tuple[tuple[str, Callable[[], int]], ...] = (
        ("CMPSWAP", lambda: new if old == compare else old), ("SWAP", lambda: new), ("SUB", lambda: old - new), ("ADD", lambda: old + new),
        ("SMIN", lambda: min(signed(old), signed(new))), ("UMIN", lambda: min(old, new)),
        ("SMAX", lambda: max(signed(old), signed(new))), ("UMAX", lambda: max(old, new)),
        ("MIN_I", lambda: min(signed(old), signed(new))), ("MIN_U", lambda: min(old, new)),
        ("MAX_I", lambda: max(signed(old), signed(new))), ("MAX_U", lambda: max(old, new)),
        ("XOR", lambda: old ^ new), ("AND", lambda: old & new), ("OR", lambda: old | new))
    for word, rule in rules:
        if word in name:
            return rule() & (1 << bits) - 1
    raise NotImplementedError(name)
