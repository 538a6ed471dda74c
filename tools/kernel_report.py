"""Compile every shipped kernel configuration for the MI300X, without one, and print what its machine code uses; exit 1 where a gate fails.

Each chip case runs forward and backward on "meta" tensors, which compute nothing, so an op that waited for the device would fail here; so
does a training step of every bf16 recipe, whole and with what a rank of a layout holds; and, for entries of the table that none of these
uses (fp32, odd widths), the small cases that do. Equal launches are compiled once, in as many processes as there are CPUs.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# The interpreter's stand-in for a kernel cannot be compiled. Triton reads this once, as it is imported.
os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from tqdm import tqdm

from zaya.cli import Parser
from zaya.config import Recipe, load_recipe
from zaya.kernels import backend, cases, machine_code
from zaya.kernels.backend import ops
from zaya.kernels.gradient_sum import ExpertSums, GradientSum
from zaya.kernels.launch import MI300X, Target
from zaya.model.moe import Experts
from zaya.model.transformer import Zaya
from zaya.optim import RouterBalance
from zaya.plan import Muon, plan
from zaya.shard import Layout

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
BLOCKS = 4  # of a recipe's model: both kinds of attention, a first router and later ones
LAYOUTS = (Layout(1), Layout(8, tp=2, ep=8))  # what a rank holds under them, where the model divides so


@dataclass
class Launch:
    """A distinct launch, and the cases and training steps that make it."""

    build: machine_code.Build
    config: dict[str, int]
    cases: list[str] = field(default_factory=list)

    @property
    def entry(self) -> tuple[str, str]:
        """Equal for launches by one entry of the table."""
        return self.build.kernel, str(self.config)


Runs = list[tuple[str, Callable[[], object]]]  # by name: what makes launches


def of_cases(chosen: Iterable[cases.Case], dtype: torch.dtype = torch.bfloat16, note: str = "") -> Runs:
    """Forward and backward of each; note: added to its name."""

    def run(case: cases.Case) -> None:
        cases.run(case.op, case.make(torch.device("meta"), dtype), case.gradients)

    return [(case.name + note, functools.partial(run, case)) for case in chosen]


def of_small_cases() -> Runs:
    """In bf16 and in fp32."""
    small = cases.cases(cases.SMALL)
    return [run for dtype, note in ((torch.bfloat16, ""), (torch.float32, " fp32"))
            for run in of_cases([case for case in small if dtype in case.dtypes], dtype, note)]


def of_training() -> Runs:
    """A step of every bf16 recipe with what a rank holds under each of LAYOUTS."""
    runs: Runs = []
    for path in sorted(RECIPES.glob("*.toml")):
        recipe = load_recipe(path)
        for layout in LAYOUTS:
            if recipe.train.dtype == "bf16" and recipe.model.num_kv_heads % layout.tp == recipe.model.num_experts % layout.ep == 0:
                name = f"training {path.stem}" + (f" tp={layout.tp} ep={layout.ep}" if layout.world_size > 1 else "")
                runs.append((name, functools.partial(training_step, recipe, layout)))
    return runs


def training_step(recipe: Recipe, layout: Layout) -> None:
    """Forward and backward of two micro-batches through the first blocks, and the optimizers' rules, on "meta": with a rank's heads, words
    and experts, and as many rows received as sent."""
    model = replace(recipe.model, num_layers=BLOCKS)
    share = replace(model, num_heads=model.num_heads // layout.tp, num_kv_heads=model.num_kv_heads // layout.tp,
                    vocab_size=model.vocab_size // layout.tp)
    backend.choose("triton", torch.device("cuda"), torch.bfloat16, model.head_dim, model.hidden_size, model.num_router_classes)
    with torch.device("meta"):
        module = Zaya(share, torch.bfloat16, recipe.train.recompute)
        module.embedding.gradient_sum = sum_for(module.embedding.weight)
        for block in module.blocks:
            experts = block.moe.experts
            experts.gate_up, experts.down = (torch.nn.Parameter(w.detach()[: model.num_experts // layout.ep].clone())
                                             for w in (experts.gate_up, experts.down))
            experts.gradient_sums = ExpertSums(sum_for(experts.gate_up), sum_for(experts.down))
            if layout.ep > 1:
                block.moe.dispatcher = Received()
        tokens = torch.zeros(recipe.train.micro_batch_size, recipe.train.seq_len, dtype=torch.int64)
        for _ in range(2):
            output = module(tokens, tokens)
            module.loss(output.hidden_BTD, tokens).backward()
        commit, step = torch.tensor(True), torch.zeros(())
        RouterBalance([block.moe.router.balance_bias for block in module.blocks], model.num_experts, 1e-3).update(output.counts_LC, commit)
        shard, rounded = torch.empty(4, 1 << 20).unbind(), torch.empty(1 << 20, dtype=torch.bfloat16)
        ops().adamw_(*shard, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=step, step=step, commit=commit,
                     out=rounded)
        for row in plan(model).values():
            if isinstance(row.optimizer, Muon):  # whole, whatever the layout
                height = row.shape[-2] // row.optimizer.blocks
                ops().newton_schulz(torch.empty(row.numel // (height * row.shape[-1]), height, row.shape[-1], dtype=torch.bfloat16))


def sum_for(weight: Tensor) -> GradientSum:
    return GradientSum(torch.empty_like(weight, dtype=torch.float32))


class Received:
    """A rank of expert parallelism without the others: what it has sent comes back as if received (zaya/parallel/expert.py)."""

    def compute(self, experts: Experts, x_TD: Tensor, choice_Tk: Tensor, gate_Tk: Tensor, num_classes: int) -> Tensor:
        ops().sort_by_expert(choice_Tk, num_classes)
        order_R, sizes_E = ops().sort_by_expert(torch.empty_like(choice_Tk), len(experts.gate_up))
        return experts(x_TD, sizes_E, order_R, gate_Tk)


def launches(runs: Runs, chip: Target = MI300X) -> list[Launch]:
    """The distinct launches of all runs. chip: one of fewer compute units."""
    found: dict[str, Launch] = {}
    for name, run in runs:
        try:
            with machine_code.recording(chip) as noted:
                run()
        except Exception as error:
            error.add_note(f"in {name}")
            raise
        for build, config in noted:
            entry = found.setdefault(build.key, Launch(build, {**config.blocks, **config.options(chip)}))
            if name not in entry.cases:
                entry.cases.append(name)
    return list(found.values())


def report(found: list[Launch]) -> list[dict[str, Any]]:
    """The figures of every launch, in their order."""
    every = tqdm(machine_code.all_figures([launch.build for launch in found]), total=len(found), unit="kernel", disable=None)
    return [{"kernel": launch.build.kernel, "config": launch.config, "arch": MI300X.arch, **row, "cases": launch.cases}
            for launch, row in zip(found, every, strict=True)]  # strict: to the generator's end


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; launches of one kernel whose figures agree share a line."""
    lines = ["| kernel | tile | warps | VGPRs | LDS | waves | MFMA | share | waiting | bound | 16-byte loads | launches |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    merged: dict[str, int] = {}
    for row in rows:
        blocks = "x".join(str(value) for key, value in row["config"].items() if key.isupper())
        loads = f"{row['wide_loads']} of {row['wide_loads'] + row['narrow_loads']}"
        used = f"{row['mfma_share']:.2f} | {row['waiting']:.0%} | {row['mfma_bound']:.2f}" if row["is_matrix_kernel"] else "- | - | -"
        line = (f"| {row['kernel']} | {blocks} | {row['config']['num_warps']} | {row['vgprs']} | {row['lds_bytes']:,} | "
                f"{row['waves_per_simd']} | {row['hot_mfma'] or '-'} | {used} | {loads}, {row['wide_share']:.0%} of bytes |")
        merged[line] = merged.get(line, 0) + 1
    return "\n".join([*lines, *(f"{line} {times} |" for line, times in merged.items())])


def main() -> int:
    parser = Parser(prog="tools.kernel_report", description=__doc__)
    parser.add_argument("--arch", choices=[MI300X.arch], default=MI300X.arch, help="chip to compile for")
    parser.add_argument("--op", nargs=1, help="only what has a name that starts so: attention, experts, ..., training")
    parser.add_argument("--json", action="store_true", help="print every figure as a JSON list instead of a table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Triton's backend announces a default that it will change, once per kernel
    runs, small = of_cases(cases.cases(cases.CHIP)) + of_training(), of_small_cases()
    names = set(parser.starting_so("--op", arguments.op, [name for name, _ in runs + small], "nothing"))
    found = launches([(name, run) for name, run in runs if name in names])
    known = {launch.entry for launch in found}
    found += [launch for launch in launches([(name, run) for name, run in small if name in names]) if launch.entry not in known]
    rows = report(found)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        training = [row for row in rows if row["cases"][0].startswith("training")]
        other = [row for row in rows if " small" in row["cases"][0]]
        for title, part in (("Cases", [row for row in rows if row not in training + other]), ("Training steps, beside the cases", training),
                            ("Small cases, by entries that none of these uses", other)):
            if part:
                print(f"{title}: {len(part)} launches\n\n{table(part)}\n")
    broken = [f"{row['kernel']} {row['config']} ({row['cases'][0]}): {'; '.join(row['broken'])}" for row in rows if row["broken"]]
    for line in broken:
        print("GATE", line, file=sys.stderr)
    print(f"{len(rows)} launches, {len(broken)} with a failed gate", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
