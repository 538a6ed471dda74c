"""Accept a node of 8 MI300X: its GPUs probed, tests/gpu, training under many layouts over RCCL against one process, every benchmark.

    make accept-mi300x                                     # or: python -m tools.accept_mi300x --out DIRECTORY
    python -m tools.accept_mi300x --rehearse               # the same steps with gloo on a CPU, small

Each step is a process of its own with a log and a time limit; one that fails or hangs stops no other. OUT/report.md and OUT/report.json are
written anew after every step, so that an interrupted acceptance has its report too. Exit code 1 if any step failed, 2 on a bad call, 130
after Ctrl-C; SIGTERM and SIGHUP end it too: what was running is stopped first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zaya import runtime
from zaya.cli import Parser, replace_text
from zaya.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes/quickstart.toml"
# The law of equal layouts in fp32: losses over 20 steps (tests/dist/test_layouts.py); norms are sums over all parameters: a digit less.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
HEARTBEAT_S = 30.0
GRACE_S = 40.0  # torchrun itself gives its workers 30 s after SIGTERM

# Of one node. quickstart's sizes divide: 8 heads, 2 KV heads, 8 experts, rows of 192 = 2 * 8 * 12 tokens.
LAYOUTS: dict[str, list[str]] = {
    "dp 8": [],
    "dp 8, blocks of 4": ["--parallel.zero_size=4"],
    "dp 8, 2 micro-batches": ["--train.global_batch_size=16", "--train.micro_batch_size=1"],
    "ep 2": ["--parallel.ep=2"],
    "ep 8": ["--parallel.ep=8"],
    "tp 2": ["--parallel.tp=2"],
    "tp 4 beyond the KV heads": ["--parallel.tp=4"],
    "tp 8": ["--parallel.tp=8"],
    "cp 2": ["--parallel.cp=2"],
    "cp 8": ["--parallel.cp=8"],
    "tp 2, ep 4": ["--parallel.tp=2", "--parallel.ep=4"],
    "cp 4, ep 8": ["--parallel.cp=4", "--parallel.ep=8"],
    "tp 2, cp 2, ep 8": ["--parallel.tp=2", "--parallel.cp=2", "--parallel.ep=8"],
    "tp 4, cp 2, ep 4, recomputed": ["--parallel.tp=4", "--parallel.cp=2", "--parallel.ep=4", "--train.recompute=full"],
    "tp 2, cp 2, ep 2, bf16": ["--parallel.tp=2", "--parallel.cp=2", "--parallel.ep=2", "--train.dtype=bf16"],
    "ep 8, bf16": ["--parallel.ep=8", "--train.dtype=bf16"],
}
REHEARSED_LAYOUTS: dict[str, list[str]] = {
    "dp 2": [],
    "ep 2": ["--parallel.ep=2"],
    "tp 2": ["--parallel.tp=2"],
    "cp 2": ["--parallel.cp=2"],
    "tp 2, bf16": ["--parallel.tp=2", "--train.dtype=bf16"],
}
COMMON = ["--train.seed=7", "--train.eval_interval=0", "--checkpoint.interval=0", "--checkpoint.resume=never", "--optim.warmup_steps=2"]
REAL_SIZES = ["--train.device=cuda", "--train.steps=20", "--train.global_batch_size=8", "--train.micro_batch_size=2"]
SMALL_SIZES = ["--train.device=cpu", "--train.steps=3", "--train.global_batch_size=2", "--train.micro_batch_size=2", "--train.seq_len=48",
               "--model.num_layers=2", "--model.hidden_size=64", "--model.moe_intermediate_size=64", "--model.router_hidden_size=32"]

# Arguments of benchmarks: on the node, and in a rehearsal (None: no small form, so that only its start is rehearsed, by --help).
BENCHMARKS: dict[str, tuple[list[str], list[str] | None]] = {
    "bench_kernels": (["--json", "{out}/bench_kernels.json"], None),
    "bench_step": ([], None),
}
PARTS = ("bench_checkpoint_ranks", "bench_kernels_moe")  # of other benchmarks, which start them

# Versions; eight GPUs, each a gfx942.
MACHINE = """
import json, sys, torch, triton
rehearsed = sys.argv[1] == "rehearse"
gpus = [] if rehearsed else [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "hip": torch.version.hip, "triton": triton.__version__,
                  "gpus": [f"{gpu.name} {getattr(gpu, 'gcnArchName', '')} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]}))
if not rehearsed:
    assert torch.version.hip, f"torch {torch.__version__} is not built for ROCm"
    assert len(gpus) == 8, f"{len(gpus)} GPUs are visible, 8 are expected"
    for index, gpu in enumerate(gpus):
        assert gpu.gcnArchName.startswith("gfx942"), f"GPU {index} is {gpu.gcnArchName}, not gfx942"
"""


@dataclass(frozen=True)
class Step:
    """One process. `check` reads what it left and returns a line for the report; ValueError says what is wrong with it."""

    name: str
    command: list[str]
    timeout_s: float
    check: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Result:
    name: str
    passed: bool
    seconds: float
    detail: str
    log: str


# ---------------------------------------------------------------------------------------------------------------- the steps


def plan(out: Path, rehearse: bool) -> list[Step]:
    """All steps in order. The benchmarks are the bench_* of tools/."""
    python, processes = sys.executable, 2 if rehearse else 8
    steps = [Step("machine", [python, "-c", MACHINE, "rehearse" if rehearse else "node"], 600)]
    probed = ["--device", "cpu", "--seconds", "0.1"] if rehearse else ["--gpus", "8", "--seconds", "30"]
    steps.append(Step("preflight", [python, "-m", "tools.preflight", *probed, "--out", str(out)], 600))
    steps.append(Step("tests/gpu", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"], 3600))
    single = out / "layouts" / "one process"
    steps.append(_training("one process", single, 1, rehearse, [], lambda: _finished(single)))
    for name, flags in (REHEARSED_LAYOUTS if rehearse else LAYOUTS).items():
        steps += _layout(name, flags, out / "layouts", processes, rehearse)
    benchmarks = sorted(path.stem for path in (ROOT / "tools").glob("bench_*.py"))
    return steps + [_benchmark(tool, out, rehearse) for tool in benchmarks if tool not in PARTS]


def select(steps: Sequence[Step], only: str) -> list[Step]:
    """The steps whose name contains one of the words, and with a layout the single processes that layouts are compared with."""
    words = [word for word in only.split(",") if word]
    chosen = [any(word in step.name for word in words) for step in steps]
    needs_single = any(is_chosen and step.name.startswith("layout: ") for step, is_chosen in zip(steps, chosen))
    return [step for step, is_chosen in zip(steps, chosen) if is_chosen or (needs_single and step.name.startswith("layout: one process"))]


def _training(name: str, run_dir: Path, processes: int, rehearse: bool, flags: list[str], check: Callable[[], str]) -> Step:
    dtype = [] if any(flag.startswith("--train.dtype") for flag in flags) else ["--train.dtype=fp32"]
    arguments = [str(RECIPE), *COMMON, *(SMALL_SIZES if rehearse else REAL_SIZES), *dtype, *flags, f"--run.dir={run_dir}"]
    return Step(f"layout: {name}", [*_torchrun(processes), "-m", "zaya.train", *arguments], 300 if rehearse else 900, check)


def _layout(name: str, flags: list[str], folder: Path, processes: int, rehearse: bool) -> list[Step]:
    """The layout, and where its batch or dtype is another than that of "one process", a single process of its own before it."""
    run_dir = folder / name
    if any(flag.startswith("--train.dtype=bf16") for flag in flags):
        # bf16 does not keep two layouts' routing equal, so there is no tolerance to hold it to: it has to learn.
        return [_training(name, run_dir, processes, rehearse, flags, lambda: _learns(run_dir))]
    batch = [flag for flag in flags if "batch_size" in flag]
    if not batch:
        return [_training(name, run_dir, processes, rehearse, flags, lambda: compare(run_dir, folder / "one process"))]
    single = folder / f"one process for {name}"
    return [_training(single.name, single, 1, rehearse, batch, lambda: _finished(single)),
            _training(name, run_dir, processes, rehearse, flags, lambda: compare(run_dir, single))]


def _benchmark(tool: str, out: Path, rehearse: bool) -> Step:
    real, small = BENCHMARKS.get(tool, ([], None))
    arguments = [argument.format(out=out) for argument in (small if rehearse else real) or []]
    if rehearse and small is None:
        return Step(tool, [sys.executable, "-m", f"tools.{tool}", "--help"], 120)
    return Step(tool, [sys.executable, "-m", f"tools.{tool}", *arguments], 3600)


def _torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


# ---------------------------------------------------------------------------------------------------------------- the checks


def _curve(run_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step. ValueError: the record is not there or not whole."""
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    values = [(row["loss"], row["grad_norm"]) for row in rows]
    if not values or [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has steps {[row['step'] for row in rows]}, not 1, 2, ...")
    if any(loss is None or norm is None for loss, norm in values):
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: a loss or gradient norm is not finite")
    return values


def _finished(run_dir: Path) -> str:
    curve = _curve(run_dir)
    return f"{len(curve)} steps, loss {curve[0][0]:.4f} to {curve[-1][0]:.4f}"


def _learns(run_dir: Path) -> str:
    curve = _curve(run_dir)
    if curve[-1][0] >= curve[0][0]:
        raise ValueError(f"the loss did not fall: {curve[0][0]:.4f} to {curve[-1][0]:.4f}")
    return f"{len(curve)} steps, loss {curve[0][0]:.4f} to {curve[-1][0]:.4f}"


def compare(run_dir: Path, single: Path) -> str:
    """How far a layout's curve is from the single process's. ValueError: further than the law allows."""
    ours, theirs = _curve(run_dir), _curve(single)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} steps, but {len(theirs)} of {single.name}")
    losses = [abs(a[0] - b[0]) for a, b in zip(ours, theirs)]
    norms = [abs(a[1] - b[1]) / max(b[1], 1e-12) for a, b in zip(ours, theirs)]
    text = f"{len(ours)} steps, loss apart by {max(losses):.1e}, gradient norm by {max(norms):.1e} (relative)"
    parted = [step for step, (loss, norm) in enumerate(zip(losses, norms), start=1) if loss > LOSS_TOLERANCE or norm > NORM_TOLERANCE]
    if parted:
        raise ValueError(f"{text}; allowed are {LOSS_TOLERANCE:.0e} and {NORM_TOLERANCE:.0e}; they part at step {parted[0]}")
    return text


# ---------------------------------------------------------------------------------------------------------------- running


def run(step: Step, log: Path, say: Callable[[str], None]) -> Result:
    """Run one step to its end or its time limit; whatever goes wrong with it is its result."""
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    next_word = HEARTBEAT_S
    with log.open("wb") as output:
        process = subprocess.Popen(step.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                                   start_new_session=True)
        try:
            while process.poll() is None and (seconds := time.monotonic() - started) < step.timeout_s:
                if seconds > next_word:
                    next_word += HEARTBEAT_S
                    say(f"      {seconds:.0f} s | {_last_line(log)}")
                time.sleep(0.1)
        finally:  # an interruption, too, takes the step with it: nothing is left on the GPUs
            is_late = process.poll() is None
            _stop(process)
    seconds = time.monotonic() - started
    if is_late:
        return Result(step.name, False, seconds, f"not done after {step.timeout_s:g} s; its last line: {_last_line(log)}", str(log))
    if process.returncode:
        return Result(step.name, False, seconds, f"exit code {process.returncode}: {_cause(log)}", str(log))
    try:
        return Result(step.name, True, seconds, step.check() or _last_line(log), str(log))
    except (ValueError, KeyError) as error:
        return Result(step.name, False, seconds, str(error), str(log))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the step: SIGTERM first, because torchrun's workers are in sessions of their own and only torchrun ends them; then, by SIGKILL,
    whatever is left in its process group, also of a step that ended by itself."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:  # a second Ctrl-C does not wait
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "(silent)")


def _cause(log: Path) -> str:
    """The first error of a log, which is nearer to the cause than torchrun's summary after it; the last line where none shows."""
    error = r"(?:[\w.]+\.)?(?!ChildFailed)\w*(?:Error|Exception)\b.*|(?:zaya|tools)\.\w+: .*|terminate called.*"
    found = re.search(rf"^(?:\[rank\d+\]: ?)?({error})$", log.read_text(errors="replace"), flags=re.MULTILINE)
    return found[1].strip()[:300] if found else _last_line(log)


def accept(steps: Sequence[Step], out: Path, rehearse: bool, settings: Sequence[str], say: Callable[[str], None]) -> bool:
    """Run all steps, write the report after each; True if all passed. `settings`: what runtime.describe says of them."""
    results: list[Result] = []
    for number, step in enumerate(steps, start=1):
        say(f"[{number}/{len(steps)}] {step.name} ...")
        result = run(step, out / "logs" / f"{number:02d}-{''.join(c if c.isalnum() else '-' for c in step.name)}.log", say)
        results.append(result)
        say(f"[{number}/{len(steps)}] {step.name}: {'passed' if result.passed else 'FAILED'} in {result.seconds:.0f} s | {result.detail}")
        write_report(results, len(steps), out, rehearse, settings)
    return all(result.passed for result in results)


def write_report(results: Sequence[Result], num_steps: int, out: Path, rehearse: bool, settings: Sequence[str]) -> None:
    failed = [result for result in results if not result.passed]
    verdict = "failed" if failed else "passed" if len(results) == num_steps else "not finished"
    facts = {"verdict": verdict, "rehearsal": rehearse, "host": platform.node(), "when": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
             "commit": _commit(), "steps": num_steps, "done": len(results), "failed": len(failed)}
    everything = {**facts, "settings": list(settings), "results": [dataclasses.asdict(result) for result in results]}
    replace_text(out / "report.json", json.dumps(everything, indent=1) + "\n")
    title = "Rehearsal of the acceptance (gloo, CPU)" if rehearse else "Acceptance of a node of 8 MI300X"
    lines = [f"# {title}: {verdict}", "", *(f"- {key}: {value}" for key, value in facts.items() if key != "verdict"), "",
             "| step | result | seconds | what it says |", "|---|---|---|---|"]
    for result in results:
        detail = result.detail.replace("|", "\\|")
        lines.append(f"| {result.name} | {'passed' if result.passed else '**failed**'} | {result.seconds:.0f} | {detail} |")
    lines += ["", "## Settings", "", "```", *settings, "```"]
    for result in results:
        if result.name.startswith(("machine", "preflight", "bench_")) or not result.passed:
            text = Path(result.log).read_bytes()[-6000:].decode(errors="replace").strip()
            lines += ["", f"## {result.name}", "", f"`{result.log}`", "", "```", *text.split("\n")[-60:], "```"]
    replace_text(out / "report.md", "\n".join(lines) + "\n")


def _commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = Parser(prog="tools.accept_mi300x", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(time.strftime("runs/accept-%Y%m%d-%H%M%S")),
                        help="where logs and report go (default: runs/accept-TIME)")
    parser.add_argument("--rehearse", action="store_true", help="small, with gloo on the CPU: proves the steps, not the node")
    parser.add_argument("--only", metavar="WORDS", help="only steps whose name contains one of these, separated by commas")
    options = parser.parse_args()
    out = options.out.absolute()
    steps = plan(out, options.rehearse)
    if options.only is not None:
        steps = select(steps, options.only)
    if not steps:
        parser.error(f"--only {options.only!r} names none of the steps")
    if not options.rehearse and not torch.version.hip:
        parser.error(f"torch {torch.__version__} is not built for ROCm, so no step could pass; --rehearse runs them small on a CPU")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            parser.error(f"{options.out} is not an empty directory; move it away, or name another with --out")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make --out {str(options.out)[:100]}: {error.strerror}")
    settings = runtime.describe(runtime.start("tools.accept_mi300x"))  # the environment that all steps inherit
    try:
        passed = accept(steps, out, options.rehearse, settings, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was done is in {out}") from None
    print(f"{'passed' if passed else 'FAILED'}: {out / 'report.md'}", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
