"""SwiGLU experts over routed tokens, from token rows to token rows: gather, three matrix products, gate and scatter in two launches.

For assignment r (sorted by expert) of token t to expert e with gate s:
  h = x_t W_gate_up[e]^T = [g | u],  a = silu(g) * u,  y_r = s (W_down[e] a),  out_t = sum of y_r over the token's slots.
Backward, with d = W_down[e]^T dout_t per row:
  ds = <d, a>   (= <dout_t, y_r / s>, so y need not be kept)
  dg = s d u silu'(g),  du = s d silu(g),  dx_t = sum over slots of [dg | du] W_gate_up[e]
  dW_gate_up[e] = sum_r [dg | du]^T x_t,   dW_down[e] = sum_r dout_t^T (s a)
Saves x, h, order, gate and the tables of tiles; a is computed again in the epilogue of d. Neither the gathered rows nor y are ever written.
With several slots per token each slot's row is written and summed afterwards, in a fixed order. The kernels stand in grouped_gemm.py. Knows
no router.

Letters: T tokens, k slots (experts per token), R = T k assignments, D hidden, F expert width, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from zaya.kernels.arguments import FLOATS, check, check_experts
from zaya.kernels.gradient_sum import ExpertSums, GradientSum
from zaya.kernels.grouped_gemm import (
    _dgate_kernel,
    _gate_up_bwd_kernel,
    _gate_up_fwd_kernel,
    _rows_kernel,
    _tiles_kernel,
    _weight_grad_kernel,
)
from zaya.kernels.launch import Config, config, launch, target

FEW_EXPERTS = 31  # with their end 32 numbers; more, and a table of 128 tiles by experts spills: configs.json has entries for "many"
ALIGNED = 256  # the widest tile: other widths waste less of smaller ones, and those that 8 does not divide spill in it on gfx942
RATES = {"wide": 1.0, "narrow": 0.95}  # speed of a CU by tiles, relative to the widest (supposed): a narrow one loads more for a product


def experts(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None = None,
            gate_Tk: Tensor | None = None, gradient_sums: ExpertSums | None = None) -> Tensor:
    """The experts' output per token, gated and summed over its slots (T, D); zero for tokens that no expert takes.

    gate_up (E, 2F, D) = [gate | up], down (E, D, F); sizes (E,) int32 or int64: assignments of each expert; order (R,) int32: assignment
    (token * k + slot) of each sorted row, as sort_by_expert gives it, those of no expert last; gate (T, k) fp32.
    Without order and gate x is a row per assignment, already sorted, and so is the result: rows beyond the sum of sizes come out zero.
    gradient_sums: of gate_up and down, fp32.
    """
    check_experts(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums)
    return _Experts.apply(x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums)


def rows_times_weights(rows_RK: Tensor, sizes_E: Tensor, weights_ENK: Tensor) -> Tensor:
    """Sorted rows, each times its expert's matrix (R, N): the product that `experts` is made of, alone, for measuring it. No gradients."""
    check("weights_ENK", weights_ENK, shape=(None, None, None), dtypes=FLOATS, device=rows_RK.device)
    E, N, K = weights_ENK.shape
    check("rows_RK", rows_RK, shape=(None, K), dtypes=(weights_ENK.dtype,))
    check("sizes_E", sizes_E, shape=(E,), dtypes=(torch.int32, torch.int64), device=rows_RK.device)
    out_RN = rows_RK.new_empty(len(rows_RK), N)
    _Tiles(sizes_E, len(rows_RK), (N, K)).rows(rows_RK, weights_ENK, None, None, out_RN)
    return out_RN


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk, gradient_sums):
        tiles = _Tiles(sizes_E, _rows(x_TD, gate_Tk)[0], down_EDF.shape[1:])
        out_TD, h_RF = forward(tiles, x_TD, gate_up_EFD, down_EDF, order_R, gate_Tk)
        ctx.save_for_backward(x_TD, h_RF, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk)
        ctx.tiles, ctx.gradient_sums = tiles, gradient_sums  # the tables: some KB
        return out_TD

    @staticmethod
    def backward(ctx, dout_TD):
        x_TD, h_RF, sizes_E, gate_up_EFD, down_EDF, order_R, gate_Tk = ctx.saved_tensors
        tiles = ctx.tiles
        if sizes_E.data_ptr() != tiles.sizes_E.data_ptr():  # computed again, with the order: one token may have gone elsewhere
            tiles = _Tiles(sizes_E, tiles.num_rows, down_EDF.shape[1:])
        sums = ctx.gradient_sums or ExpertSums.temporary(gate_up_EFD, down_EDF)
        dx_TD, dgate_Tk = backward(tiles, dout_TD.contiguous(), x_TD, h_RF, gate_up_EFD, down_EDF, order_R, gate_Tk, sums)
        return dx_TD, None, *(gradient_sum.for_autograd(x_TD.dtype) for gradient_sum in sums), None, dgate_Tk, None


def forward(tiles: _Tiles, x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None,
            gate_Tk: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (T, D) and h (R, 2F), which the backward needs."""
    E, D, F = down_EDF.shape
    R, slots = _rows(x_TD, gate_Tk)
    h_RF, act_RF = x_TD.new_empty(R, 2 * F), x_TD.new_empty(R, F)
    tiles.launch(_gate_up_fwd_kernel, 2 * F, {"x": x_TD, "weights": gate_up_EFD, "order": order_R, "h": h_RF, "act": act_RF,
                                              "D": D, "F": F, "TOP_K": slots})
    y_RD = x_TD.new_empty(R, D)
    tiles.rows(act_RF, down_EDF, order_R, gate_Tk, y_RD)
    return _sum_slots(y_RD, slots), h_RF


def backward(tiles: _Tiles, dout_TD: Tensor, x_TD: Tensor, h_RF: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None,
             gate_Tk: Tensor | None, gradient_sums: ExpertSums) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and gate; those of gate_up and down enter their sums."""
    E, D, F = down_EDF.shape
    R, slots = _rows(x_TD, gate_Tk)
    dh_RF, act_RF, dx_RD = torch.empty_like(h_RF), x_TD.new_empty(R, F), x_TD.new_empty(R, D)
    parts = None
    if gate_Tk is not None:
        parts = gate_Tk.new_empty(triton.cdiv(F, tiles.of_product(_gate_up_bwd_kernel, x_TD.dtype, F).blocks["BLOCK_N"]), R)
    tiles.launch(_gate_up_bwd_kernel, F, {"dy": dout_TD, "weights": down_EDF, "order": order_R, "gates": gate_Tk, "h": h_RF, "dh": dh_RF,
                                          "act": act_RF, "dgate_parts": parts, "num_rows": R, "D": D, "F": F, "TOP_K": slots})
    tiles.rows(dh_RF, gate_up_EFD.mT, order_R, None, dx_RD)
    gathered, shared = order_R is not None, {"order": order_R, "TOP_K": slots}
    tiles.weight_grad(gradient_sums.gate_up, {"a_rows": dh_RF, "b_rows": x_TD, "GATHER_A": False, "GATHER_B": gathered, **shared})
    tiles.weight_grad(gradient_sums.down, {"a_rows": dout_TD, "b_rows": act_RF, "GATHER_A": gathered, "GATHER_B": False, **shared})
    dgate_Tk = None
    if gate_Tk is not None and parts is not None:
        dgate_Tk = torch.empty_like(gate_Tk)
        tiles.dgate(parts, order_R, dgate_Tk)
    return _sum_slots(dx_RD, slots), dgate_Tk


class _Tiles:
    """The table of row tiles of one call and its backward, for each height of tile that their kernels are configured with."""

    def __init__(self, sizes_E: Tensor, num_rows: int, widths: tuple[int, ...]) -> None:
        self.sizes_E, self.num_rows, self.E = sizes_E, num_rows, len(sizes_E)
        self.aligned, self.eights = (all(width % step == 0 for width in widths) for step in (ALIGNED, 8))
        self.target = target(sizes_E.device)
        self.offsets = sizes_E.new_empty(self.E + 1, dtype=torch.int32)
        self.largest_first = sizes_E.new_empty(self.E, dtype=torch.int32)
        self.tables: dict[int, Tensor] = {}

    def config(self, kernel: Any, dtype: torch.dtype, **when: str | int) -> Config:
        return config(kernel, self.target, dtype=str(dtype).removeprefix("torch."), itemsize=dtype.itemsize,
                      aligned=self.aligned, eights=self.eights, **when)

    def of_product(self, kernel: Any, dtype: torch.dtype, width: int, **when: str | int) -> Config:
        """For a product `width` columns wide: where the grid is persistent the tiles with which the busiest CU is done first. How many rows
        each expert has is not known here; half of every expert's last tile is taken to be empty."""
        if self.target.num_xcds == 1:
            return self.config(kernel, dtype, **when)

        def time(tiles: str) -> float:
            chosen = self.config(kernel, dtype, tiles=tiles, **when)
            height, columns = self.num_rows / chosen.blocks["BLOCK_M"] + self.E / 2, triton.cdiv(width, chosen.blocks["BLOCK_N"])
            rounds = math.ceil(height * columns / self._programs(chosen))
            return rounds * _programs_per_cu(chosen) * chosen.blocks["BLOCK_M"] * chosen.blocks["BLOCK_N"] / RATES[tiles]

        return self.config(kernel, dtype, tiles=min(RATES, key=time), **when)

    def _programs(self, chosen: Config) -> int:
        """Of a persistent grid."""
        return self.target.num_cus * _programs_per_cu(chosen)

    def table(self, block_m: int) -> Tensor:
        """(1 + tiles, 4) int32; every group may end in a partial tile, so rows / height + groups bounds their number."""
        if block_m not in self.tables:
            num_tiles = triton.cdiv(self.num_rows, block_m) + self.E
            self.tables[block_m] = table = self.sizes_E.new_empty(1 + num_tiles, 4, dtype=torch.int32)
            chosen = config(_tiles_kernel, self.target, experts="few" if self.E <= FEW_EXPERTS else "many")
            launch(_tiles_kernel, (triton.cdiv(num_tiles, chosen.blocks["BLOCK_TILES"]),), {
                "sizes": self.sizes_E, "tiles": table, "offsets": self.offsets, "largest_first": self.largest_first,
                "num_rows": self.num_rows, "max_tiles": num_tiles, "E": self.E, "BLOCK_E": triton.next_power_of_2(self.E + 1),
                "BLOCK_M": block_m}, chosen)
        return self.tables[block_m]

    def launch(self, kernel: Any, width: int, arguments: dict[str, Any]) -> None:
        """Over all tiles of a product `width` columns wide. Several dies: a persistent grid that fills the CUs, so that neighbours share a
        die's L2. One die: a program for each row of the table and column of tiles (some have none), as tiles do not cost the same."""
        when = {"K_IS_INNER": arguments["K_IS_INNER"]} if "K_IS_INNER" in arguments else {}
        chosen = self.of_product(kernel, arguments["weights"].dtype, width, **when)
        table = self.table(chosen.blocks["BLOCK_M"])
        num_tiles = (len(table) - 1) * triton.cdiv(width, chosen.blocks["BLOCK_N"])
        programs = self._programs(chosen) if self.target.num_xcds > 1 else num_tiles
        launch(kernel, (programs,), {**arguments, "tiles": table, "NUM_XCDS": self.target.num_xcds, "WIDE": _is_wide(arguments)}, chosen)

    def rows(self, rows_RK: Tensor, weights_ENK: Tensor, order_R: Tensor | None, gates: Tensor | None, out_RN: Tensor) -> None:
        """Each row times its expert's matrix; weights: contiguous, or the transposed view of such ones."""
        E, N, K = weights_ENK.shape
        self.launch(_rows_kernel, N, {"a_rows": rows_RK, "weights": weights_ENK, "order": order_R, "gates": gates, "offsets": self.offsets,
                                      "out": out_RN, "num_rows": self.num_rows, "E": E, "K": K, "N": N,
                                      "K_IS_INNER": weights_ENK.stride(2) == 1})

    def weight_grad(self, gradient_sum: GradientSum, arguments: dict[str, Any]) -> None:
        E, M, N = gradient_sum.total.shape
        chosen = self.config(_weight_grad_kernel, arguments["a_rows"].dtype)
        programs = E * triton.cdiv(M, chosen.blocks["BLOCK_M"]) * triton.cdiv(N, chosen.blocks["BLOCK_N"])
        launch(_weight_grad_kernel, (programs,), {
            **arguments, "offsets": self.offsets, "largest_first": self.largest_first, "out": gradient_sum.total,
            "ACCUMULATE": not gradient_sum.first(), "E": E, "M": M, "N": N, "NUM_XCDS": self.target.num_xcds, "WIDE": _is_wide(arguments)},
            chosen)

    def dgate(self, parts: Tensor, order_R: Tensor | None, dgate_Tk: Tensor) -> None:
        chosen = config(_dgate_kernel, self.target)
        programs = triton.cdiv(self.num_rows, chosen.blocks["BLOCK_R"])
        if programs:
            launch(_dgate_kernel, (programs,), {"parts": parts, "order": order_R, "offsets": self.offsets, "dgate": dgate_Tk,
                                                "num_rows": self.num_rows, "E": self.E, "NUM_PARTS": len(parts)}, chosen)


def _programs_per_cu(chosen: Config) -> int:
    """Work-groups of eight waves, two a SIMD, in all."""
    return max(8 // chosen.num_warps, 1)


def _rows(x_TD: Tensor, gate_Tk: Tensor | None) -> tuple[int, int]:
    """Number of assignments, and slots per token."""
    slots = 1 if gate_Tk is None else gate_Tk.shape[1]
    return x_TD.shape[0] * slots, slots


def _is_wide(arguments: dict[str, Any]) -> bool:
    """Whether some tensor of rows has more bytes than 32-bit offsets reach."""
    rows = (arguments.get(name) for name in ("x", "dy", "a_rows", "b_rows", "out"))
    return any(tensor.numel() * tensor.element_size() >= 2**31 for tensor in rows if tensor is not None)


def _sum_slots(rows_RD: Tensor, slots: int) -> Tensor:
    return rows_RD if slots == 1 else rows_RD.view(-1, slots, rows_RD.shape[1]).sum(1)
