"""cross_entropy and its pieces against references in fp64: loss, both gradients, chunks, shards of the vocabulary; what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import cross_entropy as module
from zaya.kernels import reference
from zaya.kernels.cases import SMALL, Case, error, run
from zaya.kernels.cases.cross_entropy import CASES, head
from zaya.kernels.cross_entropy import Partials, cross_entropy, gradients, partials
from zaya.kernels.launch import Config, launching_through
from zaya.kernels.reference import IGNORE

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32: sums of up to 9,001 terms, rounded to 6e-8 each. fp16: logits' gradients are rounded to 5e-4, and so are the results; gradients of
# logits under 6e-5 are subnormal, with fewer digits.
THRESHOLDS = {torch.float32: 5e-6, torch.float16: 2e-3}
SMALL_CASES = [case for case in CASES if case.size == SMALL]


def compare(op: Any, arguments: dict[str, Any], names: tuple[str, ...], threshold: float, want_from: Any = reference.cross_entropy) -> None:
    wide = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in arguments.items()}
    got, want = run(op, arguments, names), run(want_from, wide, names)
    assert set(got) == set(want)
    for name in want:
        assert got[name].shape == want[name].shape
        assert error(got[name], want[name]) < threshold, name


@pytest.mark.parametrize("chunk_rows", [1000, 10], ids=["one chunk", "ragged chunks"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, dtype: torch.dtype, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.make(DEVICE, dtype)
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_rows * len(arguments["weight_VD"]))
    compare(case.op, arguments, case.gradients, THRESHOLDS[dtype], case.reference)


def shards(arguments: dict[str, Any], ends: tuple[int, ...]) -> list[dict[str, Any]]:
    starts = (0, *ends[:-1])
    return [{**arguments, "weight_VD": arguments["weight_VD"][start:end], "vocab_start": start} for start, end in zip(starts, ends)]


def combined(parts: list[Partials]) -> Partials:
    largest = torch.stack([part[0] for part in parts]).amax(0)
    total = torch.stack([part[1] * (part[0] - largest).exp() for part in parts]).sum(0)
    return largest, total, torch.stack([part[2] for part in parts]).sum(0)


@pytest.mark.parametrize("ends", [(130, 300), (7, 200, 300)], ids=["two shards", "three shards"])
@pytest.mark.parametrize("logits", [2.0, 1e4])
def test_uneven_shards_combine_to_the_whole(ends: tuple[int, ...], logits: float) -> None:
    arguments = head(21, 16, 300, logits=logits)(DEVICE, torch.float32)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
    want = run(reference.cross_entropy, wide | {"z_loss": 1e-3}, ("hidden_TD", "weight_VD"))
    each = shards(arguments, ends)
    largest, total, at_label = combined([partials(**shard) for shard in each])
    lse, labelled = largest + total.log(), arguments["labels_T"] != IGNORE
    loss = (torch.where(labelled, lse - at_label + 1e-3 * lse.square(), 0.0)).sum()
    assert error(loss, want["out.0"]) < 1e-6
    dloss = torch.randn((), generator=torch.Generator().manual_seed(7919)).to(DEVICE)  # the cotangent of `run`
    dhidden, dweight = zip(*(gradients(**shard, lse_T=lse, dloss=dloss, z_loss=1e-3) for shard in each))
    # lse of 1e4 is rounded to 5e-4, and so are the probabilities.
    threshold = 5e-6 if logits < 10 else 1e-3
    assert error(torch.stack(dhidden).sum(0), want["d hidden_TD"]) < threshold
    assert error(torch.cat(dweight), want["d weight_VD"]) < threshold


def test_a_shard_that_combines_as_it_goes_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other shard's partials come in through `combine`, chunk by chunk, as a collective would bring them."""
    arguments = head(21, 16, 300)(DEVICE, torch.float32)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 10 * 300)
    mine, other = shards(arguments, (130, 300))
    rows = max(10 * 300 // 130, 1)
    theirs = iter(zip(*(part.split(rows) for part in partials(**other))))
    leaves = [mine[name].clone().requires_grad_() for name in ("hidden_TD", "weight_VD")]
    loss = cross_entropy(leaves[0], leaves[1], mine["labels_T"], vocab_start=0, combine=lambda parts: combined([parts, next(theirs)]))
    whole = [arguments[name].clone().requires_grad_() for name in ("hidden_TD", "weight_VD")]
    want = cross_entropy(whole[0], whole[1], arguments["labels_T"])
    assert error(loss, want) < 1e-6
    dweight, want_dweight = torch.autograd.grad(loss, leaves[1])[0], torch.autograd.grad(want, whole[1])[0]
    assert error(dweight, want_dweight[:130]) < 1e-6


def test_backward_twice_gives_the_same() -> None:
    arguments = head(9, 8, 50)(DEVICE, torch.float32)
    hidden = arguments["hidden_TD"].requires_grad_()
    loss = 0.5 * cross_entropy(**arguments)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens_lose_nothing() -> None:
    hidden, weight = torch.zeros(0, 8, device=DEVICE), torch.zeros(5, 8, device=DEVICE)
    labels = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert cross_entropy(hidden, weight, labels) == 0
    assert [len(part) for part in partials(hidden, weight, labels)] == [0, 0, 0]


def test_needs_no_values_on_the_host() -> None:
    launched: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        launched.append(kernel.__name__)

    for case in CASES:
        arguments = case.make(torch.device("meta"), torch.bfloat16)
        with launching_through(note):
            outputs = case.op(**{name: value.requires_grad_() if name in case.gradients else value for name, value in arguments.items()})
            if case.gradients:
                outputs.backward()
                assert arguments["weight_VD"].grad.shape == arguments["weight_VD"].shape
    assert set(launched) == {"_cross_entropy_partials_kernel", "_cross_entropy_gradient_kernel"}


def _arguments(**replaced: Any) -> dict[str, Any]:
    return {"hidden_TD": torch.zeros(3, 8), "weight_VD": torch.zeros(5, 8), "labels_T": torch.zeros(3, dtype=torch.int64)} | replaced


@pytest.mark.parametrize(("replaced", "words"), [
    ({"hidden_TD": torch.zeros(3, 8, dtype=torch.float64)}, "hidden_TD has dtype float64"),
    ({"hidden_TD": torch.zeros(8, 3).t()}, "hidden_TD has strides"),
    ({"hidden_TD": torch.zeros(1, 3, 8)}, "hidden_TD has shape"),
    ({"weight_VD": torch.zeros(5, 8).half()}, "weight_VD has dtype float16, expected float32"),
    ({"weight_VD": torch.zeros(5, 7)}, r"weight_VD has shape \(5, 7\), expected \(any, 8\)"),
    ({"weight_VD": torch.zeros(0, 8)}, "at least one row"),
    ({"labels_T": torch.zeros(3, dtype=torch.int32)}, "labels_T has dtype int32, expected int64"),
    ({"labels_T": torch.zeros(4, dtype=torch.int64)}, r"labels_T has shape \(4,\), expected \(3\)"),
    ({"labels_T": torch.zeros(3, dtype=torch.int64, device="meta")}, "labels_T lies on meta, expected cpu"),
])
def test_refuses(replaced: dict[str, Any], words: str) -> None:
    for op in (cross_entropy, partials):
        with pytest.raises(ValueError, match=words):
            op(**_arguments(**replaced))


def test_gradients_refuse_another_log_sum_exp() -> None:
    with pytest.raises(ValueError, match="lse_T has dtype float16, expected float32"):
        gradients(**_arguments(), lse_T=torch.zeros(3).half(), dloss=torch.ones(()))
