"""The reference ops against independent, literal compositions in fp64: values and every gradient, ragged shapes, document borders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zaya.kernels import reference
from zaya.kernels.gradient_sum import GradientSum

TIGHT = 1e-10  # RMS(difference) / RMS(expected) in fp64


def relative(got: Tensor, expected: Tensor) -> float:
    """RMS(got - expected) / RMS(expected); absolute below 1e-5, where a gradient is zero but for rounding."""
    return ((got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp_min(1e-5)).item()


def compare(op: Callable[..., Tensor], literal: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Same output and same gradient of every floating input, for a random output gradient."""
    results = []
    for function in (op, literal):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        output = function(*leaves)
        torch.manual_seed(0)
        output.backward(torch.randn(output.shape, dtype=output.dtype))  # not randn_like: it follows strides
        results.append([output.detach(), *(x.grad for x in leaves if x.requires_grad)])
    for got, expected in zip(*results):
        assert relative(got, expected) < TIGHT


def documents(*lengths: int) -> Tensor:
    """Positions of a row packed from documents of these lengths."""
    return torch.cat([torch.arange(n) for n in lengths])


PACKINGS = [documents(17), documents(1, 1, 2, 3, 10), documents(16, 1), documents(1, 16)]


def literal_convolutions(x_TC: Tensor, positions: Tensor, w: Tensor, b: Tensor, W: Tensor, c: Tensor, head_dim: int) -> Tensor:
    """The two convolutions as the paper draws them, token by token, restarting where positions are 0."""
    y, z = [], []
    for t, position in enumerate(positions.tolist()):
        previous = x_TC[t - 1] if position >= 1 else torch.zeros_like(x_TC[t])
        y.append(w[:, 1] * x_TC[t] + w[:, 0] * previous + b)
        y_previous = y[t - 1] if position >= 1 else b  # y of a token whose inputs are all zero padding
        heads = [W[h : h + head_dim, :, 1] @ y[t][h : h + head_dim] + W[h : h + head_dim, :, 0] @ y_previous[h : h + head_dim]
                 for h in range(0, len(c), head_dim)]
        z.append(torch.cat(heads) + c)
    return torch.stack(z).unflatten(-1, (-1, head_dim))


@pytest.mark.parametrize("positions", PACKINGS)
def test_one_convolution_of_width_three_equals_the_two(positions: Tensor) -> None:
    torch.manual_seed(1)
    T, H, heads = len(positions), 8, 3
    C = H * heads
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((T, C), (C, 2), (C,), (C, H, 2), (C,))]

    def op(x: Tensor, w: Tensor, b: Tensor, W: Tensor, c: Tensor) -> Tensor:
        kernel, constant = reference.fold_convolutions((w, b), (W, c), H)
        taps = []
        for by in range(3):
            tap = x.roll(by, 0) * (positions >= by)[:, None]
            taps.append(tap.unflatten(-1, (heads, H)))
        return torch.einsum("tnk,nkh->tnh", torch.cat(taps, -1), kernel) + constant

    compare(op, lambda x, w, b, W, c: literal_convolutions(x, positions, w, b, W, c, H), inputs)


def literal_cca(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, w_q: list[Tensor], w_k: list[Tensor], temperature: Tensor, positions: Tensor,
                base: float, delayed: tuple[int, int]) -> Tensor:
    """One row, from the formulas of the paper and the released code; q, k and v of the heads side by side."""
    G, H = mean.shape[1:]
    groups = q.shape[-1] // H // G
    q_heads, k_heads = q.unflatten(-1, (-1, H)), k.unflatten(-1, (-1, H))
    q_new = literal_convolutions(q, positions, w_q[0], w_q[1], w_q[2], w_q[3], H) + (q_heads + k_heads.repeat_interleave(groups, 1)) / 2
    k_new = literal_convolutions(k, positions, w_k[0], w_k[1], w_k[2], w_k[3], H) + (mean + k_heads) / 2
    q_new, k_new = (x / x.norm(dim=-1, keepdim=True) * math.sqrt(H) for x in (q_new, k_new))
    k_new = k_new * temperature[:, None]
    frequencies = base ** (-torch.arange(0, H // 2, 2, dtype=torch.float64) / (H // 2))
    turn = torch.polar(torch.ones(len(positions), H // 4, dtype=torch.float64), positions[:, None] * frequencies)
    rotated = []
    for x in (q_new, k_new):
        pair = torch.complex(x[..., : H // 4], x[..., H // 4 : H // 2]) * turn[:, None]
        rotated.append(torch.cat([pair.real, pair.imag, x[..., H // 2 :]], -1).flatten(1))
    start, end = delayed
    before = torch.stack([v[t - 1, start:end] if p else torch.zeros_like(v[t, start:end]) for t, p in enumerate(positions.tolist())])
    return torch.cat([*rotated, v[:, :start], before, v[:, end:]], -1)


@pytest.mark.parametrize("positions", PACKINGS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_cca_equals_the_paper(positions: Tensor, chunks: int) -> None:
    """Two rows, the second with other documents; cut in chunks, each gets its halo from the row itself, and gradients flow through it."""
    torch.manual_seed(11)
    H, G, N, base, delayed = 8, 2, 6, 100.0, (8, 16)
    positions = torch.stack([positions, documents(3, 14)])[:, :16]
    T = positions.shape[1]
    shapes = [(2, T, N * H), (2, T, G * H), (2, T, G * H), (2, T, G, H)]
    for heads in (N, G):
        shapes += [(heads * H, 2), (heads * H,), (heads * H, H, 2), (heads * H,)]
    inputs = [torch.randn(s, dtype=torch.float64) for s in (*shapes, (G,))]
    rope = reference.rope_table(positions, H, base, torch.float64)

    def halo(x: Tensor, n: int) -> Tensor:
        padded = torch.cat([x.new_zeros(2, n, x.shape[-1]), x], 1)
        return torch.stack([padded[:, start : start + n] for start in range(0, T, T // chunks)], 1)

    def op(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, *weights: Tensor) -> Tensor:
        halos = (halo(q, 2), halo(k, 2), halo(v[..., slice(*delayed)], 1))
        w, b, W, c, w_k, b_k, W_k, c_k, temperature = weights
        parts = reference.cca(q, k, v, mean, (w, b, W, c), (w_k, b_k, W_k, c_k), temperature, positions, rope, halos, delayed)
        return torch.cat([part.flatten(2) for part in parts], -1)

    def literal(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, *weights: Tensor) -> Tensor:
        rows = [literal_cca(q[r], k[r], v[r], mean[r], list(weights[0:4]), list(weights[4:8]), weights[8], positions[r], base, delayed)
                for r in range(2)]
        return torch.stack(rows)

    compare(op, literal, inputs)
    strided = [x.mT.contiguous().mT if x.dim() > 2 else x for x in inputs]  # whatever the strides
    assert torch.equal(op(*strided), op(*inputs))


def test_a_vanishing_head_is_divided_by_eps_and_not_by_zero() -> None:
    """u = 0 but for one tiny token: 1 / |u| is clamped, and so is its gradient."""
    zeros = torch.zeros(1, 3, 8, dtype=torch.float64)
    mean = torch.zeros(1, 3, 1, 8, dtype=torch.float64)
    mean[0, 1] = 1e-20
    mean.requires_grad_()
    w, b, W, c = (torch.zeros(s, dtype=torch.float64) for s in ((8, 2), (8,), (8, 8, 2), (8,)))
    positions = torch.arange(3)[None]
    rope = reference.rope_table(positions, 8, 10.0, torch.float64)
    halos = (zeros[:, None, :2], zeros[:, None, :2], zeros[:, None, :1, 4:])
    temperature = torch.ones(1, dtype=torch.float64)
    _, k, _ = reference.cca(zeros, zeros, zeros, mean, (w, b, W, c), (w, b, W, c), temperature, positions, rope, halos, (4, 8))
    k[..., 4:].sum().backward()
    eps = torch.finfo(torch.float64).eps
    assert mean.grad is not None and torch.allclose(mean.grad[..., 4:], torch.full((4,), 0.5 * math.sqrt(8) / eps, dtype=torch.float64))


@pytest.mark.parametrize("positions", PACKINGS)
@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("alike", [True, False])  # rows packed alike: their queries may all begin at one key
def test_attention_equals_a_masked_softmax(positions: Tensor, window: int, heads: int, groups: int, alike: bool,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "QUERY_BLOCK", 5)  # several ragged blocks in 17 tokens
    torch.manual_seed(3)
    T, H = len(positions), 4
    index = torch.arange(T)
    rows = torch.stack([positions, positions if alike else documents(3, 14)])
    first_BT = torch.maximum(index - rows, index - window + 1)
    visible = ((index >= first_BT[..., None]) & (index <= index[:, None]))[:, None]

    def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(H)
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)

    shapes = [(2, T, heads, H), (2, T, groups, H), (2, T, groups, H)]
    compare(lambda q, k, v: reference.attention(q, k, v, first_BT, (0,)), literal, [torch.randn(s, dtype=torch.float64) for s in shapes])


def test_attention_of_zigzag_chunks_equals_their_part_of_the_whole() -> None:
    torch.manual_seed(4)
    T, positions = 16, documents(6, 10)
    q, k, v = (torch.randn(1, T, 2, 4, dtype=torch.float64) for _ in range(3))
    first = (torch.arange(T) - positions)[None]
    mine = torch.cat([torch.arange(0, 4), torch.arange(12, 16)])  # rank 0 of 2 holds chunks 0 and 3 of 4
    compare(lambda q, k, v: reference.attention(q[:, mine], k, v, first[:, mine], (0, 12)),
            lambda q, k, v: reference.attention(q, k, v, first, (0,))[:, mine], [q, k, v])


@pytest.mark.parametrize("sizes", [[5, 0, 7, 1], [13, 0, 0, 0], [0, 0, 0, 0], [3, 3, 3, 2]])
def test_experts_equal_a_loop_over_tokens(sizes: list[int]) -> None:
    torch.manual_seed(5)
    R, D, width = 13, 6, 5
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]

    def literal(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = []
        for r in range(R):
            if r >= len(owners):
                rows.append(0.0 * (x[r] + gate_up.sum() + down.sum()))
                continue
            gate, up = (gate_up[owners[r]] @ x[r]).split(width)
            rows.append(down[owners[r]] @ (gate * torch.sigmoid(gate) * up))
        return torch.stack(rows)

    inputs = [torch.randn(s, dtype=torch.float64) for s in ((R, D), (4, 2 * width, D), (4, D, width))]
    compare(lambda x, g, d: reference.experts(x, torch.tensor(sizes), g, d), literal, inputs)


def test_sort_brings_classes_together_in_their_old_order() -> None:
    order, sizes = reference.sort_by_expert(torch.tensor([[2], [0], [3], [0], [2], [1]]), 5)
    assert order.tolist() == [1, 3, 5, 0, 4, 2] and sizes.tolist() == [2, 1, 2, 1, 0]
    order, sizes = reference.sort_by_expert(torch.tensor([[1, 0], [0, 2]]), 3)  # assignment = token * 2 + slot
    assert order.tolist() == [1, 2, 0, 3] and sizes.tolist() == [2, 1, 1]


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_experts_equal_a_loop_over_tokens(top_k: int) -> None:
    torch.manual_seed(5)
    T, E, D, width = 9, 3, 6, 5
    choice = torch.stack([torch.randperm(E + 1)[:top_k] for _ in range(T)])  # class E is no expert
    order, sizes = reference.sort_by_expert(choice, E + 1)

    def literal(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens = []
        for t in range(T):
            total = 0.0 * (x[t] + gate.sum() + gate_up.sum() + down.sum())
            for slot, expert in enumerate(choice[t].tolist()):
                if expert < E:
                    first, second = (gate_up[expert] @ x[t]).split(width)
                    total = total + gate[t, slot] * (down[expert] @ (first * torch.sigmoid(first) * second))
            tokens.append(total)
        return torch.stack(tokens)

    inputs = [torch.randn(s, dtype=torch.float64) for s in ((T, D), (T, top_k), (E, 2 * width, D), (E, D, width))]
    compare(lambda x, gate, gate_up, down: reference.experts(x, sizes[:E], gate_up, down, order, gate), literal, inputs)


def test_route_takes_the_biased_choice_and_the_raw_gate() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([0.0, 0.9, -1.0])
    choice, gate, counts = reference.route(logits, bias)
    assert choice.tolist() == [[1], [1]] and counts.tolist() == [0, 2, 0]
    assert torch.equal(gate, logits.softmax(-1)[:, 1:2])
    choice, gate, counts = reference.route(logits, bias, top_k=2)
    assert choice.tolist() == [[1, 0], [1, 0]] and counts.tolist() == [2, 2, 0]  # of equal classes the first
    assert torch.equal(gate, logits.softmax(-1)[:, [1, 0]])


def test_lookup_equals_torch() -> None:
    torch.manual_seed(8)
    tokens, weight = torch.randint(0, 5, (3, 40)), torch.randn(7, 4, dtype=torch.float64)
    compare(lambda w: reference.lookup(tokens, w), lambda w: F.embedding(tokens, w), [weight])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """One alone keeps any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_lookups_gradient_adds_up_in_a_sum_in_a_fixed_order() -> None:
    """As the first to write in a step it replaces all rows, also those that no token names; many tokens share a row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(9)
    tokens, dy = torch.randint(0, 3, (4, 5000)), torch.randn(4, 5000, 8)
    weight = torch.nn.Parameter(torch.zeros(7, 8, device=device))
    want = torch.zeros(7, 8, dtype=torch.float64).index_add_(0, tokens.flatten(), dy.flatten(0, 1).double())
    found = []
    for _ in range(5):
        gradient_sum = GradientSum(torch.full((7, 8), math.nan, device=device))
        for times in (1, 2):
            reference.lookup(tokens.to(device), weight, gradient_sum).backward(dy.to(device))
            total = gradient_sum.total.cpu().double()
            assert relative(total / times, want) < 1e-5, "13,000 numbers one after the other in fp32"
        found.append(total)
    assert weight.grad is not None and weight.grad.is_sparse and not weight.grad._nnz()
    assert all(torch.equal(total, found[0]) for total in found)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_cross_entropy_equals_torch(tokens: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOSS_BLOCK", 11 * 3)  # blocks of 3 tokens
    torch.manual_seed(6)
    labels = torch.randint(0, 11, (tokens,))
    labels[::3] = reference.IGNORE
    inputs = [5 * torch.randn(tokens, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)]

    def literal(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        squares = logits.logsumexp(-1).square()[labels != reference.IGNORE].sum()
        return F.cross_entropy(logits, labels, ignore_index=reference.IGNORE, reduction="sum") + z_loss * squares

    compare(lambda h, w: reference.cross_entropy(h, w, labels, z_loss), literal, inputs)


def test_cross_entropy_partials_of_two_shards_combine_to_the_whole() -> None:
    torch.manual_seed(7)
    logits, labels = 5 * torch.randn(9, 10, dtype=torch.float64), torch.randint(0, 10, (9,))
    parts = [reference.cross_entropy_partials(logits[:, s : s + 5], labels, s) for s in (0, 5)]
    largest = torch.maximum(parts[0][0], parts[1][0])
    total = torch.stack([part[1] * (part[0] - largest).exp() for part in parts]).sum(0)
    losses = total.log() + largest - parts[0][2] - parts[1][2]
    assert relative(losses, F.cross_entropy(logits, labels, reduction="none")) < TIGHT


def test_residual_norm_equals_its_definition() -> None:
    torch.manual_seed(8)
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, 6), (2, 3, 6), (6,), (6,), (6,), (6,), (6,))]

    def both(outputs: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(outputs)

    def literal(x: Tensor, h: Tensor, a_h: Tensor, b_h: Tensor, a_x: Tensor, b_x: Tensor, w: Tensor) -> Tensor:
        new = (h + b_h) * a_h + (x + b_x) * a_x
        return both((new, new / (new.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w))

    compare(lambda x, h, a_h, b_h, a_x, b_x, w: both(reference.residual_norm(x, h, (a_h, b_h, a_x, b_x), w, 1e-5)), literal, inputs)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5, 16), (2, 16, 5)])
def test_newton_schulz_flattens_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(9)
    singular = torch.linalg.svdvals(reference.newton_schulz(torch.randn(shape, dtype=torch.float64)))
    assert singular.min() > 0.6 and singular.max() < 1.25


def test_rope_turns_the_first_half_by_the_angle() -> None:
    cos, sin = reference.rope_table(torch.tensor([[0, 3]]), 8, 100.0, torch.float64)
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    x[..., 1] = x[..., 7] = 1.0
    got = reference.rotate(x, cos, sin)
    angle = 3 * 100.0 ** (-2 / 4)  # pair 1 of 2: base^(-2 i / (H / 2))
    expected = torch.tensor([0, math.cos(angle), 0, math.sin(angle), 0, 0, 0, 1.0], dtype=torch.float64)
    assert torch.equal(got[0, 0], x[0, 0]) and relative(got[0, 1, 0], expected) < TIGHT
