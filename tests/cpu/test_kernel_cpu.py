"""The ops in C for a CPU against the reference: outputs and every gradient, on poisoned memory, for both register widths; threads; what
they refuse; a machine without a compiler."""

from __future__ import annotations

import ctypes
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.needs import needs_compiler
from zaya.kernels import backend, cpu, reference
from zaya.kernels.arguments import HEAD_DIMS
from zaya.kernels.cases import SMALL, Case, cases, error, run, widened
from zaya.kernels.cases.cca import make as make_cca
from zaya.kernels.gradient_sum import ExpertSums, GradientSum

CPU = torch.device("cpu")
OPS: dict[Callable[..., Any], Callable[..., Any]] = {
    reference.residual_norm: cpu.residual_norm, reference.cca: cpu.cca, reference.attention: cpu.attention,
    reference.experts: cpu.experts, reference.cross_entropy: cpu.cross_entropy}
# Experts in bf16 and of odd widths are the reference's own: their cases prove that it is asked.
CASES = [case for case in cases(SMALL) if case.reference in OPS and not case.name.startswith("experts_into_sums")]
# Both sides add in fp32, in another order: up to 400 terms, roundings of 6e-8 each. dtemperature is a sum of terms of either sign.
FP32, SUM_OF_SIGNS = 1e-6, 5e-6
M_PERTURB = -6
pytestmark = needs_compiler


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and nothing loaded; its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    yield tmp_path / "zaya"
    cpu.library.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def dirty_memory() -> Iterator[None]:
    """glibc fills what C asks for with 0x7f..: numbers of 3e38, so that what C forgets to write shows."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_PERTURB, 0x80)
    yield
    if mallopt:
        mallopt(M_PERTURB, 0)


@pytest.fixture(params=("native", "narrow"))
def either_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, narrow_cache: Path) -> Iterator[None]:
    """Tiles of 8 rows of 32 where the CPU has AVX-512; tiles of 4 rows of 16 as where it has not."""
    cpu.library.cache_clear()
    if request.param == "narrow":
        if cpu._constant("lanes") == 8:
            pytest.skip("this CPU has no AVX-512: narrow is native")
        cpu.library.cache_clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(narrow_cache))
        monkeypatch.setenv("CC", f"{cpu.compiler()} -mno-avx512f")
        assert cpu._constant("lanes") == 8
    yield
    cpu.library.cache_clear()


@pytest.fixture(scope="session")
def narrow_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


def compare(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(CPU, dtype)
    got = run(OPS[case.reference], arguments, case.gradients)
    want = run(case.reference, widened(arguments), case.gradients, like=got)
    assert {name: tensor.dtype for name, tensor in got.items()} == {
        name: tensor.dtype for name, tensor in run(case.reference, arguments, case.gradients).items()}
    limit = {name: case.limit if dtype != torch.float32 else SUM_OF_SIGNS if "temperature" in name else FP32 for name in want}
    assert not {name: found for name in want if not (found := error(got[name], want[name])) < limit[name]}


@pytest.mark.usefixtures("poisoned", "either_width")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_equal_the_reference(case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def attention_arguments(draw: random.Random) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    B, G, group, H, chunks = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 5), draw.choice(HEAD_DIMS), draw.randint(1, 2)
    chunk, S = draw.randint(1, 70), draw.randint(1, 90)
    S = max(S, chunk * chunks)
    last = S - chunk
    offsets = (draw.randint(0, last),) if chunks == 1 else (draw.randint(0, last - chunk), last)
    own = torch.cat([torch.arange(offset, offset + chunk) for offset in offsets])
    first = torch.stack([torch.tensor([draw.randint(0, int(i)) for i in own]) for _ in range(B)])
    return reference.attention, {"q_BTNH": normal(B, chunk * chunks, G * group, H), "k_BSGH": normal(B, S, G, H),
                                 "v_BSGH": normal(B, S, G, H), "first_key_BT": first, "offsets": offsets}, ("q_BTNH", "k_BSGH", "v_BSGH")


def cca_arguments(draw: random.Random) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    B, G, group, H, K = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 4), draw.choice(HEAD_DIMS), draw.randint(1, 3)
    N, T = G * group, K * draw.randint(1, 40)
    positions, start = torch.zeros(B, T, dtype=torch.int64), draw.randint(0, 3)
    for b in range(B):
        at = start
        for t in range(T):
            at = 0 if draw.random() < 0.2 else at + 1
            positions[b, t] = at
    convs = [tuple(normal(*shape) for shape in ((n * H, 2), (n * H,), (n * H, H, 2), (n * H,))) for n in (N, G)]
    border = draw.randint(0, G * H - 1)
    delayed = (border, draw.randint(border + 1, G * H))
    arguments = {"q_BTC": normal(B, T, N * H), "k_BTC": normal(B, T, G * H), "v_BTC": normal(B, T, G * H),
                 "q_mean_BTGH": normal(B, T, G, H) if draw.random() < 0.5 else None, "q_convs": convs[0], "k_convs": convs[1],
                 "temperature_G": normal(G), "positions_BT": positions, "rope": reference.rope_table(positions, H, 1e4, torch.float64),
                 "halos": (normal(B, K, 2, N * H), normal(B, K, 2, G * H), normal(B, K, 1, delayed[1] - border)), "delayed_rows": delayed}
    return reference.cca, arguments, ("q_BTC", "k_BTC", "v_BTC", *(f"{side}.{i}" for side in ("q_convs", "k_convs") for i in range(4)),
                                      "temperature_G", "halos.0", "halos.1", "halos.2")


def experts_arguments(draw: random.Random) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    T, k, E, D, F = draw.randint(1, 150), draw.randint(1, 3), draw.randint(1, 5), 32 * draw.randint(1, 3), 32 * draw.randint(1, 3)
    favourite = draw.random() < 0.3
    choice = torch.tensor([[E // 2 if favourite else draw.randint(0, E) for _ in range(k)] for _ in range(T)], dtype=torch.int32)
    order, sizes = reference.sort_by_expert(choice, E + 1)
    arguments = {"x_TD": normal(T, D), "sizes_E": sizes[:E], "gate_up_EFD": normal(E, 2 * F, D), "down_EDF": normal(E, D, F),
                 "order_R": order, "gate_Tk": normal(T, k)}
    return reference.experts, arguments, ("x_TD", "gate_up_EFD", "down_EDF", "gate_Tk")


@pytest.mark.usefixtures("poisoned", "either_width")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("drawn", (attention_arguments, cca_arguments, experts_arguments))
def test_random_shapes_against_fp64(drawn: Callable[[random.Random], tuple[Any, ...]], seed: int,
                                          soak_seed: int) -> None:
    draw = random.Random(seed + soak_seed)
    torch.manual_seed(seed + soak_seed)
    for _ in range(4):
        function, wide, gradients = drawn(draw)
        narrow = {name: _in_fp32(value) for name, value in wide.items()}
        got, want = run(OPS[function], narrow, gradients), run(function, wide, gradients)
        # A sum over few and nearly cancelling terms is the worst: 20 times a usual one, and dtemperature's terms are of either sign.
        limit = {name: 1e-4 if "temperature" in name else 2e-5 for name in want}
        assert not {name: found for name in want if not (found := _apart(got[name], want[name])) < limit[name]}, seed


def _in_fp32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_fp32, value))
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative; a gradient that is all but zero by cancellation is measured against 1, the size of the inputs."""
    return min(error(got, want), float((got - want).abs().max()))


@pytest.mark.parametrize("case", [case for case in CASES if case.reference in (reference.attention, reference.cca, reference.residual_norm)
                                  or case.name.startswith("experts small two slots")], ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case: Case) -> None:
    """The loss, and experts of odd widths, have torch's products, whose bits follow its threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(OPS[case.reference], case.make(CPU, torch.float32), case.gradients))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_large_scores_and_a_row_that_stands_for_none() -> None:
    """Scores of +-150 need the maximum taken away; one token alone leaves rows of a tile empty, which must add nothing to dk."""
    document = torch.tensor([[0] * 30 + [30]])
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"q_BTNH": 5 * torch.randn(1, 31, 1, 32), "k_BSGH": 5 * torch.randn(1, 31, 1, 32),
                                 "v_BSGH": torch.randn(1, 31, 1, 32), "first_key_BT": document, "offsets": (0,)}
    arguments["q_BTNH"][0, 30], arguments["k_BSGH"][0, 30] = -10, 10
    names = ("q_BTNH", "k_BSGH", "v_BSGH")
    got, want = run(cpu.attention, arguments, names), run(reference.attention, arguments, names)
    assert not {name: found for name in want if not (found := error(got[name], want[name])) < 1e-4}  # scores themselves are exact to 1e-5


def test_a_query_sees_itself_at_least() -> None:
    arguments: dict[str, Any] = {"q_BTNH": torch.randn(1, 9, 2, 32), "k_BSGH": torch.randn(1, 9, 1, 32), "v_BSGH": torch.randn(1, 9, 1, 32),
                                 "offsets": (0,)}
    got = cpu.attention(**arguments, first_key_BT=torch.tensor([[-5, 10**9, 2, 9, -(10**12), 5, 6, 7, 8]]))
    assert torch.equal(got, cpu.attention(**arguments, first_key_BT=torch.tensor([[0, 1, 2, 3, 0, 5, 6, 7, 8]])))


def test_a_vanishing_head_is_divided_by_eps_and_not_by_zero() -> None:
    arguments = make_cca(CPU, torch.float32, B=1, T=3, N=2, G=1, H=32, mean=True)
    zeroed = ("q_BTC", "k_BTC", "q_mean_BTGH")
    arguments |= {name: torch.zeros_like(arguments[name]) for name in zeroed}
    eps = torch.finfo(torch.float32).eps
    arguments["q_mean_BTGH"][0, 1] = 2 * 0.9 * eps * 32**-0.5  # shorter than eps, but not zero
    arguments["q_mean_BTGH"][0, 2, 0, 5] = 2 * eps  # as long as eps: not clamped
    for side in ("q_convs", "k_convs"):
        arguments[side] = tuple(map(torch.zeros_like, arguments[side]))
    got, want = run(cpu.cca, arguments, zeroed), run(reference.cca, arguments, zeroed)
    assert not {name: found for name in want if not (found := error(got[name], want[name])) < FP32}


def test_the_loss_of_two_shards() -> None:
    hidden, weight, labels = torch.randn(9, 16), torch.randn(50, 16), torch.tensor([0, 49, 24, 25, -100, 31, 7, 26, -1])
    for start, end in ((0, 25), (25, 50)):
        logits = hidden @ weight[start:end].T
        mine = cpu._partials(logits.clone(), labels, start, torch.empty(0))
        for got, want in zip(mine, reference.cross_entropy_partials(logits.clone(), labels, start)):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ("q_BTNH", "k_BSGH", "v_BSGH"))
def test_attention_does_not_hide_a_nan(name: str) -> None:
    tensors = {"q_BTNH": torch.randn(1, 40, 4, 32), "k_BSGH": torch.randn(1, 40, 2, 32), "v_BSGH": torch.randn(1, 40, 2, 32)}
    arguments = {**tensors, "first_key_BT": torch.zeros(1, 40, dtype=torch.int64), "offsets": (0,)}
    tensors[name][0, 20, 0, 5] = torch.nan
    got = run(cpu.attention, arguments, ("q_BTNH", "k_BSGH", "v_BSGH"))
    seeing = got["out.0"][0, 20 : 21 if name == "q_BTNH" else None, : 1 if name == "q_BTNH" else 2]
    assert seeing.isnan().any(-1).all()  # every query that sees it
    assert all(got[f"d {other}"].isnan().any() for other in ("q_BTNH", "k_BSGH"))
    assert got["out.0"][0, :, 2:].isfinite().all()  # the other group


def test_gates_of_any_size_have_their_derivative() -> None:
    """1 for large ones, 0 for very negative ones, whatever the rounding beside them."""
    gate_up = torch.randn(1, 64, 32)
    x = torch.eye(32)[:8] * torch.tensor([1e-9, 1.0, 30.0, -30.0, 1e4, -1e4, 1e9, 1e17])[:, None]
    arguments = {"x_TD": x, "sizes_E": torch.tensor([8]), "gate_up_EFD": gate_up, "down_EDF": torch.randn(1, 32, 32)}
    got, want = (run(op, arguments, ("x_TD",)) for op in (cpu.experts, reference.experts))
    for name in want:
        for row in range(8):
            assert error(got[name][row], want[name][row]) < 1e-5, (name, row)


def test_there_is_no_second_derivative() -> None:
    x, vector = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = cpu.residual_norm(x, x, (vector,) * 4, vector, 1e-5)[1]
    (grad,) = torch.autograd.grad(out.square().sum(), vector, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("payload", (0, 5))
def test_experts_and_loss_do_not_hide_what_is_not_finite(value: float, payload: int) -> None:
    x, logits = torch.randn(5, 32), torch.randn(6, 40)
    x[2, 3], logits[4, 7] = value, value
    for tensor in (x[2, 3], logits[4, 7]) if value != value else ():
        tensor.view(torch.int32).add_(payload)  # NaN has many patterns
    weights = torch.randn(1, 64, 32), torch.randn(1, 32, 32)
    assert cpu.experts(x, torch.tensor([5]), *weights).isfinite().all(1).tolist() == [True, True, False, True, True]
    largest, total, target, _ = cpu._partials(logits.clone(), torch.arange(6), 0, torch.empty(0))
    mine, theirs = total.log() + largest, logits.logsumexp(-1)
    assert torch.equal(mine.isfinite(), theirs.isfinite())
    torch.testing.assert_close(mine[mine.isfinite()], theirs[mine.isfinite()])


def test_gradients_are_added_to_sums_and_replace_what_came_before() -> None:
    sizes, x = torch.tensor([40, 0, 7]), torch.randn(50, 64)
    weights = torch.randn(3, 128, 64, requires_grad=True), torch.randn(3, 64, 64, requires_grad=True)
    cpu.experts(x, sizes, *weights).sum().backward()
    grads = [weight.grad for weight in weights if weight.grad is not None]
    sums = ExpertSums(*(GradientSum(torch.full_like(weight, torch.nan)) for weight in weights))
    for _ in range(2):
        cpu.experts(x, sizes, *weights, gradient_sums=sums).sum().backward()
    for gradient_sum, grad in zip(sums, grads, strict=True):
        assert error(gradient_sum.total, 2 * grad) < FP32
    # One of the two has begun, the other not.
    for begun in (0, 1):
        sums = ExpertSums(*(GradientSum(torch.full_like(weight, 7.0), begun=index == begun) for index, weight in enumerate(weights)))
        cpu.experts(x, sizes, *weights, gradient_sums=sums).sum().backward()
        assert error(sums[begun].total - 7, grads[begun]) < 1e-5 and error(sums[1 - begun].total, grads[1 - begun]) < FP32


def _attention(**changes: Any) -> Callable[[], Any]:
    arguments = {"q_BTNH": torch.randn(1, 8, 4, 32), "k_BSGH": torch.randn(1, 8, 2, 32), "v_BSGH": torch.randn(1, 8, 2, 32),
                 "first_key_BT": torch.zeros(1, 8, dtype=torch.int64), "offsets": (0,), **changes}
    return lambda: cpu.attention(**arguments)


def _cca(**changes: Any) -> Callable[[], Any]:
    arguments = make_cca(CPU, torch.float32, B=1, T=3, N=2, G=1, H=32)
    return lambda: cpu.cca(**{**arguments, **changes})


def _experts(dtype: torch.dtype = torch.float32, **changes: Any) -> Callable[[], Any]:
    """In bf16 the reference computes them; what is wrong is said all the same."""
    arguments = {"x_TD": torch.randn(4, 32), "sizes_E": torch.tensor([1, 2]), "gate_up_EFD": torch.randn(2, 64, 32),
                 "down_EDF": torch.randn(2, 32, 32), "order_R": torch.arange(4, dtype=torch.int32), "gate_Tk": torch.rand(4, 1)}
    arguments.update({name: arguments[name].to(dtype) for name in ("x_TD", "gate_up_EFD", "down_EDF")})
    return lambda: cpu.experts(**{**arguments, **changes})


@pytest.mark.parametrize(("call", "says"), [
    (_attention(q_BTNH=torch.randn(1, 8, 4, 32, dtype=torch.float64)), "q_BTNH has dtype float64"),
    (_attention(v_BSGH=torch.randn(1, 8, 2, 64)), r"v_BSGH has shape \(1, 8, 2, 64\), expected \(1, 8, 2, 32\)"),
    (_attention(k_BSGH=torch.randn(1, 8, 3, 32), v_BSGH=torch.randn(1, 8, 3, 32)), "q_BTNH has 4 heads, expected a multiple of the 3"),
    (_attention(first_key_BT=torch.zeros(1, 7, dtype=torch.int64)), "first_key_BT has shape"),
    (_attention(offsets=(1,)), r"offsets is \(1,\)"),
    (_attention(offsets=(0.0,)), r"offsets is \(0.0,\)"),
    (_attention(q_BTNH=torch.randn(1, 8, 4, 48), k_BSGH=torch.randn(1, 8, 2, 48), v_BSGH=torch.randn(1, 8, 2, 48)), "head dim 48"),
    (lambda: cpu.residual_norm(torch.randn(3, 8), torch.randn(3, 9), (torch.ones(8),) * 4, torch.ones(8), 1e-5), "branch has shape"),
    (lambda: cpu.residual_norm(torch.randn(3, 8), torch.randn(3, 8), (torch.ones(8),) * 3 + (torch.ones(7),), torch.ones(8), 1e-5),
     r"scales\[3\]"),
    (lambda: cpu.residual_norm(torch.randn(3, 8), torch.randn(3, 8), (torch.ones(8),) * 4, torch.ones(9), 1), "norm_weight has shape"),
    (_cca(k_BTC=torch.randn(1, 3, 48), v_BTC=torch.randn(1, 3, 48)), "k_BTC has 48 channels"),
    (_cca(positions_BT=torch.zeros(1, 2, dtype=torch.int64)), "positions_BT has shape"),
    (_cca(halos=(torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 2, 32), torch.zeros(1, 2, 1, 16))), "halos are for"),
    (lambda: cpu.cross_entropy(torch.randn(3, 8), torch.randn(9, 8), torch.zeros(2, dtype=torch.int64)), "labels_T has shape"),
    (lambda: cpu.cross_entropy(torch.randn(3, 8), torch.randn(9, 7), torch.zeros(3, dtype=torch.int64)), "weight_VD has shape"),
    *(case for dtype in (torch.float32, torch.bfloat16) for case in (
        (_experts(dtype, order_R=torch.tensor([0, 1, 2, 9], dtype=torch.int32)), "order_R holds other numbers"),
        (_experts(dtype, order_R=torch.tensor([0, 0, 1, 2], dtype=torch.int32)), "order_R holds other numbers"),
        (_experts(dtype, order_R=torch.tensor([0, 1, 2, 3])), "order_R has dtype int64"),
        (_experts(dtype, gate_Tk=None), "gate_Tk is None"),
        (_experts(dtype, sizes_E=torch.tensor([-1, 2])), r"sizes_E is \[-1, 2\]"))),
    (_experts(sizes_E=torch.tensor([2**62, 2**62])), "sizes_E is"),
    (_attention(q_BTNH=torch._neg_view(torch.randn(1, 8, 4, 32))), "argument 0 of attention_forward"),
    (_experts(gradient_sums=ExpertSums(GradientSum(torch.zeros(1, 64, 32)), GradientSum(torch.zeros(2, 32, 32)))), "gradient_sums.gate_up"),
    (lambda: cpu.experts(torch.randn(4, 32), torch.tensor([5]), torch.randn(1, 64, 32), torch.randn(1, 32, 32)), r"sizes_E is \[5\]"),
    (lambda: cpu.experts(torch.randn(4, 32), torch.tensor([4]), torch.randn(1, 96, 32), torch.randn(1, 32, 32)), "gate_up_EFD has shape"),
])
def test_wrong_arguments_are_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------------------------------------------------------- the library


def test_the_library_is_built_once(fresh_library: Path) -> None:
    cpu.library()
    built = [(path, path.stat().st_mtime_ns) for path in fresh_library.iterdir()]
    cpu.library.cache_clear()
    cpu.library()
    assert built == [(path, path.stat().st_mtime_ns) for path in fresh_library.iterdir()] and len(built) == 1


def test_a_damaged_library_is_built_again(fresh_library: Path) -> None:
    path = cpu._build()
    path.write_bytes(path.read_bytes()[:100])
    cpu.library()
    assert path.stat().st_size > 10_000


def test_another_cpu_gets_another_library(fresh_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that share a home: the compiler's macros say what -march=native means here."""
    here, run_here = cpu._build(), cpu._run
    monkeypatch.setattr(cpu, "_run", lambda command: run_here(command) + ("#define __ANOTHER_CPU__ 1\n" if "-dM" in command else ""))
    assert cpu._build() != here


def test_refused_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *_: 1

    monkeypatch.setattr(cpu, "library", Refusing)
    with pytest.raises(MemoryError, match="attention_forward"):
        _attention()()


def test_ranks_that_build_at_once_do_not_harm_one_another(fresh_library: Path) -> None:
    code = "from zaya.kernels import cpu; cpu.library()"
    environment = os.environ | {"XDG_CACHE_HOME": str(fresh_library.parent)}
    ranks = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    assert [path.suffix for path in fresh_library.iterdir()] == [".so"]


def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return "needs a C compiler"


def _broken_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'cc1: error: no such CPU' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    return f"cannot compile zaya/kernels/c by {broken}: cc1: error: no such CPU"


def _missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("CC", "no-such-compiler")
    return "cannot build or load"


def _open_quote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("CC", "cc '")
    return "No closing quotation"


def _full_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "zaya").write_text("a file where the folder should be")
    return "cannot build or load"


@pytest.mark.parametrize("break_it", (_no_compiler, _broken_compiler, _missing_compiler, _open_quote, _full_cache))
def test_without_a_library_the_reference_computes_and_who_asks_is_told(
        monkeypatch: pytest.MonkeyPatch, fresh_library: Path, tmp_path: Path, break_it: Callable[[pytest.MonkeyPatch, Path], str]) -> None:
    says = break_it(monkeypatch, tmp_path)
    choice = backend.choose("auto", CPU, torch.float32, 32)
    assert choice.name == "reference" and says in choice.obstacle
    with pytest.raises(ValueError, match='train.kernels = "cpu"') as caught:
        backend.choose("cpu", CPU, torch.float32, 32)
    assert says in str(caught.value) and "\n" not in str(caught.value)
