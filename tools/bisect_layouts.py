"""Run two training steps under two layouts and name the first place where they part: block, tensor, and forward, gradient or update.

    python -m tools.bisect_layouts recipes/quickstart.toml --b ranks=4,tp=2,ep=4
    python -m tools.bisect_layouts RECIPE --a ranks=2 --b ranks=8,cp=8 --tolerance 1e-9 --train.recompute=full

Layouts: ranks (processes on this machine) and parallel.* keys; --a is one process by default. Everything is computed in fp64 (--dtype
changes it), so that rounding is no explanation. Exit code 0: they agree, 1: they part, 2: bad input, or a layout that fails or takes longer
than --timeout; 130: interrupted.

Every rank notes what passes the model's seams with its place in the batch (rows, tokens, channels); the parts of all ranks make logical
tensors, which are compared in the order of the step: forward through the blocks, backward through them, the parameters' gradients, loss
and gradient norm, optimizer state, the updated parameters on every rank that holds them. Then the same for the next step. Gradients that
KV replicas hold in part are summed, as the step does.
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zaya.cli import Parser, layout_sizes, positive
from zaya.config import Recipe, load_recipe
from zaya.parallel.mesh import close_mesh, open_mesh
from zaya.shard import Layout
from zaya.trainer import Trainer, open_data

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3}
STEPS = 2
REFUSED = "tools.bisect_layouts: "
"""How a rank's one line about bad input begins; torchrun surrounds it with a report."""


class Part(NamedTuple):
    """A rank's part of a logical tensor: values, and where they stand along each dim of the whole."""

    values: NDArray[Any]
    places: tuple[NDArray[np.int64], ...]


Record = dict[tuple[str, str], list[Part]]
"""(direction, name) -> parts, in the order of the step."""


class Difference(NamedTuple):
    direction: str
    name: str
    relative: float
    """RMS of the difference over RMS of the first layout's values."""


def record(trainer: Trainer, begin: Callable[[int], object] = lambda _: None) -> Record:
    """This rank's steps, and everything that passed a seam. The second step sees what the first one's update left on every rank.

    begin(n) is told as step n begins."""
    notes: Record = {}
    suffix = ""
    rows_T: list[NDArray[np.int64]] = []
    mesh, model, table = trainer.mesh, trainer.model, trainer.table
    tokens = trainer.token_index.numpy()
    own = np.array_split(tokens, mesh.tp.size)[mesh.tp.rank]

    def channels(parameter: str, dim: int = 0) -> NDArray[np.int64]:
        offsets, sizes = mesh.layout.piece(table[parameter].placement, table[parameter].shape, mesh.rank)
        return np.arange(offsets[dim], offsets[dim] + sizes[dim])

    def note(name: str, tensor: Tensor, tokens_T: NDArray[np.int64], channels_C: NDArray[np.int64] | None = None) -> None:
        flat = tensor.flatten(2)
        index = (rows_T[-1], tokens_T, np.arange(flat.shape[2]) if channels_C is None else channels_C)

        def keep(direction: str, values: Tensor | None) -> None:
            if values is None:  # nothing reads this output
                return
            notes.setdefault((direction, name), []).append(Part(values.detach().flatten(2).double().cpu().numpy().copy(), index))

        keep("forward" + suffix, tensor)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient, direction="gradient" + suffix: keep(direction, gradient))

    def after(module: torch.nn.Module, name: str, pick: Callable[[Any], Tensor] = lambda output: output) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: note(name, pick(output), own))

    after(model.embedding, "embedding")
    for number, block in enumerate(model.blocks):
        prefix = f"blocks.{number}."
        _watch_attention(block.attention, prefix + "attention.", note, tokens, channels)
        after(block.attention, prefix + "attention")
        after(block.attention_residual, prefix + "attention_residual", lambda output: output[0])
        after(block.attention_residual, prefix + "moe_norm", lambda output: output[1])
        after(block.moe.router.out, prefix + "moe.router.out")
        after(block.moe, prefix + "moe", lambda output: output[0])
        after(block.moe_residual, prefix + "moe_residual", lambda output: output[0])
        after(block.moe_residual, f"blocks.{number + 1}.attention_norm", lambda output: output[1])
    batches: list[tuple[int, int]] = []

    def next_rows(*_: Any) -> None:
        first, rows = batches.pop(0)
        rows_T.append(np.arange(first, first + rows) - trainer.position)

    model.register_forward_pre_hook(next_rows)
    update = trainer.optimizer.update

    def note_gradients(**arguments: Any) -> None:
        for name in table:
            _note_boxes(notes, "parameter gradient" + suffix, name, trainer, "grad")
        update(**arguments)

    trainer.optimizer.update = note_gradients  # type: ignore[method-assign]
    for step in range(STEPS):
        begin(step + 1)
        suffix = f", step {step + 1}" if step else ""
        batches += trainer._micro_batches()
        result = trainer.train_step()
        trainer.optimizer.wait()
        notes["numbers" + suffix, "loss"] = [_number(result.loss)]
        notes["numbers" + suffix, "gradient norm"] = [_number(result.grad_norm)]
        for name in table:
            (offsets, sizes), held = mesh.layout.piece(table[name].placement, table[name].shape, mesh.rank), model.get_parameter(name)
            places = tuple(np.arange(o, o + s) for o, s in zip(offsets, sizes))
            notes["update" + suffix, name] = [Part(held.detach().double().cpu().numpy().copy(), places)]  # on every rank that holds it
            for kind in trainer.optimizer.kinds(name)[1:]:
                _note_boxes(notes, "state" + suffix, f"{kind} of {name}", trainer, kind)
        for name, buffer in model.named_buffers():
            notes["update" + suffix, name] = [Part(buffer.double().cpu().numpy().copy(), (np.arange(len(buffer)),))]
    return notes


def _number(value: Tensor) -> Part:
    return Part(np.array([value.item()]), (np.array([0]),))


def _watch_attention(attention: Any, prefix: str, note: Callable[..., None], tokens_T: NDArray[np.int64],
                     channels: Callable[..., NDArray[np.int64]]) -> None:
    """Projections, what the op cca made of them, and the heads' outputs."""
    project, mix, context = attention.project, attention.mix, attention.context
    of = {letter: channels(f"{prefix}{letter}.weight") for letter in "qkv"}

    def projected(x: Tensor, weights: Any) -> Any:
        parts = project(x, weights)
        for letter, part in zip("qkv", parts):
            note(f"{prefix}{letter}", part, tokens_T, of[letter])
        return parts

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(context, name)

        def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
            for letter, part in (("q", q), ("k", k), ("v", v)):
                note(f"{prefix}cca.{letter}", part, tokens_T, of[letter])
            out: Tensor = context.attend(q, k, v, *rest)
            return out

    def mixed(*inputs: Any) -> Tensor:
        out: Tensor = mix(*inputs)
        note(f"{prefix}heads", out, tokens_T, of["q"])
        return out

    attention.project, attention.context, attention.mix = projected, Watched(), mixed


def _note_boxes(notes: Record, direction: str, name: str, trainer: Trainer, kind: str) -> None:
    parameter = name.rpartition(" ")[2]
    parts = trainer.optimizer.own_parts(parameter, kind)
    notes.setdefault((direction, name), [])
    for (offsets, sizes), values in parts:
        places = tuple(np.arange(o, o + s) for o, s in zip(offsets, sizes))
        notes[direction, name].append(Part(values.double().cpu().numpy().copy(), places))


def differences(a: list[Record], b: list[Record]) -> Iterator[Difference]:
    """What parts, from the first rank's order of the step; a and b: a record per rank."""
    order = list(a[0])
    kinds = ("forward", "gradient", "parameter gradient", "numbers", "state", "update")
    suffixes = list(dict.fromkeys(direction.removeprefix("forward") for direction, _ in order if direction.startswith("forward")))
    for kind, suffix in ((kind, suffix) for suffix in suffixes for kind in kinds):
        for direction, name in (key for key in order if key[0] == kind + suffix):
            ours, theirs = ([part for rank in ranks for part in rank.get((direction, name), [])] for ranks in (a, b))
            x = _whole(ours, add=kind == "gradient")
            size = float(np.sqrt(np.mean(x**2)))
            apart = _apart(x, theirs, add=kind == "gradient")
            yield Difference(direction, name, float(np.sqrt(np.mean(apart**2))) / (size or 1.0))


def _whole(parts: list[Part], add: bool) -> NDArray[Any]:
    """The logical tensor; `add`: where ranks hold a gradient in part, their sum."""
    shape = [max(int(part.places[dim].max()) + 1 for part in parts) for dim in range(parts[0].values.ndim)]
    out = np.zeros(shape)
    for part in parts:
        place = np.ix_(*part.places)
        out[place] = part.values + (out[place] if add else 0)
    return out


def _apart(x: NDArray[Any], parts: list[Part], add: bool) -> NDArray[Any]:
    """By how much the other layout's elements miss x, the worst of all ranks that hold one; inf where nobody does."""
    if add:
        y = _whole(parts, add)
        return np.abs(x - y) if x.shape == y.shape else np.full(x.shape, np.inf)
    apart = np.full(x.shape, -1.0)
    for part in parts:
        place = np.ix_(*part.places)
        apart[place] = np.maximum(apart[place], np.nan_to_num(np.abs(part.values - x[place]), nan=np.inf))
    return np.where(apart < 0, np.inf, apart)


def _layout(text: str) -> tuple[int, list[str]]:
    """(ranks, overrides) of "ranks=4,tp=2". ValueError: not of that form."""
    values = layout_sizes(text)
    ranks = values.pop("ranks", 1)
    return ranks, [f"--parallel.{key}={value}" for key, value in values.items()]


def _run(side: str, recipe: str, ranks: int, overrides: list[str], timeout_s: float) -> list[Record]:
    """What each rank noted. ValueError, with the option `side` that named the layout, where it fails or takes too long; nothing that ends
    this process leaves others behind."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                   "-m", "tools.bisect_layouts", "--worker", folder, recipe, *overrides]
        # The ranks read a pipe that nobody writes to: it ends when this process does, however that ends, and they with it. torchrun, sent a
        # signal while it starts them, may leave some behind. A session of its own, for a terminal's Ctrl-C would be such a signal.
        alive, ours = os.pipe()
        with open(alive) as stdin, open(ours, "w") as until_closed, subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"}) as job:
            try:
                _, stderr = job.communicate(timeout=timeout_s)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
                job.terminate()
                until_closed.close()
                stdout, _ = job.communicate()
                if isinstance(end, KeyboardInterrupt):
                    raise
                begun = [line for line in stdout.splitlines() if line.startswith("step ")]  # libraries print there too
                where = f"in {begun[-1]} of {STEPS}" if begun else "before its first step"
                raise ValueError(f"{side} took longer than --timeout {timeout_s:g}; it was stopped {where}") from None
        if job.returncode:
            said = next((line.removeprefix(REFUSED) for line in stderr.splitlines() if line.startswith(REFUSED)), "")
            raise ValueError(f"{side}: {said}" if said else f"{side} failed:\n{stderr[-2000:]}")
        by_rank = [pickle.loads((Path(folder) / f"rank-{rank}").read_bytes()) for rank in range(ranks)]  # written just now, by ourselves
        return [{key: [Part(*part) for part in parts] for key, parts in notes.items()} for notes in by_rank]


def _worker(folder: str, recipe: Recipe) -> int:
    """A rank, until stdin ends. The first says on stdout which step it is at."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, at once: a handler would wait until a collective returns
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    mesh = open_mesh(recipe.train.device, Layout.of(recipe.parallel, int(os.environ["WORLD_SIZE"])))

    def say(step: int) -> None:
        if mesh.rank == 0:
            print(f"step {step}", flush=True)

    notes = record(Trainer(recipe, mesh, open_data(recipe, mesh)), say)
    plain = {key: [(part.values, part.places) for part in parts] for key, parts in notes.items()}
    (Path(folder) / f"rank-{mesh.rank}").write_bytes(pickle.dumps(plain))
    close_mesh(mesh)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="tools.bisect_layouts", description="Name the first tensor in which a training step under two layouts parts.",
                    epilog="Overrides of the recipe: --section.key=value", allow_abbrev=False)
    parser.add_argument("recipe", help="recipe (.toml)")
    parser.add_argument("--a", default="ranks=1", metavar="LAYOUT", help="the layout to trust (ranks=1)")
    parser.add_argument("--b", default="ranks=2", metavar="LAYOUT", help="the layout in question (ranks=2)")
    parser.add_argument("--dtype", default="fp64", choices=sorted(TOLERANCE), help="fp64 | fp32")
    parser.add_argument("--tolerance", type=positive, help="RMS of a difference over RMS of the tensor (1e-9 in fp64, 1e-3 in fp32)")
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="SECONDS", help="of each of the two jobs (600)")
    parser.add_argument("--all", action="store_true", help="print every tensor, not only the first that parts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args(argv)
    try:
        overrides = [*overrides, *([] if options.worker else [f"--train.dtype={options.dtype}", "--train.kernels=reference"])]
        recipe = load_recipe(options.recipe, overrides)
        if options.worker:
            return _worker(options.worker, recipe)
        if recipe.parallel.engine != "zaya":
            raise ValueError(f'parallel.engine = "{recipe.parallel.engine}" has no layouts to compare; use --parallel.engine=zaya')
        layouts = {side: _layout(text) for side, text in ((f"--a {options.a}", options.a), (f"--b {options.b}", options.b))}
        for ranks, flags in layouts.values():
            load_recipe(options.recipe, [*overrides, *flags]).validate(ranks)
        a, b = (_run(side, options.recipe, ranks, [*overrides, *flags], options.timeout) for side, (ranks, flags) in layouts.items())
    except (ValueError, OSError) as error:
        return parser.refused(error)
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    found = list(differences(a, b))
    for difference in found if options.all else ():
        print(f"{difference.relative:10.1e}  {difference.direction:18}  {difference.name}")
    first = next((d for d in found if not d.relative <= tolerance), None)
    if first is None:
        print(f"{options.a} and {options.b} agree: {len(found)} tensors, at most {max(d.relative for d in found):.1e} apart")
        return 0
    print(f"{options.a} and {options.b} part at {first.name}, {first.direction}: {first.relative:.1e} of its RMS apart")
    return 1


if __name__ == "__main__":
    sys.exit(main())
