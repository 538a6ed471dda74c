"""Joins a sub-layer's output with the residual stream and norms the sum for the next sub-layer, in one pass; also the plain RMSNorm.

With h the branch, s the stream and one vector per channel for each of a_h, b_h, a_x, b_x, w:

    forward    t = a_h h + a_x s + (a_h b_h + a_x b_x),   r = (mean(t^2) + eps)^-1/2,   x = t r w
    backward   dt = dt' + r w dx - t r^2 mean(t r w dx),  where dt' is the gradient of t itself
               dh = a_h dt,  ds = a_x dt,  dw = sum t r dx
               da_h = sum dt (h + b_h),  db_h = a_h sum dt,  and likewise da_x and db_x

The new stream t stays fp32; x has the dtype of w. Saved are s and h, which da needs anyway, and r, 4 bytes a row: backward computes t
again instead of reading it, so it moves 18 bytes an element and not 22. Forward moves 12. rms_norm is the same without a stream.

Sums over rows are deterministic: each program of a persistent grid adds up its own rows in registers and writes one row of partial
sums, and a second kernel adds those in a fixed order. Few programs with many rows each keep the partial sums small beside the data.

Letters: R rows, D hidden, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import FLOATS, check
from zaya.kernels.backend import MAX_WIDTH
from zaya.kernels.launch import Config, Target, config, launch, target

# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _tile(first_row, num_rows, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the rows from first_row on: where they start, their elements' offsets from there, and which of them exist."""
    rows_M = tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, BLOCK_D)
    inside = (rows_M < num_rows - first_row)[:, None] & (columns_D < D)[None, :]
    return first_row.to(tl.int64) * D, rows_M[:, None] * D + columns_D[None, :], inside


@triton.jit
def _vector(pointer, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A per-channel vector as (1, BLOCK_D) fp32, zero beyond D."""
    columns_D = tl.arange(0, BLOCK_D)
    return tl.load(pointer + columns_D, mask=columns_D < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _residual_norm_fwd_kernel(stream_ptr, branch_ptr, branch_scale_ptr, branch_bias_ptr, stream_scale_ptr, stream_bias_ptr, weight_ptr,
                              new_ptr, x_ptr, inverse_rms_ptr, num_rows, num_cus, eps, D: tl.constexpr, BLOCK_D: tl.constexpr,
                              TILE: tl.constexpr, PROGRAMS_PER_CU: tl.constexpr, PREFETCH: tl.constexpr):
    a_h, a_x = _vector(branch_scale_ptr, D, BLOCK_D), _vector(stream_scale_ptr, D, BLOCK_D)
    shift = a_h * _vector(branch_bias_ptr, D, BLOCK_D) + a_x * _vector(stream_bias_ptr, D, BLOCK_D)
    weight = _vector(weight_ptr, D, BLOCK_D)
    BLOCK_M: tl.constexpr = (TILE + BLOCK_D - 1) // BLOCK_D  # rows at a time; both are powers of two
    rows_M = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_cus * PROGRAMS_PER_CU, num_stages=PREFETCH):
        first_row = tile * BLOCK_M
        start, offsets, inside = _tile(first_row, num_rows, D, BLOCK_M, BLOCK_D)
        branch = tl.load(branch_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        stream = tl.load(stream_ptr + start + offsets, mask=inside, other=0.0)
        new = shift + branch * a_h + stream * a_x
        inverse_rms = tl.rsqrt(tl.sum(new * new, 1) / D + eps)
        tl.store(new_ptr + start + offsets, new, mask=inside)
        x = new * inverse_rms[:, None] * weight
        tl.store(x_ptr + start + offsets, x.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(inverse_rms_ptr + first_row + rows_M, inverse_rms, mask=rows_M < num_rows - first_row)


@triton.jit
def _residual_norm_bwd_kernel(dnew_ptr, dx_ptr, stream_ptr, branch_ptr, inverse_rms_ptr, branch_scale_ptr, branch_bias_ptr,
                              stream_scale_ptr, stream_bias_ptr, weight_ptr, dstream_ptr, dbranch_ptr, partials_ptr, num_rows, num_cus,
                              D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, PROGRAMS_PER_CU: tl.constexpr,
                              PREFETCH: tl.constexpr):
    """partials (P, 4, D): each program's sums over its rows of dt, dt h, dt s and dx t r."""
    a_h, a_x = _vector(branch_scale_ptr, D, BLOCK_D), _vector(stream_scale_ptr, D, BLOCK_D)
    shift = a_h * _vector(branch_bias_ptr, D, BLOCK_D) + a_x * _vector(stream_bias_ptr, D, BLOCK_D)
    weight = _vector(weight_ptr, D, BLOCK_D)
    BLOCK_M: tl.constexpr = (TILE + BLOCK_D - 1) // BLOCK_D  # rows at a time; both are powers of two
    rows_M = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_h, total_s, total_w = total, total, total
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_cus * PROGRAMS_PER_CU, num_stages=PREFETCH):
        first_row = tile * BLOCK_M
        start, offsets, inside = _tile(first_row, num_rows, D, BLOCK_M, BLOCK_D)
        branch = tl.load(branch_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        stream = tl.load(stream_ptr + start + offsets, mask=inside, other=0.0)
        dx = tl.load(dx_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        dt = tl.load(dnew_ptr + start + offsets, mask=inside, other=0.0)
        r = tl.load(inverse_rms_ptr + first_row + rows_M, mask=rows_M < num_rows - first_row, other=0.0)[:, None]
        normed = (shift + branch * a_h + stream * a_x) * r
        product = dx * normed
        mean = tl.sum(product * weight, 1)[:, None] / D
        dt += r * (weight * dx - normed * mean)
        tl.store(dstream_ptr + start + offsets, dt * a_x, mask=inside)
        tl.store(dbranch_ptr + start + offsets, (dt * a_h).to(dbranch_ptr.dtype.element_ty), mask=inside)
        total += dt
        total_h += dt * branch
        total_s += dt * stream
        total_w += product
    columns_D = tl.arange(0, BLOCK_D)
    own_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * (4 * D) + columns_D
    tl.store(own_ptr, tl.sum(total, 0), mask=columns_D < D)
    tl.store(own_ptr + D, tl.sum(total_h, 0), mask=columns_D < D)
    tl.store(own_ptr + 2 * D, tl.sum(total_s, 0), mask=columns_D < D)
    tl.store(own_ptr + 3 * D, tl.sum(total_w, 0), mask=columns_D < D)


@triton.jit
def _residual_norm_bwd_vectors_kernel(partials_ptr, branch_scale_ptr, branch_bias_ptr, stream_scale_ptr, stream_bias_ptr,
                                      dbranch_scale_ptr, dbranch_bias_ptr, dstream_scale_ptr, dstream_bias_ptr, dweight_ptr, num_partials,
                                      D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    columns_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_D = columns_D < D
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    sums_h, sums_s, sums_w = sums, sums, sums
    for first in range(0, num_partials, BLOCK_P):
        rows_P = first + tl.arange(0, BLOCK_P)
        offsets = rows_P[:, None] * (4 * D) + columns_D[None, :]
        inside = (rows_P < num_partials)[:, None] & mask_D[None, :]
        sums += tl.load(partials_ptr + offsets, mask=inside, other=0.0)
        sums_h += tl.load(partials_ptr + D + offsets, mask=inside, other=0.0)
        sums_s += tl.load(partials_ptr + 2 * D + offsets, mask=inside, other=0.0)
        sums_w += tl.load(partials_ptr + 3 * D + offsets, mask=inside, other=0.0)
    total, total_h, total_s, dweight = tl.sum(sums, 0), tl.sum(sums_h, 0), tl.sum(sums_s, 0), tl.sum(sums_w, 0)
    a_h = tl.load(branch_scale_ptr + columns_D, mask=mask_D, other=0.0).to(tl.float32)
    b_h = tl.load(branch_bias_ptr + columns_D, mask=mask_D, other=0.0).to(tl.float32)
    a_x = tl.load(stream_scale_ptr + columns_D, mask=mask_D, other=0.0).to(tl.float32)
    b_x = tl.load(stream_bias_ptr + columns_D, mask=mask_D, other=0.0).to(tl.float32)
    tl.store(dbranch_scale_ptr + columns_D, (total_h + b_h * total).to(dbranch_scale_ptr.dtype.element_ty), mask=mask_D)
    tl.store(dbranch_bias_ptr + columns_D, (a_h * total).to(dbranch_bias_ptr.dtype.element_ty), mask=mask_D)
    tl.store(dstream_scale_ptr + columns_D, (total_s + b_x * total).to(dstream_scale_ptr.dtype.element_ty), mask=mask_D)
    tl.store(dstream_bias_ptr + columns_D, (a_x * total).to(dstream_bias_ptr.dtype.element_ty), mask=mask_D)
    tl.store(dweight_ptr + columns_D, dweight.to(dweight_ptr.dtype.element_ty), mask=mask_D)


@triton.jit
def _rms_norm_fwd_kernel(x_ptr, weight_ptr, out_ptr, inverse_rms_ptr, num_rows, num_cus, eps, D: tl.constexpr, BLOCK_D: tl.constexpr,
                         TILE: tl.constexpr, PROGRAMS_PER_CU: tl.constexpr, PREFETCH: tl.constexpr):
    weight = _vector(weight_ptr, D, BLOCK_D)
    BLOCK_M: tl.constexpr = (TILE + BLOCK_D - 1) // BLOCK_D  # rows at a time; both are powers of two
    rows_M = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_cus * PROGRAMS_PER_CU, num_stages=PREFETCH):
        first_row = tile * BLOCK_M
        start, offsets, inside = _tile(first_row, num_rows, D, BLOCK_M, BLOCK_D)
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        out = x * inverse_rms[:, None] * weight
        tl.store(out_ptr + start + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(inverse_rms_ptr + first_row + rows_M, inverse_rms, mask=rows_M < num_rows - first_row)


@triton.jit
def _rms_norm_bwd_kernel(dout_ptr, x_ptr, inverse_rms_ptr, weight_ptr, dx_ptr, partials_ptr, num_rows, num_cus, D: tl.constexpr,
                         BLOCK_D: tl.constexpr, TILE: tl.constexpr, PROGRAMS_PER_CU: tl.constexpr, PREFETCH: tl.constexpr):
    """partials (P, D): each program's sum over its rows of dout x r."""
    weight = _vector(weight_ptr, D, BLOCK_D)
    BLOCK_M: tl.constexpr = (TILE + BLOCK_D - 1) // BLOCK_D  # rows at a time; both are powers of two
    rows_M = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_cus * PROGRAMS_PER_CU, num_stages=PREFETCH):
        first_row = tile * BLOCK_M
        start, offsets, inside = _tile(first_row, num_rows, D, BLOCK_M, BLOCK_D)
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse_rms_ptr + first_row + rows_M, mask=rows_M < num_rows - first_row, other=0.0)[:, None]
        normed = x * r
        product = dout * normed
        mean = tl.sum(product * weight, 1)[:, None] / D
        dx = r * (weight * dout - normed * mean)
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        total += product
    columns_D = tl.arange(0, BLOCK_D)
    own_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * D + columns_D
    tl.store(own_ptr, tl.sum(total, 0), mask=columns_D < D)


@triton.jit
def _rms_norm_bwd_weight_kernel(partials_ptr, dweight_ptr, num_partials, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    columns_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_D = columns_D < D
    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, num_partials, BLOCK_P):
        rows_P = first + tl.arange(0, BLOCK_P)
        inside = (rows_P < num_partials)[:, None] & mask_D[None, :]
        sums += tl.load(partials_ptr + rows_P[:, None] * D + columns_D[None, :], mask=inside, other=0.0)
    tl.store(dweight_ptr + columns_D, tl.sum(sums, 0).to(dweight_ptr.dtype.element_ty), mask=mask_D)


# ---------------------------------------------------------------------------------------------------------------- ops


def residual_norm(stream: Tensor, branch: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], norm_weight: Tensor,
                  eps: float) -> tuple[Tensor, Tensor]:
    """The new stream (..., D), fp32, and its RMSNorm (..., D) in norm_weight's dtype; ValueError for what the kernels do not take.

    stream (..., D) fp32, branch (..., D) fp32, bf16 or fp16; scales = (branch_scale, branch_bias, stream_scale, stream_bias), each (D,).
    """
    _check_rows("stream", stream, (torch.float32,))
    check("branch", branch, shape=tuple(stream.shape), dtypes=FLOATS, device=stream.device)
    names = ("branch_scale", "branch_bias", "stream_scale", "stream_bias", "norm_weight")
    for name, vector in zip(names, (*scales, norm_weight), strict=True):
        check(name, vector, shape=stream.shape[-1:], dtypes=FLOATS, device=stream.device)
    return _ResidualNorm.apply(stream, branch, *scales, norm_weight, eps)


class _ResidualNorm(torch.autograd.Function):
    """Saves stream, branch, the five vectors and r."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, branch: Tensor, a_h: Tensor, b_h: Tensor, a_x: Tensor, b_x: Tensor, weight: Tensor,
                eps: float) -> tuple[Tensor, Tensor]:
        new, x = torch.empty_like(stream), torch.empty_like(stream, dtype=weight.dtype)
        inverse_rms = stream.new_empty(stream.shape[:-1])
        grid, sizes, chosen = _rows_grid(_residual_norm_fwd_kernel, stream)
        launch(_residual_norm_fwd_kernel, grid, {
            "stream_ptr": stream, "branch_ptr": branch, **_vectors(a_h, b_h, a_x, b_x), "weight_ptr": weight, "new_ptr": new,
            "x_ptr": x, "inverse_rms_ptr": inverse_rms, "eps": eps, **sizes}, chosen)
        ctx.save_for_backward(stream, branch, a_h, b_h, a_x, b_x, weight, inverse_rms)
        return new, x

    @staticmethod
    def backward(ctx: Any, dnew: Tensor, dx: Tensor) -> tuple[Tensor | None, ...]:
        stream, branch, a_h, b_h, a_x, b_x, weight, inverse_rms = ctx.saved_tensors
        D, device = stream.shape[-1], stream.device
        dstream, dbranch = torch.empty_like(stream), torch.empty_like(branch)
        grid, sizes, chosen = _rows_grid(_residual_norm_bwd_kernel, stream)
        partials = stream.new_empty(grid[0], 4, D)
        vectors = _vectors(a_h, b_h, a_x, b_x)
        launch(_residual_norm_bwd_kernel, grid, {
            "dnew_ptr": dnew.contiguous(), "dx_ptr": dx.contiguous(), "stream_ptr": stream, "branch_ptr": branch,
            "inverse_rms_ptr": inverse_rms, **vectors, "weight_ptr": weight, "dstream_ptr": dstream, "dbranch_ptr": dbranch,
            "partials_ptr": partials, **sizes}, chosen)
        grads = [torch.empty_like(vector) for vector in (a_h, b_h, a_x, b_x, weight)]
        chosen = config(_residual_norm_bwd_vectors_kernel, target(device))
        launch(_residual_norm_bwd_vectors_kernel, (triton.cdiv(D, chosen.blocks["BLOCK_D"]),), {
            "partials_ptr": partials, **vectors, **{f"d{name}": grad for name, grad in zip(vectors, grads)}, "dweight_ptr": grads[4],
            "num_partials": grid[0], "D": D}, chosen)
        return dstream, dbranch, *grads, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim D, in weight's dtype; x (..., D) and weight (D,) fp32, bf16 or fp16, else ValueError."""
    _check_rows("x", x, FLOATS)
    check("weight", weight, shape=x.shape[-1:], dtypes=FLOATS, device=x.device)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Saves x, weight and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, dtype=weight.dtype)
        inverse_rms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        grid, sizes, chosen = _rows_grid(_rms_norm_fwd_kernel, x)
        launch(_rms_norm_fwd_kernel, grid, {"x_ptr": x, "weight_ptr": weight, "out_ptr": out, "inverse_rms_ptr": inverse_rms, "eps": eps,
                                            **sizes}, chosen)
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        D = x.shape[-1]
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        grid, sizes, chosen = _rows_grid(_rms_norm_bwd_kernel, x)
        partials = torch.empty(grid[0], D, dtype=torch.float32, device=x.device)
        launch(_rms_norm_bwd_kernel, grid, {"dout_ptr": dout.contiguous(), "x_ptr": x, "inverse_rms_ptr": inverse_rms, "weight_ptr": weight,
                                            "dx_ptr": dx, "partials_ptr": partials, **sizes}, chosen)
        chosen = config(_rms_norm_bwd_weight_kernel, target(x.device))
        launch(_rms_norm_bwd_weight_kernel, (triton.cdiv(D, chosen.blocks["BLOCK_D"]),), {
            "partials_ptr": partials, "dweight_ptr": dweight, "num_partials": grid[0], "D": D}, chosen)
        return dx, dweight, None


def _vectors(a_h: Tensor, b_h: Tensor, a_x: Tensor, b_x: Tensor) -> dict[str, Tensor]:
    return {"branch_scale_ptr": a_h, "branch_bias_ptr": b_h, "stream_scale_ptr": a_x, "stream_bias_ptr": b_x}


def _rows_grid(kernel: Any, rows: Tensor) -> tuple[tuple[int], dict[str, int], Config]:
    """The persistent grid of a kernel over rows (..., D), the sizes it takes, and its configuration."""
    D = rows.shape[-1]
    num_rows, block = rows.numel() // D, triton.next_power_of_2(D)
    chip: Target = target(rows.device)
    chosen = config(kernel, chip, BLOCK_D=block, aligned=D % 8 == 0)  # 8 bf16 are a load of 16 bytes
    programs = min(triton.cdiv(num_rows, triton.cdiv(chosen.blocks["TILE"], block)), chip.num_cus * chosen.blocks["PROGRAMS_PER_CU"])
    # One program even for no rows: it writes partial sums of zero.
    return (max(programs, 1),), {"num_rows": num_rows, "num_cus": chip.num_cus, "D": D, "BLOCK_D": block}, chosen


def _check_rows(name: str, rows: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check(name, rows, dtypes=dtypes)
    if rows.dim() == 0 or not 0 < rows.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected a last dim of 1 to {MAX_WIDTH}")
