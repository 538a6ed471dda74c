"""The choice between Triton kernels, C and the reference: what each setting means on each device, and that all train the same."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.needs import needs_compiler
from tests.tiny import recipe
from zaya import trainer as trainer_module
from zaya.kernels import backend
from zaya.kernels.cpu import compiler
from zaya.kernels.launch import TABLE, Config, launching_through
from zaya.parallel.mesh import open_mesh
from zaya.shard import Layout
from zaya.trainer import Trainer, open_data

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("kernels", "device", "dtype", "head_dim", "chosen"), [
    ("auto", CPU, torch.float64, 32, "reference"), ("auto", CPU, torch.float32, 16, "reference"),
    ("auto", GPU, torch.bfloat16, 128, "triton"),
    *(pytest.param(*row, marks=needs_compiler) for row in (
        ("auto", CPU, torch.float32, 128, "cpu"), ("auto", CPU, torch.bfloat16, 32, "cpu"), ("cpu", CPU, torch.float32, 64, "cpu"))),
    ("auto", GPU, torch.float64, 128, "reference"),
    ("auto", GPU, torch.bfloat16, 48, "reference"), ("reference", GPU, torch.bfloat16, 128, "reference"),
    ("triton", CPU, torch.float32, 32, "triton"),  # by the interpreter
])
def test_the_choice(monkeypatch: pytest.MonkeyPatch, kernels: str, device: torch.device, dtype: torch.dtype, head_dim: int,
                    chosen: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    choice = backend.choose(kernels, device, dtype, head_dim)
    assert choice.name == chosen and bool(choice.obstacle) == (kernels == "auto" and chosen == "reference")
    assert (backend.ops() is backend.REFERENCE) == (chosen == "reference")


def test_a_gpu_without_triton_trains_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.choose("auto", GPU, torch.bfloat16, 128) == ("reference", "Triton is not installed")
    with pytest.raises(ValueError, match='train.kernels = "triton" is not installed; use "reference"'):
        backend.choose("triton", GPU, torch.bfloat16, 128)


@pytest.mark.parametrize(("device", "dtype", "head_dim", "says"), [
    (GPU, torch.float64, 128, "has no fp64"), (GPU, torch.bfloat16, 48, "not 48"), (CPU, torch.float32, 128, "cannot run on cpu")])
def test_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, head_dim: int,
                                                says: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=says):
        backend.choose("triton", device, dtype, head_dim)


@pytest.mark.parametrize(("device", "dtype", "head_dim", "says"), [
    (CPU, torch.float64, 128, "has no fp64"), (CPU, torch.bfloat16, 48, "not 48"), (GPU, torch.float32, 128, "cannot run on cuda")])
def test_c_where_it_cannot_run_is_an_error(device: torch.device, dtype: torch.dtype, head_dim: int, says: str) -> None:
    with pytest.raises(ValueError, match=f'train.kernels = "cpu" .*{says}'):
        backend.choose("cpu", device, dtype, head_dim)


def test_the_environment_decides_before_auto_and_not_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert backend.choose("auto", GPU, torch.bfloat16, 128).name == "reference"
    assert backend.choose("triton", GPU, torch.bfloat16, 128).name == "triton"
    monkeypatch.setenv(backend.ENVIRONMENT, "cpu")
    with pytest.raises(ValueError, match='ZAYA_KERNELS = "cpu" cannot run on cuda'):
        backend.choose("auto", GPU, torch.bfloat16, 128)
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match="ZAYA_KERNELS = 'cuda'"):
        backend.choose("auto", GPU, torch.bfloat16, 128)


@pytest.mark.parametrize(("kernels", "device"), [("triton", GPU), pytest.param("cpu", CPU, marks=needs_compiler)])
def test_all_implementations_of_an_op_are_called_alike(kernels: str, device: torch.device) -> None:
    backend.choose(kernels, device, torch.bfloat16, 128)
    for name, op, reference in zip(backend.Ops._fields, backend.ops(), backend.REFERENCE):
        mine, theirs = inspect.signature(op).parameters, inspect.signature(reference).parameters
        assert list(mine)[: len(theirs)] == list(theirs), name
        assert all(mine[p].default == theirs[p].default and mine[p].kind == theirs[p].kind for p in theirs), name


@pytest.mark.parametrize(("optimizer", "steps"), [("muon", 2), pytest.param("adamw", 4, marks=pytest.mark.slow)])
def test_all_implementations_train_alike(tmp_path: Path, optimizer: str, steps: int) -> None:
    """A handful of steps in fp32, Triton by the interpreter (on a GPU natively): the same losses, gradient norms and routing."""
    curves: dict[str, torch.Tensor] = {}
    shares: dict[str, torch.Tensor] = {}
    for kernels in ("reference", "triton", *(["cpu"] if compiler() and not torch.cuda.is_available() else [])):
        parts = recipe(tmp_path, model__head_dim=32, model__moe_intermediate_size=32, train__steps=9, train__global_batch_size=2,
                       train__device="auto", train__kernels=kernels, optim__name=optimizer)
        mesh = open_mesh("auto", Layout(1))
        trainer = Trainer(parts, mesh, open_data(parts, mesh))
        assert trainer.kernels.name == kernels
        results = [trainer.train_step() for _ in range(steps)]
        curves[kernels] = torch.stack([torch.stack([r.loss.double(), r.grad_norm.double()]) for r in results])
        shares[kernels] = torch.stack([r.shares_LE for r in results])
    for kernels, curve in curves.items():
        torch.testing.assert_close(curve, curves["reference"], rtol=2e-5, atol=0)  # fp32 sums in another order
        assert torch.equal(shares[kernels], shares["reference"])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_kernels_get_in_training_is_aligned(tmp_path: Path, optimizer: str) -> None:
    """Loads of 16 bytes, and the machine code that the report proves, are for tensors that start at a multiple of 16."""
    parts = recipe(tmp_path, model__head_dim=32, train__steps=9, train__global_batch_size=4, train__micro_batch_size=2, train__dtype="bf16",
                   train__kernels="triton", optim__name=optimizer)
    mesh = open_mesh("auto", Layout(1))
    trainer = Trainer(parts, mesh, open_data(parts, mesh))
    kernels, crooked = set[str](), set[tuple[str, str]]()

    def note(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
        kernels.add(kernel.__name__)
        crooked.update((kernel.__name__, name) for name, value in arguments.items()
                       if isinstance(value, torch.Tensor) and value.data_ptr() % 16)

    with launching_through(note):
        trainer.train_step()
    assert not crooked
    shipped = {kernel for kernel in json.loads(TABLE.read_text()) if optimizer == "muon" or "newton_schulz" not in kernel}
    assert kernels == shipped, "training launches every kernel that has a configuration"


class Calls(TorchDispatchMode):
    """Counts what torch computes: not views, nor memory that nobody has written to, nor what only asks."""

    FREE = ("view", "expand", "slice", "select", "split", "unbind", "transpose", "permute", "t", "unsqueeze", "squeeze", "detach", "alias",
            "as_strided", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
            "_indices", "_values", "_sparse_coo_tensor_with_dims", "unfold")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name.removeprefix("aten::").partition(".")[0] not in self.FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "kernels", "calls"), [("none", 30, 79), ("selective", 36, 79), ("full", 43, 91)])
def test_a_block_costs_the_host_no_more_launches_than_it_did(tmp_path: Path, recompute: str, kernels: int, calls: int) -> None:
    """Of a later micro-batch, forward and backward with the hooks that collect gradients. Small kernels take a GPU about 4 us each, and the
    host as long or longer: what needs more of them must be worth it."""
    def costs(layers: int) -> tuple[int, int]:
        parts = recipe(tmp_path, model__head_dim=32, model__num_layers=layers, model__attention_pattern=["full"], train__dtype="bf16",
                       train__global_batch_size=4, train__micro_batch_size=2, train__kernels="triton", train__recompute=recompute)
        mesh = open_mesh("cpu", Layout(1))
        trainer = Trainer(parts, mesh, open_data(parts, mesh))
        launched: list[str] = []
        with launching_through(lambda kernel, *_: launched.append(kernel.__name__)):
            trainer.optimizer.start_step(2)
            for first in (0, 2):
                batch = trainer.loader.batch(first, 2)
                launched.clear()
                with Calls() as torchs:
                    hidden_BTD = trainer.model(batch.tokens_BT, batch.positions_BT).hidden_BTD
                    trainer.optimizer.backward(trainer.model.loss(hidden_BTD, batch.labels_BT))
        return len(launched), torchs.count

    (two_kernels, two_calls), (three_kernels, three_calls) = costs(2), costs(3)
    assert three_kernels - two_kernels == kernels and three_calls - two_calls <= calls


class NoReading(TorchDispatchMode):
    """On a GPU the host would wait for what it reads."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_reads_nothing_and_has_its_result_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    parts = recipe(tmp_path, model__head_dim=32, train__dtype="bf16", train__kernels="triton", optim__name=optimizer, train__steps=9)
    mesh = open_mesh("cpu", Layout(1))
    trainer = Trainer(parts, mesh, open_data(parts, mesh))
    order: list[str] = []

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **named: Any) -> Any:
            order.append(name)
            return call(*arguments, **named)

        return noting

    monkeypatch.setattr(trainer.optimizer, "update", noted("update", trainer.optimizer.update))
    monkeypatch.setattr(trainer_module, "StepResult", noted("result", trainer_module.StepResult))
    with launching_through(lambda *_: None), NoReading():
        step = trainer.train_step((1.0, 0.0))
    assert order == ["result", "update"] and step.votes.tolist() == [1, 0]


@pytest.mark.parametrize(("width", "classes", "says"), [
    (9000, 17, "hidden size up to 8192, not 9000"), (64, 257, "256 router classes, not 257")])
def test_sizes_that_no_kernel_takes_are_the_references(width: int, classes: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        backend.choose("triton", GPU, torch.bfloat16, 128, width, classes)
    assert backend.choose("auto", GPU, torch.bfloat16, 128, width, classes).name == "reference"
