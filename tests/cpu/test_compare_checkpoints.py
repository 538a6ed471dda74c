"""tools.compare_checkpoints: the same under any layout is equal, one bit is a difference, its numbers are those of whole tensors."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cpu.test_checkpoint import save_alone, save_threads, state
from tests.cpu.test_inspect_checkpoint import flip, snapshot
from tools import compare_checkpoints
from tools.compare_checkpoints import main, pieces
from zaya.checkpoint.directory import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


def outcome(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Exit code and output; a usable pair leaves stderr empty, an unusable one stdout."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    if code == 2:
        assert not out and err.startswith("tools.compare_checkpoints: ") and err.count("\n") == 1
        return code, err
    assert not err
    return code, out


def rows(out: str) -> dict[str, tuple[float, float, int]]:
    """Tensor -> (relative, largest, elements), in the order of the output."""
    found = re.findall(r"^ +(\S+) +(\S+) +([\d,]+)  (\S+)", out, flags=re.MULTILINE)
    return {name: (float(relative), float(largest), int(elements.replace(",", ""))) for relative, largest, elements, name in found}


def pair(tmp_path: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    return save_alone(tmp_path / "a", a), save_alone(tmp_path / "b", b)


def test_other_boxes_of_the_same_values_are_equal(tmp_path: Path, capsys: Capture) -> None:
    tensors = state()  # every NaN payload among them
    paths = [save_threads(tmp_path / str(ranks), tensors, ranks) for ranks in (1, 2, 5)]
    before = snapshot(tmp_path)
    for a in paths:
        for b in paths:
            code, out = outcome(capsys, a, b)
            assert code == 0 and f"{len(tensors)} tensors equal bitwise, 0 different" in out
    assert snapshot(tmp_path) == before


def test_every_single_changed_element_is_a_difference(tmp_path: Path, capsys: Capture) -> None:
    tensors = {name: tensor for name, tensor in state().items() if tensor.numel()}
    a = save_threads(tmp_path / "a", tensors, 1)
    for i, name in enumerate(tensors):
        raw = torch.empty(tensors[name].numel(), dtype=tensors[name].dtype).copy_(tensors[name].reshape(-1))
        raw.view(torch.uint8)[-1] ^= 1  # of the last element
        b = save_threads(tmp_path / f"b{i}", tensors | {name: raw.reshape(tensors[name].shape)}, 3)
        code, out = outcome(capsys, a, b)
        assert code == 1 and list(rows(out)) == [name] and rows(out)[name][2] == 1, name


def test_numbers_are_those_of_the_whole_tensors_worst_first(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_checkpoints, "PIECE_ELEMENTS", 10)
    monkeypatch.setattr(compare_checkpoints, "MAPPED_PIECES", 3)
    generator = torch.Generator().manual_seed(0)
    a = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape, dtype in (
        ("model.near", (7, 9), torch.float32), ("model.far", (3, 5, 4), torch.bfloat16), ("model.same", (31,), torch.float64),
        ("model.tiny", (13,), torch.float64), ("model.huge", (13,), torch.float64))}
    a["model.tiny"] *= 1e-200  # squares of these are 0, of those infinite
    a["model.huge"] *= 1e200
    b = {name: tensor.clone() for name, tensor in a.items()}
    for name, factor in (("model.near", 1.001), ("model.far", 3), ("model.tiny", 1.5), ("model.huge", 2)):
        b[name] *= factor
    code, out = outcome(capsys, save_threads(tmp_path / "a", a, 2), save_threads(tmp_path / "b", b, 3))
    found = rows(out)
    assert code == 1 and list(found) == ["model.far", "model.huge", "model.tiny", "model.near"]
    for name, (relative, largest, elements) in found.items():
        x, y = a[name].double(), b[name].double()
        unit = {"model.tiny": 1e-200, "model.huge": 1e200}.get(name, 1.0)
        expected = ((x / unit - y / unit).square().mean().sqrt() / (x / unit).square().mean().sqrt()).item()
        assert math.isclose(relative, expected, rel_tol=1e-3) and math.isclose(largest, (x - y).abs().max().item(), rel_tol=1e-3)
        assert elements == int((x != y).sum())


def test_tolerance(tmp_path: Path, capsys: Capture) -> None:
    tensor = torch.linspace(1, 2, 1000)
    a, b = pair(tmp_path, {"model.x": tensor, "model.y": tensor}, {"model.x": tensor * 1.01, "model.y": tensor})
    assert [outcome(capsys, a, b, "--tolerance", x)[0] for x in (0, 0.0099, 0.0101, 1)] == [1, 1, 0, 0]
    code, out = outcome(capsys, a, b, "--tolerance", 0.0101)
    assert "equal: 1 tensors equal bitwise, 1 within 0.0101, 0 different" in out and "(within the tolerance)" in out
    for wrong in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit) as ended:
            main([str(a), str(b), f"--tolerance={wrong}"])
        assert ended.value.code == 2 and "not a number from 0" in capsys.readouterr().err


def test_what_is_not_finite(tmp_path: Path, capsys: Capture) -> None:
    nan, inf = math.nan, math.inf
    same = torch.tensor([nan, inf, -inf, 1.0])
    payload = torch.tensor([0x7FC0, 0x3F80], dtype=torch.int16).view(torch.bfloat16)  # NaN, 1
    other_payload = torch.tensor([0x7FC1, 0x3F80], dtype=torch.int16).view(torch.bfloat16)
    a = {"same": same, "beside": same, "number": torch.tensor([nan, 1.0]), "sign": torch.tensor([inf, 1.0]), "payload": payload,
         "zero": torch.tensor([0.0, 1.0]), "from_zero": torch.zeros(2)}
    b = {"same": same, "beside": torch.tensor([nan, inf, -inf, 1.5]), "number": torch.tensor([2.0, 1.0]),
         "sign": torch.tensor([-inf, 1.0]), "payload": other_payload, "zero": torch.tensor([-0.0, 1.0]),
         "from_zero": torch.tensor([0, 1.0])}
    found = rows(outcome(capsys, *pair(tmp_path, a, b))[1])
    assert found == {"beside": (0.5, 0.5, 1), "number": (inf, inf, 1), "sign": (inf, inf, 1), "payload": (0, 0, 1), "zero": (0, 0, 1),
                     "from_zero": (inf, 1, 1)}
    assert set(list(found)[:3]) == {"number", "sign", "from_zero"}
    only = "[psz]*o*"  # payload, zero: not bitwise equal, no difference in value
    assert [outcome(capsys, tmp_path / "a/step-00000003", tmp_path / "b/step-00000003", "--only", only, *rest)[0]
            for rest in ([], ["--tolerance", "0"])] == [1, 0]


def test_integers_that_fp64_cannot_tell_apart(tmp_path: Path, capsys: Capture) -> None:
    a, b = pair(tmp_path, {"step": torch.tensor([2**60, 5]), "flag": torch.tensor(True)},
                {"step": torch.tensor([2**60 + 1, 5]), "flag": torch.tensor(False)})
    code, out = outcome(capsys, a, b, "--tolerance", 0)
    assert code == 1 and rows(out)["step"][1:] == (1.0, 1) and rows(out)["flag"] == (1.0, 1.0, 1)


def test_missing_extra_and_misformed_tensors(tmp_path: Path, capsys: Capture) -> None:
    x = torch.ones(4, 6)
    a, b = pair(tmp_path, {"x": x, "gone": x, "dtype": x, "shape": x}, {"x": x, "new": x, "dtype": x.bfloat16(), "shape": x.T})
    code, out = outcome(capsys, a, b, "--tolerance", 1)
    assert code == 1
    for words in ("only in A: gone  F32 [4, 6]", "only in B: new", "dtype  F32 [4, 6] in A, BF16 [4, 6] in B",
                  "shape  F32 [4, 6] in A, F32 [6, 4] in B", "1 tensors equal bitwise, 0 within 1, 0 different", "2 of another"):
        assert words in out
    assert [outcome(capsys, a, b, "--only", pattern)[0] for pattern in ("x", "gone", "ne*", "dtype", "shape")] == [0, 1, 1, 1, 1]
    code, err = outcome(capsys, a, b, "--only", "model.*")
    assert code == 2 and "matches 'model.*'" in err


def test_the_newest_checkpoint_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    for step, value in ((1, 1.0), (2, 2.0)):
        save_alone(tmp_path / "checkpoints", {"x": torch.full((3,), value)}, step=step)
    assert outcome(capsys, tmp_path, tmp_path / "checkpoints" / "step-00000002")[0] == 0
    assert outcome(capsys, tmp_path, tmp_path / "checkpoints" / "step-00000001")[0] == 1


def test_damage_is_not_a_difference(tmp_path: Path, capsys: Capture) -> None:
    """Also where the two are damaged alike, and where the boxes are the same, so that the hashes alone would say equal."""
    tensors = {"x": torch.arange(1000.0), "y": torch.arange(1000.0)}
    a, b = pair(tmp_path, tensors, tensors)
    clean = {file: file.read_bytes() for path in (a, b) for file in path.iterdir()}
    for damaged in ([a], [b], [a, b]):
        for place, words in ((-1, "tensor 'y'"), (20, "header"), (3, "header")):
            for path in damaged:
                flip(next(path.glob("*.safetensors")), place)
            code, err = outcome(capsys, a, b)
            assert code == 2 and words in err and str(damaged[0]) in err
            for file, raw in clean.items():
                file.write_bytes(raw)
    flip(b / MANIFEST, 200)
    assert outcome(capsys, a, b)[0] == 2
    (b / MANIFEST).unlink()
    for wrong in (b, tmp_path, tmp_path / "nowhere", a / MANIFEST):
        code, err = outcome(capsys, a, wrong)
        assert code == 2 and str(wrong) in err


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 30))
def test_pieces_tile_any_shape(shape: list[int], most: int) -> None:
    held = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in pieces(shape, most):
        assert math.prod(sizes) <= most
        held[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    assert bool((held == 1).all())


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """256 MiB in each, every element different: mapped pages and pieces of a few tens of MB are all that is held."""
    tensor = torch.arange(64 << 20, dtype=torch.float32).reshape(16, -1)
    a = save_alone(tmp_path / "a", {"x": tensor})
    b = save_alone(tmp_path / "b", {"x": tensor.add_(1)})
    script = ("import sys; from tools.compare_checkpoints import main; from pathlib import Path\n"
              "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
              "before = peak(); code = main(sys.argv[1:]); print(code, (peak() - before) // 1024)")
    done = subprocess.run([sys.executable, "-c", script, a, b, "--workers", "2"], capture_output=True, text=True, cwd=ROOT, timeout=250,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    code, grown_mb = map(int, done.stdout.splitlines()[-1].split())
    assert code == 1 and grown_mb < 200, f"{grown_mb} MB more, of {2 * 256}"


def test_a_reference_too_large_for_fp64_excuses_nothing(tmp_path: Path, capsys: Capture) -> None:
    a = torch.full((100,), 1.7e308, dtype=torch.float64)
    code, out = outcome(capsys, *pair(tmp_path, {"x": a}, {"x": a - 1e306}), "--tolerance", 1)
    assert code == 1 and rows(out)["x"][0] == math.inf
