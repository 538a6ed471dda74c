"""Write the global batch of one optimizer step of a recipe: what a run trains on, without a run.

    python -m tools.dump_batch recipes/quickstart.toml --step 1 --out batch.npz [--section.key=value ...]

F.npz holds tokens, labels, positions, documents (int64) and loss_mask (bool: this token has a label), each [rows, seq_len].
Step N, counted from 1, takes the rows of the run's order that follow those of the steps before: train.global_batch_size, or what
train.batch_ramp makes of it. Of a run that went on with other batches than it began with, the record (metrics.jsonl: tokens) says which.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from zaya.cli import Parser
from zaya.config import Recipe, load_recipe
from zaya.data.loader import IGNORE, build_corpora, open_loader
from zaya.schedule import batch_size, position_of


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tools.dump_batch", description="Write the global batch of one optimizer step as an .npz file.",
                     epilog="Overrides of the recipe: --section.key=value", allow_abbrev=False)
    parser.add_argument("recipe", help="recipe (.toml)")
    parser.add_argument("--step", required=True, type=int, metavar="N", help="optimizer step, counted from 1")
    parser.add_argument("--out", required=True, type=Path, metavar="F.npz", help="file to write (replaced if it exists)")
    try:
        args, overrides = parser.parse_known_args(argv)
        if args.step < 1:
            raise ValueError(f"--step = {args.step} must be at least 1: steps are counted from 1")
        if args.step >= 2**31:
            raise ValueError(f"--step = {args.step} is beyond any run; keep it below 2^31")
        parser.check_output("--out", args.out)
        recipe = load_recipe(args.recipe, overrides)
        if args.step > recipe.train.steps:
            raise ValueError(f"--step = {args.step} is beyond the run's last, train.steps = {recipe.train.steps}; raise that to see it")
        arrays = _arrays(recipe, args.step)
        _write(args.out, arrays)
    except (ValueError, OSError) as error:
        return parser.refused(error)
    print(f"wrote the {len(arrays['tokens'])} rows of step {args.step} to {args.out}")
    return 0


def _arrays(recipe: Recipe, step: int) -> dict[str, np.ndarray]:
    for section in (recipe.model, recipe.data, recipe.train):  # not the layout: batches do not depend on it
        section.validate()
    build_corpora(recipe)
    loader = open_loader(recipe)
    first = position_of(step, recipe.train)
    batch = loader.batch(first, batch_size(first, recipe.train))
    return {"tokens": batch.tokens_BT.numpy(), "labels": batch.labels_BT.numpy(), "positions": batch.positions_BT.numpy(),
            "documents": batch.documents_BT.numpy(), "loss_mask": batch.labels_BT.numpy() != IGNORE}


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for its own keyword
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name a file in a directory that can be written") from None
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
