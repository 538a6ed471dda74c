"""adamw_ against torch.optim.AdamW and its own specification: any length, gated by a verdict on the device; what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels.adamw import adamw_
from zaya.kernels.cases import SMALL, Case, error, run
from zaya.kernels.cases.adamw import CASES, IN_PLACE, expected, shard
from zaya.kernels.launch import Config, launching_through

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STATE = 3e-7  # a handful of fp32 roundings, 6e-8 each, against the specification in fp64
# Rounding to nearest is what the specification does too; the interpreter truncates to bf16: up to 2^-7 off, about 2^-8 RMS.
ROUNDED = {torch.float16: 3e-5, torch.bfloat16: 3e-4 if DEVICE.type == "cuda" else 8e-3}
SMALL_CASES = [case for case in CASES if case.size == SMALL]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_equals_its_specification(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(DEVICE, dtype)
    if arguments["out"] is not None:
        arguments["out"].fill_(torch.nan)
    got, want = run(case.op, arguments, ()), run(case.reference, arguments, ())
    assert set(got) == set(want)
    for name in ("out.0", "out.1", "out.2"):
        assert error(got[name], want[name]) < STATE, name
    if "out.3" in want:
        # Where the fp32 weights differ in the last bit, a few are rounded the other way.
        assert error(got["out.3"], want["out.3"]) < ROUNDED[want["out.3"].dtype]


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95)])
def test_twenty_steps_equal_torch(betas: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1700, generator=generator).to(DEVICE)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=betas, eps=1e-8, weight_decay=0.1)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    step, accept = torch.zeros((), device=DEVICE), torch.tensor(True, device=DEVICE)
    for _ in range(20):
        grad = torch.randn(1700, generator=generator).to(DEVICE)
        theirs.grad = grad * 0.25
        optimizer.step()
        adamw_(param, grad, exp_avg, exp_avg_sq, lr=3e-3, beta1=betas[0], beta2=betas[1], eps=1e-8, weight_decay=0.1,
               grad_scale=torch.tensor(0.25, device=DEVICE), step=step, commit=accept)
        step += 1
    state = optimizer.state[theirs]
    for got, want in ((param, theirs.data), (exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])):
        assert error(got, want) < 1e-6  # 20 steps of roundings on both sides


@pytest.mark.parametrize("step", [0, 1, 150, 300])
def test_bias_corrections_keep_their_digits(step: int) -> None:
    """From zero weights the result is the update alone. 1 - 0.999 by subtraction in fp32 would be 3e-5 off; 300 is past the series."""
    arguments = shard(64, step=step, betas=(0.9, 0.999))(DEVICE, torch.float32)
    arguments |= {"param": torch.zeros(64, device=DEVICE), "lr": 1.0}
    want = expected(**arguments)
    adamw_(**arguments)
    assert error(arguments["param"], want[0]) < 1e-6


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 4096])
def test_a_rejected_step_changes_no_bit_whatever_the_gradients(length: int) -> None:
    arguments = shard(length, commit=False, poisoned=True)(DEVICE, torch.float16)
    before = {name: arguments[name].clone() for name in IN_PLACE}
    scale, step = arguments["grad_scale"].clone().fill_(torch.nan), arguments["step"].clone()
    adamw_(**{**arguments, "grad_scale": scale})
    assert all(torch.equal(arguments[name], before[name]) for name in ("param", "exp_avg", "exp_avg_sq"))
    assert torch.equal(arguments["out"], before["param"].half())
    assert torch.equal(arguments["step"], step)  # the caller counts


def test_writes_its_own_elements_only() -> None:
    """Shards are views of longer buffers: what lies after them, and the gradient, stay."""
    arguments = shard(1030)(DEVICE, torch.float32)
    longer = {name: torch.cat([arguments[name], arguments[name].new_full((600,), 7.0)]) for name in IN_PLACE}
    grad = arguments["grad"].clone()
    adamw_(**{**arguments, **{name: buffer[:1030] for name, buffer in longer.items()}})
    assert all((buffer[1030:] == 7.0).all() for buffer in longer.values())
    assert torch.equal(arguments["grad"], grad)


def test_an_empty_shard_and_one_of_several_dims() -> None:
    adamw_(**shard(0)(DEVICE, torch.float32))
    flat, shaped = (shard(48)(DEVICE, torch.float32) for _ in range(2))
    adamw_(**flat)
    adamw_(**{name: value.view(6, 8) if name in (*IN_PLACE, "grad") else value for name, value in shaped.items()})
    assert torch.equal(flat["param"], shaped["param"])


@pytest.mark.parametrize("change, message", [
    ({"param": torch.zeros(8, dtype=torch.bfloat16)}, "param has dtype bfloat16, expected float32"),
    ({"grad": torch.zeros(8, dtype=torch.float64)}, "grad has dtype float64, expected float32 or bfloat16 or float16"),
    ({"grad": torch.zeros(7)}, r"grad has shape \(7,\), expected \(8\)"),
    ({"exp_avg": torch.zeros(16)[::2]}, "exp_avg has strides"),
    ({"exp_avg_sq": torch.zeros(8, device="meta")}, "exp_avg_sq lies on meta, expected"),
    ({"out": torch.zeros(8)}, "out has dtype float32, expected bfloat16 or float16"),
    ({"grad_scale": torch.ones(1)}, r"grad_scale has shape \(1,\), expected \(\)"),
    ({"step": torch.tensor(3)}, "step has dtype int64, expected float32"),
    ({"commit": torch.tensor(1.0)}, "commit has dtype float32, expected bool"),
    ({"beta2": 1.0}, "beta2 is 1.0, expected a number from 0 to below 1"),
], ids=str)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_(**{**shard(8)(torch.device("cpu"), torch.float32), **change})


@pytest.mark.parametrize("length", [1, 1025, 2**31 + 5])
def test_meta_tensors_reach_a_launcher_without_host_sync(length: int) -> None:
    seen: list[tuple[tuple[int, ...], Mapping[str, Any]]] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        seen.append((grid, arguments))

    def scalar(dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device="meta")

    arrays = [torch.empty(length, device="meta") for _ in range(4)]
    with launching_through(note):
        adamw_(*arrays, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=scalar(torch.float32),
               step=scalar(torch.float32), commit=scalar(torch.bool))
    (grid, arguments), = seen
    assert (grid[0] - 1) * arguments["BLOCK"] < length <= grid[0] * arguments["BLOCK"]
