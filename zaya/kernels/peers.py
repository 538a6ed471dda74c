"""What torch offers for the same work, by case: the peers that kernels are timed against.

A peer takes a case's keyword arguments and does the same work, forward, with a backward by autograd. Only the benchmark calls one. Where a
peer cannot do all of a case's work it is not offered, or says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zaya.kernels import reference
from zaya.kernels.cases import Case


@dataclass(frozen=True)
class Peer:
    """A contender for a case's time."""

    call: Callable[..., Any]
    """Takes the case's arguments by name, returns what the op returns."""
    is_whole: bool = True
    """It does all of the case's work, so its results are the op's. If not, they are not compared, and its name says what it leaves out."""
    is_in_place: bool = False
    """It updates its arguments, so it gets a set of its own."""


def peers(case: Case, arguments: Mapping[str, Any]) -> dict[str, Peer]:
    """By name. arguments: of the case, on the GPU; what a peer needs once (a mask, an index) is made of them here, outside any timing."""
    op, gradients = case.name.split()[0], bool(case.gradients)
    match op:
        case "residual_norm":
            return {"torch.compile": Peer(torch.compile(_residual_norm)), "eager": Peer(_residual_norm)}
        case "rms_norm":
            return {"F.rms_norm": Peer(_rms_norm), "torch.compile": Peer(torch.compile(_rms_norm))}
        case "adamw":
            return {"torch fused AdamW and a cast": Peer(_fused_adamw, is_in_place=True)}
        case "attention":
            return _attention_peers(arguments)
        case "cca":
            return {"eager, one document, no halo": Peer(_cca, is_whole=False),
                    "torch.compile, one document, no halo": Peer(torch.compile(_cca), is_whole=False)}
        case "experts":
            grouped = _grouped_mm_experts if "order_R" in arguments else _grouped_mm_sorted
            return {"loop of matmuls": Peer(case.reference)} | ({"torch._grouped_mm": Peer(grouped)} if all_routed(arguments) else {})
        case "grouped_gemm":
            return {"torch._grouped_mm": Peer(_grouped_mm), "loop of matmuls": Peer(case.reference)}
        case "route":
            return {"eager": Peer(case.reference), "torch.compile": Peer(torch.compile(case.reference))}
        case "sort_by_expert":
            return {"argsort and bincount": Peer(case.reference)}
        case "cross_entropy" if gradients:
            return {"F.cross_entropy on full logits": Peer(_cross_entropy)}
        case "newton_schulz":
            return {"torch.optim.Muon's": Peer(_muon)}
    return {}


def _residual_norm(stream: Tensor, branch: Tensor, scales: tuple[Tensor, ...], norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    branch_scale, branch_bias, stream_scale, stream_bias = (vector.float() for vector in scales)
    new = (branch.float() + branch_bias) * branch_scale + (stream + stream_bias) * stream_scale
    return new, F.rms_norm(new, new.shape[-1:], norm_weight.float(), eps).to(norm_weight.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _fused_adamw(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, lr: float, beta1: float, beta2: float, eps: float,
                 weight_decay: float, grad_scale: Tensor, step: Tensor, commit: Tensor, out: Tensor | None) -> tuple[Tensor, ...]:
    """In place, as ours: every call is one more step. Scales the gradient by 1 / grad_scale, and steps unless found_inf."""
    fused = torch._fused_adamw_  # what torch.optim.AdamW(fused=True) calls
    fused([param], [grad.to(param.dtype)], [exp_avg], [exp_avg_sq], [], [step + 1], lr=lr, beta1=beta1, beta2=beta2,
          weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=1 / grad_scale, found_inf=(~commit).float())
    return (param, exp_avg, exp_avg_sq) if out is None else (param, exp_avg, exp_avg_sq, out.copy_(param))


def _attention_peers(arguments: Mapping[str, Any]) -> dict[str, Peer]:
    """scaled_dot_product_attention where every query sees all keys before it; else flex_attention, compiled, with a block mask."""
    first_BT, offsets = arguments["first_key_BT"], arguments["offsets"]
    if offsets == (0,) and not first_BT.any():
        return {"sdpa FLASH": Peer(_sdpa(SDPBackend.FLASH_ATTENTION)), "sdpa cuDNN": Peer(_sdpa(SDPBackend.CUDNN_ATTENTION))}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # here, because importing it takes seconds

    (B, T), S = first_BT.shape, arguments["k_BSGH"].shape[1]
    chunk = T // len(offsets)
    index_T = torch.cat([torch.arange(offset, offset + chunk, device=first_BT.device) for offset in offsets])

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= index_T[query]) & (key >= first_BT[b, query])

    mask = create_block_mask(sees, B, None, T, S, device=str(first_BT.device))
    compiled = torch.compile(flex_attention)

    def flex(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return {"flex_attention": Peer(flex)}


def _sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    def attention(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, **_: Any) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attention


def _cca(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, q_mean_BTGH: Tensor | None, q_convs: tuple[Tensor, ...],
         k_convs: tuple[Tensor, ...], temperature_G: Tensor, rope: tuple[Tensor, Tensor], delayed_rows: tuple[int, int],
         **_: Any) -> tuple[Tensor, ...]:
    """As a model would write it with torch's convolutions, for rows of one document."""
    B, T, C = k_BTC.shape
    G = temperature_G.numel()
    H = C // G
    q_heads, k_heads = q_BTC.view(B, T, -1, H), k_BTC.view(B, T, G, H)
    q_mean = (q_heads + k_heads.repeat_interleave(q_heads.shape[2] // G, 2)) / 2
    sides = []
    for x_BTC, (w, b, W, c), mean in ((q_BTC, q_convs, q_mean), (k_BTC, k_convs, q_mean.view(B, T, G, -1, H).mean(3))):
        x = F.conv1d(F.pad(x_BTC.transpose(1, 2), (2, 0)), w[:, None], b, groups=len(b))
        u = F.conv1d(x, W, c, groups=len(c) // H).transpose(1, 2).reshape(mean.shape) + mean
        sides.append(F.normalize(u.float(), dim=-1) * H**0.5)
    cos, sin = (table[:, :, None] for table in rope)

    def rotate(x: Tensor) -> Tensor:
        a, b, rest = x.split((H // 4, H // 4, H // 2), -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(q_BTC.dtype)

    start, end = delayed_rows
    v = torch.cat((v_BTC[..., :start], F.pad(v_BTC[:, :-1, start:end], (0, 0, 1, 0)), v_BTC[..., end:]), -1)
    return rotate(sides[0]), rotate(sides[1] * temperature_G[:, None]), v.view(B, T, G, H)


def all_routed(arguments: Mapping[str, Any]) -> bool:
    """Whether every row has an expert. torch._grouped_mm leaves the others' results undefined."""
    return int(arguments["sizes_E"].sum()) == len(arguments.get("order_R", arguments["x_TD"]))


def _grouped_mm(rows_RK: Tensor, sizes_E: Tensor, weights_ENK: Tensor) -> Tensor:
    return torch._grouped_mm(rows_RK, weights_ENK.mT, offs=sizes_E.cumsum(0).int())


def _grouped_mm_sorted(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    ends_E = sizes_E.cumsum(0).int()
    gate, up = torch._grouped_mm(x_TD, gate_up_EFD.mT, offs=ends_E).chunk(2, -1)
    return torch._grouped_mm(F.silu(gate) * up, down_EDF.mT, offs=ends_E)


def _grouped_mm_experts(x_TD: Tensor, sizes_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, order_R: Tensor, gate_Tk: Tensor) -> Tensor:
    tokens, slots = gate_Tk.shape
    y_RD = _grouped_mm_sorted(x_TD[order_R // slots], sizes_E, gate_up_EFD, down_EDF) * gate_Tk.flatten()[order_R, None].to(x_TD.dtype)
    return y_RD[order_R.argsort()].view(tokens, slots, -1).sum(1)


def _cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float = 0.0) -> Tensor:
    assert not z_loss
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, reduction="sum", ignore_index=reference.IGNORE)


def _muon(matrices: Tensor, steps: int = 5) -> Tensor:
    """torch's takes one matrix at a time."""
    from torch.optim._muon import _zeropower_via_newtonschulz  # private, but it is the one that Muon calls

    rows, cols = matrices.shape[-2:]
    each = [_zeropower_via_newtonschulz(matrix.clone(), reference.NEWTON_SCHULZ, steps, 1e-7)
            for matrix in matrices.reshape(-1, rows, cols)]
    return torch.stack(each).view(matrices.shape)
