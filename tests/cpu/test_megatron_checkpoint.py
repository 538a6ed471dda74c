"""Checkpoints to and from Megatron-core's torch_dist format: exact, read by torch's and Megatron's own loaders, and safe to open.

Megatron-core runs here on the CPU: its checkpoint code asks CUDA for a device's name and a synchronisation, psutil for a number to log, and
forks, which the worker processes of a pool may not. Those four are replaced and nothing else is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from tests.cpu.test_fidelity import draw
from tests.dist.pool import WorkerPool
from tools import export_megatron, import_megatron
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import ModelConfig
from zaya.model import megatron
from zaya.model.transformer import Zaya

SMALL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, num_experts=4,
                    moe_intermediate_size=16, router_hidden_size=8, attention_pattern=("sliding", "full"), sliding_window=5)
FULL = dataclasses.replace(SMALL, attention_pattern=("full",))
# What GPTModel itself can hold: as many classes as experts, a router as wide as the model.
GPT = ModelConfig(vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4,
                  moe_intermediate_size=24, router_hidden_size=32, skip_expert=False)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # dcp.load with no_dist says what it was told
PER_LAYER = {"non_homogeneous_layers": True}  # copied at each use: Megatron adds its process groups to what it is given


def write_checkpoint(path: Path, config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32, **manifest: Any) -> dict[str, Tensor]:
    """A checkpoint with random numbers in every tensor, optimizer state and counters, as a run leaves it; its model's tensors."""
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        state = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in Zaya(config, dtype=dtype).state_dict().items()}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(kind) for name, (shape, kind) in state.items()}
    counters: dict[str, Any] = {"recipe": {"model": dataclasses.asdict(config)}, "step": 12, "tokens": 3456, "position": 144,
                                "tokens_by_corpus": {"web": 3456}, "hf_config": {"eos_token_id": [1, 106]}}
    with CheckpointWriter(path, **(counters | manifest)) as writer:
        for name, tensor in tensors.items():
            writer.add(f"model.{name}", tensor)
        writer.add("optim.step", torch.tensor(12))
    return tensors


def model_tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    assert all(name.startswith("model.") for name in checkpoint.names()) or "optim.step" in checkpoint.names()
    return {name.removeprefix("model."): checkpoint.read(name) for name in checkpoint.names() if name.startswith("model.")}


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def expected_export(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What an export must hold, written out by hand and not from the table: Megatron's names, q, k and v interleaved head by head."""
    theirs = {"embedding.word_embeddings.weight": ours["embedding.weight"], "embedding.scale": ours["embedding.scale"],
              "embedding.bias": ours["embedding.bias"], "decoder.final_layernorm.weight": ours["final_norm.weight"]}
    H, per_group = config.head_dim, config.num_heads // config.num_kv_heads
    for block in range(config.num_layers):
        def take(name: str, block: int = block) -> Tensor:
            return ours[f"blocks.{block}.{name}"]

        q, k, v = (take(f"attention.{letter}.weight") for letter in "qkv")
        rows = []
        for group in range(config.num_kv_heads):
            for head in range(group * per_group, (group + 1) * per_group):
                rows.append(q[head * H: (head + 1) * H])
            rows += [k[group * H: (group + 1) * H], v[group * H: (group + 1) * H]]
        layer = {"self_attention.linear_qkv.weight": torch.cat(rows)}
        layer["self_attention.linear_qkv.layer_norm_weight"] = take("attention_norm.weight")
        layer["self_attention.linear_proj.weight"] = take("attention.o.weight")
        layer["pre_mlp_layernorm.weight"] = take("moe_norm.weight")
        layer["mlp.router.weight"], layer["mlp.router.expert_bias"] = take("moe.router.out.weight"), take("moe.router.balance_bias")
        layer["mlp.experts.experts.linear_fc1.weight"] = take("moe.experts.gate_up")
        layer["mlp.experts.experts.linear_fc2.weight"] = take("moe.experts.down")
        for kind in ("weight", "bias"):
            for part in ("q_depthwise", "q_grouped", "k_depthwise", "k_grouped"):
                layer[f"self_attention.{part}.{kind}"] = take(f"attention.{part}.{kind}")
            for part in ("down", "fc1", "fc2"):
                layer[f"mlp.router.{part}.{kind}"] = take(f"moe.router.{part}.{kind}")
            for side in ("branch", "stream"):
                word = {"weight": "scale", "bias": "bias"}[kind]
                layer[f"self_attn_bda.{side}_{word}"] = take(f"attention_residual.{side}_{word}")
                layer[f"mlp_bda.{side}_{word}"] = take(f"moe_residual.{side}_{word}")
        layer["self_attention.temperature"], layer["mlp.router.norm.weight"] = take("attention.temperature"), take("moe.router.norm.weight")
        if block:
            layer["mlp.router.depth_scale"] = take("moe.router.depth_scale")
        theirs |= {f"decoder.layers.{block}.{name}": tensor for name, tensor in layer.items()}
    return theirs


@pytest.fixture(scope="module")
def pair() -> Iterator[WorkerPool]:
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of SMALL in several files; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("exported")
    write_checkpoint(folder / "ours")
    assert export_megatron.main([str(folder / "ours"), str(folder / "theirs"), "--max-file-size", "40KB"]) == 0
    return folder / "theirs"


def refused(capsys: pytest.CaptureFixture[str], source: Path, *words: str, tool: Any = import_megatron) -> None:
    """One line on stderr with all the words, exit code 2, and nothing new on the disk."""
    target = source.parent / "target"
    capsys.readouterr()
    assert tool.main([str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{tool.__name__}: ") and error.count("\n") == 1 and "Traceback" not in error, error
    for word in words:
        assert word in error, error
    assert not target.exists() and not any(path.name.startswith(".target") for path in source.parent.iterdir())


def rewrite_metadata(directory: Path, change: Callable[[Metadata], Any]) -> None:
    """Change .metadata in place; a dict that `change` returns takes its place."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    replacement = change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(replacement if isinstance(replacement, dict) else metadata))


# ---------------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("config", [
    SMALL, GPT,
    ModelConfig(vocab_size=262272, hidden_size=2048, num_layers=40, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=16,
                moe_intermediate_size=2048, router_hidden_size=256, rope_theta=5e6),
    *(draw(seed).config for seed in range(6)),
], ids=["small", "gpt", "8B", *map(str, range(6))])
def test_the_table_names_every_tensor_once_and_keeps_every_element(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Zaya(config).state_dict()
    table = megatron.links(config)
    ours = [named for link in table for named in link.ours]
    assert len({named.name for named in ours}) == len(ours) and len({link.theirs.name for link in table}) == len(table)
    assert {named.name: named.shape for named in ours} == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for link in table:
        assert sum(torch.Size(named.shape).numel() for named in link.ours) == torch.Size(link.theirs.shape).numel(), link.theirs.name
    assert all(link.theirs.name.startswith(megatron.PREFIXES) for link in table)


@pytest.mark.parametrize("seed", range(6))
def test_the_model_survives_its_arguments(seed: int) -> None:
    config = dataclasses.replace(draw(seed).config, attention_pattern=("full",), sliding_window=0, rope_theta_sliding=1e4)
    assert megatron.from_arguments(megatron.to_arguments(config)) == config


def test_blocks_that_slide_are_said_and_not_taken_for_full_ones() -> None:
    arguments = megatron.to_arguments(SMALL)
    assert arguments["window_size"] == (4, 0) and arguments["window_attn_skip_freq"][:3] == [1, 0, 1]
    with pytest.raises(ValueError, match=r"args.window_size = \(4, 0\) is not supported"):
        megatron.from_arguments(arguments)


# ---------------------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("config", [SMALL, GPT, draw(3).config], ids=["small", "gpt", "drawn"])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    before = write_checkpoint(tmp_path / "ours", config, dtype)
    assert export_megatron.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--max-file-size", "30KB"]) == 0
    assert import_megatron.main([str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    assert_same_tensors(model_tensors(tmp_path / "back"), before)
    left, right = (dataclasses.replace(Checkpoint.open(tmp_path / name).manifest, tensors={}, files={}) for name in ("ours", "back"))
    assert left == right


def test_files_are_cut_at_the_size_asked_for(exported: Path) -> None:
    sizes = [path.stat().st_size for path in exported.glob("__0_*.distcp")]
    assert len(sizes) > 3 and all(size <= 40_000 + 2_000 for size in sizes)  # torch.save puts up to 2 kB of records around a tensor
    assert sorted(path.name for path in exported.iterdir() if path.suffix != ".distcp") == [".metadata", "common.pt", "metadata.json"]


def test_a_wider_export_is_of_the_masters_and_the_balance_bias_keeps_its_dtype(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, num_layers=1)
    weights = write_checkpoint(tmp_path / "weights", config, torch.bfloat16)
    masters = {name: tensor.double() + 2**-20 for name, tensor in weights.items() if not name.endswith("balance_bias")}
    with CheckpointWriter(tmp_path / "run" / "checkpoints" / "step-00000012", recipe={"model": dataclasses.asdict(config)}) as writer:
        for name, tensor in weights.items():
            writer.add(f"model.{name}", tensor)
        for name, tensor in masters.items():
            writer.add(f"optim.master.{name}", tensor.float())
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert export_megatron.main([str(tmp_path / "run"), str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert import_megatron.main([str(tmp_path / dtype), str(tmp_path / f"{dtype}-back")]) == 0
        back = model_tensors(tmp_path / f"{dtype}-back")
        for name, tensor in weights.items():
            exact = tensor if name.endswith("balance_bias") else masters[name].float() if dtype == "fp32" else tensor
            assert torch.equal(back[name], exact) and back[name].dtype == (torch.float32 if name.endswith("balance_bias") else kind), name


# ---------------------------------------------------------------------------------------------------------------- other parties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_loads_what_we_export(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = write_checkpoint(tmp_path / "ours", SMALL, dtype)
    assert export_megatron.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--max-file-size", "30KB"]) == 0
    expected = expected_export(ours, SMALL)
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "theirs"), no_dist=True)
    assert_same_tensors(state, expected)
    stored = dcp.FileSystemReader(tmp_path / "theirs").read_metadata().state_dict_metadata
    assert stored.keys() == expected.keys()


def save_sharded(rank: int, world_size: int, source: str, target: str) -> None:
    """Write the tensors of a file of torch.save through DCP on every rank: cut along one dim or another, unevenly, some replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {}
    for index, (name, tensor) in enumerate(torch.load(source).items()):
        placement = Replicate() if index % 4 == 3 and tensor.numel() > 1 else Shard(index % tensor.dim())
        state[name] = distribute_tensor(tensor, mesh, [placement])
    state["optimizer.state.exp_avg.decoder.layers.0.pre_mlp_layernorm.weight"] = torch.ones(3)  # left aside, as is what follows
    state["rng_state"] = {"python": "not a tensor"}
    dcp.save(state, checkpoint_id=target)


@pytest.mark.parametrize(("kv_heads", "dtype"), [(3, torch.float32), (1, torch.bfloat16)])
def test_what_torch_saves_from_two_ranks_is_imported(tmp_path: Path, pair: WorkerPool, kv_heads: int, dtype: torch.dtype) -> None:
    """151 and 150 rows of the embedding; of 3 temperatures 2 and 1, of 1 temperature 1 and none."""
    config = dataclasses.replace(SMALL, vocab_size=301, num_kv_heads=kv_heads)
    ours = write_checkpoint(tmp_path / "ours", config, dtype)
    torch.save(expected_export(ours, config), tmp_path / "expected.pt")
    pair.run(save_sharded, str(tmp_path / "expected.pt"), str(tmp_path / "theirs"))
    own = {key: getattr(Checkpoint.open(tmp_path / "ours").manifest, key) for key in import_megatron.CARRIED}
    torch.save({"zaya": json.dumps(own)}, tmp_path / "theirs" / "common.pt")
    reader = TorchDistReader(tmp_path / "theirs")
    assert sum(len(reader.entry(link.theirs.name).chunks) == 2 for link in megatron.links(config)) > 30
    assert {chunk.file for link in megatron.links(config) for chunk in reader.entry(link.theirs.name).chunks} >= {
        "__0_0.distcp", "__1_0.distcp"}
    assert import_megatron.main([str(tmp_path / "theirs"), str(tmp_path / "back")]) == 0
    assert_same_tensors(model_tensors(tmp_path / "back"), ours)


def run_megatron(rank: int, world_size: int, tp: int, ep: int, export: str, resaved: str) -> dict[str, Any]:
    """Megatron's GPTModel loads our export with Megatron's loader, computes with it, and saves all of it with Megatron's saver."""
    import warnings
    from argparse import Namespace

    warnings.simplefilter("ignore")  # Apex and TransformerEngine are not installed
    with mock.patch("torch.cuda.current_device", lambda: "cpu"), mock.patch("torch.cuda.synchronize", lambda *device: None):
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.dist_checkpointing.validation import StrictHandling
        from megatron.core.transformer.enums import AttnBackend

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, expert_model_parallel_size=ep)
        try:
            model = gpt_model()
            asked = {"model": model.sharded_state_dict(metadata=dict(PER_LAYER))}
            state, unasked, lacking = dist_checkpointing.load(asked, export, strict=StrictHandling.RETURN_ALL)
            model.load_state_dict(state["model"])
            found = {"unasked": unasked, "lacking": lacking, "iteration": state["iteration"],
                     "version": state["checkpoint_version"], "hidden_size": state["args"].hidden_size, **compute(model)}
            arguments = Namespace(**vars(state["args"]), attention_backend=AttnBackend.auto)
            extra = {name: dist_checkpointing.ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank)
                     for name, tensor in read_directly(export, unasked).items()}
            everything = {"model": model.sharded_state_dict(metadata=dict(PER_LAYER)), "extra": extra, "args": arguments, "iteration": 12,
                          "checkpoint_version": 3.0}
            may_fork = mock.patch.dict(multiprocessing.current_process()._config, daemon=False)  # type: ignore[attr-defined]
            with may_fork, mock.patch("megatron.core.dist_checkpointing.strategies.filesystem_async._process_memory", lambda: 0):
                dist_checkpointing.save(everything, resaved)
            return found
        finally:
            parallel_state.destroy_model_parallel()


def gpt_model() -> Any:
    """GPT as Megatron builds it. Its specification names the norm before the experts as the TransformerEngine one does, the default."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=GPT.num_layers, hidden_size=GPT.hidden_size, num_attention_heads=GPT.num_heads, num_query_groups=GPT.num_kv_heads,
        kv_channels=GPT.head_dim, ffn_hidden_size=GPT.moe_intermediate_size, moe_ffn_hidden_size=GPT.moe_intermediate_size,
        num_moe_experts=GPT.num_experts, moe_router_topk=1, moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, normalization="RMSNorm", use_cpu_initialization=True)
    spec = get_gpt_layer_local_spec(num_experts=GPT.num_experts, moe_grouped_gemm=False, normalization="RMSNorm")
    del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return GPTModel(config, spec, vocab_size=GPT.vocab_size, max_sequence_length=8, share_embeddings_and_output_weights=True,
                    position_embedding_type="rope")


def compute(model: Any) -> dict[str, Any]:
    """What Megatron makes of its share of linear_qkv and of the experts of layer 1: q, k, v by head, and each expert's output."""
    layer = model.decoder.layers[1]
    x = torch.linspace(-1, 1, 3 * GPT.hidden_size).view(3, 1, GPT.hidden_size)
    with torch.no_grad():
        q, k, v = layer.self_attention.get_query_key_value_tensors(x)
        experts = [expert(x)[0] for expert in layer.mlp.experts.local_experts]
    return {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "experts": [expert.numpy() for expert in experts]}


def read_directly(path: str, names: set[str]) -> dict[str, Tensor]:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in sorted(names)}  # type: ignore[union-attr]
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2)])
def test_megatron_loads_our_export_and_we_import_what_it_saves(tmp_path: Path, pair: WorkerPool, tp: int, ep: int) -> None:
    ours = write_checkpoint(tmp_path / "ours", GPT)
    assert export_megatron.main([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--max-file-size", "50KB"]) == 0
    (tmp_path / "resaved").mkdir()
    ranks = pair.run(run_megatron, tp, ep, str(tmp_path / "theirs"), str(tmp_path / "resaved"))

    # Its names are the table's: it finds all it looks for (but the empty _extra_state objects), and what it does not know is OURS.
    assert all(re.search(r"\._extra_state(/|$)", name) for found in ranks for name in found["lacking"])
    foreign = {f"decoder.layers.{block}.{name}" for block in range(GPT.num_layers) for name in megatron.OURS.values()}
    foreign = (foreign | set(megatron.OUTSIDE_OURS.values())) - {"decoder.layers.0.mlp.router.depth_scale"}
    assert all(found["unasked"] == foreign for found in ranks)
    assert all((found["iteration"], found["version"], found["hidden_size"]) == (12, 3.0, 32) for found in ranks)

    # Its layouts are the table's: heads and gates are where it looks for them.
    x = torch.linspace(-1, 1, 3 * GPT.hidden_size).view(3, 1, GPT.hidden_size)
    layer = {name.removeprefix("blocks.1."): tensor for name, tensor in ours.items() if name.startswith("blocks.1.")}
    for letter in "qkv":
        by_rank = [torch.from_numpy(found[letter]).flatten(2) for found in ranks]
        theirs = torch.cat(by_rank, dim=-1) if tp > 1 else by_rank[0]
        torch.testing.assert_close(theirs, F.linear(x, layer[f"attention.{letter}.weight"]))
    gate, up = (x.squeeze(1) @ half.mT for half in layer["moe.experts.gate_up"].chunk(2, dim=1))
    expected = (F.silu(gate) * up) @ layer["moe.experts.down"].mT
    first, second = (torch.stack([torch.from_numpy(expert).squeeze(1) for expert in found["experts"]]) for found in ranks)
    torch.testing.assert_close(torch.cat([first, second]) if ep > 1 else first + second, expected)  # tp: its dispatcher sums the parts

    assert (tmp_path / "resaved" / "__1_0.distcp").is_file()
    assert import_megatron.main([str(tmp_path / "resaved"), str(tmp_path / "back")]) == 0
    assert_same_tensors(model_tensors(tmp_path / "back"), ours)
    manifest = Checkpoint.open(tmp_path / "back").manifest
    assert manifest.step == 12


def test_a_run_of_megatron_is_known_by_its_arguments_and_its_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = write_checkpoint(tmp_path / "ours", GPT)
    run = tmp_path / "run"
    assert export_megatron.main([str(tmp_path / "ours"), str(run / "iter_0000012")]) == 0
    common = torch.load(run / "iter_0000012" / "common.pt", weights_only=False)
    assert vars(common["args"])["params_dtype"] == torch.float32
    del common["zaya"]
    common["rng"] = {"torch": torch.get_rng_state(), "numpy": random.getstate()}
    torch.save(common, run / "iter_0000012" / "common.pt")
    refused(capsys, run, "is not a torch_dist checkpoint: it has no .metadata")
    (run / "latest_checkpointed_iteration.txt").write_text("12")
    assert import_megatron.main([str(run), str(tmp_path / "back")]) == 0
    assert_same_tensors(model_tensors(tmp_path / "back"), ours)
    assert Checkpoint.open(tmp_path / "back").manifest.recipe == {"model": json.loads(json.dumps(dataclasses.asdict(GPT)))}
    (run / "latest_checkpointed_iteration.txt").write_text("../../etc")
    refused(capsys, run, "latest_checkpointed_iteration.txt holds '../../etc'")


# ---------------------------------------------------------------------------------------------------------------- hostile input


class Evil:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "theirs")
    return tmp_path / "theirs"


def plant_in_metadata(directory: Path, evil: object) -> None:
    rewrite_metadata(directory, lambda metadata: setattr(metadata, "planner_data", {"x": [evil]}))


def plant_instead_of_metadata(directory: Path, evil: object) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(evil))


def plant_in_common(directory: Path, evil: object) -> None:
    torch.save({"args": argparse.Namespace(num_layers=evil)}, directory / "common.pt")


def plant_in_chunk(directory: Path, evil: object) -> None:
    """Over the first tensor's numbers, at the length that .metadata gives it."""
    place = TorchDistReader(directory).entry("embedding.word_embeddings.weight").chunks[0]
    data = bytearray((directory / place.file).read_bytes())
    planted = io.BytesIO()
    torch.save(evil, planted)
    data[place.begin: place.begin + place.length] = planted.getvalue()
    (directory / place.file).write_bytes(data)
    rewrite_metadata(directory, lambda metadata: metadata.storage_data.__setitem__(
        MetadataIndex("embedding.word_embeddings.weight", [0, 0], 0), _StorageInfo(place.file, place.begin, len(planted.getvalue()))))


@pytest.mark.parametrize("plant", [plant_in_metadata, plant_instead_of_metadata, plant_in_common, plant_in_chunk])
@pytest.mark.parametrize("function", [os.system, os.mkdir, exec], ids=["system", "mkdir", "exec"])
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(
        plant: Callable[[Path, object], None], function: Callable[..., Any], copy: Path, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    ran = tmp_path / "it-ran"
    argument = {os.system: f"touch {ran}", os.mkdir: str(ran), exec: f"open({str(ran)!r}, 'w')"}[function]
    evil = Evil(function, argument)
    pickle.loads(pickle.dumps(evil))
    assert ran.exists()  # the trap works
    ran.rmdir() if ran.is_dir() else ran.unlink()
    plant(copy, evil)
    ran.rmdir() if ran.is_dir() else ran.unlink(missing_ok=True)  # torch.load of the test's own preparation
    words = (".distcp", "weights_only") if plant is plant_in_chunk else ("common.pt" if plant is plant_in_common else ".metadata",
                                                                        function.__name__, "was not run")
    refused(capsys, copy, *words)
    assert not ran.exists()


@pytest.mark.parametrize(("module", "name"), [
    ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "__import__"), ("torch", "load"), ("torch.hub", "load"),
    ("torch", "Tensor"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__.__globals__"), ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "os"), ("argparse", "Namespace"), ("functools", "partial"), ("operator", "attrgetter"),
    ("torch.serialization", "load"), ("numpy", "load"),
])
def test_names_outside_the_list_are_refused(copy: Path, capsys: pytest.CaptureFixture[str], module: str, name: str) -> None:
    """Written by hand: STACK_GLOBAL of the two strings, called with one argument. argparse.Namespace is for common.pt alone."""
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    (copy / ".metadata").write_bytes(b"\x80\x04" + text(module) + text(name) + b"\x93" + text("x") + b"\x85R.")
    refused(capsys, copy, f"{module}.{name}"[:10], "has no place in this format")


def test_what_a_pickle_does_to_a_class_stays_with_its_file(copy: Path) -> None:
    """BUILD on a class sets its attributes: of a record of this one file, not of torch's class and not of the next reader's."""
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    names = text("torch.distributed.checkpoint.metadata") + text("Metadata") + b"\x93"
    (copy / ".metadata").write_bytes(b"\x80\x04" + names + b"N}" + text("fields") + b"K\x01s\x86b.")
    with pytest.raises(CheckpointError, match="damaged"):
        TorchDistReader(copy)
    assert not hasattr(Metadata, "fields")


TOWER = b")" + b"2\x86" * 60
"""An empty tuple, then 60 times the pair of the last one with itself: 2^60 tuples to whoever follows them one by one."""


@pytest.mark.parametrize("pickled", [
    b"}" + TOWER + b"Ns", b"}(" + TOWER + b"Nu", b"(" + TOWER + b"Nd", b"\x8f(" + TOWER + b"\x90", b"(" + TOWER + b"\x91",
    b"})" + b"\x85" * 1_000_000 + b"Ns", b"}(" + b"N" * 1_000_000 + b"tNs", b"}\x8a\x09" + b"\xff" * 8 + b"\x01Ns",
], ids=["setitem", "setitems", "dict", "additems", "frozenset", "deep", "long", "large"])
def test_a_key_that_takes_long_to_hash_is_refused(copy: Path, capsys: pytest.CaptureFixture[str], pickled: bytes) -> None:
    (copy / ".metadata").write_bytes(b"\x80\x04" + pickled + b".")
    refused(capsys, copy, ".metadata is damaged: one of its keys is")


@pytest.mark.parametrize("pickled", [b"ccollections\nOrderedDict\n]]" + TOWER + b"aNaa\x85R", b"cbuiltins\nset\n]" + TOWER + b"a\x85R"],
                         ids=["OrderedDict", "set"])
def test_a_class_that_would_hash_what_it_is_made_of_does_not(copy: Path, capsys: pytest.CaptureFixture[str], pickled: bytes) -> None:
    (copy / ".metadata").write_bytes(b"\x80\x04" + pickled + b".")
    refused(capsys, copy, ".metadata is damaged: ")


def test_memory_that_a_pickle_only_claims_is_not_taken(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / ".metadata").write_bytes(b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".")
    refused(capsys, copy, ".metadata is damaged: it holds a bytearray")


def test_a_pipe_in_a_files_place_is_not_waited_for(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in copy.glob("*.distcp"):
        file.unlink()
        os.mkfifo(file)
    refused(capsys, copy, "is missing: there is no such file")


def test_a_value_that_is_long_to_tell_is_told_in_short(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower: Any = ()
    for _ in range(60):
        tower = tower, tower

    def rename(metadata: Metadata) -> None:
        for index in metadata.storage_data:
            object.__setattr__(index, "fqn" if index.fqn == "embedding.bias" else "offset", tower)

    torch.save({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"num_experts": tower})}, copy / "common.pt")
    refused(capsys, copy, "args.num_experts = ((", "is not an integer")
    rewrite_metadata(copy, rename)
    refused(capsys, copy, ".metadata is damaged: what it says of tensor")


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "sub/x.distcp", "..", ".metadata", "common.pt", "", 7, None,
                                  "a\0.distcp"])
def test_a_file_name_is_never_a_path(copy: Path, capsys: pytest.CaptureFixture[str], name: object) -> None:
    place = TorchDistReader(copy).entry("embedding.scale").chunks[0]
    for decoy in (copy.parent / "outside.distcp", copy / "sub" / "x.distcp"):
        decoy.parent.mkdir(exist_ok=True)
        shutil.copyfile(copy / place.file, decoy)  # it is there, and it is right
    rewrite_metadata(copy, lambda metadata: setattr(metadata.storage_data[MetadataIndex("embedding.scale", [0])], "relative_path", name))
    refused(capsys, copy, "embedding.scale", "not a plain *.distcp file name")


def drop(metadata: Metadata, name: str) -> object:
    return metadata.state_dict_metadata.pop(name)


def entry(metadata: Metadata, name: str = "embedding.scale") -> Any:
    return metadata.state_dict_metadata[name]


def place(metadata: Metadata, name: str = "embedding.scale") -> Any:
    return metadata.storage_data[MetadataIndex(name, [0])]


CHANGES: dict[str, tuple[Callable[[Metadata], Any], tuple[str, ...]]] = {
    "missing": (lambda m: drop(m, "embedding.scale"), ("lacks tensor embedding.scale",)),
    "two missing": (lambda m: [drop(m, "embedding.scale"), drop(m, "embedding.bias")], ("lacks tensor embedding.bias (and 1 more)",)),
    "extra": (lambda m: m.state_dict_metadata.update({"output_layer.weight": entry(m)}), ("unexpected tensor output_layer.weight",)),
    "pickled": (lambda m: m.state_dict_metadata.update({"embedding.scale": BytesStorageMetadata()}), ("lacks tensor embedding.scale",)),
    "stacked": (lambda m: m.state_dict_metadata.update({"decoder.layers.mlp.router.weight": entry(m)}),
                ("decoder.layers.mlp.router.weight",)),
    "shape": (lambda m: setattr(entry(m), "size", torch.Size([31])), ("embedding.scale",)),
    "misshapen": (lambda m: m.state_dict_metadata.update({"embedding.scale": entry(m, "decoder.layers.0.self_attention.temperature")}),
                  ("embedding.scale",)),
    "dtype": (lambda m: setattr(entry(m).properties, "dtype", torch.float64), ("embedding.scale", "is not of dtype torch.float64")),
    "float8": (lambda m: setattr(entry(m).properties, "dtype", torch.float8_e4m3fn), ("embedding.scale", "float8_e4m3fn", "supported")),
    "no chunk": (lambda m: setattr(entry(m), "chunks", []), ("embedding.scale", "do not tile")),
    "chunk twice": (lambda m: entry(m).chunks.append(entry(m).chunks[0]), ("embedding.scale", "do not tile")),
    "chunk outside": (lambda m: setattr(entry(m).chunks[0], "sizes", torch.Size([33])), ("embedding.scale", "makes no sense")),
    "chunk of 2 dims": (lambda m: setattr(entry(m).chunks[0], "sizes", torch.Size([4, 8])), ("embedding.scale", "makes no sense")),
    "no place": (lambda m: m.storage_data.pop(MetadataIndex("embedding.scale", [0])), ("embedding.scale", "not a plain")),
    "no file": (lambda m: setattr(place(m), "relative_path", "__9_9.distcp"), ("is missing", "__9_9.distcp")),
    "beyond": (lambda m: setattr(place(m), "length", 10**9), ("embedding.scale ends beyond the file",)),
    "negative": (lambda m: setattr(place(m), "offset", -1), ("embedding.scale", "makes no sense")),
    "elsewhere": (lambda m: setattr(place(m), "offset", place(m).offset + 64), ("embedding.scale is damaged",)),
    "another's": (lambda m: m.storage_data.update({MetadataIndex("embedding.scale", [0]): place(m, "embedding.bias")}), ()),
    "compressed": (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), ("embedding.scale", "extension")),
    "no metadata": (lambda m: {"a": 1}, ("is not the metadata of a checkpoint",)),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", None), ("is not the metadata of a checkpoint",)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_metadata_that_does_not_fit_is_named(copy: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    change, words = CHANGES[case]
    rewrite_metadata(copy, change)
    if words:
        refused(capsys, copy, *words)
    else:  # nothing can tell: the format has no hashes, and dtype and shape are right
        assert import_megatron.main([str(copy), str(copy.parent / "target")]) == 0


@pytest.mark.parametrize(("file", "contents", "words"), [
    (".metadata", b"", ".metadata is damaged"), (".metadata", b"\x80\x04", ".metadata is damaged"),
    (".metadata", b"\x80\x04Nr\xff\xff\xff\xff.", ".metadata is damaged"), (".metadata", b"(" * 100000, ".metadata is damaged"),
    ("common.pt", b"PK", "common.pt is damaged"), ("common.pt", pickle.dumps({"args": 1}), "common.pt is damaged"),
    ("metadata.json", b"{", "metadata.json is damaged"), ("metadata.json", b'{"sharded_backend": "zarr"}', "'zarr' is not supported"),
    ("metadata.json", b"[]", "None is not supported"), ("common.pt", None, "has no args"),
])
def test_broken_files_are_named(copy: Path, capsys: pytest.CaptureFixture[str], file: str, contents: bytes | None, words: str) -> None:
    (copy / file).unlink()
    if contents is not None:
        (copy / file).write_bytes(contents)
    refused(capsys, copy, words)


@pytest.mark.parametrize(("common", "words"), [
    ({"zaya": "{"}, "zaya is not valid JSON"), ({"zaya": "[]"}, "zaya is not an object of step"), ({"zaya": "{}"}, "zaya is not an object"),
    ({"args": {"num_layers": 3}}, "has no args"), ({"args": argparse.Namespace()}, "args.padded_vocab_size = None is not an integer"),
    ({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"num_layers": 10**9})}, "too few for 1000000000 layers"),
    ({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"num_layers": 2})}, "unexpected tensor decoder.layers.2."),
    ({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"num_experts": 5})}, "router.weight has shape [5, 8], this model asks"),
    ({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"swiglu": False})}, "args.swiglu = False is not supported"),
    ({"args": argparse.Namespace(**megatron.to_arguments(FULL) | {"rotary_base": "x"})}, "args.rotary_base = 'x'"),
    ([1], "common.pt is damaged: it is not a dict"),
])
def test_a_model_that_is_not_told_is_asked_for(copy: Path, capsys: pytest.CaptureFixture[str], common: object, words: str) -> None:
    torch.save(common, copy / "common.pt")
    refused(capsys, copy, words)


def test_a_zip_that_grows_is_not_unpacked(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(copy / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", b"\x80\x02" + b"N0" * 10_000_000 + b"N.")
    refused(capsys, copy, "common.pt is damaged: it is not a file of torch.save")


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_damage_is_refused_or_harmless(copy: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    """Cut at any byte, or with a few bytes changed: one line and nothing written, or, where no check can tell, a whole checkpoint."""
    whole, rng, outcomes = (copy / file).read_bytes(), random.Random(5), []
    for attempt in range(40):
        data = bytearray(whole)
        if attempt % 4 == 0:
            del data[rng.randrange(len(data)):]
        else:
            for _ in range(rng.choice([1, 1, 4, 20])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        (copy / file).write_bytes(data)
        outcomes.append(import_megatron.main([str(copy), str(copy.parent / "target")]))
        error = capsys.readouterr().err
        assert outcomes[-1] == 0 or (outcomes[-1] == 2 and error.count("\n") == 1 and error.startswith("tools.import_megatron: ")), error
        assert (copy.parent / "target").exists() == (outcomes[-1] == 0)
        shutil.rmtree(copy.parent / "target", ignore_errors=True)
    assert outcomes.count(0) < 35 and all(outcome == 2 for outcome in outcomes[::4])


# ---------------------------------------------------------------------------------------------------------------- the tools


def test_the_export_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "ours")
    refused(capsys, tmp_path / "nowhere", "is neither a checkpoint", tool=export_megatron)
    write_checkpoint(tmp_path / "other", recipe={"model": dataclasses.asdict(dataclasses.replace(SMALL, num_layers=2))})
    refused(capsys, tmp_path / "other", "has the unexpected tensor model.blocks.2.", tool=export_megatron)
    write_checkpoint(tmp_path / "wide", recipe={"model": dataclasses.asdict(dataclasses.replace(SMALL, vocab_size=301))})
    refused(capsys, tmp_path / "wide", "model.embedding.weight has shape [300, 32], its recipe asks for [301, 32]", tool=export_megatron)
    write_checkpoint(tmp_path / "deep", recipe={"model": dataclasses.asdict(dataclasses.replace(SMALL, num_layers=4))})
    refused(capsys, tmp_path / "deep", "has no tensor model.blocks.3.", tool=export_megatron)
    shutil.copytree(tmp_path / "ours", tmp_path / "damaged")
    shard = next((tmp_path / "damaged").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(capsys, tmp_path / "damaged", "does not match its hash", tool=export_megatron)
    for size in ("4", "GB", "-1GB", "0GB", "1.5GB"):
        with pytest.raises(SystemExit) as error:
            export_megatron.main([str(tmp_path / "ours"), str(tmp_path / "x"), "--max-file-size", size])
        assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_tensors_that_become_one_must_be_of_one_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = write_checkpoint(tmp_path / "ours")
    with CheckpointWriter(tmp_path / "mixed", recipe={"model": dataclasses.asdict(SMALL)}) as writer:
        for name, tensor in tensors.items():
            writer.add(f"model.{name}", tensor.bfloat16() if name == "blocks.1.attention.k.weight" else tensor)
    refused(capsys, tmp_path / "mixed", "blocks.1.attention.k.weight", "different dtypes; choose one with --dtype", tool=export_megatron)
    assert export_megatron.main([str(tmp_path / "mixed"), str(tmp_path / "theirs"), "--dtype", "fp32"]) == 0


def test_an_older_export_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "ours")
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for extra, says in (([], "exists and is not empty"), (["--overwrite"], "is not an older export")):
        assert export_megatron.main([str(tmp_path / "ours"), str(target), *extra]) == 2
        assert says in capsys.readouterr().err
    (target / "notes.txt").unlink()
    assert export_megatron.main([str(tmp_path / "ours"), str(target), "--max-file-size", "30KB"]) == 0
    many = len(list(target.glob("*.distcp")))
    assert export_megatron.main([str(tmp_path / "ours"), str(target)]) == 2
    assert len(list(target.glob("*.distcp"))) == many
    assert export_megatron.main([str(tmp_path / "ours"), str(target), "--overwrite"]) == 0
    assert len(list(target.glob("*.distcp"))) == 1 and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert import_megatron.main([str(target), str(tmp_path / "back")]) == 0
    with TorchDistWriter(tmp_path / "a training's", max_file_bytes=10**9) as writer:
        writer.add("x", torch.ones(1))
        writer.common = {"iteration": 1}
    assert export_megatron.main([str(tmp_path / "ours"), str(tmp_path / "a training's"), "--overwrite"]) == 2
    assert "was not made by this tool" in capsys.readouterr().err
    capsys.readouterr()
    assert import_megatron.main([str(target), str(tmp_path / "back")]) == 2  # over a checkpoint: never
    assert "exists and is not empty" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_older_export(tmp_path: Path) -> None:
    with TorchDistWriter(tmp_path / "x", max_file_bytes=10**9) as writer:
        writer.add("a", torch.ones(3))
    with pytest.raises(KeyboardInterrupt), TorchDistWriter(tmp_path / "x", max_file_bytes=10**9, overwrite=True) as writer:
        writer.add("b", torch.ones(3))
        raise KeyboardInterrupt
    assert TorchDistReader(tmp_path / "x").names() == ["a"] and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("tensor", [torch.ones(()), torch.empty(0, 3), torch.ones(2, 3).T, torch.ones(9999)[3:5], torch.arange(6) % 2 == 0,
                                    torch.arange(5), torch.ones(1, dtype=torch.uint8)], ids=str)
def test_any_tensor_of_a_checkpoint_passes(tmp_path: Path, tensor: Tensor) -> None:
    with TorchDistWriter(tmp_path / "x", max_file_bytes=10**9) as writer:
        writer.add("a", tensor)
    back = TorchDistReader(tmp_path / "x").read("a")
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    state = {"a": torch.zeros_like(tensor)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "x"), no_dist=True)
    assert torch.equal(state["a"], tensor)
    assert (tmp_path / "x" / "__0_0.distcp").stat().st_size < 3000  # of a view, its own elements alone


def export_to_a_full_disk(rank: int, world_size: int, source: str, target: str) -> tuple[list[int], str]:
    """Exit codes and stderr of exports by a process whose files cannot grow beyond a limit: a write notices it as it does a full disk."""
    before, codes, error = resource.getrlimit(resource.RLIMIT_FSIZE), [], io.StringIO()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with contextlib.redirect_stderr(error):
            for limit in (100, 20_000, 100_000):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                codes.append(export_megatron.main([source, f"{target}-{rank}"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return codes, error.getvalue()


def test_a_full_disk_is_one_line(tmp_path: Path, pair: WorkerPool) -> None:
    write_checkpoint(tmp_path / "ours")
    for rank, (codes, error) in enumerate(pair.run(export_to_a_full_disk, str(tmp_path / "ours"), str(tmp_path / "theirs"))):
        assert codes == [2, 2, 2], error
        assert error.splitlines() == [f"tools.export_megatron: cannot write {tmp_path}/theirs-{rank}: File too large"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


MEMORY = """
import sys
from tools import export_megatron, import_megatron

def peak():  # of this process alone; getrusage would inherit the parent's
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

base = peak()
ours, theirs, back = sys.argv[1:]
assert export_megatron.main([ours, theirs, "--max-file-size", "16MB"]) == 0
exported = peak()
assert import_megatron.main([theirs, back]) == 0
print(exported - base, peak() - base)
"""


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """110 MB of model, whose largest tensor has 8.4 MB, leave in files of 16 MB and come back; mapped file pages count too."""
    config = dataclasses.replace(SMALL, hidden_size=512, num_layers=8, num_experts=8, moe_intermediate_size=256, vocab_size=4096)
    write_checkpoint(tmp_path / "ours", config)
    size = sum(file.stat().st_size for file in tmp_path.glob("ours/*.safetensors"))
    largest = max(torch.Size(link.theirs.shape).numel() * 4 for link in megatron.links(config))
    assert size > 110e6 and largest < 8.5e6
    arguments = [str(tmp_path / name) for name in ("ours", "theirs", "back")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, timeout=120, check=True)
    exported, both = map(int, run.stdout.splitlines()[-1].split())
    # Measured: 30 MB, in the export: three times the largest tensor (mapped, read, joined), and the allocator's rest.
    assert exported < 5 * largest and both < 5 * largest, f"{exported / 1e6:.0f} MB, then {both / 1e6:.0f} MB"
    assert len(list((tmp_path / "theirs").glob("*.distcp"))) > 7
