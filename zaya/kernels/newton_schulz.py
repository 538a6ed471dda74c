"""Newton-Schulz: makes every matrix of a batch nearly orthogonal, which is Muon's update, with all products on the matrix cores.

From X = M / max(||M||_F, eps), on the wide side (rows n <= cols m; a tall matrix is worked on transposed), each step is

    A = X X^T;   S = b A + c A A;   X <- a X + S X        (a, b, c: Jordan et al. 2024)

in three launches over the whole batch. A and A A = A A^T are symmetric: their kernel computes only the tiles on and below the diagonal
and stores each twice, once mirrored, so a step costs n^2 m + n^3 + 2 n^2 m operations instead of 2 n^2 m + 2 n^3 + 2 n^2 m: two thirds
for a square matrix. b A is added to the sums in fp32 registers, and in the last product the sums start at a X; A, S and X are rounded
once, when stored.

The Frobenius norm takes two stages: sums of squares of row strips, in fp32, which then every tile of the scaled copy adds up in the same
order. That copy is also where a tall matrix is turned, for nothing, and where rows and columns are padded with zeros to whole tiles. Zeros
stay zeros through every step, so no loop needs a mask. The last product stores into the shape and orientation of the input.

Saves nothing: there is no backward.

Letters: B matrices, n rows and m columns on the wide side, N and M the same padded, P strips.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import FLOATS, check
from zaya.kernels.launch import Config, Target, config, launch, target
from zaya.kernels.reference import NEWTON_SCHULZ

MAX_MATRICES = 65535  # the second and third side of a grid on CUDA
# Speed of a compute unit by tile, relative to the largest: operations per byte that a tile loads grow with its side.
RATES = {"large": 1.0, "medium": 0.8, "small": 0.45}


# ---------------------------------------------------------------------------------------------------------------- norm and scale


@triton.jit
def _newton_schulz_squares_kernel(source_ptr, sums_ptr, P, rows, cols, batch_stride, row_stride, col_stride,
                                  BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums (B, P): of squares of BLOCK_R rows."""
    batch, strip = tl.program_id(1), tl.program_id(0)
    r = strip * BLOCK_R + tl.arange(0, BLOCK_R)
    source_ptr += batch.to(tl.int64) * batch_stride
    row_ptrs = source_ptr + r.to(tl.int64)[:, None] * row_stride
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, cols, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = tl.load(row_ptrs + c.to(tl.int64)[None, :] * col_stride, mask=(r < rows)[:, None] & (c < cols)[None, :], other=0.0)
        x = x.to(tl.float32)
        total += x * x
    tl.store(sums_ptr + batch * P + strip, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _newton_schulz_scale_kernel(source_ptr, sums_ptr, x_ptr, n, m, N, M, batch_stride, n_stride, m_stride, eps, P, P_POWER: tl.constexpr,
                                BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """x (B, N, M) contiguous: source over its norm, zero outside (n, m)."""
    batch = tl.program_id(2).to(tl.int64)
    strips = tl.arange(0, P_POWER)
    square = tl.sum(tl.load(sums_ptr + batch * P + strips, mask=strips < P, other=0.0), 0)
    norm = tl.maximum(tl.sqrt(square), eps)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    source = source_ptr + batch * batch_stride + i.to(tl.int64)[:, None] * n_stride + j.to(tl.int64)[None, :] * m_stride
    x = tl.load(source, mask=(i < n)[:, None] & (j < m)[None, :], other=0.0).to(tl.float32) / norm
    tl.store(x_ptr + batch * N * M + i[:, None] * M + j[None, :], x.to(x_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------------- products


@triton.jit
def _on_one_die(program, programs, NUM_XCDS: tl.constexpr):
    """Programs go round-robin over the dies; renumbered, each die gets a run of neighbours, which share its L2."""
    die, place = program % NUM_XCDS, program // NUM_XCDS
    return die * (programs // NUM_XCDS) + tl.minimum(die, programs % NUM_XCDS) + place


@triton.jit
def _newton_schulz_gram_kernel(x_ptr, out_ptr, programs, N, K, b, c, POLYNOMIAL: tl.constexpr, NUM_XCDS: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out (B, N, N) = x x^T, of x (B, N, K); as a POLYNOMIAL c x x^T + b x, of symmetric x (K = N)."""
    tl.assume(K > 0)
    side = N // BLOCK_M
    tiles = side * (side + 1) // 2
    program = _on_one_die(tl.program_id(0), programs, NUM_XCDS)
    batch, tile = (program // tiles).to(tl.int64), program % tiles
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # of the triangle: row (row + 1) / 2 tiles stand above; the root may be
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)  # off by its rounding
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    x_ptr += batch * N * K
    i = row * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    left_ptrs, right_ptrs = x_ptr + i[:, None] * K + k[None, :], x_ptr + j[None, :] * K + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for _ in range(0, K, BLOCK_K):
        product = tl.dot(tl.load(left_ptrs), tl.load(right_ptrs), product, input_precision="ieee")
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K
    if POLYNOMIAL:
        product = c * product + b * tl.load(x_ptr + i[:, None] * K + j[None, :]).to(tl.float32)
    product = product.to(out_ptr.dtype.element_ty)
    out_ptr += batch * N * N
    tl.store(out_ptr + i[:, None] * N + j[None, :], product)
    if row != column:
        tl.store(out_ptr + j[None, :] * N + i[:, None], product)


@triton.jit
def _newton_schulz_update_kernel(s_ptr, x_ptr, out_ptr, programs, N, M, n, m, out_batch_stride, out_n_stride, out_m_stride,
                                 a, RAGGED: tl.constexpr, NUM_XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                 BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):
    """out (B, n, m), any strides, = a x + s x, of s (B, N, N) and x (B, N, M); RAGGED where (n, m) is not (N, M)."""
    tl.assume(N >= BLOCK_M)
    rows, columns = N // BLOCK_M, M // BLOCK_N
    program = _on_one_die(tl.program_id(0), programs, NUM_XCDS)
    batch, tile = (program // (rows * columns)).to(tl.int64), program % (rows * columns)
    group = tile // (GROUP_M * columns)  # GROUP_M tiles below each other, then the next column: square-ish runs load least
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * columns)
    i = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    s_ptr += batch * N * N
    x_ptr += batch * N * M
    s_ptrs, x_ptrs = s_ptr + i[:, None] * N + k[None, :], x_ptr + k[:, None] * M + j[None, :]
    product = a * tl.load(x_ptr + i[:, None] * M + j[None, :]).to(tl.float32)
    for _ in range(0, N, BLOCK_K):
        product = tl.dot(tl.load(s_ptrs), tl.load(x_ptrs), product, input_precision="ieee")
        s_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * M
    out = out_ptr + batch * out_batch_stride + i[:, None] * out_n_stride + j[None, :] * out_m_stride
    if RAGGED:
        tl.store(out, product.to(out_ptr.dtype.element_ty), mask=(i < n)[:, None] & (j < m)[None, :])
    else:
        tl.store(out, product.to(out_ptr.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------------- op


@torch.no_grad()
def newton_schulz(matrices: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalise each matrix of (..., rows, cols), any strides; bf16, fp16 or fp32 in and out, fp32 sums. Contiguous, no gradient.

    Singular values end near 1, not at it. Needs memory for two copies and, at the smaller side n, two n x n matrices of each.
    """
    check("matrices", matrices, dtypes=FLOATS, contiguous=False)
    if matrices.dim() < 2 or 0 in matrices.shape[-2:]:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}, expected (..., rows, cols), rows and cols at least 1")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    if matrices.numel() == 0:
        return torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    source = _on_wide_side(matrices)
    size = _size(source, target(source.device))
    if math.prod(_padded(source.shape, target(source.device), size)) >= 2**31 or len(source) > MAX_MATRICES:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}, expected at most {MAX_MATRICES} matrices (a grid's side), each of "
                         "fewer than 2^31 elements in whole tiles (int32 offsets)")
    result = torch.empty(matrices.shape, dtype=matrices.dtype, device=matrices.device)
    out = _on_wide_side(result)  # a view
    x = _scaled(source, eps, size)
    for step in range(steps):
        gram = _gram(x, size)
        polynomial = _gram(gram, size, polynomial=True)
        x = _update(polynomial, x, out if step == steps - 1 else torch.empty_like(x), size)
    return result


def _on_wide_side(matrices: Tensor) -> Tensor:
    """(B, n, m), n <= m."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return flat.mT if flat.shape[1] > flat.shape[2] else flat


def _configs(chip: Target, size: str) -> tuple[Config, Config]:
    return config(_newton_schulz_gram_kernel, chip, size=size), config(_newton_schulz_update_kernel, chip, size=size)


def _padded(shape: torch.Size, chip: Target, size: str) -> tuple[int, int]:
    """N and M: whole tiles of both products, whose sides are powers of two."""
    gram, update = (each.blocks for each in _configs(chip, size))
    n_tile = max(gram["BLOCK_M"], update["BLOCK_M"], gram["BLOCK_K"], update["BLOCK_K"])
    m_tile = max(update["BLOCK_N"], gram["BLOCK_K"])
    return -(-shape[-2] // n_tile) * n_tile, -(-shape[-1] // m_tile) * m_tile


def _size(source: Tensor, chip: Target) -> str:
    """The tiles with which the busiest compute unit is done first: large ones are fast, small ones waste and idle less."""

    def cost(size: str) -> float:
        N, M = _padded(source.shape, chip, size)
        gram, update = (each.blocks for each in _configs(chip, size))
        side = N // gram["BLOCK_M"]
        gram_tiles = -(-len(source) * side * (side + 1) // 2 // chip.num_cus)
        update_tiles = -(-len(source) * (N // update["BLOCK_M"]) * (M // update["BLOCK_N"]) // chip.num_cus)
        gram_work = gram_tiles * gram["BLOCK_M"] ** 2 * (M + N)
        return (gram_work + update_tiles * update["BLOCK_M"] * update["BLOCK_N"] * N) / RATES[size]

    return min(RATES, key=cost)


def _scaled(source: Tensor, eps: float, size: str) -> Tensor:
    """x (B, N, M): source (B, n, m), any strides, over its norm, padded with zeros."""
    B, n, m = source.shape
    chip = target(source.device)
    strips = source if source.stride(2) == 1 or source.stride(1) != 1 else source.mT  # the norm does not care; loads do
    squares = config(_newton_schulz_squares_kernel, chip)
    P = triton.cdiv(strips.shape[1], squares.blocks["BLOCK_R"])
    sums = torch.empty(B, P, dtype=torch.float32, device=source.device)
    launch(_newton_schulz_squares_kernel, (P, B), {
        "source_ptr": strips, "sums_ptr": sums, "P": P, "rows": strips.shape[1], "cols": strips.shape[2],
        "batch_stride": strips.stride(0), "row_stride": strips.stride(1), "col_stride": strips.stride(2)}, squares)
    N, M = _padded(source.shape, chip, size)
    x = torch.empty(B, N, M, dtype=source.dtype, device=source.device)
    tiles = config(_newton_schulz_scale_kernel, chip)
    grid = (N // tiles.blocks["BLOCK_N"], M // tiles.blocks["BLOCK_M"], B)
    launch(_newton_schulz_scale_kernel, grid, {
        "source_ptr": source, "sums_ptr": sums, "x_ptr": x, "n": n, "m": m, "N": N, "M": M, "batch_stride": source.stride(0),
        "n_stride": source.stride(1), "m_stride": source.stride(2), "eps": eps, "P": P, "P_POWER": triton.next_power_of_2(P)}, tiles)
    return x


def _gram(x: Tensor, size: str, polynomial: bool = False) -> Tensor:
    """x x^T (B, N, N), or b x + c x x^T of symmetric x."""
    B, N, K = x.shape
    chip = target(x.device)
    tiles = _configs(chip, size)[0]
    out = torch.empty(B, N, N, dtype=x.dtype, device=x.device)
    side = N // tiles.blocks["BLOCK_M"]
    _, b, c = NEWTON_SCHULZ
    programs = B * side * (side + 1) // 2
    launch(_newton_schulz_gram_kernel, (programs,), {
        "x_ptr": x, "out_ptr": out, "programs": programs, "N": N, "K": K, "b": b, "c": c, "POLYNOMIAL": polynomial,
        "NUM_XCDS": chip.num_xcds}, tiles)
    return out


def _update(polynomial: Tensor, x: Tensor, out: Tensor, size: str) -> Tensor:
    """a x + polynomial x into out: padded like x, or the op's result."""
    B, N, M = x.shape
    chip = target(x.device)
    tiles = _configs(chip, size)[1]
    programs = B * (N // tiles.blocks["BLOCK_M"]) * (M // tiles.blocks["BLOCK_N"])
    launch(_newton_schulz_update_kernel, (programs,), {
        "s_ptr": polynomial, "x_ptr": x, "out_ptr": out, "programs": programs, "N": N, "M": M, "n": out.shape[1], "m": out.shape[2],
        "out_batch_stride": out.stride(0), "out_n_stride": out.stride(1), "out_m_stride": out.stride(2), "a": NEWTON_SCHULZ[0],
        "RAGGED": out.shape != x.shape, "NUM_XCDS": chip.num_xcds}, tiles)
    return out
