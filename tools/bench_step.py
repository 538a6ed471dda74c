"""Train the same small model here and in transformers on the CPU in fp32, alternating; print tokens/s of both and their ratio.

Same weights, rows, learning rate, clipping and decay on both sides; losses are compared step by step, and no speed is printed if they
part. transformers runs at its fastest: the experts and attention implementations that work here are tried first (no further attention for
experts that need more than 5 s a step).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import ZayaConfig, ZayaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zaya.cli import Parser
from zaya.config import Recipe, recipe_from_tables
from zaya.data.loader import Batch
from zaya.model import hf
from zaya.parallel.mesh import open_mesh
from zaya.shard import Layout
from zaya.trainer import Trainer

# Relative: two fp32 programs drift apart by rounding (1e-4 by step 14), a wrong one parts at once.
LOSS_TOLERANCE, SURE_STEPS = 2e-3, 12
# Later by more: rounding decides where two experts all but tie for a token, and from there on weights differ (2.4e-3 at step 26).
LATER_TOLERANCE = 2e-2
SIZES = dict(vocab_size=4096, hidden_size=256, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=32, num_experts=8,
             moe_intermediate_size=256, router_hidden_size=64)


class Rows(NamedTuple):
    """Stands for a loader: the same random rows every step, one document each, which transformers can run too."""

    tokens: torch.Tensor

    def batch(self, first_row: int, num_rows: int) -> Batch:
        rows = self.tokens[torch.arange(first_row, first_row + num_rows) % len(self.tokens)]
        positions = torch.arange(rows.shape[1] - 1).expand(num_rows, -1)
        return Batch(rows[:, :-1], rows[:, 1:], positions, torch.zeros_like(positions))


def make_recipe(batch_size: int, seq_len: int) -> Recipe:
    return recipe_from_tables({
        "model": SIZES, "data": {"train": ["unused"]}, "run": {"dir": "unused"},
        "train": dict(steps=10**6, global_batch_size=batch_size, micro_batch_size=batch_size, seq_len=seq_len, seed=0),
        # The balance bias stands still: transformers has no rule for it.
        "optim": dict(name="adamw", lr=1e-3, min_lr=1e-3, warmup_steps=0, balance_lr=0.0)})


def transformers_step(trainer: Trainer, experts: str, attention: str) -> Callable[[], float]:
    """One optimizer step in transformers from the trainer's present weights; returns its loss."""
    recipe, optim = trainer.recipe, trainer.recipe.optim
    rows = trainer.loader.batch(0, recipe.train.global_batch_size)
    config = ZayaConfig(**hf.to_hf_config(recipe.model, hf.rest_of_new_model(None, recipe.train.seq_len)))
    config._attn_implementation, config._experts_implementation = attention, experts
    model = ZayaForCausalLM(config)
    ours = trainer.model.state_dict()
    theirs: dict[str, torch.Tensor] = {}
    for link in hf.links(recipe.model):
        joined = link.to_theirs([ours[named.name] for named in link.ours])
        theirs |= {named.name: tensor for named, tensor in zip(link.theirs, joined)}
    model.load_state_dict(theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"]})
    decayed = {tensor.name for link in hf.links(recipe.model) for tensor in link.theirs
               if all(named.name in trainer.table and trainer.table[named.name].decay for named in link.ours)}
    groups = [{"params": [p for n, p in model.named_parameters() if (n in decayed) == decay], "weight_decay": optim.weight_decay * decay}
              for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    tokens, labels = rows.tokens_BT.contiguous(), rows.labels_BT.flatten()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(tokens, use_cache=False).logits.flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        return loss.item()

    return step


def seconds(step: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    loss = step()
    return time.perf_counter() - started, loss


def fastest_peer(trainer: Trainer, limit_s: float) -> tuple[str, Callable[[], float], dict[str, Any]]:
    """The quickest working pair of implementations, freshly built, and what every pair did: ms, or why it does not run here."""
    tried: dict[str, Any] = {}
    for experts in ("eager", *ALL_EXPERTS_FUNCTIONS.keys()):
        for attention in ("eager", *ALL_ATTENTION_FUNCTIONS.keys()):
            name = f"{experts} + {attention}"
            if any(key.startswith(f"{experts} + ") and (isinstance(ms, float) and ms > 1e3 * limit_s) for key, ms in tried.items()):
                tried[name] = "not tried: these experts were too slow already"
                continue
            try:
                step = transformers_step(trainer, experts, attention)
                tried[name] = 1e3 * seconds(step)[0]
                if tried[name] <= 1e3 * limit_s:
                    tried[name] = 1e3 * min(seconds(step)[0] for _ in range(3))
            except Exception as error:  # noqa: BLE001  # an implementation may fail in any way where its library or GPU is missing
                tried[name] = f"does not run here: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"
    times = {name: ms for name, ms in tried.items() if isinstance(ms, float)}
    best = min(times, key=lambda name: times[name])
    return best, transformers_step(trainer, *best.split(" + ")), tried


def bench(steps: int, batch_size: int, seq_len: int) -> dict[str, Any]:
    recipe = make_recipe(batch_size, seq_len)
    torch.manual_seed(0)
    rows = Rows(torch.randint(0, SIZES["vocab_size"], (batch_size, seq_len + 1)))
    trainer = Trainer(recipe, open_mesh("cpu", Layout(1)), rows)  # type: ignore[arg-type]  # the one method of a loader that a step calls
    name, peer, tried = fastest_peer(trainer, limit_s=5.0)
    times: dict[str, list[float]] = {"zaya": [], "transformers": []}
    for index in tqdm(range(steps + 2), unit="pair", disable=None):
        losses = {}
        for side, step in (("zaya", lambda: trainer.train_step().loss.item()), ("transformers", peer)):
            elapsed, losses[side] = seconds(step)
            if index >= 2:  # two pairs of warm-up
                times[side].append(elapsed)
        tolerance = LOSS_TOLERANCE if index < SURE_STEPS else LATER_TOLERANCE
        if not abs(losses["zaya"] - losses["transformers"]) <= tolerance * losses["transformers"]:  # a NaN parts too
            raise SystemExit(f"tools.bench_step: losses part at step {index + 1}: {losses}; no speed is reported")
    tokens = batch_size * seq_len
    ratios = [theirs / ours for ours, theirs in zip(times["zaya"], times["transformers"])]
    return {"peer": name, "tried_ms": tried, "steps": steps, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "tokens_per_second": {side: tokens / statistics.median(t) for side, t in times.items()},
            "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "last_losses": losses}


def main() -> int:
    parser = Parser(prog="tools.bench_step", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="counted pairs of steps (at least 10)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error(f"--steps {arguments.steps}: a median of fewer than 10 says little")
    result = bench(arguments.steps, batch_size=4, seq_len=256)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, ms in result["tried_ms"].items():
        print(f"  transformers, {name:<28} {f'{ms:8.1f} ms' if isinstance(ms, float) else ms}")
    speed = result["tokens_per_second"]
    print(f"zaya {speed['zaya']:,.0f} tok/s | transformers ({result['peer']}) {speed['transformers']:,.0f} tok/s | ratio "
          f"{result['ratio_median']:.2f} (pairs {result['ratio_min']:.2f} to {result['ratio_max']:.2f}), {result['steps']} steps, "
          f"{result['threads']} threads, losses {result['last_losses']['zaya']:.6f} and {result['last_losses']['transformers']:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
