"""The specification of every op, in plain torch: what a kernel must compute, and what the CPU trains with.

Everything elementwise is computed in fp32 (fp64 stays fp64) and cast once at the end. Knows no module, recipe or rank.

Letters: B batch rows, T tokens, S keys of the whole sequence, D hidden, H head dim, N query heads, G KV heads (a group = N / G query
heads), C channels or router classes, E experts, F expert width, R rows routed, V vocabulary, K chunks of the sequence on this device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a token that predicts nothing
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024: steepest at 0 while singular values stay in about [0.7, 1.2]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- stream


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, in weight's dtype."""
    x = x.to(wide(x.dtype))
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(weight.dtype)


def residual_norm(stream: Tensor, branch: Tensor, scales: tuple[Tensor, Tensor, Tensor, Tensor], norm_weight: Tensor,
                  eps: float) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's output to the stream, per channel scaled, and norm the sum for the next sub-layer.

    stream <- (branch + branch_bias) * branch_scale + (stream + stream_bias) * stream_scale;  x = rms_norm(stream).
    stream is fp32 (fp64), branch in compute dtype; scales = (branch_scale, branch_bias, stream_scale, stream_bias), each (D,).
    Returns the new stream and x in norm_weight's dtype.
    """
    a_h, b_h, a_x, b_x = (s.to(stream.dtype) for s in scales)
    # (h + b_h) a_h + (x + b_x) a_x with one constant: two passes less over the stream.
    stream = torch.addcmul(torch.addcmul(a_h * b_h + a_x * b_x, branch.to(stream.dtype), a_h), stream, a_x)
    return stream, rms_norm(stream, norm_weight, eps)


# ---------------------------------------------------------------------------------------------------------------- attention


def rope_table(positions_BT: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, H / 4) for RoPE on the first half of a head: angle = position * base^(-2 i / (H / 2))."""
    dtype = wide(dtype)
    rotary = head_dim // 2
    exponents = torch.arange(0, rotary, 2, dtype=dtype, device=positions_BT.device) / rotary
    angles = positions_BT[..., None].to(dtype) * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on the first half of each head."""
    quarter = x_BTNH.shape[-1] // 4
    a, b, rest = x_BTNH.split((quarter, quarter, 2 * quarter), dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def shifted(x_BTC: Tensor, halo_BKnC: Tensor, keep_BT: Tensor, by: int) -> Tensor:
    """Token t - by at t, where keep says that it belongs to the same document, else 0. K chunks lie one after the other in T, and
    halo holds the last n >= by tokens before each of them."""
    B, T, C = x_BTC.shape
    K, n = halo_BKnC.shape[1:3]
    chunks = torch.cat((halo_BKnC[:, :, n - by:], x_BTC.view(B, K, T // K, C)[:, :, :-by]), dim=2)
    return chunks.view(B, T, C) * keep_BT[..., None].to(x_BTC.dtype)


def causal_convolutions(x_BTC: Tensor, halo_BK2C: Tensor, positions_BT: Tensor, depthwise: tuple[Tensor, Tensor],
                        grouped: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """A depthwise, then a per-head causal convolution, both of width 2, restarting at every document (arXiv 2510.04476).

        y_t = w1 x_t + w0 x_(t-1) + b          (w: (C, 2), tap 0 = the previous token; b: (C,))
        z_t = W1 y_t + W0 y_(t-1) + c          (W: (C, H, 2), mixing the H channels of a head; c: (C,))

    with x = 0 before the document, hence y = b there. No activation stands between them, so both are one convolution of width 3:
    z_t = W1 w1 x_t + (W1 w0 + W0 w1) x_(t-1) + W0 w0 x_(t-2) + (W0 + W1) b + c.   Returns (B, T, C / H, H).
    """
    B, T, C = x_BTC.shape
    heads = C // head_dim
    w0, w1 = (w.view(heads, 1, head_dim) for w in depthwise[0].unbind(-1))
    W0, W1 = (w.reshape(heads, head_dim, head_dim) for w in grouped[0].unbind(-1))
    kernel = torch.cat((W1 * w1, W1 * w0 + W0 * w1, W0 * w0), dim=-1)  # (heads, H out, 3 H in)
    constant = ((W0 + W1) * depthwise[1].view(heads, 1, head_dim)).sum(-1) + grouped[1].view(heads, head_dim)
    taps = [x_BTC, *(shifted(x_BTC, halo_BK2C, positions_BT >= by, by) for by in (1, 2))]
    taps_MNK = torch.cat([tap.reshape(B * T, heads, head_dim) for tap in taps], dim=-1)
    z_NMH = torch.bmm(taps_MNK.transpose(0, 1), kernel.transpose(1, 2))
    return (z_NMH.transpose(0, 1) + constant).view(B, T, heads, head_dim)


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """Each head to length sqrt(H)."""
    return x * (math.sqrt(x.shape[-1]) / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps))


def cca(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor, q_convs: tuple[Tensor, Tensor, Tensor, Tensor],
        k_convs: tuple[Tensor, Tensor, Tensor, Tensor], temperature_G: Tensor, positions_BT: Tensor, rope: tuple[Tensor, Tensor],
        halos: tuple[Tensor, Tensor, Tensor], delayed_rows: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed convolutional attention: from projected q~, k~, v to attention-ready q (B,T,N,H), k and v (B,T,G,H).

    q = conv(q~) + (q~ + k~) / 2;  k = conv(k~) + (mean of q~ over the group + k~) / 2;  both to length sqrt(H), k times its
    temperature, then RoPE. Channels [start, end) of v = delayed_rows come from the previous token of the document.
    q_mean: q~'s mean over each group (its own input, because a group can span devices). convs = (depthwise weight, bias, grouped
    weight, bias). halos: the two tokens before each chunk of q~ and k~ (B,K,2,C) and the one before of the delayed values (B,K,1,C).
    """
    B, T, _ = q_BTC.shape
    G, H = q_mean_BTGH.shape[2:]
    eps, dtype = torch.finfo(q_BTC.dtype).eps, q_BTC.dtype
    high = wide(dtype)
    q, k, mean, v = q_BTC.to(high), k_BTC.to(high), q_mean_BTGH.to(high), v_BTC.view(B, T, -1)
    q_conv, k_conv = ([w.to(high) for w in convs] for convs in (q_convs, k_convs))
    q_z = causal_convolutions(q, halos[0].to(high), positions_BT, (q_conv[0], q_conv[1]), (q_conv[2], q_conv[3]), H)
    k_z = causal_convolutions(k, halos[1].to(high), positions_BT, (k_conv[0], k_conv[1]), (k_conv[2], k_conv[3]), H)
    k_heads = k.view(B, T, G, H)
    q_heads = q.view(B, T, G, -1, H)
    q = q_z + ((q_heads + k_heads[:, :, :, None]) * 0.5).view(q_z.shape)
    k = k_z + (mean + k_heads) * 0.5
    q = rotate(l2_normalize(q, eps), *rope)
    k = rotate(l2_normalize(k, eps) * temperature_G.to(high)[:, None], *rope)
    start, end = delayed_rows
    delayed = shifted(v[..., start:end], halos[2], positions_BT >= 1, 1)
    v = torch.cat((v[..., :start], delayed, v[..., end:]), dim=-1)
    return q.to(dtype), k.to(dtype), v.view(B, T, G, H)


def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Causal grouped-query attention, scale 1 / sqrt(H), over keys [first_key, own index] of each query.

    k and v hold the whole sequence; q holds len(offsets) equal chunks of it, chunk c starting at index offsets[c] (one chunk at 0
    where nothing is cut). first_key (B, T) is the later of the document's start and the sliding window's edge. Returns (B, T, N, H).
    """
    T, S = q_BTNH.shape[1], k_BSGH.shape[1]
    chunk = T // len(offsets)
    index_T = torch.cat([torch.arange(offset, offset + chunk, device=q_BTNH.device) for offset in offsets])
    key_S = torch.arange(S, device=q_BTNH.device)
    visible_BTS = (key_S >= first_key_BT[..., None]) & (key_S <= index_T[:, None])
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BTS[:, None], enable_gqa=True).transpose(1, 2)

# ---------------------------------------------------------------------------------------------------------------- experts


def route(logits_TC: Tensor, balance_bias_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 routing: class = argmax(softmax + balance bias); the gate is the raw probability of the class, not renormalised.

    Returns class (T,) int64, gate (T,) fp32 (fp64), and the number of tokens per class (C,) int64. The bias gets no gradient here.
    """
    probs_TC = logits_TC.softmax(-1, dtype=wide(logits_TC.dtype))
    choice_T = (probs_TC.detach() + balance_bias_C).argmax(-1)
    gate_T = probs_TC.gather(-1, choice_T[:, None])[:, 0]
    counts_C = torch.zeros_like(balance_bias_C, dtype=torch.int64).scatter_add_(0, choice_T, torch.ones_like(choice_T))
    return choice_T, gate_T, counts_C


def sort_by_expert(choice_T: Tensor) -> Tensor:
    """Row order (T,) that brings the tokens of expert 0, 1, ... together, each in its old order; a skip class, the last, ends up last."""
    return choice_T.argsort(stable=True)


class _GroupedLinear(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ weight[e].T, with one weight-gradient buffer for all experts."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weight_EFD: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EFD)
        ctx.sizes = sizes
        y_RF = x_RD.new_empty(x_RD.shape[0], weight_EFD.shape[1])
        for expert, (start, end) in enumerate(_spans(sizes)):
            torch.mm(x_RD[start:end], weight_EFD[expert].t(), out=y_RF[start:end])
        y_RF[sum(sizes):] = 0
        return y_RF

    @staticmethod
    def backward(ctx, dy_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight_EFD = ctx.saved_tensors
        dy_RF = dy_RF.contiguous()
        dx_RD, dweight_EFD = torch.empty_like(x_RD), torch.empty_like(weight_EFD)
        for expert, (start, end) in enumerate(_spans(ctx.sizes)):
            torch.mm(dy_RF[start:end], weight_EFD[expert], out=dx_RD[start:end])
            torch.mm(dy_RF[start:end].t(), x_RD[start:end], out=dweight_EFD[expert])
        dx_RD[sum(ctx.sizes):] = 0
        return dx_RD, dweight_EFD, None


def _spans(sizes: list[int]) -> list[tuple[int, int]]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return list(zip([0, *ends[:-1]], ends))


def experts(x_RD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """SwiGLU experts over rows sorted by expert: down(silu(gate) * up), gate_up = [gate | up] (E, 2F, D), down (E, D, F).

    sizes (E,) int64: rows of each expert, in order; rows beyond their sum (skipped tokens) come out as zero.
    """
    sizes = sizes_E.tolist()
    gate, up = _GroupedLinear.apply(x_RD, gate_up_EFD, sizes).chunk(2, dim=-1)
    return _GroupedLinear.apply(F.silu(gate) * up, down_EDF, sizes)


def combine(rows_RD: Tensor, gate_T: Tensor, order_R: Tensor) -> Tensor:
    """Each token's expert output times its gate, back in token order: the inverse of sorting."""
    inverse_T = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return rows_RD.index_select(0, inverse_T) * gate_T[:, None].to(rows_RD.dtype)


# ---------------------------------------------------------------------------------------------------------------- loss


def cross_entropy_partials(logits_TV: Tensor, labels_T: Tensor, vocab_start: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one shard of the vocabulary, rows [vocab_start, vocab_start + V), contributes to a cross-entropy, each (T,) fp32 (fp64):
    the largest logit, the sum of exp(logit - largest), and the label's logit where the label lies in the shard, else 0.
    Also softmax within the shard (T, V). The sum is read off it, 1 / its largest: torch's softmax has an exp several times faster than exp.
    """
    local_T = labels_T - vocab_start
    inside_T = (local_T >= 0) & (local_T < logits_TV.shape[-1])
    target_T = logits_TV.gather(-1, local_T.clamp(0, logits_TV.shape[-1] - 1)[:, None])[:, 0]
    probs_TV = logits_TV.softmax(-1)
    return logits_TV.amax(-1), 1 / probs_TV.amax(-1), torch.where(inside_T, target_T, 0.0), probs_TV


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over the labelled tokens of -log softmax(hidden @ weight.T)[label], in fp32 (fp64); labels of IGNORE count nothing."""
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, torch.is_grad_enabled())


LOSS_BLOCK = 1 << 19  # logits at a time: 2 MiB in fp32, so that they stay in cache from the product to its gradients


class _LinearCrossEntropy(torch.autograd.Function):
    """Blocks of tokens: logits, loss, and at once both gradients (softmax - onehot), so that logits are never kept."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, training):
        V, dtype = weight_VD.shape[0], wide(hidden_TD.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden_TD.device)
        dhidden_TD, dweight_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD, dtype=dtype)
        for h, labels, dh in zip(*(x.split(max(LOSS_BLOCK // V, 1)) for x in (hidden_TD, labels_T, dhidden_TD))):
            largest, total, target, probs = cross_entropy_partials(F.linear(h, weight_VD).to(dtype), labels)
            labelled = labels != IGNORE
            loss += torch.where(labelled, total.log() + largest - target, 0.0).sum()
            if training:
                probs.scatter_add_(-1, labels.clamp_min(0)[:, None], -torch.ones_like(total)[:, None])
                dlogits = probs.mul_(labelled[:, None]).to(hidden_TD.dtype)
                torch.mm(dlogits, weight_VD, out=dh)
                torch.addmm(dweight_VD, dlogits.t().to(dtype), h.to(dtype), out=dweight_VD)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD.mul_(dloss), dweight_VD.mul_(dloss).to(ctx.weight_dtype), None, None

# ---------------------------------------------------------------------------------------------------------------- optimizer


def newton_schulz(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Orthogonalise each matrix of (..., rows, cols) in its own dtype: X <- a X + (b A + c A^2) X with A = X X^T, from X / ||X||_F.

    Works on the wide side (rows <= cols), so A is the smaller Gram matrix. Singular values end near 1, not at it (Jordan et al.).
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
