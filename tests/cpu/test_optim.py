"""Optimizers against independent ones: AdamW against torch's, Muon against an fp64 loop and torch's, the gate, the router's balance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from zaya.config import OptimConfig
from zaya.optim import RouterBalance, muon_direction, muon_step, orthogonalise
from zaya.parallel.mesh import make_mesh
from zaya.parallel.zero1 import Zero1
from zaya.plan import AdamW, Fill, Muon, ParameterPlan
from zaya.schedule import learning_rate
from zaya.shard import Layout, Replicate

CONFIG = OptimConfig(name="muon", lr=3e-3, min_lr=3e-4, warmup_steps=2)
TRUE = torch.tensor(True)


def row(name: str, shape: tuple[int, ...], rule: Muon | AdamW, *, decay: bool) -> ParameterPlan:
    return ParameterPlan(name, shape, Replicate(), rule, decay, Fill(0.0))


def make(rows: list[ParameterPlan], dtype: torch.dtype, config: OptimConfig) -> tuple[dict[str, nn.Parameter], Zero1]:
    torch.manual_seed(0)
    parameters = {r.name: nn.Parameter(torch.randn(r.shape, dtype=torch.float64).to(dtype)) for r in rows}
    return parameters, Zero1(parameters, {r.name: r for r in rows}, config, make_mesh(Layout(1), torch.device("cpu")))


def backward(parameters: dict[str, nn.Parameter], optimizer: Zero1, seed: int) -> dict[str, Tensor]:
    """Give every parameter a random gradient through autograd."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in parameters.items()}
    optimizer.start_step()
    torch.stack([(p * gradients[n]).sum() for n, p in parameters.items()]).sum().backward()
    optimizer.finish_gradients()
    return gradients


def state_of(optimizer: Zero1) -> dict[str, Tensor]:
    """Every tensor of the state, flat."""
    return {f"{kind}.{name}": torch.cat([tensor.flatten() for _, tensor in optimizer.parts(name, kind)])
            for bucket in optimizer.buckets for name in bucket.plan.spans for kind in optimizer.kinds(name)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adamw_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    rows = [row("a", (300, 7), AdamW(), decay=True), row("b", (11,), AdamW(), decay=False)]
    parameters, optimizer = make(rows, dtype, CONFIG)
    theirs = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    groups = [{"params": [theirs["a"]], "weight_decay": CONFIG.weight_decay}, {"params": [theirs["b"]], "weight_decay": 0.0}]
    torch_adamw = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    for step in range(12):
        gradients, scale = backward(parameters, optimizer, step), 0.5 ** (step % 3)  # not constant: AdamW would not see it
        optimizer.update(lr=CONFIG.lr, grad_scale=torch.tensor(scale, dtype=dtype), commit=TRUE)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name] * scale
        torch_adamw.step()
    for name, parameter in theirs.items():
        assert (parameters[name] - parameter).abs().max() < tolerance


def muon_loop(matrix: Tensor, gradients: list[Tensor], *, lr: float, momentum: float, decay: float) -> Tensor:
    """Muon on one matrix, written from the papers: Nesterov momentum, five quintic steps, 0.2 sqrt(max) scale, decoupled decay."""
    buffer = torch.zeros_like(matrix)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        x = gradient + momentum * buffer
        transposed = x.shape[0] > x.shape[1]
        x = x.T if transposed else x
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ a @ x)
        x = x.T if transposed else x
        matrix = matrix - lr * decay * matrix - lr * 0.2 * math.sqrt(max(matrix.shape)) * x
    return matrix


@pytest.mark.parametrize(("shape", "blocks"), [((6, 10), 1), ((10, 6), 1), ((8, 12), 2), ((3, 8, 5), 2), ((4, 5, 7), 1)])
def test_muon_equals_an_fp64_loop_per_block(shape: tuple[int, ...], blocks: int) -> None:
    parameters, optimizer = make([row("w", shape, Muon(blocks), decay=True), row("b", (2,), AdamW(), decay=False)], torch.float64, CONFIG)
    cut = (-1, shape[-2] // blocks, shape[-1])
    start, history = parameters["w"].detach().clone().view(cut), []
    for step in range(6):
        scale = 1 / (step + 1)  # not constant: a constant one cancels in Newton-Schulz
        history.append(backward(parameters, optimizer, step)["w"].view(cut) * scale)
        optimizer.update(lr=0.02, grad_scale=torch.tensor(scale, dtype=torch.float64), commit=TRUE)
    for index, matrix in enumerate(start):
        expected = muon_loop(matrix, [g[index] for g in history], lr=0.02, momentum=CONFIG.momentum, decay=CONFIG.weight_decay)
        got = parameters["w"].detach().view(cut)[index]
        assert (got - expected).norm() / expected.norm() < 1e-10


def test_muon_equals_torch_muon_slice_by_slice() -> None:
    """torch.optim.Muon iterates in bf16, we in fp32 here: 2e-2 of the update is bf16's resolution after five steps."""
    torch.manual_seed(1)
    stack = torch.randn(3, 32, 48)
    slices = [nn.Parameter(matrix.clone()) for matrix in stack]
    torch_muon = torch.optim.Muon(slices, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    ours, buffer = stack.clone(), torch.zeros_like(stack)
    for _ in range(4):
        gradient = torch.randn_like(stack)
        direction = muon_direction(gradient, buffer, momentum=0.95, commit=TRUE)
        ours = ours * (1 - 0.02 * 0.1) + muon_step(0.02, (32, 48)) * torch.stack(orthogonalise(list(direction)))
        for parameter, g in zip(slices, gradient):
            parameter.grad = g.clone()
        torch_muon.step()
    for index, parameter in enumerate(slices):
        moved = ours[index] - stack[index]
        assert (moved - (parameter.detach() - stack[index])).norm() / moved.norm() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_not_committed_changes_nothing_even_on_nan(dtype: torch.dtype) -> None:
    rows = [row("w", (4, 6), Muon(1), decay=True), row("b", (5,), AdamW(), decay=False)]
    parameters, optimizer = make(rows, dtype, CONFIG)
    backward(parameters, optimizer, 0)
    optimizer.update(lr=0.1, grad_scale=torch.tensor(1.0), commit=TRUE)
    before = {n: t.clone() for n, t in {**parameters, **state_of(optimizer)}.items()}
    backward(parameters, optimizer, 1)
    optimizer.update(lr=0.1, grad_scale=torch.tensor(math.nan), commit=torch.tensor(False))
    for name, tensor in {**parameters, **state_of(optimizer)}.items():
        assert torch.equal(tensor, before[name]), name


def test_bf16_parameters_follow_fp32_masters() -> None:
    rows = [row("b", (1000,), AdamW(), decay=False)]
    parameters, optimizer = make(rows, torch.bfloat16, CONFIG)
    start = parameters["b"].detach().float().clone()
    for step in range(20):
        backward(parameters, optimizer, step)
        optimizer.update(lr=1e-4, grad_scale=torch.tensor(1.0), commit=TRUE)
    master = state_of(optimizer)["master.b"]
    assert master.dtype == torch.float32 and torch.equal(parameters["b"], master.bfloat16())
    assert (master != start).all(), "steps far below bf16's resolution must add up in the master"
    assert (parameters["b"].float() == start).any(), "this test needs steps below bf16's resolution"


def test_micro_batches_add_up_and_the_next_step_starts_anew() -> None:
    parameters, optimizer = make([row("b", (3,), AdamW(), decay=False)], torch.float32, CONFIG)
    for _ in range(2):
        optimizer.start_step(micro_batches=2)
        for factor in (1.0, 10.0):
            (parameters["b"] * factor).sum().backward()
        optimizer.finish_gradients()
        assert optimizer.gradient_sum("b").total.tolist() == [11.0, 11.0, 11.0] and parameters["b"].grad is None


class AddsItself(torch.autograd.Function):
    """(weight * factor).sum() of an op that adds weight's gradient to a sum in so many chunks; in none: it forgets to."""

    @staticmethod
    def forward(ctx, weight, factor, gradient_sum, chunks):
        ctx.save_for_backward(weight)
        ctx.factor, ctx.gradient_sum, ctx.chunks = factor, gradient_sum, chunks
        return weight.detach().float().sum() * factor

    @staticmethod
    def backward(ctx, dout):
        weight, = ctx.saved_tensors
        for _ in range(ctx.chunks):
            ctx.gradient_sum.add(torch.full(weight.shape, ctx.factor / ctx.chunks))
        return ctx.gradient_sum.for_autograd(weight.dtype), None, None, None


def test_an_op_adds_a_gradient_unrounded_by_itself() -> None:
    parameters, optimizer = make([row("w", (4, 6), Muon(1), decay=True), row("b", (3,), AdamW(), decay=False)], torch.bfloat16, CONFIG)

    def step(*chunks: int) -> None:
        optimizer.start_step(micro_batches=2)
        for factor, number in zip((1 + 2**-12, 2.0), chunks):
            (AddsItself.apply(parameters["w"], factor, optimizer.gradient_sum("w"), number) + parameters["b"].sum()).backward()
        optimizer.finish_gradients()

    for _ in range(2):
        step(2, 1)
        assert (optimizer.gradient_sum("w").total == 3 + 2**-12).all(), "bf16 would have rounded the first to 1"
        assert (optimizer.gradient_sum("b").total == 2).all() and parameters["w"].grad is None
    for chunks in ((0, 1), (1, 0)):
        with pytest.raises(AssertionError, match="no gradient: .'w'"):
            step(*chunks)


def test_norm_counts_every_gradient_once() -> None:
    rows = [row("w", (4, 6), Muon(1), decay=True), row("b", (5,), AdamW(), decay=False), row("e", (7,), AdamW(), decay=True)]
    parameters, optimizer = make(rows, torch.float64, CONFIG)
    gradients = backward(parameters, optimizer, 0)
    expected = sum(g.pow(2).sum().item() for g in gradients.values())
    assert optimizer.squared_norm().item() == pytest.approx(expected, rel=1e-12)


def test_a_parameter_without_gradient_is_noticed() -> None:
    parameters, optimizer = make([row("b", (5,), AdamW(), decay=False), row("e", (7,), AdamW(), decay=True)], torch.float32, CONFIG)
    optimizer.start_step()
    parameters["b"].sum().backward()
    with pytest.raises(AssertionError, match="no gradient: .'e'"):
        optimizer.finish_gradients()


def test_balance_lowers_the_busy_expert_and_leaves_skip_alone() -> None:
    biases = [torch.tensor([0.0, 0.0, 0.0, -1.0]), torch.tensor([0.1, -0.1, 0.0, -1.0])]
    balance = RouterBalance(biases, num_experts=3, lr=1e-2)
    counts = torch.tensor([[90, 10, 0, 500], [0, 0, 0, 600]])
    balance.update(counts, commit=torch.tensor(False))
    assert biases[0].tolist() == [0.0, 0.0, 0.0, -1.0]
    balance.update(counts, commit=TRUE)
    # AdamW's first step is lr each way, (-1, 1, 1) * 1e-2; then the mean goes.
    assert biases[0].tolist() == pytest.approx([-4e-2 / 3, 2e-2 / 3, 2e-2 / 3, -1.0], rel=1e-4)
    assert all(abs(bias[:3].sum()) < 1e-7 for bias in biases)
    assert balance.shares(counts).tolist() == [[pytest.approx(0.9), pytest.approx(0.1), 0.0], [0.0, 0.0, 0.0]]


def test_balance_is_adamw_on_share_minus_one_over_e() -> None:
    bias = torch.zeros(4, dtype=torch.float64)
    balance = RouterBalance([bias], num_experts=4, lr=1e-2)
    theirs = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    torch_adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        counts = torch.randint(0, 100, (1, 4), generator=generator)
        balance.update(counts, commit=TRUE)
        theirs.grad = counts[0].double() / counts.sum() - 0.25
        torch_adamw.step()
        theirs.data -= theirs.data.mean()
    assert (bias - theirs.detach()).abs().max() < 1e-12


def test_learning_rate_schedules() -> None:
    cosine = OptimConfig(name="muon", lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, cosine) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[-1] == pytest.approx(0.1) and rates[11] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))
    wsd = OptimConfig(name="muon", lr=1.0, min_lr=0.0, warmup_steps=0, schedule="wsd", decay_steps=5)
    assert [learning_rate(step, 20, wsd) for step in (1, 15, 16, 20)] == [1.0, 1.0, pytest.approx(0.8), 0.0]
