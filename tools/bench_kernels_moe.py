"""What of tools.bench_kernels needs a model: cases of the whole MoE block (router, sort, experts), transformers' block and its experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import ZayaConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.zaya.modeling_zaya import ZayaExperts, ZayaSparseMoeBlock

from zaya.config import ModelConfig
from zaya.kernels import backend
from zaya.kernels.cases import CHIP, Case, normal
from zaya.kernels.peers import Peer, all_routed
from zaya.model import hf
from zaya.model.moe import MoE

SHAPES: dict[str, dict[str, Any]] = {
    "8b": dict(hidden_size=2048, num_experts=16, moe_intermediate_size=2048, router_hidden_size=256),
    "74b": dict(hidden_size=4096, num_experts=24, moe_intermediate_size=4096, router_hidden_size=256),
}
REST: dict[str, Any] = dict(vocab_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)  # of a model around one MoE block


class Block:
    """One MoE block, of ours and of transformers', whose parameters are arguments."""

    def __init__(self, **sizes: Any) -> None:
        self.config = ModelConfig(**sizes, **REST)
        with torch.device("meta"):
            self.ours = MoE(self.config, first=True)
        self.parameters = {name: parameter.shape for name, parameter in self.ours.named_parameters()}

    def make(self, tokens: int, busiest: float | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """busiest: the share of the tokens that a balance bias sends to expert 0."""
        generator = torch.Generator().manual_seed(5)
        weights = []
        for name, shape in self.parameters.items():
            if len(shape) > 1:
                # Choices between nearly equal classes fall by rounding, so the router is made as sure as a trained one.
                gain = 8 if name == "router.out.weight" else 1
                value = normal(generator, device, *shape) * gain * shape[-1] ** -0.5
            else:
                value = torch.full(shape, float(name == "router.norm.weight"), device=device)
            weights.append(value.to(dtype))
        x_BTD = normal(generator, device, 1, tokens, self.config.hidden_size).to(dtype)
        bias_C = torch.zeros(self.config.num_router_classes, device=device)
        arguments: dict[str, Any] = {"x_BTD": x_BTD, "weights": tuple(weights), "balance_bias": bias_C}
        if busiest is not None and device.type != "meta":
            low, high = -1.0, 1.0  # differences of probabilities
            for _ in range(16):
                bias_C[0] = (low + high) / 2
                share = self._share_of_first(**arguments)
                low, high = (bias_C[0].item(), high) if share < busiest else (low, bias_C[0].item())
        return arguments

    @torch.no_grad()
    def _share_of_first(self, x_BTD: Tensor, weights: tuple[Tensor, ...], balance_bias: Tensor) -> float:
        backend.choose("reference", x_BTD.device, x_BTD.dtype, head_dim=32)
        tensors = {name.removeprefix("router."): tensor for name, tensor in zip(self.parameters, weights) if name.startswith("router.")}
        choice_Tk, *_ = functional_call(self.ours.router, {**tensors, "balance_bias": balance_bias}, (x_BTD, None))
        return (choice_Tk == 0).float().mean().item()

    def run(self, kernels: str, x_BTD: Tensor, weights: tuple[Tensor, ...], balance_bias: Tensor) -> Tensor:
        backend.choose(kernels, x_BTD.device, x_BTD.dtype, head_dim=32)
        tensors = {**dict(zip(self.parameters, weights)), "router.balance_bias": balance_bias}
        return functional_call(self.ours, tensors, (x_BTD, None))[0]

    def peers(self) -> dict[str, Peer]:
        """transformers' block, once with each implementation of the experts."""
        links = {link.ours[0].name.removeprefix("blocks.0.moe."): link.theirs[0].name.removeprefix("model.layers.0.mlp.")
                 for link in hf.links(self.config)}
        names = [links[name] for name in self.parameters]

        def peer(implementation: str) -> Peer:
            config = ZayaConfig(**hf.to_hf_config(self.config, hf.rest_of_new_model(None, 64)))
            config._experts_implementation = implementation
            with torch.device("meta"):
                module = ZayaSparseMoeBlock(config, layer_idx=0)

            def block(x_BTD: Tensor, weights: tuple[Tensor, ...], balance_bias: Tensor) -> Tensor:
                return functional_call(module, {**dict(zip(names, weights)), links["router.balance_bias"]: balance_bias}, (x_BTD,))[0]

            return Peer(block)

        return {f"ZayaSparseMoeBlock ({name})": peer(name) for name in ("eager", *ALL_EXPERTS_FUNCTIONS.keys())}


def block_case(name: str, block: Block, tokens: int, busiest: float | None, size: str = CHIP) -> Case:
    flops = 2 * tokens * 3 * block.config.hidden_size * block.config.moe_intermediate_size
    return Case(f"moe_block {name}", size, lambda **arguments: block.run("triton", **arguments),
                lambda **arguments: block.run("reference", **arguments),
                lambda device, dtype: block.make(tokens, busiest, device, dtype),
                ("x_BTD", *(f"weights.{index}" for index in range(len(block.parameters)))), flops=flops,
                # A token whose choice flips by rounding is wrong altogether: 0.5 % of them are sqrt(2 * 0.005) = 10 % of a tensor's size.
                # The most that was seen is 0.16, in the router's gradients of the 74B, skewed (docs/benchmarks/kernels-h100.json).
                limit=0.2)


BLOCKS = {name: Block(**sizes) for name, sizes in SHAPES.items()}
CASES = [block_case(f"{name} {routing}", block, 16384, busiest)
         for name, block in BLOCKS.items() for routing, busiest in (("as drawn", None), ("skewed", 0.5))]


def peers(case: Case, arguments: Mapping[str, Any]) -> dict[str, Peer]:
    """transformers' code for the same work, by name; empty for a case that it has none for."""
    op, model = case.name.split()[:2]
    if op == "moe_block":
        return BLOCKS[model].peers()
    return _experts(arguments) if op == "experts" and "order_R" in arguments and all_routed(arguments) else {}


def _experts(arguments: Mapping[str, Any]) -> dict[str, Peer]:
    """transformers' ZayaExperts in its fastest form, from tokens that all have an expert."""
    sizes_E, order_R, gate_Tk = (arguments[name] for name in ("sizes_E", "order_R", "gate_Tk"))
    E, _, D = arguments["gate_up_EFD"].shape
    config = ZayaConfig(num_experts=E, hidden_size=D, moe_intermediate_size=arguments["down_EDF"].shape[-1])
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = ZayaExperts(config)
    class_R = torch.searchsorted(sizes_E.cumsum(0), torch.arange(len(order_R), device=order_R.device), right=True)
    index_Tk = torch.empty_like(class_R).scatter_(0, order_R.long(), class_R).view(gate_Tk.shape)

    def experts(x_TD: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor, gate_Tk: Tensor, **_: Any) -> Tensor:
        return functional_call(module, {"gate_up_proj": gate_up_EFD, "down_proj": down_EDF}, (x_TD, index_Tk, gate_Tk))

    return {"transformers' ZayaExperts": Peer(experts)}


if __name__ == "__main__":
    print("bench_kernels_moe is a part of tools.bench_kernels: run that", file=sys.stderr)
    sys.exit(2)
