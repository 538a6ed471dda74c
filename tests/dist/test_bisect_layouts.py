"""tools.bisect_layouts: two layouts that agree, and a fault planted in each parallel piece, which it names."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist.pool import Pools
from tools.bisect_layouts import TOLERANCE, Difference, differences, main
from zaya.config import Recipe

ROOT = Path(__file__).resolve().parents[2]


def recorded(rank: int, world_size: int, tables: dict[str, Any], fault: str) -> Any:
    """A rank's record of one step, with a fault planted in one piece."""
    from tools.bisect_layouts import record
    from zaya import trainer as trainer_module
    from zaya.parallel import context, expert, tensor, zero1

    patch = pytest.MonkeyPatch()
    exchange, sum_slots, rows_backward = context.ContextParallel._exchange, expert._sum_slots, tensor._Rows.backward
    scatter, column_backward, mean_backward = context.ContextParallel._scatter, tensor._Columns.backward, tensor._GroupMean.backward
    faults: dict[str, Any] = {
        "halo": lambda: patch.setattr(context.ContextParallel, "_exchange",
                                      lambda self, parts, step: [p * (step < 0) for p in exchange(self, parts, step)]),
        "dkv": lambda: patch.setattr(context.ContextParallel, "_scatter", lambda self, dk, dv: tuple(2 * g for g in scatter(self, dk, dv))),
        "combine": lambda: patch.setattr(expert, "_sum_slots", lambda rows, k: sum_slots(rows, k) * 1.001),
        "row": lambda: patch.setattr(tensor._Rows, "backward", staticmethod(lambda ctx, dy: _scaled(rows_backward(ctx, dy)))),
        "column": lambda: patch.setattr(tensor._Columns, "backward", staticmethod(
            lambda ctx, *dys: _scaled(column_backward(ctx, *dys)))),
        "mean": lambda: patch.setattr(tensor._GroupMean, "backward", staticmethod(lambda ctx, d: _scaled(mean_backward(ctx, d)))),
        "reduce": lambda: patch.setattr(zero1, "reduce_scatter", lambda whole, group, label: zero1.all_reduce(
            whole.chunk(group.size)[group.rank].clone(), dataclasses.replace(group, handle=None, size=1), label)),
        "counts": lambda: patch.setattr(trainer_module, "all_reduce_sum", lambda sums, group: (
            zero1.all_reduce(sums[:3], group).wait() if len(sums) > 3 else None)),
        "gather": lambda: patch.setattr(zero1.Bucket, "start_gather", lambda self: None),
        "norm": lambda: patch.setattr(zero1.Zero1, "squared_norm", lambda self, whole=zero1.Zero1.squared_norm: 4 * whole(self)),
        "muon": lambda: patch.setattr(zero1, "_piece_of", lambda whole, part: whole.reshape(-1)[: part.numel]),
    }
    try:
        if fault:
            faults[fault]()
        return record(tiny.trainer(tables, world_size))
    finally:
        patch.undo()


def _scaled(gradients: Any) -> Any:
    return tuple(g * 1.001 if hasattr(g, "is_floating_point") and g.is_floating_point() else g for g in gradients)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny.recipe(tmp_path_factory.mktemp("bisect"), train__seq_len=48, model__num_heads=8, model__num_experts=8, train__dtype="fp64")


def compare(pools: Pools, recipe: Recipe, world_size: int, fault: str, **layout: int) -> list[Difference]:
    """What parts between one process and a layout."""
    single = pools[1].run(recorded, dataclasses.asdict(recipe), "")
    other = tiny.variant(recipe, **{f"parallel__{key}": value for key, value in layout.items()})
    many = pools[world_size].run(recorded, dataclasses.asdict(other), fault)
    return [d for d in differences(single, many) if not d.relative <= TOLERANCE["fp64"]]


@pytest.mark.parametrize("layout", [dict(), dict(tp=4), dict(tp=2, ep=4), dict(cp=2, ep=2)], ids=str)
def test_layouts_that_agree(pools: Pools, recipe: Recipe, layout: dict[str, int]) -> None:
    assert compare(pools, recipe, 4, "", **layout) == []


@pytest.mark.parametrize(("fault", "layout", "direction", "name"), [
    ("halo", dict(cp=4), "forward", "blocks.0.attention.cca."),
    ("dkv", dict(cp=4), "gradient", "blocks.1.attention.cca."),
    ("combine", dict(ep=4), "forward", "blocks.0.moe"),
    ("row", dict(tp=4), "gradient", "blocks.1.attention.heads"),
    ("column", dict(tp=2), "gradient", "blocks.1.attention_norm"),
    ("mean", dict(tp=4), "gradient", "blocks.1.attention.q"),
    ("reduce", dict(), "parameter gradient", "embedding.weight"),
    ("muon", dict(tp=2), "update", "blocks.0.attention.q.weight"),
    ("gather", dict(), "update", "embedding.weight"),
    ("norm", dict(ep=2), "numbers", "gradient norm"),
    ("counts", dict(), "update", "blocks.0.moe.router.balance_bias"),
])
def test_a_planted_fault_is_named(pools: Pools, recipe: Recipe, fault: str, layout: dict[str, int], direction: str, name: str) -> None:
    found = compare(pools, recipe, 4, fault, **layout)
    assert found and found[0].direction == direction and found[0].name.startswith(name), found[:3]


@pytest.fixture
def path(recipe: Recipe, tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    return tmp_path / "recipe.toml"


def test_bad_layouts_are_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout, says in (("ranks=4,tp=3", "parallel.tp = 3"), ("two", "not of the form"), ("ranks=3", "multiple of"),
                         ("ranks=2,xp=2", "unknown recipe key")):
        assert main([str(path), "--b", layout]) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1


@pytest.mark.parametrize(("words", "stuck", "says"), [
    ("[Gloo] Rank 0 is connected\n", "tp=2", "--b ranks=2,tp=2 took longer than --timeout 3; it was stopped before its first step"),
    ("step 1\n[Gloo] Rank 0 is connected\n", "", "--a ranks=1 took longer than --timeout 3; it was stopped in step 1 of 2"),
    ("step 1\nstep 2\n", "tp=2", "--b ranks=2,tp=2 took longer than --timeout 3; it was stopped in step 2 of 2"),
])
def test_a_layout_that_takes_too_long_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str,
                                               stuck: str, says: str) -> None:
    """torchrun is played by a script: one of the layouts gets stuck, deaf to torchrun's signal, the other is done at once, with an empty
    record."""
    torchrun = path.with_name("torchrun")
    torchrun.write_text(f"""#!{sys.executable}
import pathlib, pickle, select, signal, sys
if {stuck!r} in sys.argv[-1]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.write({words!r})
    sys.stdout.flush()
    select.select([sys.stdin], [], [], 60)
(pathlib.Path(sys.argv[sys.argv.index("--worker") + 1]) / "rank-0").write_bytes(pickle.dumps({{}}))
""")
    torchrun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(torchrun))
    began = time.monotonic()
    assert main([str(path), "--b", "ranks=2,tp=2", "--timeout", "3"]) == 2 and time.monotonic() - began < 30
    assert capsys.readouterr().err == f"tools.bisect_layouts: {says}\n"


def ranks_of(recipe: Path) -> list[str]:
    """torchrun and its workers, by their command lines: torchrun gives each a session of its own."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = file.read_bytes().decode(errors="replace").split("\0")
            found += [" ".join(words)] if "--worker" in words and str(recipe) in words else []
    return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "SIGHUP", "kill"])
@pytest.mark.parametrize("processes", [2, 3], ids=["as soon as a rank is there", "when all are there"])
def test_an_interruption_is_one_line_and_takes_the_ranks_with_it(path: Path, terminal: None, sent: signal.Signals, processes: int) -> None:
    """Ctrl-C of a terminal reaches all of the foreground's processes."""
    command = [sys.executable, "-m", "tools.bisect_layouts", str(path), "--a", "ranks=2", "--train.global_batch_size=100000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        try:
            deadline = time.monotonic() + 100
            while len(ranks_of(path)) < processes:  # torchrun and its first rank, or both
                assert time.monotonic() < deadline and job.poll() is None
                time.sleep(0.02)
            os.killpg(job.pid, sent)
            out, err = job.communicate(timeout=60)
        finally:
            job.kill()
    said = "" if sent == signal.SIGKILL else "tools.bisect_layouts: interrupted\n"
    assert (job.returncode, out, err) == (130 if sent == signal.SIGINT else -sent, "", said)
    deadline = time.monotonic() + 60
    while left := ranks_of(path):  # at most until those that have just been started have come to reading
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_layout_that_is_refused_in_its_ranks_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--a", "ranks=1", "--data.train=nowhere"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tools.bisect_layouts: --a ranks=1: ") and "nowhere" in message and message.count("\n") == 1


@pytest.fixture
def open_stdin() -> Iterator[int]:
    """A rank ends when this does."""
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)


def test_the_first_rank_says_which_step_it_is_at(path: Path, tmp_path: Path, open_stdin: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([sys.executable, "-m", "tools.bisect_layouts", "--worker", str(tmp_path), str(path)], cwd=ROOT, env=environ,
                          stdin=open_stdin, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "step 1\nstep 2\n"), done.stderr
    assert (tmp_path / "rank-0").is_file()


def test_a_rank_that_waits_for_another_ends_at_once(path: Path, tmp_path: Path, open_stdin: int) -> None:
    """By torchrun's SIGTERM, after which it waits 30 s."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = subprocess.Popen([sys.executable, "-m", "tools.bisect_layouts", "--worker", str(tmp_path), str(path)], cwd=ROOT, env=environ,
                            stdin=open_stdin, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    with socket.socket() as other:
        while other.connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline and rank.poll() is None
            time.sleep(0.1)
        rank.terminate()
        _, err = rank.communicate(timeout=25)
    assert rank.returncode == -signal.SIGTERM and "interrupted" not in err


@pytest.mark.slow
def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--b", "ranks=2,tp=2"]) == 0
    assert "agree" in capsys.readouterr().out
