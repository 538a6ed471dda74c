"""What a recipe costs on so many GPUs, before anyone has them: memory and traffic of a rank.

    python -m tools.plan_layout recipes/zaya1_8b_pretrain1.toml --ranks 1024 --parallel.ep=8
    python -m tools.plan_layout RECIPE --ranks 128 --gpu-gb 192 --json

Computed from the plan and the partition that a run uses (zaya/parallel/account.py, compared with real runs by tests); routing is taken to
be level. Activations are what the blocks keep, with the rows that other ranks send to the experts; a block's temporaries, the loss'
blocks and the allocator's slack come on top. Exit code 0: it fits, 1: it does not, 2: bad input.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from zaya.cli import Parser, format_bytes, positive
from zaya.config import Recipe, load_recipe
from zaya.parallel.account import BYTES, activation_bytes, held_bytes, model_traffic, zero1_traffic
from zaya.parallel.partition import make_buckets, muon_rounds
from zaya.plan import plan
from zaya.shard import Layout


def account(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """The numbers of one rank, whose part is as large as any: cp's second, which has neighbours on both sides."""
    if recipe.parallel.engine != "zaya":
        raise ValueError(f'parallel.engine = "{recipe.parallel.engine}" keeps its own accounts; use --parallel.engine=zaya')
    layout, table, train = Layout.of(recipe.parallel, ranks), plan(recipe.model), recipe.train
    rows = recipe.micro_batch_rows(layout.dp)
    rank = layout.tp if layout.cp > 1 else 0
    memory = held_bytes(table, recipe, layout)
    tokens = rows * train.seq_len // (layout.cp * layout.tp)
    received = tokens if layout.ep > 1 else None
    memory["activations"] = recipe.model.num_layers * activation_bytes(recipe.model, tokens, train.recompute, train.dtype, received)
    buckets = make_buckets(table.values(), layout, muon=recipe.optim.name == "muon")
    rounds = muon_rounds(buckets, layout, rank)
    param_bytes = BYTES[train.dtype]
    reduce_bytes = BYTES["bf16"] if recipe.parallel.grad_dtype == "bf16" else max(param_bytes, BYTES["fp32"])
    step = zero1_traffic(buckets, rounds, layout, rank, param_bytes, reduce_bytes)
    passes = recipe.micro_batches(layout.dp)
    for key, sent in model_traffic(recipe.model, layout, rank, rows, train.seq_len, train.recompute, train.dtype).items():
        step[key] += sent * passes
    return {"layout": layout.as_dict(), "ranks": ranks, "micro_batches": passes, "rows": rows, "memory_bytes": memory,
            "sent_bytes_per_step": {f"{operation} over {group}": n for (operation, group), n in sorted(step.items()) if n},
            "buckets": len(buckets), "muon_rounds": len(rounds)}


def text(numbers: dict[str, Any], gpu_bytes: float) -> str:
    memory, sent = numbers["memory_bytes"], numbers["sent_bytes_per_step"]
    total = sum(memory.values())
    lines = [f"{numbers['ranks']} ranks: " + ", ".join(f"{axis} {ranks}" for axis, ranks in numbers["layout"].items())
             + f"; {numbers['micro_batches']} micro-batches of {numbers['rows']} rows a rank", "", "memory of a rank"]
    lines += [f"  {what:20} {format_bytes(n):>10}" for what, n in memory.items()]
    lines += [f"  {'in all':20} {format_bytes(total):>10}   {'fits' if total < gpu_bytes else 'does NOT fit'} {gpu_bytes / 1e9:g} GB", "",
              "sent by a rank per step"]
    lines += [f"  {what:36} {format_bytes(n):>10}" for what, n in sent.items()]
    lines.append(f"  {'in all':36} {format_bytes(sum(sent.values())):>10}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tools.plan_layout", description="Memory and traffic of a recipe on so many GPUs.",
                    epilog="Overrides of the recipe: --section.key=value", allow_abbrev=False)
    parser.add_argument("recipe", help="recipe (.toml)")
    parser.add_argument("--ranks", required=True, type=int, metavar="N", help="GPUs of the job")
    parser.add_argument("--gpu-gb", type=positive, default=192.0, metavar="GB", help="memory of one GPU (192: MI300X)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    try:
        options, overrides = parser.parse_known_args(argv)
        if not 1 <= options.ranks <= 1 << 17:
            raise ValueError(f"--ranks = {options.ranks} is outside 1 to {1 << 17}")
        recipe = load_recipe(options.recipe, overrides)
        recipe.validate(options.ranks)
        numbers = account(recipe, options.ranks)
    except ValueError as error:
        return parser.refused(error)
    print(json.dumps(numbers, indent=1) if options.json else text(numbers, options.gpu_gb * 1e9))
    return 0 if sum(numbers["memory_bytes"].values()) < options.gpu_gb * 1e9 else 1


if __name__ == "__main__":
    sys.exit(main())
