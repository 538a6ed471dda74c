"""Which experts a token goes to, and the order that brings each expert's tokens together: all on the device, nothing waits for the host.

p = softmax(logits) in fp32. The classes of a token are the k largest of p + balance bias, NaN before all, the lowest index first among
equals; its gates are their raw probabilities. Only the gates pass a gradient:
    dlogits_i = p_i (sum_j dgate_j [i = c_j] - sum_j dgate_j p_cj).
Saves logits and choice; the backward computes p again.

The sort is a counting sort, stable because ranks inside a block of assignments are prefix sums in their order: one kernel counts the
classes of each block, a second adds up the counts of all earlier classes and blocks and scatters. Knows nothing of experts' weights.

Letters: T tokens, k slots (experts per token), R = T k assignments (token * k + slot), C router classes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import FLOATS, check
from zaya.kernels.backend import MAX_CLASSES
from zaya.kernels.launch import Config, config, launch, target

FEW_CLASSES = 32  # more, and a table of 128 tokens or 512 rows by classes fits no program: configs.json has entries for "many"
MAX_FP32 = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _softmax(logits, rows, columns, is_row, C: tl.constexpr):
    """Probabilities of the classes, fp32; rows beyond the end get those of zeros, columns beyond C get 0."""
    is_column = columns < C
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    x = tl.load(logits + at, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)
    x = tl.where(is_column[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def _route_fwd_kernel(logits, bias, choice, gate, counts, num_tokens, C: tl.constexpr, BLOCK_C: tl.constexpr, TOP_K: tl.constexpr,
                      BLOCK_T: tl.constexpr):
    """BLOCK_T tokens a program; counts (programs, C): tokens per class of each block."""
    rows, columns = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    is_row, is_column = rows < num_tokens, columns < C
    probs = _softmax(logits, rows, columns, is_row, C)
    score = probs + tl.load(bias + columns, mask=is_column, other=0.0)[None, :]
    # The reference's order: NaN, +inf, finite numbers, -inf; the lowest index first among equals. Infinities become the largest finite
    # numbers, which leaves +inf for NaN (the gates will tell) and -inf for columns beyond C and for classes already chosen.
    score = tl.where(score == score, tl.minimum(tl.maximum(score, -MAX_FP32), MAX_FP32), float("inf"))
    score = tl.where(is_column[None, :], score, float("-inf"))
    total = tl.zeros((BLOCK_C,), tl.int32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(score, axis=1)
        index = tl.min(tl.where(score == best[:, None], columns[None, :], BLOCK_C), axis=1)
        chosen = columns[None, :] == index[:, None]
        at = rows.to(tl.int64) * TOP_K + slot
        tl.store(choice + at, index, mask=is_row)
        tl.store(gate + at, tl.sum(tl.where(chosen, probs, 0.0), axis=1), mask=is_row)
        total += tl.sum((chosen & is_row[:, None]).to(tl.int32), axis=0)
        score = tl.where(chosen, float("-inf"), score)
    tl.store(counts + tl.program_id(0) * C + columns, total, mask=is_column)


@triton.jit
def _route_bwd_kernel(logits, choice, dgate, dlogits, num_tokens, C: tl.constexpr, BLOCK_C: tl.constexpr, TOP_K: tl.constexpr,
                      BLOCK_T: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    is_row = rows < num_tokens
    probs = _softmax(logits, rows, columns, is_row, C)
    dprobs = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for slot in tl.static_range(TOP_K):
        at = rows.to(tl.int64) * TOP_K + slot
        index = tl.load(choice + at, mask=is_row, other=0)
        d = tl.load(dgate + at, mask=is_row, other=0.0).to(tl.float32)
        dprobs += tl.where(columns[None, :] == index[:, None], d[:, None], 0.0)
    dx = probs * (dprobs - tl.sum(dprobs * probs, axis=1)[:, None])
    at = rows.to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(dlogits + at, dx.to(dlogits.dtype.element_ty), mask=is_row[:, None] & (columns < C)[None, :])


@triton.jit
def _sort_histogram_kernel(choice, counts, num_assignments, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """counts (programs, C): assignments of each block to each class."""
    rows, columns = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    classes = tl.load(choice + rows, mask=rows < num_assignments, other=BLOCK_C)
    total = tl.sum((classes[:, None] == columns[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * C + columns, total, mask=columns < C)


@triton.jit
def _sort_scatter_kernel(choice, counts, order, sizes, num_assignments, num_blocks, C: tl.constexpr, BLOCK_C: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr):
    """The place of an assignment: all of lower classes, those of its class in earlier blocks, those before it in its block. Every
    program adds up the counts of all blocks itself (32 blocks * 17 classes at 16,384 tokens), which saves a launch."""
    block, columns = tl.program_id(0), tl.arange(0, BLOCK_C)
    before, total = tl.zeros((BLOCK_C,), tl.int32), tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        blocks = first + tl.arange(0, BLOCK_B)
        is_there = (blocks < num_blocks)[:, None] & (columns < C)[None, :]
        count = tl.load(counts + blocks[:, None] * C + columns[None, :], mask=is_there, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((blocks < block)[:, None], count, 0), axis=0)
    if block == 0:
        tl.store(sizes + columns, total.to(tl.int64), mask=columns < C)
    base = tl.cumsum(total, axis=0) - total + before

    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    classes = tl.load(choice + rows, mask=rows < num_assignments, other=BLOCK_C)
    mine = classes[:, None] == columns[None, :]
    rank = tl.cumsum(mine.to(tl.int32), axis=0) - 1
    place = tl.sum(tl.where(mine, rank + base[None, :], 0), axis=1)
    tl.store(order + place, rows.to(tl.int32), mask=(rows < num_assignments) & (classes < C))


def route(logits_TC: Tensor, balance_bias_C: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (T, k) int32, gates (T, k) fp32 and the number of assignments per class (C,) int64: a class is one of the k largest of
    softmax + balance bias, its gate the raw probability. The bias gets no gradient."""
    check("logits_TC", logits_TC, shape=(None, None), dtypes=FLOATS)
    C = logits_TC.shape[1]
    check("balance_bias_C", balance_bias_C, shape=(C,), dtypes=(torch.float32,), device=logits_TC.device)
    if not 1 <= top_k <= C:
        raise ValueError(f"top_k is {top_k}, expected 1 to {C} (the router's classes)")
    _check_classes("logits_TC", C)
    choice_Tk, gate_Tk, counts_C = _Route.apply(logits_TC, balance_bias_C, top_k)
    return choice_Tk, gate_Tk, counts_C


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TC, bias_C, top_k):
        T, C = logits_TC.shape
        chosen = _config(_route_fwd_kernel, logits_TC.device, C)
        programs = triton.cdiv(T, chosen.blocks["BLOCK_T"])
        choice_Tk = logits_TC.new_empty(T, top_k, dtype=torch.int32)
        gate_Tk = logits_TC.new_empty(T, top_k, dtype=torch.float32)
        counts = logits_TC.new_empty(programs, C, dtype=torch.int32)
        if programs:
            launch(_route_fwd_kernel, (programs,), {
                "logits": logits_TC, "bias": bias_C, "choice": choice_Tk, "gate": gate_Tk, "counts": counts, "num_tokens": T,
                "C": C, "BLOCK_C": triton.next_power_of_2(C), "TOP_K": top_k}, chosen)
        counts_C = counts.sum(0, dtype=torch.int64)
        ctx.save_for_backward(logits_TC, choice_Tk)
        ctx.mark_non_differentiable(choice_Tk, counts_C)
        ctx.set_materialize_grads(False)  # else backward is given zeros for these two, a launch each
        return choice_Tk, gate_Tk, counts_C

    @staticmethod
    def backward(ctx, _choice, dgate_Tk, _counts):
        if dgate_Tk is None:
            return None, None, None
        logits_TC, choice_Tk = ctx.saved_tensors
        T, C = logits_TC.shape
        dlogits_TC = torch.empty_like(logits_TC)
        chosen = _config(_route_bwd_kernel, logits_TC.device, C)
        programs = triton.cdiv(T, chosen.blocks["BLOCK_T"])
        if programs:
            launch(_route_bwd_kernel, (programs,), {
                "logits": logits_TC, "choice": choice_Tk, "dgate": dgate_Tk.contiguous(), "dlogits": dlogits_TC, "num_tokens": T,
                "C": C, "BLOCK_C": triton.next_power_of_2(C), "TOP_K": choice_Tk.shape[1]}, chosen)
        return dlogits_TC, None, None


def sort_by_expert(choice_Tk: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Order (R,) int32 of the assignments (token * k + slot) that brings class 0, 1, ... together, each in its old order, and the size of
    each class (C,) int64. A skip class, the last, ends up last.

    Classes are 0 to num_classes - 1, as `route` chooses them; to check that would wait for the device. Of others the order is not whole."""
    check("choice_Tk", choice_Tk, shape=(None, None), dtypes=(torch.int32, torch.int64))
    _check_classes("num_classes", num_classes)
    R = choice_Tk.numel()
    chosen = _config(_sort_scatter_kernel, choice_Tk.device, num_classes)
    blocks = triton.cdiv(R, chosen.blocks["BLOCK_R"])
    order_R = choice_Tk.new_empty(R, dtype=torch.int32)
    if not blocks:
        return order_R, choice_Tk.new_zeros(num_classes, dtype=torch.int64)
    sizes_C = choice_Tk.new_empty(num_classes, dtype=torch.int64)
    counts = choice_Tk.new_empty(blocks, num_classes, dtype=torch.int32)
    shared = {"choice": choice_Tk, "counts": counts, "num_assignments": R, "C": num_classes, "BLOCK_C": triton.next_power_of_2(num_classes)}
    histogram = _config(_sort_histogram_kernel, choice_Tk.device, num_classes)
    assert histogram.blocks["BLOCK_R"] == chosen.blocks["BLOCK_R"], "both kernels of the sort must cut the same blocks"
    launch(_sort_histogram_kernel, (blocks,), shared, histogram)
    launch(_sort_scatter_kernel, (blocks,), {**shared, "order": order_R, "sizes": sizes_C, "num_blocks": blocks}, chosen)
    return order_R, sizes_C


def _config(kernel: Any, device: torch.device, num_classes: int) -> Config:
    """A program holds a table of its rows or tokens by classes: the more classes, the fewer rows."""
    return config(kernel, target(device), classes="few" if num_classes <= FEW_CLASSES else "many")


def _check_classes(name: str, num_classes: int) -> None:
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"{name} has {num_classes} classes, expected 1 to {MAX_CLASSES}")
