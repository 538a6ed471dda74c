"""Say whether a finished quickstart did what it promises: learnt more than token pairs, kept its experts busy, left usable files.

    python -m tools.quickstart_report runs/quickstart --bigram runs/quickstart/bigram.json

Prints one line per promise with its figures; exit 0 if all hold, 1 if one does not, 2 on bad input.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from zaya.cli import Parser
from zaya.metrics import entropy, read_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MIN_ENTROPY = 0.9  # of H(p) / ln E in every block, as the mean over the last fifth of the steps


def block_entropies(rows: list[dict]) -> list[float]:
    """H(p) / ln E of each block, the mean over the last fifth of the rows; nan where one of them holds a null."""
    last = rows[-max(len(rows) // 5, 1):]
    blocks = zip(*(row["expert_load"] for row in last))
    return [sum(math.nan if None in load else entropy(load) for load in block) / len(last) for block in blocks]


def _number(value: float | None) -> float:
    """null is what the record holds for a number that was not finite; no promise holds of one."""
    return math.nan if value is None else value


def loads_in_transformers(folder: Path) -> str:
    """What from_pretrained complains of; empty where it loads every key."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the files, each library under it has its own error
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    complaints = {kind: sorted(map(str, loaded[1][kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return ", ".join(f"{kind}: {names[:3]}" for kind, names in complaints.items() if names)


def report(run: Path, bigram: Path) -> bool:
    """Print a line per promise; True if all hold. ValueError: the run or the bigram's figure cannot be read."""
    try:
        bigram_loss = float(json.loads(bigram.read_text())["loss"])
    except OSError as error:
        raise ValueError(f"cannot read {bigram}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{bigram} is not the output of tools.bigram_baseline --json") from None
    rows, evals = read_rows(run / "metrics.jsonl")
    if not rows or not evals:
        raise ValueError(f"{run} has {len(rows)} training and {len(evals)} evaluation rows; finish the run first")
    entropies = block_entropies(rows)
    complaint = loads_in_transformers(run / "hf") if (run / "hf" / "config.json").exists() else "no export"
    first_loss, last_loss, eval_loss = (_number(value) for value in (rows[0]["loss"], rows[-1]["loss"], evals[-1]["eval_loss"]))
    seconds = sum(_number(row["step_time_s"]) for row in rows)
    promises = [
        (last_loss < first_loss, f"loss fell from {first_loss:.3f} to {last_loss:.3f} in {rows[-1]['step']} steps "
                                 f"({_number(rows[-1]['tokens']):,.0f} tokens, {seconds:.0f} s)"),
        (eval_loss < bigram_loss, f"held-out loss {eval_loss:.4f} against {bigram_loss:.4f} of a bigram model"),
        (all(e > MIN_ENTROPY for e in entropies),
         f"router entropy per block {', '.join(f'{e:.3f}' for e in entropies)} (above {MIN_ENTROPY})"),
        ((run / "plots" / "run.png").exists(), f"plot: {run / 'plots' / 'run.png'}"),
        (not complaint, f"transformers loads {run / 'hf'}" + (f": {complaint}" if complaint else "")),
    ]
    for kept, line in promises:
        print(f"[{'ok' if kept else 'NOT KEPT'}] {line}")
    return all(kept for kept, _ in promises)


def main() -> int:
    parser = Parser(prog="tools.quickstart_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--bigram", type=Path, required=True, help="output of tools.bigram_baseline --json")
    options = parser.parse_args()
    try:
        return 0 if report(options.run, options.bigram) else 1
    except KeyError as error:
        print(f"tools.quickstart_report: {options.run}: a row of metrics.jsonl lacks {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        return parser.refused(error)


if __name__ == "__main__":
    sys.exit(main())
