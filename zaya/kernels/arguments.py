"""What ops say of a wrong argument, before anything is computed from it. Apart from where kernels are launched: C on a CPU needs no Triton.

Letters as in zaya/kernels/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zaya.kernels.gradient_sum import ExpertSums

HEAD_DIMS = (32, 64, 128)  # what attention and cca are built for, in Triton and in C
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check(name: str, tensor: Tensor, *, shape: tuple[int | None, ...] | None = None, dtypes: tuple[torch.dtype, ...] = (),
          device: torch.device | None = None, contiguous: bool = True) -> None:
    """ValueError, naming argument, got and expected, where `tensor` is not what a kernel needs; None in shape fits any size."""
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {_words(tensor.dtype)}, expected {' or '.join(map(_words, dtypes))}")
    if shape is not None and (tensor.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape))):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, expected {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous memory (shape {tuple(tensor.shape)})")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_cca(q: Tensor, k: Tensor, v: Tensor, mean: Tensor | None, q_convs: tuple[Tensor, ...], k_convs: tuple[Tensor, ...],
              temperature: Tensor, positions: Tensor, rope: tuple[Tensor, Tensor], halos: tuple[Tensor, Tensor, Tensor],
              delayed: tuple[int, int], contiguous: bool) -> None:
    """ValueError where the arguments of cca do not fit one another; contiguous: all but q, k and v must be."""
    for name, tensors, count in (("q_convs", q_convs, 4), ("k_convs", k_convs, 4), ("rope", rope, 2), ("halos", halos, 3)):
        if len(tensors) != count:
            raise ValueError(f"{name} has {len(tensors)} tensors, expected {count}")
    check("q_BTC", q, shape=(None, None, None), dtypes=FLOATS, contiguous=False)
    B, T, q_channels = q.shape
    common: dict[str, Any] = dict(dtypes=(q.dtype,), device=q.device, contiguous=contiguous)
    check("k_BTC", k, shape=(B, T, None), dtypes=(q.dtype,), device=q.device, contiguous=False)
    check("v_BTC", v, shape=tuple(k.shape), dtypes=(q.dtype,), device=q.device, contiguous=False)
    G, channels = temperature.numel(), k.shape[-1]
    H = channels // max(G, 1)
    if H not in HEAD_DIMS or channels != G * H:
        raise ValueError(f"k_BTC has {channels} channels for {G} temperatures, expected heads of 32, 64 or 128 channels each")
    if q_channels % channels or not q_channels:
        raise ValueError(f"q_BTC has {q_channels} channels, expected a multiple of k_BTC's {channels}: whole groups of heads of {H}")
    if not B * T:
        raise ValueError(f"q_BTC has shape {tuple(q.shape)}, expected at least one token")
    if mean is not None:
        check("q_mean_BTGH", mean, shape=(B, T, G, H), **common)
    parameters = common | dict(dtypes=FLOATS)
    for side, convs, width in (("q", q_convs, q_channels), ("k", k_convs, channels)):
        for part, x, shape in zip(("w", "b", "W", "c"), convs, ((width, 2), (width,), (width, H, 2), (width,)), strict=True):
            check(f"{side}_convs.{part}", x, shape=shape, **parameters | (dict(dtypes=(q_convs[0].dtype,)) if x is not q_convs[0] else {}))
    check("temperature_G", temperature, shape=(G,), **parameters)
    check("positions_BT", positions, shape=(B, T), **common | dict(dtypes=(torch.int64, torch.int32)))
    for name, x in zip(("cos", "sin"), rope, strict=True):
        check(f"rope.{name}", x, shape=(B, T, H // 4), **common | dict(dtypes=(torch.float32,)))
    start, end = delayed
    if not 0 <= start <= end <= channels:
        raise ValueError(f"delayed_rows is {delayed}, expected a range within v_BTC's {channels} channels")
    for name, x, n, width in zip("qkv", halos, (2, 2, 1), (q_channels, channels, end - start), strict=True):
        check(f"halos.{name}", x, shape=(B, None, n, width), **common)
    K = halos[0].shape[1]
    if K < 1 or T % K or any(x.shape[1] != K for x in halos):
        raise ValueError(f"halos are for {[x.shape[1] for x in halos]} chunks, expected one number that divides {T} tokens")


def check_attention(q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, offsets: tuple[int, ...]) -> None:
    """ValueError where the arguments of attention do not fit one another."""
    check("q_BTNH", q, shape=(None, None, None, None), dtypes=FLOATS, contiguous=False)
    B, T, N, H = q.shape
    check("k_BSGH", k, shape=(B, None, None, H), dtypes=(q.dtype,), device=q.device, contiguous=False)
    check("v_BSGH", v, shape=tuple(k.shape), dtypes=(q.dtype,), device=q.device, contiguous=False)
    check("first_key_BT", first_key, shape=(B, T), dtypes=(torch.int64, torch.int32), device=q.device, contiguous=False)
    S, G = k.shape[1:3]
    if H not in HEAD_DIMS:
        raise ValueError(f"q_BTNH has head dim {H}, expected {' or '.join(map(str, HEAD_DIMS))}")
    if G == 0 or N % G:
        raise ValueError(f"q_BTNH has {N} heads, expected a multiple of the {G} heads of k_BSGH")
    if not offsets or T % len(offsets) or not all(isinstance(o, int) and 0 <= o <= S - T // len(offsets) for o in offsets):
        raise ValueError(f"offsets is {offsets}, expected starts of chunks, a divisor of T = {T} of them, within S = {S}")


def check_experts(x: Tensor, sizes: Tensor, gate_up: Tensor, down: Tensor, order: Tensor | None, gate: Tensor | None,
                  gradient_sums: ExpertSums | None) -> None:
    """ValueError where the arguments of experts do not fit one another."""
    if gate_up.dim() != 3:
        raise ValueError(f"gate_up_EFD has shape {tuple(gate_up.shape)}, expected (E, 2F, D)")
    check("down_EDF", down, shape=(None, None, None))
    E, _, D = gate_up.shape
    F, device, dtype = down.shape[-1], x.device, (x.dtype,)
    check("x_TD", x, shape=(None, D), dtypes=FLOATS)
    check("gate_up_EFD", gate_up, shape=(None, 2 * F, None), dtypes=dtype, device=device)
    check("down_EDF", down, shape=(E, D, None), dtypes=dtype, device=device)
    check("sizes_E", sizes, shape=(E,), dtypes=(torch.int32, torch.int64), device=device)
    if (order is None) != (gate is None):
        missing = "order_R" if order is None else "gate_Tk"
        raise ValueError(f"{missing} is None, expected both order_R and gate_Tk, or neither for rows that are sorted already")
    if order is not None and gate is not None:
        check("gate_Tk", gate, shape=(x.shape[0], None), dtypes=(torch.float32,), device=device)
        if gate.shape[1] == 0:
            raise ValueError(f"gate_Tk has shape {tuple(gate.shape)}, expected at least one slot per token")
        check("order_R", order, shape=(gate.numel(),), dtypes=(torch.int32,), device=device)
    if gradient_sums is not None:
        for name, weight in (("gate_up", gate_up), ("down", down)):
            total = getattr(gradient_sums, name).total
            check(f"gradient_sums.{name}", total, shape=tuple(weight.shape), dtypes=(torch.float32,), device=device)
