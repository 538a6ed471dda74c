"""Launching kernels: which configuration a chip gets, stand-ins for a device, argument checks, and that the table fits the kernels."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.amd.compiler import HIPOptions
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import zaya.kernels
from zaya.kernels import launch
from zaya.kernels.arguments import check
from zaya.kernels.launch import MI300X, Config, Target, config, launching_through

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H100 = Target("sm_90", num_cus=132)


@triton.jit
def _fill_kernel(out_ptr, value, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.zeros([BLOCK], tl.float32) + value, mask=offsets < num_elements)


def entry(arch: str, block: int, **when: str | int) -> dict[str, Any]:
    return {"arch": arch, "when": when, "blocks": {"BLOCK": block}, "num_warps": 4, "figures": "a test"}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The configuration table of the test, empty at first."""
    entries: dict[str, list[dict[str, Any]]] = {"_fill_kernel": []}
    monkeypatch.setattr(launch, "_table", lambda: entries)
    monkeypatch.setattr(launch, "_config", launch._config.__wrapped__)  # which remembers what it found in another table
    return entries


# ---------------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("arch, block", [
    ("gfx942", 1), ("sm_90", 2), ("sm_100", 3),  # its own
    ("gfx950", 1), ("gfx90a", 1), ("interpreter", 1), ("sm_80", 2),  # its maker's nearest
    ("sm_89", 4), ("sm_86", 4), ("sm_120", 4),  # as little shared memory
])
def test_an_arch_gets_its_own_entry_or_its_makers_nearest(table: dict[str, Any], arch: str, block: int) -> None:
    table["_fill_kernel"] += [entry("sm_100", 3), entry("sm_90", 2), entry("gfx942", 1), entry("sm_89", 4)]
    assert config(_fill_kernel, Target(arch, num_cus=8)).blocks == {"BLOCK": block}


def test_the_first_entry_whose_conditions_all_hold(table: dict[str, Any]) -> None:
    table["_fill_kernel"] += [entry("gfx942", 1, H=64, kind="even"), entry("gfx942", 2, H=64), entry("sm_90", 3), entry("gfx942", 4)]

    def block(**when: str | int) -> int:
        return config(_fill_kernel, MI300X, **when).blocks["BLOCK"]

    assert [block(H=64, kind="even"), block(H=64, kind="odd"), block(H=64), block(H=128, kind="even"), block()] == [1, 2, 2, 4, 4]


def test_an_own_entry_whose_conditions_fail_gives_way_to_the_nearest_arch(table: dict[str, Any]) -> None:
    table["_fill_kernel"] += [entry("gfx950", 1, H=64), entry("gfx942", 2)]
    chip = Target("gfx950", num_cus=256)
    assert [config(_fill_kernel, chip, H=size).blocks["BLOCK"] for size in (64, 128)] == [1, 2]


def test_no_entry_is_a_lookup_error(table: dict[str, Any]) -> None:
    table["_fill_kernel"] += [entry("gfx942", 1, H=64)]
    with pytest.raises(LookupError, match=r"configs.json has no configuration of _fill_kernel for gfx942 and {'H': 32}"):
        config(_fill_kernel, MI300X, H=32)
    with pytest.raises(LookupError, match="no configuration of _fill_kernel for sm_90"):
        config(_fill_kernel, H100, H=64)
    del table["_fill_kernel"]
    with pytest.raises(LookupError, match="_fill_kernel"):
        config(_fill_kernel, MI300X)


def test_only_amd_is_told_amds_options() -> None:
    chosen = Config({"BLOCK": 8}, num_warps=4, num_stages=1, hip={"waves_per_eu": 2})
    assert chosen.options(MI300X) == {"num_warps": 4, "num_stages": 1, "waves_per_eu": 2}
    assert chosen.options(H100) == {"num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("hip, properties, chip", [
    ("7.0", {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 304}, MI300X),
    ("7.0", {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 228}, Target("gfx942", num_cus=228, num_xcds=6)),  # MI300A
    ("7.0", {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 38}, Target("gfx942", num_cus=38)),  # a die by itself
    ("7.0", {"gcnArchName": "gfx942:sramecc+:xnack-", "multi_processor_count": 20}, Target("gfx942", num_cus=20)),
    ("7.0", {"gcnArchName": "gfx90a:sramecc+:xnack-", "multi_processor_count": 104}, Target("gfx90a", num_cus=104)),
    (None, {"major": 9, "minor": 0, "multi_processor_count": 132}, H100),
])
def test_a_gpu_is_known_by_its_properties(monkeypatch: pytest.MonkeyPatch, hip: str | None, properties: dict[str, Any],
                                          chip: Target) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    assert launch._gpu.__wrapped__(0) == chip


# ---------------------------------------------------------------------------------------------------------------- launches


def test_a_launch_runs_on_the_device_of_its_tensors() -> None:
    out = torch.zeros(70, device=DEVICE)
    launch.launch(_fill_kernel, (2,), {"out_ptr": out, "value": 2.5, "num_elements": 65}, Config({"BLOCK": 64}, num_warps=1))
    assert out.tolist() == [2.5] * 65 + [0.0] * 5


def test_stand_ins_get_every_launch_and_nest() -> None:
    seen: list[tuple[str, Any]] = []
    chosen = Config({"BLOCK": 64}, num_warps=1)
    out = torch.zeros(1, device="meta")

    def run() -> None:
        launch.launch(_fill_kernel, (1,), {"out_ptr": out, "value": 1.0, "num_elements": 1}, chosen)

    def stand_in(name: str) -> launch.Launcher:
        def launcher(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
            seen.append((name, launch.target(out.device).arch))
            assert (kernel, grid, config) == (_fill_kernel, (1,), chosen)
            assert set(arguments) == {"out_ptr", "value", "num_elements", "BLOCK"} and arguments["BLOCK"] == 64
        return launcher

    with launching_through(stand_in("outer")):
        run()
        with launching_through(stand_in("inner"), H100):
            run()
        run()
        with pytest.raises(RuntimeError, match="a launcher's own"), launching_through(stand_in("failing"), H100):
            run()
            raise RuntimeError("a launcher's own")
        run()
    assert seen == [("outer", "gfx942"), ("inner", "sm_90"), ("outer", "gfx942"), ("failing", "sm_90"), ("outer", "gfx942")]
    assert launch._stand_in is None


@pytest.mark.skipif(not launch.INTERPRETED, reason="only the interpreter runs kernels on the CPU")
def test_the_cpu_is_a_chip_of_few_units_in_the_interpreter() -> None:
    assert launch.target(torch.device("cpu")) == Target("interpreter", num_cus=4)
    assert not launch.target(torch.device("cpu")).is_hip


# ---------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("wanted, message", [
    ({"dtypes": (torch.bfloat16,)}, "x_TD has dtype float32, expected bfloat16"),
    ({"dtypes": (torch.bfloat16, torch.float16)}, "x_TD has dtype float32, expected bfloat16 or float16"),
    ({"shape": (2, 4)}, "x_TD has shape (2, 3), expected (2, 4)"),
    ({"shape": (None, 4)}, "x_TD has shape (2, 3), expected (any, 4)"),
    ({"shape": (2, 3, 1)}, "x_TD has shape (2, 3), expected (2, 3, 1)"),
    ({"shape": ()}, "x_TD has shape (2, 3), expected ()"),
    ({"device": torch.device("meta")}, "x_TD lies on cpu, expected meta"),
])
def test_check_names_argument_got_and_expected(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        check("x_TD", torch.zeros(2, 3), **wanted)
    assert str(raised.value) == message


def test_check_of_strides() -> None:
    turned = torch.zeros(3, 2).t()
    with pytest.raises(ValueError) as raised:
        check("x_TD", turned)
    assert str(raised.value) == "x_TD has strides (1, 2), expected contiguous memory (shape (2, 3))"
    check("x_TD", turned, contiguous=False)


def test_check_passes_what_fits() -> None:
    check("x_TD", torch.zeros(2, 3), shape=(None, 3), dtypes=(torch.float16, torch.float32), device=torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------- the table


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the table; json keeps the last of two equal keys and says nothing."""
    names = [name for name, _ in pairs]
    assert len(set(names)) == len(names), f"twice in one object: {sorted({name for name in names if names.count(name) > 1})}"
    return dict(pairs)


TABLE: dict[str, list[dict[str, Any]]] = json.loads(launch.TABLE.read_text(), object_pairs_hook=no_twins)
ENTRIES = [pytest.param(name, entry, id=f"{name} {index}") for name, entries in TABLE.items() for index, entry in enumerate(entries)]


def kernels() -> dict[str, Any]:
    """Every triton.jit function of the modules in zaya/kernels, by name."""
    modules = [importlib.import_module(f"zaya.kernels.{module.name}") for module in pkgutil.iter_modules(zaya.kernels.__path__)]
    return {value.__name__: value for module in modules for value in vars(module).values()
            if isinstance(value, (JITFunction, InterpretedFunction))}


def test_every_kernel_of_the_table_exists_and_has_both_chips() -> None:
    assert set(TABLE) <= set(kernels())
    assert {name for name, entries in TABLE.items() if {"gfx942", "sm_90"} - {entry["arch"] for entry in entries}} == set()


def test_every_kernel_that_is_launched_is_in_the_table() -> None:
    assert {name for name in kernels() if name.endswith("_kernel")} == set(TABLE)


@pytest.mark.parametrize("name, entry", ENTRIES)
def test_entry_is_well_formed(name: str, entry: dict[str, Any]) -> None:
    needed = {"arch", "blocks", "num_warps", "figures"}
    assert needed <= set(entry) <= needed | {"when", "num_stages", "hip"}
    assert entry["arch"].startswith(("gfx", "sm_")) or entry["arch"] == "interpreter"
    assert isinstance(entry["figures"], str) and entry["figures"].strip()
    assert entry["num_warps"] in (1, 2, 4, 8, 16) and entry.get("num_stages", 2) in range(1, 9)
    assert set(entry.get("hip", {})) <= set(HIPOptions.__dataclass_fields__)
    assert not entry.get("hip") or entry["arch"].startswith("gfx")
    assert all(isinstance(value, (str, int)) for value in entry.get("when", {}).values())
    assert all(isinstance(value, int) for value in entry["blocks"].values())
    parameters = inspect.signature(kernels()[name].fn).parameters
    assert all("constexpr" in str(parameters[block].annotation) for block in entry["blocks"])


@pytest.mark.parametrize("name", TABLE)
def test_no_entry_hides_a_later_one(name: str) -> None:
    for index, later in enumerate(TABLE[name]):
        for earlier in TABLE[name][:index]:
            hidden = earlier["arch"] == later["arch"] and earlier.get("when", {}).items() <= later.get("when", {}).items()
            assert not hidden, f"{later} is never reached: {earlier} comes first"
