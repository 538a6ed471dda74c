"""Inputs of cross_entropy and its pieces: odd vocabularies, ignored labels, shards, huge logits, and the heads of the 8B and 74B models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case, normal
from zaya.kernels.cross_entropy import cross_entropy, gradients, partials
from zaya.kernels.reference import IGNORE

VOCABULARY = 262_272


def _logits(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    dtype = reference.wide(hidden_TD.dtype)
    return hidden_TD.to(dtype) @ weight_VD.to(dtype).t()


def expected_partials(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, vocab_start: int = 0) -> tuple[Tensor, ...]:
    return reference.cross_entropy_partials(_logits(hidden_TD, weight_VD), labels_T, vocab_start)[:3]


def expected_gradients(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, lse_T: Tensor, dloss: Tensor, vocab_start: int = 0,
                       z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """dz = dloss (exp(z - lse) (1 + 2 z_loss lse) - onehot) of this shard's logits, zero where ignored; dz W and dz^T h."""
    dtype = reference.wide(hidden_TD.dtype)
    lse_T1, local_T = lse_T.to(dtype)[:, None], labels_T - vocab_start
    dlogits = (_logits(hidden_TD, weight_VD) - lse_T1).exp() * (1 + 2 * z_loss * lse_T1)
    dlogits -= (local_T[:, None] == torch.arange(len(weight_VD), device=labels_T.device)).to(dtype)
    dlogits = torch.where(labels_T[:, None] == IGNORE, 0.0, dlogits) * dloss.to(dtype)
    return (dlogits @ weight_VD.to(dtype)).to(hidden_TD.dtype), (dlogits.t() @ hidden_TD.to(dtype)).to(weight_VD.dtype)


def head(T: int, D: int, V: int, *, ignored: float = 0.2, logits: float = 2.0, **options: Any) -> Callable[..., dict[str, Any]]:
    """logits: their standard deviation; ignored: share of the labels."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(47)
        hidden_TD = normal(generator, device, T, D).to(dtype)
        weight_VD = (normal(generator, device, V, D) * (logits * D**-0.5)).to(dtype)
        labels_T = torch.randint(0, V, (T,), generator=generator)
        labels_T[torch.rand(T, generator=generator) < ignored] = IGNORE
        return {"hidden_TD": hidden_TD, "weight_VD": weight_VD, "labels_T": labels_T.to(device), **options}

    return make


def shard(T: int, D: int, V: int, start: int, rows: int, gradient: bool = False, **options: Any) -> Callable[..., dict[str, Any]]:
    """Rows [start, start + rows) of a vocabulary of V; gradient: with the log-sum-exp of the whole one, and dloss."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        arguments = head(T, D, V)(device, dtype)
        if gradient:
            lse_T = torch.logsumexp(_logits(arguments["hidden_TD"], arguments["weight_VD"]), -1).float()
            arguments |= {"lse_T": lse_T, "dloss": torch.full((), 0.7, device=device), **options}
        return {**arguments, "weight_VD": arguments["weight_VD"][start : start + rows], "vocab_start": start}

    return make


def _head(name: str, size: str, T: int, D: int, V: int, **options: Any) -> Case:
    product = 2 * T * D * V
    # All three products are in the forward pass when there will be a backward; backward itself only scales.
    return Case(f"cross_entropy {name}", size, cross_entropy, reference.cross_entropy, head(T, D, V, **options), ("hidden_TD", "weight_VD"),
                flops=product, backward_flops=2 * product)


CASES = [
    _head("small", SMALL, 37, 24, 300),
    _head("small over two blocks of vocabulary", SMALL, 5, 8, 9001),
    _head("small whole blocks", SMALL, 3, 16, 8192, ignored=0.0),
    _head("small one token", SMALL, 1, 16, 100, ignored=0.0),
    _head("small one word", SMALL, 4, 8, 1),
    _head("small all ignored", SMALL, 9, 16, 77, ignored=1.1),
    _head("small z-loss", SMALL, 33, 24, 130, z_loss=1e-2),
    _head("small huge logits", SMALL, 12, 16, 200, logits=1e4),
    Case("cross_entropy partials small first shard", SMALL, partials, expected_partials, shard(23, 16, 300, 0, 130)),
    Case("cross_entropy partials small last shard", SMALL, partials, expected_partials, shard(23, 16, 300, 130, 170)),
    Case("cross_entropy gradients small shard", SMALL, gradients, expected_gradients, shard(23, 16, 300, 130, 170, True, z_loss=1e-2)),
    _head("8b", CHIP, 16_384, 2048, VOCABULARY, ignored=0.02),
    _head("74b", CHIP, 16_384, 4096, VOCABULARY, ignored=0.02),
    Case("cross_entropy partials 74b shard of 4", CHIP, partials, expected_partials,
         head(4096, 4096, VOCABULARY // 4, ignored=0.02, vocab_start=VOCABULARY // 4)),
]
