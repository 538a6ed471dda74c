"""Names, shapes, config and files to and from transformers: the table covers both sides, both tools are exact and refuse bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ZayaConfig, ZayaForCausalLM
from transformers.utils import logging

from tests import tiny
from tests.cpu.test_fidelity import draw, our_model, reference_model
from tools import export_hf, import_hf
from zaya import train
from zaya.checkpoint import manifest, stream
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share, save
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import ModelConfig
from zaya.data.tokenizer import END_OF_TEXT, train_bpe
from zaya.model import hf
from zaya.model.init import init_weights
from zaya.model.transformer import Zaya
from zaya.shard import Box

SMALL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, num_experts=4,
                    moe_intermediate_size=16, router_hidden_size=8, attention_pattern=("sliding", "full"), sliding_window=5)


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def write_checkpoint(path: Path, config: ModelConfig, recipe: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> Zaya:
    """A checkpoint of a fresh model of ours, as a run leaves it, optimizer state included."""
    model = Zaya(config, dtype=dtype)
    init_weights(model, config, seed=1)
    for name, buffer in model.named_buffers():  # balance biases that bf16 cannot hold; skip stays at -1
        buffer[: config.num_experts].normal_(generator=torch.Generator().manual_seed(len(name)))
    with CheckpointWriter(path, recipe={"model": dataclasses.asdict(config), **(recipe or {})}) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(f"model.{name}", tensor)
        writer.add("optim.step", torch.tensor(3))
    return model


def save_hf(path: Path, config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Any:
    """A directory as transformers saves it, of a model with nothing at its initial value."""
    model: Any = reference_model(config, seed=5)
    for key, value in {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "max_position_embeddings": 777}.items():
        setattr(model.config, key, value)
    biases = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("balancing_biases")}
    model.to(dtype=dtype)
    for name, buffer in model.named_buffers():
        if name in biases:  # transformers itself loads them in fp32 whatever the dtype
            buffer.data = biases[name]
    model.save_pretrained(path, max_shard_size=shard)
    return model


def hf_tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def portable(config: Any) -> dict[str, Any]:
    """What a config says, apart from who wrote it and where it lies."""
    return {key: value for key, value in config.to_dict().items() if key not in ("transformers_version", "_name_or_path")}


def load_cleanly(path: Path, **kwargs: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), report
    return model


def assert_aligned(file: Path) -> None:
    """Every tensor begins at a multiple of its element's size, so that a reader can map it; three bf16 temperatures shift the rest."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    widths = {"F32": 4, "BF16": 2}
    header = json.loads(data[8: 8 + length])
    del header["__metadata__"]
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())


# ---------------------------------------------------------------------------------------------------------------- the table


def test_defaults_are_those_of_transformers() -> None:
    theirs = ZayaConfig().to_dict()
    assert {key: theirs[key] for key in hf.DEFAULTS} == hf.DEFAULTS
    assert {key: theirs[key] for key in hf.FIXED} == hf.FIXED
    assert {kind: entry["rope_theta"] for kind, entry in theirs["rope_parameters"].items()} == hf.ROPE_DEFAULTS
    assert {entry["partial_rotary_factor"] for entry in theirs["rope_parameters"].values()} == {hf.PARTIAL_ROTARY_FACTOR}


@pytest.mark.parametrize("config", [
    SMALL,
    ModelConfig(vocab_size=262272, hidden_size=2048, num_layers=40, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=16,
                moe_intermediate_size=2048, router_hidden_size=256, rope_theta=5e6),
    *(draw(seed).config for seed in range(8)),
], ids=["small", "8B", *map(str, range(8))])
def test_table_names_every_tensor_of_both_sides_once(config: ModelConfig) -> None:
    with torch.device("meta"):
        theirs = ZayaForCausalLM(ZayaConfig(**hf.to_hf_config(config, {}))).state_dict()
        ours = Zaya(config).state_dict()
    theirs.pop("lm_head.weight")  # tied
    table = hf.links(config)
    our_side, their_side = [named for link in table for named in link.ours], [named for link in table for named in link.theirs]
    for side, state in ((our_side, ours), (their_side, theirs)):
        assert len(side) == len({named.name for named in side})
        assert {named.name: named.shape for named in side} == {name: tuple(tensor.shape) for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("seed", range(8))
def test_model_config_survives_the_way_there_and_back(seed: int) -> None:
    config = draw(seed).config
    back, _ = hf.from_hf_config(hf.to_hf_config(config, {}))
    kinds = [[c.attention_kind(block) for block in range(c.num_layers)] for c in (config, back)]
    assert kinds[0] == kinds[1]
    assert dataclasses.replace(back, attention_pattern=config.attention_pattern) == config


@pytest.mark.parametrize("change", [
    {}, {"sliding_window": 64}, {"layer_types": ["hybrid_sliding", "hybrid", "hybrid"], "sliding_window": 7}, {"pad_token_id": None},
    {"rope_parameters": {"hybrid": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}},
    {"use_cache": False, "output_router_logits": True, "initializer_range": 0.01, "a_key_of_the_future": [1, None]}, {"dtype": None},
])
def test_config_round_trips(change: dict[str, Any], tmp_path: Path) -> None:
    """What transformers reads from config.json is the same before and after, whatever the source left out or added."""
    ZayaConfig(num_hidden_layers=3, **change).save_pretrained(tmp_path / "before")
    raw = json.loads((tmp_path / "before/config.json").read_text())
    silences: list[set[str]] = [set(), {"router_hidden_size", "cca_time0", "layer_types"} - change.keys()]
    for silent in silences:
        before = {key: value for key, value in raw.items() if key not in silent}
        after = hf.to_hf_config(*hf.from_hf_config(before))
        assert portable(ZayaConfig(**after)) == portable(ZayaConfig(**before))
    assert after["vocab_size"] == 262272


def test_pattern_is_the_shortest_that_repeats() -> None:
    types = ["hybrid_sliding", "hybrid"] * 3
    raw = ZayaConfig(num_hidden_layers=6, layer_types=types, sliding_window=4096).to_dict()
    config, _ = hf.from_hf_config(raw)
    assert config.attention_pattern == ("sliding", "full") and (config.rope_theta, config.rope_theta_sliding) == (5e6, 1e4)
    assert hf.to_hf_config(config, {})["layer_types"] == types


# ---------------------------------------------------------------------------------------------------------------- both tools


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_import_then_export_gives_the_same_directory(dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    save_hf(tmp_path / "before", dtype=dtype, shard=shard)
    assert import_hf.main([str(tmp_path / "before"), str(tmp_path / "checkpoint")]) == 0
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "after"), "--max-shard-size", shard]) == 0
    assert_same_tensors(hf_tensors(tmp_path / "before"), hf_tensors(tmp_path / "after"))
    assert portable(AutoConfig.from_pretrained(tmp_path / "after")) == portable(AutoConfig.from_pretrained(tmp_path / "before"))
    model = load_cleanly(tmp_path / "after")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == dtype


def test_training_an_imported_model_keeps_what_its_config_says_beyond_ours(tmp_path: Path) -> None:
    """Token ids and lengths pass through two saves, by a run from its weights and by the same one resumed."""
    save_hf(tmp_path / "before")
    assert import_hf.main([str(tmp_path / "before"), str(tmp_path / "checkpoint")]) == 0
    shape = {f"model__{key}": value for key, value in Checkpoint.open(tmp_path / "checkpoint").manifest.recipe["model"].items()}
    recipe = tiny.recipe(tmp_path, **shape, init__checkpoint=str(tmp_path / "checkpoint"), checkpoint__interval=1, train__steps=1,
                         train__eval_interval=0, optim__warmup_steps=0)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    before = portable(AutoConfig.from_pretrained(tmp_path / "before"))
    for steps in (1, 2):
        assert train.main([str(tmp_path / "recipe.toml"), f"--train.steps={steps}"]) == 0
        assert export_hf.main([str(tmp_path / "run"), str(tmp_path / f"after-{steps}")]) == 0
        assert portable(AutoConfig.from_pretrained(tmp_path / f"after-{steps}")) == before


def test_imported_checkpoint_is_our_model(tmp_path: Path) -> None:
    """Every tensor of our model is there under its name, in its shape, with the reference's numbers: usable as init.checkpoint."""
    reference = save_hf(tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "checkpoint")]) == 0
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    expected = our_model(reference, SMALL).state_dict()
    assert_same_tensors({name: checkpoint.read(name) for name in checkpoint.names()}, {f"model.{k}": v for k, v in expected.items()})
    # Three blocks: the pattern of two is not told from its repetition.
    expected_model = dataclasses.asdict(SMALL) | {"attention_pattern": ["sliding", "full"]}
    assert checkpoint.manifest.recipe["model"] == expected_model


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_run_loads_in_transformers(dtype: str, tmp_path: Path) -> None:
    """From a run directory, its newest step, cast on the way; the balance bias stays fp32."""
    write_checkpoint(tmp_path / "run/checkpoints/step-00000001", dataclasses.replace(SMALL, num_layers=1))
    ours = write_checkpoint(tmp_path / "run/checkpoints/step-00000002", SMALL, {"train": {"seq_len": 48}})
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", dtype]) == 0
    assert_aligned(tmp_path / "hf/model.safetensors")
    model = load_cleanly(tmp_path / "hf", attn_implementation="eager", experts_implementation="eager").eval()
    assert model.dtype == export_hf.DTYPES[dtype] and model.model.layers[0].mlp.gate.balancing_biases.dtype == torch.float32
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (None, None, None, 48)
    expected = {name: tensor if name.endswith("balance_bias") else tensor.to(model.dtype) for name, tensor in ours.state_dict().items()}
    assert_same_tensors(our_model(model, SMALL, model.dtype).state_dict(), expected)


def test_a_wider_export_is_of_the_master_weights(tmp_path: Path) -> None:
    master = write_checkpoint(tmp_path / "fp32", SMALL).state_dict()
    with CheckpointWriter(tmp_path / "bf16", recipe={"model": dataclasses.asdict(SMALL)}) as writer:
        for name, tensor in master.items():
            writer.add(f"model.{name}", tensor if name.endswith("balance_bias") else tensor.bfloat16())
            if not name.endswith("balance_bias"):
                writer.add(f"optim.master.{name}", tensor)
    for source, target, options in (("fp32", "a", []), ("bf16", "b", ["--dtype=fp32"]), ("fp32", "c", ["--dtype=bf16"]), ("bf16", "d", [])):
        assert export_hf.main([str(tmp_path / source), str(tmp_path / target), *options]) == 0
    assert_same_tensors(hf_tensors(tmp_path / "a"), hf_tensors(tmp_path / "b"))
    assert_same_tensors(hf_tensors(tmp_path / "c"), hf_tensors(tmp_path / "d"))


def test_shards_are_as_small_as_asked_and_indexed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "hf"), "--max-shard-size", "50KB"]) == 0
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 3
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert max(sizes) <= 50_000 and index["metadata"]["total_size"] == sum(sizes)
    load_cleanly(tmp_path / "hf")


def test_export_carries_the_tokenizer(tmp_path: Path) -> None:
    text = Path(__file__).read_text()
    tokenizer = train_bpe(iter([text]), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_checkpoint(tmp_path / "checkpoint", SMALL, {"data": {"tokenizer": str(tmp_path / "tokenizer.json")}})
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "hf")]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(text[:500], add_special_tokens=False)["input_ids"] == tokenizer.encode(text[:500]).ids
    assert loaded.eos_token == END_OF_TEXT and loaded.eos_token_id == AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id == 0
    # Imported again, the model still knows its tokenizer.
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    assert Checkpoint.open(tmp_path / "again").manifest.recipe["data"]["tokenizer"] == str(tmp_path / "hf/tokenizer.json")


def test_export_says_that_the_tokenizer_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL, {"data": {"tokenizer": str(tmp_path / "gone.json")}})
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "hf")]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path}/gone.json, the run's tokenizer, is not there" in error
    assert not (tmp_path / "hf/tokenizer.json").exists()


def test_overwrite_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    command = [str(tmp_path / "checkpoint"), str(tmp_path / "hf")]
    assert [export_hf.main(command), export_hf.main(command), export_hf.main([*command, "--overwrite"])] == [0, 2, 0]
    load_cleanly(tmp_path / "hf")
    (tmp_path / "hf/config.json").unlink()  # no export any more
    assert export_hf.main([*command, "--overwrite"]) == 2


MEMORY = """
import sys, torch
from tools import export_hf, import_hf
def peak():  # of this process alone; getrusage would inherit the parent's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
start = peak()
assert export_hf.main([sys.argv[1], sys.argv[2], "--max-shard-size", "16MB"]) == 0
exported = peak()
assert import_hf.main([sys.argv[2], sys.argv[3]]) == 0
print(exported - start, peak() - start)
"""


def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """A model of 200 MB leaves in shards of 16 MB and comes back; mapped file pages count too."""
    config = dataclasses.replace(SMALL, hidden_size=512, num_layers=12, num_experts=8, moe_intermediate_size=256, vocab_size=4096)
    write_checkpoint(tmp_path / "checkpoint", config)
    size = sum(file.stat().st_size for file in tmp_path.glob("checkpoint/*.safetensors"))
    assert size > 160e6
    arguments = [str(tmp_path / name) for name in ("checkpoint", "hf", "again")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, timeout=120, check=True)
    exported, both = map(int, run.stdout.splitlines()[-1].split())
    assert exported < 64e6, f"export took {exported / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    assert both < 64e6, f"import took {both / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


# ---------------------------------------------------------------------------------------------------------------- bad input


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], words: str, tool: str, target: Path) -> None:
    """Exit code 2, one line on stderr that holds the words, nothing at the target nor beside it."""
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"tools.{tool}: "), lines
    assert words in lines[0]
    assert not target.exists() and not list(target.parent.glob(f".{target.name}*"))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return edit


def replace_by_directory(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "config.json").mkdir()


def truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


NORM = "model.norm.weight"
BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "is not a directory"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: No such file"),
    "config not json": (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
    "other architecture": (edit_config(model_type="llama"), "model_type = 'llama' is not supported; only 'zaya' is"),
    "old layout": (edit_config(zaya_mlp_expansion=256), "zaya_mlp_expansion = 256 belongs to the layout before"),
    "norm eps": (edit_config(rms_norm_eps=1e-6), "rms_norm_eps = 1e-06 is not supported; only 1e-05 is"),
    "untied": (edit_config(tie_word_embeddings=False), "tie_word_embeddings = False is not supported; only True is"),
    "wide convolution": (edit_config(cca_time1=3), "cca_time1 = 3 is not supported; only 2 is"),
    "attention bias": (edit_config(attention_bias=True), "attention_bias = True"),
    "head bias": (edit_config(lm_head_bias=True), "lm_head_bias = True"),
    "top-2": (edit_config(num_experts_per_tok=2), "num_experts_per_tok = 2"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "dropout": (edit_config(attention_dropout=0.1), "attention_dropout = 0.1"),
    "whole rotary": (edit_config(rope_parameters={kind: {"rope_type": "default", "rope_theta": 1e4} for kind in hf.ROPE_DEFAULTS}),
                     "rope_parameters.hybrid.partial_rotary_factor = 1.0 is not supported; only 0.5 is"),
    "yarn": (edit_config(rope_parameters={kind: {"rope_type": "yarn", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
                                          for kind in hf.ROPE_DEFAULTS}), "rope_parameters.hybrid.rope_type = 'yarn' is not supported"),
    "no rope": (edit_config(rope_parameters={"rope_theta": 1e4}), "gives no rope_theta for 'hybrid' blocks"),
    "layer types": (edit_config(layer_types=["hybrid"]), "layer_types has 1 entries for num_hidden_layers = 3"),
    "unknown layer type": (edit_config(layer_types=["hybrid", "mamba", "hybrid"]), "layer_types has 'mamba'"),
    "text for a number": (edit_config(hidden_size="32"), "hidden_size = '32' is not supported; it must be an integer"),
    **{f"{key} {name}": (edit_config(**{key: value}), f"{key} = ") for key, name, value in [
        ("architectures", "int", 5), ("dtype", "list", ["float32"]), ("eos_token_id", "float", [1.5]), ("bos_token_id", "object", {}),
        ("pad_token_id", "negative", -1), ("num_experts_per_tok", "bool", True), ("max_position_embeddings", "zero", 0),
        ("sliding_window", "negative", -5), ("num_hidden_layers", "null", None), ("num_experts", "float", 4.0), ("head_dim", "bool", True),
        ("attention_bias", "int", 0), ("cca_time0", "float", 2.0), ("rope_parameters", "list", []), ("initializer_range", "huge", 10**400),
        ("initializer_range", "text", "0.02"), ("rms_norm_eps", "text", "1e-5"), ("hidden_size", "negative", -32),
        ("router_hidden_size", "list", [8]), ("vocab_size", "huge", 2**31), ("layer_types", "numbers", [1, 2, 3])]},
    "text for architectures": (edit_config(architectures="ZayaForCausalLM"), "architectures = 'ZayaForCausalLM' is not supported"),
    "other class": (edit_config(architectures=["LlamaForCausalLM"]), "architectures = ['LlamaForCausalLM'] is not supported; it must"),
    "unknown dtype": (edit_config(dtype="int4"), "dtype = 'int4' is not supported; it must be one of float32"),
    "old dtype key": (edit_config(dtype=None, torch_dtype=7), "torch_dtype = 7 is not supported"),
    "endless rope": (edit_config(rope_parameters={kind: {"rope_type": "default", "rope_theta": math.inf, "partial_rotary_factor": 0.5}
                                                  for kind in hf.ROPE_DEFAULTS}), "is not supported; it must be of finite numbers"),
    "object as layer type": (edit_config(layer_types=[{}, {}, {}]), "layer_types = [{}, {}, {}] is not supported"),
    "deep config": (lambda path: (path / "config.json").write_text("[" * 10**5), "config.json is not JSON"),
    "no model type": (lambda path: (path / "config.json").write_text("{}"), "model_type = None is not supported; only 'zaya' is"),
    "empty config": (lambda path: (path / "config.json").write_text(""), "config.json is not JSON"),
    "a list": (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "config is a directory": (replace_by_directory, "config.json: Is a directory"),
    "empty weights": (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors is truncated or damaged"),
    "head dim": (edit_config(head_dim=6), "head_dim = 6 is not a multiple of 4"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "truncated": (truncate, "model.safetensors is truncated or damaged"),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(NORM)), f"lacks tensor {NORM}"),
    "unexpected tensor": (edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))), "has the unexpected tensor extra"),
    "wrong shape": (edit_tensors(lambda tensors: tensors.update({NORM: torch.zeros(33)})), f"tensor {NORM} has shape [33]"),
    "quantized": (edit_tensors(lambda tensors: tensors.update({NORM: torch.zeros(32, dtype=torch.int8)})), f"tensor {NORM} has dtype I8"),
    "untied head": (edit_tensors(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(300, 32)})), "lm_head.weight differs"),
    "more blocks": (edit_config(num_hidden_layers=4, layer_types=None), "lacks tensor model.layers.3."),
}


@pytest.fixture(scope="module")
def good_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "hf"
    save_hf(path)
    return path


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_import_refuses(case: str, good_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, words = BAD_DIRECTORIES[case]
    shutil.copytree(good_directory, tmp_path / "hf")
    spoil(tmp_path / "hf")
    code = import_hf.main([str(tmp_path / "hf"), str(tmp_path / "checkpoint")])
    assert_refused(code, capsys, words, "import_hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("spoil, words", [
    (lambda path: (path / "model-00002-of-00003.safetensors").unlink(), "shard model-00002-of-00003.safetensors of 3 is missing"),
    (lambda path: shutil.copy(path / "model-00001-of-00003.safetensors", path / "model-00002-of-00003.safetensors"), "is in model-00001"),
    (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    (lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'), "not a plain file name"),
])
def test_import_refuses_broken_shards(spoil: Callable[[Path], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "ours", SMALL)
    assert export_hf.main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--max-shard-size", "80KB"]) == 0
    assert len(list(tmp_path.glob("hf/*.safetensors"))) == 3
    spoil(tmp_path / "hf")
    capsys.readouterr()
    assert_refused(import_hf.main([str(tmp_path / "hf"), str(tmp_path / "new")]), capsys, words, "import_hf", tmp_path / "new")


def test_import_accepts_a_stored_tied_head(good_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(good_directory, tmp_path / "hf")
    edit_tensors(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))(tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "checkpoint")]) == 0


def test_tools_never_write_over_something(good_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("keep")
    assert import_hf.main([str(good_directory), str(tmp_path / "full")]) == 2
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    assert export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "full"), "--overwrite"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "exists and is not empty" in lines[0] and "is not an older export" in lines[1]
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


def flip_a_byte(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_export_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf_dir = tmp_path / "hf"

    def export(name: str) -> int:
        return export_hf.main([str(tmp_path / name), str(hf_dir)])

    write_checkpoint(tmp_path / "no_skip", dataclasses.replace(SMALL, skip_expert=False))
    assert_refused(export("no_skip"), capsys, "transformers' Zaya always has the skip class", "export_hf", hf_dir)
    assert_refused(export("nowhere"), capsys, "is neither a checkpoint", "export_hf", hf_dir)
    write_checkpoint(tmp_path / "corrupt", SMALL)
    flip_a_byte(tmp_path / "corrupt")
    assert_refused(export("corrupt"), capsys, "it is corrupt", "export_hf", hf_dir)
    write_checkpoint(tmp_path / "wider", SMALL, {"model": dataclasses.asdict(SMALL) | {"hidden_size": 34}})
    assert_refused(export("wider"), capsys, "its recipe asks for", "export_hf", hf_dir)
    write_checkpoint(tmp_path / "deeper", SMALL, {"model": dataclasses.asdict(SMALL) | {"num_layers": 4}})
    assert_refused(export("deeper"), capsys, "has no tensor model.blocks.3.", "export_hf", hf_dir)
    write_checkpoint(tmp_path / "shallower", SMALL, {"model": dataclasses.asdict(SMALL) | {"num_layers": 2}})
    assert_refused(export("shallower"), capsys, "unexpected tensor model.blocks.2.", "export_hf", hf_dir)
    write_checkpoint(tmp_path / "foreign", SMALL, {"model": {"layers": 3}})
    assert_refused(export("foreign"), capsys, "unknown recipe key 'model.layers'", "export_hf", hf_dir)


def test_export_refuses_a_wrong_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export_hf.main([str(tmp_path), str(tmp_path / "hf"), "--max-shard-size", "5 apples"])
    assert stopped.value.code == 2 and "'5 apples' is not a size such as 2GB" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- many boxes, many threads


def save_in_boxes(root: Path, tensors: dict[str, Tensor], recipe: dict[str, Any], cuts: int) -> Path:
    """A checkpoint whose tensors are cut across every dim that is long enough, as no whole tensor lies together in a file."""
    shares = {}
    for name, tensor in tensors.items():
        parts: list[tuple[Box, Tensor]] = []
        borders = [sorted({0, length, *(length * i // cuts for i in range(1, cuts))}) for length in tensor.shape]
        for ranges in itertools.product(*(itertools.pairwise(border) for border in borders)):
            box = tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges)
            parts.append((box, tensor[tuple(slice(low, high) for low, high in ranges)]))
        shares[name] = Share(tensor.dtype, tuple(tensor.shape), parts)
    return save(root, shares, step=1, tokens=0, tokens_by_corpus={}, position=0, recipe=recipe, layout={}, gather=lambda value: [value])


@pytest.mark.parametrize("options", [[], ["--dtype=bf16"], ["--max-shard-size=50KB"]], ids=str)
def test_however_a_run_cut_its_tensors_the_export_is_the_same(options: list[str], tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "whole", SMALL)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for cuts in (2, 3):
        cut = save_in_boxes(tmp_path / f"cut{cuts}", tensors, {"model": dataclasses.asdict(SMALL)}, cuts)
        assert len(Checkpoint.open(cut).manifest.tensors["model.blocks.0.moe.experts.down"].boxes) == cuts**3
        for source, target in ((tmp_path / "whole", "a"), (cut, "b")):
            assert export_hf.main([str(source), str(tmp_path / target), "--overwrite", "--workers=3", *options]) == 0
        files = [sorted((tmp_path / target).iterdir()) for target in ("a", "b")]
        assert [file.name for file in files[0]] == [file.name for file in files[1]]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@hypothesis.given(st.data())
def test_runs_of_a_box_are_its_elements(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    offsets = [data.draw(st.integers(0, n - 1)) for n in shape]
    sizes = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)]
    length, starts = stream.runs(manifest.Box("f.safetensors", "k", tuple(offsets), tuple(sizes), ""), shape)
    elements = np.arange(math.prod(shape)).reshape(shape)[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].ravel()
    assert (starts[:, None] + np.arange(length)).ravel().tolist() == elements.tolist()
    borders = np.flatnonzero(np.diff(elements) != 1) + 1
    assert len(starts) <= math.prod(sizes[:-1]) and {*borders.tolist()} <= {length * i for i in range(1, len(starts))}


def test_threads_write_what_one_thread_writes(good_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, byte for byte, in chunks that end inside tensors, with files that end early."""
    monkeypatch.setattr(import_hf, "CHUNK_BYTES", 56)
    monkeypatch.setattr(stream, "CHUNK_BYTES", 56)
    monkeypatch.setattr(stream, "UNIT_BYTES", 1000)
    for workers in ("1", "5"):
        assert import_hf.main([str(good_directory), str(tmp_path / f"import{workers}"), "--workers", workers]) == 0
        assert export_hf.main([str(tmp_path / "import1"), str(tmp_path / f"export{workers}"), "--workers", workers]) == 0
    for way in ("import", "export"):
        one, many = ({file.name: file.read_bytes() for file in (tmp_path / f"{way}{n}").iterdir()} for n in (1, 5))
        assert one == many
    assert_same_tensors(hf_tensors(tmp_path / "export5"), hf_tensors(good_directory))


def test_a_damaged_tensor_leaves_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is found while it is copied: the last of the file's bytes, of which no hash is known before."""
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    box = checkpoint.manifest.tensors["model.blocks.2.moe.experts.down"].boxes[0]
    file = tmp_path / "checkpoint" / box.file
    data = bytearray(file.read_bytes())
    data[checkpoint._range(box)[1] - 1] ^= 1
    file.write_bytes(data)
    code = export_hf.main([str(tmp_path / "checkpoint"), str(tmp_path / "hf"), "--workers=3"])
    assert_refused(code, capsys, f"{file}: tensor 'model.blocks.2.moe.experts.down'", "export_hf", tmp_path / "hf")


def test_a_file_that_shrinks_leaves_no_import(good_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is read, by a thread."""
    shutil.copytree(good_directory, tmp_path / "hf")

    def shrink(self: import_hf.HFDirectory, table: Any) -> None:
        os.truncate(tmp_path / "hf/model.safetensors", 20_000)

    monkeypatch.setattr(import_hf.HFDirectory, "check", shrink)
    code = import_hf.main([str(tmp_path / "hf"), str(tmp_path / "new"), "--workers=3"])
    assert_refused(code, capsys, "model.safetensors is truncated or damaged; get it again", "import_hf", tmp_path / "new")


@pytest.mark.parametrize("tool", [import_hf, export_hf])
@pytest.mark.parametrize("workers", ["0", "-1", "many", "257"])
def test_a_wrong_number_of_threads_is_one_line(tool: Any, workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(tmp_path), str(tmp_path / "new"), f"--workers={workers}"])
    assert stopped.value.code == 2 and f"'{workers}' is not a number of threads from 1 to 256" in capsys.readouterr().err


@pytest.mark.parametrize("kill", ["import", "export"])
def test_a_killed_conversion_leaves_no_target_and_does_not_hinder_the_next(kill: str, good_directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if kill == "export":
        write_checkpoint(source, SMALL)
    else:
        shutil.copytree(good_directory, source)
    program = """
import os, sys
from tools import export_hf, import_hf
from zaya.checkpoint import files, stream
def die(*arguments):
    os._exit(9)
files.File.finish = die
stream.Checkpoint._check = die
sys.exit({"import": import_hf, "export": export_hf}[sys.argv[1]].main(sys.argv[2:]))
"""
    done = subprocess.run([sys.executable, "-c", program, kill, str(source), str(tmp_path / "new")], timeout=120)
    assert done.returncode == 9 and not (tmp_path / "new").exists() and (tmp_path / ".new.tmp").exists()
    assert {"import": import_hf, "export": export_hf}[kill].main([str(source), str(tmp_path / "new")]) == 0
    assert not (tmp_path / ".new.tmp").exists()


def test_fp16_and_mixed_dtypes_become_what_holds_them(good_directory: Path, tmp_path: Path) -> None:
    """fp16 is fp32 here; of two halves of a tensor the wider dtype counts."""
    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half() if "mlp" in name else tensors[name]
            tensors[name] = tensors[name].bfloat16() if name.endswith("v_proj_current.weight") else tensors[name]

    shutil.copytree(good_directory, tmp_path / "hf")
    before = hf_tensors(tmp_path / "hf")
    edit_tensors(change)(tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "checkpoint")]) == 0
    change(before)
    after = Checkpoint.open(tmp_path / "checkpoint")
    for link in hf.links(SMALL):
        for named, tensor in zip(link.ours, link.to_ours([before[named.name] for named in link.theirs]), strict=True):
            stored = after.read(f"model.{named.name}")
            assert stored.dtype == torch.float32 and torch.equal(stored, tensor.float()), named.name
