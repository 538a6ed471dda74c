"""Every kernel at the 8B model's shapes in bf16 on this GPU: outputs and every gradient against the reference in fp32 on the same numbers;
and on small shapes, in all dtypes, what the CPU tests check in the interpreter."""

from __future__ import annotations

import gc

import pytest
import torch

from zaya.kernels import cases

DEVICE = torch.device("cuda")
# fp16 rounds 8 times finer than bf16. fp32 leaves the order of sums: a row of some thousand terms, and gradients that cancel.
LIMITS = {torch.bfloat16: 1.0, torch.float16: 0.125, torch.float32: 1e-2}


def names(size: str) -> list[str]:
    return [case.name for case in cases.cases(size) if size == cases.SMALL or " 8b" in case.name]


def case_of(name: str) -> cases.Case:
    return next(case for case in cases.cases() if case.name == name)


def check(case: cases.Case, dtype: torch.dtype) -> None:
    """Errors are limited by the case's limit, which is bf16's, times the dtype's share of it."""
    arguments = case.make(DEVICE, dtype)
    try:
        errors = cases.errors(case, arguments)
    except torch.cuda.OutOfMemoryError:
        pytest.skip("the reference in fp32 does not fit this GPU's memory")
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    rounded = arguments.get("out")  # adamw's: bf16, where all else is fp32
    limit = case.limit * LIMITS[dtype if rounded is None else rounded.dtype]
    assert {name: error for name, error in errors.items() if not error <= limit} == {}, f"limit {limit}"


@pytest.mark.parametrize("name", names(cases.CHIP))
def test_full_shapes_against_the_reference(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference's products are in fp32, whatever another test has set
    check(case_of(name), torch.bfloat16)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", names(cases.SMALL))
def test_small_shapes_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    case = case_of(name)
    if dtype not in case.dtypes:
        pytest.skip(f"the op does not take {dtype}")
    torch.backends.cuda.matmul.allow_tf32 = False
    check(case, dtype)


@pytest.mark.parametrize("name", names(cases.SMALL))
def test_twice_the_same_bits(name: str) -> None:
    """No float atomics: what a run gives does not depend on which program finished first."""
    case = case_of(name)
    arguments = case.make(DEVICE, torch.bfloat16)
    first, second = (cases.run(case.op, arguments, case.gradients) for _ in range(2))
    assert [key for key in first if not torch.equal(first[key].nan_to_num(), second[key].nan_to_num())] == []
