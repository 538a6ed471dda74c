"""Damaged and hostile checkpoints: always a CheckpointError that names the file; no other exception, no path followed, no memory lost."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.test_checkpoint import STEP, cut, on_ranks, same, save_alone, save_threads, state
from tools import inspect_checkpoint
from zaya.checkpoint.directory import MANIFEST
from zaya.checkpoint.errors import CheckpointError
from zaya.checkpoint.hashing import hash_bytes
from zaya.checkpoint.manifest import Manifest
from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share
from zaya.shard import Layout


def refused(path: Path) -> str:
    """open + verify must raise CheckpointError and nothing else; its message."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).verify()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def seal(rest: str) -> str:
    """A manifest text with the right hash, so that what lies behind the hash is tested."""
    return f'{{"xxh3": "{hash_bytes(rest.encode("ascii", "replace"))}",\n{rest}'


def seal_body(body: object) -> str:
    return seal(f'"manifest": {json.dumps(body)}}}\n')


def body_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((path / MANIFEST).read_text())["manifest"]
    return body


# ---------------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str], soak_seed: int) -> None:
    """500 of them, over manifest and shards: by who opens and verifies it, and by tools.inspect_checkpoint."""
    path = save_threads(tmp_path, state(), 2)
    rng = random.Random(1 + soak_seed)
    clean = {file: file.read_bytes() for file in sorted(path.iterdir())}
    for i in range(500):
        file = rng.choice(list(clean))
        data = bytearray(clean[file])
        header = 8 + int.from_bytes(data[:8], "little")
        # For shards: anywhere, the length and what the JSON says of no tensor, its end and padding, and the boxes, in turn.
        low, high = [(0, len(data)), (0, 48), (header - 16, header), (header, len(data))][0 if file.name == MANIFEST else i % 4]
        place, bit = rng.randrange(low, high), rng.randrange(8)
        data[place] ^= 1 << bit
        file.write_bytes(data)
        assert file.name in refused(path), (file.name, place, bit)
        assert inspect_checkpoint.main([str(path), "--verify", "--workers", "1"]) == 7, (file.name, place, bit)
        err = capsys.readouterr().err
        assert file.name in err and err.count("\n") == 1, err
        file.write_bytes(clean[file])
    Checkpoint.open(path).verify()
    assert inspect_checkpoint.main([str(path), "--verify"]) == 0


def test_cut_longer_missing_and_swapped_files(tmp_path: Path) -> None:
    tensors, whole = {"a": torch.zeros(1 << 19), "b": torch.ones(1 << 19)}, ((0,), (1 << 19,))
    on_ranks(tmp_path, [{name: Share(tensor.dtype, tuple(tensor.shape), [(whole, tensor)] if name == mine else [])
                         for name, tensor in tensors.items()} for mine in tensors])  # each in a file of its own, of the same size
    path = tmp_path / "step-00000003"
    first, second = sorted(path.glob("*.safetensors"))
    for file in (first, second, path / MANIFEST):
        clean = file.read_bytes()
        for damaged in (clean[:-1], clean + b"\0", clean[: len(clean) // 2], b"", clean + clean):
            file.write_bytes(damaged)
            assert file.name in refused(path)
        file.unlink()
        assert file.name in refused(path)
        file.mkdir()
        refused(path)
        file.rmdir()
        file.write_bytes(clean)
    assert first.stat().st_size == second.stat().st_size
    first.rename(path / "x")
    second.rename(first)
    (path / "x").rename(second)
    assert "header does not match" in refused(path)
    assert "not a checkpoint" in refused(tmp_path) and "not a checkpoint" in refused(tmp_path / "nowhere")


def test_file_and_manifest_must_agree_even_with_right_hashes(tmp_path: Path) -> None:
    """What a program with another idea of the format could write: all hashes right, contents not as declared."""
    path = save_alone(tmp_path, {"aaaa": torch.arange(4), "bbbb": torch.arange(4)})
    file, body = next(path.glob("*.safetensors")), body_of(path)
    clean, end = file.read_bytes(), 8 + int.from_bytes(file.read_bytes()[:8], "little")
    text = clean[:end].decode("latin-1")
    for old, new, words in (('"aaaa"', '"cccc"', "'aaaa' is in the manifest only"), ('"I64"', '"F64"', "dtype I64"),
                            ("[4]", "[5]", "shape"),
                            ("[0, 32]", "[8, 40]", "begins at"), ("[32, 64]", "[0, 32]", "begins at"), ("[0, 32]", "[-8, 24]", "begins at"),
                            ("[0, 32]", '["0", 32]', "dtype"), ("{", "[", "not valid JSON"), ('"bbbb"', '"aaaa"', "twice")):
        header = text.replace(old, new, 1).encode("latin-1")
        header = header[:end].ljust(end)
        file.write_bytes(header + clean[end:])
        body["files"][file.name]["xxh3_header"] = hash_bytes(header)
        (path / MANIFEST).write_text(seal_body(body))
        message = refused(path)
        assert words in message and file.name in message, message
        with pytest.raises(CheckpointError):
            Checkpoint.open(path).read("aaaa")


# ------------------------------------------------------------------------------------------------------------ hostile manifests

EVIL: list[Any] = [
    None, True, -1, 0, 2**31, 2**53, 2**63 - 1, 2**63, 10**400, 1.5, 1e308, "", "x", "../x", "/etc/passwd", "..", "a/b", "a\\b", "a\x00b",
    "\ud800", "__metadata__", "x" * 5000, [], {}, [[]], [0] * 17, [2**62], [-1], [1.0], [2**62] * 16, {"x": 1}, {"file": "../x"}]


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def changed(value: Any, place: tuple[Any, ...], new: object) -> Any:
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


def test_mutated_manifests_are_refused_or_harmless(tmp_path: Path) -> None:
    """Every value replaced by every evil one, every key renamed to them, with a right hash: CheckpointError or a valid manifest."""
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.0)}
    path = save_alone(tmp_path, tensors)
    body = body_of(path)
    accepted: list[Any] = []
    for place in places(body):
        for evil in EVIL:
            variants = [changed(body, place, evil)]
            if place and isinstance(place[-1], str) and isinstance(evil, str):
                parent = body
                for key in place[:-1]:
                    parent = parent[key]
                variants.append(changed(body, place[:-1], {evil if key == place[-1] else key: item for key, item in parent.items()}))
            for variant in variants:
                try:
                    manifest = Manifest.from_json(seal_body(variant))
                except CheckpointError as error:
                    assert "\n" not in str(error) and len(str(error)) < 1000
                else:
                    assert Manifest.from_json(manifest.to_json()) == manifest
                    accepted.append(variant)
    assert len(accepted) > 100  # counters, pass-through trees, other tensor and file names
    for variant in accepted:
        (path / MANIFEST).write_text(seal_body(variant))
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
        except CheckpointError:
            continue
        contents = [checkpoint.read(name) for name in checkpoint.names()]
        assert all(same(*pair) for pair in zip(contents, tensors.values(), strict=True))


def test_specific_manifests_are_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path / "root", {"a": torch.arange(6).reshape(2, 3), "b": torch.arange(6).reshape(2, 3)})
    text, body = (path / MANIFEST).read_text(), body_of(path)
    file = next(iter(body["files"]))
    shutil.copy(path / file, tmp_path / "root" / "outside.safetensors")  # a path that is followed would find a sound file
    box = body["tensors"]["a"]["boxes"][0]

    def boxes(*spans: tuple[list[int], list[int]]) -> Any:
        new = [{**box, "offsets": offsets, "sizes": sizes, "key": f"a[{i}:9]"} for i, (offsets, sizes) in enumerate(spans)]
        return changed(body, ("tensors", "a", "boxes"), new)

    def moved(name: str) -> Any:
        return json.loads(json.dumps(body).replace(file, name))

    huge = changed(body, ("tensors", "a", "shape"), [2**40])
    huge = changed(huge, ("tensors", "a", "boxes", 0), {**box, "offsets": [0], "sizes": [2**40]})
    bodies = {
        "plain": [moved("../outside.safetensors"), moved(str(path / file)), moved(f"./{file}"), moved("..safetensors"), moved("x.bin"),
                  moved(MANIFEST)],
        "tile": [boxes(), boxes(([0, 0], [1, 3])), boxes(([0, 0], [2, 2]), ([0, 1], [2, 1])), boxes(([0, 0], [2, 3]), ([0, 0], [0, 3])),
                 boxes(([0, 0], [2, 3]), ([1, 1], [1, 1]))],
        "not inside": [boxes(([1, 0], [2, 3])), boxes(([0], [6])), boxes(([0, 2**63 - 1], [2, 3]))],
        "stored as": [changed(body, ("tensors", "b", "boxes", 0, "key"), "a")],
        "not in the list": [changed(body, ("tensors", "b", "boxes", 0, "file"), "other.safetensors")],
        "holds no box": [changed(body, ("files",), body["files"] | {"other.safetensors": body["files"][file]})],
        "and a header": [changed(body, ("files", file, "size"), size) for size in (96, 97, 104, 105, 2**40, 2**63 - 1)] + [huge],
        "16 levels": [changed(body, ("recipe",), {"x": json.loads("[" * 20 + "]" * 20)})],
        "not text": [changed(body, ("recipe",), {"x": ["\ud800"]}), changed(body, ("tokens_by_corpus",), {"\udfff": 1})],
        "world_size": [changed(body, ("layout",), {"dp": 1})],
        "format_version": [changed(body, ("format_version",), version) for version in (0, 2, True, 1.0, "1")],
    }
    tracemalloc.start()
    for words, variants in bodies.items():
        for variant in variants:
            (path / MANIFEST).write_text(seal_body(variant))
            assert words in refused(path), words
    rest = text.partition("\n")[2]
    for words, raw in {
        "twice": rest.replace('"step": 3', '"step": 3, "step": 3'), "NaN": rest.replace('"step": 3', '"step": NaN'),
        "Infinity": rest.replace("0.0006", "-Infinity"), "not finite": rest.replace("0.0006", "1e999"),
        "valid JSON": rest.replace("0.0006", "[" * 200_000), "not valid JSON": rest.replace("0.0006", "9" * 100_000),
        "match its own hash": "", "Expecting": " ", "Extra data": rest + "{}", "not ASCII": rest.replace("muon", "mu\u00f6n"),
    }.items():
        assert raw != rest
        sealed = seal(raw) if raw else text.replace("muon", "adam")
        (path / MANIFEST).write_bytes(sealed.encode("latin-1"))
        assert words in refused(path), words
    assert tracemalloc.get_traced_memory()[1] < 20 << 20  # the longest text is 200 KB
    tracemalloc.stop()
    (path / MANIFEST).write_text(text)
    Checkpoint.open(path).verify()


@pytest.mark.parametrize("odd", [{"format_version": 3, "whatever": {}}, {"step": None}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_refuses_to_replace_the_checkpoint_of_another_program(tmp_path: Path, world_size: int, odd: dict[str, Any]) -> None:
    path = save_threads(tmp_path, {"x": torch.zeros(6)}, world_size)
    (path / MANIFEST).write_text(seal_body({**body_of(path), **odd}))
    (path / "of-a-new-kind.bin").write_bytes(b"theirs")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for result in on_ranks(tmp_path, [cut({"x": torch.ones(6)}, Layout(world_size), rank) for rank in range(world_size)]):
        assert "; it is not replaced: move it away" in str(result)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_cut_manifests_are_refused(tmp_path: Path) -> None:
    text = (save_alone(tmp_path, state()) / MANIFEST).read_text()
    head, newline, rest = text.partition("\n")
    for end in range(0, len(text), 37):
        with pytest.raises(CheckpointError):
            Manifest.from_json(text[:end])
        if end < len(rest):
            with pytest.raises(CheckpointError):
                Manifest.from_json(seal(rest[:end]))
    for odd in (text + " ", " " + text, text.replace("\n", "\r\n", 1), head.upper() + newline + rest, text.replace(": ", ":", 1)):
        with pytest.raises(CheckpointError):
            Manifest.from_json(odd)


def with_boxes(shape: tuple[int, ...], spans: list[tuple[list[int], list[int]]]) -> Manifest:
    entries = [{"file": "a.safetensors", "key": f"t[{i}:1]", "offsets": o, "sizes": s, "xxh3": "0" * 32} for i, (o, s) in enumerate(spans)]
    body = {**STEP, "layout": {"world_size": 1}, "format_version": 1, "hf_config": {},
            "tensors": {"t": {"dtype": "U8", "shape": shape, "boxes": entries}},
            "files": {"a.safetensors": {"size": math.prod(shape) + 16, "xxh3_header": "0" * 32}}}
    return Manifest.from_json(seal_body(body))


def test_any_tiling_is_a_tensor() -> None:
    pinwheel = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])]  # no straight cut through it
    assert len(with_boxes((3, 3), pinwheel).tensors["t"].boxes) == 5
    pinwheel[4] = ([0, 0], [1, 1])  # right volume, but over another box
    with pytest.raises(CheckpointError, match="tile"):
        with_boxes((3, 3), pinwheel)


def test_a_thousand_flat_slices_are_checked_quickly() -> None:
    """ZeRO's slices of a row-major matrix: an end row, whole rows, an end row per rank."""
    rows, columns, ranks = 4096, 1024, 1024
    spans: list[tuple[list[int], list[int]]] = []
    borders = [rows * columns * r // ranks + (r * 37 % columns if 0 < r < ranks else 0) for r in range(ranks + 1)]
    for begin, end in zip(borders, borders[1:], strict=False):
        while begin < end:
            row, column = divmod(begin, columns)
            count = (end - begin) // columns if column == 0 else 0
            step = count * columns or min(end - begin, columns - column)
            spans.append(([row, column], [max(1, count), columns if count else step]))
            begin += step
    started = time.perf_counter()
    assert len(with_boxes((rows, columns), spans).tensors["t"].boxes) > 2 * ranks
    assert time.perf_counter() - started < 5  # the boxes alone: 0.01 s cut apart, 7 s in pairs
    spans[700] = ([0, 0], spans[700][1])
    with pytest.raises(CheckpointError, match="tile"):
        with_boxes((rows, columns), spans)
