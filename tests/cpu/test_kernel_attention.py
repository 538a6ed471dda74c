"""Attention against its specification: outputs and every gradient, and nothing read that was never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.attention import attention
from zaya.kernels.cases import SMALL, Case, error, run
from zaya.kernels.cases.attention import CASES
from zaya.kernels.launch import Config, Target, launching_through

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32: only the order of sums and exp2 for exp differ. fp16: probabilities and dscores are rounded to 2^-11 before their products, the
# results once more; the reference rounds only the results.
THRESHOLDS = {torch.float32: 2e-6, torch.float16: 1e-3}
SMALL_CASES = [case for case in CASES if case.size == SMALL]


@pytest.mark.parametrize("dtype", THRESHOLDS, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_the_references(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    arguments = case.make(DEVICE, dtype)
    got = run(attention, arguments, case.gradients)
    wide = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in arguments.items()}
    want = run(reference.attention, wide, case.gradients)
    assert got.keys() == want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    assert all(value < THRESHOLDS[dtype] for value in errors.values()), errors
    assert all(got[name].dtype == dtype for name in got)


def test_heads_split_among_programs_add_up_to_the_same_gradients() -> None:
    """For dk and dv. The interpreter's 4 units split a group to single heads; with one unit a program has two of the four."""
    case = next(case for case in SMALL_CASES if case.name.endswith("four heads a group"))
    arguments = case.make(DEVICE, torch.float32)
    parts = []

    def launcher(kernel: Any, grid: tuple[int, ...], everything: Mapping[str, Any], config: Config) -> None:
        parts.extend([everything["PARTS"]] if "PARTS" in everything else [])
        kernel[grid](**everything)

    with launching_through(launcher, Target("interpreter", num_cus=1, num_xcds=2)):
        got = run(attention, arguments, case.gradients)
    want = run(reference.attention, arguments, case.gradients)
    assert max(error(got[name], want[name]) for name in want) < THRESHOLDS[torch.float32]
    assert parts == [2]


def test_nothing_waits_for_the_device() -> None:
    """On meta tensors there is nothing to read: every launch is reached all the same, with whole rounds over the dies."""
    for case in CASES:
        launched: list[tuple[str, int]] = []

        def note(kernel: Any, grid: tuple[int, ...], everything: Any, config: Config, launched: list[tuple[str, int]] = launched) -> None:
            launched.append((kernel.__name__, grid[0]))

        arguments = case.make(torch.device("meta"), torch.bfloat16)
        with launching_through(note):
            grads = run(attention, arguments, case.gradients)
        assert [grads[f"d {name}"].shape for name in case.gradients] == [arguments[name].shape for name in case.gradients]
        assert [name for name, _ in launched] == ["_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel"]
        assert all(grid % 8 == 0 for _, grid in launched)


def good() -> dict[str, Any]:
    return CASES[0].make(DEVICE, torch.float16)


@pytest.mark.parametrize("change, message", [
    (lambda a: {"q_BTNH": a["q_BTNH"].double()}, "q_BTNH has dtype float64"),
    (lambda a: {"k_BSGH": a["k_BSGH"].float()}, "k_BSGH has dtype float32, expected float16"),
    (lambda a: {"v_BSGH": a["v_BSGH"][:, 1:]}, r"v_BSGH has shape \(1, 139, 1, 32\)"),
    (lambda a: {"q_BTNH": a["q_BTNH"].transpose(2, 3).contiguous().transpose(2, 3)}, "q_BTNH has stride 4 in H, expected 1"),
    (lambda a: {name: a[name][..., :24] for name in ("q_BTNH", "k_BSGH", "v_BSGH")}, "q_BTNH has head dim 24, expected 32 or 64 or 128"),
    (lambda a: {name: a[name].repeat(1, 1, 3, 1) for name in ("k_BSGH", "v_BSGH")}, "q_BTNH has 4 heads, expected a multiple of"),
    (lambda a: {"first_key_BT": a["first_key_BT"].float()}, "first_key_BT has dtype float32, expected int64 or int32"),
    (lambda a: {"first_key_BT": a["first_key_BT"][:, 1:]}, "first_key_BT has shape"),
    (lambda a: {"first_key_BT": a["first_key_BT"].to("meta")}, "first_key_BT lies on meta"),
    (lambda a: {"offsets": (0, 10, 20)}, r"offsets is \(0, 10, 20\), expected starts of chunks, a divisor of T = 140"),
    (lambda a: {"offsets": (0, 35, 70, 105)}, "offsets has 4 chunks, expected at most 2"),
    (lambda a: {"offsets": ()}, r"offsets is \(\)"),
    (lambda a: {"offsets": (0.0,)}, r"offsets is \(0.0,\)"),
    (lambda a: {"offsets": (1,)}, r"offsets is \(1,\), expected starts of chunks, a divisor of T = 140 of them, within S = 140"),
    (lambda a: {"q_BTNH": a["q_BTNH"][:, :0], "first_key_BT": a["first_key_BT"][:, :0]}, "q_BTNH is empty"),
])
def test_wrong_arguments_are_named_before_any_launch(change: Any, message: str) -> None:
    arguments = good()
    launched: list[Any] = []
    with launching_through(lambda *launch: launched.append(launch)), pytest.raises(ValueError, match=message):
        attention(**{**arguments, **change(arguments)})
    assert not launched
