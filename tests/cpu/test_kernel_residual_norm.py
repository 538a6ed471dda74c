"""residual_norm and rms_norm against the reference: outputs and every gradient, on poisoned memory; what they refuse; no host sync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels.cases import SMALL, Case, at, error, run
from zaya.kernels.cases.residual_norm import CASES, join, norm
from zaya.kernels.launch import MI300X, Config, launching_through
from zaya.kernels.residual_norm import residual_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Both sides add in fp32, in another order: about sqrt(rows or width) roundings of 6e-8. What ends in a 16-bit dtype is rounded once,
# 2^-11 / sqrt(3) = 2.8e-4 in fp16 and 8 times that in bf16 (RMS at most), from cotangents that are themselves rounded alike.
THRESHOLD = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3.2e-3}
# The interpreter truncates to bf16, twice the error at least: bf16 is for a GPU and for the chip's machine code.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
SMALL_CASES = [case for case in CASES if case.size == SMALL]
# Wide rows take the interpreter seconds and differ by their tile only: once, in fp32, is enough.
PAIRS = [(case, dtype) for case in SMALL_CASES for dtype in DTYPES
         if DEVICE.type == "cuda" or dtype == torch.float32 or not case.name.endswith("4096")]


def _in_fp32(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, in fp32: what the reference computes from."""
    def widened(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        return value.float() if isinstance(value, Tensor) else value

    return {name: widened(value) for name, value in arguments.items()}


@pytest.mark.parametrize("case, dtype", PAIRS, ids=lambda value: getattr(value, "name", str(value)))
def test_outputs_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(DEVICE, dtype)
    got = run(case.op, arguments, case.gradients)
    want = run(case.reference, _in_fp32(arguments), case.gradients)
    assert set(got) == set(want)
    too_far = {name: error(got[name], want[name]) for name in want if not error(got[name], want[name]) < THRESHOLD[dtype]}
    assert not too_far


def test_dtypes_are_those_of_the_inputs() -> None:
    arguments = join(3, 40)(DEVICE, torch.float16)
    arguments["scales"] = (arguments["scales"][0].float(), *arguments["scales"][1:])
    arguments["norm_weight"] = arguments["norm_weight"].float()
    got = run(residual_norm, arguments, ("stream", "branch", "scales.0", "scales.1", "norm_weight"))
    assert [tensor.dtype for tensor in got.values()] == [
        torch.float32, torch.float32, torch.float32, torch.float16, torch.float32, torch.float16, torch.float32]
    want = run(CASES[0].reference, _in_fp32(arguments), ("stream", "branch", "scales.0", "scales.1", "norm_weight"))
    # Nothing that ends in fp32 passes through 16 bits.
    assert all(error(got[name], want[name]) < THRESHOLD[got[name].dtype] for name in want)


def test_gradients_through_one_output_only_and_through_views() -> None:
    arguments = join(5, 24)(DEVICE, torch.float32)

    def only_x(**kwargs: Any) -> Tensor:
        return residual_norm(**kwargs)[1].transpose(0, 1)[::2]  # backward gets a gradient that is not contiguous

    def only_stream(**kwargs: Any) -> Tensor:
        return residual_norm(**kwargs)[0]

    paths = ("stream", "branch", "scales.2", "norm_weight")
    for pick, index in ((only_x, 1), (only_stream, 0)):
        def reference(pick: Any = pick, index: int = index, **kwargs: Any) -> Tensor:
            output = CASES[0].reference(**kwargs)[index]
            return output.transpose(0, 1)[::2] if index else output

        got, want = run(pick, arguments, paths), run(reference, arguments, paths)
        assert all(error(got[name], want[name]) < THRESHOLD[torch.float32] for name in want), index


def test_no_rows_give_empty_outputs_and_zero_gradients() -> None:
    arguments = join(0, 64)(DEVICE, torch.float32)
    got = run(residual_norm, arguments, ("stream", "scales.0", "scales.3", "norm_weight"))
    assert got["out.0"].shape == got["out.1"].shape == got["d stream"].shape == (0, 64)
    assert all(not got[name].any() for name in ("d scales.0", "d scales.3", "d norm_weight"))
    assert not run(rms_norm, norm(0, 64)(DEVICE, torch.float32), ("weight",))["d weight"].any()


def test_twice_the_same_bits() -> None:
    case, arguments = SMALL_CASES[0], SMALL_CASES[0].make(DEVICE, torch.float32)
    first, second = (run(case.op, arguments, case.gradients) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("change, message", [
    ({"stream": torch.zeros(2, 8, dtype=torch.float64)}, "stream has dtype float64, expected float32"),
    ({"stream": torch.zeros(2, 8, dtype=torch.bfloat16)}, "stream has dtype bfloat16, expected float32"),
    ({"stream": torch.zeros(8, 2).t()}, "stream has strides"),
    ({"stream": torch.zeros(())}, "stream has shape"),
    ({"stream": torch.zeros(1, 8193), "branch": torch.zeros(1, 8193)}, "stream has shape .*expected a last dim of 1 to 8192"),
    ({"stream": torch.zeros(2, 0), "branch": torch.zeros(2, 0)}, "stream has shape .*expected a last dim of 1 to 8192"),
    ({"branch": torch.zeros(2, 8, dtype=torch.float64)}, "branch has dtype float64, expected bfloat16 or float16 or float32"),
    ({"branch": torch.zeros(3, 8)}, r"branch has shape \(3, 8\), expected \(2, 8\)"),
    ({"branch": torch.zeros(2, 8, device="meta")}, "branch lies on meta, expected"),
    ({"branch": torch.zeros(8, 2).t()}, "branch has strides"),
    ({"scales": (torch.zeros(8), torch.zeros(7), torch.zeros(8), torch.zeros(8))}, r"branch_bias has shape \(7,\), expected \(8\)"),
    ({"scales": (torch.zeros(8), torch.zeros(8), torch.zeros(16)[::2], torch.zeros(8))}, "stream_scale has strides"),
    ({"norm_weight": torch.zeros(8, dtype=torch.int32)}, "norm_weight has dtype int32"),
], ids=str)
def test_residual_norm_refuses(change: dict[str, Any], message: str) -> None:
    vectors = (torch.zeros(8),) * 4
    arguments = {"stream": torch.zeros(2, 8), "branch": torch.zeros(2, 8), "scales": vectors, "norm_weight": torch.zeros(8), "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        residual_norm(**{**arguments, **change})


@pytest.mark.parametrize("x, weight, message", [
    (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), "x has dtype float64"),
    (torch.zeros(2, 8), torch.zeros(9), r"weight has shape \(9,\), expected \(8\)"),
    (torch.zeros(2, 8193), torch.zeros(8193), "x has shape"),
    (torch.zeros(8, 2).t(), torch.zeros(8), "x has strides"),
])
def test_rms_norm_refuses(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_meta_tensors_reach_a_launcher_without_host_sync(case: Case) -> None:
    launches: list[tuple[str, int]] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        launches.append((kernel.__name__, grid[0]))

    arguments = case.make(torch.device("meta"), torch.bfloat16)
    leaves = [at(arguments, path).requires_grad_() for path in case.gradients]
    with launching_through(note):
        outputs = case.op(**arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        gradients = torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs])
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]
    assert len(launches) == 3
    # The partial sums, one row a program, stay small: at most two programs a compute unit.
    assert 1 <= launches[1][1] <= 2 * MI300X.num_cus
