"""Names, shapes and arguments to and from Megatron-core's GPTModel: one table, read in both directions. docs/megatron.md

Off the batch's path: tools.export_megatron and tools.import_megatron stand on it. Pure: it maps names, cuts and joins tensors it is handed,
and knows no file, no checkpoint and no rank.

Names are the keys of `GPTModel.sharded_state_dict` (megatron-core 0.16.1, a test asks it for them) with layers numbered one by one, which
is Megatron's `non_homogeneous_layers`: block 0 has no depth_scale, so the blocks cannot be stacked. What GPTModel has no parameter for
gets a name in the same style: MEGATRON below and OURS say which is which. Megatron's layouts apply where they differ from ours:
linear_qkv interleaves the projections by KV head (the query heads of its group, then its key head, then its value head).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zaya.config import ModelConfig
from zaya.model.hf import Named
from zaya.plan import plan

# A block's parameters by our names: after "decoder.layers.N.". q, k and v together are linear_qkv.
MEGATRON = {
    "attention_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention.o.weight": "self_attention.linear_proj.weight",
    "moe_norm.weight": "pre_mlp_layernorm.weight",
    "moe.router.out.weight": "mlp.router.weight",  # its input is the router's MLP, not the block's
    "moe.router.balance_bias": "mlp.router.expert_bias",  # added for the choice alone, in fp32, as in Megatron
    "moe.experts.gate_up": "mlp.experts.experts.linear_fc1.weight",
    "moe.experts.down": "mlp.experts.experts.linear_fc2.weight",
}
QKV = "self_attention.linear_qkv.weight"
# What only ZAYA1 has. Megatron merges the residual in modules self_attn_bda and mlp_bda, which have no parameters of their own there.
OURS = {
    **{f"attention.{conv}.{kind}": f"self_attention.{conv}.{kind}"
       for conv in ("q_depthwise", "q_grouped", "k_depthwise", "k_grouped") for kind in ("weight", "bias")},
    "attention.temperature": "self_attention.temperature",
    **{f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in (("attention_residual", "self_attn_bda"), ("moe_residual", "mlp_bda"))
       for part in ("branch_scale", "branch_bias", "stream_scale", "stream_bias")},
    "moe.router.down.weight": "mlp.router.down.weight",
    "moe.router.down.bias": "mlp.router.down.bias",
    "moe.router.depth_scale": "mlp.router.depth_scale",
    "moe.router.norm.weight": "mlp.router.norm.weight",
    "moe.router.fc1.weight": "mlp.router.fc1.weight",
    "moe.router.fc1.bias": "mlp.router.fc1.bias",
    "moe.router.fc2.weight": "mlp.router.fc2.weight",
    "moe.router.fc2.bias": "mlp.router.fc2.bias",
}
OUTSIDE_MEGATRON = {"embedding.weight": "embedding.word_embeddings.weight", "final_norm.weight": "decoder.final_layernorm.weight"}
OUTSIDE_OURS = {"embedding.scale": "embedding.scale", "embedding.bias": "embedding.bias"}
# Names of GPTModel begin with one of these; what does not is no weight (optimizer, RNG) and is not carried.
PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.")
BALANCE_BIAS = "moe.router.balance_bias"


@dataclass(frozen=True)
class Link:
    """Our tensors and their one. In each of `groups` equal groups of rows, ours follow one another; 1 group is plain joining."""

    ours: tuple[Named, ...]
    theirs: Named
    groups: int = 1

    def to_theirs(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        grouped = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        if len(self.ours) == 1:
            return [tensor]
        cuts = tensor.unflatten(0, (self.groups, -1)).split([named.shape[0] // self.groups for named in self.ours], dim=1)
        return [cut.flatten(0, 1) for cut in cuts]


def links(config: ModelConfig) -> list[Link]:
    """Every parameter and every balance bias, in the order of the forward pass."""
    shapes = {name: row.shape for name, row in plan(config).items()}
    shapes |= {f"blocks.{block}.{BALANCE_BIAS}": (config.num_router_classes,) for block in range(config.num_layers)}

    def one(ours: str, theirs: str) -> Link:
        return Link((Named(ours, shapes[ours]),), Named(theirs, shapes[ours]))

    table = [one("embedding.weight", OUTSIDE_MEGATRON["embedding.weight"]), *(one(*pair) for pair in OUTSIDE_OURS.items())]
    for block in range(config.num_layers):
        ours, theirs = f"blocks.{block}.", f"decoder.layers.{block}."
        qkv = tuple(Named(name, shapes[name]) for name in (f"{ours}attention.{letter}.weight" for letter in "qkv"))
        rows = sum(named.shape[0] for named in qkv)
        table.append(Link(qkv, Named(theirs + QKV, (rows, config.hidden_size)), config.num_kv_heads))
        table += [one(ours + mine, theirs + yours) for mine, yours in (MEGATRON | OURS).items() if ours + mine in shapes]
    table.append(one("final_norm.weight", OUTSIDE_MEGATRON["final_norm.weight"]))
    return table


# Arguments with the only value that our model has.
FIXED: dict[str, Any] = {
    "group_query_attention": True, "moe_router_topk": 1, "moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none",
    "untie_embeddings_and_output_weights": False, "add_bias_linear": False, "swiglu": True, "normalization": "RMSNorm",
    "norm_epsilon": 1e-5, "position_embedding_type": "rope", "rotary_percent": 0.5,
}
# ModelConfig field -> argument. zaya_* are keys of the released configurations; Megatron-LM has no such arguments.
ARGUMENTS = {
    "vocab_size": "padded_vocab_size", "hidden_size": "hidden_size", "num_layers": "num_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups", "head_dim": "kv_channels", "num_experts": "num_experts",
    "moe_intermediate_size": "moe_ffn_hidden_size", "router_hidden_size": "zaya_mlp_expansion",
}


def to_arguments(config: ModelConfig) -> dict[str, Any]:
    """The model as Megatron-LM's command line would say it, which has one rotary base for all blocks: that of full attention, or of sliding
    where all slide."""
    shape = {argument: getattr(config, field) for field, argument in ARGUMENTS.items()}
    slides = [int(config.attention_kind(block) == "sliding") for block in range(config.num_layers)]
    # Keys to the left of a query's own, and to its right.
    windows = {"window_size": (config.sliding_window - 1, 0), "window_attn_skip_freq": slides} if any(slides) else {}
    base = config.rope_theta_sliding if all(slides) else config.rope_theta
    return FIXED | shape | windows | {"ffn_hidden_size": config.moe_intermediate_size, "add_position_embedding": False, "rotary_base": base,
                                      "zaya_use_mod": config.skip_expert}


def from_arguments(arguments: Mapping[str, Any]) -> ModelConfig:
    """The model of a run whose arguments say it all: attention is full in every block, `window_size` is refused. ValueError names an
    argument that does not fit."""
    if arguments.get("window_size") is not None:
        raise ValueError(f"args.window_size = {reprlib.repr(arguments['window_size'])} is not supported: arguments have one rotary base, "
                         "and blocks that slide another than those that do not")
    for name, value in FIXED.items():
        if arguments.get(name, value) != value:
            raise ValueError(f"args.{name} = {reprlib.repr(arguments[name])} is not supported; only {value!r} is")
    shape: dict[str, Any] = {field: arguments.get(argument) for field, argument in ARGUMENTS.items()}
    for field, value in shape.items():
        if type(value) is not int:
            raise ValueError(f"args.{ARGUMENTS[field]} = {reprlib.repr(value)} is not an integer, so the model's shape is not known")
    base, skip = arguments.get("rotary_base", 1e4), arguments.get("zaya_use_mod", True)
    if type(base) not in (int, float) or type(skip) is not bool:
        raise ValueError(f"args.rotary_base = {reprlib.repr(base)} is not a number, or args.zaya_use_mod = {reprlib.repr(skip)} is neither "
                         "true nor false")
    model = ModelConfig(**shape, rope_theta=float(base), skip_expert=skip)
    model.validate()
    return model
