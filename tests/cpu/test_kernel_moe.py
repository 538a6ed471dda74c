"""The experts against their reference, outputs and every gradient: ragged, empty and single groups, skipped tokens; what they refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import launch, moe, reference
from zaya.kernels.cases import SMALL, Case, error, errors, run, widened
from zaya.kernels.cases.moe import CASES, routed
from zaya.kernels.gradient_sum import ExpertSums, GradientSum
from zaya.kernels.launch import MI300X, Config, Target, launching_through

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32: sums of up to 300 products in another order. fp16: h, the activation and the result are each rounded once, 2e-4 a time.
THRESHOLDS = {torch.float32: 2e-6, torch.float16: 1e-3}
SMALL_CASES = [case for case in CASES if case.size == SMALL]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    found = errors(case, case.make(DEVICE, dtype))
    assert all(error < THRESHOLDS[dtype] for error in found.values()), found


def test_rows_past_32_bits_are_addressed_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "_is_wide", lambda arguments: True)
    for case in SMALL_CASES[0], SMALL_CASES[3], SMALL_CASES[4]:
        found = errors(case, case.make(DEVICE, torch.float32))
        assert all(error < THRESHOLDS[torch.float32] for error in found.values()), found


def test_small_tiles_and_dies_leave_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles a program, tiles of different heights in forward and backward, tail tiles, programs renumbered over dies."""
    shipped = launch.config

    def small(kernel: Any, target: Any, **when: Any) -> Config:
        found = shipped(kernel, target, **when)
        if "GROUP_M" not in found.blocks:
            return found
        heights = {"_gate_up_bwd_kernel": 32, "_weight_grad_kernel": 64}
        sizes = {"BLOCK_M": heights.get(kernel.__name__, 16), "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 2, "TAIL_M": 8}
        return dataclasses.replace(found, blocks={name: sizes[name] for name in found.blocks})

    monkeypatch.setattr(moe, "config", small)
    monkeypatch.setattr(moe, "target", lambda device: dataclasses.replace(launch.target(device), num_cus=6, num_xcds=2))
    case = SMALL_CASES[0]
    found = errors(case, case.make(DEVICE, torch.float32))
    assert all(error < THRESHOLDS[torch.float32] for error in found.values()), found


@pytest.mark.parametrize(("total", "words"), [
    (torch.zeros(2, 32, 16, dtype=torch.float16), "gradient_sums.down has dtype float16, expected float32"),
    (torch.zeros(2, 16, 32).mT, "gradient_sums.down has strides"), (torch.zeros(2, 32, 8), "gradient_sums.down has shape")])
def test_refuses_other_sums(total: Tensor, words: str) -> None:
    sums = ExpertSums(GradientSum(torch.zeros(2, 32, 32, device=DEVICE)), GradientSum(total.to(DEVICE)))
    with pytest.raises(ValueError, match=words):
        moe.experts(**arguments_with(gradient_sums=sums))


@pytest.mark.parametrize("op", [moe.experts, reference.experts])
def test_weight_gradients_add_up_in_given_sums(op: Any) -> None:
    """Two micro-batches: the first replaces what is in the sums, the second adds to it, unrounded; autograd gets the rest."""
    case = SMALL_CASES[0]
    arguments = case.make(DEVICE, torch.float16)
    want = run(case.reference, widened(arguments), case.gradients)
    weights = ("gate_up_EFD", "down_EDF")
    sums = ExpertSums(*(GradientSum(torch.full_like(arguments[name], math.nan, dtype=torch.float32)) for name in weights))
    for times in (1, 2):
        got = run(op, {**arguments, "gradient_sums": sums}, case.gradients)
        assert error(got["d x_TD"], want["d x_TD"]) < THRESHOLDS[torch.float16]
        for gradient_sum, name in zip(sums, weights):
            assert got[f"d {name}"].is_sparse and not got[f"d {name}"]._nnz()
            assert error(gradient_sum.total / times, want[f"d {name}"]) < THRESHOLDS[torch.float16]
            assert (gradient_sum.total != gradient_sum.total.half()).any()


@pytest.mark.parametrize(("sizes", "wrong"), [
    ((12, 8), [12, 10**6]), ((20, 0), [2**30, 2**30]), ((20, 0), [2**32, 5]), ((0, 20), [-5, 25])], ids=str)
def test_sizes_beyond_the_rows_are_cut_at_the_last(sizes: tuple[int, int], wrong: list[int]) -> None:
    """A wrong count must not write outside a tensor."""
    arguments = routed(20, 32, 16, sizes, is_sorted=True)(DEVICE, torch.float32)
    want = reference.experts(**arguments)
    arguments["sizes_E"] = torch.tensor(wrong, device=DEVICE)
    assert error(moe.experts(**arguments), want) < THRESHOLDS[torch.float32]


def test_no_tokens_give_none() -> None:
    arguments = routed(0, 32, 16, (0, 0))(DEVICE, torch.float32)
    got = run(moe.experts, arguments, ("x_TD", "gate_up_EFD", "down_EDF", "gate_Tk"))
    assert got["out.0"].shape == (0, 32) and not got["d gate_up_EFD"].any() and not got["d down_EDF"].any()


def test_needs_no_values_on_the_host() -> None:
    launched: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        launched.append(kernel.__name__)

    for case in SMALL_CASES:
        arguments = case.make(torch.device("meta"), torch.bfloat16)
        with launching_through(note):
            got = run(case.op, arguments, case.gradients)
        assert got["out.0"].shape == next(iter(arguments.values())).shape  # rows in, rows out
    assert {"_gate_up_fwd_kernel", "_gate_up_bwd_kernel", "_rows_kernel", "_weight_grad_kernel", "_dgate_kernel"} <= set(launched)


@pytest.mark.parametrize(("D", "F", "per_cu"), [(256, 512, 1), (72, 520, 2)])  # tiles of 8 warps; of 4, of which two fit a CU
@pytest.mark.parametrize("chip", [Target("sm_90", num_cus=132), MI300X], ids=lambda chip: chip.arch)
def test_a_program_per_tile_on_one_die_and_a_fill_of_the_cus_on_several(chip: Target, D: int, F: int, per_cu: int) -> None:
    """The kernels walk in steps of the grid, so that a wrong one would only be slow."""
    grids: dict[str, tuple[int, ...]] = {}
    blocks: dict[str, Mapping[str, int]] = {}

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        grids.setdefault(kernel.__name__, grid)
        blocks.setdefault(kernel.__name__, config.blocks)

    arguments = routed(300, D, F, (200, 0, 5))(torch.device("meta"), torch.bfloat16)
    with launching_through(note, chip):
        run(moe.experts, arguments, ("x_TD",))
    for name, width in {"_gate_up_fwd_kernel": 2 * F, "_rows_kernel": D, "_gate_up_bwd_kernel": F}.items():
        tiles = (math.ceil(300 / blocks[name]["BLOCK_M"]) + 3) * math.ceil(width / blocks[name]["BLOCK_N"])
        assert grids[name] == (tiles if chip.num_xcds == 1 else per_cu * chip.num_cus,)


@pytest.mark.parametrize(("D", "F", "E", "rows", "widths"), [
    (2048, 2048, 16, 4096, (128, 256)),  # rounds of wide or of narrow tiles: 2 or 3 of gate_up, 1 or 2 of down
    (4096, 4096, 24, 4096, (256, 128)),  # 3 or 6, 2 or 3
    (2048, 2048, 16, 16384, (256, 256)),  # 4 or 8, 2 or 4
    (4096, 4096, 24, 16384, (256, 256)),  # 8 or 16, 4 or 8
    (2048, 2048, 16, 1024, (256, 128))])  # 1 or 2, 1 or 1
def test_tiles_are_as_wide_as_the_rounds_of_the_grid_want(D: int, F: int, E: int, rows: int, widths: tuple[int, int]) -> None:
    with launching_through(lambda *_: None, MI300X):
        tiles = moe._Tiles(torch.empty(E, dtype=torch.int32, device="meta"), rows, (D, F))
        chosen = (tiles.of_product(moe._gate_up_fwd_kernel, torch.bfloat16, 2 * F), tiles.of_product(moe._rows_kernel, torch.bfloat16, D))
    assert tuple(each.blocks["BLOCK_N"] for each in chosen) == widths


def test_a_program_that_shares_its_cu_takes_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of 256x256 in 8 warps, or two of 128x128 in 4, of which a CU runs two at half its speed."""
    def tiles_of(self: Any, kernel: Any, dtype: torch.dtype, *, tiles: str) -> Config:
        side = {"wide": 256, "narrow": 128}[tiles]
        return Config({"BLOCK_M": side, "BLOCK_N": side}, num_warps=side // 32)

    monkeypatch.setattr(moe._Tiles, "config", tiles_of)
    with launching_through(lambda *_: None, MI300X):
        tiles = moe._Tiles(torch.empty(16, dtype=torch.int32, device="meta"), 4096, (2048, 2048))
        assert tiles.of_product(moe._rows_kernel, torch.bfloat16, 2048).num_warps == 8


def arguments_with(**changes: Any) -> dict[str, Any]:
    return {**routed(6, 32, 16, (3, 2))(DEVICE, torch.float32), **changes}


@pytest.mark.parametrize(("changes", "words"), [
    ({"x_TD": torch.zeros(6, 32, dtype=torch.float64)}, "x_TD has dtype float64, expected bfloat16"),
    ({"x_TD": torch.zeros(6, 31)}, r"x_TD has shape \(6, 31\), expected \(any, 32\)"),
    ({"x_TD": torch.zeros(32, 6).t()}, r"x_TD has strides \(1, 6\)"),
    ({"gate_up_EFD": torch.zeros(2, 30, 32)}, r"gate_up_EFD has shape \(2, 30, 32\), expected \(any, 32, any\)"),
    ({"gate_up_EFD": torch.zeros(32, 32)}, r"gate_up_EFD has shape \(32, 32\), expected \(E, 2F, D\)"),
    ({"down_EDF": torch.zeros(2, 32, 16, dtype=torch.float16)}, "down_EDF has dtype float16, expected float32"),
    ({"down_EDF": torch.zeros(3, 32, 16)}, r"down_EDF has shape \(3, 32, 16\), expected \(2, 32, any\)"),
    ({"sizes_E": torch.zeros(3, dtype=torch.int64)}, r"sizes_E has shape \(3,\), expected \(2\)"),
    ({"sizes_E": torch.zeros(2)}, "sizes_E has dtype float32, expected int32 or int64"),
    ({"order_R": torch.zeros(7, dtype=torch.int32)}, r"order_R has shape \(7,\), expected \(6\)"),
    ({"order_R": torch.zeros(6, dtype=torch.int64)}, "order_R has dtype int64, expected int32"),
    ({"gate_Tk": torch.zeros(6, 1, dtype=torch.bfloat16)}, "gate_Tk has dtype bfloat16, expected float32"),
    ({"gate_Tk": torch.zeros(5, 1)}, r"gate_Tk has shape \(5, 1\), expected \(6, any\)"),
    ({"gate_Tk": None}, "gate_Tk is None, expected both"),
    ({"order_R": None}, "order_R is None, expected both"),
])
def test_refuses(changes: dict[str, Any], words: str) -> None:
    changes = {name: None if value is None else value.to(DEVICE) for name, value in changes.items()}
    with pytest.raises(ValueError, match=words):
        moe.experts(**arguments_with(**changes))
