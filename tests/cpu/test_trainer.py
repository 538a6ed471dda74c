"""The loop on one process: bitwise repeatable, bitwise resumable, the same under accumulation and recomputation; bad input is one line."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import tiny
from zaya.checkpoint.errors import CheckpointError
from zaya.config import Recipe
from zaya.data.corpus import CorpusError
from zaya.metrics import read_rows
from zaya.parallel.mesh import open_mesh
from zaya.resilience.exits import read_records
from zaya.shard import Layout
from zaya.step import StepResult
from zaya.train import check_run_directory, main, open_run
from zaya.trainer import Trainer, open_data

TIMED = {"tokens_per_second", "step_time_s", "mfu", "saved_step", "save_stall_s", "save_time_s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def trainer(recipe: Recipe) -> Trainer:
    mesh = open_mesh("cpu", Layout(1))
    return Trainer(recipe, mesh, open_data(recipe, mesh))


def run(recipe: Recipe) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train to the end; the record without timings, and the final state."""
    check_run_directory(recipe)
    built = trainer(recipe)
    built.restore()
    built.fit(open_run(built))
    rows, evals = read_rows(Path(recipe.run.dir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows + evals], tiny.state(built)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_are_bitwise_equal_and_so_is_a_resumed_one(folder: Path, dtype: str) -> None:
    runs = [tiny.recipe(folder, train__dtype=dtype, checkpoint__interval=2, run__dir=str(folder / f"{dtype}-{i}")) for i in range(3)]
    rows, state = run(runs[0])
    rows_again, state_again = run(runs[1])
    assert rows == rows_again and equal(state, state_again)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    run(runs[2])
    (folder / f"{dtype}-2/checkpoints/step-00000006/manifest.json").unlink()  # as if killed in that save, after recording step 6
    rows_resumed, state_resumed = run(runs[2])
    assert rows_resumed == rows and equal(state_resumed, state)


def test_a_finished_run_does_nothing(folder: Path) -> None:
    recipe = tiny.recipe(folder, checkpoint__interval=3, run__dir=str(folder / "finished"))
    run(recipe)
    record = (folder / "finished" / "metrics.jsonl").read_bytes()
    run(recipe)
    assert (folder / "finished" / "metrics.jsonl").read_bytes() == record


@pytest.mark.parametrize("change", [{"train__micro_batch_size": 8}, {"train__micro_batch_size": 1}, {"train__recompute": "selective"},
                                    {"train__recompute": "full"}])
def test_accumulation_and_recomputation_change_no_result(folder: Path, change: dict[str, object]) -> None:
    """fp64: 1e-10 on losses; routing counts, and so the balance biases, identical: recomputation counts no token twice."""
    base = tiny.recipe(folder, train__dtype="fp64")
    a, b = trainer(base), trainer(tiny.variant(base, **change))
    for _ in range(4):
        ours, theirs = a.train_step(), b.train_step()
        assert abs(ours.loss - theirs.loss) < 1e-10 and abs(ours.grad_norm - theirs.grad_norm) < 1e-10
        assert torch.equal(ours.shares_LE, theirs.shares_LE)
        assert ours.shares_LE.sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_loss_is_the_token_sum_over_the_global_count(folder: Path) -> None:
    built = trainer(tiny.recipe(folder, train__dtype="fp64"))
    batch = built.loader.batch(0, 8)
    logits = built.model.logits(built.model(batch.tokens_BT, batch.positions_BT).hidden_BTD)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=-100)
    assert (batch.labels_BT == -100).any(), "a batch without borders proves little"
    assert abs(built.train_step().loss - expected) < 1e-12


def test_training_learns_and_evaluation_changes_nothing(folder: Path) -> None:
    built = trainer(tiny.recipe(folder, train__steps=40))
    first = built.evaluate()
    before = {name: tensor.clone() for name, tensor in tiny.state(built).items()}
    assert built.evaluate() == first and equal(before, tiny.state(built))
    for _ in range(40):
        built.train_step()
    assert first == pytest.approx(math.log(tiny.VOCABULARY), abs=0.6) and built.evaluate() < first - 0.8


def test_a_poisoned_gradient_leaves_the_state_alone(folder: Path) -> None:
    built = trainer(tiny.recipe(folder))
    built.train_step()
    before = {name: tensor.clone() for name, tensor in tiny.state(built).items()}
    handle = built.model.final_norm.weight.register_hook(lambda gradient: gradient * math.nan)
    assert not built.train_step().committed
    assert equal(before, tiny.state(built))
    handle.remove()
    assert built.train_step().committed


def test_clipping_scales_the_gradient_and_reports_it_unclipped(folder: Path) -> None:
    clipped, free = (trainer(tiny.recipe(folder, optim__name="adamw", optim__clip=clip, train__dtype="fp64")) for clip in (1e-3, 0.0))
    norm, norm_free = clipped.train_step().grad_norm, free.train_step().grad_norm
    assert norm == norm_free > 1e-3
    name = "optim.exp_avg.blocks.0.attention.q.weight"
    assert torch.allclose(tiny.state(clipped)[name], tiny.state(free)[name] * 1e-3 / (norm + 1e-6), rtol=1e-6)


def test_weights_of_a_checkpoint_start_a_new_run(folder: Path) -> None:
    first = tiny.recipe(folder, checkpoint__interval=6, run__dir=str(folder / "source"))
    _, state = run(first)
    # As a later phase does: the run before is named, rows are longer, RoPE's base is another.
    second = trainer(tiny.recipe(folder, init__checkpoint=str(folder / "source"), run__dir=str(folder / "second"), model__rope_theta=1e6,
                                 train__seq_len=2 * tiny.SEQ_LEN))
    second.restore()
    tensors = tiny.state(second)
    assert second.step == 0 and all(torch.equal(tensors[name], state[name]) for name in tensors if name.startswith("model."))
    assert not tensors["optim.momentum.blocks.0.attention.q.weight"].any()


def test_a_checkpoint_of_another_dtype_or_model_resumes_or_says_why_not(folder: Path) -> None:
    _, state = run(tiny.recipe(folder, train__dtype="bf16", checkpoint__interval=6, run__dir=str(folder / "low")))
    path = folder / "low/checkpoints/step-00000006"
    wide = trainer(tiny.recipe(folder, train__dtype="fp32"))
    wide.load(path)
    name = "blocks.0.attention.q.weight"
    assert torch.equal(tiny.state(wide)[f"model.{name}"], state[f"optim.master.{name}"]), "a wide run takes the master weights"
    with pytest.raises(ValueError, match=r"has no tensor model\.blocks\.2"):
        trainer(tiny.recipe(folder, model__num_layers=3)).load(path)
    with pytest.raises(ValueError, match=r"has tensor model\.blocks\.1.* which this recipe's model or optimizer lacks"):
        trainer(tiny.recipe(folder, model__num_layers=1)).load(path)
    with pytest.raises(ValueError, match=r"has shape .* this recipe needs"):
        trainer(tiny.recipe(folder, model__moe_intermediate_size=32)).load(path)
    adamw = tiny.recipe(folder, optim__name="adamw", checkpoint__resume=str(path), checkpoint__allow_missing=["optim.exp_avg*"])
    with pytest.raises(ValueError, match=r"has tensor optim\.momentum\..* which this recipe's model or optimizer lacks"):
        trainer(adamw).restore()
    with pytest.raises(ValueError, match=r"has no tensor optim\.exp_avg.* or allow it in checkpoint\.allow_missing"):
        trainer(tiny.variant(adamw, checkpoint__allow_missing=["optim.momentum.*"])).restore()
    operated = trainer(tiny.variant(adamw, checkpoint__allow_missing=["optim.exp_avg*", "optim.momentum.*"]))
    operated.restore()
    assert operated.step == 6 and torch.equal(tiny.state(operated)[f"model.{name}"], state[f"optim.master.{name}"])


def errors(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    recipe = folder / "recipe.toml"
    recipe.write_text(tiny.recipe(folder, run__dir=str(folder / "bad")).to_toml())
    assert main([str(recipe), *overrides]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("zaya.train: ") and "\n" not in message, message
    assert not (folder / "bad").exists(), "a run that cannot start leaves nothing behind"
    return message


@pytest.mark.parametrize(("override", "says"), [
    ("--train.stepps=3", "did you mean 'train.steps'"), ("--train.steps=many", "must be an int"), ("--parallel.pp=2", "no pipeline"),
    ("--parallel.tp=2", "does not divide the 1 ranks"), ("--parallel.ep=3", "use ep = 1"),
    ("--parallel.engine=deepspeed", "does not support Muon"),
    ("--train.kernels=triton", "takes head dims"), ("--train.micro_batch_size=3", "does not divide"), ("--train.device=cuda", "no GPU"),
    ("--run.dir=/proc/nowhere", "cannot write run.dir"), ("--data.train=[\"/nowhere/x\"]", "/nowhere/x"), ("--model.vocab_size=50", "50"),
    ("--optim.eps=0", "above 0"), ("--model.hidden_size=99999999999999", "beyond any machine"),
    ("--data.tokenizer=/nowhere.json", "/nowhere"),
    ("--train.eval_rows=100000", "lower it"), ("--checkpoint.resume=/nowhere", "/nowhere"), ("--init.checkpoint=/nowhere", "/nowhere"),
])
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str], override: str, says: str) -> None:
    if override == "--train.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert says in errors(folder, capsys, override)


def test_a_directory_of_another_run_is_refused_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.recipe(folder, train__steps=1, run__dir=str(folder / "mine")))
    record = (folder / "mine/metrics.jsonl").read_bytes()
    message = errors(folder, capsys, f"--run.dir={folder / 'mine'}", "--optim.lr=0.5")
    assert "optim.lr" in message and "0.02" in message and "0.5" in message
    assert (folder / "mine/metrics.jsonl").read_bytes() == record


def test_without_its_recipe_a_directory_is_known_by_its_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "nameless"
    run(tiny.recipe(folder, train__steps=1, checkpoint__interval=1, run__dir=str(mine)))
    (mine / "recipe.toml").unlink()
    for resume in ("auto", "never"):
        message = errors(folder, capsys, f"--run.dir={mine}", "--optim.lr=0.5", f"--checkpoint.resume={resume}")
        assert "optim.lr = 0.02" in message and "0.5" in message
    check_run_directory(tiny.recipe(folder, run__dir=str(mine)))
    shutil.rmtree(mine / "checkpoints")
    assert "holds metrics.jsonl but no recipe.toml" in errors(folder, capsys, f"--run.dir={mine}")
    assert len(read_rows(mine / "metrics.jsonl")[0]) == 1


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000006", "logs", "."])
def test_a_file_in_a_directorys_place_is_noticed_first(folder: Path, capsys: pytest.CaptureFixture[str], name: str, resume: str) -> None:
    path = folder / "obstructed" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    message = errors(folder, capsys, f"--run.dir={folder / 'obstructed'}", "--checkpoint.interval=6", f"--checkpoint.resume={resume}")
    assert str(path) in message and "irectory" in message
    assert path.read_text() == ""
    assert not (folder / "obstructed/recipe.toml").exists() and not (folder / "obstructed/metrics.jsonl").exists()
    path.unlink()
    shutil.rmtree(folder / "obstructed", ignore_errors=True)


@pytest.mark.parametrize("raised", [ValueError("a bug"), CheckpointError("disk full"), CorpusError("corpus x holds token id 99")])
def test_a_bug_in_the_loop_is_no_bad_recipe(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                            raised: ValueError) -> None:
    def fit(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Trainer, "fit", fit)
    recipe = folder / "loop.toml"
    recipe.write_text(tiny.recipe(folder, run__dir=str(folder / f"loop-{type(raised).__name__}")).to_toml())
    code = main([str(recipe)])
    err = capsys.readouterr().err
    if type(raised) is ValueError:
        assert code == 1 and err.startswith("Traceback") and err.endswith("\nValueError: a bug\n") and ", in fit\n" in err
    else:
        assert code == (1 if isinstance(raised, CheckpointError) else 2) and err == f"zaya.train: {raised}\n"
    (record,) = read_records(folder / f"loop-{type(raised).__name__}/exit/0001")
    assert (record.code, record.step, record.at_fault) == (code, 0, (0,)) and record.cause.endswith(str(raised))


def test_a_run_that_updates_nothing_ends(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Trainer.train_step

    def broken_from_step_4(self: Trainer, votes: Sequence[float] = (0, 0)) -> StepResult:
        if self.step == 3:
            next(iter(self.model.parameters())).data.fill_(float("nan"))
        return train_step(self, votes)

    monkeypatch.setattr(Trainer, "train_step", broken_from_step_4)
    recipe = folder / "broken.toml"
    recipe.write_text(tiny.recipe(folder, train__steps=50, run__dir=str(folder / "broken")).to_toml())
    assert main([str(recipe)]) == 6
    line = "loss or gradient is not finite since step 4: 10 steps in a row have updated nothing"
    assert capsys.readouterr().err == f"zaya.train: {line}\n"
    (record,) = read_records(folder / "broken/exit/0001")
    assert (record.code, record.step, record.cause) == (6, 13, line) and "--checkpoint.resume=" in record.action
    rows, _ = read_rows(folder / "broken/metrics.jsonl")
    assert [row["committed"] for row in rows] == [True] * 3 + [False] * 10


def test_a_damaged_checkpoint_is_exit_code_7_and_nothing_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tiny.recipe(folder, checkpoint__interval=6, run__dir=str(folder / "damaged"))
    run(damaged)
    shard = next((folder / "damaged/checkpoints/step-00000006").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    record = (folder / "damaged/metrics.jsonl").read_bytes()
    recipe = folder / "damaged.toml"
    recipe.write_text(tiny.variant(damaged, train__steps=8).to_toml())
    assert main([str(recipe)]) == 7
    message = capsys.readouterr().err
    assert "does not match its hash" in message and message.count("\n") == 1
    assert (folder / "damaged/metrics.jsonl").read_bytes() == record


def test_another_runs_checkpoint_is_taken_but_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.recipe(folder, checkpoint__interval=6, run__dir=str(folder / "first")))
    other = tiny.recipe(folder, train__steps=8, train__seed=9, run__dir=str(folder / "second-phase"),
                        checkpoint__resume=str(folder / "first"))
    built = trainer(other)
    built.restore()
    assert built.step == 6 and built.origin.endswith("made by another recipe: train.seed was 3, is 9")
    recipe = folder / "second-phase.toml"
    recipe.write_text(other.to_toml())
    assert main([str(recipe)]) == 0
    assert "train.seed was 3, is 9" in capsys.readouterr().out
    # It has no checkpoint of its own: "auto" would silently start from new weights.
    recipe.write_text(tiny.variant(other, checkpoint__resume="auto").to_toml())
    assert main([str(recipe)]) == 2
    assert "has no checkpoint of its own yet" in capsys.readouterr().err
    recipe.write_text(tiny.variant(other, checkpoint__resume="sometimes").to_toml())
    assert main([str(recipe)]) == 2
    assert "checkpoint.resume = 'sometimes' is neither" in capsys.readouterr().err


def test_starting_over_sets_the_old_run_aside(folder: Path) -> None:
    old = tiny.recipe(folder, checkpoint__interval=2, run__dir=str(folder / "again"))
    rows, _ = run(old)
    run(tiny.variant(old, checkpoint__resume="never", checkpoint__keep=1, train__steps=4))
    names = sorted(path.name for path in (folder / "again/checkpoints").iterdir())
    assert names == ["step-00000004"], "the new run's checkpoint is kept, the old run's are not in its way"
    aside = folder / "again/set-aside-1"
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == [f"step-{n:08d}" for n in (2, 4, 6)]
    assert len(read_rows(aside / "metrics.jsonl")[0]) == 6 == len([row for row in rows if "loss" in row])


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank-0.log"])
def test_what_cannot_be_written_is_noticed_before_the_recipe_is(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    recipe = folder / "blocked.toml"
    recipe.write_text(tiny.recipe(folder, run__dir=str(folder / "blocked")).to_toml())
    (folder / "blocked" / name).mkdir(parents=True)
    assert main([str(recipe)]) == 2
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1
    assert not (folder / "blocked/recipe.toml").exists()
    shutil.rmtree(folder / "blocked")


def test_the_command_line_trains(folder: Path) -> None:
    recipe = folder / "command.toml"
    recipe.write_text(tiny.recipe(folder, train__steps=2, run__dir=str(folder / "command")).to_toml())
    done = subprocess.run([sys.executable, "-m", "zaya.train", str(recipe)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 2/2 | loss" in done.stdout and "Warning" not in done.stderr
    assert "step 2/2" in (folder / "command/logs/rank-0.log").read_text()


def test_torchrun_trains_on_two_processes_and_goes_on_with_one(folder: Path) -> None:
    recipe = folder / "torchrun.toml"
    recipe.write_text(tiny.recipe(folder, train__steps=2, checkpoint__interval=2, run__dir=str(folder / "torchrun")).to_toml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zaya.train", str(recipe)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "zaya.train", str(recipe), "--train.steps=4"]
    alone = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0 and "at step 2" in alone.stdout, alone.stderr
    rows, _ = read_rows(folder / "torchrun/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
