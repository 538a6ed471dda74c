"""Names, shapes and configuration from the layout that Zyphra's weights were published in before transformers 5.13: one way, inwards.

Off the batch's path: tools.import_hf takes this table instead of zaya/model/hf.py's when config.json is of that layout. Pure, like hf.py.

There each sub-layer is a stage: stage 2i is block i's attention, stage 2i + 1 its experts. A stage begins by scaling the stream and the
previous stage's output, where we end the previous sub-layer with it: stage 0's scaling is the embedding's, stage j's sub-layer j - 1's,
the one after all stages the last sub-layer's. The sums are the same ones in the same order. Every expert is a tensor of its own.

Names and keys: transformers' models/zaya/convert_zaya_weights_to_hf.py and the first vllm/model_executor/models/zaya.py, which computes in
this layout. Where per-stage lists stand for single numbers (ZAYA1-base): sglang's configs/zaya.py.
"""

from __future__ import annotations

from typing import Any

from zaya.config import ModelConfig
from zaya.model.hf import MODEL_TYPE, OLD_LAYOUT_KEYS, Link, Named, projection_links, shortest_period
from zaya.plan import plan

# Keys that only transformers' layout has; with one of them a config is not of this layout, whatever else it holds.
NEW_LAYOUT_KEYS = ("moe_intermediate_size", "router_hidden_size", "rope_parameters", "num_experts_per_tok")
# Keys whose value our model has no knob for. A config that is silent means the same.
FIXED: dict[str, Any] = {
    "cca": True, "cca_time0": 2, "cca_time1": 2, "zaya_use_eda": True, "scale_residual_merge": True, "clamp_temp": False,
    "gated_linear_unit": True, "activation_func": "swiglu", "normalization": "RMSNorm", "norm_epsilon": 1e-5, "rms_norm_eps": 1e-5,
    "moe_router_topk": 1, "add_bias_linear": False, "attention_bias": False, "lm_head_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": True, "partial_rotary_factor": 0.5, "use_rope_scaling": False,
}
# What only the user of the weights knows, by the same names in both layouts.
KEPT = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype", "use_cache")

# Per stage, one to one. Ours are zaya.plan's names.
_ATTENTION = {
    "attention_norm.weight": "input_norm.weight",
    "attention.q.weight": "self_attn.qkv.linear_q.weight",
    "attention.k.weight": "self_attn.qkv.linear_k.weight",
    "attention.temperature": "self_attn.qkv.temp",
    "attention.o.weight": "self_attn.o_proj.weight",
}
_EXPERTS = {
    "moe_norm.weight": "input_norm.weight",
    "moe.router.down.weight": "zaya_block.router.down_proj.weight",
    "moe.router.down.bias": "zaya_block.router.down_proj.bias",
    "moe.router.depth_scale": "zaya_block.router.router_states_scale",
    "moe.router.norm.weight": "zaya_block.router.rmsnorm_eda.weight",
    "moe.router.fc1.weight": "zaya_block.router.router_mlp.0.weight",  # 1 and 3 are the GELUs
    "moe.router.fc1.bias": "zaya_block.router.router_mlp.0.bias",
    "moe.router.fc2.weight": "zaya_block.router.router_mlp.2.weight",
    "moe.router.fc2.bias": "zaya_block.router.router_mlp.2.bias",
    "moe.router.out.weight": "zaya_block.router.router_mlp.4.weight",
}
_SCALING = {
    "branch_scale": "hidden_states_scale", "branch_bias": "hidden_states_bias", "stream_scale": "residual_scale",
    "stream_bias": "residual_bias",
}


def recognises(hf_config: dict[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return (hf_config.get("model_type") == MODEL_TYPE and any(key in hf_config for key in OLD_LAYOUT_KEYS)
            and not any(key in hf_config for key in NEW_LAYOUT_KEYS))


def links(config: ModelConfig) -> list[Link]:
    """Every parameter and every balance bias, in the order of the forward pass."""
    shapes = {name: row.shape for name, row in plan(config).items()}

    def one(ours: str, theirs: str) -> Link:
        return Link((Named(ours, shapes[ours]),), (Named(theirs, shapes[ours]),))

    def scaling(ours: str, stage: int) -> list[Link]:
        theirs = f"model.layers.{stage}.res_scale." if stage < 2 * config.num_layers else "model.res_scale."
        return [one(ours + mine, theirs + yours) for mine, yours in _SCALING.items()]

    table = [one("embedding.weight", "model.embed_tokens.weight"), one("embedding.scale", "model.layers.0.res_scale.hidden_states_scale"),
             one("embedding.bias", "model.layers.0.res_scale.hidden_states_bias")]
    for block in range(config.num_layers):
        ours, attention, experts = f"blocks.{block}.", f"model.layers.{2 * block}.", f"model.layers.{2 * block + 1}."
        table += [one(ours + mine, attention + yours) for mine, yours in _ATTENTION.items()]
        qkv = f"{attention}self_attn.qkv."
        table += projection_links(config, f"{ours}attention.", shapes, (f"{qkv}val_proj1.weight", f"{qkv}val_proj2.weight"),
                                  {"depthwise": f"{qkv}conv_qk.0", "grouped": f"{qkv}conv_qk.1"})
        table += scaling(f"{ours}attention_residual.", 2 * block + 1)
        # Block 0 has no depth_scale.
        table += [one(ours + mine, experts + yours) for mine, yours in _EXPERTS.items() if ours + mine in shapes]
        bias = (config.num_router_classes,)
        table.append(Link((Named(f"{ours}moe.router.balance_bias", bias),),
                          (Named(f"{experts}zaya_block.router.balancing_biases", bias),), always_fp32=True))
        for mine, yours in (("gate_up", "linear_fc1"), ("down", "linear_fc2")):
            whole = Named(f"{ours}moe.experts.{mine}", shapes[f"{ours}moe.experts.{mine}"])
            table.append(Link((whole,), tuple(Named(f"{experts}zaya_block.experts.local_experts.{expert}.{yours}.weight", whole.shape[1:])
                                              for expert in range(config.num_experts))))
        table += scaling(f"{ours}moe_residual.", 2 * block + 2)
    table.append(one("final_norm.weight", "model.final_norm.weight"))
    return table


def from_hf_config(hf_config: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """(our shape, the rest that hf.to_hf_config takes) of a config.json of this layout. ValueError names key, value and what we support."""
    config = hf_config
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r} is not supported; only {value!r} is")
    if config.get("rope_scaling"):
        raise ValueError(f"rope_scaling = {config['rope_scaling']!r} is not supported; only null or false is")
    stages, experts = _stages(config)
    blocks = stages // 2
    width = _number(config, "ffn_hidden_size_list", "ffn_hidden_size", stage=1, stages=stages)
    if width % 2:
        raise ValueError(f"ffn_hidden_size = {width} is not supported; it must be even, twice an expert's width")
    windows = _windows(config, blocks)
    model = ModelConfig(
        vocab_size=_number(config, "vocab_size"), hidden_size=_number(config, "hidden_size"), num_layers=blocks,
        num_heads=_number(config, "cca_num_q_heads", "num_attention_heads", stage=0, stages=stages),
        num_kv_heads=_number(config, "num_query_groups_list", "num_query_groups", "num_key_value_heads", stage=0, stages=stages),
        head_dim=_number(config, "head_dim", "kv_channels"), num_experts=experts or _number(config, "num_experts"),
        moe_intermediate_size=width // 2, router_hidden_size=_number(config, "zaya_mlp_expansion", stage=1, stages=stages),
        skip_expert=_flag(config, "zaya_use_mod"), sliding_window=max(windows),
        attention_pattern=shortest_period(["sliding" if window else "full" for window in windows]),
        rope_theta=_theta(config, "rope_theta", "rotary_base"),
        rope_theta_sliding=_theta(config, "swa_rotary_base") if any(windows) else 1e4)
    model.validate()
    rest = {key: config[key] for key in KEPT if key in config}
    if "torch_dtype" in config:  # its name before transformers 5
        rest.setdefault("dtype", config["torch_dtype"])
    return model, rest


def _stages(config: dict[str, Any]) -> tuple[int, int | None]:
    """How many stages there are, and experts in each second one; None leaves that to num_experts. A list wins over num_hidden_layers."""
    listed = config.get("zaya_layers")
    if not listed:
        count = _number(config, "num_hidden_layers")
        if count % 2:
            raise ValueError(f"num_hidden_layers = {count} is not supported; in this layout it counts stages, two per block")
        return count, None
    experts = listed[1] if isinstance(listed, list) and len(listed) > 1 else None
    if type(experts) is not int or experts < 1 or listed != ["a", experts] * (len(listed) // 2):
        raise ValueError(f'zaya_layers = {str(listed)[:60]} is not supported; it must alternate between "a" and one number of experts')
    return len(listed), experts


def _number(config: dict[str, Any], *keys: str, stage: int | None = None, stages: int = 0) -> int:
    """The first of `keys` that is there. With `stage` it may be a list over the stages: every second entry, from `stage` on, is the number;
    entries beyond the stages are padding."""
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        raise ValueError(f"config.json lacks {' and '.join(keys)}; write it in")
    value = config[key]
    if stage is not None and isinstance(value, list):
        every = value[stage:stages:2]
        if len(every) != stages // 2 or any(type(entry) is not int or entry != every[0] for entry in every):
            raise ValueError(f"{key} = {str(value)[:60]} is not supported; it must give one number for all stages of a kind")
        value = every[0]
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} = {value!r} is not supported; it must be an integer of at least 1")
    return value


def _flag(config: dict[str, Any], key: str) -> bool:
    if type(config.get(key, True)) is not bool:
        raise ValueError(f"{key} = {config[key]!r} is not supported; it must be true or false")
    return bool(config.get(key, True))


def _theta(config: dict[str, Any], *keys: str) -> float:
    """No default: the published code has had 1e4, 1e6 and 5e6."""
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None or type(config[key]) not in (int, float):
        raise ValueError(f"config.json lacks {' and '.join(keys)} or it is no number; write it in (the base of the rotary embedding)")
    return float(config[key])


def _windows(config: dict[str, Any], blocks: int) -> list[int]:
    """Tokens each block's attention sees, itself included; 0: all. swa_layers counts the previous ones, sliding_window the token too."""
    key = next((key for key in ("swa_layers", "layer_types") if config.get(key) is not None), None)
    listed = config[key] if key else [0] * blocks
    if not isinstance(listed, list) or len(listed) not in (blocks, 2 * blocks):
        raise ValueError(f"{key} = {str(listed)[:60]} is not supported; it must have an entry for each of {2 * blocks} stages")
    by_block = listed[::2] if len(listed) == 2 * blocks else listed
    total = config.get("sliding_window")
    if total is not None and (type(total) is not int or total < 1 or key is None):
        raise ValueError(f"sliding_window = {total!r} is not supported; it must be an integer of at least 1, beside swa_layers")
    windows = []
    for entry in by_block:
        if type(entry) is int and entry >= 0:
            windows.append((total or entry + 1) if entry else 0)
        elif entry == "full_attention":
            windows.append(0)
        elif entry == "sliding_attention" and total:
            windows.append(total)
        else:
            raise ValueError(f"{key} has the entry {entry!r}, which is not supported, or sliding_window is missing")
    if len({window for window in windows if window}) > 1:
        raise ValueError(f"{key} has several windows: {sorted(set(windows))}; only one is supported")
    return windows
