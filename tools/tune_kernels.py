"""Search better tile sizes for one op's kernels and write the winners, with their figures, into zaya/kernels/configs.json.

Each entry of the table that the op's chip cases use competes with its neighbours: one block or the warps halved or doubled, or one stage
more or less (or with all combinations of --space). On a GPU the shortest median time of the kernel's launches in forward and backward of
the cases wins, and the winners together must compute the right thing. Without one, for gfx942, the machine code decides: no failed gate,
at least two waves a SIMD, then how much of the time the matrix cores can work (of matrix kernels), the share of bytes in 16-byte loads,
and the waves.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "0"  # candidates are compiled; Triton reads this once, as it is imported

import torch
from tqdm import tqdm

from zaya.cli import Parser
from zaya.kernels import cases, launch, machine_code
from zaya.kernels.launch import MI300X, TABLE, Target
from zaya.kernels.trials import Entry, Score, measured_scores

CEILINGS = {"num_warps": 16, "num_stages": 4}
MARGIN = 0.02  # a winner must be so much better: less is noise, of a clock or of a scheduler


def legend(measures: bool) -> str:
    how = ("the shortest median time" if measures else
           "by machine code: no failed gate, two waves per SIMD, then the MFMA bound, bytes in 16-byte loads, waves per SIMD")
    return f"First the entry of the table, then what competes with it. * wins: {how}; less than {MARGIN:.0%} decides nothing."


def neighbours(entry: Entry) -> Iterator[Entry]:
    """The entry itself, then with one number halved or doubled (stages: one less or more)."""
    yield entry
    for name, value in {**entry["blocks"], "num_warps": entry["num_warps"], "num_stages": entry.get("num_stages", 2)}.items():
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if 1 <= other <= CEILINGS.get(name, 1 << 20):
                yield varied(entry, {name: other})


def products(entry: Entry, space: dict[str, list[int]]) -> Iterator[Entry]:
    """The entry itself, then all combinations of the space's numbers that it knows."""
    yield entry
    known = {name: numbers for name, numbers in space.items() if name in entry["blocks"] or name in CEILINGS}
    for numbers in itertools.product(*known.values()):
        candidate = varied(entry, dict(zip(known, numbers)))
        if known and candidate != entry:
            yield candidate


def varied(entry: Entry, changes: dict[str, int]) -> Entry:
    options = {name: number for name, number in changes.items() if name in CEILINGS}
    return {**entry, **options, "blocks": {**entry["blocks"], **{n: v for n, v in changes.items() if n not in CEILINGS}}}


def static_scores(kernel: str, index: int, candidates: list[Entry], chosen: list[cases.Case]) -> list[Score]:
    """Of each candidate, by the worst of the kernel's launches; -1 where none of them uses it."""
    owners, builds = [], {}
    scores: list[Score] = [((-1.0,), "does not launch")] * len(candidates)
    for number, candidate in enumerate(candidates):
        launch.replace_entry(kernel, index, candidate)
        try:
            with machine_code.recording() as noted:
                for case in chosen:
                    cases.run(case.op, case.make(torch.device("meta"), torch.bfloat16), case.gradients)
        except Exception as error:  # noqa: BLE001  # an op refuses a tile size in its own way; that candidate is out
            noted, scores[number] = [], ((-1.0,), f"does not launch: {' '.join(str(error).split())[:100]}")
        for build, config in noted:
            if build.kernel == kernel and config.blocks == candidate["blocks"] and (number, build.key) not in builds:
                builds[number, build.key] = build
                owners.append(number)
    launch.replace_entry(kernel, index, candidates[0])
    figures = tqdm(machine_code.all_figures(list(builds.values())), total=len(builds), unit="kernel", disable=None, leave=False)
    for number, row in zip(owners, figures, strict=True):  # to the generator's end
        score = (float(not row["broken"]), float(min(row["waves_per_simd"], 2)), row["mfma_bound"], row["wide_share"],
                 float(row["waves_per_simd"]))
        words = (f"static: {row['vgprs']} VGPRs, {row['vgpr_spills']} spills, LDS {row['lds_bytes'] / 1024:g} KiB, "
                 f"{row['waves_per_simd']} waves per SIMD, {row['wide_share']:.0%} of bytes in 16-byte loads"
                 + (f", MFMA share {row['mfma_share']:.2f}, waiting {row['waiting']:.0%}, bound {row['mfma_bound']:.2f}"
                    if row["is_matrix_kernel"] else ""))
        words = "; ".join(row["broken"]) or words
        if scores[number][0] == (-1.0,) or score < scores[number][0]:
            scores[number] = score, words
    return scores


def is_better(score: tuple[float, ...], than: tuple[float, ...]) -> bool:
    """The first figure that differs by more than noise decides."""
    for ours, theirs in zip(score, than):
        if math.isinf(ours) or math.isinf(theirs) or abs(ours - theirs) > MARGIN * max(abs(ours), abs(theirs)):
            return ours > theirs
    return len(score) > len(than)


def used_entries(table: dict[str, list[Entry]], chip: Target, chosen: list[cases.Case], only: str | None) -> list[tuple[str, int]]:
    """(kernel, index) of the chip's entries that the cases use, in the order of the table."""
    with machine_code.recording(chip) as noted:
        for case in chosen:
            cases.run(case.op, case.make(torch.device("meta"), torch.bfloat16), case.gradients)
    used = {(build.kernel, id(config.blocks)) for build, config in noted if only in (None, build.kernel)}
    return [(kernel, index) for kernel, entries in table.items() for index, entry in enumerate(entries)
            if (kernel, id(entry["blocks"])) in used]


def write(winners: dict[tuple[str, int], Entry]) -> None:
    """Into the table as it is now on the disk, one line an entry, the whole file replaced at once."""
    table = json.loads(TABLE.read_text())
    for (kernel, index), entry in winners.items():
        table[kernel][index] = entry
    lines = {kernel: ",\n".join(f"    {json.dumps(entry)}" for entry in entries) for kernel, entries in table.items()}
    kernels = [f'  "{kernel}": [\n{entries}\n  ]' for kernel, entries in lines.items()]
    with tempfile.NamedTemporaryFile("w", dir=TABLE.parent, suffix=".json", delete=False) as file:
        file.write("{\n" + ",\n".join(kernels) + "\n}\n")
    os.chmod(file.name, TABLE.stat().st_mode)
    os.replace(file.name, TABLE)


def parse_space(words: list[str]) -> dict[str, list[int]]:
    """["BLOCK_M=64,128", "num_warps=4,8"] -> {"BLOCK_M": [64, 128], "num_warps": [4, 8]}"""
    space: dict[str, list[int]] = {}
    for word in words:
        name, _, numbers = word.partition("=")
        if not all(number.isascii() and number.isdigit() and int(number) for number in numbers.split(",")):
            raise ValueError(f"--space {word}: expected NAME=NUMBER,NUMBER,... with numbers from 1 on")
        if name in space:
            raise ValueError(f"--space names {name} twice; name it once, with all its numbers")
        space[name] = list(dict.fromkeys(int(number) for number in numbers.split(",")))
    return space


def main() -> int:
    parser = Parser(prog="tools.tune_kernels", description=__doc__)
    parser.add_argument("--op", required=True, help="the cases to tune on: those whose name starts so")
    parser.add_argument("--kernel", help="only this kernel of the op, by its name in the table")
    parser.add_argument("--arch", help="whose entries: this GPU's, or gfx942 where there is none")
    parser.add_argument("--space", nargs="+", default=[], metavar="NAME=N,N", help="numbers to combine, instead of neighbours")
    parser.add_argument("--dry-run", action="store_true", help="print the ranking and write nothing")
    arguments = parser.parse_args()
    here = launch.target(torch.device("cuda")) if torch.cuda.is_available() else MI300X
    arch = arguments.arch or here.arch
    if arch not in (here.arch, MI300X.arch):
        measured = f"measure {here.arch} and " if torch.cuda.is_available() else ""
        parser.error(f"--arch {arch}: this machine can {measured}judge {MI300X.arch} by its machine code")
    names = parser.starting_so("--op", [arguments.op], [case.name for case in cases.cases(cases.CHIP)], "no chip case")
    chosen = [case for case in cases.cases(cases.CHIP) if case.name in names]
    try:
        space = parse_space(arguments.space)
    except ValueError as error:
        parser.error(str(error))
    table = launch._table()  # the very one that launches read: a candidate is tried by standing in it
    entries = used_entries(table, here if arch == here.arch else MI300X, chosen, arguments.kernel)
    if not entries:
        parser.error(f"the cases of {arguments.op} use no entry of {arguments.kernel or 'any kernel'} for {arch}")
    known = CEILINGS.keys() | {name for kernel, index in entries for name in table[kernel][index]["blocks"]}
    if unknown := sorted(space.keys() - known):
        parser.error(f"--space {', '.join(unknown)}: these kernels have {', '.join(sorted(known))}")
    candidates = {(kernel, index): list(products(table[kernel][index], space) if space else neighbours(table[kernel][index]))
                  for kernel, index in entries}
    measures = torch.cuda.is_available() and arch == here.arch
    scores = measured_scores(candidates, chosen) if measures else {}
    winners = {}
    print(legend(measures))
    for kernel, index in entries:
        each = candidates[kernel, index]
        scored = list(zip(each, scores[kernel, index] if measures else static_scores(kernel, index, each, chosen)))
        best = scored[0]
        for one in scored[1:]:
            best = one if is_better(one[1][0], best[1][0]) else best
        print(f"{kernel} {arch} {each[0].get('when', '')}")
        for candidate, (_, words) in scored:
            mark = "*" if candidate is best[0] else " "
            print(f" {mark} {candidate['blocks']} warps {candidate['num_warps']} stages {candidate.get('num_stages', 2)}: {words}")
        if best[0] is not each[0]:
            winners[kernel, index] = {**best[0], "figures": best[1][1]}
            launch.replace_entry(kernel, index, winners[kernel, index])  # later kernels of the op are judged beside it
    for case in chosen if measures and winners else []:
        wrong = {name: error for name, error in cases.errors(case, case.make(torch.device("cuda"), torch.bfloat16)).items()
                 if not error <= case.limit}
        if wrong:
            print(f"{parser.prog}: with these entries {case.name} is wrong: {wrong}; nothing is written", file=sys.stderr)
            return 1
    if winners and not arguments.dry_run:
        write(winners)
    print(f"{len(winners)} of {len(entries)} entries have a better neighbour{'; nothing written' if arguments.dry_run else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
