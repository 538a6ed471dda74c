"""What holds of every checkpoint, whatever wrote it: from layout to layout and back nothing changes, any safetensors reader opens it."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests import tiny
from tests.cpu.test_checkpoint import STEP, assert_holds, cut, on_ranks, random_tensor, same
from tests.cpu.test_checkpoint import state as odd_tensors
from tests.cpu.test_reshape_checkpoint import assert_same, recipe, reshape, tensors_of
from tests.cpu.test_reshape_checkpoint import state as model_state
from tests.cpu.test_saver import Ranks
from tests.cpu.test_shard import layouts, owned, placements
from tools import export_deepspeed, export_megatron, import_deepspeed, import_hf, import_megatron, reshape_checkpoint
from zaya.checkpoint import rewrite
from zaya.checkpoint.boxes import key_of
from zaya.checkpoint.directory import step_path
from zaya.checkpoint.mirror import Mirror
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share, save
from zaya.checkpoint.saver import Saver
from zaya.checkpoint.write import CheckpointWriter
from zaya.config import model_from_tables
from zaya.dtypes import STORED_DTYPES
from zaya.shard import Layout, Replicate, Shard
from zaya.train import main as train_main

Placed = dict[str, Shard | Replicate]
EXAMPLES = 25
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would spend its time on fsync

# ------------------------------------------------------------------------------------------------------------------ there and back


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """None, empty, long, thin, of many dims; at most 60,000 elements."""
    kind = draw(st.sampled_from(["scalar", "empty", "vector", "long", "thin", "many dims"]))
    match kind:
        case "scalar":
            return ()
        case "empty":
            shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
            shape[draw(st.integers(0, len(shape) - 1))] = 0
            return tuple(shape)
        case "vector":
            return (draw(st.integers(1, 300)),)
        case "long":
            return (draw(st.integers(2000, 20_000)), draw(st.integers(1, 3)))
        case "thin":
            return (1, draw(st.integers(1, 9)), 1, draw(st.integers(200, 1000)))
    return tuple(draw(st.lists(st.integers(1, 3), min_size=5, max_size=9)))


@st.composite
def states(draw: st.DrawFn, ranks: tuple[Layout, ...]) -> tuple[dict[str, torch.Tensor], Placed]:
    tensors: dict[str, torch.Tensor] = {}
    placed: Placed = {}
    for i in range(draw(st.integers(1, 6))):
        placement, shape = draw(st.one_of(placements(*ranks), st.tuples(st.just(Replicate()), shapes())))
        tensors[f"t{i}"] = random_tensor(draw(st.sampled_from(list(STORED_DTYPES.values()))), shape, draw(st.integers(0, 99)))
        placed[f"t{i}"] = placement
    return tensors, placed


def moved(source: Path, placed: Placed, layout: Layout, root: Path, limit: int) -> Path:
    """Each rank reads what it owns into one flat buffer per tensor, as an optimizer keeps it, and saves that."""
    by_rank = []
    for rank in range(layout.world_size):
        checkpoint = Checkpoint.open(source)
        shares = {}
        for name, entry in checkpoint.manifest.tensors.items():
            boxes, place, parts = list(owned(layout, placed[name], entry.shape, rank)), 0, []
            flat = torch.empty(sum(math.prod(sizes) for _, sizes in boxes), dtype=STORED_DTYPES[entry.dtype])
            for box in boxes:
                part = flat[place : place + math.prod(box[1])]
                checkpoint.read_into(name, box, part)
                parts.append((box, part))
                place += part.numel()
            shares[name] = Share(flat.dtype, entry.shape, parts)
        by_rank.append(shares)
    return written(root, by_rank, limit)


def written(root: Path, by_rank: list[dict[str, Share]], limit: int) -> Path:
    path = step_path(root, STEP["step"])
    assert on_ranks(root, by_rank, max_file_bytes=limit, read_back=True) == [path] * len(by_rank)
    return path


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_saved_and_read_under_three_layouts_and_the_first_again(data: st.DataObject) -> None:
    a, b, c = data.draw(layouts()), data.draw(layouts()), data.draw(layouts())
    tensors, placed = data.draw(states((a, b, c)))
    limit = data.draw(st.sampled_from([1, 500, 4 << 30]))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        root = Path(folder)
        first = written(root / "a", [cut(tensors, a, rank, placed) for rank in range(a.world_size)], limit)
        second = moved(first, placed, b, root / "b", data.draw(st.sampled_from([1, 500, 4 << 30])))
        third = moved(second, placed, c, root / "c", 4 << 30)
        last = moved(third, placed, a, root / "a again", limit)
        for path in (first, second, third, last):
            assert_holds(path, tensors)
        assert Checkpoint.open(last).manifest == Checkpoint.open(first).manifest
        assert all((last / file).read_bytes() == (first / file).read_bytes() for file in Checkpoint.open(first).manifest.files)


def fitting_layouts(tables: dict[str, Any]) -> list[str]:
    """All layouts of up to 8 ranks (and some of 16) that a model can have, in the tool's words."""
    found = []
    for ranks in (1, 2, 3, 4, 6, 8, 16):
        for tp, cp, ep, zero in ((tp, cp, ep, zero) for tp in (1, 2, 3, 4, 8) for cp in (1, 2, 3) for ep in (1, 2, 3, 4, 8)
                                 for zero in (0, 1, 2, 4) if ranks % (tp * cp) == 0 and ranks % ep == 0):
            try:
                reshape_checkpoint.check_layout(Layout(ranks, tp, cp, ep, zero), model_from_tables(tables), tables)
            except ValueError:
                continue
            found.append(f"ranks={ranks},tp={tp},cp={cp},ep={ep},zero_size={zero}")
    return found


# A failing example is not made smaller: with four reshapes each that would take minutes.
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.reuse, Phase.generate])
@given(st.data())
def test_any_model_is_reshaped_three_times_and_back(data: st.DataObject) -> None:
    """All state of models of any shape, tp beyond the number of KV heads among them."""
    draw = data.draw
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    tables = recipe(num_kv_heads=kv_heads, num_heads=kv_heads * draw(st.sampled_from([1, 2, 4])), head_dim=draw(st.sampled_from([4, 8])),
                    hidden_size=draw(st.sampled_from([8, 24, 40])), num_layers=draw(st.integers(1, 3)),
                    num_experts=draw(st.sampled_from([1, 2, 3, 4, 8])), moe_intermediate_size=draw(st.sampled_from([8, 24])),
                    router_hidden_size=draw(st.sampled_from([4, 12])), vocab_size=draw(st.sampled_from([24, 48, 96])))
    possible = fitting_layouts(tables)
    a, b, c = (draw(st.sampled_from(possible)) for _ in range(3))
    expected = model_state(tables, bf16=draw(st.booleans()), seed=draw(st.integers(0, 9)))
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "CHUNK_BYTES", draw(st.sampled_from([300, 8 << 20])))  # a box in many pieces, and in one
        root = Path(folder)
        source = save(root / "source", cut(expected, Layout(1), 0), **{**STEP, "recipe": tables}, gather=lambda value: [value])
        first = reshape(source, root / "a", a)
        for name, layout in (("b", b), ("c", c), ("a again", a)):
            found = reshape(source, root / name, layout)
            found.verify()
            assert_same(tensors_of(found), expected)
            source = found.path
        assert found.manifest == first.manifest
        assert all((found.path / file).read_bytes() == (first.path / file).read_bytes() for file in first.manifest.files)


# ------------------------------------------------------------------------------------------------------------------ other readers


def assert_any_reader_opens(path: Path) -> None:
    """Every file by the safetensors library alone: its keys are what the manifest lists, its tensors the boxes."""
    checkpoint = Checkpoint.open(path)
    whole = tensors_of(checkpoint)
    boxes: dict[str, dict[str, torch.Tensor]] = {file: {} for file in checkpoint.manifest.files}
    for name, entry in checkpoint.manifest.tensors.items():
        for box in entry.boxes:
            assert box.key == key_of(name, box.offsets, box.sizes, entry.shape)
            boxes[box.file][box.key] = whole[name][tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
    for file, expected in boxes.items():
        with safe_open(path / file, framework="pt") as reader:
            assert set(reader.keys()) == set(expected) and reader.metadata() == {"format": "pt"}
            assert all(same(reader.get_tensor(key), tensor) for key, tensor in expected.items())
        assert load_file(path / file).keys() == expected.keys()


@pytest.mark.parametrize("staging_bytes", [0, 3000, 1 << 40], ids=["none staged", "some", "all"])
def test_every_shard_of_a_save_beside_training_and_of_its_mirror(tmp_path: Path, staging_bytes: int) -> None:
    tensors, ranks, layout = odd_tensors(big_rows=30), Ranks(3), Layout(3)

    def be(rank: int) -> None:
        mirror = Mirror(tmp_path / "local", tmp_path / "shared", gather=ranks.gather("mirror", rank), rank=rank, place=rank, places=3)
        saver = Saver(tmp_path / "local", gather=ranks.gather("save", rank), rank=rank, world_size=3, staging_bytes=staging_bytes,
                      mirror=mirror)
        saver.start(cut({name: tensor.clone() for name, tensor in tensors.items()}, layout, rank), **STEP)
        saver.close()

    for name in ("mirror", "save"):
        ranks.gather(name, 0)  # it is made here, once, not by three threads
    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for root in ("local", "shared"):
        assert_holds(step_path(tmp_path / root, 3), tensors)
        assert_any_reader_opens(step_path(tmp_path / root, 3))


def test_every_shard_of_a_reshaped_checkpoint(tmp_path: Path) -> None:
    source = save(tmp_path / "source", cut(model_state(recipe(), bf16=True), Layout(1), 0), **{**STEP, "recipe": recipe()},
                  gather=lambda value: [value])
    for layout in ("ranks=1", "ranks=8,tp=4,ep=2", "ranks=6,cp=3,ep=2"):
        assert_any_reader_opens(reshape(source, tmp_path / layout, layout, "--max-file-size", "9KB").path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of AdamW in bf16."""
    folder = tmp_path_factory.mktemp("trained")
    settings = tiny.recipe(folder, train__steps=2, train__eval_interval=0, train__dtype="bf16", checkpoint__interval=2, optim__name="adamw",
                           optim__lr=1e-3, optim__min_lr=1e-4)
    (folder / "recipe.toml").write_text(settings.to_toml())
    assert train_main([str(folder / "recipe.toml")]) == 0
    for handler in list(logging.getLogger("zaya").handlers):
        logging.getLogger("zaya").removeHandler(handler)
        handler.close()
    return folder / "run" / "checkpoints" / "step-00000002"


def test_every_shard_of_a_run(trained: Path) -> None:
    assert_any_reader_opens(trained)


@pytest.mark.parametrize("tool", ["hf", "deepspeed", "megatron", "writer"])
def test_every_shard_of_an_imported_checkpoint(trained: Path, tmp_path: Path, tool: str) -> None:
    out = tmp_path / "imported"
    if tool == "hf":
        from tests.cpu.test_hf import save_hf

        save_hf(tmp_path / "hf", dtype=torch.bfloat16)
        assert import_hf.main([str(tmp_path / "hf"), str(out)]) == 0
    elif tool == "deepspeed":
        assert export_deepspeed.main([str(trained), str(tmp_path / "universal")]) == 0
        assert import_deepspeed.main([str(tmp_path / "universal"), str(out), "--recipe", str(trained.parents[2] / "recipe.toml")]) == 0
    elif tool == "megatron":
        assert export_megatron.main([str(trained), str(tmp_path / "torch_dist")]) == 0
        assert import_megatron.main([str(tmp_path / "torch_dist"), str(out)]) == 0
    else:
        with CheckpointWriter(out, recipe={}, max_file_bytes=3000) as writer:
            for name, tensor in odd_tensors().items():
                writer.add(name, tensor)
    Checkpoint.open(out).verify()
    assert_any_reader_opens(out)
