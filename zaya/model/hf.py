"""Names, shapes and configuration to and from transformers' Zaya: one table, read in both directions.

Off the batch's path: tools.import_hf and tools.export_hf stand on it, a checkpoint comes from or leaves to transformers through it.
Pure: it maps names, cuts and joins tensors it is handed, and knows no file, no checkpoint and no rank.

A link says: these tensors of ours, joined along their rows, are those tensors of theirs, joined along their rows. Most links are one to
one; transformers keeps the convolutions over [q | k] channels in one tensor where we keep two (their channels shard with their
heads), and the values in two (current, delayed) where we keep one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zaya.config import ModelConfig
from zaya.plan import plan

MODEL_TYPE = "zaya"
# What a config.json means where it is silent: the defaults of transformers' ZayaConfig (a test compares them).
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262272, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "num_experts": 16, "moe_intermediate_size": 2048, "router_hidden_size": 256, "initializer_range": 0.02,
}
ROPE_DEFAULTS = {"hybrid": 5e6, "hybrid_sliding": 1e4}
# Keys whose value our model has no knob for: transformers' default is the only one we compute.
FIXED: dict[str, Any] = {
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "cca_time0": 2, "cca_time1": 2, "attention_bias": False,
    "attention_dropout": 0.0, "lm_head_bias": False, "num_experts_per_tok": 1, "hidden_act": "silu",
}
PARTIAL_ROTARY_FACTOR = 0.5
LAYER_TYPES = {"full": "hybrid", "sliding": "hybrid_sliding"}
# ModelConfig field -> key of config.json, where the two are one number.
SHAPE_KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "num_experts": "num_experts",
    "moe_intermediate_size": "moe_intermediate_size", "router_hidden_size": "router_hidden_size", "init_std": "initializer_range",
}
# Keys that only the layout before transformers' port has: 2 stages where we have one block, other tensor names.
OLD_LAYOUT_KEYS = ("zaya_mlp_expansion", "ffn_hidden_size", "num_query_groups", "zaya_use_mod", "zaya_use_eda")


@dataclass(frozen=True)
class Named:
    """A tensor by name and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """`ours` and `theirs` hold the same numbers in the same order; either side may be cut into more tensors.

    always_fp32: the router's balance bias is state, not a parameter; both sides keep it in fp32 whatever the model's dtype."""

    ours: tuple[Named, ...]
    theirs: tuple[Named, ...]
    always_fp32: bool = False

    def to_theirs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _recut(tensors, self.ours, self.theirs)

    def to_ours(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return _recut(tensors, self.theirs, self.ours)


def _recut(tensors: Sequence[Tensor], source: tuple[Named, ...], target: tuple[Named, ...]) -> list[Tensor]:
    """Join along rows, cut at the target's rows. Views where nothing has to be joined."""
    assert [tuple(t.shape) for t in tensors] == [named.shape for named in source], "tensors do not have the shapes of the table"
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    cuts = joined.split([named.shape[0] for named in target])
    return [cut.reshape(named.shape) for cut, named in zip(cuts, target, strict=True)]


# Per block, one to one. Ours are zaya.plan's names.
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.qkv_proj.q_proj.weight",
    "attention.k.weight": "self_attn.qkv_proj.k_proj.weight",
    "attention.temperature": "self_attn.qk_norm.temp",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention_residual.branch_scale": "post_attention_residual_scale.hidden_states_scale",
    "attention_residual.branch_bias": "post_attention_residual_scale.hidden_states_bias",
    "attention_residual.stream_scale": "post_attention_residual_scale.residual_scale",
    "attention_residual.stream_bias": "post_attention_residual_scale.residual_bias",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "moe.router.down.weight": "mlp.gate.down_proj.weight",
    "moe.router.down.bias": "mlp.gate.down_proj.bias",
    "moe.router.depth_scale": "mlp.gate.router_states_scale",
    "moe.router.norm.weight": "mlp.gate.router_mlp.norm.weight",
    "moe.router.fc1.weight": "mlp.gate.router_mlp.fc1.weight",
    "moe.router.fc1.bias": "mlp.gate.router_mlp.fc1.bias",
    "moe.router.fc2.weight": "mlp.gate.router_mlp.fc2.weight",
    "moe.router.fc2.bias": "mlp.gate.router_mlp.fc2.bias",
    "moe.router.out.weight": "mlp.gate.router_mlp.out_proj.weight",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
    "moe_residual.branch_scale": "post_mlp_residual_scale.hidden_states_scale",
    "moe_residual.branch_bias": "post_mlp_residual_scale.hidden_states_bias",
    "moe_residual.stream_scale": "post_mlp_residual_scale.residual_scale",
    "moe_residual.stream_bias": "post_mlp_residual_scale.residual_bias",
}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "embedding.scale": "model.input_hidden_states_scale",
    "embedding.bias": "model.input_hidden_states_bias",
    "final_norm.weight": "model.norm.weight",
}


def links(config: ModelConfig) -> list[Link]:
    """Every parameter and every balance bias, in the order of the forward pass. ValueError for a model transformers cannot hold."""
    if not config.skip_expert:
        raise ValueError("model.skip_expert = false: transformers' Zaya always has the skip class, so this model cannot be exported; "
                         "train with skip_expert = true")
    shapes = {name: row.shape for name, row in plan(config).items()}

    def one(ours: str, theirs: str) -> Link:
        shape = shapes[ours]
        return Link((Named(ours, shape),), (Named(theirs, shape),))

    table = [one(ours, _OUTSIDE[ours]) for ours in ("embedding.weight", "embedding.scale", "embedding.bias")]
    for block in range(config.num_layers):
        ours, theirs = f"blocks.{block}.", f"model.layers.{block}."
        # Block 0 has no depth_scale.
        table += [one(ours + mine, theirs + yours) for mine, yours in _BLOCK.items() if ours + mine in shapes]
        qkv = f"{theirs}self_attn.qkv_proj."
        table += projection_links(config, f"{ours}attention.", shapes, (f"{qkv}v_proj_current.weight", f"{qkv}v_proj_delayed.weight"),
                                  {"depthwise": f"{qkv}conv_qk_depthwise", "grouped": f"{qkv}conv_qk_grouped"})
        bias = (config.num_router_classes,)
        table.append(Link((Named(f"{ours}moe.router.balance_bias", bias),), (Named(f"{theirs}mlp.gate.balancing_biases", bias),), True))
    table.append(one("final_norm.weight", _OUTSIDE["final_norm.weight"]))
    return table


def projection_links(config: ModelConfig, ours: str, shapes: dict[str, tuple[int, ...]], values: tuple[str, str],
                     convolutions: dict[str, str]) -> Iterator[Link]:
    """The tensors of an attention `ours` that the two sides cut differently. Theirs: the matrices of current and delayed values, and the
    convolutions of [q | k] by our names of them."""
    H, D = config.head_dim, config.hidden_size
    q_rows, kv_rows = config.num_heads * H, config.num_kv_heads * H
    value = Named(f"{ours}v.weight", shapes[f"{ours}v.weight"])
    # The border lies at half of the rows, inside a head where the number of KV heads is odd.
    yield Link((value,), tuple(Named(name, (kv_rows // 2, D)) for name in values))
    for conv, trailing in (("depthwise", (1, 2)), ("grouped", (H, 2))):
        for kind, shape in (("weight", trailing), ("bias", ())):
            pair = tuple(Named(name, shapes[name]) for name in (f"{ours}q_{conv}.{kind}", f"{ours}k_{conv}.{kind}"))
            yield Link(pair, (Named(f"{convolutions[conv]}.{kind}", (q_rows + kv_rows, *shape)),))


def from_hf_config(hf_config: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """(our shape, the rest) of a config.json's dict; to_hf_config puts the two together again.

    ValueError naming key, value and what we support, for another architecture and for values that our model has no knob for."""
    rest = dict(hf_config)
    if rest.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type = {rest.get('model_type')!r} is not supported; only {MODEL_TYPE!r} is")
    old = [key for key in OLD_LAYOUT_KEYS if key in rest]
    if old:
        raise ValueError(f"{old[0]} = {rest[old[0]]!r} belongs to the layout before transformers 5.13 (alternating stages), which is not "
                         "supported; use the weights in transformers' layout")
    for key, value in FIXED.items():
        if rest.get(key, value) != value:
            raise ValueError(f"{key} = {rest[key]!r} is not supported; only {value!r} is")
    shape: dict[str, Any] = {}
    for field, key in SHAPE_KEYS.items():
        shape[field] = _number(key, rest.pop(key, DEFAULTS[key]), type(DEFAULTS[key]))
    kinds = _attention_kinds(rest.pop("layer_types", None), shape["num_layers"])
    full, sliding = (_rope_theta(rest.get("rope_parameters"), LAYER_TYPES[kind], kind in kinds) for kind in LAYER_TYPES)
    window = rest.pop("sliding_window", None)
    model = ModelConfig(**shape, attention_pattern=shortest_period(kinds), rope_theta=full, rope_theta_sliding=sliding,
                        sliding_window=0 if window is None else _number("sliding_window", window, int))
    model.validate()
    if "torch_dtype" in rest:  # its name before transformers 5
        rest.setdefault("dtype", rest.pop("torch_dtype"))
    return model, rest


def to_hf_config(model: ModelConfig, rest: dict[str, Any]) -> dict[str, Any]:
    """The dict of a config.json. `rest` is what from_hf_config returned, or at least what only the user knows (token ids, lengths)."""
    kinds = [model.attention_kind(block) for block in range(model.num_layers)]
    shape: dict[str, Any] = {key: getattr(model, field) for field, key in SHAPE_KEYS.items()}
    shape["layer_types"] = [LAYER_TYPES[kind] for kind in kinds]
    shape["sliding_window"] = model.sliding_window or None
    template = rest.get("rope_parameters") or {}
    rope = {key: value for key, value in template.items() if key != "rope_type"}  # a stray key that transformers drops as well
    for kind, theta in (("full", model.rope_theta), ("sliding", model.rope_theta_sliding)):
        if kind in kinds or not template:
            entry = {"rope_type": "default", "partial_rotary_factor": PARTIAL_ROTARY_FACTOR} | (rope.get(LAYER_TYPES[kind]) or {})
            rope[LAYER_TYPES[kind]] = entry | {"rope_theta": theta}
    return {"model_type": MODEL_TYPE} | FIXED | rest | shape | {"rope_parameters": rope}


def rest_of_new_model(eos_token_id: int | None, max_length: int | None) -> dict[str, Any]:
    """The rest for a model that never was a config.json. Token ids are always written: transformers' defaults are of another vocabulary."""
    rest: dict[str, Any] = {"architectures": ["ZayaForCausalLM"], "bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": None}
    return rest | ({"max_position_embeddings": max_length} if max_length else {})


def _number(key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} = {value!r} is not supported; it must be {'a number' if kind is float else 'an integer'}")
    return value


def _attention_kinds(layer_types: Any, num_layers: int) -> list[str]:
    if layer_types is None:
        return ["full"] * num_layers
    kinds = {theirs: ours for ours, theirs in LAYER_TYPES.items()}
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        given = len(layer_types) if isinstance(layer_types, list) else repr(layer_types)
        raise ValueError(f"layer_types has {given} entries for num_hidden_layers = {num_layers}; give one each")
    for layer_type in layer_types:
        if layer_type not in kinds:
            raise ValueError(f"layer_types has {layer_type!r}, which is not supported; only {', '.join(map(repr, kinds))} are")
    return [kinds[layer_type] for layer_type in layer_types]


def _rope_theta(rope_parameters: Any, layer_type: str, used: bool) -> float:
    """The base of one kind of block. An entry that no block uses may be anything or nothing, as in transformers."""
    if rope_parameters is None:
        return ROPE_DEFAULTS[layer_type]
    entry = rope_parameters.get(layer_type) if isinstance(rope_parameters, dict) else None
    theta = entry.get("rope_theta") if isinstance(entry, dict) else None
    if not used:
        return float(theta) if isinstance(theta, (int, float)) else ROPE_DEFAULTS[layer_type]
    if not isinstance(entry, dict) or theta is None:
        raise ValueError(f"rope_parameters = {rope_parameters!r} gives no rope_theta for {layer_type!r} blocks; write one per layer type")
    for key, value, silent in (("rope_type", "default", "default"), ("partial_rotary_factor", PARTIAL_ROTARY_FACTOR, 1.0)):
        if entry.get(key, silent) != value:
            raise ValueError(f"rope_parameters.{layer_type}.{key} = {entry.get(key, silent)!r} is not supported; only {value!r} is")
    number: float = _number(f"rope_parameters.{layer_type}.rope_theta", theta, float)
    return number


def shortest_period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that repeats into `kinds`, as a person writes it in a recipe."""
    repeats = (n for n in range(1, len(kinds)) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[: next(repeats, len(kinds))])
