"""Proof of fidelity: our model computes what transformers' Zaya computes, over random configurations, nothing at its start value.

The reference is ZayaForCausalLM in fp32 with eager attention. pad_token_id is None there, because an Embedding with a padding row drops
that row's gradient. RMS(difference) / RMS(reference) is the measure throughout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ZayaConfig, ZayaForCausalLM

from zaya.config import ModelConfig
from zaya.model import hf
from zaya.model.transformer import Zaya

CONFIGURATIONS = 16
TIE = 1e-5  # two classes closer than this may change places by rounding; the seeds below have none


@dataclass(frozen=True)
class Case:
    """One random model and the batch it sees."""

    seed: int
    config: ModelConfig
    batch: int
    length: int


def draw(seed: int) -> Case:
    """A small random configuration: everything that changes a code path varies."""
    rng = random.Random(seed)
    groups, per_group = rng.choice([1, 2, 3, 5]), rng.choice([1, 2, 3])
    pattern = rng.choice([("full",), ("sliding",), ("sliding", "full"), ("full", "sliding", "sliding")])
    length = rng.choice([9, 17, 23, 31])
    config = ModelConfig(
        vocab_size=rng.choice([37, 64]), hidden_size=rng.choice([24, 32]), num_layers=rng.choice([2, 3, 4]), num_heads=groups * per_group,
        num_kv_heads=groups, head_dim=rng.choice([4, 8, 12]), num_experts=rng.randint(2, 8), moe_intermediate_size=rng.choice([12, 20]),
        router_hidden_size=rng.choice([8, 14]), attention_pattern=pattern, sliding_window=rng.randint(2, length - 2),
        rope_theta=rng.choice([1e4, 5e6]), rope_theta_sliding=rng.choice([10.0, 1e4]))
    return Case(seed, config, rng.choice([2, 3]), length)


def reference_model(config: ModelConfig, seed: int) -> ZayaForCausalLM:
    """transformers' model with every parameter and balance bias moved away from its initial value."""
    rest = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = ZayaForCausalLM(ZayaConfig(**hf.to_hf_config(config, rest), **eager)).eval()
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: Sequence[int], std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices near 1 / sqrt(fan-in) keep activations of order one; the router's are larger, so that classes differ.
            spread = (1.5 if ".gate.router_mlp" in name else 1.0) / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
            center = 1.0 if name.endswith(("scale", "norm.weight", "qk_norm.temp")) or "layernorm" in name else 0.0
            parameter.copy_(center + noise(parameter.shape, spread))
    calibrate_balance(model, noise)
    return model


@torch.no_grad()
def calibrate_balance(model: ZayaForCausalLM, noise: Callable[[Sequence[int], float], Tensor]) -> None:
    """Set every balance bias so that tokens spread over the classes: a random router would send them all to one."""
    hooks = []
    for layer in model.model.layers:
        gate = layer.mlp.gate

        def balance(_module: Any, _inputs: Any, logits: Tensor, bias: Tensor = gate.balancing_biases) -> None:
            probs = logits.softmax(-1).flatten(0, 1)
            bias.copy_(noise(bias.shape, 0.02) - probs.mean(0))
            best_real = (probs + bias)[:, :-1].amax(-1)
            bias[-1] = (best_real - probs[:, -1]).quantile(0.3)  # three tokens in ten prefer to skip

        hooks.append(gate.router_mlp.register_forward_hook(balance))
    model(torch.randint(model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()


def our_model(reference: ZayaForCausalLM, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Zaya:
    """Our model with the reference's weights."""
    state = reference.state_dict()
    ours: dict[str, Tensor] = {}
    for link in hf.links(config):
        ours.update(zip((named.name for named in link.ours), link.to_ours([state[named.name] for named in link.theirs]), strict=True))
    model = Zaya(config, dtype=dtype)
    model.load_state_dict(ours)
    return model


@dataclass
class Routing:
    """Classes chosen per block, and the smallest distance between the best and the second class."""

    chosen: list[Tensor] = field(default_factory=list)
    margin: float = float("inf")


def watch_reference(model: ZayaForCausalLM) -> Routing:
    routing = Routing()

    def hook(gate: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        logits, gates, experts = output[0], output[1][:, 0], output[2][:, 0]
        # transformers masks a skipped token to (expert 0, gate 0); a softmax probability is never 0.
        routing.chosen.append(torch.where(gates == 0, gate.num_experts, experts))
        best = (logits.detach().softmax(-1) + gate.balancing_biases).topk(2).values
        routing.margin = min(routing.margin, float((best[:, 0] - best[:, 1]).min()))

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(hook)
    return routing


def watch_ours(model: Zaya) -> Routing:
    routing = Routing()
    routers: list[Any] = [block.moe.router for block in model.blocks]
    for router in routers:
        router.register_forward_hook(lambda _module, _inputs, output: routing.chosen.append(output[0][:, 0].long()))
    return routing


def relative(value: Tensor, reference: Tensor) -> float:
    """RMS(difference) / RMS(reference); where the reference is zero, the value must be."""
    value, reference = value.detach(), reference.detach()
    difference = (value.double() - reference.double()).square().mean().sqrt()
    return float(difference / reference.double().square().mean().sqrt()) if reference.any() else float(difference != 0)


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def gradients(reference: ZayaForCausalLM, ours: Zaya, config: ModelConfig) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, our gradient, theirs) of every parameter, cut as finely as either side cuts it."""
    mine, yours = dict(ours.named_parameters()), dict(reference.named_parameters())
    seen_mine, seen_yours = set(), set()
    for link in hf.links(config):
        if link.always_fp32:
            continue  # the balance bias is state
        seen_mine |= {named.name for named in link.ours}
        seen_yours |= {named.name for named in link.theirs}
        our_grads = [gradient(mine[named.name]) for named in link.ours]
        their_grads = [gradient(yours[named.name]) for named in link.theirs]
        if len(link.theirs) > len(link.ours):
            yield from zip((named.name for named in link.theirs), link.to_theirs(our_grads), their_grads, strict=True)
        else:
            yield from zip((named.name for named in link.ours), our_grads, link.to_ours(their_grads), strict=True)
    assert (seen_mine, seen_yours) == (set(mine), set(yours)), "a parameter was not compared"


def random_batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + case.seed)
    tokens, labels = torch.randint(case.config.vocab_size, (2, case.batch, case.length), generator=generator)
    return tokens, labels, torch.arange(case.length).expand(case.batch, -1)


def mean_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())


def test_configurations_cover_every_path() -> None:
    configs = [draw(seed).config for seed in range(CONFIGURATIONS)]
    kinds = [{config.attention_kind(block) for block in range(config.num_layers)} for config in configs]
    assert all(any(kind == wanted for kind in kinds) for wanted in ({"full"}, {"sliding"}, {"full", "sliding"}))
    assert any(config.num_heads == config.num_kv_heads > 1 for config in configs), "no multi-head attention"
    assert any(config.num_heads > config.num_kv_heads > 1 for config in configs), "no grouped-query attention"
    assert any(config.num_kv_heads % 2 for config in configs if config.num_kv_heads > 1), "no odd number of KV heads"
    assert {2, 8} <= {config.num_experts for config in configs}


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_logits_routing_and_gradients_equal_transformers(seed: int) -> None:
    case = draw(seed)
    reference = reference_model(case.config, seed)
    ours = our_model(reference, case.config)
    their_routing, our_routing = watch_reference(reference), watch_ours(ours)
    tokens, labels, positions = random_batch(case)

    expected = reference(tokens).logits
    mean_loss(expected, labels).backward()
    out = ours(tokens, positions)
    logits = ours.logits(out.hidden_BTD)
    mean_loss(logits, labels).backward()

    assert their_routing.margin > TIE, f"seed {seed} has a near-tie in routing; draw another"
    skipped = torch.stack(their_routing.chosen) == case.config.num_experts
    assert skipped.any() and not skipped.all(1).any(), "the skip class must be chosen by some tokens and not by others"
    assert torch.equal(torch.stack(our_routing.chosen), torch.stack(their_routing.chosen))
    counts = torch.stack([chosen.bincount(minlength=case.config.num_router_classes) for chosen in their_routing.chosen])
    assert torch.equal(out.counts_LC, counts)
    assert relative(logits, expected) < 1e-5
    for name, mine, yours in gradients(reference, ours, case.config):
        assert relative(mine, yours) < 1e-4, name


@pytest.mark.parametrize("seed", range(1, 9))
def test_packed_row_equals_each_document_alone(seed: int) -> None:
    case = draw(seed)
    reference = reference_model(case.config, seed)
    ours = our_model(reference, case.config)
    routing = watch_reference(reference)
    rng = random.Random(seed)
    rows = [[1, 7, 12, 1, 1, 9, 2, 3], [13, 1, 2, 20]]
    for row in rows:
        rng.shuffle(row)
    tokens, labels = torch.randint(case.config.vocab_size, (2, 2, 36), generator=torch.Generator().manual_seed(seed))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])

    logits = ours.logits(ours(tokens, positions).hidden_BTD)
    (mean_loss(logits, labels) * labels.numel()).backward()
    expected = torch.empty_like(logits)
    for index, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            document = slice(start, start + length)
            alone = reference(tokens[index: index + 1, document]).logits
            (mean_loss(alone, labels[index: index + 1, document]) * length).backward()
            expected[index, document] = alone[0].detach()
            start += length

    assert routing.margin > TIE, f"seed {seed} has a near-tie in routing; draw another"
    assert relative(logits, expected) < 1e-5
    for name, mine, yours in gradients(reference, ours, case.config):
        assert relative(mine, yours) < 1e-4, name


class Widths(TorchDispatchMode):
    """Collects the dtypes of all floating tensors that any operation makes, backward too. Scalars (0-dim) promote nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
                self.made.setdefault(leaf.dtype, str(func))
        return result


@pytest.mark.parametrize("seed", [3, 9])
def test_fp64_stays_fp64_and_agrees_with_fp32(seed: int) -> None:
    case = draw(seed)
    reference = reference_model(case.config, seed)
    narrow, wide = our_model(reference, case.config), our_model(reference, case.config, torch.float64)
    tokens, labels, positions = random_batch(case)
    with Widths() as widths:
        out = wide(tokens, positions)
        logits = wide.logits(out.hidden_BTD)
        wide.loss(out.hidden_BTD, labels).backward()
    assert set(widths.made) == {torch.float64}, widths.made
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float64}
    assert {gradient(parameter).dtype for parameter in wide.parameters()} == {torch.float64}
    assert relative(narrow.logits(narrow(tokens, positions).hidden_BTD), logits) < 1e-5


def in_bf16(reference: ZayaForCausalLM, config: ModelConfig, directory: Path) -> tuple[ZayaForCausalLM, Zaya]:
    """transformers' model, loaded in bf16 as its users load it, and ours. The reference's weights are rounded first, so that only the
    arithmetic differs."""
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16())
    reference.save_pretrained(directory)
    theirs = ZayaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager")
    for loaded, layer in zip(theirs.model.layers, reference.model.layers, strict=True):
        # from_pretrained sets the skip class' bias back to -1, whatever the file says (transformers 5.23).
        loaded.mlp.gate.balancing_biases.copy_(layer.mlp.gate.balancing_biases)
    return theirs.eval(), our_model(theirs, config, torch.bfloat16)


@pytest.mark.parametrize("seed", range(6))
def test_bf16_error_is_within_that_of_transformers(seed: int, tmp_path: Path) -> None:
    """Logits, over the tokens that both bf16 models route in every block as the fp32 reference does: another expert is another function,
    and which near-ties flip is chance. No factor is allowed on top."""
    case = replace(draw(seed), batch=16)
    reference = reference_model(case.config, seed)
    theirs, ours = in_bf16(reference, case.config, tmp_path)
    watched = watch_reference(reference), watch_reference(theirs), watch_ours(ours)
    tokens, _, positions = random_batch(case)
    with torch.no_grad():
        expected, their_logits = reference(tokens).logits, theirs(tokens).logits
        our_logits = ours.logits(ours(tokens, positions).hidden_BTD)
    exact, their_choice, our_choice = (torch.stack(routing.chosen).unflatten(1, tokens.shape) for routing in watched)
    alike = ((exact == their_choice) & (exact == our_choice)).all(0)
    assert alike.float().mean() > 0.8, "too few tokens to compare"
    assert relative(our_logits[alike], expected[alike]) <= relative(their_logits[alike], expected[alike])


@pytest.mark.parametrize("seed", range(6))
def test_bf16_gradient_error_is_within_that_of_transformers(seed: int, tmp_path: Path) -> None:
    """Balance biases pin the routing, another class per block, so that no expert flips. Single parameters vary by chance either way;
    the median over all parameters must not be above transformers' own, and the logits of every token are compared."""
    case = draw(seed)
    reference = reference_model(case.config, seed)
    for block, layer in enumerate(reference.model.layers):
        layer.mlp.gate.balancing_biases[(seed + block) % case.config.num_router_classes] = 10.0
    theirs, ours = in_bf16(reference, case.config, tmp_path)
    tokens, labels, positions = random_batch(case)
    expected, their_logits = reference(tokens).logits, theirs(tokens).logits
    our_logits = ours.logits(ours(tokens, positions).hidden_BTD)
    for logits in (expected, their_logits, our_logits):
        mean_loss(logits, labels).backward()
    exact = {name: grad for name, _, grad in gradients(reference, ours, case.config) if grad.any()}
    pairs = [(relative(mine, exact[name]), relative(yours, exact[name])) for name, mine, yours in gradients(theirs, ours, case.config)
             if name in exact]
    our_error, their_error = torch.tensor(pairs).median(0).values
    assert our_error <= their_error
    assert relative(our_logits, expected) <= relative(their_logits, expected)
