"""route and sort_by_expert against their references: ties, two slots, classes nobody takes; what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from zaya.kernels import reference
from zaya.kernels.cases import SMALL, Case, errors
from zaya.kernels.cases.routing import CASES
from zaya.kernels.launch import Config, launching_through
from zaya.kernels.routing import route, sort_by_expert

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The softmax is fp32 for every dtype: few roundings of 6e-8. The gradient of fp16 logits is rounded to fp16, 2e-4.
THRESHOLDS = {torch.float32: 5e-7, torch.float16: 4e-4}
INF, NAN = float("inf"), float("nan")
SMALL_CASES = [case for case in CASES if case.size == SMALL]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    found = errors(case, case.make(DEVICE, dtype))
    exact = ("out.0", "out.2") if case.op is route else ("out.0", "out.1")
    assert all(found[name] == 0 for name in exact)
    assert all(error < THRESHOLDS[dtype] for error in found.values()), found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("bias", [[-INF] * 4, [-INF, -INF, 0, -INF], [0, INF, -INF, INF], [0, NAN, 0, NAN], [INF, NAN, 0, -INF], [0.0] * 4],
                         ids=str)
@pytest.mark.parametrize("logits", [[1, 3, 2, 0], [NAN] * 4, [1, NAN, -INF, 0], [-INF] * 4, [0, -INF, 5, -INF]], ids=str)
def test_infinite_and_nan_scores_are_chosen_among_as_by_the_reference(logits: list[float], bias: list[float], top_k: int) -> None:
    """A class is chosen once, whatever its score: NaN before all, the lowest index first. The gate tells of a row of NaN."""
    logits_TC, bias_C = torch.tensor([logits, [0.0] * 4], device=DEVICE), torch.tensor(bias, device=DEVICE)
    for got, want in zip(route(logits_TC, bias_C, top_k), reference.route(logits_TC, bias_C, top_k)):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_route_sort_and_reference_agree_end_to_end() -> None:
    case = SMALL_CASES[1]
    arguments = case.make(DEVICE, torch.float32)
    choice, _, counts = route(**arguments)
    order, sizes = sort_by_expert(choice, 5)
    want_order, want_sizes = reference.sort_by_expert(reference.route(**arguments)[0], 5)
    assert torch.equal(order, want_order) and torch.equal(sizes, want_sizes) and torch.equal(sizes, counts)
    assert order.dtype == torch.int32 and sizes.dtype == counts.dtype == torch.int64


def test_no_tokens_give_none() -> None:
    choice, gate, counts = route(torch.zeros(0, 3, device=DEVICE), torch.zeros(3, device=DEVICE), 2)
    order, sizes = sort_by_expert(choice, 3)
    assert choice.shape == gate.shape == (0, 2) and order.shape == (0,) and counts.tolist() == sizes.tolist() == [0, 0, 0]


def test_needs_no_values_on_the_host() -> None:
    launched: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        launched.append(kernel.__name__)

    for case in CASES:
        with launching_through(note):
            case.op(**case.make(torch.device("meta"), torch.bfloat16))
    assert set(launched) == {"_route_fwd_kernel", "_sort_histogram_kernel", "_sort_scatter_kernel"}


@pytest.mark.parametrize(("logits", "bias", "top_k", "words"), [
    (torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3), 1, "logits_TC has dtype float64, expected bfloat16"),
    (torch.zeros(4, 3), torch.zeros(4), 1, r"balance_bias_C has shape \(4,\), expected \(3\)"),
    (torch.zeros(4, 3), torch.zeros(3, dtype=torch.bfloat16), 1, "balance_bias_C has dtype bfloat16, expected float32"),
    (torch.zeros(3, 4).t(), torch.zeros(3), 1, r"logits_TC has strides \(1, 4\)"),
    (torch.zeros(4, 3), torch.zeros(3), 4, "top_k is 4, expected 1 to 3"),
    (torch.zeros(4, 300), torch.zeros(300), 1, "logits_TC has 300 classes, expected 1 to 256"),
])
def test_route_refuses(logits: torch.Tensor, bias: torch.Tensor, top_k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        route(logits, bias, top_k)


@pytest.mark.parametrize(("choice", "classes", "words"), [
    (torch.zeros(4, dtype=torch.int32), 3, r"choice_Tk has shape \(4,\), expected \(any, any\)"),
    (torch.zeros(4, 1), 3, "choice_Tk has dtype float32, expected int32 or int64"),
    (torch.zeros(4, 1, dtype=torch.int32), 0, "num_classes has 0 classes, expected 1 to 256"),
])
def test_sort_refuses(choice: torch.Tensor, classes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sort_by_expert(choice, classes)
