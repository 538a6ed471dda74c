"""tools.bench_kernels without a GPU: it says so; and with a clock of its own, that peers do the work of the op, that a wrong kernel gets no
speed, and what it prints. Peers are checked here because a GPU is rarely at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import bench_kernels, bench_kernels_moe
from zaya.kernels import cases, reference
from zaya.kernels import peers as peers_module
from zaya.kernels.cases import attention, cca
from zaya.kernels.peers import Peer, peers

CPU = torch.device("cpu")


class StoppedClock:
    """Runs each call once and says 1 ms, 2 ms for the second contender, ..."""

    def medians(self, calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: index + 1.0 for index, name in enumerate(calls)}

    def host_milliseconds(self, call: Callable[[], Any]) -> float:
        return 0.5

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        call()
        return 1 << 20


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)


def reference_case(name: str, **changes: Any) -> cases.Case:
    """A small case with its reference in the kernel's place: the bench is tested, not the kernel."""
    case = next(case for case in cases.cases(cases.SMALL) if case.name == name)
    return dataclasses.replace(case, op=case.reference, timed=None, **changes)


def bench(case: cases.Case) -> dict[str, Any]:
    clock: Any = StoppedClock()
    return bench_kernels.bench(case, clock, {"tflops": 1.0, "gbs": 1.0}, rounds=10, device=CPU)


@pytest.mark.parametrize("name", ["residual_norm small many tiles", "rms_norm small router", "route small", "sort_by_expert small",
                                  "newton_schulz small tall", "cross_entropy small", "experts small all on one", "grouped_gemm small",
                                  "adamw small ragged", "adamw small rejected"])
def test_peers_do_the_same_work(name: str) -> None:
    # The references round as bf16 programs do, some after every product.
    row = bench(reference_case(name, limit=5e-2))
    assert row["is_right"] and row["left_out"] == {}
    assert len(row["forward"]["ms"]) >= 2
    for line in bench_kernels.lines(row):
        assert name in line and "WRONG" not in line


@pytest.mark.parametrize("busiest", [None, 0.5])
def test_transformers_moe_block_does_the_same_work(busiest: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = bench_kernels_moe.Block(hidden_size=64, num_experts=4, moe_intermediate_size=32, router_hidden_size=32)
    case = bench_kernels_moe.block_case("8b", block, 600, busiest, size=cases.SMALL)
    monkeypatch.setitem(bench_kernels_moe.BLOCKS, "8b", block)
    arguments = case.make(CPU, torch.bfloat16)
    assert busiest is None or abs(block._share_of_first(**arguments) - busiest) < 0.01
    row = bench(dataclasses.replace(case, op=case.reference))
    assert row["is_right"] and {"ZayaSparseMoeBlock (eager)", "ZayaSparseMoeBlock (grouped_mm)"} <= row["both"]["ms"].keys()
    assert all("unavailable" in why or "requires" in why for why in row["left_out"].values())  # libraries that are not here


def test_adamw_peer_takes_the_same_step() -> None:
    case = reference_case("adamw small late step")
    ours, theirs = (case.make(CPU, torch.float32) for _ in range(2))
    want = case.reference(**ours)
    (peer,) = peers(case, theirs).values()
    got = peer.call(**theirs)
    assert [cases.error(*pair) < 1e-3 for pair in zip(got, want)] == [True] * 4  # the last, in bf16, can round another way


def test_cca_peer_on_one_document() -> None:
    arguments = cca.make(CPU, torch.float32, B=2, T=9, N=4, G=2, H=32)
    got, want = peers_module._cca(**arguments), reference.cca(**arguments)
    assert [cases.error(*pair) < 1e-5 for pair in zip(got, want)] == [True] * 3


def test_attention_peer_where_nothing_is_masked() -> None:
    case = attention.small("whole", 40, 4, 2, 32)
    arguments = case.make(CPU, torch.float32)
    found = peers(case, arguments)
    assert list(found) == ["sdpa FLASH", "sdpa cuDNN"]
    assert cases.error(found["sdpa FLASH"].call(**arguments), reference.attention(**arguments)) < 1e-5


def test_a_wrong_kernel_gets_no_speed() -> None:
    case = reference_case("rms_norm small router")
    row = bench(dataclasses.replace(case, op=lambda x, weight, eps: case.reference(x, weight, eps) * 1.1))
    assert not row["is_right"] and "forward" not in row
    (line,) = bench_kernels.lines(row)
    assert "WRONG: out.0 1.0e-01" in line


def test_what_is_timed_in_the_place_of_a_right_op_must_be_right_too() -> None:
    case = reference_case("adamw small ragged")
    row = bench(dataclasses.replace(case, timed=lambda **arguments: tuple(1.1 * tensor for tensor in case.op(**arguments))))
    assert not row["is_right"] and "forward" not in row
    (line,) = bench_kernels.lines(row)
    assert "WRONG: out.0 as timed 1.0e-01" in line
    assert bench(dataclasses.replace(case, timed=case.op))["is_right"]


def test_a_peer_that_updates_its_arguments_spoils_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        weight.data.mul_(2)
        return case.op(x, weight / 2, eps)

    monkeypatch.setattr(bench_kernels, "peers", lambda case, _: {"in place": Peer(doubled, is_in_place=True), "same": Peer(case.op)})
    case = reference_case("rms_norm small router", gradients=())
    assert bench(case)["left_out"] == {}


def test_a_peer_that_leaves_something_out_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "peers", lambda case, _: {"half of it": Peer(lambda **a: 2 * case.op(**a), is_whole=False)})
    row = bench(reference_case("rms_norm small router"))
    assert list(row["both"]["ms"]) == ["zaya", "half of it"] and row["left_out"] == {}


def test_peers_of_one_document_are_timed_beside_several() -> None:
    row = bench(reference_case("cca small ragged, fused projection"))
    assert list(row["both"]["ms"]) == ["zaya", "eager, one document, no halo", "torch.compile, one document, no halo"]
    assert row["left_out"] == {}


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "peers", lambda case, _: {
        "twice": Peer(lambda **a: 2 * case.op(**a)), "without gradients": Peer(lambda **a: case.op(**a).detach() + 0 * case.op(**a)),
        "raises": Peer(lambda **a: 1 / 0)})
    row = bench(reference_case("rms_norm small router"))
    assert list(row["forward"]["ms"]) == list(row["both"]["ms"]) == ["zaya"]
    assert row["left_out"] == {"twice": "computes something else: 1.0e+00", "without gradients": "computes something else: 1.0e+00",
                               "raises": "division by zero"}


def test_without_a_gpu_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tools.bench_kernels", "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as stop:
        bench_kernels.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "tools.bench_kernels: there is no GPU here; see --help\n"
    assert not (tmp_path / "out.json").exists()
