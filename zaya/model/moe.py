"""The mixture of experts: a router that averages its state over depth, and top-1 SwiGLU experts.

On a batch's path: x from the block's norm -> router (class and gate per token) -> `dispatcher` sorts and computes -> branch.
Balance is kept by a bias on the choice alone, moved by zaya/optim.py from the counts returned here: there is no auxiliary loss.
Seams: `dispatcher`, which by default finds all experts on this device, and `Experts.gradient_sums`.

Letters: B batch, T tokens (of all rows), D hidden, E experts, C router classes (E, or E + 1 with skip), k experts per token, R assignments.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zaya.config import ModelConfig
from zaya.kernels import reference
from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import ExpertSums
from zaya.model.layers import Linear, RMSNorm, parameter, recomputed

SKIP_BIAS = -1.0  # the skip class' balance bias: where released training started it, and where it stays


class Router(nn.Module):
    """x (B, T, D) and the previous block's state (B, T, R) -> classes and gates (B T, k), counts and the state for the next block."""

    def __init__(self, config: ModelConfig, *, first: bool) -> None:
        super().__init__()
        R = config.router_hidden_size
        self.down = Linear(config.hidden_size, R, bias=True)
        self.depth_scale = None if first else parameter(R)
        self.norm = RMSNorm(R)
        self.fc1, self.fc2 = Linear(R, R, bias=True), Linear(R, R, bias=True)
        self.out = Linear(R, config.num_router_classes)
        self.balance_bias: Tensor
        self.register_buffer("balance_bias", torch.empty(config.num_router_classes, dtype=reference.wide(torch.get_default_dtype())))

    def forward(self, x_BTD: Tensor, state_BTR: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = self.down(x_BTD)
        if self.depth_scale is not None:
            assert state_BTR is not None
            hidden = torch.addcmul(hidden, state_BTR, self.depth_scale)  # exponential depth averaging
        logits = self.out(F.gelu(self.fc2(F.gelu(self.fc1(self.norm(hidden))))))
        choice_Tk, gate_Tk, counts_C = ops().route(logits.flatten(0, 1), self.balance_bias)
        return choice_Tk, gate_Tk, counts_C, hidden


class Experts(nn.Module):
    """Weights of the experts on this device. gradient_sums: where the op adds their gradients, if something sums them over micro-batches;
    None: autograd gets them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = parameter(E, 2 * width, D)
        self.down = parameter(E, D, width)
        self.gradient_sums: ExpertSums | None = None

    def forward(self, x_TD: Tensor, sizes_E: Tensor, order_R: Tensor | None = None, gate_Tk: Tensor | None = None) -> Tensor:
        return ops().experts(x_TD, sizes_E, self.gate_up, self.down, order_R, gate_Tk, self.gradient_sums)


class Dispatcher(Protocol):
    """Where the experts are."""

    def compute(self, experts: Experts, x_TD: Tensor, choice_Tk: Tensor, gate_Tk: Tensor, num_classes: int) -> Tensor:
        """The experts' output per token, gated (T, D). Classes beyond the experts give zero."""
        ...


class LocalDispatcher:
    """All experts are here: sort the assignments; gathering and scattering tokens is part of the op. recompute: backward computes the
    experts again instead of keeping their activations."""

    def __init__(self, recompute: bool = False) -> None:
        self.recompute = recompute

    def compute(self, experts: Experts, x_TD: Tensor, choice_Tk: Tensor, gate_Tk: Tensor, num_classes: int) -> Tensor:
        order_R, sizes_C = ops().sort_by_expert(choice_Tk, num_classes)
        run = recomputed(experts) if self.recompute else experts
        return run(x_TD, sizes_C[: len(experts.gate_up)], order_R, gate_Tk)


class MoE(nn.Module):
    """x (B, T, D) -> branch (B, T, D), next router state, tokens per router class (C,)."""

    def __init__(self, config: ModelConfig, *, first: bool, recompute: bool = False) -> None:
        super().__init__()
        self.router = Router(config, first=first)
        self.experts = Experts(config)
        self.dispatcher: Dispatcher = LocalDispatcher(recompute)

    def forward(self, x_BTD: Tensor, state_BTR: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        choice_Tk, gate_Tk, counts_C, state_BTR = self.router(x_BTD, state_BTR)
        branch_TD = self.dispatcher.compute(self.experts, x_BTD.flatten(0, 1), choice_Tk, gate_Tk, len(counts_C))
        return branch_TD.view_as(x_BTD), state_BTR, counts_C
