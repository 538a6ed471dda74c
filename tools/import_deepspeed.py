"""DeepSpeed's universal checkpoint in, checkpoint out: a run of the recipe resumes from it, and every tool reads it. docs/deepspeed.md

Off the batch's path; the way there is tools.export_deepspeed. Streams: one tensor is in memory at a time. The recipe says what model the
parameters are and in which dtype it runs. Nothing in DeepSpeed's pickles is run (zaya/checkpoint/universal.py).

    python -m tools.import_deepspeed DIR CHECKPOINT --recipe RECIPE.toml
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zaya.checkpoint.universal import CLIENT_KEY, STATES, Universal
from zaya.checkpoint.write import CheckpointWriter
from zaya.cli import Parser
from zaya.config import Recipe, load_recipe
from zaya.model.transformer import Zaya
from zaya.optim import RouterBalance
from zaya.plan import ParameterPlan, plan
from zaya.schedule import position_of

COUNTERS = ("position", "tokens")
CLIENT = f"client_state[{CLIENT_KEY!r}]"
ANEW = "pass it to every save_checkpoint as docs/deepspeed.md says"


def read_recipe(path: Path) -> Recipe:
    """ValueError: it cannot be read, or no state of DeepSpeed fits it."""
    recipe = load_recipe(path)
    recipe.model.validate()
    if recipe.optim.name != "adamw":
        raise ValueError(f'{path}: optim.name = "{recipe.optim.name}", but a universal checkpoint holds the state of AdamW; use '
                         'optim.name = "adamw"')
    if recipe.train.dtype == "fp64":
        raise ValueError(f'{path}: train.dtype = "fp64", but DeepSpeed keeps its state in fp32; use "fp32" or "bf16"')
    return recipe


def small_state(recipe: Recipe) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what a run of the recipe keeps beside parameters: buffers and the router's balance. No values."""
    with torch.device("meta"):
        model = Zaya(recipe.model, torch.float32)
        biases = [block.moe.router.balance_bias for block in model.blocks]
        balance = RouterBalance(biases, recipe.model.num_experts, recipe.optim.balance_lr)
    return {f"model.{name}": buffer for name, buffer in model.named_buffers()} | balance.tensors()


def client_state(source: Universal) -> Mapping[str, Any]:
    """What tools.export_deepspeed or a script passed along; {} where there is none. ValueError: it is of another step."""
    state = source.model_states.get(CLIENT_KEY, {})
    if not isinstance(state, Mapping):
        raise ValueError(f"{source.path}: {CLIENT} is {type(state).__name__}, not a dict; {ANEW}")
    step = state.get("step", source.step)
    if type(step) is not int or step != source.step:
        raise ValueError(f"{source.path}: {CLIENT} is of step {str(step)[:40]}, the checkpoint of step {source.step}; {ANEW}")
    return state


def read_small_state(source: Universal, client: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers as the module had them, the rest from client_state. ValueError: missing, misshapen, or the two disagree."""
    passed = client.get("tensors", {})
    if not isinstance(passed, Mapping):
        raise ValueError(f"{source.path}: {CLIENT}['tensors'] is {type(passed).__name__}, not a dict; {ANEW}")
    buffers = {f"model.{name}": tensor for name, tensor in source.buffers.items()}
    for name in [*buffers, *passed]:
        if name not in wanted:
            raise ValueError(f"{source.path} has the unexpected tensor {name}, which the recipe does not ask for")
    found = {}
    for name, like in wanted.items():
        tensor = buffers.get(name, passed.get(name))
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{source.path} has no {name} in {CLIENT}['tensors']; {ANEW}")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{source.path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, the recipe asks for {like.dtype} of "
                             f"{list(like.shape)}")
        if isinstance(passed.get(name), Tensor) and not torch.equal(passed[name], tensor):
            raise ValueError(f"{source.path}: {name} is one tensor in the module and another in {CLIENT}['tensors']; {ANEW}")
        found[name] = tensor
    return found


def counters(source: Universal, client: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The run's; where nobody passed them along, the rows that the recipe's batch makes of DeepSpeed's steps."""
    position = position_of(source.step + 1, recipe.train)
    found: dict[str, Any] = {"position": position, "tokens": position * recipe.train.seq_len, "tokens_by_corpus": {}, "hf_config": {}}
    found.update({key: client[key] for key in found if key in client})
    for key in COUNTERS:
        if type(found[key]) is not int:
            raise ValueError(f"{source.path}: {CLIENT}[{key!r}] = {str(found[key])[:40]} is not an integer; {ANEW}")
    for key in sorted(found.keys() - set(COUNTERS)):
        try:
            plain = isinstance(found[key], dict) and bool(json.dumps(found[key]))
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise ValueError(f"{source.path}: {CLIENT}[{key!r}] is not a dict of plain values; {ANEW}")
    return {"step": source.step, **found}


def write_state(source: Universal, table: Mapping[str, ParameterPlan], dtype: str, writer: CheckpointWriter) -> None:
    """Wide tensors, then what is rounded from the masters: a file has room for neighbours of one width."""
    bf16 = dtype == "bf16"
    kinds = {"fp32": "optim.master" if bf16 else "model", "exp_avg": "optim.exp_avg", "exp_avg_sq": "optim.exp_avg_sq"}
    total = sum(row.numel for row in table.values()) * (len(STATES) * 4 + 2 * bf16)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc="import") as bar:
        for name, row in table.items():
            for state in STATES:
                tensor = source.read(name, state, row.shape)
                writer.add(f"{kinds[state]}.{name}", tensor)
                bar.update(tensor.nbytes)
        for name, row in table.items() if bf16 else ():
            tensor = source.read(name, "fp32", row.shape).bfloat16()
            writer.add(f"model.{name}", tensor)
            bar.update(tensor.nbytes)


def import_deepspeed(path: Path, target: Path, recipe_path: Path) -> None:
    """ValueError, with nothing left at `target`, for a directory that does not hold the state of a run of the recipe."""
    recipe = read_recipe(recipe_path)
    source = Universal(path)
    table = plan(recipe.model)
    source.check({name: row.shape for name, row in table.items()})
    client = client_state(source)
    small = read_small_state(source, client, small_state(recipe))
    steps = source.optimizer_steps(list(table))
    if steps > source.step:
        raise ValueError(f"{source.path}: AdamW's counter is {steps}, but the checkpoint is of step {source.step}")
    with CheckpointWriter(target, recipe=dataclasses.asdict(recipe), **counters(source, client, recipe)) as writer:
        for name, tensor in {**small, "optim.step": torch.tensor(float(steps))}.items():
            writer.add(name, tensor)
        write_state(source, table, recipe.train.dtype, writer)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.import_deepspeed", description="Turn a universal checkpoint of DeepSpeed into a checkpoint.")
    parser.add_argument("directory", type=Path, help="universal checkpoint, or the directory with latest_universal; only read")
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML recipe of the run that goes on from it")
    options = parser.parse_args(argv)
    try:
        import_deepspeed(options.directory, options.checkpoint, options.recipe)
    except (ValueError, OSError) as error:  # OSError: a name that no file can have; the rest says so itself
        return parser.refused(error, "read", options.directory)
    print(options.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
