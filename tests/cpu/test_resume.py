"""What a run starts from and how it ends early: fallback to an older checkpoint, two tiers, preemption, disks that fail."""

from __future__ import annotations

import dataclasses
import errno
import gc
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from zaya import resume
from zaya.checkpoint.directory import complete_steps, step_path
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import Recipe, load_recipe
from zaya.metrics import MetricsWriter, read_rows
from zaya.model import init
from zaya.parallel.mesh import open_mesh
from zaya.preemption import AGAIN_S, Preemption
from zaya.shard import Layout
from zaya.tiers import Tiers
from zaya.train import main, open_run
from zaya.trainer import StepResult, Trainer, open_data

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def written(recipe: Recipe, name: str) -> Path:
    path = Path(recipe.run.dir).parent / f"{name}.toml"
    path.write_text(recipe.to_toml())
    return path


def losses(run_dir: Path) -> list[tuple[int, float, float | None]]:
    train, evaluation = read_rows(run_dir / "metrics.jsonl")
    found = {row["step"]: row["eval_loss"] for row in evaluation}
    return [(row["step"], row["loss"], found.get(row["step"])) for row in train]


def damage(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(content)


def same_state(a: Path, b: Path) -> bool:
    ours, theirs = Checkpoint.open(a), Checkpoint.open(b)
    return ours.names() == theirs.names() and all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run of 6 steps, saved at 2, 4 and 6."""
    recipe = tiny.recipe(folder, checkpoint__interval=2, run__dir=str(folder / "whole"))
    assert main([str(written(recipe, "whole"))]) == 0
    return folder / "whole"


def finished(folder: Path, whole: Path, name: str, **overrides: object) -> tuple[Path, str]:
    """A copy of that run under `name`, and its recipe."""
    run_dir = folder / name
    shutil.copytree(whole, run_dir)
    recipe = written(tiny.recipe(folder, checkpoint__interval=2, run__dir=str(run_dir), **overrides), name)
    shutil.copy(recipe, run_dir / "recipe.toml")
    return run_dir, str(recipe)


def test_the_newest_that_verifies_is_taken_and_the_others_are_named(folder: Path, whole: Path, capsys: Capture) -> None:
    run_dir, recipe = finished(folder, whole, "fallback")
    damage(step_path(run_dir / "checkpoints", 6))
    manifest = step_path(run_dir / "checkpoints", 4) / "manifest.json"
    manifest.write_text(manifest.read_text()[:-100])
    capsys.readouterr()
    assert main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"passed over the checkpoint of step 6: .*does not match its hash", out)
    assert re.search(r"passed over the checkpoint of step 4: .*manifest\.json does not match its own hash", out)
    assert "resumed from" in out and "at step 2" in out
    assert losses(run_dir) == losses(whole) and same_state(step_path(run_dir / "checkpoints", 6), step_path(whole / "checkpoints", 6))
    # What was passed over is evidence: moved, not overwritten.
    assert sorted(path.name for path in (run_dir / "set-aside-1/checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_if_none_verifies_the_run_ends_and_nothing_changes(folder: Path, whole: Path, capsys: Capture) -> None:
    run_dir, recipe = finished(folder, whole, "hopeless")
    for step in (2, 4, 6):
        damage(step_path(run_dir / "checkpoints", step))
    record = (run_dir / "metrics.jsonl").read_bytes()
    assert main([str(recipe)]) == 7
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(f"step {step}:" in message for step in (2, 4, 6))
    assert (run_dir / "metrics.jsonl").read_bytes() == record and complete_steps(run_dir / "checkpoints") == [2, 4, 6]


def test_large_checkpoints_are_hashed_as_they_are_read_or_whole(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage in what this job does not read (here: the rounded weights, of which a wide run takes the masters) shows with verify = all."""
    monkeypatch.setattr("zaya.resume.SMALL_BYTES", 0)
    run_dir = folder / "large"
    narrow = tiny.recipe(folder, checkpoint__interval=2, run__dir=str(run_dir), train__dtype="bf16", train__steps=4)
    assert main([str(written(narrow, "large"))]) == 0
    path = step_path(run_dir / "checkpoints", 4)
    name, entry = next((name, entry) for name, entry in Checkpoint.open(path).manifest.tensors.items() if name.startswith("model.blocks"))
    file, content = path / entry.boxes[0].file, bytearray((path / entry.boxes[0].file).read_bytes())
    begin, _ = Checkpoint.open(path)._range(entry.boxes[0])
    content[begin] ^= 1
    file.write_bytes(content)
    recipe = str(written(tiny.variant(narrow, train__dtype="fp32", train__steps=5), "wide"))
    shutil.copytree(run_dir, folder / "large-copy")
    capsys.readouterr()
    assert main([recipe]) == 0
    assert "at step 4" in capsys.readouterr().out
    shutil.rmtree(run_dir)
    (folder / "large-copy").rename(run_dir)
    assert main([recipe, "--checkpoint.verify=all"]) == 0
    assert f"passed over the checkpoint of step 4: {file}: tensor '{name}'" in capsys.readouterr().out


def test_two_tiers(folder: Path, capsys: Capture) -> None:
    run_dir, local_dir = folder / "tiers", folder / "fast"
    base = tiny.recipe(folder, checkpoint__interval=2, checkpoint__local_dir=str(local_dir), run__dir=str(run_dir), train__steps=4)
    local = Tiers.of(base).local
    assert local is not None and local.is_relative_to(local_dir)
    recipe = written(base, "tiers")
    assert main([str(recipe)]) == 0
    assert complete_steps(local)[-1] == complete_steps(run_dir / "checkpoints")[-1] == 4 and complete_steps(local) == [2, 4]
    assert not [path for path in local.parent.iterdir() if path.name.startswith(".")]
    # The node is lost: the shared tier is enough. Its copy is lost: so is the local one.
    shutil.rmtree(local_dir)
    assert main([str(recipe), "--train.steps=5"]) == 0
    assert f"resumed from {run_dir}/checkpoints/step-00000004" in capsys.readouterr().out
    assert complete_steps(local) == [5]
    shutil.rmtree(run_dir / "checkpoints")
    assert main([str(recipe), "--train.steps=6"]) == 0
    assert f"resumed from {local}/step-00000005" in capsys.readouterr().out
    assert same_state(step_path(run_dir / "checkpoints", 6), step_path(local, 6))
    # Damage on the local tier: the shared copy of the same step is taken.
    damage(step_path(local, 6))
    assert main([str(recipe), "--train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert "passed over the checkpoint of step 6" in out and f"resumed from {run_dir}/checkpoints/step-00000006" in out


def test_a_changed_length_or_batch_is_said(folder: Path, whole: Path, capsys: Capture) -> None:
    run_dir, recipe = finished(folder, whole, "longer")
    capsys.readouterr()
    assert main([recipe]) == 0
    assert "at step 6\n" in capsys.readouterr().out, "nothing changed, nothing to say"
    assert main([recipe, "--train.steps=7"]) == 0
    assert "at step 6; train.steps was 6, is 7: the new recipe holds from here\n" in capsys.readouterr().out
    assert main([recipe, "--train.steps=8", "--train.global_batch_size=4"]) == 0
    assert ("at step 7; train.steps was 7, is 8; train.global_batch_size was 8, is 4: "
            "the new recipe holds from here\n" in capsys.readouterr().out)


def test_a_finished_run_keeps_the_recipe_it_was_made_with(folder: Path, whole: Path, capsys: Capture) -> None:
    run_dir, recipe = finished(folder, whole, "shorter")
    capsys.readouterr()
    assert main([recipe, "--train.steps=4"]) == 0
    out = capsys.readouterr().out
    assert "at step 6; train.steps was 6, is 4\n" in out and "is finished at step 6; nothing to do\n" in out
    assert (run_dir / "recipe.toml").read_bytes() == Path(recipe).read_bytes() and losses(run_dir) == losses(whole)
    (run_dir / "recipe.toml").unlink()
    assert main([recipe]) == 0 and (run_dir / "recipe.toml").exists(), "a lost one comes back"


@pytest.mark.parametrize("fault", ["another process writes it", "its record has a hole"])
def test_a_start_that_is_refused_changes_nothing(folder: Path, capsys: Capture, fault: str) -> None:
    run_dir = folder / f"refused-{fault[:3]}"
    base = tiny.recipe(folder, checkpoint__interval=2, checkpoint__local_dir=f"{run_dir}-fast", run__dir=str(run_dir))
    recipe, record = str(written(base, run_dir.name)), run_dir / "metrics.jsonl"
    assert main([recipe]) == 0
    other = MetricsWriter(record, 6) if fault.startswith("another") else None
    if other is None:
        rows = record.read_bytes().splitlines(keepends=True)
        record.write_bytes(b"".join(rows[:2]))
    before = contents(folder)
    capsys.readouterr()
    assert main([recipe, f"--checkpoint.resume={step_path(run_dir / 'checkpoints', 4)}"]) == 2
    assert ("is being written by another process" if other else "but the checkpoint is of step 4") in capsys.readouterr().err
    assert contents(folder) == before
    if other:
        other.close()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def test_a_finished_run_does_not_look_at_what_a_fresh_one_starts_from(folder: Path, whole: Path) -> None:
    run_dir, recipe = finished(folder, whole, "finished")
    assert main([recipe, "--init.checkpoint=/nowhere"]) == 0
    assert main([recipe, "--init.checkpoint=/nowhere", f"--run.dir={folder / 'unstarted'}"]) == 2


def test_a_mirror_cut_short_is_made_up_for(folder: Path) -> None:
    run_dir = folder / "short"
    base = tiny.recipe(folder, checkpoint__interval=2, checkpoint__local_dir=str(folder / "fast2"), run__dir=str(run_dir), train__steps=4)
    recipe = written(base, "short")
    assert main([str(recipe)]) == 0
    shutil.rmtree(step_path(run_dir / "checkpoints", 4))  # as if killed before it came to that
    record = (run_dir / "metrics.jsonl").read_bytes()
    assert main([str(recipe)]) == 0  # a finished run, but for this
    assert complete_steps(run_dir / "checkpoints")[-1] == 4 and (run_dir / "metrics.jsonl").read_bytes() == record
    manifest = step_path(run_dir / "checkpoints", 4) / "manifest.json"
    whole, body = manifest.read_bytes(), '"manifest": {"format_version": 99}}\n'
    manifest.write_text(f'{{"xxh3": "{hash_bytes(body.encode())}",\n{body}')
    for _ in range(2):  # another program's in its place: a failure again and again, until somebody moves it
        assert main([str(recipe)]) == 1 and "format_version" in manifest.read_text()
    shutil.rmtree(manifest.parent)
    assert main([str(recipe)]) == 0 and manifest.read_bytes() == whole
    assert same_state(step_path(run_dir / "checkpoints", 4), step_path(Tiers.of(base).local or Path(), 4))


def test_going_back_keeps_the_record_of_both_tiers(folder: Path) -> None:
    run_dir = folder / "back"
    base = tiny.recipe(folder, checkpoint__interval=2, checkpoint__local_dir=str(folder / "fast3"), run__dir=str(run_dir))
    recipe, local = written(base, "back"), Tiers.of(base).local
    assert local is not None and main([str(recipe)]) == 0
    kept = complete_steps(run_dir / "checkpoints")
    for step in kept[:-1]:
        shutil.rmtree(step_path(run_dir / "checkpoints", step))
    shutil.copytree(step_path(local, 2), folder / "step-00000002")
    shutil.rmtree(step_path(run_dir / "checkpoints", 6))  # later ones are on the local tier only
    assert main([str(recipe), f"--checkpoint.resume={folder / 'step-00000002'}", "--train.steps=3"]) == 0
    assert len(losses(run_dir)) == 3 and len(read_rows(run_dir / "set-aside-1/metrics.jsonl")[0]) == 6
    assert complete_steps(local.parent / "set-aside-1/checkpoints") == [4, 6] and complete_steps(local) == [2, 3]


@pytest.mark.parametrize(("start", "draws"), [
    ("fresh", True), ("--checkpoint.resume=never", True), ("auto", False), ("a path", False), ("init", False),
    ('--checkpoint.allow_missing=["model.nothing*"]', True)])
def test_weights_are_drawn_only_where_no_checkpoint_brings_them(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, start: str,
                                                                draws: bool) -> None:
    name = re.sub(r"\W+", "-", f"drawn-{start}")
    run_dir, recipe = finished(folder, whole, name)
    anew = f"--run.dir={run_dir}-new"
    options = {"auto": [], "a path": [f"--checkpoint.resume={step_path(run_dir / 'checkpoints', 4)}"], "fresh": [anew],
               "init": [anew, f"--init.checkpoint={run_dir}"]}.get(start, [start])
    shutil.rmtree(step_path(run_dir / "checkpoints", 6))
    drawn: list[str] = []
    draw = init._normal

    def drawing(shape: tuple[int, ...], std: float, key: str) -> torch.Tensor:
        drawn.append(key)
        return draw(shape, std, key)

    monkeypatch.setattr(init, "_normal", drawing)
    assert main([recipe, *options]) == 0 and bool(drawn) == draws
    done = Path(f"{run_dir}-new") if anew in options else run_dir
    assert (losses(done) == losses(whole)) == (start != "init"), "a run from other weights is another"


def test_a_checkpoint_that_goes_away_as_a_run_starts_leaves_no_run_without_weights(folder: Path, whole: Path, capsys: Capture,
                                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, recipe = finished(folder, whole, "gone")
    will_load = resume.will_load_weights

    def gone(*arguments: Any) -> bool:
        found = will_load(*arguments)
        shutil.rmtree(run_dir / "checkpoints")
        return found

    monkeypatch.setattr("zaya.train.will_load_weights", gone)
    assert main([recipe]) == 7 and "the checkpoints that were there as the run started are gone" in capsys.readouterr().err


class KilledError(BaseException):
    """In place of SIGKILL."""


@pytest.mark.parametrize("later", ["on both tiers", "on the local tier", "on the shared tier"])
def test_a_start_that_goes_back_and_is_killed_loses_no_row(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch,
                                                           later: str) -> None:
    """Before any change that it makes to the disk; and the start after that loses none either."""
    name = f"killed-back-{later.split()[-2]}"
    run_dir, recipe = finished(folder, whole, name, checkpoint__local_dir=str(folder / f"{name}-fast"))
    for step in (4, 6) if "local" in later else ():
        shutil.rmtree(step_path(run_dir / "checkpoints", step))
    settings = load_recipe(Path(recipe), [f"--checkpoint.resume={step_path(run_dir / 'checkpoints', 2)}"])
    local = Tiers.of(settings).local
    assert local is not None
    shutil.copytree(whole / "checkpoints", local)
    for step in (2, 4, 6) if "shared" in later else ():
        shutil.rmtree(step_path(local, step))
    for path in (run_dir, local.parent):
        shutil.copytree(path, folder / "backup" / name / path.name)
    mesh = open_mesh("cpu", Layout(1))
    trainer = Trainer(settings, mesh, open_data(settings, mesh))
    trainer.restore()
    monkeypatch.setattr("zaya.train.start_logging", lambda *_: None)

    def start(kill_at: int) -> bool:
        """Whether it came so far."""
        trainer.saver, calls = None, itertools.count()

        def counted(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == kill_at:
                    raise KilledError
                return original(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, function in ((os, "mkdir"), (os, "rename"), (os, "replace"), (MetricsWriter, "cut")):
                patch.setattr(owner, function, counted(getattr(owner, function)))
            try:
                record = open_run(trainer)
            except KilledError:
                return True
        assert record is not None
        record.close()
        return False

    def kept() -> set[int]:
        records = [run_dir / "metrics.jsonl", *run_dir.glob("set-aside-*/metrics.jsonl")]
        return {row["step"] for record in records for row in read_rows(record)[0]}

    for kill_at in itertools.count():
        for path in (run_dir, local.parent):
            shutil.rmtree(path)
            shutil.copytree(folder / "backup" / name / path.name, path)
        was_killed = start(kill_at)
        gc.collect()  # as the end of its process, this closes the record
        assert kept() == {1, 2, 3, 4, 5, 6}, f"killed before change {kill_at}"
        assert not start(-1) and kept() == {1, 2, 3, 4, 5, 6}, f"after a kill before change {kill_at}"
        assert complete_steps(run_dir / "checkpoints") == [2] and not complete_steps(local) and len(losses(run_dir)) == 2
        if not was_killed:
            break
    assert kill_at > 6


@pytest.mark.parametrize("what", ["the record's copy", "a new recipe.toml", "a checkpoint of the shared tier",
                                  "a checkpoint of the local tier"])
def test_going_back_on_a_full_disk_is_refused_and_costs_nothing(folder: Path, whole: Path, capsys: Capture,
                                                                monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name = f"full-{what.split()[-2]}"
    options = {"checkpoint__local_dir": str(folder / f"{name}-fast")} if "local" in what else {}
    run_dir, recipe = finished(folder, whole, name, **options)
    record = (run_dir / "metrics.jsonl").read_bytes()
    if local := Tiers.of(load_recipe(Path(recipe), [])).local:
        shutil.copytree(whole / "checkpoints", local)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if "record" in what:
        monkeypatch.setattr(shutil, "copyfileobj", full)
    elif "recipe" in what:
        monkeypatch.setattr("zaya.train.replace_text", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    capsys.readouterr()
    arguments = [recipe, f"--checkpoint.resume={step_path(run_dir / 'checkpoints', 2)}", "--train.steps=3"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert (str(run_dir) if "recipe" in what else "set-aside-") in message and "No space left on device" in message
    assert message.count("\n") == 1 and "None" not in message
    assert (run_dir / "metrics.jsonl").read_bytes() == record and complete_steps(run_dir / "checkpoints") == [2, 4, 6]
    assert bool(list(run_dir.glob("set-aside-*"))) == ("record" not in what)
    monkeypatch.undo()
    gc.collect()
    assert main(arguments) == 0 and len(losses(run_dir)) == 3
    assert any(len(read_rows(copy)[0]) == 6 for copy in run_dir.glob("set-aside-*/metrics.jsonl"))


def test_a_half_loaded_checkpoint_leaves_nothing_in_a_tensor_that_may_be_missing(folder: Path, whole: Path, capsys: Capture,
                                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The older one lacks it, so it keeps its initial value: not that of the newer one, which was read before the damage was met."""
    monkeypatch.setattr("zaya.resume.SMALL_BYTES", 0)
    run_dir, recipe = finished(folder, whole, "half", checkpoint__allow_missing=["optim.momentum.*"])
    newer, older = (step_path(run_dir / "checkpoints", step) for step in (6, 4))
    manifest = Checkpoint.open(newer).manifest
    (run_dir / "checkpoints/step-00000002").rename(run_dir / "elsewhere")
    # The damage comes last of all that is read.
    last = max(name for name in manifest.tensors if name.startswith("optim.") and "final_norm" in name)
    with CheckpointWriter(folder / "older", recipe=Checkpoint.open(older).manifest.recipe) as writer:
        for name in manifest.tensors:
            if not name.startswith("optim.momentum."):
                writer.add(name, Checkpoint.open(older).read(name))
    body = dataclasses.replace(Checkpoint.open(folder / "older").manifest, step=4, position=32)
    (folder / "older/manifest.json").write_text(body.to_json())
    shutil.rmtree(older)
    (folder / "older").rename(older)
    box = manifest.tensors[last].boxes[0]
    begin, _ = Checkpoint.open(newer)._range(box)
    content = bytearray((newer / box.file).read_bytes())
    content[begin] ^= 1
    (newer / box.file).write_bytes(content)
    settings = load_recipe(Path(recipe), [])
    mesh = open_mesh("cpu", Layout(1))
    trainer = Trainer(settings, mesh, open_data(settings, mesh))
    initial = {name: tensor.clone() for name, tensor in tiny.state(trainer).items() if name.startswith("optim.momentum.")}
    trainer.restore()
    assert trainer.step == 4 and "keep their initial values" in trainer.origin and last in trainer.skipped[0] and initial
    after = tiny.state(trainer)
    assert all(torch.equal(after[name], tensor) for name, tensor in initial.items())


def test_a_signal_in_the_last_step_finishes_the_run(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def last(self: Trainer, votes: Sequence[float] = (0, 0)) -> StepResult:
        result = step(self, votes)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Trainer, "train_step", last)
    recipe = written(tiny.recipe(folder, checkpoint__interval=4, run__dir=str(folder / "last")), "last")
    assert main([str(recipe)]) == 0
    assert losses(folder / "last") == losses(whole) and complete_steps(folder / "last/checkpoints") == [4, 6]


@pytest.mark.parametrize("bring", [lambda self, step: threading.Event().wait(), lambda self, step: setattr(self, "_done", step)],
                         ids=["slow mirror", "mirror gave up"])
def test_a_signal_in_the_last_step_leaves_no_checkpoint_on_the_local_tier_alone_unsaid(
        folder: Path, monkeypatch: pytest.MonkeyPatch, bring: Callable[[Mirror, int], None], request: pytest.FixtureRequest) -> None:
    """The mirror is not waited for, so the run is not finished: exit code 3, and the next start mirrors it. A second signal is ignored."""
    step, close, run_dir = Trainer.train_step, MetricsWriter.close, folder / request.node.callspec.id

    def last(self: Trainer, votes: Sequence[float] = (0, 0)) -> StepResult:
        result = step(self, votes)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def again(self: MetricsWriter) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Trainer, "train_step", last)
    monkeypatch.setattr(MetricsWriter, "close", again)
    monkeypatch.setattr(Mirror, "_bring", bring)
    base = tiny.recipe(folder, checkpoint__interval=6, checkpoint__local_dir=str(folder / "fast4"), run__dir=str(run_dir))
    recipe = written(base, run_dir.name)
    assert main([str(recipe)]) == 3
    monkeypatch.undo()
    assert main([str(recipe)]) == 0 and complete_steps(run_dir / "checkpoints") == [6]


@pytest.mark.parametrize("finished", [False, True])
def test_a_signal_ends_the_wait_for_the_mirror(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, finished: bool) -> None:
    """Of a run's last steps, and of a start that finds it finished: soon, with what is not mirrored, and again for the next start."""
    sent: list[float] = []

    def stuck(self: Mirror, step: int) -> None:
        time.sleep(1)  # the training is over and waits
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

    run_dir = folder / f"waiting-{finished}"
    base = tiny.recipe(folder, checkpoint__interval=6, checkpoint__local_dir=str(folder / "fast5"), run__dir=str(run_dir))
    recipe, local = str(written(base, run_dir.name)), Tiers.of(base).local
    assert local is not None
    if finished:
        assert main([recipe]) == 0
        shutil.rmtree(step_path(run_dir / "checkpoints", 6))
    monkeypatch.setattr(Mirror, "_bring", stuck)
    capsys.readouterr()
    assert main([recipe]) == 3
    assert time.monotonic() - sent[0] < 1
    out, err = capsys.readouterr()
    assert f"step 6 | not mirrored yet: it is on the local tier only, {step_path(local, 6)}" in out
    assert err == "zaya.train: SIGTERM: saved at step 6; start it again to go on\n"
    monkeypatch.undo()
    assert main([recipe]) == 0 and complete_steps(run_dir / "checkpoints") == [6]


def test_a_directory_that_holds_another_step_is_passed_over(folder: Path, whole: Path, capsys: Capture) -> None:
    run_dir, recipe = finished(folder, whole, "renamed", train__steps=7)
    shutil.copytree(step_path(run_dir / "checkpoints", 2), step_path(run_dir / "checkpoints", 8))
    assert main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "passed over the checkpoint of step 8:" in out and "holds a checkpoint of step 2" in out and "at step 6" in out


def test_starting_over_keeps_the_record(folder: Path, whole: Path) -> None:
    run_dir, recipe = finished(folder, whole, "over")
    shutil.rmtree(run_dir / "checkpoints")
    assert main([str(recipe)]) == 0
    assert losses(run_dir) == losses(whole) and len(read_rows(run_dir / "set-aside-1/metrics.jsonl")[0]) == 6


def test_a_record_that_cannot_be_written_waits_in_memory(folder: Path, whole: Path, capsys: Capture,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the checkpoint that follows its rows: it is tried again once they are on the disk."""
    write, calls = MetricsWriter._write, iter(range(1000))

    def full(self: MetricsWriter) -> None:
        if 1 <= next(calls) <= 3:  # the rows of steps 2 and 3, and the sync of the save between them
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self)

    monkeypatch.setattr(MetricsWriter, "_write", full)
    monkeypatch.setattr("zaya.checkpoint.saver.PAUSE_S", 0.01)
    recipe = written(tiny.recipe(folder, checkpoint__interval=2, run__dir=str(folder / "unwritten")), "unwritten")
    assert main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "metrics.jsonl cannot be written (No space left on device): its rows wait in memory" in out
    assert losses(folder / "unwritten") == losses(whole) and complete_steps(folder / "unwritten/checkpoints")[-1] == 6


def test_a_full_disk_does_not_stop_training(folder: Path, whole: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = folder / "full"
    sync, failing = os.fsync, iter([True] * 1)

    def fsync(fd: int) -> None:
        if "safetensors" in os.readlink(f"/proc/self/fd/{fd}") and next(failing, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("zaya.checkpoint.saver.PAUSE_S", 0.01)
    recipe = written(tiny.recipe(folder, checkpoint__interval=2, run__dir=str(run_dir)), "full")
    assert main([str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "step 2 | SAVE FAILED: " in out and "No space left on device" in out
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    assert rows[1]["failed_saves"] == 0 and rows[-1]["failed_saves"] == 1
    steps = complete_steps(run_dir / "checkpoints")
    assert 2 not in steps and steps[-1] == 6 and (3 in steps or 4 in steps), "tried again before or at the next that was due"
    assert losses(run_dir) == losses(whole)


def test_a_last_state_that_cannot_be_saved_is_exit_code_1(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        if "safetensors" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("zaya.checkpoint.saver.PAUSE_S", 0.01)
    recipe = written(tiny.recipe(folder, checkpoint__interval=6, run__dir=str(folder / "unsaved")), "unsaved")
    assert main([str(recipe)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "the state of step 6 could not be saved" in message and "Read-only file system" in message
    assert len(losses(folder / "unsaved")) == 6 and not complete_steps(folder / "unsaved/checkpoints")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_preemption_saves_and_exits_3(folder: Path, whole: Path, terminal: None, number: signal.Signals) -> None:
    run_dir = folder / number.name
    recipe = written(tiny.recipe(folder, checkpoint__interval=100, run__dir=str(run_dir)), number.name)
    command = [sys.executable, "-c", SLOW_STEPS, str(recipe)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    record = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_bytes().count(b'"loss"') >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    began = time.monotonic()
    job.send_signal(number)
    time.sleep(0.1)
    job.send_signal(number)  # a launcher may pass on what the terminal has sent its processes already
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 3 and time.monotonic() - began < 10, stderr
    line = next(line for line in stderr.splitlines() if line.startswith("zaya.train"))
    step = int(re.fullmatch(rf"zaya\.train: {number.name}: saved at step (\d+); start it again to go on", line)[1])  # type: ignore[index]
    assert complete_steps(run_dir / "checkpoints") == [step] and 3 <= step < 6 and len(losses(run_dir)) == step
    assert main([str(recipe)]) == 0
    assert losses(run_dir) == losses(whole), "evaluations included, one of which the preemption left out"
    assert same_state(step_path(run_dir / "checkpoints", 6), step_path(whole / "checkpoints", 6))


SLOW_STEPS = """
import sys, time
from zaya import train, trainer
step = trainer.Trainer.train_step
def slow(self, votes=(0, 0)):
    time.sleep(0.4)
    return step(self, votes)
trainer.Trainer.train_step = slow
sys.exit(train.main(sys.argv[1:]))
"""


AS_A_PROGRAM = SLOW_STEPS.replace("sys.exit(train.main(sys.argv[1:]))", "import runpy; runpy.run_module('zaya.train', run_name='__main__')")


def test_lines_that_nobody_can_write_change_nothing(folder: Path, whole: Path) -> None:
    """The disk of stdout, stderr and the log file is full: the run goes on, saves at a signal, exits with 3 and goes on again."""
    run_dir = folder / "unheard"
    recipe = written(tiny.recipe(folder, checkpoint__interval=100, run__dir=str(run_dir)), "unheard")
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs/rank-0.log").symlink_to("/dev/full")
    with open("/dev/full", "w") as full:
        job = subprocess.Popen([sys.executable, "-c", AS_A_PROGRAM, str(recipe)], stdout=full, stderr=full, cwd=ROOT)
        record = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (record.exists() and record.read_bytes().count(b'"loss"') >= 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        job.terminate()
        assert job.wait(timeout=60) == 3 and len(complete_steps(run_dir / "checkpoints")) == 1
        assert subprocess.run([sys.executable, "-m", "zaya.train", str(recipe)], stdout=full, stderr=full, cwd=ROOT).returncode == 0
        assert losses(run_dir) == losses(whole)
        bad = subprocess.run([sys.executable, "-m", "zaya.train", str(recipe), "--train.steps=x"], stdout=full, stderr=full, cwd=ROOT)
        assert bad.returncode == 2


def test_closed_outputs_change_nothing(folder: Path, whole: Path) -> None:
    """Whatever is opened next would get their numbers."""
    recipe = written(tiny.recipe(folder, checkpoint__interval=2, run__dir=str(folder / "closed")), "closed")
    command = f"exec {sys.executable} -m zaya.train {recipe} >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0
    assert losses(folder / "closed") == losses(whole)


def test_that_a_log_cannot_be_written_is_said_once(folder: Path) -> None:
    recipe = written(tiny.recipe(folder, run__dir=str(folder / "told")), "told")
    with open("/dev/full", "w") as full:
        job = subprocess.run([sys.executable, "-m", "zaya.train", str(recipe)], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    line = "zaya.train: cannot write log lines to stdout: No space left on device; the training goes on without them\n"
    assert (job.returncode, job.stderr) == (0, line)


def test_a_run_that_never_saves_ends_by_its_signal(folder: Path) -> None:
    recipe = written(tiny.recipe(folder, train__steps=1000, run__dir=str(folder / "never")), "never")
    job = subprocess.Popen([sys.executable, "-c", SLOW_STEPS, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    record = folder / "never/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    job.communicate(timeout=30)
    assert job.returncode == -signal.SIGTERM


def test_a_second_ctrl_c_ends_a_run_at_once(folder: Path, terminal: None) -> None:
    """Where the step under way would take a minute."""
    recipe = written(tiny.recipe(folder, train__steps=1000, checkpoint__interval=100, run__dir=str(folder / "twice")), "twice")
    script = AS_A_PROGRAM.replace("time.sleep(0.4)", "time.sleep(60 if self.step else 0)")
    job = subprocess.Popen([sys.executable, "-c", script, str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    record = folder / "twice/metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (record.exists() and record.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    time.sleep(AGAIN_S + 0.2)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=20)
    assert job.returncode == 130 and stderr.splitlines()[-1] == "zaya.train: interrupted" and "Traceback" not in stderr


def test_a_ctrl_c_that_is_passed_on_is_no_second_one(terminal: None) -> None:
    """Also where this rank has learnt of the first from another."""
    with Preemption() as preemption:
        preemption.learn()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        except KeyboardInterrupt:
            pytest.fail("taken for a second one")
        assert preemption.signal == "a signal to another rank"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_before_the_first_step_is_one_line(folder: Path, terminal: None) -> None:
    recipe = written(tiny.recipe(folder, run__dir=str(folder / "early")), "early")
    script = ("import zaya.parallel.mesh as mesh, os, runpy, signal\n"
              "mesh.open_mesh = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
              "runpy.run_module('zaya.train', run_name='__main__')")
    job = subprocess.run([sys.executable, "-c", script, str(recipe)], capture_output=True, text=True, cwd=ROOT)
    assert (job.returncode, job.stderr.splitlines()[-1]) == (130, "zaya.train: interrupted") and "Traceback" not in job.stderr
