"""Do two checkpoints hold the same? Names, dtypes, shapes, and every element, whatever layouts wrote them.

    python -m tools.compare_checkpoints A B                                    # bitwise
    python -m tools.compare_checkpoints A B --tolerance 1e-6 --only 'model.*'

Off the batch's path; knows no model, reads only. The hash of every box that it looks at is checked. A tensor whose boxes and hashes are
the same in both is equal; others are compared in pieces, so that memory is bounded whatever their size (PIECE_ELEMENTS a thread). Bitwise
means: a NaN equals a NaN of the same bits, 0 is not -0. Exit code 0: equal (or within the tolerance), 1: different, 2: one cannot be used.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from zaya.checkpoint.manifest import TensorEntry, num_bytes
from zaya.checkpoint.read import Checkpoint
from zaya.cli import Parser, worker_count
from zaya.dtypes import BITS
from zaya.shard import Box

EQUAL, DIFFERENT, UNUSABLE = 0, 1, 2
PIECE_ELEMENTS = 1 << 18
"""A piece of A and of B, and a few of its size in fp64 to compare them: about 10 MB a thread, most of it in the cache."""
MAPPED_PIECES = 32  # of each checkpoint, before their pages are given back


@dataclass(frozen=True)
class Difference:
    """How a tensor of B differs from A's, over all elements; NaN against a number, and what overflows, is infinite."""

    name: str
    elements: int
    """Those that are not bitwise equal."""
    largest: float
    """max |a - b|"""
    relative: float
    """RMS(a - b) / RMS(a)"""


class Norm:
    """A root of a sum of squares that neither over- nor underflows on the way."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, values: torch.Tensor) -> None:
        """fp64, without NaN."""
        largest = torch.linalg.vector_norm(values, math.inf).item()
        if largest == math.inf:
            self.value = math.inf
        elif 1e-100 < largest < 1e100:
            self.value = math.hypot(self.value, torch.linalg.vector_norm(values).item())
        elif largest:
            scale = 2.0 ** max(math.frexp(largest)[1] - 1, -1000)  # a power of two rounds nothing
            self.value = math.hypot(self.value, scale * torch.linalg.vector_norm(values / scale).item())


def pieces(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Boxes of at most `most` elements that tile a shape, in row-major order: whole rows of the first dim that allows them."""
    inner = math.prod(shape[1:])
    if not shape or inner * shape[0] <= most:
        yield (0,) * len(shape), tuple(shape)
    elif inner <= most:
        rows = most // inner
        for row in range(0, shape[0], rows):
            yield (row, *(0 for _ in shape[1:])), (min(rows, shape[0] - row), *shape[1:])
    else:
        for row in range(shape[0]):
            for offsets, sizes in pieces(shape[1:], most):
                yield (row, *offsets), (1, *sizes)


def compare_tensor(a: Checkpoint, b: Checkpoint, name: str, progress: Callable[[int], None]) -> Difference | None:
    """None: bitwise equal. Both have the tensor, of one dtype and shape. CheckpointError: one of them is damaged."""
    for checkpoint in (a, b):
        checkpoint.check(name, progress)
    if hashes(a, name) == hashes(b, name):
        return None
    entry = a.manifest.tensors[name]
    elements, largest, difference, reference = 0, 0.0, Norm(), Norm()
    for i, (offsets, sizes) in enumerate(pieces(entry.shape, PIECE_ELEMENTS)):
        ours, theirs = a.read(name, offsets, sizes), b.read(name, offsets, sizes)
        bits = BITS[ours.element_size()]
        differs = ours.view(bits) != theirs.view(bits)
        x, y = ours.double(), theirs.double()
        gap = (x - y).abs_()
        if not math.isfinite(gap.sum().item()):  # somewhere in A, in B or between them
            gap = torch.where(gap.isnan(), math.inf, gap).masked_fill_(~differs | (x.isnan() & y.isnan()), 0.0)
            x = torch.where(x.isfinite(), x, 0.0)
        if not ours.dtype.is_floating_point:
            gap.clamp_min_(differs)  # at least 1: integers of more than 53 bits may meet in fp64
        elements, largest = elements + int(differs.count_nonzero()), max(largest, gap.max().item())
        difference.add(gap)
        reference.add(x)
        if i % MAPPED_PIECES == 0:
            for checkpoint in (a, b):
                checkpoint.unmap()  # or a large tensor would be in memory whole, as mapped pages
    if not elements:
        return None
    comparable = 0 < reference.value < math.inf  # else any difference is infinitely large beside it
    relative = 0.0 if not difference.value else difference.value / reference.value if comparable else math.inf
    return Difference(name, elements, largest, relative)


def hashes(checkpoint: Checkpoint, name: str) -> set[tuple[Sequence[int], Sequence[int], str]]:
    return {(box.offsets, box.sizes, box.xxh3) for box in checkpoint.manifest.tensors[name].boxes}


def form(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, tensor by tensor."""

    equal: list[str]
    differences: list[Difference]
    """Worst first."""
    only_a: list[str]
    only_b: list[str]
    misformed: dict[str, str]
    """Name -> what its dtypes and shapes are."""

    def passes(self, tolerance: float | None) -> bool:
        return not (self.only_a or self.only_b or self.misformed or self.too_far(tolerance))

    def too_far(self, tolerance: float | None) -> list[Difference]:
        return [found for found in self.differences if tolerance is None or found.relative > tolerance]


def compare(a: Checkpoint, b: Checkpoint, pattern: str, workers: int) -> Comparison:
    """CheckpointError: a damage, in what the pattern names. ValueError: it names nothing."""
    ours, theirs = ({name: entry for name, entry in checkpoint.manifest.tensors.items() if fnmatch.fnmatchcase(name, pattern)}
                    for checkpoint in (a, b))
    if not ours and not theirs:
        raise ValueError(f"no tensor of {a.path} or {b.path} matches {pattern!r}; names are as model.blocks.0.moe.router.down.weight")
    both = [name for name in ours if name in theirs]
    misformed = {name: f"{form(ours[name])} in A, {form(theirs[name])} in B" for name in both if form(ours[name]) != form(theirs[name])}
    same_form = [name for name in both if name not in misformed]
    total = 2 * sum(num_bytes(ours[name].dtype, ours[name].shape) for name in same_form)
    pool, lock = ThreadPoolExecutor(workers), threading.Lock()
    try:
        with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True, desc="compare") as bar:
            def told(count: int) -> None:
                with lock:
                    bar.update(count)

            found = dict(zip(same_form, pool.map(lambda name: compare_tensor(a, b, name, told), same_form), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
    differences = sorted((difference for difference in found.values() if difference),
                         key=lambda difference: (-difference.relative, -difference.largest, difference.name))
    return Comparison([name for name, difference in found.items() if difference is None], differences, sorted(ours.keys() - theirs.keys()),
                      sorted(theirs.keys() - ours.keys()), misformed)


def heading(letter: str, checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    layout = ", ".join(f"{ascii(axis)[1:-1]} {ranks}" for axis, ranks in manifest.layout.items())
    return f"{letter}: {checkpoint.path} (step {manifest.step:,}, position {manifest.position:,}, {layout})"


def text(a: Checkpoint, b: Checkpoint, found: Comparison, tolerance: float | None) -> str:
    too_far = found.too_far(tolerance)
    within = len(found.differences) - len(too_far)
    lines = [heading("A", a), heading("B", b)]
    lines += [f"  only in A: {name}  {form(a.manifest.tensors[name])}" for name in found.only_a]
    lines += [f"  only in B: {name}  {form(b.manifest.tensors[name])}" for name in found.only_b]
    lines += [f"  other form: {name}  {forms}" for name, forms in found.misformed.items()]
    if found.differences:
        lines.append(f"  {'RMS(a-b)/RMS(a)':>15} {'max |a-b|':>11} {'elements':>14}  tensor")
        lines += [f"  {one.relative:15.3e} {one.largest:11.3e} {one.elements:14,}  {one.name}"
                  + ("" if one in too_far or tolerance is None else "  (within the tolerance)") for one in found.differences]
    counts = [f"{len(found.equal)} tensors equal bitwise"] + ([] if tolerance is None else [f"{within} within {tolerance:g}"])
    counts += [f"{len(too_far)} different", f"{len(found.misformed)} of another dtype or shape", f"{len(found.only_a)} only in A",
               f"{len(found.only_b)} only in B"]
    return "\n".join([*lines, f"{'equal' if found.passes(tolerance) else 'DIFFERENT'}: {', '.join(counts)}"])


def bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return value


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="tools.compare_checkpoints", description="Do two checkpoints hold the same, whatever layouts wrote them?")
    parser.add_argument("a", type=Path, help="a checkpoint, or a run (its newest checkpoint); differences are relative to it")
    parser.add_argument("b", type=Path, help="another")
    parser.add_argument("--tolerance", type=bound, metavar="X", help="largest RMS(a-b)/RMS(a) of a tensor that is allowed (default: none, "
                                                                     "bitwise)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only tensors whose names match, as 'model.*'")
    parser.add_argument("--workers", type=worker_count, default=min(8, os.cpu_count() or 1), metavar="N", help="threads (%(default)s)")
    options = parser.parse_args(argv)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one to a worker
    try:
        a, b = Checkpoint.find(options.a), Checkpoint.find(options.b)
        found = compare(a, b, options.only, options.workers)
    except ValueError as error:
        print(f"tools.compare_checkpoints: {error}", file=sys.stderr)
        return UNUSABLE
    finally:
        torch.set_num_threads(torch_threads)
    print(text(a, b, found, options.tolerance))
    return EQUAL if found.passes(options.tolerance) else DIFFERENT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
