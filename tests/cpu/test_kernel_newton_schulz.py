"""newton_schulz against its reference in fp64: any shape and stride, every tile size; what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from zaya.kernels import newton_schulz as module
from zaya.kernels import reference
from zaya.kernels.cases import SMALL, Case, error
from zaya.kernels.cases.newton_schulz import CASES, drawn
from zaya.kernels.launch import Config, Target, launching_through
from zaya.kernels.newton_schulz import newton_schulz

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Five steps of a map with slope up to 3.4 at zero amplify roundings of 6e-8 and 5e-4; the reference in fp16 is 4e-3 off.
THRESHOLDS = {torch.float32: 4e-6, torch.float16: 5e-3}
SMALL_CASES = [case for case in CASES if case.size == SMALL]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(DEVICE, dtype)
    got = case.op(**arguments)
    want = case.reference(**{**arguments, "matrices": arguments["matrices"].double()})
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    assert error(got, want) < THRESHOLDS[dtype]


@pytest.mark.parametrize("size", list(module.RATES))
@pytest.mark.parametrize("shape", [(20, 300), (300, 20)])
def test_every_tile_size_gives_the_same(size: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_size", lambda source, chip: size)
    matrices = drawn(*shape)(DEVICE, torch.float32)["matrices"]
    assert error(newton_schulz(matrices, steps=1), reference.newton_schulz(matrices.double(), steps=1)) < THRESHOLDS[torch.float32]


def test_eps_bounds_the_norm_from_below() -> None:
    matrices = drawn(3, 5)(DEVICE, torch.float32)["matrices"] * 1e-3
    assert error(newton_schulz(matrices, steps=1, eps=1.0), reference.newton_schulz(matrices.double(), steps=1, eps=1.0)) < 1e-6


def test_no_matrices_give_none() -> None:
    assert newton_schulz(torch.zeros(0, 4, 8, device=DEVICE)).shape == (0, 4, 8)


def test_needs_no_values_on_the_host() -> None:
    launched: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        launched.append(kernel.__name__)

    for case in CASES:
        arguments = case.make(torch.device("meta"), torch.bfloat16)
        launched.clear()
        with launching_through(note):
            assert case.op(**arguments).shape == arguments["matrices"].shape
        assert len(launched) == 2 + 3 * arguments["steps"]


@pytest.mark.parametrize(("shape", "num_cus", "size"), [((48, 2048, 2048), 304, "large"), ((2048, 2048), 304, "medium"),
                                                        ((17, 256), 304, "small"), ((40, 256, 2048), 304, "medium")])
def test_tiles_follow_the_amount_of_work(shape: tuple[int, ...], num_cus: int, size: str) -> None:
    source = torch.empty(shape, device="meta").reshape(-1, *shape[-2:])
    assert module._size(source, Target("gfx942", num_cus, 8)) == size


@pytest.mark.parametrize(("matrices", "options", "words"), [
    (torch.zeros(4, 4, dtype=torch.float64), {}, "matrices has dtype float64, expected bfloat16"),
    (torch.zeros(4), {}, r"matrices has shape \(4,\), expected \(..., rows, cols\)"),
    (torch.zeros(2, 0, 4), {}, r"matrices has shape \(2, 0, 4\)"),
    (torch.zeros(4, 4), {"steps": 0}, "steps is 0, expected at least 1"),
    (torch.zeros(1, 1).expand(2**15, 2**16), {}, "each of fewer than 2"),
    (torch.zeros(1, 1).expand(2, 2**28), {}, "each of fewer than 2"),  # as whole tiles
    (torch.zeros(1, 1, 1).expand(2**16, 2, 2), {}, "expected at most 65535 matrices"),
])
def test_refuses(matrices: torch.Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        newton_schulz(matrices, **options)
