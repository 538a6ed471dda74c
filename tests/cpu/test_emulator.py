"""The parts of the emulator that are ours: what it says where something is missing, how arguments are packed, repaired instructions.

With a checkout of tinygrad in ZAYA_TINYGRAD a kernel runs, too; every kernel does in tools.emulate_kernels.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zaya.kernels import emulator

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = os.environ.get("ZAYA_TINYGRAD", "")


def fake_checkout(path: Path) -> Path:
    (path / "test/mockgpu/amd").mkdir(parents=True)
    (path / "test/mockgpu/amd/emu.py").touch()
    return path


def test_hidden_block_counts_stand_where_the_metadata_says() -> None:
    asm = "".join(f"      - .offset:         {at}\n        .size:           {size}\n        .value_kind:     hidden_{kind}\n"
                  for at, size, kind in ((64, 4, "block_count_x"), (68, 4, "block_count_y"), (76, 2, "group_size_x")))
    assert emulator._block_counts(asm, (304,)) == [(64, 304), (68, 1)]
    assert emulator._block_counts("no metadata", (304,)) == []


def test_what_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(emulator.EmulatorMissing, match=r"^.* holds no test/mockgpu/amd/emu.py: pass a checkout of tinygrad$"):
        emulator.emulating(tmp_path)
    fake_checkout(tmp_path)
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    with pytest.raises(emulator.EmulatorMissing, match=r"^.*clang.*$"):
        emulator.emulating(tmp_path)
    monkeypatch.setattr(emulator.shutil, "which", lambda name: name)
    monkeypatch.setattr(emulator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(emulator.EmulatorMissing, match=r"^.*pip install pyelftools$"):
        emulator.emulating(tmp_path)


def test_the_tool_says_so_and_leaves_with_2(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-m", "tools.emulate_kernels", "--emulator", str(tmp_path)], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 2 and "pass a checkout of tinygrad" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_arguments_lie_at_multiples_of_their_size() -> None:
    tensor = torch.zeros(3)
    packed = emulator._pack([("i32", -2), ("*fp32", tensor), ("fp32", 0.5), ("i64", 1 << 40), ("i1", True)])
    assert packed == struct.pack("<i4xQf4xq?7x", -2, tensor.data_ptr(), 0.5, 1 << 40, True)


# The registers of a wave, and an emulator that is nothing but their layout.
LAYOUT = SimpleNamespace(SGPR_COUNT=260, EXEC_LO=SimpleNamespace(offset=126), PC_LO_IDX=256, PC_HI_IDX=257)


@pytest.fixture
def wave() -> Any:
    scalar, vector = (ctypes.c_uint32 * LAYOUT.SGPR_COUNT)(), (ctypes.c_uint32 * (256 * 64))()
    wave = emulator._Wave(LAYOUT, ctypes.addressof(scalar), ctypes.addressof(vector))
    wave.memory = scalar, vector  # type: ignore[attr-defined]  # must live as long
    wave.mask = 2**64 - 1
    return wave


def vop3p(destination: int, sources: list[int], op_sel: list[int], op_sel_hi: list[int]) -> tuple[int, int]:
    """The two words of a packed instruction, without opcode."""
    first = destination | sum(bit << 11 + i for i, bit in enumerate(op_sel)) | (op_sel_hi[2] if len(op_sel_hi) > 2 else 0) << 14
    second = sum((256 + register) << 9 * i for i, register in enumerate(sources)) | op_sel_hi[0] << 27 | op_sel_hi[1] << 28
    return first, second


def floats(wave: Any, register: int, *values: float) -> None:
    for offset, value in enumerate(values):
        wave.vector[register + offset] = np.full(64, value, np.float32).view(np.uint32)


def read(wave: Any, register: int, count: int = 2) -> list[float]:
    return [float(wave.vector[register + offset].view(np.float32)[0]) for offset in range(count)]


def test_a_packed_move_takes_both_halves_by_op_sel(wave: Any) -> None:
    floats(wave, 10, 1.0, 2.0)
    floats(wave, 20, 3.0, 4.0)
    for op_sel, want in (([0, 1], [1.0, 4.0]), ([1, 0], [2.0, 3.0]), ([1, 1], [2.0, 4.0]), ([0, 0], [1.0, 3.0])):
        emulator._packed(*vop3p(30, [10, 20], op_sel, [1, 1]), "V_PK_MOV_B32", wave)  # op_sel_hi is always 1 and means nothing
        assert read(wave, 30) == want


def test_packed_arithmetic_picks_halves_and_leaves_idle_lanes(wave: Any) -> None:
    floats(wave, 10, 1.0, 2.0)
    floats(wave, 20, 10.0, 20.0)
    floats(wave, 30, 100.0, 200.0)
    wave.mask = 1
    emulator._packed(*vop3p(40, [10, 20, 30], [0, 1, 0], [1, 1, 0]), "V_PK_FMA_F32", wave)
    assert read(wave, 40) == [1.0 * 20.0 + 100.0, 2.0 * 20.0 + 100.0]
    assert wave.vector[40, 1] == wave.vector[41, 1] == 0


def test_packed_results_may_overwrite_their_sources(wave: Any) -> None:
    floats(wave, 10, 1.0, 2.0)
    emulator._packed(*vop3p(10, [10, 10], [1, 1], [0, 0]), "V_PK_ADD_F32", wave)
    assert read(wave, 10) == [4.0, 2.0]


@pytest.mark.parametrize(("control", "lane", "source", "is_inside"), [
    (0b01_00_11_10, 4, 6, True), (0b01_00_11_10, 7, 5, True),  # quad_perm:[2,3,0,1]
    (0x111, 16, 0, False), (0x118, 12, 4, True), (0x118, 3, 0, False),  # row_shr
    (0x101, 15, 0, False), (0x121, 16, 31, True), (0x140, 18, 29, True), (0x141, 9, 14, True),
    (0x142, 20, 15, True), (0x142, 3, 0, False), (0x143, 40, 31, True), (0x143, 31, 0, False), (0x152, 35, 34, True)])
def test_lane_exchanges(control: int, lane: int, source: int, is_inside: bool) -> None:
    sources, inside = emulator._dpp_source(control)
    assert (sources[lane], inside[lane]) == (source, is_inside)


@pytest.mark.parametrize(("name", "bits", "old", "new", "want"), [
    ("GLOBAL_ATOMIC_ADD", 32, 2**32 - 1, 2, 1), ("DS_SUB_U32", 32, 1, 2, 2**32 - 1), ("GLOBAL_ATOMIC_SMIN", 32, 5, 2**32 - 1, 2**32 - 1),
    ("GLOBAL_ATOMIC_UMIN", 32, 5, 2**32 - 1, 5), ("DS_MAX_RTN_I32", 32, 5, 2**32 - 1, 5), ("DS_MAX_U32", 32, 5, 2**32 - 1, 2**32 - 1),
    ("GLOBAL_ATOMIC_XOR_X2", 64, 2**63 + 1, 1, 2**63), ("GLOBAL_ATOMIC_SWAP", 32, 3, 9, 9),
    ("GLOBAL_ATOMIC_ADD_F32", 32, 0x3F800000, 0x40000000, 0x40400000),
    ("GLOBAL_ATOMIC_PK_ADD_F16", 32, 0x3C003C00, 0x40003C00, 0x42004000)])
def test_atomics(name: str, bits: int, old: int, new: int, want: int) -> None:
    assert emulator._combine(name, bits, old, new, 0) == want


def test_compare_and_swap() -> None:
    assert emulator._combine("GLOBAL_ATOMIC_CMPSWAP", 32, 7, 9, 7) == 9
    assert emulator._combine("GLOBAL_ATOMIC_CMPSWAP", 32, 7, 9, 8) == 7


@pytest.mark.skipif(not CHECKOUT, reason="ZAYA_TINYGRAD names no checkout of tinygrad")
def test_a_kernel_computes_the_right_thing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = ["-m", "tools.emulate_kernels", "--emulator", CHECKOUT, "--op", "rms_norm small odd width"]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
