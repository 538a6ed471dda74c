"""Recipes: what is read is what was written, and every mistake gets one line that names the values and the fix."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from zaya import config
from zaya.config import Recipe, load_recipe, recipe_from_tables
from zaya.tables import apply_override, build_section, hints

ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "num_experts": 8,
              "moe_intermediate_size": 32, "router_hidden_size": 16},
    "data": {"train": ["corpora/a"], "valid": "corpora/b", "tokenizer": "corpora/tokenizer.json"},
    "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "seq_len": 48, "seed": 1},
    "optim": {"name": "muon", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
    "run": {"dir": "runs/x"},
}


def recipe(**changes: Any) -> Recipe:
    """The valid recipe with some keys changed: recipe(train__steps=3). A value of ... removes the key."""
    tables = copy.deepcopy(TABLES)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if value is ...:
            del tables[section][key]
        else:
            tables.setdefault(section, {})[key] = value
    return recipe_from_tables(tables)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe().to_toml())
    return path


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> None:
    assert "\n" not in str(caught.value)


def test_the_valid_recipe_is_valid() -> None:
    for world_size in (1, 2, 4):
        recipe().validate(world_size)


@pytest.mark.parametrize(("changes", "message"), [
    ({"train__step": 3}, "unknown recipe key 'train.step'; did you mean 'train.steps'?"),
    ({"model__num_expert": 3}, "unknown recipe key 'model.num_expert'; did you mean 'model.num_experts'?"),
    ({"optimizer__lr": 3}, "unknown section 'optimizer'; did you mean 'optim'?"),
    ({"train__steps": "20"}, "train.steps = '20' must be an int, not a str"),
    ({"train__steps": 20.0}, "train.steps = 20.0 must be an int, not a float"),
    ({"train__steps": True}, "train.steps = True must be an int, not a bool"),
    ({"optim__lr": "fast"}, "optim.lr = 'fast' must be a float, not a str"),
    ({"optim__lr": True}, "optim.lr = True must be a float, not a bool"),
    ({"optim__lr": float("nan")}, "optim.lr = nan is not finite"),
    ({"optim__lr": float("inf")}, "optim.lr = inf is not finite"),
    ({"model__skip_expert": 1}, "model.skip_expert = 1 must be a bool, not an int"),
    ({"data__train": "corpora/a"}, "data.train = 'corpora/a' must be a list of str"),
    ({"data__train": [1]}, "data.train[0] = 1 must be a str, not an int"),
    ({"data__weights": [True]}, "data.weights[0] = True must be a float, not a bool"),
    ({"train__seed": ...}, "recipe lacks train.seed"),
    ({"optim__lr": ..., "optim__name": ...}, "recipe lacks optim.name, optim.lr"),
])
def test_what_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipe(**changes)
    assert str(caught.value) == message


def test_a_section_that_is_a_value() -> None:
    with pytest.raises(ValueError, match=r"^train = 3 is not a section; write \[train\]$"):
        recipe_from_tables({**TABLES, "train": 3})


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    got = recipe(optim__lr=1, data__weights=[3]).optim.lr, recipe(data__weights=[3]).data.weights
    assert got == (1.0, (3.0,)) and isinstance(got[0], float) and isinstance(got[1][0], float)


# One row for every ValueError of the validators. The line names the values at odds and what to write instead.
INVALID: list[tuple[dict[str, Any], int, str]] = [
    *[({f"model__{key}": 0}, 1, f"model.{key} = 0 must be at least 1") for key in TABLES["model"]],
    *[({f"train__{key}": 0}, 1, f"train.{key} = 0 must be at least 1")
      for key in ("steps", "global_batch_size", "micro_batch_size", "seq_len", "eval_rows", "log_interval")],
    *[({f"parallel__{key}": 0}, 1, f"parallel.{key} = 0 must be at least 1") for key in ("tp", "cp", "ep", "pp")],
    *[({f"train__{key}": -1}, 1, f"train.{key} = -1 must be at least 0") for key in ("seed", "eval_interval")],
    *[({f"checkpoint__{key}": -1}, 1, f"checkpoint.{key} = -1 must be at least 0") for key in ("interval", "keep")],
    *[({f"optim__{key}": -1}, 1, f"optim.{key} = -1 must be at least 0") for key in ("warmup_steps", "decay_steps")],
    *[({f"optim__{key}": -1.0}, 1, f"optim.{key} = -1.0 must be at least 0")
      for key in ("min_lr", "weight_decay", "clip", "balance_lr")],
    ({"optim__eps": 0.0}, 1, "optim.eps = 0.0 must be above 0"),
    *[({f"optim__{key}": value}, 1, f"optim.{key} = {value} is outside [0, 1)") for key in ("beta1", "beta2") for value in (-0.1, 1.0)],
    ({"optim__momentum": 1.0}, 1, "optim.momentum = 1.0 is outside [0, 1)"),
    *[({f"model__{key}": 0.0}, 1, f"model.{key} = 0.0 must be above 0")
      for key in ("rope_theta", "rope_theta_sliding", "init_std", "router_init_std")],
    ({"parallel__zero_size": -1}, 1, "parallel.zero_size = -1 must be at least 0"),
    ({"model__num_heads": 9}, 1, "model.num_heads = 9 is not a multiple of model.num_kv_heads = 2; use num_heads = 10"),
    ({"model__head_dim": 6}, 1, "model.head_dim = 6 is not a multiple of 4 (RoPE turns pairs in half of it); use 8"),
    ({"model__attention_pattern": []}, 1, 'model.attention_pattern is empty; use ["full"]'),
    ({"model__attention_pattern": ["local"]}, 1, "model.attention_pattern = 'local' is not one of 'full', 'sliding'"),
    ({"model__attention_pattern": ["full", "sliding"]}, 1,
     "model.attention_pattern has sliding blocks but model.sliding_window = 0; set it"),
    ({"model__temperature_init": -1e300}, 1, "model.temperature_init = -1e+300 is beyond fp32; keep it below 1e30"),
    ({"model__sliding_window": -4}, 1, "model.sliding_window = -4 must be at least 0"),
    ({"data__train": []}, 1, "data.train = [] names no corpus; name at least one prefix"),
    ({"data__weights": [1.0, 2.0]}, 1, "data.weights has 2 entries for 1 corpora in data.train; give one each"),
    ({"data__weights": [0.0]}, 1, "data.weights = 0.0 must be above 0"),
    ({"data__weights": [1e308]}, 1, "data.weights = 1e+308 is beyond any share; only their ratios count: use smaller ones"),
    ({"data__train": ["a", "b"], "data__weights": [1.0, 1e-5]}, 1, "corpus b has weight 1e-05 of 1.00001, less than one row in 4096"),
    ({"data__train": ["a", "b", "a"]}, 1, "data.train names corpus a 2 times; name it once and give it a larger share in data.weights"),
    *[({f"{section}__{key}": value}, 1, f"{section}.{key} = {text} holds control characters, or bytes that are no text; use others")
      for section, key, value, text in (("data", "train", ["a\0"], "'a\\x00'"), ("data", "valid", "a\n", "'a\\n'"),
                                        ("data", "tokenizer", "\udcff", "'\\udcff'"), ("checkpoint", "resume", "a\0", "'a\\x00'"),
                                        ("checkpoint", "local_dir", "a\0", "'a\\x00'"), ("run", "dir", "a\0", "'a\\x00'"),
                                        ("checkpoint", "allow_missing", ["\udcff"], "'\\udcff'"), ("init", "checkpoint", "\0", "'\\x00'"))],
    ({"data__source": "web"}, 1, "data.source = 'web' is not one of '', 'stdlib'"),
    ({"data__source": "stdlib", "data__valid": ""}, 1,
     "data.source = 'stdlib' builds one train corpus, one valid corpus and a tokenizer, but data.train has 1 entries, data.valid = '', "
     "data.tokenizer = 'corpora/tokenizer.json'; name one of each"),
    ({"data__source": "stdlib", "data__train": ["a", "b"]}, 1, "data.train has 2 entries"),
    ({"data__source": "stdlib", "data__tokenizer": ""}, 1, "data.tokenizer = ''"),
    ({"train__dtype": "fp16"}, 1, "train.dtype = 'fp16' is not one of 'fp32', 'bf16', 'fp64'"),
    ({"train__device": "rocm"}, 1, "train.device = 'rocm' is not one of 'auto', 'cuda', 'cpu'"),
    ({"train__kernels": "hip"}, 1, "train.kernels = 'hip' is not one of"),
    ({"train__recompute": "some"}, 1, "train.recompute = 'some' is not one of 'none', 'selective', 'full'"),
    ({"optim__name": "sgd"}, 1, "optim.name = 'sgd' is not one of 'muon', 'adamw'"),
    ({"optim__schedule": "linear"}, 1, "optim.schedule = 'linear' is not one of 'cosine', 'wsd'"),
    ({"optim__lr": 0.0}, 1, "optim.lr = 0.0 must be above 0"),
    ({"optim__momentum": -0.1}, 1, "optim.momentum = -0.1 is outside [0, 1)"),
    ({"optim__min_lr": 1e-2}, 1, "optim.min_lr = 0.01 is above optim.lr = 0.001; lower it"),
    ({"optim__schedule": "wsd"}, 1, "optim.decay_steps = 0 must lie between 1 and train.steps - optim.warmup_steps = 18"),
    ({"optim__schedule": "wsd", "optim__decay_steps": 19}, 1, "optim.decay_steps = 19 must lie between 1 and"),
    ({"parallel__engine": "fsdp"}, 1, "parallel.engine = 'fsdp' is not one of 'zaya', 'deepspeed'"),
    ({"parallel__pp": 2}, 1, "parallel.pp = 2: there is no pipeline parallelism; use pp = 1"),
    ({"parallel__engine": "deepspeed"}, 1, 'optim.name = "muon": parallel.engine = "deepspeed" does not support Muon'),
    ({"parallel__engine": "deepspeed", "parallel__tp": 2}, 2, "parallel.tp = 2: parallel.engine = \"deepspeed\" has data parallelism only"),
    ({"parallel__engine": "deepspeed", "parallel__zero_size": 2}, 2, "cuts the state over all ranks; use zero_size = 0"),
    ({"parallel__engine": "deepspeed", "optim__name": "adamw", "train__dtype": "fp64"}, 1, 'use "fp32" or "bf16"'),
    ({"parallel__zero_stage": 4}, 1, "parallel.zero_stage = 4 is not one of 1, 2, 3"),
    ({"parallel__offload": True}, 1, 'parallel.offload = true need parallel.engine = "deepspeed"'),
    ({"model__sliding_window": 10**30}, 1, f"model.sliding_window = {10**30} is beyond any machine; keep it below 2^31"),
    ({"train__steps": 2**31}, 1, "train.steps = 2147483648 is beyond any run; keep it below 2^31"),
    ({"optim__lr": 1e300}, 1, "optim.lr = 1e+300 is beyond fp32; keep it below 1e30"),
    ({"parallel__grad_dtype": "fp16"}, 1, "parallel.grad_dtype = 'fp16' is not one of 'fp32', 'bf16'"),
    ({"parallel__tp": 3}, 4, "parallel.tp = 3 neither divides model.num_kv_heads = 2 nor is a multiple of it that divides "
                             "model.num_heads = 8; use tp = 2 or 4"),
    ({"parallel__tp": 3}, 2, "model.num_heads = 8; use tp = 2"),
    ({"parallel__tp": 16}, 16, "divides model.num_heads = 8; use tp = 8"),
    ({"parallel__tp": 4, "model__vocab_size": 510}, 4, "parallel.tp = 4 does not divide model.vocab_size = 510; use tp = 2"),
    ({"parallel__tp": 4}, 6, "parallel.tp = 4 does not divide the 6 ranks; use tp = 2"),
    ({"parallel__tp": 2, "parallel__cp": 2}, 6, "parallel.tp * parallel.cp = 2 * 2 = 4 does not divide the 6 ranks; use cp = 1 or 3"),
    ({"parallel__ep": 3}, 6, "parallel.ep = 3 does not divide model.num_experts = 8; use ep = 2"),
    ({"parallel__ep": 5}, 4, "parallel.ep = 5 does not divide model.num_experts = 8; use ep = 4"),
    ({"parallel__ep": 8}, 4, "parallel.ep = 8 does not divide the 4 ranks; use ep = 4"),
    ({"parallel__ep": 3, "parallel__zero_size": 5}, 8, "no other value of it fits the rest"),
    ({"parallel__cp": 2, "train__seq_len": 62}, 2, "train.seq_len = 62 cannot be cut into the 4 equal parts"),
    ({"parallel__cp": 4, "train__seq_len": 8}, 4, "parallel.cp = 4 and parallel.tp = 1 need; use seq_len = 16"),
    ({"parallel__zero_size": 3}, 4, "parallel.zero_size = 3 does not divide the 4 ranks; use zero_size = 2 or 4"),
    ({"parallel__zero_size": 5, "parallel__tp": 2}, 12, "parallel.zero_size = 5 does not divide the 12 ranks; use zero_size = 3 or 6"),
    ({"checkpoint__resume": ""}, 1, 'checkpoint.resume is empty; use "auto", "never" or the path of a checkpoint'),
    ({"run__dir": ""}, 1, "run.dir is empty; name the directory of the run"),
    ({"train__eval_interval": 5, "data__valid": ""}, 1, "train.eval_interval = 5 but data.valid is empty; name a held-out corpus"),
    ({"train__eval_interval": 5, "train__eval_rows": 6}, 4, "train.eval_rows = 6 is not a multiple of the 4 data-parallel ranks; use 8"),
    ({}, 3, "train.global_batch_size = 8 is not a multiple of the 3 data-parallel ranks; use 12"),
    ({"train__micro_batch_size": 3}, 1, "train.micro_batch_size = 3 does not divide a rank's share of 8 rows"),
    ({"train__micro_batch_size": 3}, 2, "share of 4 rows (train.global_batch_size = 8 over 2 data-parallel ranks); use 1"),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), INVALID, ids=[message[:50] for _, _, message in INVALID])
def test_what_cannot_run(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        recipe(**changes).validate(world_size)
    assert message in str(caught.value)
    one_line(caught)


def test_the_suggested_fix_is_a_fix() -> None:
    recipe(model__num_heads=10).validate(1)
    recipe(model__head_dim=8).validate(1)
    recipe(train__global_batch_size=9, train__micro_batch_size=3).validate(3)
    recipe(train__micro_batch_size=2).validate(4)
    recipe(optim__schedule="wsd", optim__decay_steps=18).validate(1)
    recipe(model__attention_pattern=["full", "sliding"], model__sliding_window=16).validate(1)


def test_the_pattern_repeats_over_the_depth() -> None:
    model = recipe(model__num_layers=5, model__attention_pattern=["sliding", "full"], model__sliding_window=4).model
    assert [model.attention_kind(block) for block in range(5)] == ["sliding", "full", "sliding", "full", "sliding"]
    # A kind that no block reaches asks for nothing.
    recipe(model__num_layers=1, model__attention_pattern=["full", "sliding"]).validate(1)


def test_overrides(recipe_file: Path) -> None:
    got = load_recipe(recipe_file, [
        "--train.steps=7", "--optim.lr=3e-4", "--data.train=a,b", "--run.dir=runs/y", "--model.skip_expert=false", '--train.dtype="bf16"',
        "--checkpoint.resume=7", "--optim.weight_decay=0", '--model.attention_pattern=["full"]'])
    assert (got.train.steps, got.optim.lr, got.data.train, got.run.dir) == (7, 3e-4, ("a", "b"), "runs/y")
    assert (got.model.skip_expert, got.train.dtype, got.checkpoint.resume, got.optim.weight_decay) == (False, "bf16", "7", 0.0)
    assert load_recipe(recipe_file, ["--train.steps=7", "--train.steps=8"]).train.steps == 8  # the last one counts


@pytest.mark.parametrize(("override", "value"), [
    ("--data.weights=1,2.5", (1.0, 2.5)), ("--data.weights=1", (1.0,)), ("--data.weights=[3]", (3.0,)), ("--data.weights=", ()),
    ("--data.train=a", ("a",)), ("--data.train=a, 7", ("a", "7")), ("--data.train=[a,b]", ("a", "b")),
    ('--data.train="a,b", c', ("a,b", "c")),
    ('--data.train="a,b"', ("a,b",)), ("--data.train='a',\"b\"", ("a", "b")),
    ('--run.dir="my run"', "my run"), ('--run.dir="my run"x', '"my run"x')])
def test_lists_need_no_brackets_and_strings_no_quotes(recipe_file: Path, override: str, value: object) -> None:
    tables = tomllib.loads(recipe_file.read_text())
    apply_override(tables, override, hints(Recipe))
    section, _, key = override.partition("=")[0].removeprefix("--").partition(".")
    table = build_section(hints(Recipe)[section], section, tables[section])
    assert getattr(table, key) == value


@pytest.mark.parametrize(("override", "message"), [
    ("--train.step=3", "unknown recipe key 'train.step'; did you mean 'train.steps'?"),
    ("--trian.steps=3", "unknown section 'trian'; did you mean 'train'?"),
    ("--checkpoint.allow_missing=[", "checkpoint.allow_missing = '[' has a bracket too few"),
    ("--train.steps=2\nfoo = 3", "train.steps = '2\\nfoo = 3' must be an int, not a str"),
    ("--train.steps=" + "9" * 5000, f"train.steps = '{'9' * 5000}' must be an int, not a str"),
    ("--optim.lr=" + "[" * 3000, f"optim.lr = '{'[' * 3000}' must be a float, not a str"),
    ("--train.steps=many", "train.steps = 'many' must be an int, not a str"),
    ("--train.steps=", "train.steps = '' must be an int, not a str"),
    ("--train.steps", "argument '--train.steps' is not of the form --section.key=value"),
    ("train.steps=3", "argument 'train.steps=3' is not of the form --section.key=value"),
    ("--steps=3", "argument '--steps=3' is not of the form --section.key=value"),
    ("--train.=3", "argument '--train.=3' is not of the form --section.key=value"),
])
def test_bad_overrides(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe_file, [override])
    assert str(caught.value) == message


def test_what_is_printed_reads_back_the_same(tmp_path: Path) -> None:
    odd = recipe(run__dir='a "quoted"\\path\twith\nall', data__weights=[0.1], optim__eps=1e-30, optim__lr=0.1 + 0.2,
                 model__skip_expert=False, data__train=["ü"], model__attention_pattern=["full", "sliding"], model__sliding_window=3)
    path = tmp_path / "again.toml"
    path.write_text(odd.to_toml(), encoding="utf-8")
    assert load_recipe(path) == odd
    assert load_recipe(path).to_toml() == odd.to_toml()
    printed = tomllib.loads(odd.to_toml())
    assert {(section, key) for section, table in printed.items() for key in table} == {
        (section.name, key.name) for section in dataclasses.fields(odd) for key in dataclasses.fields(getattr(odd, section.name))}


def test_the_identity_is_model_data_seed_and_optimizer() -> None:
    same = recipe(train__steps=99, train__micro_batch_size=4, checkpoint__interval=7, run__dir="elsewhere", train__dtype="bf16",
                  train__recompute="full", train__global_batch_size=8)
    assert same.identity() == recipe().identity()
    for change in ({"model__hidden_size": 32}, {"data__valid": "c"}, {"train__seed": 2}, {"optim__lr": 2e-3}, {"train__seq_len": 96}):
        assert recipe(**change).identity() != recipe().identity(), change


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.toml").write_text("[train\n")
    for name, message in (("absent.toml", "No such file"), ("binary.toml", "not UTF-8 text"),
                          ("broken.toml", "is not valid TOML"), (".", "Is a directory")):
        with pytest.raises(ValueError, match=message) as caught:
            load_recipe(tmp_path / name)
        one_line(caught)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_of_the_project_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    recipe.validate(recipe.parallel.tp * recipe.parallel.cp)
    if path.name.startswith("zaya1_"):
        recipe.validate(1024)


def test_main_prints_the_resolved_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.main([str(recipe_file), "--train.steps=7"]) == 0
    out, err = capsys.readouterr()
    assert tomllib.loads(out)["train"]["steps"] == 7 and tomllib.loads(out)["parallel"]["tp"] == 1 and err == ""
    assert config.main(["--help"]) == 0
    assert config.main([]) == 2


@pytest.mark.parametrize(("flags", "exit_code"), [
    (["--parallel.cp=3", "--parallel.zero_size=2"], 0),  # 6 ranks, not the 3 that cp alone would take
    (["--train.global_batch_size=24", "--parallel.cp=3", "--parallel.ep=4", "--parallel.zero_size=8"], 0),  # 24, neither 12 nor 96
    (["--parallel.ep=2", "--parallel.zero_size=4"], 0), (["--parallel.cp=3", "--parallel.zero_size=2", "--parallel.ep=5"], 2)])
def test_main_looks_for_ranks_that_can_run_it(recipe_file: Path, capsys: pytest.CaptureFixture[str], flags: list[str],
                                              exit_code: int) -> None:
    recipe = [str(recipe_file), "--train.global_batch_size=8", "--train.micro_batch_size=1", "--train.seq_len=96"]
    assert config.main([*recipe, *flags]) == exit_code, capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["absent.toml"], ["recipe.toml", "--train.step=1"], ["recipe.toml", "--parallel.pp=2"]])
def test_the_command_exits_2_with_one_line(recipe_file: Path, arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", "zaya.config", *arguments], cwd=recipe_file.parent, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("zaya.config: ") and result.stderr.count("\n") == 1


def test_a_share_smaller_than_the_micro_batch_is_one_pass() -> None:
    wide = recipe(train__micro_batch_size=8)
    wide.validate(world_size=4)
    assert [wide.micro_batch_rows(size) for size in (1, 2, 4)] == [8, 4, 2]
