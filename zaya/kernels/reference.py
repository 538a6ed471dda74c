"""The specification of every op, in plain torch: what a kernel must compute, forward and backward, and what trains where none can.

Norms, convolutions, attention, routing and loss are computed in fp32 (fp64 stays fp64) and cast once at the end; experts and
Newton-Schulz round in their inputs' dtype (but not what enters a GradientSum). Where an op has a backward of its own, it is the one a
kernel implements: it says what is saved and what is computed again. Knows no module, recipe or rank.

Letters: B batch rows, T tokens, S keys of the whole sequence, D hidden, H head dim, N query heads, G KV heads (a group = N / G query
heads), C channels or router classes, E experts, F expert width, R rows routed, V vocabulary, K chunks of the sequence on this
device, n tokens of a halo, Q queries of a block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from zaya.kernels.gradient_sum import ExpertSums, GradientSum

IGNORE = -100  # label of a token that predicts nothing; torch's and transformers' losses skip it too
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024: steepest at 0 while singular values stay in about [0.7, 1.2]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The accumulation dtype: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- stream


def lookup(tokens: Tensor, weight_VD: Tensor, gradient_sum: GradientSum | None = None) -> Tensor:
    """The rows of weight that tokens (...) int64 name (..., D). Not one of `Ops`: torch's gather is kernel enough."""
    return _Lookup.apply(tokens, weight_VD, gradient_sum)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight_VD, gradient_sum):
        ctx.save_for_backward(tokens)
        ctx.num_rows, ctx.gradient_sum = len(weight_VD), gradient_sum
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx, dy):
        return None, lookup_gradient(ctx.saved_tensors[0], dy, ctx.num_rows, ctx.gradient_sum), None


def lookup_gradient(tokens: Tensor, dy: Tensor, num_rows: int, gradient_sum: GradientSum | None) -> Tensor:
    """The weight's (num_rows, D) from dy (..., D), as autograd gets it: dense and rounded once, or left in gradient_sum."""
    if gradient_sum is None:
        return torch.ops.aten.embedding_dense_backward(dy, tokens, num_rows, -1, False)
    gradient_sum.add_rows(tokens, dy)
    return gradient_sum.for_autograd(dy.dtype)


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
    return _ResidualNorm.apply(stream, branch, *scales, norm_weight, eps)


class _ResidualNorm(torch.autograd.Function):
    """With t the new stream, r = 1 / rms(t), x = t r w:  dt = dstream + r (w dx) - t r^2 mean(t r w dx);  dw = sum t r dx.

    Saves stream, branch, t and r."""

    @staticmethod
    def forward(ctx, stream, branch, a_h, b_h, a_x, b_x, weight, eps):
        D, dtype = stream.shape[-1], stream.dtype
        a_h, b_h, a_x, b_x, w = (p.to(dtype) for p in (a_h, b_h, a_x, b_x, weight))
        new = torch.addcmul(a_h * b_h + a_x * b_x, branch.to(dtype), a_h).addcmul_(stream, a_x)
        inverse_rms = (torch.linalg.vector_norm(new, dim=-1, keepdim=True).square() / D + eps).rsqrt()
        ctx.save_for_backward(stream, branch, new, inverse_rms, a_h, b_h, a_x, b_x, w)
        ctx.param_dtype = weight.dtype
        return new, (new * inverse_rms).mul_(w).to(weight.dtype)

    @staticmethod
    def backward(ctx, dstream, dx):
        stream, branch, new, r, a_h, b_h, a_x, b_x, w = ctx.saved_tensors
        D, dx = new.shape[-1], dx.to(new.dtype)
        product = dx * new
        dw = r.flatten() @ product.view(-1, D)
        mean = (product @ w)[..., None].mul_(r) / D
        dt = torch.addcmul(dstream, new, -mean * r * r).addcmul_(dx * r, w)
        rows = dt.view(-1, D)
        total = rows.sum(0)
        da_h = b_h * total + torch.mul(rows, branch.reshape(-1, D), out=product.view(-1, D)).sum(0)
        da_x = b_x * total + torch.mul(rows, stream.reshape(-1, D), out=product.view(-1, D)).sum(0)
        vectors = (da_h, a_h * total, da_x, a_x * total, dw)
        return dt * a_x, (dt * a_h).to(branch.dtype), *(v.to(ctx.param_dtype) for v in vectors), None

# ---------------------------------------------------------------------------------------------------------------- attention


def rope_table(positions_BT: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, T, H / 4) for RoPE on the first half of a head: angle = position * base^(-2 i / (H / 2))."""
    dtype = wide(dtype)
    rotary = head_dim // 2
    exponents = torch.arange(0, rotary, 2, dtype=dtype, device=positions_BT.device) / rotary
    angles = positions_BT[..., None].to(dtype) * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE on the first half of each head, its quarters a and b: (a cos - b sin, b cos + a sin). One multiply-add over both;
    the transpose is rotate(x, cos, -sin)."""
    quarter = x_BTNH.shape[-1] // 4
    cos, sin = cos[:, :, None], sin[:, :, None]
    out = torch.cat((x_BTNH[..., quarter : 2 * quarter], x_BTNH[..., :quarter], x_BTNH[..., 2 * quarter :]), dim=-1)
    out[..., : 2 * quarter].mul_(torch.cat((-sin, sin), -1)).addcmul_(x_BTNH[..., : 2 * quarter], torch.cat((cos, cos), -1))
    return out


def fold_convolutions(depthwise: tuple[Tensor, Tensor], grouped: tuple[Tensor, Tensor], head_dim: int) -> tuple[Tensor, Tensor]:
    """A depthwise, then a per-head causal convolution, both of width 2 (arXiv 2510.04476), as one of width 3.

        y_t = w1 x_t + w0 x_(t-1) + b          (w: (C, 2), tap 0 = the previous token; b: (C,))
        z_t = W1 y_t + W0 y_(t-1) + c          (W: (C, H, 2), mixing the H channels of a head; c: (C,))

    with x = 0 before the document, hence y = b there. No activation stands between them, so
    z_t = W1 w1 x_t + (W1 w0 + W0 w1) x_(t-1) + W0 w0 x_(t-2) + (W0 + W1) b + c. Returns the kernel (C / H, 3 H in, H out) and the
    constant (C / H, H).
    """
    heads = depthwise[1].numel() // head_dim
    w0, w1 = (w.view(heads, 1, head_dim) for w in depthwise[0].unbind(-1))
    W0, W1 = (w.reshape(heads, head_dim, head_dim) for w in grouped[0].unbind(-1))
    kernel = torch.cat((W1 * w1, W1 * w0 + W0 * w1, W0 * w0), dim=-1).mT
    constant = ((W0 + W1) * depthwise[1].view(heads, 1, head_dim)).sum(-1) + grouped[1].view(heads, head_dim)
    return kernel, constant


def no_halos(parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """For each (x (B, T, C), n) the n tokens before a row that is whole (B, 1, n, C): zeros, as before any document."""
    return [_zeros((x_BTC.shape[0], 1, n, x_BTC.shape[-1]), x_BTC.dtype, x_BTC.device) for x_BTC, n in parts]


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor for all blocks and steps: nobody writes to a halo."""
    with torch.inference_mode(False):  # made in it, it could never be saved for a backward pass
        return torch.zeros(shape, dtype=dtype, device=device)


def shift(x_BTC: Tensor, halo_BKnC: Tensor, keep_BT1: Tensor, by: int, out_BTC: Tensor) -> None:
    """out: token t - by at t, where keep says that it belongs to the same document, else 0. K chunks lie one after the other in T, and
    halo holds the last n >= by tokens before each of them."""
    K, n = halo_BKnC.shape[1:3]
    x, keep, out = (tensor.unflatten(1, (K, -1)) for tensor in (x_BTC, keep_BT1, out_BTC))
    near = min(by, x.shape[2])
    torch.mul(halo_BKnC[:, :, n - by : n - by + near], keep[:, :, :near], out=out[:, :, :near])
    torch.mul(x[:, :, :-by], keep[:, :, by:], out=out[:, :, by:])


def unshift_(dout_BTC: Tensor, keep_BT1: Tensor, by: int, dx_BTC: Tensor, dhalo_BKnC: Tensor) -> None:
    """The transpose of `shift`, added to dx and dhalo."""
    K, n = dhalo_BKnC.shape[1:3]
    dx, keep, dout = (tensor.unflatten(1, (K, -1)) for tensor in (dx_BTC, keep_BT1, dout_BTC))
    near = min(by, dx.shape[2])
    dhalo_BKnC[:, :, n - by : n - by + near].addcmul_(dout[:, :, :near], keep[:, :, :near])
    dx[:, :, :-by].addcmul_(dout[:, :, by:], keep[:, :, by:])


class _Shift(torch.autograd.Function):
    """`shift` by one token, for the delayed values."""

    @staticmethod
    def forward(ctx, x, halo, keep):
        ctx.save_for_backward(halo, keep)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        shift(x, halo, keep, 1, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        halo, keep = ctx.saved_tensors
        dx, dhalo = torch.zeros_like(dout), torch.zeros_like(halo)
        unshift_(dout, keep, 1, dx, dhalo)
        return dx, dhalo, None


class _MixNormRotate(torch.autograd.Function):
    """out = rotate(temperature * e), e = r u, r = sqrt(H) / |u|, u = conv(x) + (x + other) / 2; temperature None is 1.

    x (B, T, C), C = N heads of H channels, of which groups of N / G share a head of other (B, T, G, H); kernel (N, 3 H, H) and constant
    (N, H) as `fold_convolutions` makes them; halo (B, K, 2, C); keeps, of one and two tokens back, (B, T, 1) each. Returns (B, T, N, H).

    With d = temperature * rotate^T(dout):  du = r (d - e (d . e) / H), without the second term where |u| < eps, to which it is clamped;
    dtemperature = sum rotate^T(dout) . e. Saves x, e and r; backward builds the taps of the convolution again.
    """

    @staticmethod
    def forward(ctx, x_BTC, other_BTGH, kernel, constant, temperature_N, halo, keeps, rope, eps):
        H, G = constant.shape[-1], other_BTGH.shape[2]
        u = (x_BTC.view(*x_BTC.shape[:2], G, -1, H) + other_BTGH[:, :, :, None]).flatten(2, 3)
        u.mul_(0.5).add_(constant)
        u_by_head = _by_head(u.view(x_BTC.shape), H)  # the same memory
        for tap_BTC, tap_kernel in zip(_taps(x_BTC, halo, keeps), kernel.split(H, dim=1)):
            torch.baddbmm(u_by_head, _by_head(tap_BTC, H), tap_kernel, out=u_by_head)
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        inverse = math.sqrt(H) / norm.clamp_min(eps)
        unit = u.mul_(inverse)
        ctx.save_for_backward(x_BTC, unit, inverse, norm < eps, kernel, temperature_N, halo, *keeps, *rope)
        ctx.groups = G
        return rotate(unit if temperature_N is None else unit * temperature_N[:, None], *rope)

    @staticmethod
    def backward(ctx, dout):
        x, unit, inverse, clamped, kernel, temperature, halo, *keeps, cos, sin = ctx.saved_tensors
        H = unit.shape[-1]
        dout = rotate(dout, cos, -sin).contiguous()
        along = torch.linalg.vecdot(dout, unit)[..., None]
        dtemperature = None
        if temperature is not None:
            dtemperature = along.sum((0, 1, 3))
            dout, along = dout.mul_(temperature[:, None]), along * temperature[:, None]
        du = dout.addcmul_((along / -H).masked_fill_(clamped, 0.0), unit).mul_(inverse)
        dz = _by_head(du.view(x.shape), H)
        # Tap 0 is x itself, so its gradient begins dx; those of taps 1 and 2 are shifted back into it.
        dx, dtap, dhalo, dkernels = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(halo), []
        for by, (tap_BTC, tap_kernel) in enumerate(zip(_taps(x, halo, keeps), kernel.split(H, dim=1))):
            dkernels.append(torch.bmm(_by_head(tap_BTC, H).mT, dz))
            torch.bmm(dz, tap_kernel.mT, out=_by_head(dtap if by else dx, H))
            if by:
                unshift_(dtap, keeps[by - 1], by, dx, dhalo)
        dconstant, half = du.sum((0, 1)), du.mul_(0.5)
        dother = half.unflatten(2, (ctx.groups, -1)).sum(3)
        return dx.add_(half.view(x.shape)), dother, torch.cat(dkernels, dim=1), dconstant, dtemperature, dhalo, None, None, None


def _by_head(x_BTC: Tensor, head_dim: int) -> Tensor:
    """(B, T, C), which must be contiguous, as a view (N, B T, H)."""
    return x_BTC.view(-1, x_BTC.shape[-1] // head_dim, head_dim).transpose(0, 1)


def _taps(x_BTC: Tensor, halo_BK2C: Tensor, keeps: Sequence[Tensor]) -> Iterator[Tensor]:
    """Tokens t, t - 1, t - 2, each (B, T, C)."""
    yield x_BTC
    for by, keep in enumerate(keeps, start=1):
        tap_BTC = torch.empty_like(x_BTC)
        shift(x_BTC, halo_BK2C, keep, by, tap_BTC)
        yield tap_BTC


def cca(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor | None, q_convs: tuple[Tensor, Tensor, Tensor, Tensor],
        k_convs: tuple[Tensor, Tensor, Tensor, Tensor], temperature_G: Tensor, positions_BT: Tensor, rope: tuple[Tensor, Tensor],
        halos: tuple[Tensor, Tensor, Tensor], delayed_rows: tuple[int, int],
        begin: Callable[[Tensor, Tensor], None] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed convolutional attention: from projected q~, k~, v to attention-ready q (B,T,N,H), k and v (B,T,G,H).

    q = conv(q~) + (q~ + k~) / 2;  k = conv(k~) + (mean of q~ over the group + k~) / 2;  both to length sqrt(H), k times its
    temperature, then RoPE. Channels [start, end) of v = delayed_rows come from the previous token of the document.
    q_mean: q~'s mean over each group, where the group spans devices; None: it is taken here. convs = (depthwise weight, bias, grouped
    weight, bias). halos: the two tokens before each chunk of q~ and k~ (B,K,2,C) and the one before of the delayed values (B,K,1,C).
    begin is called with k and v as soon as they exist, before the query heads: it may send them away, and must change nothing.
    """
    return cca_by(_MixNormRotate.apply, q_BTC, k_BTC, v_BTC, q_mean_BTGH, q_convs, k_convs, temperature_G, positions_BT, rope, halos,
                  delayed_rows, begin)


def cca_by(mix: Callable[..., Tensor], q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor | None,
           q_convs: tuple[Tensor, Tensor, Tensor, Tensor], k_convs: tuple[Tensor, Tensor, Tensor, Tensor], temperature_G: Tensor,
           positions_BT: Tensor, rope: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor, Tensor], delayed_rows: tuple[int, int],
           begin: Callable[[Tensor, Tensor], None] | None) -> tuple[Tensor, Tensor, Tensor]:
    """`cca`, where mix computes what `_MixNormRotate` does."""
    B, T, _ = q_BTC.shape
    G = len(temperature_G)
    H = k_BTC.shape[-1] // G
    eps, dtype = torch.finfo(q_BTC.dtype).eps, q_BTC.dtype
    high = wide(dtype)
    q, k = q_BTC.to(high).contiguous(), k_BTC.to(high).contiguous()
    mean = q.view(B, T, G, -1, H).mean(3) if q_mean_BTGH is None else q_mean_BTGH.to(high)
    keeps = [(positions_BT >= by).to(high)[..., None] for by in (1, 2)]
    k_heads = k.view(B, T, G, H)
    q_kernel, k_kernel = (fold_convolutions((w.to(high), b.to(high)), (W.to(high), c.to(high)), H) for w, b, W, c in (q_convs, k_convs))
    k = mix(k, mean, *k_kernel, temperature_G.to(high), halos[1].to(high), keeps, rope, eps).to(dtype)
    start, end = delayed_rows
    delayed = _Shift.apply(v_BTC[..., start:end], halos[2], keeps[0].to(dtype))
    v = torch.cat((v_BTC[..., :start], delayed, v_BTC[..., end:]), dim=-1).view(B, T, G, H)
    if begin is not None:
        begin(k, v)
    q = mix(q, k_heads, *q_kernel, None, halos[0].to(high), keeps, rope, eps).to(dtype)
    return q, k, v


QUERY_BLOCK = 64  # queries at a time (docs/experiments.md): 4 rows * 8 heads * 64 * 256 keys * 4 bytes = 2 MiB of scores


def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, first_key_BT: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Causal grouped-query attention, scale 1 / sqrt(H), over keys [first_key, own index] of each query.

    k and v hold the whole sequence; q holds len(offsets) equal chunks of it, chunk c starting at index offsets[c] (one chunk at 0
    where nothing is cut). first_key (B, T) is the later of the document's start and the sliding window's edge. Returns (B, T, N, H).
    Waits for the device once per block of queries.
    """
    return _Attention.apply(q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets)


class _Attention(torch.autograd.Function):
    """Softmax over blocks of queries and the keys that any of them sees; saves q, k, v and the output, computes the
    probabilities again.

    dV = P^T dO;  dS = P * (dO V^T - rowsum(dO * O));  dQ = dS K / sqrt(H);  dK = dS^T Q / sqrt(H). Each group is one matrix product: its
    heads lie beside one another under each token, (B G, T N / G, H), so that a block of queries is a slice.
    """

    @staticmethod
    def forward(ctx, q_BTNH, k_BSGH, v_BSGH, first_key_BT, offsets):
        G = k_BSGH.shape[2]
        q, k, v = (_by_group(x, G) for x in (q_BTNH, k_BSGH, v_BSGH))
        q *= q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        for rows, keys, mask in _query_blocks(first_key_BT, offsets, q_BTNH.shape[2] // G, q.dtype):
            out[:, rows] = torch.bmm(_probabilities(q[:, rows], k[:, keys], mask), v[:, keys])
        out_BTNH = _by_token(out, q_BTNH)
        ctx.save_for_backward(q_BTNH, k_BSGH, v_BSGH, out_BTNH, first_key_BT)
        ctx.offsets = offsets
        return out_BTNH

    @staticmethod
    def backward(ctx, dout_BTNH):
        q_BTNH, k_BSGH, v_BSGH, out_BTNH, first_key_BT = ctx.saved_tensors
        G, scale = k_BSGH.shape[2], q_BTNH.shape[-1] ** -0.5
        q, k, v, out, dout = (_by_group(x, G) for x in (q_BTNH, k_BSGH, v_BSGH, out_BTNH, dout_BTNH))
        q *= scale
        along = torch.linalg.vecdot(dout, out)[..., None]
        dq, dk, dv = out, torch.zeros_like(k), torch.zeros_like(v)  # out has been read: dq takes its memory
        for rows, keys, mask in _query_blocks(first_key_BT, ctx.offsets, q_BTNH.shape[2] // G, q.dtype):
            probs = _probabilities(q[:, rows], k[:, keys], mask)
            dscores = torch.bmm(dout[:, rows], v[:, keys].mT).sub_(along[:, rows]).mul_(probs)
            dv[:, keys] += torch.bmm(probs.mT, dout[:, rows])
            dk[:, keys] += torch.bmm(dscores.mT, q[:, rows])
            dq[:, rows] = torch.bmm(dscores, k[:, keys])
        return _by_token(dq.mul_(scale), q_BTNH), _by_token(dk, k_BSGH), _by_token(dv, v_BSGH), None, None


Mask = tuple[slice, Tensor]  # which keys of a block, and what is added to their scores: 0 where a query sees the key, else -inf


def _query_blocks(first_key_BT: Tensor, offsets: tuple[int, ...], group_heads: int,
                  dtype: torch.dtype) -> Iterator[tuple[slice, slice, Mask]]:
    """By block: its rows (Q queries times the heads of a group), the keys that any of them sees, and the mask (B or 1, Q, keys).

    Where all queries begin at one key, only the block's own keys need one, and a triangle serves all rows of the batch.
    """
    chunk, device = first_key_BT.shape[1] // len(offsets), first_key_BT.device
    triangle = torch.full((min(QUERY_BLOCK, chunk),) * 2, -math.inf, dtype=dtype, device=device).triu_(1)
    for c, offset in enumerate(offsets):
        for start in range(0, chunk, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, chunk)
            first_BQ = first_key_BT[:, c * chunk + start : c * chunk + stop]
            lowest, highest = torch.stack(first_BQ.aminmax()).tolist()  # both at once: the device is waited for once
            if lowest == highest:
                num_queries, num_keys = stop - start, offset + stop - lowest
                mask = slice(num_keys - num_queries, num_keys), triangle[None, :num_queries, :num_queries]
            else:
                key_S = torch.arange(lowest, offset + stop, device=device)
                own_Q = torch.arange(offset + start, offset + stop, device=device)
                hidden_BQS = (key_S < first_BQ[..., None]) | (key_S > own_Q[:, None])
                mask = slice(None), torch.zeros_like(hidden_BQS, dtype=dtype).masked_fill_(hidden_BQS, -math.inf)
            yield slice((c * chunk + start) * group_heads, (c * chunk + stop) * group_heads), slice(lowest, offset + stop), mask


def _probabilities(q: Tensor, k: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T + mask): (B G, Q N / G, S) from (B G, Q N / G, H) and (B G, S, H)."""
    scores, (masked, mask_BQS) = torch.bmm(q, k.mT), mask
    B, Q, _ = mask_BQS.shape  # B = 1: one mask for all rows
    scores.view(B, -1, Q, q.shape[1] // Q, k.shape[1])[..., masked].add_(mask_BQS[:, None, :, None])
    return scores.softmax(-1)


def _by_group(x_BTNH: Tensor, groups: int) -> Tensor:
    """(B, T, N, H) -> (B G, T N / G, H), wide and newly laid out."""
    B, T, _, H = x_BTNH.shape
    wide_x = x_BTNH.unflatten(2, (groups, -1)).transpose(1, 2).to(wide(x_BTNH.dtype), memory_format=torch.contiguous_format, copy=True)
    return wide_x.view(B * groups, -1, H)


def _by_token(x: Tensor, like_BTNH: Tensor) -> Tensor:
    """The inverse of `_by_group`, in like's shape and dtype."""
    B, T, _, H = like_BTNH.shape
    by_group = x.view(B, -1, T, x.shape[1] // T * H)
    return by_group.transpose(1, 2).to(like_BTNH.dtype, memory_format=torch.contiguous_format, copy=True).view(like_BTNH.shape)

# ---------------------------------------------------------------------------------------------------------------- experts


def route(logits_TC: Tensor, balance_bias_C: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Routing: the top_k classes with the largest softmax + balance bias, the lowest index first among equals; the gate is the raw
    probability of the class, not renormalised.

    Returns classes (T, k) int32, gates (T, k) fp32 (fp64), and the number of assignments per class (C,) int64. The bias gets no gradient.
    """
    probs_TC = logits_TC.softmax(-1, dtype=wide(logits_TC.dtype))
    choice_Tk = (probs_TC.detach() + balance_bias_C).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    choice_R = choice_Tk.flatten()
    counts_C = torch.zeros_like(balance_bias_C, dtype=torch.int64).scatter_add_(0, choice_R, torch.ones_like(choice_R))
    return choice_Tk.int(), probs_TC.gather(-1, choice_Tk), counts_C


def sort_by_expert(choice_Tk: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Order (R,) int32 of the R = T k assignments (token * k + slot) that brings class 0, 1, ... together, each in its old order, and the
    size of each class (C,) int64. A skip class, the last, ends up last."""
    choice_R = choice_Tk.flatten()
    sizes_C = choice_R.new_zeros(num_classes, dtype=torch.int64)
    sizes_C.scatter_add_(0, choice_R.long(), torch.ones_like(choice_R, dtype=torch.int64))
    return choice_R.argsort(stable=True).int(), sizes_C


def experts(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor | None = None,
            gate_Tk: Tensor | None = None, gradient_sums: ExpertSums | None = None) -> Tensor:
    """SwiGLU experts: down(silu(gate) * up), gate_up = [gate | up] (E, 2F, D), down (E, D, F); each token's results times its gates (T, k),
    summed (T, D). Tokens that no expert takes come out zero.

    sizes (E,) int64: assignments of each expert, which `order` (R,) brings together; those of no expert come last. Without order and gate
    x is a row per assignment, already sorted, and so is the result. gradient_sums: of gate_up and down. Waits for the device once.
    """
    sizes = sizes_E.tolist()
    if order_R is None or gate_Tk is None:
        return _Experts.apply(x_TD, sizes, gate_up_EFD, down_EDF, gradient_sums)
    T, k = gate_Tk.shape
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R.long(), torch.arange(T * k, dtype=order_R.dtype, device=order_R.device))
    rows_RD = _Permute.apply(x_TD[:, None].expand(T, k, -1).flatten(0, 1), order_R, inverse_R)
    y_RD = _Permute.apply(_Experts.apply(rows_RD, sizes, gate_up_EFD, down_EDF, gradient_sums), inverse_R, order_R)
    return (y_RD.view(T, k, x_TD.shape[-1]) * gate_Tk[..., None].to(y_RD.dtype)).sum(1)


class _Experts(torch.autograd.Function):
    """One expert after the other, so that its rows stay in cache between its products. Saves the rows and gate | up, not the activation."""

    @staticmethod
    def forward(ctx, x_RD, sizes, gate_up_EFD, down_EDF, gradient_sums):
        gate_up_RF = x_RD.new_empty(x_RD.shape[0], gate_up_EFD.shape[1])
        y_RD = torch.empty_like(x_RD)
        for (start, end), gate_up_FD, down_DF in zip(_spans(sizes), gate_up_EFD, down_EDF):
            gate, up = torch.mm(x_RD[start:end], gate_up_FD.t(), out=gate_up_RF[start:end]).chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_DF.t(), out=y_RD[start:end])
        y_RD[sum(sizes):] = 0
        ctx.save_for_backward(x_RD, gate_up_RF, gate_up_EFD, down_EDF)
        ctx.sizes, ctx.gradient_sums = sizes, gradient_sums
        return y_RD

    @staticmethod
    def backward(ctx, dy_RD):
        x_RD, gate_up_RF, gate_up_EFD, down_EDF = ctx.saved_tensors
        dx_RD = torch.empty_like(x_RD)
        sums = ctx.gradient_sums or ExpertSums.temporary(gate_up_EFD, down_EDF)
        beta_gate_up, beta_down = (0 if gradient_sum.first() else 1 for gradient_sum in sums)
        totals_E = zip(sums.gate_up.total, sums.down.total)
        for (start, end), gate_up_FD, down_DF, totals in zip(_spans(ctx.sizes), gate_up_EFD, down_EDF, totals_E):
            gate, up = gate_up_RF[start:end].chunk(2, dim=-1)
            dy, activated = dy_RD[start:end], F.silu(gate)
            _add_product(totals[1], dy.t(), activated * up, beta_down)
            dhidden = dy @ down_DF
            dgate = torch.ops.aten.silu_backward(dhidden * up, gate)
            dgate_up = torch.cat((dgate, dhidden.mul_(activated)), dim=-1)
            torch.mm(dgate_up, gate_up_FD, out=dx_RD[start:end])
            _add_product(totals[0], dgate_up.t(), x_RD[start:end], beta_gate_up)
        dx_RD[sum(ctx.sizes):] = 0
        return dx_RD, None, *(gradient_sum.for_autograd(x_RD.dtype) for gradient_sum in sums), None


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta out + a @ b, in out's dtype; what out held does not matter where beta is 0."""
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def _spans(sizes: list[int]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(sizes))
    return list(zip([0, *ends], ends))


class _Permute(torch.autograd.Function):
    """x[order]; the gradient goes back by the inverse order, which a general index could not know."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        return dy.index_select(0, ctx.saved_tensors[0]), None, None

# ---------------------------------------------------------------------------------------------------------------- loss


Partials = tuple[Tensor, Tensor, Tensor]


def cross_entropy_partials(logits_TV: Tensor, labels_T: Tensor, vocab_start: int = 0,
                           probs_TV: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one shard of the vocabulary, rows [vocab_start, vocab_start + V), contributes to a cross-entropy, each (T,) fp32 (fp64):
    the largest logit, the sum of exp(logit - largest), and the label's logit where the label lies in the shard, else 0.

    Also softmax within the shard (T, V), into `probs` where one is given; logits may be overwritten. The sum is read off it, 1 / its
    largest: torch's softmax has an exp several times faster than exp.
    """
    local_T = labels_T - vocab_start
    inside_T = (local_T >= 0) & (local_T < logits_TV.shape[-1])
    target_T = logits_TV.gather(-1, local_T.clamp(0, logits_TV.shape[-1] - 1)[:, None])[:, 0]
    probs_TV = torch.softmax(logits_TV, -1, out=probs_TV)
    return logits_TV.amax(-1), 1 / probs_TV.amax(-1), torch.where(inside_T, target_T, 0.0), probs_TV


def whole(parts: Partials) -> Partials:
    """The combination over one shard."""
    return parts


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0, *, vocab_start: int = 0,
                  combine: Callable[[Partials], Partials] = whole, gradient_sum: GradientSum | None = None) -> Tensor:
    """Sum over the labelled tokens of -log softmax(z)[label] + z_loss * logsumexp(z)^2, z = hidden @ weight.T, in fp32 (fp64); labels of
    IGNORE count nothing.

    Where weight is the shard of a vocabulary that starts at vocab_start, combine turns a block's partials, (largest logit, sum of
    exp(logit - largest), label's logit), into those of all shards, and is called equally often on shards of one size. The loss is then
    the whole one on each, and hidden's gradient the shard's share, to be summed. gradient_sum: of weight.
    """
    return cross_entropy_by(cross_entropy_partials, hidden_TD, weight_VD, labels_T, z_loss, vocab_start, combine, gradient_sum)


def cross_entropy_by(partials: Callable[..., tuple[Tensor, ...]], hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float,
                     vocab_start: int, combine: Callable[[Partials], Partials], gradient_sum: GradientSum | None) -> Tensor:
    """`cross_entropy`, where partials computes what `cross_entropy_partials` does."""
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, z_loss, vocab_start, combine, gradient_sum, partials,
                                     torch.is_grad_enabled())


LOSS_BLOCK = 1 << 21  # logits at a time (docs/experiments.md): 8 MiB in fp32, and as much for their softmax


class _LinearCrossEntropy(torch.autograd.Function):
    """Blocks of tokens: logits, loss, and at once both gradients, (1 + 2 z_loss logsumexp) softmax - onehot, so that logits are never kept.
    The softmax is the shard's own times its share of the sum of exp, which is 1 where there is one shard.

    Saves the two gradients."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, z_loss, vocab_start, combine, gradient_sum, partials, training):
        V, dtype = weight_VD.shape[0], wide(hidden_TD.dtype)
        loss = torch.zeros((), dtype=dtype, device=hidden_TD.device)
        dhidden_TD, dweight_VD = torch.empty_like(hidden_TD), torch.empty_like(weight_VD, dtype=dtype)
        rows, wide_weight_VD = max(LOSS_BLOCK // V, 1), weight_VD.to(dtype)
        # Two buffers serve all blocks: fresh memory for each would cost the kernel a page fault per 4 KiB.
        logits, probs = hidden_TD.new_empty(2, rows, V, dtype=dtype)
        for block, (h, labels, dh) in enumerate(zip(hidden_TD.split(rows), labels_T.split(rows), dhidden_TD.split(rows))):
            block_logits = torch.mm(h.to(dtype), wide_weight_VD.t(), out=logits[: len(h)])
            *parts, dlogits = partials(block_logits, labels, vocab_start, probs[: len(h)])
            largest, total, target = combine((parts[0], parts[1], parts[2]))
            labelled = labels != IGNORE
            lse = total.log() + largest
            loss += torch.where(labelled, lse - target + z_loss * lse.square(), 0.0).sum()
            if training:
                share = parts[1] * (parts[0] - largest).exp() / total
                dlogits.mul_(torch.where(labelled, share * (1 + 2 * z_loss * lse), 0.0)[:, None])
                local = labels - vocab_start
                inside = labelled & (local >= 0) & (local < V)
                dlogits.scatter_add_(-1, local.clamp(0, V - 1)[:, None], -inside.to(dtype)[:, None])
                torch.mm(dlogits.to(weight_VD.dtype), weight_VD, out=dh)
                _add_product(dweight_VD, dlogits.t(), h, beta=min(block, 1))
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.gradient_sum = gradient_sum
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        gradient_sum = ctx.gradient_sum or GradientSum.temporary(dweight_VD, dhidden_TD.dtype)
        gradient_sum.add_scaled(dweight_VD, dloss)
        return dhidden_TD.mul_(dloss), gradient_sum.for_autograd(dhidden_TD.dtype), *[None] * 7

# ---------------------------------------------------------------------------------------------------------------- optimizer


def newton_schulz(matrices: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
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


@torch.no_grad()
def adamw_(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
           weight_decay: float, grad_scale: Tensor, step: Tensor, commit: Tensor, out: Tensor | None = None) -> None:
    """AdamW in place (Loshchilov & Hutter 2019) from grad * grad_scale, by torch's fused kernel; nothing changes where commit is false.
    `out` gets the weights, rounded.

    step: 0-dim fp32, updates so far; the caller counts this one. The kernel takes the scale in fp32, so an fp64 gradient is scaled to 6e-8
    only, which AdamW hardly sees; it may leave grad scaled.
    """
    adamw([param], [grad], [exp_avg], [exp_avg_sq], [], [step.clone()], fused=True, grad_scale=grad_scale.reciprocal().float(),
          found_inf=(~commit).float(), amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False)
    if out is not None:
        out.copy_(param)
