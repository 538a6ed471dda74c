"""DeepSpeed's universal checkpoints without DeepSpeed: there and back bit for bit, one tensor in memory, nothing of a pickle run, one line
for whatever is wrong. With DeepSpeed itself: tests/dist/test_universal.py."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tools import export_deepspeed, import_deepspeed
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.universal import read_pt
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import Recipe, recipe_from_tables
from zaya.plan import plan

STEP, SKIPPED = 5, 1
EXPERT = "blocks.1.moe.experts.gate_up"
VECTOR = "final_norm.weight"


def make_recipe(dtype: str = "fp32", **model: int) -> Recipe:
    return recipe_from_tables({
        "model": dict(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4,
                      moe_intermediate_size=12, router_hidden_size=8) | model,
        "data": dict(train=["corpus"], valid="corpus"), "optim": dict(name="adamw", lr=1e-3, min_lr=1e-4, warmup_steps=2, balance_lr=1e-2),
        "train": dict(steps=20, global_batch_size=8, micro_batch_size=2, seq_len=24, seed=1, dtype=dtype), "run": dict(dir="run"),
    })


def state_of(recipe: Recipe) -> dict[str, Tensor]:
    """Everything a run of AdamW keeps, nothing at its initial value."""
    random = torch.Generator().manual_seed(1)
    state: dict[str, Tensor] = {}
    for name, row in plan(recipe.model).items():
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            state[f"optim.{kind}.{name}"] = torch.randn(row.shape, generator=random)
        master = state[f"optim.master.{name}"]
        state[f"model.{name}"] = master.bfloat16() if recipe.train.dtype == "bf16" else state.pop(f"optim.master.{name}")
    for name, like in import_deepspeed.small_state(recipe).items():
        state[name] = torch.rand(like.shape, generator=random).to(like.dtype)
    return state | {"optim.step": torch.tensor(float(STEP - SKIPPED))}


def write(path: Path, recipe: Recipe, state: dict[str, Tensor]) -> Path:
    with CheckpointWriter(path, recipe=dataclasses.asdict(recipe), step=STEP, position=STEP * 8 + 3, tokens=1234,
                          tokens_by_corpus={"corpus": 1234}, hf_config={"eos_token_id": [1, 106]}) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
    return path


def write_recipe(folder: Path, recipe: Recipe) -> Path:
    (folder / "recipe.toml").write_text(recipe.to_toml())
    return folder / "recipe.toml"


def run_import(source: Path, target: Path, recipe: Path) -> int:
    return import_deepspeed.main([str(source), str(target), "--recipe", str(recipe)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_then_import_is_the_same_checkpoint(dtype: str, tmp_path: Path) -> None:
    recipe = make_recipe(dtype)
    state = state_of(recipe)
    write(tmp_path / "run/checkpoints/step-00000005", recipe, state)
    assert export_deepspeed.main([str(tmp_path / "run"), str(tmp_path / "universal")]) == 0
    assert run_import(tmp_path / "universal", tmp_path / "again", write_recipe(tmp_path, recipe)) == 0
    before, after = Checkpoint.find(tmp_path / "run"), Checkpoint.open(tmp_path / "again")
    assert after.manifest.tensors.keys() == state.keys() and f"optim.exp_avg.{EXPERT}" in state
    for name, tensor in state.items():
        assert after.read(name).dtype == tensor.dtype and torch.equal(after.read(name), tensor), name
    ours, theirs = (dataclasses.replace(c.manifest, tensors={}, files={}) for c in (before, after))
    assert ours == theirs


def test_export_is_what_deepspeed_reads(tmp_path: Path) -> None:
    """Names of files and keys as its loader of universal checkpoints wants them; every file holds its one tensor and no more."""
    recipe = make_recipe()
    state = state_of(recipe)
    write(tmp_path / "checkpoint", recipe, state)
    assert export_deepspeed.main([str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / (tmp_path / "out/latest_universal").read_text()
    assert {path.name for path in folder.iterdir()} == {"zero", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"}
    assert {path.name for path in (folder / "zero").iterdir()} == {*plan(recipe.model), "optimizer_state.pt"}
    for name, row in plan(recipe.model).items():
        files = {path.name: path for path in (folder / "zero" / name).iterdir()}
        assert files.keys() == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}
        assert torch.equal(torch.load(files["fp32.pt"])["param"], state[f"model.{name}"])
        assert torch.load(files["step.pt"]) == STEP - SKIPPED and files["exp_avg.pt"].stat().st_size < row.numel * 4 + 2000
    optimizer = torch.load(folder / "zero/optimizer_state.pt")
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [recipe.optim.weight_decay, 0.0]
    model = torch.load(folder / "mp_rank_00_model_states.pt")
    assert (model["global_steps"], model["skipped_steps"], model["zaya"]["position"]) == (STEP, SKIPPED, STEP * 8 + 3)
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    assert shapes == {name: row.shape for name, row in plan(recipe.model).items()}


MEMORY = """
import sys
from tools import export_deepspeed, import_deepspeed
def peak():  # of this process alone; getrusage would inherit the parent's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
start = peak()
assert export_deepspeed.main([sys.argv[1], sys.argv[2]]) == 0
exported = peak()
assert import_deepspeed.main([sys.argv[2], sys.argv[3], "--recipe", sys.argv[4]]) == 0
print(exported - start, peak() - start)
"""


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    recipe = make_recipe(hidden_size=256, num_layers=14, moe_intermediate_size=256)
    state = state_of(recipe)
    size, largest = sum(t.nbytes for t in state.values()), max(t.nbytes for t in state.values())
    assert size > 100e6 > 40 * largest
    paths = [write(tmp_path / "checkpoint", recipe, state), tmp_path / "universal", tmp_path / "again", write_recipe(tmp_path, recipe)]
    run = subprocess.run([sys.executable, "-c", MEMORY, *map(str, paths)], capture_output=True, text=True, timeout=120, check=True)
    exported, both = map(int, run.stdout.splitlines()[-1].split())
    # malloc keeps holes of up to 32 MB each (its largest threshold) of what was freed
    assert both < 80e6, f"export took {exported / 1e6:.0f} MB, both {both / 1e6:.0f} MB for a state of {size / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------------------------- pickles


class Bomb:
    """Loaded by an unrestricted reader it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("file", ["zero/blocks.1.moe.experts.gate_up/exp_avg.pt", "zero/final_norm.weight/step.pt",
                                  "mp_rank_00_model_states.pt"])
def test_a_malicious_pickle_is_refused_and_not_run(file: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good, tmp_path / "bad")
    path = tmp_path / "bad/global_step5_universal" / file
    marker = tmp_path / "it ran"
    torch.save({"param": Bomb(tmp_path / "it\\ ran")}, path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the bomb is none"
    marker.unlink()
    assert_refused(run_import(tmp_path / "bad", tmp_path / "new", good.parent / "recipe.toml"), capsys, f"{path} is a pickle that asks for "
                   "posix.system; only tensors and plain values are read", tmp_path / "new")
    assert not marker.exists()


def test_a_pickle_that_is_no_zip_is_not_run_either(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="x.pt is not a file of torch.save"):
        read_pt(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_classes_that_deepspeed_leaves_become_inert(tmp_path: Path) -> None:
    """Its loss scaler sits in optimizer_state.pt of every run; it is not imported for it."""
    module = type(sys)("deepspeed.runtime.fp16.loss_scaler")
    scaler = type("LossScaler", (), {"__module__": module.__name__, "danger": lambda self: 1})
    module.LossScaler = scaler  # type: ignore[attr-defined]
    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", module.__name__]
    kept = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: module for name in names})
    try:
        value = scaler()
        value.cur_scale = 8.0
        torch.save({"loss_scaler": value, "param_groups": [{"step": 4}]}, tmp_path / "optimizer_state.pt")
    finally:
        for name, before in kept.items():
            sys.modules.pop(name) if before is None else sys.modules.update({name: before})
    loaded = read_pt(tmp_path / "optimizer_state.pt")
    assert type(loaded["loss_scaler"]).__module__ == "zaya.checkpoint.universal" and not hasattr(loaded["loss_scaler"], "danger")
    assert loaded["loss_scaler"].cur_scale == 8.0 and loaded["param_groups"][0]["step"] == 4


# ------------------------------------------------------------------------------------------------------------------------- bad input


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], words: str, target: Path) -> None:
    """Exit code 2, one line on stderr that holds the words, nothing at the target nor beside it."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith(("tools.export_deepspeed: ", "tools.import_deepspeed: ")), lines
    assert words in lines[0]
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A universal checkpoint; the recipe lies beside it."""
    folder = tmp_path_factory.mktemp("good")
    recipe = make_recipe()
    write_recipe(folder, recipe)
    write(folder / "checkpoint", recipe, state_of(recipe))
    assert export_deepspeed.main([str(folder / "checkpoint"), str(folder / "universal")]) == 0
    return folder / "universal"


def save_over(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        value = torch.load(path / file)
        torch.save(change(value), path / file)

    return edit


def param(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda value: {"param": change(value["param"])}


def flip(file: str) -> Callable[[Path], None]:
    """One bit of the tensor, the last record but a few of the archive."""
    def edit(path: Path) -> None:
        with zipfile.ZipFile(path / file) as archive:
            info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
        data = bytearray((path / file).read_bytes())
        at = data.index(info.filename.encode(), info.header_offset) + len(info.filename)
        at += int.from_bytes(data[info.header_offset + 28:info.header_offset + 30], "little")
        data[at] ^= 1
        (path / file).write_bytes(data)

    return edit


def client(**changes: Any) -> Callable[[Any], Any]:
    return lambda value: value | {"zaya": {**value["zaya"], **changes}}


def without(name: str) -> Callable[[Any], Any]:
    return lambda value: value | {"zaya": value["zaya"] | {"tensors": {k: v for k, v in value["zaya"]["tensors"].items() if k != name}}}


MODEL = "mp_rank_00_model_states.pt"
BIAS = "blocks.0.moe.router.balance_bias"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no parameter": (lambda path: shutil.rmtree(path / "zero" / EXPERT), f"has no parameter {EXPERT}"),
    "no moment": (lambda path: (path / "zero" / EXPERT / "exp_avg.pt").unlink(), f"{EXPERT} has no exp_avg.pt; AdamW cannot go on without"),
    "no master": (lambda path: (path / "zero" / VECTOR / "fp32.pt").unlink(), f"{VECTOR} has no fp32.pt"),
    "one more parameter": (lambda path: (path / "zero/lora").mkdir(), "has the unexpected parameter lora"),
    "one more state": (lambda path: (path / "zero" / VECTOR / "max_exp_avg_sq.pt").touch(), "max_exp_avg_sq.pt is no state of AdamW"),
    "wrong shape": (save_over(f"zero/{VECTOR}/exp_avg.pt", param(lambda t: t[:-1].clone())), "has shape [15], the recipe asks for [16]"),
    "transposed": (save_over(f"zero/{EXPERT}/fp32.pt", param(lambda t: t.mT.contiguous())), "has shape [4, 16, 24], the recipe asks for"),
    "flat in a dict": (save_over(f"zero/{EXPERT}/fp32.pt", param(lambda t: t.flatten())), "has shape [1536], the recipe asks for"),
    "narrow": (save_over(f"zero/{VECTOR}/fp32.pt", param(lambda t: t.bfloat16())), "is torch.bfloat16; DeepSpeed keeps"),
    "no tensor": (save_over(f"zero/{VECTOR}/fp32.pt", param(lambda t: "tensor")), "fp32.pt holds no tensor"),
    "a list": (save_over(f"zero/{VECTOR}/fp32.pt", lambda value: [1]), "fp32.pt holds list where a dict belongs"),
    "cut short": (lambda path: os.truncate(path / "zero" / EXPERT / "fp32.pt", 3000), "is not a file of torch.save, or damaged"),
    "empty": (lambda path: os.truncate(path / "zero" / EXPERT / "fp32.pt", 0), "is not a file of torch.save, or damaged"),
    "a flipped bit": (flip(f"zero/{EXPERT}/exp_avg_sq.pt"), "exp_avg_sq.pt is damaged: its part "),
    "two counters": (save_over(f"zero/{VECTOR}/step.pt", lambda step: step + 1), "says step 5, "),
    "half the counters": (lambda path: (path / "zero" / VECTOR / "step.pt").unlink(), f"{VECTOR} has no step.pt, but "),
    "no whole counter": (save_over("zero/embedding.weight/step.pt", lambda step: 1.5), "counts steps with '1.5'"),
    "no counters": (save_over(MODEL, lambda value: {"module": {}}), "has no global_steps; it is not DeepSpeed's"),
    "no model states": (lambda path: list(map(Path.unlink, path.glob("*.pt"))), f"has no {MODEL}"),
    "another step's client state": (save_over(MODEL, client(step=4)), "client_state['zaya'] is of step 4, the checkpoint of step 5"),
    "client state no dict": (save_over(MODEL, lambda value: value | {"zaya": 3}), "client_state['zaya'] is int, not a dict"),
    "client step no number": (save_over(MODEL, client(step=torch.ones(2))), "is of step tensor([1., 1.])"),
    "position no number": (save_over(MODEL, client(position="3")), "client_state['zaya']['position'] = 3 is not an integer"),
    "tensors no dict": (save_over(MODEL, client(tensors=[])), "client_state['zaya']['tensors'] is list, not a dict"),
    "config with a tensor": (save_over(MODEL, client(hf_config={"a": torch.ones(1)})), "client_state['zaya']['hf_config'] is not a dict"),
    "no balance": (save_over(MODEL, without("optim.balance.exp_avg")), "has no optim.balance.exp_avg in client_state['zaya']['tensors']"),
    "no client state": (save_over(MODEL, lambda value: {k: v for k, v in value.items() if k != "zaya"}), "has no optim.balance.exp_avg in"),
    "stale bias": (save_over(MODEL, lambda value: value | {"module": {k: v + 1 for k, v in value["module"].items()}}),
                   f"model.{BIAS} is one tensor in the module and another in client_state"),
    "misshapen bias": (save_over(MODEL, lambda value: value | {"module": {k: v[1:] for k, v in value["module"].items()}}),
                       f"model.{BIAS} is torch.float32 of shape [4], the recipe asks for"),
    "unknown tensor": (save_over(MODEL, client(tensors={"optim.new": torch.ones(1)})), "has the unexpected tensor optim.new"),
}


@pytest.mark.parametrize("case", BAD)
def test_import_refuses(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = BAD[case]
    shutil.copytree(good, tmp_path / "bad")
    spoil(tmp_path / "bad/global_step5_universal")
    assert_refused(run_import(tmp_path / "bad", tmp_path / "new", good.parent / "recipe.toml"), capsys, words, tmp_path / "new")


@pytest.mark.parametrize(("change", "words"), [
    (lambda r: dataclasses.replace(r, optim=dataclasses.replace(r.optim, name="muon")), 'optim.name = "muon", but a universal checkpoint'),
    (lambda r: dataclasses.replace(r, train=dataclasses.replace(r.train, dtype="fp64")), 'train.dtype = "fp64", but DeepSpeed keeps'),
    (lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, num_layers=3)), "has no parameter blocks.2."),
    (lambda r: dataclasses.replace(r, model=dataclasses.replace(r.model, num_layers=1)), "has the unexpected parameter blocks.1."),
])
def test_import_refuses_a_recipe_of_another_run(change: Callable[[Recipe], Recipe], words: str, good: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, change(make_recipe()))
    assert_refused(run_import(good, tmp_path / "new", recipe), capsys, words, tmp_path / "new")


@pytest.mark.parametrize(("make", "words"), [
    (lambda path: path.mkdir(), "is not a universal checkpoint of DeepSpeed: it has neither zero/ nor latest_universal"),
    (lambda path: None, "is not a universal checkpoint of DeepSpeed"),
    (lambda path: (path.mkdir(), (path / "latest").write_text("global_step5")), "is an ordinary checkpoint of DeepSpeed; make it univ"),
    (lambda path: (path.mkdir(), (path / "latest_universal").write_text("../etc")), "names '../etc', which is not a universal checkpoint"),
])
def test_import_refuses_what_is_not_universal(make: Callable[[Path], Any], words: str, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "source")
    code = run_import(tmp_path / "source", tmp_path / "new", write_recipe(tmp_path, make_recipe()))
    assert_refused(code, capsys, words, tmp_path / "new")


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(("dtype", "change", "words"), [
    ("fp32", lambda state: state.update({f"optim.momentum.{EXPERT}": torch.ones(1)}), f"has optim.momentum.{EXPERT}: no optimizer of"),
    ("fp32", drop(f"optim.exp_avg.{EXPERT}"), f"has no tensor optim.exp_avg.{EXPERT}"),
    ("bf16", drop(f"optim.master.{EXPERT}"), f"has no tensor optim.master.{EXPERT}"),
    ("fp32", drop("optim.step"), "has no tensor optim.step, AdamW's counter"),
    ("fp32", lambda state: state.update({f"optim.exp_avg.{VECTOR}": torch.ones(3)}), "has shape [3], its recipe asks for [16]"),
    ("fp32", lambda state: state.update({f"model.{VECTOR}": torch.ones(16).double()}), f"model.{VECTOR} is F64; DeepSpeed keeps"),
    ("bf16", lambda state: state[f"model.{EXPERT}"].add_(1), f"model.{EXPERT} is not optim.master.{EXPERT} rounded"),
])
def test_export_refuses(dtype: str, change: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(dtype)
    state = state_of(recipe)
    change(state)
    write(tmp_path / "checkpoint", recipe, state)
    assert_refused(export_deepspeed.main([str(tmp_path / "checkpoint"), str(tmp_path / "new")]), capsys, words, tmp_path / "new")


def test_export_refuses_weights_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe()
    with CheckpointWriter(tmp_path / "checkpoint", recipe={"model": dataclasses.asdict(recipe.model)}) as writer:
        writer.add("model.embedding.weight", torch.ones(2))
    assert_refused(export_deepspeed.main([str(tmp_path / "checkpoint"), str(tmp_path / "new")]), capsys, "holds no run's state",
                   tmp_path / "new")
    assert export_deepspeed.main([str(tmp_path), str(tmp_path / "new")]) == 2
    assert "is neither a checkpoint" in capsys.readouterr().err


def test_both_tools_write_over_nothing(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("keep")
    assert export_deepspeed.main([str(good.parent / "checkpoint"), str(tmp_path / "full")]) == 2
    assert run_import(good, tmp_path / "full", good.parent / "recipe.toml") == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]
    assert all("exists and is not empty" in line for line in capsys.readouterr().err.splitlines())


def test_steps_are_counted_where_no_parameter_does(good: Path, tmp_path: Path) -> None:
    """An optimizer without a counter of its own: the steps that DeepSpeed did not skip; and no counters of rows: the recipe's batch."""
    shutil.copytree(good, tmp_path / "other")
    folder = tmp_path / "other/global_step5_universal"
    for file in folder.glob("zero/*/step.pt"):
        file.unlink()
    save_over("zero/optimizer_state.pt", lambda value: {"param_groups": value["param_groups"]})(folder)
    save_over(MODEL, lambda value: value | {"zaya": {"tensors": value["zaya"]["tensors"]}})(folder)
    assert run_import(tmp_path / "other", tmp_path / "new", good.parent / "recipe.toml") == 0
    checkpoint = Checkpoint.open(tmp_path / "new")
    assert checkpoint.read("optim.step") == STEP - SKIPPED
    assert (checkpoint.manifest.step, checkpoint.manifest.position, checkpoint.manifest.tokens) == (STEP, STEP * 8, STEP * 8 * 24)
    assert json.loads(checkpoint.manifest.to_json())["manifest"]["hf_config"] == {}


def test_steps_of_a_ramp_are_counted_by_its_batches(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train__batch_ramp=[2, 2, 12])
    source: Any = types.SimpleNamespace(step=4, path=tmp_path)
    assert import_deepspeed.counters(source, {}, recipe)["position"] == 2 + 2 + 4 + 6
