"""Causal grouped-query attention in one pass over the keys, with a sliding window, packed documents and queries cut into chunks.

With c = 1 / sqrt(H), query i at index x_i of the sequence, and the keys j it sees, first_key_i <= j <= x_i:

    forward    s_ij = c q_i . k_j,   L_i = log sum_j exp s_ij,   p_ij = exp(s_ij - L_i),   o_i = sum_j p_ij v_j
    backward   D_i = do_i . o_i,   ds_ij = p_ij (do_i . v_j - D_i)
               dq_i = c sum_j ds_ij k_j,   dk_j = c sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i

Saved are q, k, v, o and L (fp32, in base 2: exp2 is the instruction there is); p is computed again. dq's kernel also writes D, which
dk's and dv's reads. No two programs add to one place: one owns a block of queries, or a block of keys and walks over the queries that see
it, so results repeat to the bit. Where keys give too few programs for the chip, the heads of a group are split among programs, each
with its own fp32 partial sums, and these are added in order.

first_key does not decrease along a chunk. A block of queries hence sees one range of keys, and a block of keys is seen by one range of
queries of each chunk, found by a search on the device. Inside a range the blocks that are seen in full need no mask and go first; those
at its two ends follow in a second loop, in smaller steps.

Letters: B batch, T queries of the sequence on this device, S keys of the whole sequence, N query heads, G KV heads, H head dim.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import check, check_attention
from zaya.kernels.launch import Target, config, launch, target

MAX_CHUNKS = 2  # zig-zag context parallelism gives each rank one early and one late chunk
PROGRAMS_PER_CU = 4  # below this, dk and dv split a group's heads: the longest program is then a small part of the whole

LN_2: tl.constexpr = tl.constexpr(math.log(2))
MAX_STRIDE: tl.constexpr = tl.constexpr(2**21)  # of a row: 128 rows of 4-byte numbers then lie within 2^30 bytes
FLOOR: tl.constexpr = tl.constexpr(-1e30)  # the running maximum before any key: finite, so that FLOOR - FLOOR and -inf - FLOOR are no NaN


# ---------------------------------------------------------------------------------------------------------------- parts


@triton.jit
def _place(num_blocks, per_die, HEADS: tl.constexpr, NUM_XCDS: tl.constexpr):
    """This program's block (longest first), head within its bundle, and bundle; past the end for a program too many.

    Work-groups go round-robin over the dies, and each die gets a contiguous part of the list (bundle, block, head): the heads of a
    bundle, which read the same keys, share an L2.
    """
    work = (tl.program_id(0) % NUM_XCDS) * per_die + tl.program_id(0) // NUM_XCDS
    return (work // HEADS) % num_blocks, work % HEADS, work // (HEADS * num_blocks)


@triton.jit
def _offsets(stride, BLOCK: tl.constexpr, H: tl.constexpr):
    """Where the elements of BLOCK rows lie, from the first one. The bounds (the host checks them) let the compiler use 32-bit addresses."""
    tl.assume(stride >= 0)
    tl.assume(stride < MAX_STRIDE)
    return tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, H)[None, :]


@triton.jit
def _rows(base, first, stride, offsets, bound, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows [first, first + BLOCK) of a (rows, H) matrix; those from `bound` on are zero."""
    pointers = base + tl.cast(first, tl.int64) * stride + offsets
    if MASKED:
        return tl.load(pointers, mask=(first + tl.arange(0, BLOCK) < bound)[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _scores(a, b):
    """a b^T in fp32: (rows of a, rows of b)."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _narrow(x, dtype: tl.constexpr, ROUND_BITS: tl.constexpr):
    """x, fp32, in the dtype of a product's operand.

    gfx942 has no instruction for bf16: rounding to even, with its care for NaN, takes 5 slots an element, more than all of the
    softmax. ROUND_BITS: ties go away from zero instead, an integer addition before the upper halves are packed. The NaN that arithmetic
    makes stays one.
    """
    if ROUND_BITS and dtype == tl.bfloat16:
        return ((x.to(tl.uint32, bitcast=True) + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _hide(scores, key, first, index):
    """-inf where a query does not see a key. One unsigned comparison: a key before `first` is a huge number after it."""
    return tl.where((key - first).to(tl.uint32, bitcast=True) <= (index - first).to(tl.uint32, bitcast=True), scores, -float("inf"))


@triton.jit
def _queries(first_key_ptr, block, batch, T, chunk, offset_0, offset_1, blocks_per_chunk, num_blocks, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr):
    """A block of queries, the last chunk's last one first, since it sees the most keys: its first row, how many rows of its chunk are
    left, its index, every row's first key; and the keys that any of them sees, [low, high), and that all see, [full, full_end)."""
    late = num_blocks - 1 - block
    chunk_index, start = late // blocks_per_chunk, (late % blocks_per_chunk) * BLOCK_M
    row, left = chunk_index * chunk + start, chunk - start
    index = tl.where(chunk_index == 0, offset_0, offset_1) + start
    last = tl.minimum(BLOCK_M, left) - 1
    pointer = first_key_ptr + batch.to(tl.int64) * T + row
    first_key_M = tl.load(pointer + tl.arange(0, BLOCK_M), mask=tl.arange(0, BLOCK_M) < left, other=0).to(tl.int32)
    low = tl.load(pointer).to(tl.int32) // EDGE_N * EDGE_N
    full_end = (index + 1) // BLOCK_N * BLOCK_N
    full = tl.minimum(tl.cdiv(tl.load(pointer + last).to(tl.int32), BLOCK_N) * BLOCK_N, full_end)
    return row, left, index, first_key_M, low, index + last + 1, full, full_end


# ---------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _fwd_step(accumulator, largest, total, q, k_base, v_base, first_key_M, index_M, key_start, k_offsets, v_offsets, stride_ks, stride_vs,
              S, scale, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, ROUND_BITS: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax over one block of keys. largest is in units of raw scores; scale takes them to powers of two.

    BLOCK_V: rows of v per product, all of the block or half of it. Halves use the same addresses in LDS: 30 registers less on gfx942.
    The halves are loaded with k, so that only k is waited for: they arrive during the first product.
    """
    k = _rows(k_base, key_start, stride_ks, k_offsets, S, BLOCK_N, MASKED)
    if BLOCK_V < BLOCK_N:
        tl.static_assert(2 * BLOCK_V == BLOCK_N)
        upper_v = _rows(v_base, key_start, stride_vs, v_offsets, S, BLOCK_V, MASKED)
        lower_v = _rows(v_base, key_start + BLOCK_V, stride_vs, v_offsets, S, BLOCK_V, MASKED)
    scores = _scores(q, k)
    if MASKED:
        scores = _hide(scores, key_start + tl.arange(0, BLOCK_N)[None, :], first_key_M[:, None], index_M[:, None])
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2((largest - new_largest) * scale)
    probs = tl.exp2(scores * scale - (new_largest * scale)[:, None])
    total = total * shrink + tl.sum(probs, 1)
    accumulator *= shrink[:, None]
    if BLOCK_V < BLOCK_N:
        upper, lower = probs.reshape(probs.shape[0], 2, BLOCK_V).permute(0, 2, 1).split()
        accumulator = tl.dot(_narrow(upper, upper_v.dtype, ROUND_BITS), upper_v, accumulator, input_precision="ieee")
        accumulator = tl.dot(_narrow(lower, lower_v.dtype, ROUND_BITS), lower_v, accumulator, input_precision="ieee")
    else:
        v = _rows(v_base, key_start, stride_vs, v_offsets, S, BLOCK_N, MASKED)
        accumulator = tl.dot(_narrow(probs, v.dtype, ROUND_BITS), v, accumulator, input_precision="ieee")
    return accumulator, new_largest, total


@triton.jit
def _attention_fwd_kernel(q_ptr, k_ptr, v_ptr, first_key_ptr, out_ptr, lse_ptr, stride_qb, stride_qt, stride_qn, stride_kb, stride_ks,
                          stride_kg, stride_vb, stride_vs, stride_vg, T, S, chunk, offset_0, offset_1, blocks_per_chunk, num_blocks,
                          num_bundles, per_die, scale, N: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr,
                          NUM_XCDS: tl.constexpr, ROUND_BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                          BLOCK_V: tl.constexpr, EDGE_N: tl.constexpr):
    block, head, bundle = _place(num_blocks, per_die, HEADS, NUM_XCDS)
    if bundle >= num_bundles:
        return
    n, batch = (bundle * HEADS + head) % N, (bundle * HEADS + head) // N
    g, batch64 = n // (N // G), batch.to(tl.int64)
    row, left, index, first_key_M, low, high, full, full_end = _queries(
        first_key_ptr, block, batch, T, chunk, offset_0, offset_1, blocks_per_chunk, num_blocks, BLOCK_M, BLOCK_N, EDGE_N)
    rows_M = tl.arange(0, BLOCK_M)
    index_M = index + rows_M
    q = _rows(q_ptr + batch64 * stride_qb + n * stride_qn, row, stride_qt, _offsets(stride_qt, BLOCK_M, H), row + left,
              BLOCK_M, True)
    k_base = k_ptr + batch64 * stride_kb + g * stride_kg
    v_base = v_ptr + batch64 * stride_vb + g * stride_vg
    k_offsets = _offsets(stride_ks, BLOCK_N, H)
    v_offsets = _offsets(stride_vs, BLOCK_V, H)

    accumulator = tl.zeros((BLOCK_M, H), tl.float32)
    largest = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for key_start in range(full, full_end, BLOCK_N):
        accumulator, largest, total = _fwd_step(accumulator, largest, total, q, k_base, v_base, first_key_M, index_M, key_start, k_offsets,
                                                v_offsets, stride_ks, stride_vs, S, scale, BLOCK_N, BLOCK_V, ROUND_BITS, False)
    k_offsets, v_offsets = _offsets(stride_ks, EDGE_N, H), _offsets(stride_vs, EDGE_N, H)
    for step in range(low, high - (full_end - full), EDGE_N):
        key_start = tl.where(step < full, step, step + (full_end - full))
        accumulator, largest, total = _fwd_step(accumulator, largest, total, q, k_base, v_base, first_key_M, index_M, key_start, k_offsets,
                                                v_offsets, stride_ks, stride_vs, S, scale, EDGE_N, EDGE_N, ROUND_BITS, True)

    inside_M = rows_M < left
    tl.store(lse_ptr + (batch64 * N + n) * T + row + rows_M, largest * scale + tl.log2(total), mask=inside_M)
    out_base = out_ptr + ((batch64 * T + row) * N + n) * H
    inverse_root = tl.rsqrt(total)  # total >= 1: its square is 1 / total, without the dozen instructions of a division
    out = (accumulator * (inverse_root * inverse_root)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_base + _offsets(N * H, BLOCK_M, H), out, mask=inside_M[:, None])


# ---------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _bwd_dq_step(dq, q, dout, lse_M, delta_M, k_base, v_base, first_key_M, index_M, key_start, k_offsets, v_offsets, stride_ks, stride_vs,
                 S, scale, BLOCK_N: tl.constexpr, ROUND_BITS: tl.constexpr, MASKED: tl.constexpr):
    k = _rows(k_base, key_start, stride_ks, k_offsets, S, BLOCK_N, MASKED)
    v = _rows(v_base, key_start, stride_vs, v_offsets, S, BLOCK_N, MASKED)
    scores = _scores(q, k)
    if MASKED:
        scores = _hide(scores, key_start + tl.arange(0, BLOCK_N)[None, :], first_key_M[:, None], index_M[:, None])
    probs = tl.exp2(scores * scale - lse_M[:, None])
    dscores = probs * (_scores(dout, v) - delta_M[:, None])
    return tl.dot(_narrow(dscores, k.dtype, ROUND_BITS), k, dq, input_precision="ieee")


@triton.jit
def _attention_bwd_dq_kernel(q_ptr, k_ptr, v_ptr, first_key_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, stride_qb, stride_qt,
                             stride_qn, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, T, S, chunk, offset_0, offset_1,
                             blocks_per_chunk, num_blocks, num_bundles, per_die, scale, N: tl.constexpr, G: tl.constexpr,
                             HEADS: tl.constexpr, H: tl.constexpr, NUM_XCDS: tl.constexpr, ROUND_BITS: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr):
    block, head, bundle = _place(num_blocks, per_die, HEADS, NUM_XCDS)
    if bundle >= num_bundles:
        return
    n, batch = (bundle * HEADS + head) % N, (bundle * HEADS + head) // N
    g, batch64 = n // (N // G), batch.to(tl.int64)
    row, left, index, first_key_M, low, high, full, full_end = _queries(
        first_key_ptr, block, batch, T, chunk, offset_0, offset_1, blocks_per_chunk, num_blocks, BLOCK_M, BLOCK_N, EDGE_N)
    rows_M = tl.arange(0, BLOCK_M)
    index_M, inside_M = index + rows_M, rows_M < left
    k_base = k_ptr + batch64 * stride_kb + g * stride_kg
    v_base = v_ptr + batch64 * stride_vb + g * stride_vg
    k_offsets = _offsets(stride_ks, BLOCK_N, H)
    v_offsets = _offsets(stride_vs, BLOCK_N, H)

    head_offset, out_offsets = (batch64 * T * N + n) * H, _offsets(N * H, BLOCK_M, H)
    dout = _rows(dout_ptr + head_offset, row, N * H, out_offsets, row + left, BLOCK_M, True)
    out = _rows(out_ptr + head_offset, row, N * H, out_offsets, row + left, BLOCK_M, True)
    delta_M = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    head_rows = (batch64 * N + n) * T + row + rows_M
    tl.store(delta_ptr + head_rows, delta_M, mask=inside_M)
    lse_M = tl.load(lse_ptr + head_rows, mask=inside_M, other=0.0)
    q = _rows(q_ptr + batch64 * stride_qb + n * stride_qn, row, stride_qt, _offsets(stride_qt, BLOCK_M, H), row + left,
              BLOCK_M, True)

    dq = tl.zeros((BLOCK_M, H), tl.float32)
    for key_start in range(full, full_end, BLOCK_N):
        dq = _bwd_dq_step(dq, q, dout, lse_M, delta_M, k_base, v_base, first_key_M, index_M, key_start, k_offsets, v_offsets, stride_ks,
                          stride_vs, S, scale, BLOCK_N, ROUND_BITS, False)
    k_offsets, v_offsets = _offsets(stride_ks, EDGE_N, H), _offsets(stride_vs, EDGE_N, H)
    for step in range(low, high - (full_end - full), EDGE_N):
        key_start = tl.where(step < full, step, step + (full_end - full))
        dq = _bwd_dq_step(dq, q, dout, lse_M, delta_M, k_base, v_base, first_key_M, index_M, key_start, k_offsets, v_offsets, stride_ks,
                          stride_vs, S, scale, EDGE_N, ROUND_BITS, True)
    dq = (dq * (scale * LN_2)).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + head_offset + row.to(tl.int64) * (N * H) + out_offsets, dq, mask=inside_M[:, None])


@triton.jit
def _bwd_dkv_step(dk, dv, k, v, q_base, dout_base, lse_base, delta_base, first_key_base, row, row_offset, key_N, q_offsets, dout_offsets,
                  stride_qt, stride_dout, chunk, scale, BLOCK_M: tl.constexpr, ROUND_BITS: tl.constexpr, MASKED: tl.constexpr):
    """One block of queries, from `row` of its chunk; row_offset takes rows to indices. Scores stand on their side: (keys, queries)."""
    rows_M = row + tl.arange(0, BLOCK_M)
    if MASKED:
        inside_M = rows_M < chunk
        lse_M = tl.load(lse_base + rows_M, mask=inside_M, other=0.0)
        delta_M = tl.load(delta_base + rows_M, mask=inside_M, other=0.0)
    else:  # first of all, so that they arrive with q and are not waited for once more
        lse_M, delta_M = tl.load(lse_base + rows_M), tl.load(delta_base + rows_M)
    q = _rows(q_base, row, stride_qt, q_offsets, chunk, BLOCK_M, MASKED)
    dout = _rows(dout_base, row, stride_dout, dout_offsets, chunk, BLOCK_M, MASKED)
    scores = _scores(k, q)
    if MASKED:
        first_key_M = tl.load(first_key_base + rows_M, mask=inside_M, other=0).to(tl.int32)
        scores = _hide(scores, key_N[:, None], first_key_M[None, :], (rows_M + row_offset)[None, :])
    probs = tl.exp2(scores * scale - lse_M[None, :])
    dv = tl.dot(_narrow(probs, dout.dtype, ROUND_BITS), dout, dv, input_precision="ieee")
    dscores = probs * (_scores(v, dout) - delta_M[None, :])
    dk = tl.dot(_narrow(dscores, q.dtype, ROUND_BITS), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_bwd_dkv_kernel(q_ptr, k_ptr, v_ptr, first_key_ptr, ends_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, stride_qb,
                              stride_qt, stride_qn, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, stride_part, T, S,
                              chunk, offset_0, offset_1, num_blocks, num_bundles, per_die, scale, N: tl.constexpr, G: tl.constexpr,
                              PARTS: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, NUM_CHUNKS: tl.constexpr, NUM_XCDS: tl.constexpr,
                              ROUND_BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_M: tl.constexpr):
    # A program owns a block of keys of one KV head and one of PARTS shares of that group's query heads.
    block, head, bundle = _place(num_blocks, per_die, HEADS, NUM_XCDS)
    if bundle >= num_bundles:
        return
    share = bundle * HEADS + head
    part, g, batch = share % PARTS, (share // PARTS) % G, share // (PARTS * G)
    batch64, key_start = batch.to(tl.int64), block * BLOCK_N
    key_N = key_start + tl.arange(0, BLOCK_N)
    k = _rows(k_ptr + batch64 * stride_kb + g * stride_kg, key_start, stride_ks, _offsets(stride_ks, BLOCK_N, H), S, BLOCK_N,
              True)
    v = _rows(v_ptr + batch64 * stride_vb + g * stride_vg, key_start, stride_vs, _offsets(stride_vs, BLOCK_N, H), S, BLOCK_N,
              True)
    q_offsets = _offsets(stride_qt, BLOCK_M, H)
    dout_offsets = _offsets(N * H, BLOCK_M, H)

    dk, dv = tl.zeros((BLOCK_N, H), tl.float32), tl.zeros((BLOCK_N, H), tl.float32)
    EACH: tl.constexpr = N // G // PARTS
    for item in range(EACH * NUM_CHUNKS):
        c, n = item % NUM_CHUNKS, g * (N // G) + part * EACH + item // NUM_CHUNKS
        offset = tl.where(c == 0, offset_0, offset_1)
        ends = ends_ptr + (batch * NUM_CHUNKS + c) * 2 * num_blocks + block
        # Rows [low, high) see any of the keys, [full, full_end) all of them.
        low, high = tl.maximum(key_start - offset, 0) // EDGE_M * EDGE_M, tl.load(ends + num_blocks)
        full = tl.cdiv(tl.maximum(key_start + BLOCK_N - 1 - offset, 0), BLOCK_M) * BLOCK_M
        full_end = tl.maximum(tl.load(ends) // BLOCK_M * BLOCK_M, full)
        q_base = q_ptr + batch64 * stride_qb + tl.cast(c * chunk, tl.int64) * stride_qt + n * stride_qn
        dout_base = dout_ptr + ((batch64 * T + c * chunk) * N + n) * H
        first_key_base = first_key_ptr + batch64 * T + c * chunk
        head_rows = (batch64 * N + n) * T + c * chunk
        for row in range(full, full_end, BLOCK_M):
            dk, dv = _bwd_dkv_step(dk, dv, k, v, q_base, dout_base, lse_ptr + head_rows, delta_ptr + head_rows, first_key_base, row, offset,
                                   key_N, q_offsets, dout_offsets, stride_qt, N * H, chunk, scale, BLOCK_M, ROUND_BITS, False)
        for step in range(low, high - (full_end - full), EDGE_M):
            row = tl.where(step < full, step, step + (full_end - full))
            dk, dv = _bwd_dkv_step(dk, dv, k, v, q_base, dout_base, lse_ptr + head_rows, delta_ptr + head_rows, first_key_base, row, offset,
                                   key_N, _offsets(stride_qt, EDGE_M, H), _offsets(N * H, EDGE_M, H), stride_qt, N * H, chunk, scale,
                                   EDGE_M, ROUND_BITS, True)

    out_base = part.to(tl.int64) * stride_part + ((batch64 * S + key_start) * G + g) * H
    out_offsets, inside = _offsets(G * H, BLOCK_N, H), (key_N < S)[:, None]
    tl.store(dk_ptr + out_base + out_offsets, (dk * (scale * LN_2)).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + out_base + out_offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------- the op


def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Attention of q over keys [first_key, own index], scale 1 / sqrt(H); (B, T, N, H) in q's dtype.

    k and v hold the whole sequence; q holds len(offsets) (1 or 2) equal chunks of it, chunk c starting at index offsets[c]. first_key
    (B, T) must lie in [0, own index] and not decrease along a chunk; that cannot be checked without waiting for the device. q, k and v
    may be views with unit stride in H. Gradients for q, k and v.
    """
    _check(q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets)
    out: Tensor = _Attention.apply(q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets)
    return out


class _Attention(torch.autograd.Function):
    """Saves q, k, v, first_key, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...]) -> Tensor:
        B, T, N, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(B, N, T, dtype=torch.float32, device=q.device)
        _launch_over_queries(_attention_fwd_kernel, q, k, v, first_key, offsets, out_ptr=out, lse_ptr=lse)
        ctx.save_for_backward(q, k, v, first_key, out, lse)
        ctx.offsets = offsets
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, first_key, out, lse = ctx.saved_tensors
        dout, delta = gradients[0].contiguous(), torch.empty_like(lse)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _launch_over_queries(_attention_bwd_dq_kernel, q, k, v, first_key, ctx.offsets, out_ptr=out, dout_ptr=dout, lse_ptr=lse,
                             delta_ptr=delta, dq_ptr=dq)
        dk, dv = _keys_gradients(q, k, v, first_key, ctx.offsets, dout, lse, delta)
        return dq, dk, dv, None, None


def _launch_over_queries(kernel: Any, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...],
                         **tensors: Tensor) -> None:
    """Launch a kernel whose programs each own a block of queries of one head."""
    (B, T, N, H), G, chip = q.shape, k.shape[2], target(q.device)
    chosen = config(kernel, chip, H=H, bits=q.element_size() * 8)
    heads = _bundle(B, N, N // G, chip)
    blocks_per_chunk = triton.cdiv(T // len(offsets), chosen.blocks["BLOCK_M"])
    num_blocks, num_bundles = blocks_per_chunk * len(offsets), B * N // heads
    per_die = triton.cdiv(num_blocks * B * N, chip.num_xcds)
    launch(kernel, (per_die * chip.num_xcds,), {
        **_common(q, k, v, first_key, offsets, chip), **tensors, "blocks_per_chunk": blocks_per_chunk, "num_blocks": num_blocks,
        "num_bundles": num_bundles, "per_die": per_die, "HEADS": heads}, chosen)


def _keys_gradients(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...], dout: Tensor, lse: Tensor,
                    delta: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv, by programs that each own a block of keys."""
    (B, _, N, H), (S, G), chip = q.shape, k.shape[1:3], target(q.device)
    chosen = config(_attention_bwd_dkv_kernel, chip, H=H, bits=q.element_size() * 8)
    size = chosen.blocks["BLOCK_N"]
    num_blocks = triton.cdiv(S, size)
    enough = PROGRAMS_PER_CU * chip.num_cus
    parts = next((p for p in _divisors(N // G) if num_blocks * B * G * p >= enough), N // G)
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = both = torch.empty(2, parts, B, S, G, H, dtype=dtype, device=q.device)
    # Per block of keys and chunk, how many queries have no later first key than the block's first, and than its last key.
    bounds = _bounds(S, size, B * len(offsets), first_key.dtype, q.device)
    ends = torch.searchsorted(first_key.view(B * len(offsets), -1), bounds, right=True, out_int32=True)
    heads = _bundle(B, G * parts, parts, chip)
    per_die = triton.cdiv(num_blocks * B * G * parts, chip.num_xcds)
    launch(_attention_bwd_dkv_kernel, (per_die * chip.num_xcds,), {
        **_common(q, k, v, first_key, offsets, chip), "ends_ptr": ends, "dout_ptr": dout, "lse_ptr": lse, "delta_ptr": delta,
        "dk_ptr": dk, "dv_ptr": dv, "stride_part": dk.stride(0), "num_blocks": num_blocks, "num_bundles": B * G * parts // heads,
        "per_die": per_die, "PARTS": parts, "HEADS": heads, "NUM_CHUNKS": len(offsets)}, chosen)
    if parts == 1:
        return dk[0], dv[0]
    dk, dv = both.sum(1).to(k.dtype)
    return dk, dv


@functools.cache
def _bounds(num_keys: int, size: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, 2 * blocks): the first keys of all blocks, then their last ones. The same for all layers and steps."""
    first = torch.arange(0, num_keys, size, device=device, dtype=dtype)
    return torch.cat((first, first + (size - 1))).expand(rows, -1).contiguous()


def _common(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...], chip: Target) -> dict[str, Any]:
    """The arguments that all kernels share."""
    strides = {f"stride_{name}{dim}": tensor.stride(index) for name, dims, tensor in (("q", "btn", q), ("k", "bsg", k), ("v", "bsg", v))
               for index, dim in enumerate(dims)}
    _, T, N, H = q.shape
    return {"q_ptr": q, "k_ptr": k, "v_ptr": v, "first_key_ptr": first_key, **strides, "T": T, "S": k.shape[1], "chunk": T // len(offsets),
            "offset_0": offsets[0], "offset_1": offsets[-1], "scale": math.log2(math.e) / math.sqrt(H), "N": N, "G": k.shape[2], "H": H,
            "NUM_XCDS": chip.num_xcds, "ROUND_BITS": chip.arch == "gfx942"}


def _bundle(B: int, N: int, most: int, chip: Target) -> int:
    """Heads that run side by side, a divisor of `most`: as many as leave every die whole bundles, so that no die gets only long blocks."""
    return next((h for h in reversed(_divisors(most)) if (B * N // h) % chip.num_xcds == 0), 1)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _check(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...]) -> None:
    check_attention(q, k, v, first_key, offsets)
    check("first_key_BT", first_key)
    for name, tensor in (("q_BTNH", q), ("k_BSGH", k), ("v_BSGH", v)):
        if tensor.numel() == 0:
            raise ValueError(f"{name} is empty: shape {tuple(tensor.shape)}, expected at least one element")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in H, expected 1")
        if tensor.stride(1) >= MAX_STRIDE.value:
            raise ValueError(f"{name} has stride {tensor.stride(1)} from row to row, expected less than {MAX_STRIDE.value}")
    if len(offsets) > MAX_CHUNKS:
        raise ValueError(f"offsets has {len(offsets)} chunks, expected at most {MAX_CHUNKS}")
