"""cca against the reference: outputs and every gradient, on poisoned memory; vanishing heads; what it refuses; no host sync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.cases import CHIP, SMALL, Case, error, run
from zaya.kernels.cases.cca import CASES, PARAMETERS, make
from zaya.kernels.cca import cca
from zaya.kernels.launch import MI300X, Config, launching_through

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Both sides add in fp32, in another order: up to 400 terms, roundings of 6e-8 each. In 16 bits the folded kernel, dz, q and the results
# are rounded, 2^-11 / sqrt(3) = 2.8e-4 in fp16 and 8 times that in bf16 (RMS at most), and dz carries those of q and the cotangents on.
THRESHOLD = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# dtemperature is a sum of terms of either sign, a_t = <dout_t, out_t>: it may be small where they, and their roundings, are not.
SUMS = {"d temperature_G": 5.0}
# The interpreter's bf16 products are wrong: bf16 is for a GPU and for the chip's machine code.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
SMALL_CASES = [case for case in CASES if case.size == SMALL]


def _in_fp32(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, in fp32: what the reference computes from."""
    def widened(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: widened(value) for name, value in arguments.items()}


def _compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor], threshold: float) -> None:
    assert set(got) == set(want)
    errors = {name: error(got[name], want[name]) for name in want}
    assert not {name: found for name, found in errors.items() if not found < threshold * SUMS.get(name, 1.0)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(DEVICE, dtype)
    want = run(case.reference, _in_fp32(arguments), case.gradients)
    _compare(run(case.op, arguments, case.gradients), want, THRESHOLD[dtype])


def _tiny(**changes: Any) -> dict[str, Any]:
    shape: dict[str, Any] = dict(B=1, T=3, N=2, G=1, H=32)
    return make(DEVICE, changes.pop("dtype", torch.float32), **{**shape, **changes})


def test_parameters_keep_a_dtype_of_their_own() -> None:
    arguments = _tiny(dtype=torch.float16)
    for side in ("q_convs", "k_convs"):
        arguments[side] = tuple(x.float() for x in arguments[side])
    arguments["temperature_G"] = arguments["temperature_G"].float()
    got = run(cca, arguments, ("k_BTC", *PARAMETERS))
    assert {name: x.dtype for name, x in got.items()} == {
        **dict.fromkeys(("out.0", "out.1", "out.2", "d k_BTC"), torch.float16), **{f"d {name}": torch.float32 for name in PARAMETERS}}
    _compare(got, run(reference.cca, _in_fp32(arguments), ("k_BTC", *PARAMETERS)), THRESHOLD[torch.float16])


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_temperature_may_be_zero_or_negative(temperature: float) -> None:
    """At 0 k tells nothing of the vector it was, but the temperature's gradient depends on it."""
    arguments = _tiny()
    arguments["temperature_G"] = torch.full_like(arguments["temperature_G"], temperature)
    names = ("q_BTC", "k_BTC", "v_BTC", "k_convs.2", "temperature_G")
    _compare(run(cca, arguments, names), run(reference.cca, arguments, names), THRESHOLD[torch.float32])


def test_a_vanishing_head_is_divided_by_eps_and_not_by_zero() -> None:
    """u = 0 but for one key shorter than eps: r = sqrt(H) / eps for all, and gradients keep their part along u."""
    arguments = _tiny(mean=True)
    zeroed = ("q_BTC", "k_BTC", "q_mean_BTGH")
    arguments |= {name: torch.zeros_like(arguments[name]) for name in zeroed}
    # u is half the mean here. At 0.9 eps the part along u is 0.81 of what an unclamped norm would take away.
    arguments["q_mean_BTGH"][0, 1] = 2 * 0.9 * torch.finfo(torch.float32).eps * 32**-0.5
    for side in ("q_convs", "k_convs"):
        arguments[side] = tuple(map(torch.zeros_like, arguments[side]))
    _compare(run(cca, arguments, zeroed), run(reference.cca, arguments, zeroed), THRESHOLD[torch.float32])


def test_gradients_of_single_outputs_and_through_views() -> None:
    """Backward gets no gradient for some outputs, and one that is not contiguous for another."""
    arguments, names = _tiny(), ("q_BTC", "k_BTC", "v_BTC", "q_convs.0", "temperature_G")

    def only_k(function: Any) -> Any:
        return lambda **kwargs: function(**kwargs)[1].transpose(1, 3)[:, ::2]

    got, want = run(only_k(cca), arguments, names), run(only_k(reference.cca), arguments, names[:2] + names[4:])
    assert not got.pop("d v_BTC").any() and not got.pop("d q_convs.0").any()
    _compare(got, want, THRESHOLD[torch.float32])


def test_inputs_and_the_border_of_delayed_values_may_lie_anywhere() -> None:
    """Nothing at a multiple of 16 bytes: narrower loads, the same numbers."""
    arguments, names = _tiny(B=2, delayed=(5, 18)), ("q_BTC", "k_BTC", "v_BTC", "q_convs.2")
    for name in names[:3]:
        x = arguments[name]
        arguments[name] = torch.cat((torch.full_like(x[..., :1], torch.nan), x, torch.full_like(x[..., :2], torch.nan)), -1)[..., 1:-2]
    _compare(run(cca, arguments, names), run(reference.cca, arguments, names), THRESHOLD[torch.float32])


@pytest.mark.parametrize("function", [cca, reference.cca])
def test_begin_gets_keys_and_values_and_changes_nothing(function: Any) -> None:
    arguments, names, begun = _tiny(T=5, mean=True), ("q_BTC", "k_BTC", "v_BTC", "temperature_G"), []
    want = run(function, arguments, names)
    got = run(function, {**arguments, "begin": lambda k, v: begun.append((k.detach().clone(), v.detach().clone()))}, names)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [[*map(torch.equal, pair, (got["out.1"], got["out.2"]))] for pair in begun] == [[True, True]]


def test_begin_stands_between_the_launches_of_keys_and_queries() -> None:
    seen: list[Any] = []
    arguments = make(torch.device("meta"), torch.bfloat16, B=1, T=64, N=8, G=2, H=128)
    with launching_through(lambda kernel, grid, given, config: seen.append((given.get("FIRST"), given.get("HEADS"))), MI300X):
        cca(**arguments, begin=lambda k, v: seen.append("begin"))
    assert seen[1:] == [(8, 4), "begin", (0, 8)]  # after the fold: 2 key and 2 value heads, then 8 query heads


def test_twice_the_same_bits() -> None:
    arguments, names = _tiny(), ("q_BTC", "k_BTC", "v_BTC", *PARAMETERS)
    first, second = (run(cca, arguments, names) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_never_waits_for_the_device() -> None:
    """Tensors of "meta" have no values to wait for; an op that asked for one would fail."""
    seen: list[str] = []

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        assert len(grid) <= 3 and all(size > 0 for size in grid)
        seen.append(kernel.__name__)

    for case in (case for case in CASES if case.size == CHIP):
        with launching_through(note, MI300X):
            run(case.op, case.make(torch.device("meta"), torch.bfloat16), case.gradients)
        assert seen == ["_cca_fold_kernel", "_cca_fwd_kernel", "_cca_fwd_kernel", "_cca_bwd_weight_kernel", "_cca_bwd_input_kernel",
                        "_cca_bwd_reduce_kernel"], case.name
        seen.clear()


@pytest.mark.parametrize("change, message", [
    (lambda a: {"q_BTC": a["q_BTC"].double()}, "q_BTC has dtype float64, expected bfloat16 or float16 or float32"),
    (lambda a: {"q_convs": a["q_convs"][:3]}, "q_convs has 3 tensors, expected 4"),
    (lambda a: {"rope": (*a["rope"], a["rope"][0])}, "rope has 3 tensors, expected 2"),
    (lambda a: {"halos": a["halos"][:2]}, "halos has 2 tensors, expected 3"),
    (lambda a: {"k_BTC": a["k_BTC"].half()}, "k_BTC has dtype float16, expected float32"),
    (lambda a: {"v_BTC": a["v_BTC"][:, :2]}, r"v_BTC has shape \(2, 2, 32\), expected \(2, 3, 32\)"),
    (lambda a: {"v_BTC": a["v_BTC"].to("meta")}, "v_BTC lies on meta, expected"),
    (lambda a: {"q_BTC": a["q_BTC"].mT.contiguous().mT}, "q_BTC has strides .*expected .*evenly spaced tokens of adjacent channels"),
    (lambda a: {"q_BTC": a["q_BTC"].transpose(0, 1).contiguous().transpose(0, 1)}, "q_BTC has strides .*evenly"),
    (lambda a: {"q_BTC": a["q_BTC"][..., :40]}, "q_BTC has 40 channels, expected a multiple of k_BTC's"),
    (lambda a: {name: a[name][..., :24] for name in ("k_BTC", "v_BTC")}, "k_BTC has 24 channels for 1 temperatures, expected heads of"),
    (lambda a: {"q_mean_BTGH": torch.zeros(2, 3, 2, 32, device=DEVICE)}, r"q_mean_BTGH has shape \(2, 3, 2, 32\), expected"),
    (lambda a: {"q_convs": (*a["q_convs"][:2], a["q_convs"][2].mT, a["q_convs"][3])}, r"q_convs.W has shape \(64, 2, 32\)"),
    (lambda a: {"k_convs": (*a["k_convs"][:3], a["k_convs"][3].half())}, "k_convs.c has dtype float16, expected float32"),
    (lambda a: {"positions_BT": a["positions_BT"].float()}, "positions_BT has dtype float32, expected int64 or int32"),
    (lambda a: {"rope": (a["rope"][0], a["rope"][1].half())}, "rope.sin has dtype float16, expected float32"),
    (lambda a: {"rope": (a["rope"][0][..., ::2], a["rope"][1])}, r"rope.cos has shape \(2, 3, 4\), expected \(2, 3, 8\)"),
    (lambda a: {"halos": tuple(x.expand(-1, 2, -1, -1).contiguous() for x in a["halos"])}, r"halos are for \[2, 2, 2\] chunks"),
    (lambda a: {"halos": (a["halos"][0][:, :, :1], *a["halos"][1:])}, r"halos.q has shape \(2, 1, 1, 64\), expected \(2, any, 2, 64\)"),
    (lambda a: {"delayed_rows": (16, 48)}, r"delayed_rows is \(16, 48\), expected a range within v_BTC's 32 channels"),
    (lambda a: {name: a[name][:, :0] for name in ("q_BTC", "k_BTC", "v_BTC")}, r"q_BTC has shape \(2, 0, 64\), expected at least one"),
])
def test_refuses_before_any_launch(change: Any, message: str) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("launched")

    arguments = _tiny(B=2)
    with launching_through(never), pytest.raises(ValueError, match=message):
        cca(**{**arguments, **change(arguments)})
