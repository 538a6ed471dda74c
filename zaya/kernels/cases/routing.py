"""Inputs of route and sort_by_expert, with and without a skip class, one and two experts per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zaya.kernels import reference
from zaya.kernels.backend import MAX_CLASSES
from zaya.kernels.cases import CHIP, SMALL, Case
from zaya.kernels.routing import route, sort_by_expert


def logits(tokens: int, classes: int, top_k: int, *, equal: bool = False) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """equal: all logits are 0, so that the choice is decided by the rule for equals alone."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(tokens)
        if device.type == "meta":
            logits_TC, bias_C = torch.empty(tokens, classes, device=device), torch.empty(classes, device=device)
        else:
            logits_TC = 2 * torch.randn(tokens, classes, generator=generator)
            bias_C = 0.1 * torch.randn(classes, generator=generator)
            if equal:
                logits_TC, bias_C = torch.zeros_like(logits_TC), torch.zeros_like(bias_C)
        return {"logits_TC": logits_TC.to(device, dtype), "balance_bias_C": bias_C.to(device), "top_k": top_k}

    return make


def choices(tokens: int, classes: int, top_k: int, *, only: int | None = None) -> Callable[[torch.device, torch.dtype], dict[str, Any]]:
    """Random distinct classes per token, class 1 never; or one class for all."""

    def make(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        if device.type == "meta":
            return {"choice_Tk": torch.empty(tokens, top_k, dtype=torch.int32, device=device), "num_classes": classes}
        generator = torch.Generator().manual_seed(tokens)
        scores = torch.rand(tokens, classes, generator=generator)
        scores[:, 1] = -1
        choice = scores.argsort(dim=1, descending=True)[:, :top_k].int()
        if only is not None:
            choice = torch.full_like(choice, only)
        return {"choice_Tk": choice.to(device), "num_classes": classes}

    return make


def _route(name: str, size: str, tokens: int, classes: int, top_k: int, *, equal: bool = False) -> Case:
    return Case(f"route {name}", size, route, reference.route, logits(tokens, classes, top_k, equal=equal), ("logits_TC",),
                num_bytes=tokens * (2 * classes + 8 * top_k))


def _sort(name: str, size: str, tokens: int, classes: int, top_k: int, *, only: int | None = None) -> Case:
    return Case(f"sort_by_expert {name}", size, sort_by_expert, reference.sort_by_expert, choices(tokens, classes, top_k, only=only),
                num_bytes=12 * tokens * top_k)  # the choice is read twice, the order written once


CASES: list[Case] = [
    _route("small", SMALL, 300, 17, 1),
    _route("small two slots", SMALL, 131, 5, 2),
    _route("small equal logits", SMALL, 70, 6, 2, equal=True),
    _route("small one token", SMALL, 1, 3, 1),
    _route("small many classes", SMALL, 40, 65, 8),
    _route("small most classes", SMALL, 40, MAX_CLASSES, 2),
    _sort("small", SMALL, 1100, 17, 1),
    _sort("small two slots", SMALL, 333, 7, 2),
    _sort("small all of one class", SMALL, 700, 5, 1, only=2),
    _sort("small one token", SMALL, 1, 3, 1),
    _sort("small many classes", SMALL, 150, 65, 8),
    _sort("small most classes", SMALL, 200, MAX_CLASSES, 1),
    # 4 rows of 4,096 tokens; 16 and 24 experts and the skip class
    _route("8b", CHIP, 16384, 17, 1),
    _route("74b", CHIP, 16384, 25, 1),
    _sort("8b", CHIP, 16384, 17, 1),
    _sort("74b", CHIP, 16384, 25, 1),
]
