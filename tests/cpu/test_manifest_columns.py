"""Manifests of many boxes (version 2, by column): what version 1 refuses they refuse, what a thousand ranks plan is what they write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.cpu import test_checkpoint_damage as damage
from tests.cpu.test_checkpoint import RECIPE, assert_holds, save_alone, save_threads, state
from zaya.checkpoint import boxes as boxes_module
from zaya.checkpoint import files as files_module
from zaya.checkpoint import manifest as manifest_module
from zaya.checkpoint.boxes import Box, Boxes, tile
from zaya.checkpoint.directory import MANIFEST
from zaya.checkpoint.errors import CheckpointError, RefusedError
from zaya.checkpoint.manifest import FileEntry, Manifest, TensorEntry, num_bytes
from zaya.checkpoint.planning import SavePlan, pack
from zaya.checkpoint.read import Checkpoint


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "PLAIN_BOXES", -1)


def test_both_versions_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_threads(tmp_path, state(big_rows=701), 5)
    plain = (path / MANIFEST).read_text()
    manifest = Manifest.from_json(plain)
    monkeypatch.setattr(manifest_module, "PLAIN_BOXES", -1)
    columns = manifest.to_json()
    assert '"format_version": 1' in plain and '"format_version": 2' in columns and len(columns) < len(plain)
    assert Manifest.from_json(columns) == manifest and Manifest.from_json(columns).to_json() == columns
    (path / MANIFEST).write_text(columns)
    assert_holds(path, state(big_rows=701))
    monkeypatch.undo()
    assert Manifest.from_json(columns).to_json() == plain


def test_a_save_writes_no_manifest_that_a_reader_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even once its files are there: nothing is left of it, and another attempt would end the same."""
    size = (save_alone(tmp_path, state()) / MANIFEST).stat().st_size
    for module in (files_module, manifest_module):
        monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", size)
    with pytest.raises(RefusedError, match=rf"would have {size + 1} bytes, and readers take {size}"):
        save_alone(tmp_path / "one digit more", state(), step=10)
    assert not list((tmp_path / "one digit more").iterdir())
    assert_holds(save_alone(tmp_path / "as many", state()), state())


def test_keys_of_other_writers_are_kept(columns: None) -> None:
    """A version 1 manifest may name a box as it likes."""
    box = Box("a.safetensors", "another_name", (0,), (3,), "0" * 32)
    files = {"a.safetensors": FileEntry(67, "0" * 32)}
    manifest = Manifest(0, 0, {}, 0, {}, {"world_size": 1}, {"x": TensorEntry("I8", (3,), (box,))}, files)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.tensors["x"].boxes[0] == box and '"another_name"' in manifest.to_json()


def test_every_flipped_bit_is_noticed(tmp_path: Path, columns: None, capsys: pytest.CaptureFixture[str], soak_seed: int) -> None:
    damage.test_every_flipped_bit_is_noticed(tmp_path, capsys, soak_seed)


def test_cut_manifests_are_refused(tmp_path: Path, columns: None) -> None:
    damage.test_cut_manifests_are_refused(tmp_path)


def test_mutated_manifests_are_refused_or_harmless(tmp_path: Path, columns: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value replaced by every evil one, and by evil columns."""
    evil = ["0 0", "0 0 2 3", "1 0 1 3", "-1", "1.0", "00", "0  0", "9" * 18, "f" * 32, "F" * 32]
    monkeypatch.setattr(damage, "EVIL", [*damage.EVIL, *evil])
    damage.test_mutated_manifests_are_refused_or_harmless(tmp_path)


def test_specific_manifests_are_refused(tmp_path: Path, columns: None) -> None:
    path = save_alone(tmp_path, {"a": torch.arange(6).reshape(2, 3), "b": torch.arange(6).reshape(2, 3), "c": torch.ones(4)})
    body = damage.body_of(path)
    assert [cut["shape"] for cut in body["cuts"]] == [[2, 3], [4]] and body["tensors"]["a"]["cut"] == body["tensors"]["b"]["cut"] == 0

    def with_(*changes: tuple[tuple[Any, ...], Any]) -> Any:
        new = body
        for place, value in changes:
            new = damage.changed(new, place, value)
        return new

    def cut(files: str, boxes: str) -> Any:
        count = len(files.split())
        return with_((("cuts", 0, "files"), files), (("cuts", 0, "boxes"), boxes),
                     *((("tensors", name, "xxh3"), "0" * 32 * count) for name in "ab"))

    def keyed(keys: object) -> Any:
        return with_((("tensors", "b"), {**body["tensors"]["b"], "keys": keys}))

    hashes = body["tensors"]["a"]["xxh3"]
    bodies = {
        "tile": [cut("0 0", "0 0 1 3 0 0 1 3"), cut("0 0", "0 0 2 2 0 1 2 1"), cut("0", "0 0 1 3"), cut("0 0", "0 0 2 3 0 0 0 3"),
                 cut("", "")],
        "not inside": [cut("0", "1 0 2 3"), cut("0", "0 0 2 4"), cut("0", f"0 {10**18 - 1} 2 3")],
        "there are 1": [cut("1", "0 0 2 3")],
        "3 numbers are not 1 boxes": [cut("0", "0 0 2")],
        "with a space between": [cut("0", text) for text in ("0 0 2 3 ", " 0 0 2 3", "0  0 2 3", "0 0 2 +3", "0 0 2 03", "0,0,2,3",
                                                             f"0 0 2 {10**18}", "0 0 2 -3", "0\t0 2 3", "0 0 2 1_0")],
        "hashes of 32 hex digits": [with_((("tensors", "a", "xxh3"), text)) for text in (hashes.upper() + "F", hashes[:-1], hashes * 2,
                                                                                      hashes[:30] + "  ", "", 7)],
        "there are 2": [with_((("tensors", "a", "cut"), 2))],
        "is no tensor's": [with_((("cuts",), [*body["cuts"], body["cuts"][0]]))],
        "stored as": [keyed(["a"])],
        "not a list of 1 keys": [keyed(keys) for keys in ([], ["a", "b"], "a")],
        "not a tensor name": [keyed([key]) for key in ("../a", "", 3, "__metadata__")],
        "there twice": [with_((("files",), body["files"] * 2))],
        "plain *.safetensors": [with_((("files", 0, "name"), name)) for name in ("../x.safetensors", "x.bin", "/etc/passwd")],
        "holds no box": [with_((("files",), [*body["files"], {**body["files"][0], "name": "x.safetensors"}]))],
        "and a header": [with_((("files", 0, "size"), size)) for size in (112, 120, 129, 2**40)],
        "not plausible": [with_((("cuts", 0, "shape"), [2**62, 2])),
                          with_((("cuts", 0, "shape"), [2**31] * 2), (("cuts", 0, "boxes"), f"0 0 {2**31} {2**31}")),
                          with_((("cuts", 0, "shape"), [2**59, 1]), (("cuts", 0, "boxes"), f"0 0 {2**59} 1"))],
        "manifest of format_version 1": [with_((("format_version",), 1))],
    }
    for words, variants in bodies.items():
        for variant in variants:
            (path / MANIFEST).write_text(damage.seal_body(variant))
            assert words in damage.refused(path), words
    (path / MANIFEST).write_text(damage.seal_body(body))
    Checkpoint.open(path).verify()


# ---------------------------------------------------------------------------------------------------------------------- tiling


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[list[int], list[int]]]]:
    """A shape cut at random, and then perhaps spoilt: a box moved, resized, doubled or taken away."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    found = [([0] * len(shape), list(shape))]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = found.pop(draw(st.integers(0, len(found) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(1, max(1, sizes[dim] - 1)))
        if at >= sizes[dim]:
            found.append((offsets, sizes))
            continue
        second, rest = offsets.copy(), sizes.copy()
        second[dim], rest[dim] = offsets[dim] + at, sizes[dim] - at
        found += [(offsets, [*sizes[:dim], at, *sizes[dim + 1 :]]), (second, rest)]
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(found) - 1)) if found else 0
        spoil = draw(st.sampled_from(["move", "drop", "double"]))
        if found and spoil == "move" and shape:
            offsets, sizes = found[index]
            found[index] = ([draw(st.integers(0, n - s)) for n, s in zip(shape, sizes, strict=True)], sizes)
        elif found and spoil == "drop":
            found.pop(index)
        elif found:
            found.append(found[index])
    return shape, draw(st.permutations(found))


PINWHEEL = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])]  # no straight cut through it


@settings(max_examples=400, deadline=None)
@example(((3, 3), PINWHEEL))
@example(((3, 3), [*PINWHEEL[:4], ([0, 0], [1, 1])]))
@given(tilings())
def test_tile_is_what_counting_elements_says(case: tuple[tuple[int, ...], list[tuple[list[int], list[int]]]]) -> None:
    shape, found = case
    covered = np.zeros(shape, dtype=int)
    for offsets, sizes in found:
        covered[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    bounds = np.array(found, dtype=np.int64).reshape(len(found), 2, len(shape))
    assert tile(bounds, shape) == bool((covered == 1).all())


def test_columns_that_overflow_are_no_tiling() -> None:
    """Two boxes of 2^62 elements in a tensor of 2^62 hold 2^63, which 64 bits would call negative."""
    whole = [[0, 0], [2**31, 2**31]]
    assert tile(np.array([whole], dtype=np.int64), (2**31, 2**31))
    for count in (2, 5):  # five hold 2^62 again, modulo 2^64
        assert not tile(np.array([whole] * count, dtype=np.int64), (2**31, 2**31))


def test_boxes_that_no_cut_separates_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes_module, "MAX_TANGLED_BOXES", 4)
    assert not tile(np.array(PINWHEEL, dtype=np.int64), (3, 3))


# -------------------------------------------------------------------------------------------------------------------- planning

TABLE = {"b": ("BF16", (4, 6)), "a": ("F32", (4, 6)), "scalar": ("F32", ()), "empty": ("I8", (0, 3))}
RANKS: list[list[list[tuple[str, Any]]]] = [  # by rank, by file
    [[("a", ((0, 0), (2, 6))), ("b", ((0, 0), (2, 6)))], [("scalar", ((), ())), ("empty", ((0, 0), (0, 3)))]],
    [],
    [[("a", ((2, 0), (2, 6))), ("b", ((2, 0), (2, 6)))]]]


def plan_of(ranks: list[list[list[tuple[str, Any]]]], table: Any = TABLE) -> SavePlan:
    return SavePlan(table, [pack(dict(reversed(table.items())), files) for files in ranks])  # a rank may name them in another order


def test_a_plan_becomes_the_manifest_that_was_written() -> None:
    plan = plan_of(RANKS)
    plan.check()
    assert plan.num_files == [2, 0, 1]
    names = ["x.safetensors", "y.safetensors", "z.safetensors"]
    contents = [file for files in RANKS for file in files]
    flat = [(file, name, box) for file, parts in zip(names, contents, strict=True) for name, box in parts]
    hashes = [bytes([number]) * 16 for number in range(len(flat))]
    entries = plan.tensors([b"".join(hashes[:4]), b"", b"".join(hashes[4:])], names)
    assert list(entries) == sorted(TABLE) and {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == TABLE
    for (file, name, (offsets, sizes)), xxh3 in zip(flat, hashes, strict=True):
        key = name if sizes == TABLE[name][1] else f"{name}[{offsets[0]}:{offsets[0] + 2},0:6]"
        assert Box(file, key, offsets, sizes, xxh3.hex()) in entries[name].boxes
    assert sum(len(entry.boxes) for entry in entries.values()) == len(flat)
    a, b = entries["a"].boxes, entries["b"].boxes
    assert isinstance(a, Boxes) and isinstance(b, Boxes) and a.cut is b.cut, "tensors that are cut alike share their columns"
    sizes = {name: sum(num_bytes(TABLE[n][0], box[1]) for f, n, box in flat if f == name) for name in names}
    files = {name: FileEntry(16 + size, "0" * 32) for name, size in sizes.items()}
    written = Manifest(1, 2, {}, 3, RECIPE, {"world_size": 3}, entries, files)
    assert Manifest.from_json(written.to_json()) == written


@pytest.mark.parametrize(("rank", "box"), [(0, ((1, 0), (2, 6))), (2, ((2, 0), (2, 5))), (2, ((0, 0), (2, 6)))])
def test_a_plan_that_does_not_cover_is_refused_by_name(rank: int, box: Any) -> None:
    changed = json.loads(json.dumps(RANKS))
    changed[rank][0][1] = ("b", box)
    with pytest.raises(CheckpointError, match="'b' on all ranks: 2 boxes of .* do not tile"):
        plan_of(changed).check()


def test_coordinates_beyond_32_bits_travel() -> None:
    shape = (2**40, 3)
    half = 2**39 + 7
    plan = plan_of([[[("x", ((0, 0), (half, 3)))]], [[("x", ((half, 0), (2**40 - half, 3)))]]], {"x": ("I8", shape)})
    plan.check()
    found = plan.tensors([bytes(16)] * 2, ["p.safetensors", "q.safetensors"])["x"].boxes
    assert [box.offsets for box in found] == [(0, 0), (half, 0)] and sum(math.prod(box.sizes) for box in found) == math.prod(shape)
