"""Weights in the layout that Zyphra published before transformers 5.13: imported exactly, every tensor counted.

The old files are written here from transformers' model by a conversion of the test's own, out of the description of that layout: two stages
per block, a stage beginning with the scaling that the block's previous sub-layer ends with. That the description itself is right is shown
by `run_stages`, which computes stage by stage, as the old code did, with the old files' numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM

from tests.cpu.test_fidelity import draw, reference_model
from tools import export_hf, import_hf
from zaya.checkpoint.read import Checkpoint
from zaya.config import ModelConfig, model_from_tables
from zaya.model import hf, zyphra
from zaya.model.transformer import Zaya

FULL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, num_experts=4,
                   moe_intermediate_size=16, router_hidden_size=8, rope_theta=5e6)
SLIDING = ModelConfig(vocab_size=64, hidden_size=24, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=3,
                      moe_intermediate_size=12, router_hidden_size=8, attention_pattern=("sliding", "full"), sliding_window=5,
                      rope_theta=5e6)
SCALING = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")


def old_tensors(reference: ZayaForCausalLM) -> dict[str, Tensor]:
    """The model's weights as they were published."""
    model = reference.model
    stages = 2 * len(model.layers)
    old: dict[str, Any] = {"model.embed_tokens.weight": model.embed_tokens.weight, "model.final_norm.weight": model.norm.weight,
                           "model.layers.0.res_scale.hidden_states_scale": model.input_hidden_states_scale,
                           "model.layers.0.res_scale.hidden_states_bias": model.input_hidden_states_bias}
    for index, layer in enumerate(model.layers):
        attention, experts = f"model.layers.{2 * index}.", f"model.layers.{2 * index + 1}."
        qkv, gate = layer.self_attn.qkv_proj, layer.mlp.gate
        old |= {attention + "input_norm.weight": layer.input_layernorm.weight,
                attention + "self_attn.o_proj.weight": layer.self_attn.o_proj.weight,
                attention + "self_attn.qkv.temp": layer.self_attn.qk_norm.temp,
                attention + "self_attn.qkv.linear_q.weight": qkv.q_proj.weight,
                attention + "self_attn.qkv.linear_k.weight": qkv.k_proj.weight,
                attention + "self_attn.qkv.val_proj1.weight": qkv.v_proj_current.weight,
                attention + "self_attn.qkv.val_proj2.weight": qkv.v_proj_delayed.weight}
        for position, convolution in enumerate((qkv.conv_qk_depthwise, qkv.conv_qk_grouped)):
            old[f"{attention}self_attn.qkv.conv_qk.{position}.weight"] = convolution.weight
            old[f"{attention}self_attn.qkv.conv_qk.{position}.bias"] = convolution.bias
        router = experts + "zaya_block.router."
        old |= {experts + "input_norm.weight": layer.post_attention_layernorm.weight,
                router + "down_proj.weight": gate.down_proj.weight, router + "down_proj.bias": gate.down_proj.bias,
                router + "rmsnorm_eda.weight": gate.router_mlp.norm.weight, router + "balancing_biases": gate.balancing_biases,
                router + "router_mlp.4.weight": gate.router_mlp.out_proj.weight}
        for position, linear in ((0, gate.router_mlp.fc1), (2, gate.router_mlp.fc2)):
            old |= {f"{router}router_mlp.{position}.weight": linear.weight, f"{router}router_mlp.{position}.bias": linear.bias}
        if index:
            old[router + "router_states_scale"] = gate.router_states_scale
        for expert in range(len(layer.mlp.experts.gate_up_proj)):
            local = f"{experts}zaya_block.experts.local_experts.{expert}."
            old |= {local + "linear_fc1.weight": layer.mlp.experts.gate_up_proj[expert],
                    local + "linear_fc2.weight": layer.mlp.experts.down_proj[expert]}
        # What ends a sub-layer here began the next stage there; after the last stage it stood alone.
        for stage, scale in ((2 * index + 1, layer.post_attention_residual_scale), (2 * index + 2, layer.post_mlp_residual_scale)):
            prefix = f"model.layers.{stage}.res_scale." if stage < stages else "model.res_scale."
            old |= {prefix + name: getattr(scale, name) for name in SCALING}
    return {name: tensor.detach().clone().contiguous() for name, tensor in old.items()}


def old_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as it was published."""
    windows = [config.sliding_window - 1 if config.attention_kind(block) == "sliding" else 0 for block in range(config.num_layers)]
    found = {
        "activation_func": "swiglu", "add_bias_linear": False, "architectures": ["ZayaForCausalLM"], "attention_bias": False,
        "bos_token_id": 2, "cca": True, "cca_time0": 2, "cca_time1": 2, "clamp_temp": False, "dtype": "float32", "eos_token_id": 106,
        "ffn_hidden_size": 2 * config.moe_intermediate_size, "gated_linear_unit": True, "head_dim": config.head_dim,
        "hidden_size": config.hidden_size, "kv_channels": config.head_dim, "lm_head_bias": False, "mamba_cache_dtype": "float32",
        "max_position_embeddings": 131072, "model_type": "zaya", "moe_router_topk": 1, "norm_epsilon": 1e-05, "normalization": "RMSNorm",
        "num_attention_heads": config.num_heads, "num_experts": config.num_experts, "num_hidden_layers": 2 * config.num_layers,
        "num_key_value_heads": config.num_kv_heads, "num_query_groups": config.num_kv_heads, "pad_token_id": 0,
        "partial_rotary_factor": 0.5, "residual_in_fp32": True, "rope_scaling": False, "rope_theta": int(config.rope_theta),
        "scale_residual_merge": True, "sliding_window": None, "tie_word_embeddings": True, "vocab_size": config.vocab_size,
        "zaya_high_prec": True, "zaya_mlp_expansion": config.router_hidden_size, "zaya_use_eda": True, "zaya_use_mod": True,
    }
    if any(windows):  # for the stages of attention; those of the experts have a 0
        found |= {"swa_layers": [window for pair in zip(windows, [0] * len(windows)) for window in pair],
                  "swa_rotary_base": config.rope_theta_sliding}
    return found


def listed_config(config: ModelConfig) -> dict[str, Any]:
    """config.json as ZAYA1-base has it: a list over the stages where there could be one number, and the number wrong or absent."""
    found = old_config(config)
    for key in ("num_experts", "num_query_groups", "ffn_hidden_size", "head_dim", "rope_scaling"):
        del found[key]
    rotary_base = found.pop("rope_theta")

    def over_stages(even: object, odd: object) -> list[object]:
        return [even, odd] * config.num_layers

    return found | {
        "zaya_layers": over_stages("a", config.num_experts), "cca_num_q_heads": over_stages(config.num_heads, 0),
        "num_query_groups_list": over_stages(config.num_kv_heads, 0), "zaya_mlp_expansion": over_stages(0, config.router_hidden_size),
        "ffn_hidden_size_list": [*over_stages(0, 2 * config.moe_intermediate_size), 0, 7, 0, 7],  # padded beyond the stages
        "num_attention_heads": 2 * config.num_heads, "num_hidden_layers": 160, "rotary_base": rotary_base}


def save_old(path: Path, config: ModelConfig, describe: Callable[[ModelConfig], dict[str, Any]] = old_config,
             dtype: torch.dtype = torch.float32) -> ZayaForCausalLM:
    """A directory as it was published, in two shards, of a model with nothing at its initial value."""
    reference = reference_model(config, seed=11)
    tensors = {name: tensor if name.endswith("balancing_biases") else tensor.to(dtype) for name, tensor in old_tensors(reference).items()}
    path.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(describe(config)))
    return reference


def imported(path: Path, dtype: torch.dtype = torch.float32) -> Zaya:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    model = Zaya(model_from_tables(checkpoint.manifest.recipe), dtype=dtype)
    model.load_state_dict({name.removeprefix("model."): checkpoint.read(name) for name in checkpoint.names()})
    return model


def batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (3, 21), generator=torch.Generator().manual_seed(2))
    return tokens, torch.arange(21).expand(3, 21)


@torch.no_grad()
def run_stages(reference: ZayaForCausalLM, old: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the old files as the old code computed them. Sub-layers and norms are transformers', for the numbers in them are equal by
    name; scaling and adding, in which the layouts differ, are done here."""
    model = reference.model
    hidden, stream, routed = old["model.embed_tokens.weight"][tokens], None, None
    captured = capture_attention_arguments(reference, tokens)
    stages = 2 * len(model.layers)
    for stage in range(stages + 1):
        prefix = f"model.layers.{stage}.res_scale." if stage < stages else "model.res_scale."
        hidden = (hidden + old[prefix + "hidden_states_bias"]) * old[prefix + "hidden_states_scale"]
        if stream is not None:
            hidden = hidden + (stream + old[prefix + "residual_bias"]) * old[prefix + "residual_scale"]
        stream = hidden
        if stage == stages:
            break
        layer = model.layers[stage // 2]
        norm = layer.post_attention_layernorm if stage % 2 else layer.input_layernorm
        assert torch.equal(norm.weight, old[f"model.layers.{stage}.input_norm.weight"])
        if stage % 2:
            hidden, routed = layer.mlp(norm(stream), routed)
        else:
            hidden = layer.self_attn(norm(stream), **captured[stage // 2])[0]
    assert torch.equal(model.norm.weight, old["model.final_norm.weight"])
    return torch.nn.functional.linear(model.norm(stream), old["model.embed_tokens.weight"])


def capture_attention_arguments(reference: ZayaForCausalLM, tokens: Tensor) -> list[dict[str, Any]]:
    """Masks and rotary tables that transformers hands each attention for these tokens."""
    captured: list[dict[str, Any]] = []

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append({key: value for key, value in kwargs.items() if key != "hidden_states"})
        assert not args[1:]

    hooks = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in reference.model.layers]
    reference(tokens, use_cache=False)
    for handle in hooks:
        handle.remove()
    return captured


# ---------------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("config", [FULL, SLIDING, *(draw(seed).config for seed in (2, 5))], ids=["full", "sliding", "2", "5"])
def test_the_import_computes_what_transformers_computes(tmp_path: Path, config: ModelConfig) -> None:
    reference = save_old(tmp_path / "old", config)
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 0
    model = imported(tmp_path / "ours")
    tokens, positions = batch(config)
    with torch.no_grad():
        expected = reference(tokens).logits
        logits = model.logits(model(tokens, positions).hidden_BTD)
    assert (logits - expected).square().mean().sqrt() < 1e-5 * expected.square().mean().sqrt()
    # Exactly the same numbers, by another way: the same weights imported from transformers' layout.
    reference.save_pretrained(tmp_path / "new")
    assert import_hf.main([str(tmp_path / "new"), str(tmp_path / "same")]) == 0
    same = imported(tmp_path / "same").state_dict()
    assert same.keys() == model.state_dict().keys() and all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [FULL, SLIDING], ids=["full", "sliding"])
def test_the_old_files_mean_what_the_description_says(tmp_path: Path, config: ModelConfig) -> None:
    reference = save_old(tmp_path / "old", config)
    old = {name: tensor for file in (tmp_path / "old").glob("*.safetensors") for name, tensor in load_file(file).items()}
    tokens, _ = batch(config)
    with torch.no_grad():
        expected = reference(tokens).logits
    torch.testing.assert_close(run_stages(reference, old, tokens), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    save_old(tmp_path / "old", FULL, dtype=dtype)
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 0
    checkpoint = Checkpoint.open(tmp_path / "ours")
    old = {name: tensor for file in (tmp_path / "old").glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = torch.float32 if dtype == torch.float16 else dtype  # no run of ours is in fp16, and the way to fp32 is exact
    for link in zyphra.links(FULL):
        ours = [checkpoint.read(f"model.{named.name}") for named in link.ours]
        assert all(tensor.dtype == (torch.float32 if link.always_fp32 else kept) for tensor in ours)
        assert torch.equal(torch.cat([tensor.flatten() for tensor in ours]),
                           torch.cat([old[named.name].flatten() for named in link.theirs]).to(ours[0].dtype)), link


@pytest.mark.parametrize("config", [FULL, SLIDING, *(draw(seed).config for seed in range(6))],
                         ids=["full", "sliding", *map(str, range(6))])
def test_the_table_names_every_tensor_of_both_sides_once(config: ModelConfig) -> None:
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Zaya(config).state_dict().items()}
        reference = ZayaForCausalLM(ZayaConfig(**hf.to_hf_config(config, {})))
        theirs = {name: tuple(tensor.shape) for name, tensor in old_tensors(reference).items()}
    table = zyphra.links(config)
    for side, shapes in ((lambda link: link.ours, ours), (lambda link: link.theirs, theirs)):
        named = [named for link in table for named in side(link)]
        assert len(named) == len({entry.name for entry in named})
        assert {entry.name: entry.shape for entry in named} == shapes


def test_the_table_has_as_many_tensors_as_the_release() -> None:
    """ZAYA1-8B was published as 2,483 tensors."""
    released = ModelConfig(vocab_size=262272, hidden_size=2048, num_layers=40, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=16,
                           moe_intermediate_size=2048, router_hidden_size=256, rope_theta=5e6)
    table = zyphra.links(released)
    assert sum(len(link.theirs) for link in table) == 2483
    parameters = sum(torch.Size(named.shape).numel() for link in table if not link.always_fp32 for named in link.theirs)
    assert parameters == 8_840_488_784


# ---------------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("describe", [old_config, listed_config])
@pytest.mark.parametrize("config", [FULL, SLIDING, *(draw(seed).config for seed in range(6))],
                         ids=["full", "sliding", *map(str, range(6))])
def test_the_model_of_a_config(config: ModelConfig, describe: Callable[[ModelConfig], dict[str, Any]]) -> None:
    document = json.loads(json.dumps(describe(config)))
    assert zyphra.recognises(document)
    model, rest = zyphra.from_hf_config(document)
    kinds = [[c.attention_kind(block) for block in range(c.num_layers)] for c in (model, config)]
    assert kinds[0] == kinds[1]
    slides = "sliding" in kinds[0]
    for field in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "num_experts", "skip_expert",
                  "moe_intermediate_size", "router_hidden_size", "rope_theta"):
        assert getattr(model, field) == getattr(config, field), field
    assert not slides or (model.sliding_window, model.rope_theta_sliding) == (config.sliding_window, config.rope_theta_sliding)
    # What leaves again is in transformers' layout, with the token ids and lengths that came.
    back, _ = hf.from_hf_config(hf.to_hf_config(model, rest))
    assert back == model
    assert (rest["eos_token_id"], rest["max_position_embeddings"], rest["dtype"]) == (106, 131072, "float32")


def test_it_leaves_in_the_new_layout(tmp_path: Path) -> None:
    reference = save_old(tmp_path / "old", SLIDING, listed_config)
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 0
    assert export_hf.main([str(tmp_path / "ours"), str(tmp_path / "new")]) == 0
    found, expected = load_file(tmp_path / "new" / "model.safetensors"), reference.state_dict()
    del expected["lm_head.weight"]  # tied
    assert found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = ZayaForCausalLM.from_pretrained(tmp_path / "new")
    assert (loaded.config.eos_token_id, loaded.config.max_position_embeddings, loaded.config.sliding_window) == (106, 131072, 5)


def test_a_model_without_the_skip_class(tmp_path: Path) -> None:
    """zaya_use_mod = false: one class less, everywhere."""
    model, _ = zyphra.from_hf_config(old_config(FULL) | {"zaya_use_mod": False})
    assert not model.skip_expert
    shapes = {named.name: named.shape for link in zyphra.links(model) for named in link.theirs}
    assert shapes["model.layers.1.zaya_block.router.router_mlp.4.weight"] == (4, 8)
    assert shapes["model.layers.1.zaya_block.router.balancing_biases"] == (4,)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in old_config(SLIDING).items() if name != key}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "odd stages": (old_config(FULL) | {"num_hidden_layers": 7}, "num_hidden_layers = 7 is not supported; in this layout it counts stages"),
    "no eda": (old_config(FULL) | {"zaya_use_eda": False}, "zaya_use_eda = False is not supported; only True is"),
    "no scaling": (old_config(FULL) | {"scale_residual_merge": False}, "scale_residual_merge = False is not supported"),
    "clamped": (old_config(FULL) | {"clamp_temp": True}, "clamp_temp = True is not supported"),
    "wide": (old_config(FULL) | {"cca_time0": 4}, "cca_time0 = 4 is not supported; only 2 is"),
    "layer norm": (old_config(FULL) | {"normalization": "LayerNorm"}, "normalization = 'LayerNorm' is not supported"),
    "eps": (old_config(FULL) | {"norm_epsilon": 1e-6}, "norm_epsilon = 1e-06 is not supported; only 1e-05 is"),
    "top 2": (old_config(FULL) | {"moe_router_topk": 2}, "moe_router_topk = 2 is not supported; only 1 is"),
    "scaled": (old_config(FULL) | {"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'} is not supported"),
    "odd width": (old_config(FULL) | {"ffn_hidden_size": 33}, "ffn_hidden_size = 33 is not supported; it must be even"),
    "text": (old_config(FULL) | {"hidden_size": "32"}, "hidden_size = '32' is not supported; it must be an integer"),
    "mod": (old_config(FULL) | {"zaya_use_mod": 1}, "zaya_use_mod = 1 is not supported; it must be true or false"),
    "no theta": (without("rope_theta"), "config.json lacks rope_theta and rotary_base"),
    "no sliding theta": (without("swa_rotary_base"), "config.json lacks swa_rotary_base"),
    "no vocabulary": (without("vocab_size"), "config.json lacks vocab_size; write it in"),
    "two windows": (old_config(SLIDING) | {"swa_layers": [4, 0, 5, 0, 4, 0, 0, 0]}, "swa_layers has several windows: [0, 5, 6]"),
    "few windows": (old_config(SLIDING) | {"swa_layers": [4, 0]}, "swa_layers = [4, 0] is not supported"),
    "odd window": (old_config(SLIDING) | {"swa_layers": ["a"] * 8}, "swa_layers has the entry 'a'"),
    "window for nothing": (old_config(FULL) | {"sliding_window": 5}, "sliding_window = 5 is not supported"),
    "several sizes": (listed_config(FULL) | {"cca_num_q_heads": [6, 0, 3, 0, 6, 0]}, "cca_num_q_heads = [6, 0, 3, 0, 6, 0] is not"),
    "another order": (listed_config(FULL) | {"zaya_layers": ["a", "a", 4, 4, "a", 4]}, "zaya_layers = ['a', 'a', 4, 4, 'a', 4] is not"),
    "both layouts": (old_config(FULL) | {"moe_intermediate_size": 16}, "belongs to the layout before transformers 5.13"),
    "other model": (old_config(FULL) | {"model_type": "zaya1_vl"}, "model_type = 'zaya1_vl' is not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_that_are_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, words = BAD_CONFIGS[case]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(document))
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.import_hf: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "ours").exists()


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """All tensors in one file, after a change."""
    tensors = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*path.glob("*.safetensors"), path / "model.safetensors.index.json"]:
        file.unlink()
    change(tensors)
    save_file(tensors, path / "model.safetensors")


EXPERT = "model.layers.3.zaya_block.experts.local_experts.2.linear_fc2.weight"
FIFTH = EXPERT.replace(".2.", ".4.")
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing expert": (lambda t: t.pop(EXPERT), f"lacks tensor {EXPERT}"),
    "missing end": (lambda t: t.pop("model.res_scale.residual_bias"), "lacks tensor model.res_scale.residual_bias"),
    "two missing": (lambda t: [t.pop(EXPERT), t.pop("model.final_norm.weight")], "lacks tensor model.final_norm.weight (and 1 more)"),
    "extra": (lambda t: t.update({FIFTH: torch.ones(1)}), f"has the unexpected tensor {FIFTH}"),
    "extra scaling": (lambda t: t.update({"model.layers.0.res_scale.residual_scale": torch.ones(32)}),
                      "has the unexpected tensor model.layers.0.res_scale.residual_scale"),
    "eda in the first": (lambda t: t.update({"model.layers.1.zaya_block.router.router_states_scale": torch.ones(8)}),
                         "has the unexpected tensor model.layers.1.zaya_block.router.router_states_scale"),
    "misshapen": (lambda t: t.update({EXPERT: torch.ones(16, 32)}), f"tensor {EXPERT} has shape [16, 32], config.json asks for [32, 16]"),
    "untied": (lambda t: t.update({"lm_head.weight": torch.ones(300, 32)}), "tensor lm_head.weight differs from model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BAD_TENSORS[case]
    save_old(tmp_path / "old", FULL)
    change_tensors(tmp_path / "old", change)
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.import_hf: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "ours").exists()


def test_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    save_old(tmp_path / "old", FULL)
    change_tensors(tmp_path / "old", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert import_hf.main([str(tmp_path / "old"), str(tmp_path / "ours")]) == 0
