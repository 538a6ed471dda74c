"""tools.inspect_checkpoint: says what is there, finds and names every damage, wherever it is, and touches nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.test_checkpoint import save_alone, save_threads, state
from tools.inspect_checkpoint import kind_of, main
from zaya.checkpoint import read
from zaya.checkpoint.directory import MANIFEST
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.read import Checkpoint

STATE = {"model.blocks.0.moe.router.down.weight": torch.ones(4, 6), "model.blocks.0.moe.router.balance_bias": torch.ones(5),
         "model.embedding.weight": torch.ones(8, 4, dtype=torch.bfloat16), "optim.master.embedding.weight": torch.ones(8, 4),
         "optim.momentum.blocks.0.moe.router.down.weight": torch.ones(4, 6), "optim.exp_avg.embedding.weight": torch.ones(8, 4),
         "optim.exp_avg_sq.embedding.weight": torch.ones(8, 4), "optim.balance.exp_avg": torch.ones(1, 4), "optim.step": torch.tensor(3.0),
         "rng.cpu": torch.zeros(0, dtype=torch.uint8)}


def flip(file: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def header_end(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in root.rglob("*")}


def damages(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    """Exit code of --verify, and what it names; stderr is one line where there is damage, empty where not."""
    code = main([str(path), "--verify", "--json", *options])
    out, err = capsys.readouterr()
    assert err.count("\n") == (code != 0) and err.startswith("tools.inspect_checkpoint: " if code else "")
    return code, json.loads(out)["damage"] if out else []


def test_kinds_of_state() -> None:
    assert [kind_of(name) for name in STATE] == ["model", "router balance", "model", "master", "momentum", "moments", "moments",
                                                 "router balance", "optim", "rng"]


def test_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_threads(tmp_path, STATE, 2)
    before = snapshot(tmp_path)
    assert main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["tokens"], found["position"], found["layout"]) == (3, 3000, 12, {"dp": 1, "world_size": 2})
    assert (found["good"], found["verified"], found["damage"]) == (True, False, [])
    assert found["kinds"]["model"] == {"tensors": 2, "elements": 56, "bytes": 24 * 4 + 32 * 2, "dtypes": ["BF16", "F32"]}
    assert found["kinds"]["moments"] == {"tensors": 2, "elements": 64, "bytes": 256, "dtypes": ["F32"]}
    assert found["bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors")) and found["files"] == 2
    assert found["boxes"] == sum(len(entry.boxes) for entry in Checkpoint.open(path).manifest.tensors.values()) > found["tensors"] == 10
    assert main([str(path), "--verify", "--tensors", "*router*"]) == 0
    out, err = capsys.readouterr()
    assert not err, "a progress bar has no place where there is no terminal"
    for words in ("step 3, 3,000 tokens, position 12 rows", "1,000 tokens of 'corpora/a'", "written by dp 1, world_size 2",
                  "every hash is right", "model.blocks.0.moe.router.down.weight", "[4, 6]", "2 files", "router balance"):
        assert words in out
    assert "model.embedding.weight" not in out
    assert snapshot(tmp_path) == before


def test_every_kind_of_flipped_bit_is_found_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_threads(tmp_path, state(), 2)
    rng = random.Random(2)
    assert damages(path, capsys) == (0, [])
    for file in sorted(path.iterdir()):
        clean = file.read_bytes()
        end = header_end(file)
        places = {"anywhere": (0, len(clean))} if file.name == MANIFEST else {
            "length": (0, 8), "header": (8, end), "metadata": (clean.index(b'"pt"') + 1, clean.index(b'"pt"') + 3),
            "padding": (len(clean[:end].rstrip()), end), "box": (end, len(clean))}
        for what, (low, high) in places.items():
            assert low < high, what
            for _ in range(12):
                flip(file, rng.randrange(low, high), rng.randrange(8))
                code, found = damages(path, capsys)
                assert code == 7 and len(found) == 1 and str(file) in found[0], (what, found)
                assert what != "box" or "tensor '" in found[0]
                file.write_bytes(clean)
    assert damages(path, capsys) == (0, [])


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_damage_is_named_not_the_first_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    tensors = {f"model.t{i}": torch.randn(1000, generator=torch.Generator().manual_seed(i)) for i in range(6)}
    path = save_alone(tmp_path, tensors, max_file_bytes=8000)  # two to a file
    first, second, third = sorted(path.glob("*.safetensors"))
    flip(first, header_end(first) + 17)
    flip(first, header_end(first) + 4001)
    flip(second, 9)
    third.write_bytes(third.read_bytes()[:-1])  # its last tensor goes with it
    code, found = damages(path, capsys, "--workers", workers)
    assert code == 7 and len(found) == 5
    for words in ("model.t0", "model.t1", f"{second}: the header", "its manifest says", "model.t5"):
        assert sum(words in line for line in found) == 1, words
    assert "2 boxes" in next(line for line in found if str(second) in line)
    third.unlink()
    assert "No such file" in damages(path, capsys)[1][1]
    # Without --verify: the size of what is there, and no more.
    assert main([str(path)]) == 7 and str(third) in capsys.readouterr().err
    shutil.copy(second, third)
    assert main([str(path)]) == 0


def test_a_run_lists_its_checkpoints_and_which_are_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "checkpoints"
    old, middle, new = (save_alone(root, STATE, step=step) for step in (1, 2, 3))
    killed = root / "step-00000004"
    killed.mkdir()
    (killed / "shard-00000-of-00001.safetensors").write_bytes(b"half")
    assert main([str(tmp_path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert out.count("every hash is right") == 4 and "step-00000004  no manifest.json" in out  # three lines, and the newest at length
    file = next(middle.glob("*.safetensors"))
    flip(file, file.stat().st_size - 1)
    flip(old / MANIFEST, 200)
    assert main([str(tmp_path), "--verify", "--json"]) == 7
    out, err = capsys.readouterr()
    found: dict[str, Any] = json.loads(out)
    assert [one["good"] for one in found["checkpoints"]] == [False, False, True] and found["unfinished"] == [str(killed)]
    assert MANIFEST in found["checkpoints"][0]["damage"][0] and "tensor" in found["checkpoints"][1]["damage"][0]
    assert "2 damages" in err and err.count("\n") == 1
    assert main([str(tmp_path), "--verify"]) == 7
    out = capsys.readouterr().out
    assert out.count("CORRUPT: 1 damage") == 2 and str(file) in out and str(new) in out


@pytest.mark.parametrize("options", [[], ["--verify"], ["--json"]])
def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    path = save_alone(tmp_path / "run" / "checkpoints", STATE)
    (path / MANIFEST).unlink()
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder" / MANIFEST).mkdir(parents=True)
    before = snapshot(tmp_path)
    for wrong in (path, tmp_path / "run", tmp_path, tmp_path / "nowhere", tmp_path / "file", tmp_path / "folder"):
        assert main([str(wrong), *options]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("tools.inspect_checkpoint: ") and err.count("\n") == 1 and str(wrong) in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("files", "says"), [
    (["config.json", "model.safetensors"], "with config.json it looks like a model of transformers; tools.import_hf reads those"),
    (["step_3/zero/optimizer_state.pt", "latest_universal"], "tools.import_deepspeed reads those"),
    (["zero/optimizer_state.pt", "mp_rank_00_model_states.pt"], "a universal checkpoint of DeepSpeed; tools.import_deepspeed reads"),
    (["latest", "global_step3/mp_rank_00_model_states.pt"], "with latest it looks like a checkpoint of DeepSpeed; its ds_to_universal"),
    ([".metadata", "common.pt", "metadata.json"], "a torch_dist checkpoint of Megatron-core; tools.import_megatron reads those"),
    (["latest_checkpointed_iteration.txt", "iter_0000003/.metadata"], "a run of Megatron-LM; tools.import_megatron reads those"),
    ([".metadata", "__0_0.distcp"], "with .metadata it looks like a checkpoint of torch.distributed; no tool here reads those"),
])
def test_another_programs_checkpoint_is_not_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], says: str) -> None:
    """Whether it has a manifest.json or not."""
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    not_ours = f"{tmp_path} is not a zaya checkpoint: its {MANIFEST} is another program's"
    for manifest, first in ((None, f"{tmp_path} is neither a checkpoint (no {MANIFEST}) nor a run"), ('["file"]', not_ours),
                            ('{"name": "model", "files": []}', not_ours), (json.dumps(["file"] * (1 << 18)), not_ours)):
        if manifest is not None:
            (tmp_path / MANIFEST).write_text(manifest)
        assert main([str(tmp_path), "--verify"]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and first in err and says in err, err


def reseal(path: Path, before: str, after: str) -> None:
    body = path.read_text().partition("\n")[2].replace(before, after)
    path.write_text(f'{{"xxh3": "{hash_bytes(body.encode())}",\n{body}')


def test_a_newer_programs_checkpoint_is_not_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (save_alone(tmp_path / "checkpoints", STATE, step=step) for step in (1, 2))
    reseal(new / MANIFEST, '"format_version": 1', '"format_version": 99')
    assert main([str(new), "--verify"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and f"{new} is not a zaya checkpoint of this version: " in err and "format_version 99" in err
    assert main([str(tmp_path)]) == 0, "beside it is one that is whole"
    out = capsys.readouterr().out
    assert "step-00000002  not a zaya checkpoint of this version" in out and "CORRUPT" not in out and f"\n\n{old}\n" in out
    assert main([str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in found["checkpoints"]] == [1] and [one["path"] for one in found["foreign"]] == [str(new)]
    assert "format_version 99" in found["foreign"][0]["why"]
    reseal(old / MANIFEST, '"format_version": 1', '"format_version": 99')
    assert main([str(tmp_path)]) == 2


@pytest.mark.parametrize("manifest", ["", "{", '{"name": "model"}', "[]", "\0" * 1000])
def test_a_manifest_that_is_gone_from_beside_our_files_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str) -> None:
    path = save_alone(tmp_path, STATE)
    (path / "config.json").write_text("{}")
    (path / MANIFEST).write_text(manifest)
    assert main([str(path)]) == 7
    assert "CORRUPT: 1 damage" in capsys.readouterr().out


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_alone(tmp_path, STATE)
    assert main([str(path), "--tensors", "nothing*"]) == 2
    assert "matches 'nothing*'" in capsys.readouterr().err
    for workers in ("0", "-1", "1000", "many", ""):
        with pytest.raises(SystemExit) as ended:
            main([str(path), "--verify", f"--workers={workers}"])
        assert ended.value.code == 2 and "number of threads" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 2), (errno.EIO, 7)])
def test_a_manifest_that_the_disk_cannot_give_is_damage_one_that_we_may_not_read_is_not(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    path = save_alone(tmp_path, STATE)

    def no_open(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tools.inspect_checkpoint.open", no_open, raising=False)
    monkeypatch.setattr("zaya.checkpoint.manifest.open", no_open, raising=False)
    assert main([str(path)]) == code
    err = capsys.readouterr().err
    assert os.strerror(number) in err and MANIFEST in err and err.count("\n") == 1


def test_a_tensor_that_the_disk_cannot_give_does_not_hide_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_alone(tmp_path, {f"model.t{i}": torch.zeros(1000) for i in range(3)})
    file = next(path.glob("*.safetensors"))
    flip(file, file.stat().st_size - 1)
    bad, preadv = header_end(file) + 4000, os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(read.os, "preadv", failing)
    code, found = damages(path, capsys)
    assert code == 7 and len(found) == 2
    assert "model.t1" in found[0] and "Input/output error" in found[0] and "model.t2" in found[1]


def test_a_box_is_hashed_through_a_small_buffer_and_progress_adds_up(tmp_path: Path) -> None:
    tensors = {"model.large": torch.zeros(12 << 20), "model.small": torch.zeros(1000), "model.none": torch.zeros(0)}
    checkpoint = Checkpoint.open(save_alone(tmp_path, tensors))
    told: list[int] = []
    tracemalloc.start()
    assert list(checkpoint.damages(2, told.append)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * read.CHUNK_BYTES, f"{peak} bytes for a box of {48 << 20}"
    assert sum(told) == (48 << 20) + 4000 and max(told) <= read.CHUNK_BYTES


def test_a_reader_that_goes_ends_a_tool_as_it_ends_others(tmp_path: Path) -> None:
    """And tests, which call `main` in their own process, go on without that."""
    path = save_alone(tmp_path, {f"model.t{i}": torch.zeros(1) for i in range(300)})
    command = [sys.executable, "-m", "tools.inspect_checkpoint", str(path), "--tensors", "*"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2])
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert (job.stderr.read(), job.wait(60)) == (b"", -signal.SIGPIPE)
    assert main([str(path)]) == 0 and signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN


def test_output_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = save_alone(tmp_path, {f"model.t{i}": torch.zeros(1) for i in range(300)})
    command = [sys.executable, "-m", "tools.inspect_checkpoint", str(path), "--tensors", "*"]
    with open("/dev/full", "w") as full:
        job = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=Path(__file__).resolve().parents[2], text=True)
    assert (job.returncode, job.stderr) == (1, "tools.inspect_checkpoint: cannot write its output: No space left on device\n")
