"""Linear + cross-entropy in chunks of tokens: the loss of a vocabulary of 262,272 whose logits never stand in memory at once.

With logits z_t = W h_t and lse_t = log sum_v exp z_tv, over the labelled tokens:

    loss = sum_t lse_t - z_t[label_t] + z_loss lse_t^2
    dz_tv = dloss (p_tv (1 + 2 z_loss lse_t) - [v = label_t]),   p = exp(z - lse);      dh = dz W,   dW = dz^T h

A chunk's logits come from the vendor's GEMM, at full speed; then one kernel reads them for each row's largest logit m, sum of exp(z - m)
and label's logit, and another reads them again and writes dz in the compute dtype, from which two more GEMMs make dh and dW. Gradients are
made in the forward pass, from logits that are still there: 3 products of 2 T V D operations. Not keeping anything and computing the logits
again in backward would make it 4 (a third more time in a part that is all GEMM); fusing softmax into our own GEMM saves 10 bytes of traffic
a logit, by arithmetic 43 GB = 10 ms of some 85 ms for 16,384 tokens on an MI300X, but a GEMM 12 % slower than the vendor's costs as much.
Saved are dh and dW, the latter in fp32, because it is summed over chunks. backward multiplies them by dloss.

Memory beside these: 6 bytes a logit of one chunk, CHUNK_LOGITS of them. Logits are fp32 where torch's GEMM can write fp32 from bf16 (CUDA,
and ROCm from torch 2.10); elsewhere bf16, whose rounding moves a logit by up to 2^-9 of its size, hence a probability of a logit of 10 by
2 %, at random, and each chunk's share of dW is rounded to bf16 before it is added.

A vocabulary cut over devices works by the same pieces: `partials` of each shard's rows, (m, sum, label's logit), combine by
m = max, sum = sum of sum_i exp(m_i - m), label's logit = sum; `gradients` takes the lse of all. cross_entropy takes the combination as an
argument, called once per chunk with 12 bytes a token, so that shards need not compute logits twice either.

Letters: T tokens, D hidden, V vocabulary rows of this shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from zaya.kernels.arguments import FLOATS, check
from zaya.kernels.gradient_sum import GradientSum
from zaya.kernels.launch import config, launch, target
from zaya.kernels.reference import IGNORE, Partials, whole

# 2,048 tokens of the whole vocabulary: 2.15 GB of fp32 logits and 1.07 GB of their gradients. Fewer rows would starve the GEMM of dh,
# whose 2,048 x 2,048 outputs are 64 tiles of 256 x 256 for 304 compute units already.
CHUNK_LOGITS = 2048 * 262_272

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x LOG2E)


# ---------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _merged(largest_L, total_L, x_SL):
    """Running largest and sum of exp of L columns, after S more rows."""
    above_L = tl.maximum(largest_L, tl.max(x_SL, 0))
    # exp2 is one instruction; the difference, taken first, is exact where it matters.
    total_L = total_L * tl.exp2((largest_L - above_L) * LOG2E) + tl.sum(tl.exp2((x_SL - above_L[None, :]) * LOG2E), 0)
    return above_L, total_L


@triton.jit
def _cross_entropy_partials_kernel(logits_ptr, labels_ptr, largest_ptr, total_ptr, target_ptr, V, vocab_start, BLOCK_V: tl.constexpr,
                                   LANES: tl.constexpr):
    """One row each: LANES columns keep their own largest logit and sum of exp, so that no thread waits for another until the end, and
    each rescales once for BLOCK_V / LANES logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    v = tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    largest = tl.full((LANES,), -1.0e38, tl.float32)  # finite: exp(-inf - -inf) would be NaN
    total = tl.zeros((LANES,), tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        largest, total = _merged(largest, total, tl.load(logits_ptr + start + v).to(tl.float32))
    largest, total = _merged(largest, total, tl.load(logits_ptr + full + v, mask=v < V - full, other=-float("inf")).to(tl.float32))
    row_largest = tl.max(largest, 0)
    tl.store(largest_ptr + row, row_largest)
    tl.store(total_ptr + row, tl.sum(total * tl.exp2((largest - row_largest) * LOG2E), 0))
    local = tl.load(labels_ptr + row) - vocab_start
    tl.store(target_ptr + row, tl.load(logits_ptr + local, mask=(local >= 0) & (local < V), other=0.0).to(tl.float32))


@triton.jit
def _cross_entropy_gradient_kernel(logits_ptr, labels_ptr, lse_ptr, dlogits_ptr, V, vocab_start, z_loss, IGNORED: tl.constexpr,
                                   BLOCK_V: tl.constexpr):
    """One row each: dlogits for dloss = 1; zero where the label is IGNORED."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    dlogits_ptr += row * V
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    local = label - vocab_start
    scale = tl.where(label == IGNORED, 0.0, 1.0 + 2.0 * z_loss * lse)
    hit = tl.where((label != IGNORED) & (local >= 0) & (local < V), local, -1).to(tl.int32)
    v = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        x = tl.load(logits_ptr + start + v).to(tl.float32)
        dx = scale * tl.exp2((x - lse) * LOG2E) - tl.where(start + v == hit, 1.0, 0.0)
        tl.store(dlogits_ptr + start + v, dx.to(dlogits_ptr.dtype.element_ty))
    x = tl.load(logits_ptr + full + v, mask=v < V - full, other=0.0).to(tl.float32)
    dx = scale * tl.exp2((x - lse) * LOG2E) - tl.where(full + v == hit, 1.0, 0.0)
    tl.store(dlogits_ptr + full + v, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V - full)


# ---------------------------------------------------------------------------------------------------------------- pieces


def _row_partials(logits: Tensor, labels: Tensor, vocab_start: int) -> Partials:
    """Of a chunk's logits (rows, V): largest, sum of exp(logit - largest), label's logit or 0, each (rows,) fp32."""
    largest, total, at_label = (torch.empty(len(labels), dtype=torch.float32, device=labels.device) for _ in range(3))
    launch(_cross_entropy_partials_kernel, (len(labels),), {
        "logits_ptr": logits, "labels_ptr": labels, "largest_ptr": largest, "total_ptr": total, "target_ptr": at_label,
        "V": logits.shape[1], "vocab_start": vocab_start}, config(_cross_entropy_partials_kernel, target(labels.device)))
    return largest, total, at_label


def _dlogits(logits: Tensor, labels: Tensor, lse: Tensor, vocab_start: int, z_loss: float, out: Tensor) -> Tensor:
    launch(_cross_entropy_gradient_kernel, (len(labels),), {
        "logits_ptr": logits, "labels_ptr": labels, "lse_ptr": lse, "dlogits_ptr": out, "V": logits.shape[1], "vocab_start": vocab_start,
        "z_loss": float(z_loss), "IGNORED": IGNORE}, config(_cross_entropy_gradient_kernel, target(labels.device)))
    return out


@functools.cache
def _writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's GEMM takes `dtype` and writes fp32 there: yes on CUDA, on ROCm from torch 2.10, not on the CPU."""
    if dtype == torch.float32 or device.type != "cuda":
        return False
    sample = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(sample.float(), sample, sample, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, out of the operands' dtype or fp32."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cuda":
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # tensors of the CPU, in tests
        torch.mm(left.float(), right.float(), out=out)


def _add_product(left: Tensor, right: Tensor, total: Tensor, is_first: bool) -> None:
    """total += left @ right, total fp32; is_first: total = left @ right, whatever it held."""
    if left.device.type == "cuda" and left.dtype != torch.float32 and not _writes_fp32(left.device, left.dtype):
        product = torch.mm(left, right)
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        _product(left, right, total)
    elif left.device.type == "cuda" and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left.float(), right.float(), out=total)


class _Chunks:
    """Blocks of rows, with the buffers that serve them all."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, training: bool) -> None:
        T, V, device, dtype = hidden_TD.shape[0], weight_VD.shape[0], hidden_TD.device, hidden_TD.dtype
        most = max(CHUNK_LOGITS // V, 1)
        most = most // 256 * 256 or most  # whole tiles of the GEMM
        self.rows = max(min(most, T), 1)
        wide = device.type != "cuda" or dtype == torch.float32 or _writes_fp32(device, dtype)
        self.logits_RV = torch.empty(self.rows, V, dtype=torch.float32 if wide else dtype, device=device)
        self.dlogits_RV = torch.empty(self.rows if training else 0, V, dtype=dtype, device=device)
        self.hidden_TD, self.weight_VD = hidden_TD, weight_VD

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Where each chunk lies in T, and its logits."""
        for start in range(0, len(self.hidden_TD), self.rows):
            chunk = slice(start, min(start + self.rows, len(self.hidden_TD)))
            logits = self.logits_RV[: chunk.stop - start]
            _product(self.hidden_TD[chunk], self.weight_VD.t(), logits)
            yield chunk, logits


def _add_gradients(chunks: _Chunks, chunk: slice, logits: Tensor, labels: Tensor, lse: Tensor, vocab_start: int, z_loss: float,
                   dhidden_TD: Tensor, dweight_VD: Tensor) -> None:
    """Write the chunk's rows of dhidden and add to dweight (fp32), which the first chunk begins, both for dloss = 1."""
    dlogits = _dlogits(logits, labels, lse, vocab_start, z_loss, chunks.dlogits_RV[: len(labels)])
    _product(dlogits, chunks.weight_VD, dhidden_TD[chunk])
    _add_product(dlogits.t(), chunks.hidden_TD[chunk], dweight_VD, is_first=chunk.start == 0)


def _gradient_buffers(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten dhidden and dweight (fp32), which `_add_gradients` fills; without rows it never runs, and dweight is zero."""
    make = torch.empty_like if len(hidden_TD) else torch.zeros_like
    return torch.empty_like(hidden_TD), make(weight_VD, dtype=torch.float32)


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """One pass and one rounding."""
    return torch.mul(gradient, dloss.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))


def _check(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> None:
    check("hidden_TD", hidden_TD, shape=(None, None), dtypes=FLOATS)
    T, D = hidden_TD.shape
    check("weight_VD", weight_VD, shape=(None, D), dtypes=(hidden_TD.dtype,), device=hidden_TD.device)
    check("labels_T", labels_T, shape=(T,), dtypes=(torch.int64,), device=hidden_TD.device)
    if weight_VD.shape[0] == 0 or D == 0:
        raise ValueError(f"weight_VD has shape {tuple(weight_VD.shape)}, expected at least one row and one column")


# ---------------------------------------------------------------------------------------------------------------- ops


def partials(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, vocab_start: int = 0) -> Partials:
    """What the shard of rows [vocab_start, vocab_start + V) contributes: each (T,) fp32, the largest logit, the sum of
    exp(logit - largest), and the label's logit where the label lies in the shard, else 0. No gradient: that is `gradients`."""
    _check(hidden_TD, weight_VD, labels_T)
    with torch.no_grad():
        found = [_row_partials(logits, labels_T[chunk], vocab_start) for chunk, logits in _Chunks(hidden_TD, weight_VD, training=False)]
        if not found:
            return tuple(hidden_TD.new_empty(0, dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]
        largest, total, at_label = (torch.cat(column) for column in zip(*found))
    return largest, total, at_label


def gradients(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, lse_T: Tensor, dloss: Tensor, vocab_start: int = 0,
              z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """This shard's share of dhidden (to be summed over shards) and its dweight, from the log-sum-exp over all shards (T,) fp32 and the
    loss' gradient (0-dim). Computes the logits again."""
    _check(hidden_TD, weight_VD, labels_T)
    check("lse_T", lse_T, shape=labels_T.shape, dtypes=(torch.float32,), device=hidden_TD.device)
    with torch.no_grad():
        chunks = _Chunks(hidden_TD, weight_VD, training=True)
        dhidden_TD, dweight_VD = _gradient_buffers(hidden_TD, weight_VD)
        for chunk, logits in chunks:
            _add_gradients(chunks, chunk, logits, labels_T[chunk], lse_T[chunk], vocab_start, z_loss, dhidden_TD, dweight_VD)
        return _scaled(dhidden_TD, dloss, hidden_TD.dtype), _scaled(dweight_VD, dloss, weight_VD.dtype)


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0, *, vocab_start: int = 0,
                  combine: Callable[[Partials], Partials] = whole, gradient_sum: GradientSum | None = None) -> Tensor:
    """Sum over the labelled tokens of -log softmax(hidden @ weight.T)[label] + z_loss * logsumexp^2, fp32, 0-dim.

    hidden (T, D), weight (V, D) of one dtype, labels (T,) int64 in the vocabulary or IGNORE. With a vocabulary over devices, weight is
    the shard that starts at vocab_start and combine turns a chunk's partials into those of all shards, called equally often on each;
    the loss is then the whole one everywhere, and hidden's gradient this shard's share, to be summed. gradient_sum: of weight, fp32.
    """
    _check(hidden_TD, weight_VD, labels_T)
    if gradient_sum is not None:
        check("gradient_sum", gradient_sum.total, shape=tuple(weight_VD.shape), dtypes=(torch.float32,), device=hidden_TD.device)
    training = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _CrossEntropy.apply(hidden_TD, weight_VD, labels_T, z_loss, vocab_start, combine, gradient_sum, training)


class _CrossEntropy(torch.autograd.Function):
    """Saves both gradients for dloss = 1."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, z_loss, vocab_start, combine, gradient_sum, training):
        chunks = _Chunks(hidden_TD, weight_VD, training)
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        if training:
            dhidden_TD, dweight_VD = _gradient_buffers(hidden_TD, weight_VD)
        for chunk, logits in chunks:
            labels = labels_T[chunk]
            largest, total, at_label = combine(_row_partials(logits, labels, vocab_start))
            lse = largest + total.log()
            losses = total.log() + (largest - at_label) + z_loss * lse.square()  # the difference first: it may be of two large logits
            loss += torch.where(labels == IGNORE, 0.0, losses).sum()
            if training:
                _add_gradients(chunks, chunk, logits, labels, lse, vocab_start, z_loss, dhidden_TD, dweight_VD)
        if training:
            ctx.save_for_backward(dhidden_TD, dweight_VD)
            ctx.gradient_sum = gradient_sum
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        gradient_sum = ctx.gradient_sum or GradientSum.temporary(dweight_VD, dhidden_TD.dtype)
        gradient_sum.add_scaled(dweight_VD, dloss)
        return _scaled(dhidden_TD, dloss, dhidden_TD.dtype), gradient_sum.for_autograd(dhidden_TD.dtype), *[None] * 6
