"""Compressed convolutional attention (arXiv 2510.04476): from projected q~, k~, v to attention-ready q, k, v. See `reference.cca`.

Per head of H channels, x = q~ or k~ of that head, x_(t-j) = 0 where token t's document starts later (position < j):

    u_t = sum over taps j of K_j x_(t-j) + constant + (x_t + other_t) / 2     other: k~ for query heads, q~'s mean over the group for keys
    r_t = sqrt(H) / max(|u_t|, eps);   out_t = R_t (temperature r_t u_t)      R: rotate-half RoPE; temperature 1 for query heads

The two causal convolutions of width 2 (weights w, W; biases b, c) stand next to each other, so they are one of width 3: K_0 = W1 w1,
K_1 = W1 w0 + W0 w1, K_2 = W0 w0, constant = (W0 + W1) b + c. That is 3 matrix products where two convolutions are 2, but its operands
are the tokens as they lie in memory: the products of the two would first have to be built in vector registers, and rounded there.

Backward, with e_t = R_t' dout_t (what the rotation passes back), n = r u, a_t = <dout_t, out_t / temperature> = <e_t, n_t>:

    dtemperature = sum a_t;   dz_t = r_t (temperature e_t - temperature a_t / H n_t)    (no second term where |u| < eps)
    dx_s = sum over taps of K_j' dz_(s+j) + dz_s / 2 + what other heads' means pass back;   dK_j = sum dz_t x_(t-j)';   dconstant = sum dz_t
    dW1 = dK_0 w1 + dK_1 w0 + dconstant b';  dW0 = dK_1 w1 + dK_2 w0 + dconstant b';   dw, db: the same products summed over W's rows

Launches. Forward: fold the convolutions (0.1 MB per head), then one for q, k and v together (or one for k and v, one for q: `begin`).
Backward: n of the key heads once more by the forward kernel (their temperature may be 0, so k does not tell it); dz and partial dK, summed
over a few tokens per program; dx, dv and halos; and the sum of the partials. Saved: inputs, q (which attention keeps as well), r (4 bytes
per head and token), the folded kernels.
dz is written once, because a tile of dx needs it of two tokens of the next tile and of the other heads of the group.

Letters: B batch, T tokens, K chunks of T, L = T / K, C channels, H head dim, N query heads, G key heads. A row is one token of one
chunk; rows of all chunks lie one after the other, as B T does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import check_cca
from zaya.kernels.launch import config, launch, target

Convolutions = tuple[Tensor, Tensor, Tensor, Tensor]
Begin = Callable[[Tensor, Tensor], None]


@triton.jit
def _place(programs, HEADS: tl.constexpr, XCDS: tl.constexpr):
    """(tile, head) of this program: programs of one tile follow each other, on one die, so that they find its tokens in one L2."""
    pid = tl.program_id(0)
    each = tl.cdiv(programs, XCDS)
    unit = (pid % XCDS) * each + pid // XCDS
    return unit // HEADS, unit % HEADS


@triton.jit
def _cca_fold_kernel(q_w_ptr, q_b_ptr, q_W_ptr, q_c_ptr, k_w_ptr, k_b_ptr, k_W_ptr, k_c_ptr, kernel_ptr, transposed_ptr, constant_ptr,
                     N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """kernel (head, tap, H out, H in), transposed (head, tap, H in, H out) and constant (head, H) of BLOCK output channels of a head."""
    head, block = tl.program_id(0), tl.program_id(1)
    is_q = head < N
    own = tl.where(is_q, head, head - N) * H
    w_ptr, b_ptr = tl.where(is_q, q_w_ptr, k_w_ptr), tl.where(is_q, q_b_ptr, k_b_ptr)
    W_ptr, c_ptr = tl.where(is_q, q_W_ptr, k_W_ptr), tl.where(is_q, q_c_ptr, k_c_ptr)
    rows, cols, pair = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, H), tl.arange(0, 2)
    w0, w1 = tl.split(tl.load(w_ptr + (own + cols[:, None]) * 2 + pair[None, :]).to(tl.float32))
    b, c = tl.load(b_ptr + own + cols).to(tl.float32), tl.load(c_ptr + own + rows).to(tl.float32)
    W0, W1 = tl.split(tl.load(W_ptr + ((own + rows)[:, None, None] * H + cols[None, :, None]) * 2 + pair[None, None, :]).to(tl.float32))
    tl.store(constant_ptr + head * H + rows, tl.sum((W0 + W1) * b[None, :], axis=1) + c)
    straight = kernel_ptr + head * 3 * H * H + rows[:, None] * H + cols[None, :]
    across = transposed_ptr + head * 3 * H * H + cols[None, :] * H + rows[:, None]
    K0, K1, K2 = W1 * w1[None, :], W1 * w0[None, :] + W0 * w1[None, :], W0 * w0[None, :]
    tl.store(straight, K0.to(kernel_ptr.dtype.element_ty))
    tl.store(straight + H * H, K1.to(kernel_ptr.dtype.element_ty))
    tl.store(straight + 2 * H * H, K2.to(kernel_ptr.dtype.element_ty))
    tl.store(across, K0.to(kernel_ptr.dtype.element_ty))
    tl.store(across + H * H, K1.to(kernel_ptr.dtype.element_ty))
    tl.store(across + 2 * H * H, K2.to(kernel_ptr.dtype.element_ty))


@triton.jit
def _cca_fwd_kernel(q_ptr, k_ptr, v_ptr, mean_ptr, kernel_ptr, constant_ptr, temperature_ptr, positions_ptr, cos_ptr, sin_ptr,
                    q_halo_ptr, k_halo_ptr, v_halo_ptr, q_out_ptr, k_out_ptr, v_out_ptr, inverse_ptr, q_stride, k_stride, v_stride,
                    length, tiles, programs, rows_total, delayed_start, delayed_end, sqrt_h, eps, FIRST: tl.constexpr, HEADS: tl.constexpr,
                    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
                    XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of tokens of one head: N query heads, G key heads, G value heads; HEADS of them from FIRST on."""
    tile, head = _place(programs, HEADS, XCDS)
    if tile * HEADS + head >= programs:
        return
    head += FIRST
    chunk = tile // tiles
    token = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < length
    row = chunk.to(tl.int64) * length + token
    position = tl.load(positions_ptr + row, mask=real, other=0)
    channel = tl.arange(0, H)
    REP: tl.constexpr = N // G
    if head >= N + G:
        own = (head - N - G) * H + channel
        delayed = (own >= delayed_start) & (own < delayed_end)
        now = tl.load(v_ptr + row[:, None] * v_stride + own[None, :], mask=real[:, None] & ~delayed[None, :], other=0.0)
        passes = (real & (position >= 1))[:, None] & delayed[None, :]
        before = tl.load(v_ptr + (row - 1)[:, None] * v_stride + own[None, :], mask=passes & (token >= 1)[:, None], other=0.0)
        halo_ptr = v_halo_ptr + chunk.to(tl.int64) * (delayed_end - delayed_start) - delayed_start
        halo = tl.load(halo_ptr + own[None, :] + 0 * token[:, None], mask=passes & (token < 1)[:, None], other=0.0)
        before = tl.where((token < 1)[:, None], halo, before)
        tl.store(v_out_ptr + row[:, None] * (G * H) + own[None, :], tl.where(delayed[None, :], before, now), mask=real[:, None])
        return
    is_q = head < N
    own = tl.where(is_q, head, head - N) * H
    x_ptr = tl.where(is_q, q_ptr, k_ptr) + own
    stride, width = tl.where(is_q, q_stride, k_stride), tl.where(is_q, N, G) * H
    halo_ptr = tl.where(is_q, q_halo_ptr, k_halo_ptr) + own
    u = tl.load(x_ptr + row[:, None] * stride + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    if is_q:
        other = tl.load(k_ptr + row[:, None] * k_stride + head // REP * H + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    else:
        if HAS_MEAN:
            other = tl.load(mean_ptr + row[:, None] * (G * H) + own + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        else:
            other = tl.zeros((BLOCK_M, H), tl.float32)
            for member in tl.range(REP, num_stages=1):
                q = tl.load(q_ptr + row[:, None] * q_stride + own * REP + member * H + channel[None, :], mask=real[:, None], other=0.0)
                other += q.to(tl.float32) / REP
    u = 0.5 * (u + other) + tl.load(constant_ptr + head * H + channel)[None, :]
    inner = tl.arange(0, BLOCK_K)
    here_ptr = x_ptr + row[:, None] * stride + inner[None, :]
    weight_ptr = kernel_ptr + head * 3 * H * H + channel[None, :] * H + inner[:, None]
    for step in range(0, 3 * H, BLOCK_K):
        tap, column = step // H, tl.multiple_of(step % H, BLOCK_K)
        reads = real & (position >= tap) & (token >= tap)
        tokens = tl.load(here_ptr + column - tap * stride, mask=reads[:, None], other=0.0)
        weight = tl.load(weight_ptr + tap * (H * H) + column)
        u = tl.dot(tokens, weight, u, input_precision="ieee")
    if tile % tiles == 0:  # The first two tokens of a chunk read its halo: not in the loop, where a choice of rows narrows the loads.
        before_ptr = halo_ptr + (chunk.to(tl.int64) * 2 + token + 2)[:, None] * width + inner[None, :]
        for step in range(H, 3 * H, BLOCK_K):
            tap, column = step // H, tl.multiple_of(step % H, BLOCK_K)
            reads = real & (position >= tap) & (token < tap)
            tokens = tl.load(before_ptr + column - tap * width, mask=reads[:, None], other=0.0)
            weight = tl.load(weight_ptr + tap * (H * H) + column)
            u = tl.dot(tokens, weight, u, input_precision="ieee")
    norm = tl.sqrt(tl.sum(u * u, axis=1))
    inverse = sqrt_h / tl.maximum(norm, eps)
    # The sign tells backward that |u| was clamped.
    tl.store(inverse_ptr + head.to(tl.int64) * rows_total + row, tl.where(norm < eps, -inverse, inverse), mask=real)
    if HAS_TEMPERATURE:
        inverse = inverse * tl.where(is_q, 1.0, tl.load(temperature_ptr + tl.maximum(head - N, 0)).to(tl.float32))
    # Quarters a | b | c | d of the channels: u0 = a | c, u1 = b | d, of which RoPE turns (a, b) and leaves (c, d).
    u0, u1 = tl.split(tl.permute(tl.reshape(u * inverse[:, None], (BLOCK_M, 2, 2, H // 4)), (0, 1, 3, 2)))
    half, angle = tl.arange(0, 2)[None, :, None], tl.arange(0, H // 4)[None, None, :]
    turned = real[:, None, None] & (half == 0)
    cos = tl.load(cos_ptr + row[:, None, None] * (H // 4) + angle + 0 * half, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + row[:, None, None] * (H // 4) + angle + 0 * half, mask=turned, other=0.0)
    out_ptr = tl.where(is_q, q_out_ptr, k_out_ptr) + own + row[:, None, None] * width + half * (H // 2) + angle
    tl.store(out_ptr, (u0 * cos - u1 * sin).to(q_out_ptr.dtype.element_ty), mask=real[:, None, None])
    tl.store(out_ptr + H // 4, (u1 * cos + u0 * sin).to(q_out_ptr.dtype.element_ty), mask=real[:, None, None])


@triton.jit
def _cca_bwd_weight_kernel(q_ptr, k_ptr, q_halo_ptr, k_halo_ptr, q_unit_ptr, k_unit_ptr, dq_ptr, dk_ptr, inverse_ptr, temperature_ptr,
                           positions_ptr, cos_ptr, sin_ptr, dz_ptr, dkernel_ptr, dvector_ptr, q_stride, k_stride, length, tiles,
                           tiles_total, tiles_each, splits, rows_total, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
                           BLOCK_M: tl.constexpr, PARTS: tl.constexpr):
    """dz of the tokens of one split, one head, and their part of dK (tap, H in, H out), dconstant and dtemperature.

    PARTS > 1: as many programs share dK's input channels, where one has not the registers for 3 H H sums; the first writes all else."""
    part, unit = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    head, split = unit % (N + G), unit // (N + G)
    is_q = head < N
    own = tl.where(is_q, head, head - N) * H
    stride, width = tl.where(is_q, q_stride, k_stride), tl.where(is_q, N, G) * H
    x_ptr, halo_ptr = tl.where(is_q, q_ptr, k_ptr) + own, tl.where(is_q, q_halo_ptr, k_halo_ptr) + own
    unit_ptr, dout_ptr = tl.where(is_q, q_unit_ptr, k_unit_ptr) + own, tl.where(is_q, dq_ptr, dk_ptr) + own
    temperature = tl.where(is_q, 1.0, tl.load(temperature_ptr + tl.maximum(head - N, 0)).to(tl.float32))
    half, angle = tl.arange(0, 2)[None, :, None], tl.arange(0, H // 4)[None, None, :]
    HIN: tl.constexpr = H // PARTS
    inner, channel = part * HIN + tl.arange(0, HIN), tl.arange(0, H)
    dK0, dK1, dK2 = tl.zeros((HIN, H), tl.float32), tl.zeros((HIN, H), tl.float32), tl.zeros((HIN, H), tl.float32)
    dconstant0, dconstant1 = tl.zeros((BLOCK_M, 2, H // 4), tl.float32), tl.zeros((BLOCK_M, 2, H // 4), tl.float32)
    dtemperature = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(split * tiles_each, tl.minimum(split * tiles_each + tiles_each, tiles_total)):
        chunk = tile // tiles
        token = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        real = token < length
        row = chunk.to(tl.int64) * length + token
        position = tl.load(positions_ptr + row, mask=real, other=0)
        inverse = tl.load(inverse_ptr + head.to(tl.int64) * rows_total + row, mask=real, other=0.0)
        real3, row3 = real[:, None, None], row[:, None, None]
        first = row3 * width + half * (H // 2) + angle  # quarters a | c; b | d lie H / 4 further
        dout0 = tl.load(dout_ptr + first, mask=real3, other=0.0).to(tl.float32)
        dout1 = tl.load(dout_ptr + first + H // 4, mask=real3, other=0.0).to(tl.float32)
        unit0 = tl.load(unit_ptr + first, mask=real3, other=0.0).to(tl.float32)
        unit1 = tl.load(unit_ptr + first + H // 4, mask=real3, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row3 * (H // 4) + angle + 0 * half, mask=real3 & (half == 0), other=1.0)
        sin = tl.load(sin_ptr + row3 * (H // 4) + angle + 0 * half, mask=real3 & (half == 0), other=0.0)
        along = tl.sum(tl.sum(dout0 * unit0 + dout1 * unit1, axis=2), axis=1)
        dtemperature += along
        scale = (tl.abs(inverse) * temperature)[:, None, None]
        radial = tl.where(inverse > 0.0, along / H, 0.0)[:, None, None]
        e0, e1 = scale * (dout0 - radial * unit0), scale * (dout1 - radial * unit1)
        dz0, dz1 = e0 * cos + e1 * sin, e1 * cos - e0 * sin
        dconstant0 += dz0
        dconstant1 += dz1
        low0, low1 = dz0.to(dz_ptr.dtype.element_ty), dz1.to(dz_ptr.dtype.element_ty)
        to_ptr = dz_ptr + row3 * ((N + G) * H) + head * H + half * (H // 2) + angle
        if part == 0:
            tl.store(to_ptr, low0, mask=real3)
            tl.store(to_ptr + H // 4, low1, mask=real3)
        dz = tl.reshape(tl.permute(tl.join(low0, low1), (0, 1, 3, 2)), (BLOCK_M, H))
        here_ptr = x_ptr + row[:, None] * stride + inner[None, :]
        halo_row_ptr = halo_ptr + (chunk.to(tl.int64) * 2 + token)[:, None] * width + inner[None, :]
        x0 = tl.load(here_ptr, mask=real[:, None], other=0.0)
        reads1, reads2 = (real & (position >= 1))[:, None], (real & (position >= 2))[:, None]
        inside1, inside2 = (token >= 1)[:, None], (token >= 2)[:, None]
        x1 = tl.load(here_ptr - stride, mask=reads1 & inside1, other=0.0)
        x2 = tl.load(here_ptr - 2 * stride, mask=reads2 & inside2, other=0.0)
        x1 = tl.where(inside1, x1, tl.load(halo_row_ptr + width, mask=reads1 & ~inside1, other=0.0))
        x2 = tl.where(inside2, x2, tl.load(halo_row_ptr, mask=reads2 & ~inside2, other=0.0))
        dK0 = tl.dot(tl.trans(x0), dz, dK0, input_precision="ieee")
        dK1 = tl.dot(tl.trans(x1), dz, dK1, input_precision="ieee")
        dK2 = tl.dot(tl.trans(x2), dz, dK2, input_precision="ieee")
    place = (head * splits + split).to(tl.int64)
    to_ptr = dkernel_ptr + place * (3 * H * H) + inner[:, None] * H + channel[None, :]
    tl.store(to_ptr, dK0)
    tl.store(to_ptr + H * H, dK1)
    tl.store(to_ptr + 2 * H * H, dK2)
    if part == 0:
        vector_ptr = dvector_ptr + place * (2 * H)
        quarters = vector_ptr + half * (H // 2) + angle
        tl.store(quarters, tl.sum(dconstant0, axis=0)[None])
        tl.store(quarters + H // 4, tl.sum(dconstant1, axis=0)[None])
        tl.store(vector_ptr + H + channel, tl.where(channel == 0, tl.sum(dtemperature), 0.0))


@triton.jit
def _cca_bwd_input_kernel(dz_ptr, dv_out_ptr, transposed_ptr, positions_ptr, dq_ptr, dk_ptr, dv_ptr, dmean_ptr, dq_halo_ptr,
                          dk_halo_ptr, dv_halo_ptr, length, tiles, programs, delayed_start, delayed_end, N: tl.constexpr, G: tl.constexpr,
                          H: tl.constexpr, HAS_MEAN: tl.constexpr, HALO: tl.constexpr, XCDS: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_K: tl.constexpr):
    """dx of one tile of tokens of one head, query, key or value; with HALO = 2 a chunk starts at token -2, the first of its halo."""
    HEADS: tl.constexpr = N + 2 * G
    REP: tl.constexpr = N // G
    tile, head = _place(programs, HEADS, XCDS)
    if tile * HEADS + head >= programs:
        return
    chunk = tile // tiles
    token = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M) - HALO
    real = (token >= 0) & (token < length)
    row = chunk.to(tl.int64) * length + token
    channel = tl.arange(0, H)
    if head >= N + G:
        own = (head - N - G) * H + channel
        delayed = (own >= delayed_start) & (own < delayed_end)
        later = (token + 1 >= 0) & (token + 1 < length)
        passes = later & (tl.load(positions_ptr + row + 1, mask=later, other=0) >= 1)
        dout_ptr = dv_out_ptr + row[:, None] * (G * H) + own[None, :]
        now = tl.load(dout_ptr, mask=real[:, None] & ~delayed[None, :], other=0.0)
        after = tl.load(dout_ptr + G * H, mask=passes[:, None] & delayed[None, :], other=0.0)
        tl.store(dv_ptr + row[:, None] * (G * H) + own[None, :], tl.where(delayed[None, :], after, now), mask=real[:, None])
        if HALO > 0:
            halo_ptr = dv_halo_ptr + chunk.to(tl.int64) * (delayed_end - delayed_start) - delayed_start + own[None, :]
            tl.store(halo_ptr + 0 * row[:, None], after, mask=(token == -1)[:, None] & delayed[None, :])
        return
    is_q = head < N
    own = tl.where(is_q, head, head - N) * H
    width = tl.where(is_q, N, G) * H
    here_ptr = dz_ptr + row[:, None] * ((N + G) * H)
    dx = 0.5 * tl.load(here_ptr + head * H + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    if is_q:
        if not HAS_MEAN:
            key = tl.load(here_ptr + (N + head // REP) * H + channel[None, :], mask=real[:, None], other=0.0).to(tl.float32)
            dx += 0.5 / REP * key
    else:
        if HAS_MEAN:
            to_ptr = dmean_ptr + row[:, None] * (G * H) + own + channel[None, :]
            tl.store(to_ptr, dx.to(dmean_ptr.dtype.element_ty), mask=real[:, None])
        for member in tl.range(REP, num_stages=1):
            query = tl.load(here_ptr + (own * REP + member * H) + channel[None, :], mask=real[:, None], other=0.0)
            dx += 0.5 * query.to(tl.float32)
    # Bit `tap`: the token that reads this one through the tap, so much later, is of this chunk and document.
    readers = ((token >= 0) & (token < length)).to(tl.int32)
    for later in tl.static_range(1, 3):
        inside = (token + later >= 0) & (token + later < length)
        readers += (inside & (tl.load(positions_ptr + row + later, mask=inside, other=0) >= later)).to(tl.int32) << later
    inner = tl.arange(0, BLOCK_K)
    weight_ptr = transposed_ptr + head * 3 * H * H + channel[None, :] * H + inner[:, None]
    for step in range(0, 3 * H, BLOCK_K):
        tap, column = step // H, tl.multiple_of(step % H, BLOCK_K)
        reads = (readers >> tap) & 1 != 0
        dz = tl.load(here_ptr + tap * ((N + G) * H) + head * H + column + inner[None, :], mask=reads[:, None], other=0.0)
        weight = tl.load(weight_ptr + tap * (H * H) + column)
        dx = tl.dot(dz, weight, dx, input_precision="ieee")
    dx = dx.to(dq_ptr.dtype.element_ty)
    tl.store(tl.where(is_q, dq_ptr, dk_ptr) + own + row[:, None] * width + channel[None, :], dx, mask=real[:, None])
    if HALO > 0:
        halo_ptr = tl.where(is_q, dq_halo_ptr, dk_halo_ptr) + own + (chunk.to(tl.int64) * 2 + token + 2)[:, None] * width + channel[None, :]
        tl.store(halo_ptr, dx, mask=(token < 0)[:, None])


@triton.jit
def _cca_bwd_reduce_kernel(dkernel_ptr, dvector_ptr, q_w_ptr, q_b_ptr, q_W_ptr, k_w_ptr, k_b_ptr, k_W_ptr, dq_w_ptr, dq_b_ptr, dq_W_ptr,
                           dq_c_ptr, dk_w_ptr, dk_b_ptr, dk_W_ptr, dk_c_ptr, dtemperature_ptr, splits, N: tl.constexpr, H: tl.constexpr,
                           BLOCK: tl.constexpr):
    """Sums the splits' parts, always in one order, for BLOCK input channels of a head, and passes them through the fold."""
    head, block = tl.program_id(0), tl.program_id(1)
    is_q = head < N
    own = tl.where(is_q, head, head - N) * H
    rows, cols, pair = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, H), tl.arange(0, 2)
    part_ptr = dkernel_ptr + (head * splits).to(tl.int64) * (3 * H * H) + rows[:, None] * H + cols[None, :]
    vector_ptr = dvector_ptr + (head * splits).to(tl.int64) * (2 * H) + cols
    dK0, dK1, dK2 = tl.zeros((BLOCK, H), tl.float32), tl.zeros((BLOCK, H), tl.float32), tl.zeros((BLOCK, H), tl.float32)
    dconstant, dtemperature = tl.zeros((H,), tl.float32), tl.zeros((H,), tl.float32)
    for _ in range(splits):
        dK0 += tl.load(part_ptr)
        dK1 += tl.load(part_ptr + H * H)
        dK2 += tl.load(part_ptr + 2 * H * H)
        dconstant += tl.load(vector_ptr)
        dtemperature += tl.load(vector_ptr + H)
        part_ptr += 3 * H * H
        vector_ptr += 2 * H
    w_ptr, b_ptr, W_ptr = tl.where(is_q, q_w_ptr, k_w_ptr), tl.where(is_q, q_b_ptr, k_b_ptr), tl.where(is_q, q_W_ptr, k_W_ptr)
    dw_ptr, db_ptr = tl.where(is_q, dq_w_ptr, dk_w_ptr), tl.where(is_q, dq_b_ptr, dk_b_ptr)
    dW_ptr, dc_ptr = tl.where(is_q, dq_W_ptr, dk_W_ptr), tl.where(is_q, dq_c_ptr, dk_c_ptr)
    # Here rows are W's columns (input channels), so that every sum over W's rows stays inside the program.
    vectors = (own + rows)[:, None] * 2 + pair[None, :]
    matrices = ((own + cols)[None, :, None] * H + rows[:, None, None]) * 2 + pair[None, None, :]
    w0, w1 = tl.split(tl.load(w_ptr + vectors).to(tl.float32))
    W0, W1 = tl.split(tl.load(W_ptr + matrices).to(tl.float32))
    b = tl.load(b_ptr + own + rows).to(tl.float32)
    constants = dconstant[None, :] * b[:, None]
    dW0, dW1 = dK1 * w1[:, None] + dK2 * w0[:, None] + constants, dK0 * w1[:, None] + dK1 * w0[:, None] + constants
    tl.store(dW_ptr + matrices, tl.join(dW0, dW1).to(dq_W_ptr.dtype.element_ty))
    dw0, dw1 = tl.sum(dK1 * W1 + dK2 * W0, axis=1), tl.sum(dK0 * W1 + dK1 * W0, axis=1)
    tl.store(dw_ptr + vectors, tl.join(dw0, dw1).to(dq_w_ptr.dtype.element_ty))
    tl.store(db_ptr + own + rows, tl.sum((W0 + W1) * dconstant[None, :], axis=1).to(dq_b_ptr.dtype.element_ty))
    if block == 0:
        tl.store(dc_ptr + own + cols, dconstant.to(dq_c_ptr.dtype.element_ty))
        if not is_q:
            tl.store(dtemperature_ptr + head - N, tl.sum(dtemperature).to(dtemperature_ptr.dtype.element_ty))


def cca(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor | None, q_convs: Convolutions, k_convs: Convolutions,
        temperature_G: Tensor, positions_BT: Tensor, rope: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor, Tensor],
        delayed_rows: tuple[int, int], begin: Begin | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.cca` on Triton: q (B, T, N, H), k and v (B, T, G, H) in q_BTC's dtype.

    q, k, v may be slices of one wider projection (unit stride over channels, tokens evenly spaced; 16-byte loads where all start at
    multiples of 16 bytes); everything else lies contiguously.
    q_mean None: the mean of q over each group is taken here, and its gradient goes to q. Parameters may have a dtype of their own.
    begin(k, v) runs once the key and value heads are launched and before the query heads, which are then a launch of their own.
    Raises ValueError for anything else, before any launch.
    """
    check_cca(q_BTC, k_BTC, v_BTC, q_mean_BTGH, q_convs, k_convs, temperature_G, positions_BT, rope, halos, delayed_rows, contiguous=True)
    _check_strides(q_BTC, k_BTC, v_BTC)
    return _CCA.apply(q_BTC, k_BTC, v_BTC, q_mean_BTGH, *q_convs, *k_convs, temperature_G, positions_BT, *rope, *halos, delayed_rows, begin)


class _CCA(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mean: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        convs, (temperature, positions, cos, sin), halos, (delayed, begin) = rest[:8], rest[8:12], rest[12:15], rest[15:]
        (B, T, _), G = q.shape, temperature.numel()
        H = k.shape[-1] // G
        N = q.shape[-1] // H
        kernel, transposed, constant = _fold(convs, q.dtype, N, G, H)
        q_out, k_out, v_out = q.new_empty(B, T, N, H), q.new_empty(B, T, G, H), q.new_empty(B, T, G, H)
        inverse = q.new_empty(N + G, B * T, dtype=torch.float32)
        run = functools.partial(_forward, q, k, v, mean, kernel, constant, temperature, positions, (cos, sin), halos, delayed,
                                (q_out, k_out, v_out), inverse)
        if begin is None:
            run((0, N + 2 * G))
        else:
            run((N, 2 * G))
            begin(k_out, v_out)
            run((0, N))
        ctx.save_for_backward(q, k, v, mean, *convs, temperature, positions, cos, sin, *halos, q_out, inverse, kernel, transposed, constant)
        ctx.delayed = delayed
        return q_out, k_out, v_out

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor, dv_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mean, *convs, temperature, positions, cos, sin, q_halo, k_halo, v_halo, q_out, inverse, kernel, transposed, constant = (
            ctx.saved_tensors)
        halos, delayed = (q_halo, k_halo, v_halo), ctx.delayed
        dq_out, dk_out, dv_out = dq_out.contiguous(), dk_out.contiguous(), dv_out.contiguous()
        k_unit = torch.empty_like(dk_out)
        _forward(q, k, None, mean, kernel, constant, None, positions, (cos, sin), halos, delayed, (q_out, k_unit, None), inverse,
                 (q_out.shape[2], k_unit.shape[2]))
        dz, dkernel, dvector = _weight_parts(q, k, halos, (q_out, k_unit), (dq_out, dk_out), inverse, temperature, positions, (cos, sin))
        dinputs = _inputs(dz, dv_out, transposed, positions, (q, k, v, mean), halos, delayed, any(ctx.needs_input_grad[16:19]))
        dparameters = _reduce(dkernel, dvector, convs, temperature)
        return *dinputs[:4], *dparameters, None, None, None, *dinputs[4:], None, None


def _fold(convs: tuple[Tensor, ...], dtype: torch.dtype, N: int, G: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    kernel, transposed = convs[0].new_empty(2, N + G, 3, H, H, dtype=dtype)
    constant = convs[0].new_empty(N + G, H, dtype=torch.float32)
    arguments: dict[str, Any] = _named("{}_ptr", zip(("q_w", "q_b", "q_W", "q_c", "k_w", "k_b", "k_W", "k_c"), convs))
    arguments |= dict(kernel_ptr=kernel, transposed_ptr=transposed, constant_ptr=constant, N=N, H=H)
    chosen = config(_cca_fold_kernel, target(kernel.device))
    launch(_cca_fold_kernel, (N + G, H // chosen.blocks["BLOCK"]), arguments, chosen)
    return kernel, transposed, constant


def _forward(q: Tensor, k: Tensor, v: Tensor | None, mean: Tensor | None, kernel: Tensor, constant: Tensor, temperature: Tensor | None,
             positions: Tensor, rope: tuple[Tensor, Tensor], halos: tuple[Tensor, ...], delayed: tuple[int, int],
             outs: tuple[Tensor, Tensor, Tensor | None], inverse: Tensor, which: tuple[int, int]) -> None:
    """The heads (first, how many) of N query, G key, G value heads. Without v and temperature: key heads as backward needs them."""
    (B, T, N, H), G = outs[0].shape, outs[1].shape[2]
    first, heads = which
    chip = target(q.device)
    chosen = config(_cca_fwd_kernel, chip, H=H, itemsize=q.element_size())
    K = halos[0].shape[1]
    tiles = triton.cdiv(T // K, chosen.blocks["BLOCK_M"])
    programs = B * K * tiles * heads
    arguments = dict(
        q_ptr=q, k_ptr=k, v_ptr=k if v is None else v, mean_ptr=q if mean is None else mean, kernel_ptr=kernel, constant_ptr=constant,
        temperature_ptr=constant if temperature is None else temperature, positions_ptr=positions, cos_ptr=rope[0], sin_ptr=rope[1],
        q_halo_ptr=halos[0], k_halo_ptr=halos[1], v_halo_ptr=halos[2], q_out_ptr=outs[0], k_out_ptr=outs[1],
        v_out_ptr=outs[1] if outs[2] is None else outs[2], inverse_ptr=inverse, q_stride=_row_stride(q), k_stride=_row_stride(k),
        v_stride=0 if v is None else _row_stride(v), length=T // K, tiles=tiles, programs=programs, rows_total=B * T,
        delayed_start=delayed[0], delayed_end=delayed[1], sqrt_h=H**0.5, eps=torch.finfo(q.dtype).eps, FIRST=first, HEADS=heads, N=N, G=G,
        H=H, HAS_MEAN=mean is not None, HAS_TEMPERATURE=temperature is not None, XCDS=chip.num_xcds)
    launch(_cca_fwd_kernel, (triton.cdiv(programs, chip.num_xcds) * chip.num_xcds,), arguments, chosen)


def _weight_parts(q: Tensor, k: Tensor, halos: tuple[Tensor, ...], units: tuple[Tensor, Tensor], douts: tuple[Tensor, Tensor],
                  inverse: Tensor, temperature: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dz (B T, N + G heads of H), dK and dconstant | dtemperature in parts: one per split of the tokens, about one program per CU."""
    (B, T, N, H), G = units[0].shape, units[1].shape[2]
    chip = target(q.device)
    chosen = config(_cca_bwd_weight_kernel, chip, H=H, itemsize=q.element_size())
    K = halos[0].shape[1]
    tiles = triton.cdiv(T // K, chosen.blocks["BLOCK_M"])
    parts = chosen.blocks["PARTS"]
    each = triton.cdiv(B * K * tiles, max(chip.num_cus // ((N + G) * parts), 1))
    splits = triton.cdiv(B * K * tiles, each)
    dz = q.new_empty(B * T, (N + G) * H)
    dkernel = q.new_empty(N + G, splits, 3, H, H, dtype=torch.float32)
    dvector = q.new_empty(N + G, splits, 2, H, dtype=torch.float32)
    arguments = dict(
        q_ptr=q, k_ptr=k, q_halo_ptr=halos[0], k_halo_ptr=halos[1], q_unit_ptr=units[0], k_unit_ptr=units[1], dq_ptr=douts[0],
        dk_ptr=douts[1], inverse_ptr=inverse, temperature_ptr=temperature, positions_ptr=positions, cos_ptr=rope[0], sin_ptr=rope[1],
        dz_ptr=dz, dkernel_ptr=dkernel, dvector_ptr=dvector, q_stride=_row_stride(q), k_stride=_row_stride(k), length=T // K, tiles=tiles,
        tiles_total=B * K * tiles, tiles_each=each, splits=splits, rows_total=B * T, N=N, G=G, H=H)
    launch(_cca_bwd_weight_kernel, ((N + G) * splits * parts,), arguments, chosen)
    return dz, dkernel, dvector


def _inputs(dz: Tensor, dv_out: Tensor, transposed: Tensor, positions: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
            halos: tuple[Tensor, ...], delayed: tuple[int, int], halos_need: bool) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q's mean and the three halos."""
    q, k, v, mean = inputs
    B, T, G, H = dv_out.shape
    N, K = q.shape[-1] // H, halos[0].shape[1]
    chip = target(q.device)
    chosen = config(_cca_bwd_input_kernel, chip, H=H, itemsize=q.element_size())
    halo = 2 if halos_need else 0
    tiles = triton.cdiv(T // K + halo, chosen.blocks["BLOCK_M"])
    programs = B * K * tiles * (N + 2 * G)
    grads = [q.new_empty(x.shape) for x in (q, k, v)]
    dmean = None if mean is None else torch.empty_like(mean)
    dhalos = [torch.empty_like(x) for x in halos] if halos_need else [None] * 3
    arguments = dict(
        dz_ptr=dz, dv_out_ptr=dv_out, transposed_ptr=transposed, positions_ptr=positions, dq_ptr=grads[0], dk_ptr=grads[1],
        dv_ptr=grads[2], dmean_ptr=dz if dmean is None else dmean,
        **{f"d{name}_halo_ptr": dz if dhalo is None else dhalo for name, dhalo in zip("qkv", dhalos)}, length=T // K, tiles=tiles,
        programs=programs, delayed_start=delayed[0], delayed_end=delayed[1], N=N, G=G, H=H, HAS_MEAN=mean is not None, HALO=halo,
        XCDS=chip.num_xcds)
    launch(_cca_bwd_input_kernel, (triton.cdiv(programs, chip.num_xcds) * chip.num_xcds,), arguments, chosen)
    return *grads, dmean, *dhalos


def _reduce(dkernel: Tensor, dvector: Tensor, convs: list[Tensor], temperature: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the eight parameters of the convolutions and of the temperature."""
    heads, splits, _, H, _ = dkernel.shape
    grads = [torch.empty_like(x) for x in (*convs, temperature)]
    names = ("q_w", "q_b", "q_W", "q_c", "k_w", "k_b", "k_W", "k_c", "temperature")
    inputs = {name: x for name, x in zip(names, convs) if not name.endswith("_c")}
    arguments: dict[str, Any] = {**_named("{}_ptr", inputs.items()), **_named("d{}_ptr", zip(names, grads))}
    arguments |= dict(dkernel_ptr=dkernel, dvector_ptr=dvector, splits=splits, N=heads - temperature.numel(), H=H)
    chosen = config(_cca_bwd_reduce_kernel, target(dkernel.device))
    launch(_cca_bwd_reduce_kernel, (heads, H // chosen.blocks["BLOCK"]), arguments, chosen)
    return tuple(grads)


def _named(pattern: str, items: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {pattern.format(name): x for name, x in items}


def _row_stride(x: Tensor) -> int:
    """Elements from a token to the next, across batch rows as well."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _check_strides(*projections: Tensor) -> None:
    B, T, _ = projections[0].shape
    for name, x in zip(("q_BTC", "k_BTC", "v_BTC"), projections):
        if x.stride(2) != 1 or (B > 1 and T > 1 and x.stride(0) != T * x.stride(1)):
            raise ValueError(f"{name} has strides {x.stride()}, expected (T * s, s, 1): evenly spaced tokens of adjacent channels")
