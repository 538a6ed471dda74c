"""The model and the plan describe the same parameters; sizes of the published models; initial weights; recomputation; FLOPs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zaya.config import ModelConfig, load_recipe
from zaya.model import flops
from zaya.model.init import init_weights
from zaya.model.transformer import Zaya
from zaya.plan import Muon, Shard, plan

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, num_experts=4,
                    moe_intermediate_size=20, router_hidden_size=12, attention_pattern=("sliding", "full"), sliding_window=5)


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, recompute: str = "none") -> Zaya:
    model = Zaya(config, dtype, recompute)
    init_weights(model, config, seed)
    return model


@pytest.mark.parametrize(("name", "total", "without_embedding", "active"), [
    ("zaya1_8b_pretrain1", 8_840_488_784, 8_303_355_728, 753_608_528),
    ("zaya1_74b_pretrain", 74_793_953_144, 73_719_687_032, 4_262_012_792),
])
def test_published_sizes_on_the_meta_device(name: str, total: int, without_embedding: int, active: int) -> None:
    config = load_recipe(RECIPES / f"{name}.toml").model
    with torch.device("meta"):
        parameters = dict(Zaya(config).named_parameters())
    count = sum(p.numel() for p in parameters.values())
    experts = sum(p.numel() for n, p in parameters.items() if ".experts." in n)
    outside = count - parameters["embedding.weight"].numel()
    assert (count, outside, outside - experts + experts // config.num_experts) == (total, without_embedding, active)


@pytest.mark.parametrize("skip", [True, False])
def test_every_parameter_has_exactly_one_row_of_its_shape(skip: bool) -> None:
    config = ModelConfig(**{**SMALL.__dict__, "skip_expert": skip})
    model = Zaya(config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {n: row.shape for n, row in plan(config).items()}


def test_the_plan_cuts_what_must_be_cut() -> None:
    table = plan(SMALL)
    assert table["blocks.0.moe.experts.gate_up"].optimizer == Muon(2) and table["blocks.0.attention.v.weight"].optimizer == Muon(2)
    assert table["blocks.1.moe.experts.down"].placement == Shard(0, "ep", 4)
    assert table["blocks.0.attention.o.weight"].placement == Shard(1, "tp", 6)
    assert "blocks.0.moe.router.depth_scale" not in table and "blocks.1.moe.router.depth_scale" in table
    decayed = {re.sub(r"^blocks\.\d+\.", "", name) for name, row in table.items() if row.decay}
    matrices = [f"attention.{x}.weight" for x in "qkvo"] + [f"moe.router.{x}.weight" for x in ("down", "fc1", "fc2", "out")]
    assert decayed == {"embedding.weight", "moe.experts.gate_up", "moe.experts.down", *matrices}


def test_delayed_rows_are_the_second_half_of_the_values_wherever_heads_end() -> None:
    for kv_heads in (1, 2, 3):
        config = ModelConfig(**{**SMALL.__dict__, "num_kv_heads": kv_heads})
        assert Zaya(config).blocks[0].attention.delayed_rows == (kv_heads * 4, kv_heads * 8)


def test_initial_weights_come_from_seed_and_name_alone() -> None:
    a, deeper = build(SMALL), build(ModelConfig(**{**SMALL.__dict__, "num_layers": 4, "init_std": SMALL.init_std * (4 / 3) ** 0.5}))
    name = "blocks.2.moe.experts.down"  # its std falls with the depth, which init_std makes up for here
    assert torch.allclose(a.get_parameter(name), deeper.get_parameter(name), rtol=1e-6)
    assert torch.equal(a.get_parameter(name), build(SMALL).get_parameter(name))
    assert not torch.equal(a.get_parameter(name), build(SMALL, seed=1).get_parameter(name))
    values = [p.detach().flatten()[:50] for p in a.parameters() if p.numel() >= 50 and p.std() > 0]
    assert all(not torch.equal(x, y) for i, x in enumerate(values) for y in values[:i])
    gate_up = a.get_parameter("blocks.0.moe.experts.gate_up")
    assert gate_up.std().item() == pytest.approx(SMALL.init_std, rel=0.05) and not torch.equal(gate_up[0], gate_up[1])


def test_every_dtype_keeps_the_stream_wide() -> None:
    tokens = torch.randint(0, 64, (1, 7))
    positions = torch.arange(7)[None]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        model = build(SMALL, dtype=dtype)
        seen: set[tuple[torch.dtype, torch.dtype]] = set()
        for block in model.blocks:
            block.moe_residual.register_forward_hook(lambda module, args, output, seen=seen: seen.add((output[0].dtype, output[1].dtype)))
        hidden = model(tokens, positions).hidden_BTD
        assert hidden.dtype == dtype and seen == {(wide, dtype)}
        assert model.blocks[0].moe.router.balance_bias.dtype == wide


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_keeps_less_and_changes_no_bit(recompute: str) -> None:
    tokens, positions = torch.randint(0, 64, (2, 40)), torch.cat([torch.arange(13), torch.arange(27)]).expand(2, 40)
    results, kept = [], []
    for mode in ("none", recompute):
        model = build(SMALL, recompute=mode)
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens, positions)
        model.loss(output.hidden_BTD, tokens).backward()
        results.append([output.counts_LC, *(p.grad for p in model.parameters())])
        kept.append(sum(tensor.numel() for tensor in saved))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert results[0][0].sum().item() == 3 * 80, "every token is counted once per block"
    assert kept[1] < kept[0] * (0.5 if recompute == "full" else 0.9)


def test_flops_formula_equals_the_counter_on_the_real_model() -> None:
    """Attention runs in blocks of queries: a row shorter than one block, so that each query meets all T keys, masked or not."""
    config = ModelConfig(**{**SMALL.__dict__, "skip_expert": False})  # every token visits an expert
    T = 24
    model = build(config)
    tokens, positions = torch.randint(0, 64, (2, T)), torch.arange(T).expand(2, T)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.loss(model(tokens, positions).hidden_BTD, tokens)
    expected = 2 * T * flops.forward_flops_per_token(config, {"full": T, "sliding": T})
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as both:
        model.loss(model(tokens, positions).hidden_BTD, tokens).backward()
    # Backward computes each attention's scores once more, which no model FLOP count includes.
    scores_again = config.num_layers * 2 * T * 2 * config.num_heads * config.head_dim * T
    # Nor this: each residual join's backward takes a mean over channels as a product with a vector.
    norm_means = 2 * config.num_layers * 2 * T * 2 * config.hidden_size
    assert both.get_total_flops() == (1 + flops.BACKWARD) * expected + scores_again + norm_means


def test_causal_keys_are_the_mean_over_the_mask() -> None:
    for T, window in ((10, 3), (10, 10), (7, 20)):
        index = torch.arange(T)
        visible = (index[None] <= index[:, None]) & (index[None] > index[:, None] - window)
        config = ModelConfig(**{**SMALL.__dict__, "sliding_window": window})
        keys = flops.causal_keys(config, T)
        assert keys["sliding"] == pytest.approx(visible.sum().item() / T) and keys["full"] == (T + 1) / 2


def test_peak_flops_by_name() -> None:
    assert flops.peak_flops("AMD Instinct MI300X") == 1307.4e12 and flops.peak_flops("some other chip") is None
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12 and flops.peak_flops("NVIDIA H100 PCIe") is None
