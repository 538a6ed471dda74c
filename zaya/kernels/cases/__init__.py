"""The inputs on which kernels are proven, compiled and timed: one list for tests, report, emulator, benchmark and tuner.

A case names an op, makes its arguments on any device (also "meta", where nothing is computed), and says which get gradients. Cases of an
op stand in the file of its name; `cases()` gathers them.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHIP, SMALL = "chip", "small"
MOST_FROM_CPU = 1 << 24  # numbers of one tensor, more than any small case has


@dataclass(frozen=True)
class Case:
    """One op on one set of arguments.

    size: "chip" for shapes of the 8B and 74B models, and one beside, as a GPU sees them (report, benchmark, tuner, tests/gpu), "small" for
    shapes that the interpreter and the emulator run in seconds.
    """

    name: str
    """Unique: "attention 8b full", "attention small documents of one token"."""
    size: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    """Called with the same keyword arguments; returns the same tensors."""
    make: Callable[[torch.device, torch.dtype], dict[str, Any]]
    """Keyword arguments, seeded, as leaves: their own randomness, no global seed; dtype is the compute dtype (bf16, fp16, fp32)."""
    gradients: tuple[str, ...] = ()
    """Arguments, by path, that get gradients: "q_BTC", "q_convs.0" for an item of a tuple. Empty: the op has no backward."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    """Compute dtypes that the op takes."""
    flops: int = 0
    """Of matrix products, forward; backward takes twice that unless `backward_flops` says otherwise."""
    backward_flops: int = 0
    limit: float = 1e-2
    """Of a tensor's error in bf16 against fp32 arithmetic on the same numbers: one rounding is 1.7e-3, six are allowed, unless the op
    itself is a chain of roundings."""
    num_bytes: int = 0
    """That must be read and written in bf16, forward; 0: bound by arithmetic."""
    backward_bytes: int = 0
    """The same of the backward pass; 0: not counted."""
    timed: Callable[..., Any] | None = None
    """What benchmark and tuner call instead of `op`, where that works on copies: it updates its arguments, and returns the same as `op`."""


def cases(size: str | None = None) -> list[Case]:
    """All cases (of one size), in the order of their ops' names."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [case for module in modules for case in module.CASES]
    assert len({case.name for case in found}) == len(found), "two cases have one name"
    return [case for case in found if size in (None, case.size)]


def at(arguments: Mapping[str, Any], path: str) -> Tensor:
    """The tensor at a path of `Case.gradients`."""
    first, *rest = path.split(".")
    value = arguments[first]
    for index in rest:
        value = value[int(index)]
    assert isinstance(value, Tensor)
    return value


def run(function: Callable[..., Any], arguments: Mapping[str, Any], gradients: tuple[str, ...],
        like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs ("out.0", ...) and gradients ("d q_BTC", ...) of one call; cotangents are seeded, the same for every caller.

    like: the result of a run in a narrower dtype; cotangents are then rounded as that run had them.
    """
    leaves = [at(arguments, path).detach().requires_grad_() for path in gradients]
    outputs = function(**with_leaves(arguments, dict(zip(gradients, leaves))))
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    result = {f"out.{index}": output.detach() for index, output in enumerate(outputs)}
    if gradients:
        sources = {name: output for name, output in zip(result, outputs) if output.requires_grad}
        cotangents = [cotangent(output, index).to((like or result)[name].dtype).to(output.dtype)
                      for index, (name, output) in enumerate(sources.items())]
        grads = torch.autograd.grad(list(sources.values()), leaves, cotangents)
        result |= {f"d {path}": grad for path, grad in zip(gradients, grads)}
    return result


def cotangent(output: Tensor, index: int) -> Tensor:
    return normal(torch.Generator().manual_seed(7919 + index), output.device, *output.shape).to(output.dtype)


def normal(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """fp32 normal numbers: up to MOST_FROM_CPU the same on every device; more, for which the CPU would take seconds, a GPU draws by itself,
    and they are its own. On meta none are drawn."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if device.type == "cpu" or math.prod(shape) <= MOST_FROM_CPU:
        return torch.randn(shape, generator=generator).to(device)
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def with_leaves(arguments: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments, with the tensors at the given paths replaced."""
    replaced = dict(arguments)
    for path, leaf in leaves.items():
        first, *rest = path.split(".")
        if not rest:
            replaced[first] = leaf
        else:
            items = list(replaced[first])
            items[int(rest[0])] = leaf
            replaced[first] = tuple(items)
    return replaced


def widened(value: Any) -> Any:
    """The arguments with 16-bit tensors in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    if isinstance(value, Mapping):
        return {key: widened(item) for key, item in value.items()}
    return tuple(map(widened, value)) if isinstance(value, tuple) else value


def errors(case: Case, arguments: Mapping[str, Any], op: Callable[..., Any] | None = None) -> dict[str, float]:
    """Of every output and gradient of the op (another one, if given), against the reference in fp32 on the same rounded numbers."""
    got = run(op or case.op, arguments, case.gradients)
    want = run(case.reference, widened(arguments), case.gradients, like=got)
    return {name: error(got[name], want[name]) for name in want}


def error(got: Tensor, want: Tensor) -> float:
    """RMS(got - want) / RMS(want); a NaN anywhere is infinite, and so is any difference from an all-zero reference."""
    got, want = got.double(), want.double()
    difference, size = (got - want).square().mean().sqrt(), want.square().mean().sqrt()
    if difference == 0:
        return 0.0
    ratio = (difference / size).item()
    return ratio if ratio == ratio else float("inf")
