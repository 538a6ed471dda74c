"""cross_entropy and its pieces against references in fp64: loss, both gradients, chunks, shards of the vocabulary; what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import cross_entropy as module
from zaya.kernels import reference
from zaya.kernels.cases import SMALL, Case, error, run, widened
from zaya.kernels.cases.cross_entropy import CASES, head
from zaya.kernels.cross_entropy import Partials, cross_entropy, gradients, partials
from zaya.kernels.gradient_sum import GradientSum
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


@pytest.mark.parametrize(("op", "block_logits", "dtype"), [
    (cross_entropy, (module, "CHUNK_LOGITS"), torch.float32), (reference.cross_entropy, (reference, "LOSS_BLOCK"), torch.float64),
], ids=["triton", "reference"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("mine", [0, 1], ids=["first shard", "last shard"])
def test_a_shard_that_combines_as_it_goes_equals_the_whole(op: Any, block_logits: tuple[Any, str], dtype: torch.dtype, z_loss: float,
                                                           mine: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other shard's partials come in through `combine`, block by block, as a collective would bring them."""
    arguments = head(21, 16, 300)(DEVICE, dtype)
    monkeypatch.setattr(*block_logits, 10 * 300)
    ends = [0, 130, 300]
    shard, other = (slice(ends[i], ends[i + 1]) for i in (mine, 1 - mine))
    hidden_TD, weight_VD, labels_T = arguments.values()
    rows = 10 * 300 // (shard.stop - shard.start)
    logits_TV = hidden_TD @ weight_VD[other].t()
    theirs = iter(zip(*(part.split(rows) for part in reference.cross_entropy_partials(logits_TV, labels_T, other.start)[:3])))
    leaves, whole = ([hidden_TD.clone().requires_grad_(), w.clone().requires_grad_()] for w in (weight_VD[shard], weight_VD))
    loss = op(*leaves, labels_T, z_loss, vocab_start=shard.start, combine=lambda parts: combined([parts, next(theirs)]))
    want = op(*whole, labels_T, z_loss)
    threshold = 5e-6 if dtype == torch.float32 else 1e-12
    assert error(loss, want) < threshold and next(theirs, None) is None
    dhidden, dweight = torch.autograd.grad(loss, leaves)
    want_dweight = torch.autograd.grad(want, whole[1])[0]
    assert error(dweight, want_dweight[shard]) < threshold
    # hidden's is the shard's share: of softmax - onehot its own columns.
    logits = hidden_TD.double() @ weight_VD.double().t()
    lse = logits.logsumexp(-1, keepdim=True)
    dlogits = (logits - lse).exp() * (1 + 2 * z_loss * lse) - (labels_T[:, None] == torch.arange(300, device=DEVICE)).double()
    dlogits = torch.where(labels_T[:, None] == IGNORE, 0.0, dlogits)[:, shard]
    assert error(dhidden, dlogits @ weight_VD[shard].double()) < threshold


def test_backward_twice_gives_the_same() -> None:
    arguments = head(9, 8, 50)(DEVICE, torch.float32)
    hidden = arguments["hidden_TD"].requires_grad_()
    loss = 0.5 * cross_entropy(**arguments)
    first, second = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("op", [cross_entropy, reference.cross_entropy])
def test_the_weights_gradient_adds_up_in_a_given_sum(op: Any) -> None:
    """Two micro-batches: the first replaces what is in the sum, the second adds to it, unrounded; autograd gets the rest."""
    arguments, names = head(37, 24, 300)(DEVICE, torch.float16), ("hidden_TD", "weight_VD")
    want = run(reference.cross_entropy, widened(arguments), names)
    gradient_sum = GradientSum(torch.full_like(arguments["weight_VD"], math.nan, dtype=torch.float32))
    for times in (1, 2):
        got = run(op, {**arguments, "gradient_sum": gradient_sum}, names)
        assert error(got["d hidden_TD"], want["d hidden_TD"]) < THRESHOLDS[torch.float16]
        assert got["d weight_VD"].is_sparse and not got["d weight_VD"]._nnz()
        assert error(gradient_sum.total / times, want["d weight_VD"]) < THRESHOLDS[torch.float16]
        assert (gradient_sum.total != gradient_sum.total.half()).any()


def test_refuses_another_sum() -> None:
    sum_of_halves = GradientSum(torch.zeros(50, 8, dtype=torch.float16, device=DEVICE))
    with pytest.raises(ValueError, match="gradient_sum has dtype float16, expected float32"):
        cross_entropy(**head(9, 8, 50)(DEVICE, torch.float16), gradient_sum=sum_of_halves)


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
