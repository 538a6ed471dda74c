"""Reshaping: the same tensors bit for bit under any layout, each file only what its rank owns, a kill costs only unfinished files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.cpu.test_checkpoint import random_tensor, same, save_alone
from tests.cpu.test_shard import divisors
from tests.dist.pool import WorkerPool
from tools import reshape_checkpoint as tool
from zaya.checkpoint import rewrite
from zaya.checkpoint.manifest import Manifest
from zaya.checkpoint.read import Checkpoint
from zaya.config import load_recipe, recipe_from_tables
from zaya.parallel.partition import saved_by_rank
from zaya.plan import plan
from zaya.shard import Layout

MODEL: dict[str, Any] = dict(vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
                             moe_intermediate_size=24, router_hidden_size=16, attention_pattern=["sliding", "full"], sliding_window=6)
TRAIN: dict[str, Any] = dict(steps=6, global_batch_size=8, micro_batch_size=2, seq_len=48, seed=3)


def recipe(**model: Any) -> dict[str, Any]:
    return {"model": {**MODEL, **model}, "train": TRAIN, "optim": {"name": "muon"}}


def state(tables: dict[str, Any], *, bf16: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a run's checkpoint holds, in random bits (finite where they will be averaged)."""
    tensors: dict[str, torch.Tensor] = {}
    model = tool.model_from_tables(tables)
    generator = torch.Generator().manual_seed(seed)
    for name, row in plan(model).items():
        if bf16:
            master = torch.randn(row.shape, generator=generator)
            tensors[f"model.{name}"], tensors[f"optim.master.{name}"] = master.bfloat16(), master
        else:
            tensors[f"model.{name}"] = torch.randn(row.shape, generator=generator)
        kinds = ("momentum",) if type(row.optimizer).__name__ == "Muon" else ("exp_avg", "exp_avg_sq")
        for kind in kinds:
            tensors[f"optim.{kind}.{name}"] = random_tensor(torch.float32, row.shape, len(tensors) + seed)
    for block in range(model.num_layers):
        tensors[f"model.blocks.{block}.moe.router.balance_bias"] = torch.randn(model.num_router_classes, generator=generator)
    return tensors | {"optim.step": torch.tensor(4.0), "optim.balance.exp_avg": torch.randn(2, 5, generator=generator)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alone(tmp_path_factory.mktemp("source"), state(recipe(), bf16=True), recipe=recipe())


def reshape(source: Path, target: Path, layout: str, *arguments: str) -> Checkpoint:
    assert tool.main([str(source), str(target), "--layout", layout, *arguments]) == 0
    return Checkpoint.open(target)


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a call that must not work."""
    capfd.readouterr()
    assert tool.main([str(argument) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith("tools.reshape_checkpoint: ") and err.count("\n") == 1, err
    return err


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def tree(path: Path) -> dict[str, tuple[bytes, int]]:
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("layout", [Layout(64, zero_size=8), Layout(64, tp=2, ep=4, zero_size=4), Layout(64, zero_size=1), Layout(64)],
                         ids=lambda layout: f"tp{layout.tp}-ep{layout.ep}-zero{layout.zero_size}")
def test_all_ranks_write_alike(layout: Layout) -> None:
    """Where blocks of zero_size hold the same state, they share it out: no rank writes more than the mean and 2 %."""
    config = dataclasses.replace(load_recipe("recipes/zaya1_8b_pretrain1.toml").model, num_layers=4, attention_pattern=("full",))
    by_rank = saved_by_rank(plan(config), layout, muon=True)
    written = [sum(math.prod(sizes) for boxes in mine.values() for _, sizes in boxes) for mine in by_rank]
    assert sum(written) == sum(math.prod(row.shape) for row in plan(config).values())
    assert max(written) <= 1.02 * sum(written) / layout.world_size


# ------------------------------------------------------------------------------------------------------------------ bit for bit


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """Any layout that the model of these tests can have, in the tool's words."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    tp = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
    cp = draw(st.sampled_from([n for n in (1, 2, 3) if ranks // tp % n == 0 and 48 % (2 * n * tp) == 0]))
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
    replicas = max(tp // 2, 1)
    holders = (ranks, ranks // tp, ranks // ep, ranks // tp * replicas)
    zero = draw(st.sampled_from([0, *(n for n in divisors(ranks) if all(h <= n or h % n == 0 for h in holders))]))
    return f"ranks={ranks},tp={tp},cp={cp},ep={ep},zero_size={zero}"


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_there_and_back_is_bitwise(source: Path, data: st.DataObject) -> None:
    """A -> B -> C -> A: the last is the first, to the byte of every box; memory for a few elements at a time does not matter."""
    a, b, c = data.draw(layouts()), data.draw(layouts()), data.draw(layouts())
    size = data.draw(st.sampled_from(["4GB", "9KB"]))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "CHUNK_BYTES", data.draw(st.sampled_from([3000, 8 << 20])))
        root = Path(folder)
        first = reshape(source, root / "a", a, "--max-file-size", size)
        second = reshape(root / "a", root / "b", b, "--max-file-size", size)
        third = reshape(root / "b", root / "c", c)
        last = reshape(root / "c", root / "a again", a, "--max-file-size", size)
        assert last.manifest == first.manifest and tree(root / "a").keys() == tree(root / "a again").keys()
        expected = tensors_of(Checkpoint.open(source))
        for checkpoint in (first, second, third, last):
            checkpoint.verify()
            assert_same(tensors_of(checkpoint), expected)
        assert sorted(os.listdir(root)) == ["a", "a again", "b", "c"]


def run_layout(rank: int, world_size: int, tables: dict[str, Any], root: str) -> str:
    """A real run of two steps, saved."""
    from zaya.parallel.mesh import make_mesh
    from zaya.trainer import Trainer, open_data

    run = recipe_from_tables(tables)
    mesh = make_mesh(Layout.of(run.parallel, world_size), torch.device("cpu"))
    trainer = Trainer(run, mesh, open_data(run, mesh))
    for _ in range(2):
        trainer.train_step()
    return str(trainer.save(Path(root)))


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", [dict(tp=4, ep=2), dict(tp=2, cp=2, ep=4), dict(ep=2, zero_size=2)], ids=str)
def test_a_file_is_what_its_rank_would_have_saved(pool: WorkerPool, tmp_path: Path, layout: dict[str, int]) -> None:
    """A run's checkpoint, taken to one rank and back: the same boxes in the same files as the run's own ranks wrote."""
    base = tiny.recipe(tmp_path, train__seq_len=48, train__dtype="bf16", train__micro_batch_size=8)
    tables = dataclasses.asdict(tiny.variant(base, **{f"parallel__{key}": value for key, value in layout.items()}))
    saved = Checkpoint.open(pool.run(run_layout, tables, str(tmp_path / "saved"))[0])
    reshape(saved.path, tmp_path / "one", "ranks=1")
    again = reshape(tmp_path / "one", tmp_path / "again", "ranks=4," + ",".join(f"{key}={value}" for key, value in layout.items()))
    assert again.manifest.tensors == saved.manifest.tensors
    assert again.manifest.layout == saved.manifest.layout and again.manifest.files.keys() == saved.manifest.files.keys()
    for field in ("step", "tokens", "position", "tokens_by_corpus", "recipe", "hf_config"):
        assert getattr(again.manifest, field) == getattr(saved.manifest, field)


def test_a_file_holds_only_its_rank_s_boxes(source: Path, tmp_path: Path) -> None:
    """Seen from the model: an expert's state lies with a rank that holds it, a head's with its tp rank; ranks' shares are level."""
    layout = Layout(8, tp=2, ep=4)
    checkpoint = reshape(source, tmp_path / "out", "ranks=8,tp=2,ep=4")
    assert list(checkpoint.manifest.files) == [f"shard-{rank:05d}-of-00008.safetensors" for rank in range(8)]
    table = plan(tool.model_from_tables(recipe()))
    seen = set()
    for name, entry in checkpoint.manifest.tensors.items():
        row = table.get(tool.parameter_of(name)[1])
        for box in entry.boxes:
            rank = int(box.file[6:11])
            if row is None:
                assert rank == 0 and box.sizes == entry.shape
                continue
            offsets, lengths = layout.piece(row.placement, row.shape, rank)
            assert all(o <= b and b + n <= o + s for o, s, b, n in zip(offsets, lengths, box.offsets, box.sizes, strict=True)), (name, box)
            seen.add(rank)
    sizes = [file.size for file in checkpoint.manifest.files.values()]
    assert seen == set(range(8)) and max(sizes) < 1.7 * min(sizes)  # headers of such small tensors are a third of it


# ------------------------------------------------------------------------------------------------------------------ changes on the way


def test_drop_optimizer_keeps_the_model(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = reshape(source, tmp_path / "out", "ranks=2", "--drop-optimizer")
    expected = {name: tensor for name, tensor in tensors_of(Checkpoint.open(source)).items() if name.startswith("model.")}
    assert_same(tensors_of(checkpoint), expected)
    assert "bitwise copy" in capfd.readouterr().out and (checkpoint.manifest.step, checkpoint.manifest.position) == (3, 12)


@pytest.mark.parametrize("chunk", [64, 8 << 20])
def test_dtypes_are_converted(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], chunk: int,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "CHUNK_BYTES", chunk)
    before = tensors_of(Checkpoint.open(source))
    wide = tensors_of(reshape(source, tmp_path / "wide", "ranks=2", "--dtype", "fp32"))
    assert "no longer a bitwise copy" in capfd.readouterr().out
    for name in plan(tool.model_from_tables(recipe())):
        assert same(wide[f"model.{name}"], before[f"optim.master.{name}"])  # wider weights are the masters
    assert same(wide["optim.step"], before["optim.step"]) and wide.keys() == before.keys()
    bare = save_alone(tmp_path / "bare", {name: t for name, t in wide.items() if not name.startswith("optim.master.")}, recipe=recipe())
    narrow = tensors_of(reshape(bare, tmp_path / "narrow", "ranks=4,tp=2", "--dtype", "bf16"))
    assert narrow.keys() == before.keys() and all(same(narrow[name], before[name]) for name in before)  # rounded, the masters beside
    dropped = tensors_of(reshape(bare, tmp_path / "dropped", "ranks=1", "--dtype", "bf16", "--drop-optimizer"))
    assert all(name.startswith("model.") and same(tensor, before[name]) for name, tensor in dropped.items())
    capfd.readouterr()
    reshape(source, tmp_path / "kept", "ranks=2", "--dtype", "bf16")
    assert "every tensor is a bitwise copy" in capfd.readouterr().out


@pytest.mark.parametrize("bf16", [True, False])
def test_the_average_is_the_mean(tmp_path: Path, bf16: bool, capfd: pytest.CaptureFixture[str]) -> None:
    states = [state(recipe(), bf16=bf16, seed=seed) for seed in (1, 2, 3)]
    paths = [save_alone(tmp_path / str(i), tensors, recipe=recipe(), step=i) for i, tensors in enumerate(states)]
    found = reshape(paths[0], tmp_path / "mean", "ranks=4,ep=2", "--average", str(paths[1]), str(paths[2]))
    assert "the mean of 3 checkpoints, no longer a bitwise copy" in capfd.readouterr().out and found.manifest.step == 0
    assert all(name.startswith(("model.", "optim.master.")) for name in found.names())
    for name, tensor in tensors_of(found).items():
        of = name.replace("model.", "optim.master.") if name.replace("model.", "optim.master.") in states[0] else name
        mean = torch.stack([s[of].double() for s in states]).sum(0) / 3
        assert same(tensor, mean.to(tensor.dtype)), name
    other = save_alone(tmp_path / "other", state(recipe(hidden_size=64), bf16=bf16), recipe=recipe(hidden_size=64))
    assert "weight has shape [16, 32] and [16, 64]" in refusal(capfd, paths[0], tmp_path / "no", "--layout", "ranks=1", "--average", other)
    assert not list(tmp_path.glob("*no*"))


def test_new_rows_of_the_vocabulary_are_zero(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tensors_of(Checkpoint.open(source))
    found = reshape(source, tmp_path / "out", "ranks=8,tp=4", "--vocab-size", "104")
    assert found.manifest.recipe == recipe(vocab_size=104)
    for name, tensor in tensors_of(found).items():
        if name.endswith(".embedding.weight"):
            assert tensor.shape == (104, 32) and same(tensor[:96], before[name]) and not tensor[96:].any()
        else:
            assert same(tensor, before[name])
    assert "no longer a bitwise copy: 4 tensors" in capfd.readouterr().out
    assert "is less than model.vocab_size = 96" in refusal(capfd, source, tmp_path / "no", "--layout", "ranks=1", "--vocab-size", "95")
    assert "model.vocab_size = 97" in refusal(capfd, source, tmp_path / "no", "--layout", "ranks=4,tp=4", "--vocab-size", "97")


# ------------------------------------------------------------------------------------------------------------------ bounded and parallel


CHILD = """
import sys
from tools.reshape_checkpoint import main
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
source, small, out, *options = sys.argv[1:]
def go(path, out):
    average = [path] if "--average" in options else []
    assert main([path, out, "--layout", "ranks=3", "--workers", "1", "--max-memory", "1MB", *options, *average]) == 0
go(small, out + "-warm")
before = peak()
go(source, out)
print((peak() - before) / 1024)
"""


def big_state(rows: int) -> dict[str, torch.Tensor]:
    tables = recipe(vocab_size=rows, hidden_size=1024)
    return state(tables, bf16=True)


@pytest.mark.parametrize("options", [[], ["--dtype", "fp32"], ["--average"]], ids=str)
def test_memory_is_bounded(tmp_path: Path, options: list[str]) -> None:
    """290 MB (one tensor alone 66 MB) through one process with 1 MB for tensors: the growth of its peak, mapped pages included."""
    small = save_alone(tmp_path / "small", big_state(96), recipe=recipe(vocab_size=96, hidden_size=1024))
    large = save_alone(tmp_path / "large", big_state(16_000), recipe=recipe(vocab_size=16_000, hidden_size=1024))
    done = subprocess.run([sys.executable, "-c", CHILD, str(large), str(small), str(tmp_path / "out"), *options], capture_output=True,
                          text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert float(done.stdout.splitlines()[-1]) < 24, done.stdout


def test_a_worker_never_holds_more_than_its_part() -> None:
    manifest = Manifest.from_json(Manifest(0, 0, {}, 0, {}, {"world_size": 1}).to_json())
    entry = rewrite.TensorEntry("BF16", (10**9,), ())
    manifest = dataclasses.replace(manifest, tensors={"x": entry})
    for sources, dtype, each in ((1, "BF16", 2), (1, "F32", 6), (3, "BF16", 20), (3, "F32", 22)):
        worker = rewrite._Worker([(Path("x"), manifest)] * sources, 1 << 20)
        assert worker.chunk_elements(rewrite.Target("x", dtype, (10**9,))) == (1 << 20) // each


def test_several_processes_write_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = reshape(source, tmp_path / "alone", "ranks=4,tp=2,ep=2", "--workers", "1")
    monkeypatch.setattr(rewrite, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(rewrite, "WORKER_BYTES", 40_000)
    together = reshape(source, tmp_path / "together", "ranks=4,tp=2,ep=2", "--workers", "3")
    assert together.manifest == alone.manifest
    assert all((tmp_path / "alone" / file).read_bytes() == (tmp_path / "together" / file).read_bytes() for file in alone.manifest.files)


# ------------------------------------------------------------------------------------------------------------------ killed, refused

SLOW = """
import sys, time
from zaya.checkpoint import rewrite
from tools.reshape_checkpoint import main
note = rewrite._note
def slow(*arguments):
    note(*arguments)
    time.sleep(0.3)
rewrite._note = slow
sys.exit(main(sys.argv[1:]))
"""


def kill_midway(source: Path, target: Path, *options: str, files: int = 3) -> set[str]:
    """Start a reshape, kill -9 it after some files; the finished ones."""
    hidden = target.with_name(f".{target.name}.reshape")
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target), *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None and len(list(hidden.glob("shard-*"))) < files:
        time.sleep(0.01)
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists() and list(hidden.glob("unfinished-*"))
    journal = (hidden / rewrite.JOURNAL).read_text().splitlines()
    return {sorted(path.name for path in hidden.glob("shard-*"))[i] for i in range(len(journal) - 1)}


def test_a_killed_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished files are the same inodes afterwards; unfinished ones are written anew; the result is that of an undisturbed run."""
    untouched, target, hidden = tree(source), tmp_path / "out", tmp_path / ".out.reshape"
    whole = reshape(source, tmp_path / "whole", "ranks=8,tp=2,ep=4")
    finished = kill_midway(source, target, "--layout", "ranks=8,tp=2,ep=4")
    assert 2 <= len(finished) < 8
    inodes = {name: (hidden / name).stat().st_ino for name in finished}
    with open(hidden / rewrite.JOURNAL, "a") as journal:
        journal.write('{"file": 5, "xx')  # as a kill in the middle of a line leaves it
    written = []
    finish = rewrite._finish
    monkeypatch.setattr(rewrite, "_finish", lambda part, final: written.append(final.name) or finish(part, final))  # type: ignore[func-returns-value]
    again = reshape(source, target, "ranks=8,tp=2,ep=4", "--workers", "2", "--max-memory", "3MB")
    assert again.manifest == whole.manifest and tree(source) == untouched
    assert {name: (target / name).stat().st_ino for name in finished} == inodes and finished.isdisjoint(written)
    assert len(written) == 8 - len(finished) and sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert sorted(os.listdir(target)) == sorted([*whole.manifest.files, "manifest.json"])


@pytest.mark.parametrize("change", ["options", "source"])
def test_another_job_takes_nothing_over(source: Path, tmp_path: Path, change: str) -> None:
    target = tmp_path / "out"
    kill_midway(source, target, "--layout", "ranks=8,tp=2")
    options, start = ["--layout", "ranks=8,tp=2"], source
    if change == "options":
        options += ["--dtype", "fp32"]
    else:  # the same names and shapes, other values
        start = save_alone(tmp_path / "other", state(recipe(), bf16=True, seed=9), recipe=recipe())
    assert tool.main([str(start), str(target), *options]) == 0
    found, model = Checkpoint.open(target), "model.embedding.weight"
    found.verify()
    expected = Checkpoint.open(start)
    assert same(found.read("optim.step"), expected.read("optim.step"))
    assert same(found.read(model), expected.read("optim.master.embedding.weight" if change == "options" else model))


def test_workers_end_with_a_killed_parent(source: Path, tmp_path: Path) -> None:
    script = SLOW.replace("note(*arguments)", "note(*arguments); print('at work', flush=True)")
    start = "rewrite.UNIT_BYTES = rewrite.WORKER_BYTES = 30_000\nif __name__ == '__main__': sys.exit("
    (tmp_path / "script.py").write_text(script.replace("sys.exit(", start))
    child = subprocess.Popen([sys.executable, "script.py", str(source), "out", "--layout", "ranks=8", "--workers", "2"], cwd=tmp_path,
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(tool.__file__).parents[1])})
    assert child.stdout is not None and child.stdout.readline() == "at work\n"
    workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    assert len(workers) >= 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(alive(pid) for pid in workers):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_damage_is_refused(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    victim = next(broken.glob("shard-*"))
    data = bytearray(victim.read_bytes())
    data[-20] ^= 4
    victim.write_bytes(data)
    assert f"{victim.name}: tensor " in refusal(capfd, broken, tmp_path / "deep" / "down" / "out", "--layout", "ranks=2")
    assert os.listdir(tmp_path) == ["broken"]
    # A disk that does not keep what it is given: nothing is left to go on from.
    finish = rewrite._finish

    def rot(part: Path, final: Path) -> None:
        finish(part, final)
        with open(final, "r+b") as file:
            file.seek(-9, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-9, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(rewrite, "_finish", rot)
    assert "does not match its hash" in refusal(capfd, source, tmp_path / "out", "--layout", "ranks=2")
    assert os.listdir(tmp_path) == ["broken"]


def test_a_full_disk_keeps_finished_files(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    finish, count = rewrite._finish, iter(range(100))

    def full(part: Path, final: Path) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device", str(part))
        finish(part, final)

    monkeypatch.setattr(rewrite, "_finish", full)
    assert "No space left on device" in refusal(capfd, source, tmp_path / "out", "--layout", "ranks=4")
    assert os.listdir(tmp_path) == [".out.reshape"] and len(list((tmp_path / ".out.reshape").iterdir())) == 3  # two files and the journal
    monkeypatch.setattr(rewrite, "_finish", finish)
    reshape(source, tmp_path / "out", "ranks=4").verify()
    monkeypatch.setattr(rewrite.shutil, "disk_usage", functools.partial(_usage, free=1000))
    assert "has 0.00 GB free" in refusal(capfd, source, tmp_path / "no", "--layout", "ranks=4")
    assert os.listdir(tmp_path) == ["out"]


def _usage(path: Path, free: int) -> Any:
    return type("usage", (), {"free": free})()


BAD: list[tuple[list[str], str]] = [
    (["--layout", "ranks=3,tp=2"], "does not divide the 3 ranks"),
    (["--layout", "ranks=8,tp=8"], "parallel.tp = 8 neither divides"),
    (["--layout", "ranks=8,ep=3"], "parallel.ep = 3 does not divide"),
    (["--layout", "ranks=8,zero_size=3"], "parallel.zero_size = 3 does not divide"),
    (["--layout", "ranks=1", "--workers", "0"], "--workers = 0"),
    (["--layout", "ranks=1", "--max-memory", "1KB"], "--max-memory"),
    (["--layout", "ranks=1", "--average", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad_calls(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in refusal(capfd, source, tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["", "8", "tp=2", "ranks=0", "ranks=2,tp=0", "ranks=2,pp=1", "ranks=2,ranks=4", "ranks=x",
                                    "ranks=999999"])
def test_bad_layouts(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: str) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main([str(source), str(tmp_path / "out"), "--layout", layout])
    assert ended.value.code == 2 and capfd.readouterr().err.startswith("tools.reshape_checkpoint: argument --layout: ")


def test_the_target_must_be_new_and_elsewhere(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = tree(source)
    assert "is not empty" in refusal(capfd, source, tmp_path / "full", "--layout", "ranks=1")
    for path in (tmp_path / "full" / "mine", Path("/dev/null")):
        assert f"{path} is there and is not a directory" in refusal(capfd, source, path, "--layout", "ranks=1")
    for inside in (source, source / "new", source.parent / "x" / ".." / source.name / "deep" / "new"):
        assert "only read" in refusal(capfd, source, inside, "--layout", "ranks=1")
    assert "Not a directory" in refusal(capfd, source, tmp_path / "full" / "mine" / "x", "--layout", "ranks=1")
    assert tree(source) == before and os.listdir(tmp_path) == ["full"]
    (tmp_path / "empty").mkdir()
    reshape(source, tmp_path / "empty", "ranks=2").verify()


def test_a_link_is_the_directory_that_it_names(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk/empty").mkdir(parents=True)
    for name, place in (("empty", "disk/empty"), ("dangling", "disk/new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(tmp_path / place)
    for name, place in (("empty", "disk/empty"), ("dangling", "disk/new")):
        reshape(source, tmp_path / name, "ranks=2")
        assert (tmp_path / name).is_symlink() and Checkpoint.open(tmp_path / place).path.is_dir()
    assert "is not a directory" in refusal(capfd, source, tmp_path / "loop", "--layout", "ranks=2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "disk", "empty", "loop"]


def test_two_runs_do_not_share_a_directory(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with rewrite._alone(tmp_path / ".out.reshape"):
        assert "another process is writing" in refusal(capfd, source, tmp_path / "out", "--layout", "ranks=1")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = state(recipe(), bf16=False)
    short = {name: tensor for name, tensor in tensors.items() if name != "model.final_norm.weight"}
    assert "no tensor model.final_norm.weight" in refusal(capfd, save_alone(tmp_path / "a", short, recipe=recipe()), tmp_path / "out",
                                                          "--layout", "ranks=1")
    other = save_alone(tmp_path / "b", tensors, recipe=recipe(vocab_size=100))
    assert "has shape [96, 32], its recipe asks for [100, 32]" in refusal(capfd, other, tmp_path / "out", "--layout", "ranks=1")
    empty = save_alone(tmp_path / "c", tensors, recipe={})
    assert "recipe lacks model.vocab_size" in refusal(capfd, empty, tmp_path / "out", "--layout", "ranks=1")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_an_import_reshapes_too(tmp_path: Path) -> None:
    """A checkpoint with a model and nothing else of a recipe, as tools.import_hf makes it; one that has only weights."""
    tensors = {name: tensor for name, tensor in state(recipe(), bf16=False).items() if name.startswith("model.")}
    path = save_alone(tmp_path, tensors, recipe={"model": MODEL}, hf_config={"a": 1})
    found = reshape(path, tmp_path / "out", "ranks=6,cp=3,ep=2")
    assert_same(tensors_of(found), tensors)
    assert found.manifest.hf_config == {"a": 1} and json.loads((tmp_path / "out" / "manifest.json").read_text())["manifest"]["layout"] == {
        "tp": 1, "cp": 3, "ep": 2, "dp": 2, "world_size": 6}
